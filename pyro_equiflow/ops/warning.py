# SPDX-License-Identifier: Apache-2.0
"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["held_back", "warn_caller"]

_PACKAGES = ("pyro_equiflow", "pyro", "torch")
_held: ContextVar[tuple[type[Warning], list[str]] | None] = ContextVar("held", default=None)


@contextmanager
def held_back(category: type[Warning]) -> Iterator[list[str]]:
    """Collects the messages of one category in place of warning, in this thread alone."""
    found: list[str] = []
    token = _held.set((category, found))
    try:
        yield found
    finally:
        _held.reset(token)


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warns at the line outside of this package, Pyro and torch from which all was called."""
    held = _held.get()
    if held is not None and category is held[0]:
        held[1].append(message)
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
