# SPDX-License-Identifier: Apache-2.0
"""Every argument of every public constructor and function: what it cannot take is refused, expected and found."""

from __future__ import annotations

import inspect
import warnings
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import pyro_equiflow as pe
from pyro_equiflow import infer, logdet, maps, nn, plots, solvers, testing, transforms
from tests.argument_cases import EXEMPT, HANDED_ON, LINES, SORTS

MODULES = (pe, nn, maps, solvers, logdet, infer, testing, plots, transforms)


def public() -> dict[str, Any]:
    """All public classes and functions, and the public methods that classes of the package have."""
    found: dict[str, Any] = {}
    for module in MODULES:
        for name in module.__all__:
            thing = getattr(module, name)
            if isinstance(thing, ModuleType) or not callable(thing):
                continue
            found[name] = thing
            for method in dir(thing) if inspect.isclass(thing) else ():
                function = inspect.getattr_static(thing, method)
                function = getattr(function, "__func__", function)
                ours = inspect.isfunction(function) and function.__module__.startswith("pyro_equiflow")
                if ours and not method.startswith("_") and len(inspect.signature(function).parameters) > 1:
                    found[function.__qualname__] = function
    return found


PUBLIC = public()


def exempt(name: str) -> bool:
    return name in EXEMPT or name.partition(".")[2] in EXEMPT


def called(name: str) -> Any:
    """The callable of a line, methods bound."""
    of = LINES[name].of
    function = PUBLIC[name] if of is None else of()
    if hasattr(function, "dispatch"):  # by the class of its first argument, which has to be given by position
        first = next(iter(inspect.signature(function).parameters))
        return lambda **given: function(given.pop(first), **given)
    return function


def arguments(name: str) -> list[str]:
    """All arguments of a callable, those handed on by keyword included."""
    line = LINES[name]
    own = [p for p in inspect.signature(PUBLIC[name]).parameters if p != "self"]
    further = [p for function in line.through for p in keywords(function) if p not in line.without]
    return [p for p in dict.fromkeys([*own, *further, *line.baseline()]) if p not in HANDED_ON]


def keywords(function: Any) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def sort(name: str, argument: str):
    return LINES[name].sorts.get(argument) or SORTS[argument]


def test_nothing_public_is_left_out():
    missing = [name for name in PUBLIC if name not in LINES and not exempt(name)]
    assert not missing, f"no line in tests/argument_cases.py for {missing}"
    assert not set(LINES) - set(PUBLIC)
    unsorted = [(n, a) for n in LINES for a in arguments(n) if a not in LINES[n].sorts and a not in SORTS]
    assert not unsorted, f"no sort in tests/argument_cases.py for {unsorted}"


@pytest.mark.parametrize("name", LINES)
def test_the_baseline_works_and_numbers_of_numpy_too(name):
    """What is tried below is wrong for the one argument that is changed."""
    baseline, function = LINES[name].baseline(), called(name)
    function(**baseline)
    examples = {a: sort(name, a).numpy for a in arguments(name) if sort(name, a).numpy is not None}
    plt.close("all")
    if examples:
        function(**{**baseline, **examples})


@pytest.mark.parametrize("name", LINES)
def test_wrong_arguments(name):
    """Near misses, and whatever comes: one argument after the other, all others as in the baseline."""
    function, line = called(name), LINES[name]

    def refused(argument: str, value: Any) -> None:
        try:
            function(**{**line.baseline(), argument: value})
        except (TypeError, ValueError) as error:
            text = str(error)
        else:
            pytest.fail(f"{argument}={value!r} is taken")
        known = "expected" in text and "found" in text and line.named.get(argument, argument) in text
        assert known, f"{argument}={value!r}: {text}"

    # A failure shows what was drawn: there is little to shrink.
    @settings(
        max_examples=8, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.fixed_dictionaries({argument: sort(name, argument).anything() for argument in arguments(name)}))
    def anything(values: dict[str, Any]) -> None:
        for argument, value in values.items():
            refused(argument, value)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for argument in arguments(name):
            for value in sort(name, argument).wrong:
                refused(argument, value)
        anything()
    plt.close("all")


@pytest.mark.parametrize("name", [name for name in LINES if LINES[name].through])
def test_unknown_keywords(name):
    with pytest.raises(TypeError, match="expected keywords among .*, found hiden_dims"):
        called(name)(**LINES[name].baseline(), hiden_dims=(8,))
    for keyword in LINES[name].without:
        if keyword not in arguments(name):
            with pytest.raises(TypeError, match=f"expected keywords among .*, found {keyword}"):
                called(name)(**LINES[name].baseline(), **{keyword: None})
