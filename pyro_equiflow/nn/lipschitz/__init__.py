# SPDX-License-Identifier: Apache-2.0
"""Bounds of Lipschitz constants, and what is held below one."""
