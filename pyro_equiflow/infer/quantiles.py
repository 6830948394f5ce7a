# SPDX-License-Identifier: Apache-2.0
"""Quantiles of draws, in the support of their site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_equiflow.infer.supports import entrywise

__all__ = ["constrained_quantiles"]


def constrained_quantiles(unconstrained: Tensor, levels: Tensor, support: Any) -> Tensor:
    """Quantiles over the first dimension: of the constrained values, where these form a product of intervals.

    Otherwise (a simplex, say) the images of unconstrained quantiles, and so in the support.

    :param unconstrained: draws, shape ``(n, *shape)``.
    :param levels: numbers between 0 and 1, shape ``(k,)``.
    :return: shape ``(k, *shape)``, of the constrained value's shape.
    """
    to_support = biject_to(support)
    if entrywise(support) is not None:
        return _quantile(to_support(unconstrained), levels)
    return to_support(_quantile(unconstrained, levels))


def _quantile(values: Tensor, levels: Tensor) -> Tensor:
    """Quantiles over the first dimension; torch's own refuses more than 2^24 elements."""
    ordered = values.sort(0).values
    position = levels * (len(ordered) - 1)
    below = position.floor().long()
    above = position.ceil().long()
    weight = (position - below).reshape(-1, *(values.dim() - 1) * [1])
    return torch.lerp(ordered[below], ordered[above], weight)
