# SPDX-License-Identifier: Apache-2.0
"""Exceptions and warnings of the package. Bad arguments raise plain ``ValueError`` or ``TypeError``."""

from __future__ import annotations

__all__ = ["ConvergenceError", "EquivarianceError"]


class ConvergenceError(RuntimeError):
    """An iteration ended short of its tolerance: the message says by how much, for how many, and what to change."""


class EquivarianceError(ValueError):
    """A declared symmetry does not hold: the message gives the error, the tolerance and where it is largest."""
