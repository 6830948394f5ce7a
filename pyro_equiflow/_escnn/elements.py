# SPDX-License-Identifier: Apache-2.0
"""Which elements of a group are enough, and which irreps: decided here for everything above."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from escnn.group import O2, O3, SO2, SO3, DirectProductGroup, GroupElement

__all__ = ["Walk", "candidate_irreps", "group_key", "kept_by", "probe_elements", "walk"]

# ---- elements that decide ---------------------------------------------------------------------


def group_key(group: Any) -> tuple:
    """What tells groups apart: escnn's compare by value and have no hash."""
    return type(group).__name__, repr(sorted(group._keys.items()))


_Function = TypeVar("_Function", bound=Callable[..., Any])


def kept_by(key: Callable[..., tuple]) -> Callable[[_Function], _Function]:
    """Keeps what a function gives, by a key of its arguments: functools.cache would ask for the groups' hashes."""

    def decorate(function: _Function) -> _Function:
        known: dict[tuple, Any] = {}

        @functools.wraps(function)
        def ask(*args: Any) -> Any:
            asked = key(*args)
            if asked not in known:
                known[asked] = function(*args)
            return known[asked]

        return cast("_Function", ask)

    return decorate


# No multiple of the golden angle comes closer to a whole turn than that of any other angle does (Hurwitz): the n-th
# stays 2.8 / n away, so that irreps of unlike frequencies are told apart far above rounding.
_GOLDEN = math.pi * (math.sqrt(5) - 1)


@kept_by(group_key)
def probe_elements(group: Any) -> tuple[GroupElement, ...]:
    """Elements that decide whether a linear statement holds on the whole group: they generate a dense part of it.

    A finite group is decided by its generators, the circle by one turn that is no fraction of a whole one, rotations of
    space by two such about different axes, further components by one element of each kind of reflection. A direct
    product by those of its factors, of which it is made: of elements drawn at random too few might meet all of its
    components. For a group that is none of escnn's its own testing elements are taken.
    """
    if group.order() == 1:
        return (group.identity,)
    if isinstance(group, DirectProductGroup):
        first, second = probe_elements(group.G1), probe_elements(group.G2)
        found = (*map(group.inclusion1, first), *map(group.inclusion2, second))
        return tuple(g for g in found if g != group.identity)
    if group.order() > 0:
        return tuple(group.generators)
    if isinstance(group, SO2):
        return (group.element(_GOLDEN, "radians"),)
    if isinstance(group, O2):
        return group.element((0, _GOLDEN), "radians"), group.element((1, 0.0), "radians")
    half = _GOLDEN / 2
    about_z = np.array([0.0, 0.0, math.sin(half), math.cos(half)])
    about_x = np.array([math.sin(half), 0.0, 0.0, math.cos(half)])
    if isinstance(group, SO3):
        return group.element(about_z, "Q"), group.element(about_x, "Q")
    if isinstance(group, O3):
        identity = np.array([0.0, 0.0, 0.0, 1.0])
        values: list[tuple[int, np.ndarray]] = [(0, about_z), (0, about_x), (1, identity)]
        return tuple(group.element(value, "Q") for value in values)
    return tuple(group.testing_elements())


# ---- finite groups, reached from their generators ----------------------------------------------


@dataclass(frozen=True)
class Walk:
    """How products of generators reach every element of a finite group, each by the shortest way.

    :ivar elements: the identity first.
    :ivar steps: for every further element the number of the one before and of the generator that leads on.
    :ivar images: for every generator the numbers of its products with all elements, ``(generators, order)``.
    """

    elements: list[GroupElement]
    steps: list[tuple[int, int]]
    images: np.ndarray

    def matrices(self, generators: Sequence[np.ndarray]) -> np.ndarray:
        """A representation at all elements, ``(order, size, size)``, of its matrices at the generators."""
        size = generators[0].shape[0] if len(generators) else 1
        found = np.empty((len(self.elements), size, size))
        found[0] = np.eye(size)
        for number, (before, generator) in enumerate(self.steps, 1):
            np.matmul(generators[generator], found[before], out=found[number])
        return found


@kept_by(lambda group, generators: (*group_key(group), tuple(map(repr, generators))))
def walk(group: Any, generators: Sequence[GroupElement]) -> Walk:
    """The walk through a finite group: one product an element and generator, where its table has order squared.

    :raises ValueError: the elements given do not generate the group.
    """
    numbers = {group.identity: 0}
    elements, steps = [group.identity], []
    images: list[list[int]] = []
    for before, element in enumerate(elements):  # grows meanwhile
        images.append([])
        for generator, g in enumerate(generators):
            product = g @ element
            number = numbers.setdefault(product, len(elements))
            if number == len(elements):
                elements.append(product)
                steps.append((before, generator))
            images[-1].append(number)
    if len(elements) != group.order():
        raise ValueError(f"expected generators of {group}, found {len(elements)} elements")
    return Walk(elements, steps, np.array(images, dtype=np.int64).reshape(len(elements), -1).T)


# ---- irreps of continuous groups, as many as it takes -------------------------------------------

_SMALL = 1e-3
"""An angle whose multiples by the frequencies of an irrep stay below half a turn, up to a frequency of 3000."""


def candidate_irreps(group: Any, rho: Callable[[GroupElement], np.ndarray]) -> list[Any]:
    """The irreps that a representation may hold, in an order that does not hang on which ones were built before.

    Frequencies are read off the eigenvalues at a small rotation, so that no irrep that occurs is missed, however few
    the group was built with.
    """
    if group.order() > 0:
        return list(group.irreps())
    if isinstance(group, DirectProductGroup):
        first = candidate_irreps(group.G1, lambda g: rho(group.inclusion1(g)))
        second = candidate_irreps(group.G2, lambda g: rho(group.inclusion2(g)))
        found = []
        for one, two in itertools.product(first, second):
            kinds = 2 if one.type == two.type == "C" else 1
            found += [group.irrep(one.id, two.id, kind) for kind in range(kinds)]
        return found
    if isinstance(group, SO2):
        return [group.irrep(k) for k in _frequencies(rho(group.element(_SMALL, "radians")))]
    if isinstance(group, O2):
        turning = _frequencies(rho(group.element((0, _SMALL), "radians")))
        fixed = [group.irrep(0, 0), group.irrep(1, 0)] if 0 in turning else []
        return [*fixed, *(group.irrep(1, k) for k in turning if k)]
    about_z = np.array([0.0, 0.0, math.sin(_SMALL / 2), math.cos(_SMALL / 2)])
    if isinstance(group, SO3):
        highest = max(_frequencies(rho(group.element(about_z, "Q"))))
        return [group.irrep(l) for l in range(highest + 1)]
    if isinstance(group, O3):
        highest = max(_frequencies(rho(group.element((0, about_z), "Q"))))
        return [group.irrep(parity, l) for parity in (0, 1) for l in range(highest + 1)]
    return list(group.irreps())


def _frequencies(matrix: np.ndarray) -> list[int]:
    """Those of a representation of the circle, of its matrix at a small angle."""
    angles = np.abs(np.angle(np.linalg.eigvals(matrix)))
    return sorted({int(k) for k in np.round(angles / _SMALL)})
