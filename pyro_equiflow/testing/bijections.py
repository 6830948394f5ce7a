# SPDX-License-Identifier: Apache-2.0
"""Checks of inverses and log-dets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_equiflow.ops.arguments import check_instance
from pyro_equiflow.testing.tolerances import check_tolerance, relative_error, require, tolerance_of

__all__ = ["assert_inverse", "assert_log_det", "inverse_error", "log_det_error"]


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
    return max(relative_error(there - x, x, dimensions), relative_error(back - y, y, dimensions))


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
    check_tolerance(tolerance)
    require("inverse", inverse_error(transform, x), tolerance_of("inverse", x.dtype, tolerance))


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
    check_tolerance(tolerance)
    require("log-det", log_det_error(transform, x), tolerance_of("log_det", x.dtype, tolerance))
