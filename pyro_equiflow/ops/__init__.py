# SPDX-License-Identifier: Apache-2.0
"""Tensor and representation helpers: numpy and torch only, nothing of networks or flows."""
