# SPDX-License-Identifier: Apache-2.0
"""Checks of equivariance and invariance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from escnn.group import GroupElement
from escnn.nn import FieldType
from pyro.distributions import TransformModule
from torch import Tensor
from torch.distributions import Distribution

from pyro_equiflow._escnn.elements import probe_elements
from pyro_equiflow.ops.arguments import check_instance
from pyro_equiflow.ops.events import act, check_elements, check_event, event_dim, grid_elements
from pyro_equiflow.ops.representations import validate_field_type
from pyro_equiflow.testing.tolerances import check_tolerance, relative_error, require, tolerance_of
from pyro_equiflow.transforms.actnorm import awaits_data

__all__ = [
    "assert_equivariant",
    "assert_invariant",
    "equivariance_error",
    "equivariance_errors",
    "invariance_error",
]


def _field_type(thing: Any, field_type: FieldType | None) -> FieldType:
    found = field_type if field_type is not None else getattr(thing, "field_type", None)
    if found is None:
        raise ValueError(
            f"field_type: expected one for {type(thing).__name__}, which does not carry its own, found None"
        )
    validate_field_type(found)
    return found


def _elements(field_type: FieldType, elements: Iterable[GroupElement] | None) -> list[GroupElement]:
    if elements is not None:
        return check_elements(field_type, elements)
    found, group = grid_elements(field_type), field_type.fibergroup
    if field_type.gspace.dimensionality == 0 and group.order() < 0:
        # Those of escnn are fractions of a whole turn: of a finite subgroup.
        found.extend(probe_elements(group))
    return found


# Numbers that a transform is given at once.
_AT_ONCE = 2**18


def _on_each(function: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The function of one batch after another; a transform, which takes any batch shape, of several at once."""
    together = isinstance(function, TransformModule) and all(x.shape == batches[0].shape for x in batches)
    # A check does not set what the first large batch would.
    if not together or awaits_data(cast("TransformModule", function)):
        yield from map(function, batches)
        return
    count = max(1, _AT_ONCE // max(1, batches[0].numel()))
    for start in range(0, len(batches), count):
        yield from function(torch.stack(list(batches[start : start + count])))


def _worst(errors: list[tuple[GroupElement, float]]) -> tuple[float, GroupElement | None]:
    # Nothing compares with NaN, which is the worst of all.
    where, error = max(errors, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1], default=(None, 0.0))
    return error, where


@torch.no_grad()
def equivariance_errors(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    field_type: FieldType | None = None,
    *,
    out_type: FieldType | None = None,
    elements: Iterable[GroupElement] | None = None,
) -> list[tuple[GroupElement, float]]:
    r"""Each group element with the largest :math:`|f(g \cdot x) - g \cdot f(x)| / |f(x)|` over the samples.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.testing import equivariance_errors
        >>> space = gspaces.no_base_space(group.cyclic_group(4))
        >>> vector = enn.FieldType(space, [space.irrep(1)])
        >>> [round(error, 6) for _, error in equivariance_errors(torch.relu, torch.tensor([1.0, 0.0]), vector)]
        [0.0, 0.0, 1.0, 1.0]

    :param function: a transform, or any map of events.
    :param x: events ``(*batch, C, *spatial)``.
    :param field_type: how the group acts on ``x``; default the function's own.
    :param out_type: how it acts on the image; default the function's own, else as on ``x``.
    :param elements: group elements; default all that permute the grid; on a point escnn's testing elements, and
        of a continuous group some that generate a dense part of it.
    """
    check_instance("function", function, Callable, "a transform or a function of events")
    in_type = _field_type(function, field_type)
    check_event(x, in_type, "x")
    image_type = out_type if out_type is not None else getattr(function, "out_type", in_type)
    validate_field_type(image_type, "out_type")
    image, errors, elements = function(x), [], _elements(in_type, elements)
    moved = [act(in_type, g, x) for g in elements]
    for g, found in zip(elements, _on_each(function, moved)):
        expected = act(image_type, g, image)
        errors.append((g, relative_error(found - expected, expected, event_dim(image_type))))
    return errors


def equivariance_error(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    field_type: FieldType | None = None,
    *,
    out_type: FieldType | None = None,
    elements: Iterable[GroupElement] | None = None,
) -> float:
    r"""The largest :math:`|f(g \cdot x) - g \cdot f(x)| / |f(x)|` over samples and group elements.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_coupling
        >>> from pyro_equiflow.testing import equivariance_error
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> equivariance_error(equivariant_coupling(vectors, identity_init=False), torch.randn(5, 6)) < 1e-5
        True

    :param function: a transform, or any map of events.
    :param x: events ``(*batch, C, *spatial)``.
    :param field_type: how the group acts on ``x``; default the function's own.
    :param out_type: how it acts on the image; default the function's own, else as on ``x``.
    :param elements: group elements; default all that permute the grid; on a point escnn's testing elements, and
        of a continuous group some that generate a dense part of it.
    """
    return _worst(equivariance_errors(function, x, field_type, out_type=out_type, elements=elements))[0]


