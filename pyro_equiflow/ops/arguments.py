# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments: a wrong type is a ``TypeError``, a wrong value a ``ValueError``, each with expected and found.

Numbers of numpy count as Python's. Tensors of no dimension do not: a number is kept without its gradient and device.
"""

from __future__ import annotations

import functools
import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import torch

__all__ = [
    "check_choice",
    "check_dtype",
    "check_flag",
    "check_instance",
    "check_integer",
    "check_integers",
    "check_items",
    "check_keywords",
    "check_number",
    "found",
    "set_fields",
]

_Value = TypeVar("_Value")


def found(value: Any) -> str:
    """A value as an error shows it: itself where that is short, else its class."""
    if isinstance(value, str | bytes | bool | int | float | complex | None):
        return reprlib.repr(value)
    if isinstance(value, np.generic):
        return reprlib.repr(value.item())
    if type(value) in (list, tuple, range) and all(isinstance(one, str | int | float | None) for one in value):
        return reprlib.repr(value)
    return type(value).__name__


def _refused(error: type[Exception], name: str, expected: str, value: object, remedy: str) -> Exception:
    return error(f"{name}: expected {expected}, found {found(value)}" + (f"; {remedy}" if remedy else ""))


def check_integer(
    name: str, value: Any, least: int | None = None, most: int | None = None, *, also: str = "", remedy: str = ""
) -> int:
    """The integer ``value``, from ``least`` to ``most``.

    :param also: what else is taken, for the message: ``"None"``, say.
    :raises TypeError: not an integer; ``True`` and ``1.0`` are none.
    :raises ValueError: outside the range.
    """
    error: type[Exception] = TypeError
    if _is_integer(value):
        number, error = int(value), ValueError
        if (least is None or number >= least) and (most is None or number <= most):
            return number
    expected = _integers(least, most, one=True) + (f" or {also}" if also else "")
    raise _refused(error, name, expected, value, remedy)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _integers(least: int | None, most: int | None, *, one: bool) -> str:
    """The words for an integer, or several, of a range."""
    noun = "integer" if one else "integers"
    if most is not None:
        return f"{'an ' if one else ''}{noun} from {least} to {most}"
    if least == 1:
        return f"{'a ' if one else ''}positive {noun}"
    return f"{'an ' if one else ''}{noun}" + ("" if least is None else f" of at least {least}")


def check_integers(
    name: str, value: Any, least: int | None = None, *, also: str = "", remedy: str = ""
) -> tuple[int, ...]:
    """The integers of a sequence or a 1-D array, each of at least ``least``.

    :raises TypeError: not a sequence, or not of integers.
    :raises ValueError: one that is too small.
    """
    error: type[Exception] = TypeError
    expected = _integers(least, None, one=False) + (f" or {also}" if also else "")
    is_array = isinstance(value, np.ndarray) and value.ndim == 1
    if isinstance(value, str | bytes) or not (is_array or isinstance(value, Sequence)):
        if _is_integer(value) and not remedy:
            remedy = f"for one write ({value!r},)"
        raise _refused(error, name, f"a sequence of {expected}", value, remedy)
    items: tuple[Any, ...] = tuple(value)
    if all(map(_is_integer, items)):
        error = ValueError
        if least is None or all(item >= least for item in items):
            return tuple(int(item) for item in items)
    raise _refused(error, name, expected, items, remedy)


def check_number(name: str, value: Any, interval: str, *, also: str = "", remedy: str = "") -> float:
    """The real number ``value`` inside an interval.

    :param interval: as in mathematics, ``"[0, 0.5)"``; ``"(0, inf)"`` are the positive finite numbers.
    :raises TypeError: not a real number.
    :raises ValueError: outside the interval, or NaN.
    """
    error: type[Exception] = TypeError
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            number, error = float(value), ValueError
        except OverflowError:  # an integer of more than 308 digits
            number, error = math.inf, ValueError
        low, high = _ends(interval)
        above = number >= low if interval[0] == "[" else number > low
        if above and (number <= high if interval[-1] == "]" else number < high):
            return number
    expected = "a positive finite number" if interval == "(0, inf)" else f"a number inside {interval}"
    raise _refused(error, name, expected + (f" or {also}" if also else ""), value, remedy)


@functools.cache
def _ends(interval: str) -> tuple[float, float]:
    low, high = map(float, interval[1:-1].split(","))
    return low, high


def check_flag(name: str, value: object, *, also: str = "") -> bool:
    """``True`` or ``False``.

    :raises TypeError: anything else, 0 and 1 too.
    """
    if not isinstance(value, bool | np.bool_):
        raise _refused(TypeError, name, "True or False" + (f" or {also}" if also else ""), value, "")
    return bool(value)


def check_choice(name: str, value: object, choices: Iterable[str], *, also: str = "", remedy: str = "") -> str:
    """One of some words.

    :raises TypeError: not a string.
    :raises ValueError: another one.
    """
    choices = tuple(choices)
    if isinstance(value, str) and value in choices:
        return value
    expected = "one of " + ", ".join(f'"{choice}"' for choice in choices) + (f" or {also}" if also else "")
    raise _refused(ValueError if isinstance(value, str) else TypeError, name, expected, value, remedy)


def check_instance(name: str, value: _Value, kind: Any, expected: str, *, remedy: str = "") -> _Value:
    """An instance of a class, or of one of several.

    :param expected: the class in words: ``"a distribution"``.
    :raises TypeError: of another class.
    """
    if not isinstance(value, kind) or (isinstance(value, type) and kind is not type):
        shown = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name}: expected {expected}, found {shown}" + (f"; {remedy}" if remedy else ""))
    return value


def check_items(name: str, value: Any, kind: Any, expected: str, *, remedy: str = "") -> list[Any]:
    """The items of an iterable, instances of a class all of them.

    :param expected: both in words: ``"a sequence of tensors"``.
    :raises TypeError: no iterable, a string or a mapping, or an item of another class.
    """
    try:
        items = None if isinstance(value, str | bytes | Mapping) else list(value)
    except TypeError:
        items = None
    if items is None:
        raise _refused(TypeError, name, expected, value, remedy)
    for item in items:
        if type(item) is not kind:
            check_instance(name, item, kind, expected, remedy=remedy)
    return items


def check_dtype(name: str, dtype: torch.dtype, *, also: str = "") -> torch.dtype:
    """A floating-point dtype.

    :raises TypeError: not a dtype.
    :raises ValueError: one of integers, say.
    """
    expected = "a floating-point torch.dtype" + (f" or {also}" if also else "")
    check_instance(name, dtype, torch.dtype, expected)
    if not dtype.is_floating_point:
        raise ValueError(f"{name}: expected {expected}, found {dtype}")
    return dtype


def check_keywords(
    owner: Callable[..., Any], given: Iterable[str], *takers: Callable[..., Any], without: Iterable[str] = ()
) -> None:
    """Raises where ``owner`` was given keywords that none takes to whom it hands them on.

    :param owner: a function or a class.
    :param given: the names of keywords that are not its own.
    :param takers: those whose keyword-only arguments they may be.
    :param without: arguments of the takers that ``owner`` sets itself.
    :raises TypeError: the unknown ones are named, and those that are expected.
    """
    further = {name for taker in takers for name in _keywords(taker)} - set(without)
    unknown = [name for name in given if name not in further]
    if unknown:
        expected = ", ".join(sorted({*_keywords(owner), *further}))
        raise TypeError(f"{owner.__name__}: expected keywords among {expected}, found {', '.join(unknown)}")


def _keywords(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def set_fields(instance: object, **values: Any) -> None:
    """Sets fields of a frozen dataclass to what checks gave: numbers of numpy become Python's."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)
