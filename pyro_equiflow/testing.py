# SPDX-License-Identifier: Apache-2.0
"""Checks of symmetry, inverses and log-dets, for transforms and distributions of ours or a user's.

Each ``…_error`` gives a number, each ``assert_…`` raises ``AssertionError`` with that number, the tolerance and the
element where it is largest. Tolerances by default are those the package holds itself to, :data:`TOLERANCES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from escnn.group import GroupElement
from escnn.nn import FieldType
from pyro.distributions import TransformModule
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_equiflow._escnn.elements import probe_elements
from pyro_equiflow.ops.arguments import check_instance, check_number
from pyro_equiflow.ops.events import act, check_elements, check_event, event_dim, grid_elements
from pyro_equiflow.ops.representations import validate_field_type
from pyro_equiflow.ops.rounding import rounding_error
from pyro_equiflow.transforms.actnorm import awaits_data

__all__ = [
    "TOLERANCES",
    "act",
    "assert_equivariant",
    "assert_invariant",
    "assert_inverse",
    "assert_log_det",
    "equivariance_error",
    "equivariance_errors",
    "invariance_error",
    "inverse_error",
    "log_det_error",
    "rounding_error",
]

#: Largest error by property and dtype; ``"equivariance"`` on grids in float64 allows for escnn's sampling.
TOLERANCES: dict[tuple[str, torch.dtype], float] = {
    ("equivariance", torch.float32): 1e-5,
    ("equivariance", torch.float64): 1e-12,
    ("equivariance on grids", torch.float32): 1e-5,
    ("equivariance on grids", torch.float64): 1e-9,
    ("inverse", torch.float32): 1e-5,
    ("inverse", torch.float64): 1e-11,
    ("log_det", torch.float32): 1e-4,
    ("log_det", torch.float64): 1e-10,
}


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


def _check_tolerance(tolerance: float | None) -> None:
    if tolerance is not None:
        check_number("tolerance", tolerance, "(0, inf)", also="None")


def _relative(difference: Tensor, reference: Tensor, dimensions: int) -> float:
    norm = torch.linalg.vector_norm
    axes = tuple(range(-dimensions, 0))
    return float((norm(difference, dim=axes) / norm(reference, dim=axes).clamp_min(1e-30)).max())


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
        errors.append((g, _relative(found - expected, expected, event_dim(image_type))))
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


@torch.no_grad()
def inverse_error(transform: Any, x: Tensor) -> float:
    """The largest relative error of ``transform.inv(transform(x))`` and of the other order, caches not used.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_coupling
        >>> from pyro_equiflow.testing import inverse_error
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> inverse_error(equivariant_coupling(vectors, identity_init=False), torch.randn(5, 6)) < 1e-5
        True

    :param transform: any ``torch.distributions.Transform``.
    :param x: events ``(*batch, C, *spatial)``.
    """
    dimensions = _events_of(transform, x)
    # Copies: a transform's cache would answer with the very tensor that it was given.
    there = transform.inv(transform(x).clone())
    y = _in_codomain(transform, x)
    back = transform(transform.inv(y.clone()).clone())
    return max(_relative(there - x, x, dimensions), _relative(back - y, y, dimensions))


def _events_of(transform: Any, x: Tensor) -> int:
    """The dimensions of an event, once the transform is one and ``x`` holds events."""
    check_instance("transform", transform, Transform, "a torch.distributions.Transform")
    dimensions = transform.domain.event_dim
    check_instance("x", x, Tensor, "a torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, found {x.dtype}; convert it with .to()")
    if x.dim() < dimensions:
        raise ValueError(f"x: expected {dimensions} dimensions of an event at least, found shape {tuple(x.shape)}")
    return dimensions


def _in_codomain(transform: Any, x: Tensor) -> Tensor:
    """``x`` itself where it may be an image, which asks more than to start from images; else its image."""
    return (x if transform.forward_shape(x.shape) == x.shape else transform(x.clone())).clone()


def log_det_error(transform: Any, x: Tensor) -> float:
    r"""The largest error of ``log_abs_det_jacobian`` against the dense autograd Jacobian's ``slogdet``.

    Relative to :math:`\max(1, |\log\det|)`. Both directions are checked.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_coupling
        >>> from pyro_equiflow.testing import log_det_error
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> log_det_error(equivariant_coupling(vectors, identity_init=False), torch.randn(5, 6)) < 1e-4
        True

    :param transform: any ``torch.distributions.Transform``.
    :param x: events ``(*batch, C, *spatial)``; small ones, the Jacobian is dense.
    """
    dimensions = _events_of(transform, x)
    flat = x.detach().reshape(-1, *x.shape[x.dim() - dimensions :])
    size = flat[0].numel()
    worst = 0.0
    for start in flat:
        for direction in (transform, transform.inv):
            event = start.clone() if direction is transform else _in_codomain(transform, start).detach()
            jacobian = torch.autograd.functional.jacobian(lambda e, t=direction: t(e.clone()), event)
            expected = torch.linalg.slogdet(jacobian.reshape(size, size))[1]
            with torch.no_grad():
                found = direction.log_abs_det_jacobian(event, direction(event).clone())
            worst = max(worst, float((found - expected).abs() / expected.abs().clamp_min(1.0)))
    return worst


def _tolerance(
    property_name: str, dtype: torch.dtype, tolerance: float | None, field_type: FieldType | None = None
) -> float:
    if tolerance is not None:
        return tolerance
    if property_name == "equivariance" and field_type is not None and field_type.gspace.dimensionality:
        property_name = "equivariance on grids"
    return TOLERANCES[property_name, dtype]


def _require(name: str, error: float, tolerance: float, where: object = None) -> None:
    if not error <= tolerance:
        at = "" if where is None else f" at the group element {where}"
        raise AssertionError(f"{name} error {error:.3e} is above the tolerance {tolerance:.1e}{at}")


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
    _check_tolerance(tolerance)
    in_type = _field_type(function, field_type)
    error, where = _worst(equivariance_errors(function, x, in_type, out_type=out_type, elements=elements))
    _require("equivariance", error, _tolerance("equivariance", x.dtype, tolerance, in_type), where)


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
    _check_tolerance(tolerance)
    found_type = _field_type(distribution, field_type)
    error, where = _worst_invariance(_log_prob(distribution), x, found_type, elements)
    if tolerance is None:
        with torch.no_grad():
            size = max(1.0, float(_log_prob(distribution)(x).abs().max()))
        tolerance = size * _tolerance("equivariance", x.dtype, None, found_type)
    _require("invariance", error, tolerance, where)


def assert_inverse(transform: Any, x: Tensor, *, tolerance: float | None = None) -> None:
    """Raises ``AssertionError`` where :func:`inverse_error` is above the tolerance.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_coupling
        >>> from pyro_equiflow.testing import assert_inverse
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> assert_inverse(equivariant_coupling(vectors, identity_init=False), torch.randn(5, 6))

    :param transform: see :func:`inverse_error`.
    :param x: see :func:`inverse_error`.
    :param tolerance: the largest error that passes; by default :data:`TOLERANCES`' for the dtype.
    :raises AssertionError: an error above it.
    """
    _check_tolerance(tolerance)
    _require("inverse", inverse_error(transform, x), _tolerance("inverse", x.dtype, tolerance))


def assert_log_det(transform: Any, x: Tensor, *, tolerance: float | None = None) -> None:
    """Raises ``AssertionError`` where :func:`log_det_error` is above the tolerance.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_coupling
        >>> from pyro_equiflow.testing import assert_log_det
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> assert_log_det(equivariant_coupling(vectors, identity_init=False), torch.randn(5, 6))

    :param transform: see :func:`log_det_error`.
    :param x: see :func:`log_det_error`.
    :param tolerance: the largest error that passes; by default :data:`TOLERANCES`' for the dtype.
    :raises AssertionError: an error above it.
    """
    _check_tolerance(tolerance)
    _require("log-det", log_det_error(transform, x), _tolerance("log_det", x.dtype, tolerance))