def _log_prob(thing: Distribution | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if isinstance(thing, Distribution):
        return thing.log_prob
    return check_instance("distribution", thing, Callable, "a distribution or a function that gives a log-density")


@torch.no_grad()
def _worst_invariance(
    log_prob: Callable[[Tensor], Tensor], x: Tensor, field_type: FieldType, elements: Any
) -> tuple[float, GroupElement | None]:
    check_event(x, field_type, "x")
    reference = log_prob(x)
    return _worst(
        [(g, float((log_prob(act(field_type, g, x)) - reference).abs().max())) for g in _elements(field_type, elements)]
    )


def invariance_error(
    distribution: Distribution | Callable[[Tensor], Tensor],
    x: Tensor,
    field_type: FieldType | None = None,
    *,
    elements: Iterable[GroupElement] | None = None,
) -> float:
    r"""The largest :math:`|\log q(g \cdot x) - \log q(x)|`, in nats, over samples and group elements.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import InvariantNormal
        >>> from pyro_equiflow.testing import invariance_error
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> invariance_error(InvariantNormal(vectors), torch.randn(5, 6)) < 1e-4
        True

    :param distribution: a distribution, or a function that gives a log-density.
    :param x: events ``(*batch, C, *spatial)``.
    :param field_type: how the group acts on ``x``; default the distribution's own.
    :param elements: group elements; default as in :func:`equivariance_error`.
    """
    return _worst_invariance(_log_prob(distribution), x, _field_type(distribution, field_type), elements)[0]


def assert_equivariant(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    field_type: FieldType | None = None,
    *,
    out_type: FieldType | None = None,
    elements: Iterable[GroupElement] | None = None,
    tolerance: float | None = None,
) -> None:
    """Raises ``AssertionError`` where :func:`equivariance_error` is above the tolerance.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.testing import assert_equivariant
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> assert_equivariant(torch.neg, torch.randn(5, 6), vectors)
        >>> assert_equivariant(torch.tanh, torch.randn(5, 6), vectors)
        Traceback (most recent call last):
            ...
        AssertionError: equivariance error ... is above the tolerance 1.0e-05 at the group element ...

    :param function: see :func:`equivariance_error`.
    :param x: see :func:`equivariance_error`.
    :param field_type: see :func:`equivariance_error`.
    :param out_type: see :func:`equivariance_error`.
    :param elements: see :func:`equivariance_error`.
    :param tolerance: the largest error that passes; by default :data:`TOLERANCES`' for the dtype.
    :raises AssertionError: an error above it, with the group element where it is largest.
    """
    check_tolerance(tolerance)
    in_type = _field_type(function, field_type)
    error, where = _worst(equivariance_errors(function, x, in_type, out_type=out_type, elements=elements))
    require("equivariance", error, tolerance_of("equivariance", x.dtype, tolerance, in_type), where)


def assert_invariant(
    distribution: Distribution | Callable[[Tensor], Tensor],
    x: Tensor,
    field_type: FieldType | None = None,
    *,
    elements: Iterable[GroupElement] | None = None,
    tolerance: float | None = None,
) -> None:
    """Raises ``AssertionError`` where :func:`invariance_error` is above the tolerance.

    By default the tolerance is that of equivariance times the size of the log-density (at least 1).

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import InvariantNormal
        >>> from pyro_equiflow.testing import assert_invariant
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> assert_invariant(InvariantNormal(vectors), torch.randn(5, 6))

    :param distribution: see :func:`invariance_error`.
    :param x: see :func:`invariance_error`.
    :param field_type: see :func:`invariance_error`.
    :param elements: see :func:`invariance_error`.
    :param tolerance: the largest change that passes, in nats.
    :raises AssertionError: a change above it, with the group element where it is largest.
    """
    check_tolerance(tolerance)
    found_type = _field_type(distribution, field_type)
    error, where = _worst_invariance(_log_prob(distribution), x, found_type, elements)
    if tolerance is None:
        with torch.no_grad():
            size = max(1.0, float(_log_prob(distribution)(x).abs().max()))
        tolerance = size * tolerance_of("equivariance", x.dtype, None, found_type)
    require("invariance", error, tolerance, where)
