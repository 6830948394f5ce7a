# SPDX-License-Identifier: Apache-2.0
"""Unconstrained values whose image rounds onto the edge of a support or beyond it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_equiflow.ops.tracing import is_traced

__all__ = ["entrywise", "kept_inside"]

_HALVINGS = 30


def entrywise(support: Any) -> Any:
    """The constraint of a single entry, where a support is one of every entry by itself; else ``None``."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support if biject_to(support).domain.event_dim == 0 else None


def kept_inside(unconstrained: Tensor, support: Any) -> Tensor:
    """The values, those that no number of their dtype in the support stands for drawn in towards 0 until one does.

    ``exp(-200.0)`` is 0 in float32, say, which is not positive, and a model that scores it raises. Draws of a fit's
    first steps reach that far. So do those whose image is too small or too large for gradients, beyond ``exp(72)`` in
    float32, ``exp(673)`` in float64. Gradients are those of the value drawn in.

    :param unconstrained: shape ``(*batch, *event)`` of the map ``biject_to(support)``.
    :param support: the site's constraint.
    """
    support = entrywise(support) or support
    if support is constraints.real or is_traced(unconstrained):
        return unconstrained
    bijection = biject_to(support)
    event_dim, value_dim = bijection.domain.event_dim, bijection.codomain.event_dim

    # Gradients of log-densities hold reciprocals, times logarithms: these are to be numbers as well.
    limits = torch.finfo(unconstrained.dtype)
    edge = limits.max * limits.eps

    def inside(u: Tensor) -> Tensor:
        value = bijection(u)
        size = value.abs()
        usual = (size < edge) & ((size == 0) | (size > 1 / edge))
        if value_dim:
            usual = usual.flatten(-value_dim).all(-1)
        return (support.check(value) & usual)[(...,) + event_dim * (None,)]

    with torch.no_grad():
        kept = inside(unconstrained)
        if bool(kept.all()):
            return unconstrained
        good, bad = torch.where(kept, 1.0, 0.0), torch.ones_like(kept, dtype=unconstrained.dtype)
        for _ in range(_HALVINGS):
            middle = (good + bad) / 2
            fits = inside(middle * unconstrained)
            good, bad = torch.where(fits, middle, good), torch.where(fits, bad, middle)
        # Where nothing between 0 and the value fits (it is not a number, say) the model says what is wrong with it.
        good = torch.where(good > 0, good, 1.0).to(unconstrained.dtype)
    return unconstrained * good
