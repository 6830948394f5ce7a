# SPDX-License-Identifier: Apache-2.0
"""Densities on the plane with known entropies and symmetries, for benchmarks of density estimation."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

#: Entropy of :func:`checkerboard` in bits: it is uniform on an area of 32.
CHECKERBOARD_BITS = 5.0


def checkerboard(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Points uniform on eight of the sixteen squares of side 2 in [-4, 4]^2, those with an even sum of indices."""
    column = torch.randint(4, (count,), generator=generator)
    row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
    return 2 * (torch.stack([column, row], 1) + torch.rand(count, 2, generator=generator)) - 4


def on_checkerboard(x: Tensor) -> Tensor:
    """Whether points ``(..., 2)`` lie where :func:`checkerboard` has density 1/32."""
    inside = (x.abs() < 4).all(-1)
    return inside & (((x + 4) / 2).floor().sum(-1) % 2 == 0)


def turned(count: int, mean: Tensor, covariance: Tensor) -> MixtureSameFamily:
    """Equal mixture of a normal and its copies turned about the origin by multiples of ``2 pi / count``."""
    angles = 2 * math.pi * torch.arange(count, dtype=mean.dtype) / count
    cos, sin = angles.cos(), angles.sin()
    turns = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    spots = MultivariateNormal(turns @ mean, turns @ covariance @ turns.mT)
    return MixtureSameFamily(Categorical(torch.ones(count, dtype=mean.dtype)), spots)


def ring(dtype: torch.dtype = torch.float64) -> MixtureSameFamily:
    """Eight round normals on a circle: standard deviation 0.5, radius 4, all divided by the root of 2. Symmetry D_8."""
    return turned(8, torch.tensor([4 / math.sqrt(2), 0.0], dtype=dtype), 0.125 * torch.eye(2, dtype=dtype))


def four_spots(dtype: torch.dtype = torch.float64) -> MixtureSameFamily:
    """Four long normals at radius 2, askew to the radius: standard deviations 0.8 and 0.2. Symmetry C_4, no mirror."""
    angle = math.pi / 3
    axes = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=dtype)
    variances = torch.tensor([0.64, 0.04], dtype=dtype)
    return turned(4, torch.tensor([2.0, 0.0], dtype=dtype), axes @ variances.diag() @ axes.mT)


def grid(side: float, points: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, float]:
    """Midpoints of ``points`` cells a side on [-side, side]^2, shape ``(points**2, 2)``, and the area of a cell."""
    step = 2 * side / points
    line = (torch.arange(points, dtype=dtype) + 0.5) * step - side
    return torch.cartesian_prod(line, line), step**2


@functools.cache
def entropy(density: MixtureSameFamily, side: float = 8.0, points: int = 800) -> float:
    """The entropy in nats by the midpoint rule, which for smooth densities that vanish outside is exact to rounding."""
    x, area = grid(side, points)
    log_prob = density.log_prob(x)
    return -float((log_prob.exp() * log_prob).sum() * area)
