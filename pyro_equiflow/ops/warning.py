# SPDX-License-Identifier: Apache-2.0
"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_caller"]

_PACKAGES = ("pyro_equiflow", "pyro", "torch")


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warns at the line outside of this package, Pyro and torch from which all was called."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
