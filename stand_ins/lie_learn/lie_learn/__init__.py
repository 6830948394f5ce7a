# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the part of ``lie_learn`` that ``escnn`` uses: Wigner D-matrices of SO(3)."""

__version__ = "0.0.2.post1"
