# SPDX-License-Identifier: Apache-2.0
"""Linear layers: from free weights to filters, and the bases of kernels."""
