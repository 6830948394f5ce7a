# SPDX-License-Identifier: Apache-2.0
"""Sorts of arguments: which values each takes, and whatever else somebody may pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

_OBJECTS: list[Any] = [
    object(), torch.ones(2), torch.tensor(0.5), torch.tensor(1), torch.ones(2, 3, dtype=torch.long), np.ones(2),
    np.array([-1]), np.int64(-2), np.float32("nan"), np.bool_(True), len, int, torch.nn.Linear(1, 1), 1j, {}, {"a": 1},
    {1, 2}, range(-2, 3), [[1]], (torch.tensor(3),),
]  # fmt: skip
_SCALARS = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=4) | st.binary(max_size=2)
ANYTHING = (
    _SCALARS | st.lists(_SCALARS, max_size=3) | st.lists(_SCALARS, max_size=3).map(tuple) | st.sampled_from(_OBJECTS)
)


@dataclass(frozen=True)
class Sort:
    """What an argument may be.

    :ivar takes: whether a value is one of these.
    :ivar wrong: values that are none, near misses as a rule.
    :ivar numpy: a value as numpy has it, to be taken like Python's own.
    """

    takes: Callable[[Any], bool]
    wrong: tuple[Any, ...] = ()
    numpy: Any = None

    def anything(self) -> st.SearchStrategy[Any]:
        """Whatever the argument may not be."""
        return ANYTHING.filter(lambda value: not self.takes(value))

    def or_none(self) -> Sort:
        """The sort that takes ``None`` as well."""
        return replace(self, takes=lambda value: value is None or self.takes(value))

    def or_instance(self, kind: type) -> Sort:
        """The sort that takes instances of a class as well."""
        return replace(self, takes=lambda value: isinstance(value, kind) or self.takes(value))

    def but(self, *wrong: Any) -> Sort:
        """The sort with further wrong values, which it takes elsewhere."""
        return replace(self, wrong=(*self.wrong, *wrong))


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def integer(least: int = 1, most: int = 10**9, numpy: int | None = None) -> Sort:
    """An integer of a range."""
    example = np.int64(least if numpy is None else numpy)
    return Sort(lambda v: _is_integer(v) and least <= v <= most, (least - 1, float(least), True, str(least)), example)


def integers(takes: Callable[[Sequence[int]], bool], *wrong: Any, numpy: Sequence[int] | None = None) -> Sort:
    """A sequence of integers that ``takes`` accepts."""

    def taken(value: Any) -> bool:
        array = isinstance(value, np.ndarray) and value.ndim == 1
        return (array or isinstance(value, list | tuple | range)) and all(map(_is_integer, value)) and takes(value)

    return Sort(taken, wrong, None if numpy is None else np.array(numpy))


def number(interval: str, numpy: float) -> Sort:
    """A real number of an interval, written as in mathematics."""
    low, high = map(float, interval[1:-1].split(","))

    def taken(value: Any) -> bool:
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        inside = low <= value if interval[0] == "[" else low < value
        return bool(inside and (value <= high if interval[-1] == "]" else value < high))

    outside = [edge for edge in (low, high) if not taken(edge)]
    return Sort(taken, (*outside, float("nan"), str(numpy), torch.tensor(numpy)), np.float64(numpy))


def choice(*names: str) -> Sort:
    """One of some words."""
    return Sort(lambda value: isinstance(value, str) and value in names, ("", names[0].upper(), [names[0]]))


def instance(kind: Any, *wrong: Any) -> Sort:
    """An instance of a class; some instances may be wrong all the same."""
    classes = (kind,) if isinstance(kind, type) else ()
    return Sort(lambda value: isinstance(value, kind), (*classes, *wrong))


FLAG = Sort(lambda value: isinstance(value, bool | np.bool_), (0, 1, "yes"), np.bool_(True))
CALLABLE = Sort(callable, ("function",))
MAPPING = instance(Mapping)
