# SPDX-License-Identifier: Apache-2.0
"""Positions of particles about their mean, from independent coordinates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_equiflow.ops.arguments import check_integer
from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.named_groups import helmert
from pyro_equiflow.ops.tracing import full_precision

__all__ = ["MeanFreePositions"]


# How far the mean of positions may lie from the origin, in units of the dtype's rounding and their size.
_SLACK = 1e3


class _MeanFree(constraints.Constraint):
    """Real positions ``(N, d)`` of mean 0 up to rounding."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        size = value.abs().amax((-2, -1)).clamp(min=1.0)
        return value.mean(-2).abs().amax(-1) <= _SLACK * torch.finfo(value.dtype).eps * size


class MeanFreePositions(Transform):
    r"""Particle positions with centre of mass 0 from independent coordinates: a linear isometry of the subspace.

    .. math:: x_i = \sum_{a=1}^{N-1} B_{ia} z_a, \qquad B^T B = 1, \quad \sum_i B_{ia} = 0,

    with :math:`N - 1` vectors :math:`z_a` of :math:`R^d` and Helmert's orthonormal :math:`B`. Lengths and inner
    products are kept, so the log-det is 0 and densities of positions are densities with respect to the Hausdorff
    (surface) measure of the subspace. Rotations of the positions rotate every :math:`z_a`; :func:`particle_type` gives
    the field type of :math:`z`.

    Inverse closed form, log-det exact (0).

    Example::

        >>> import torch, pyro.distributions as dist
        >>> from escnn import group
        >>> from pyro_equiflow import InvariantNormal, MeanFreePositions, equivariant_flow, particle_type
        >>> kind = particle_type(5, group.o2_group().irrep(1, 1))
        >>> base = InvariantNormal(kind)
        >>> positions = dist.TransformedDistribution(base, [equivariant_flow(kind), MeanFreePositions(5, 2)])
        >>> x = positions.sample((3,))
        >>> x.shape, bool((x.mean(-2).abs() < 1e-5).all())
        (torch.Size([3, 5, 2]), True)

    :param num_particles: :math:`N`, two at least.
    :param dim: :math:`d`.
    :param cache_size: 0 or 1, as of torch's transforms.
    :raises ValueError: fewer than two particles, no dimension, events of another shape.

    Reference: Köhler, Klein and Noé, *Equivariant Flows: Exact Likelihood Generative Learning for Symmetric
    Densities* (arXiv 2006.02425), section 5, on densities without translations.
    """

    bijective = True
    domain = constraints.real_vector

    def __init__(self, num_particles: int, dim: int, *, cache_size: int = 0) -> None:
        num_particles, dim = check_integer("num_particles", num_particles, 2), check_integer("dim", dim, 1)
        super().__init__(cache_size=check_integer("cache_size", cache_size, 0, 1))
        self.num_particles = num_particles
        self.dim = dim
        self._constants = Constants(basis=helmert(num_particles))

    @constraints.dependent_property(is_discrete=False, event_dim=2)
    def codomain(self) -> constraints.Constraint:
        """Positions of mean 0."""
        return _MeanFree()

    @full_precision
    def _call(self, z: Tensor) -> Tensor:
        self.forward_shape(z.shape)
        return self._constants.like(z)["basis"] @ z.unflatten(-1, (self.num_particles - 1, self.dim))

    @full_precision
    def _inverse(self, x: Tensor) -> Tensor:
        self.inverse_shape(x.shape)
        return (self._constants.like(x)["basis"].T @ x).flatten(-2)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """0, of the batch's shape."""
        return x.new_zeros(x.shape[:-1])

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """``(*batch, (N - 1) d)`` to ``(*batch, N, d)``."""
        size = (self.num_particles - 1) * self.dim
        if shape[-1:] != (size,):
            raise ValueError(f"MeanFreePositions: expected coordinates of shape (*batch, {size}), found {tuple(shape)}")
        return shape[:-1] + (self.num_particles, self.dim)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """``(*batch, N, d)`` to ``(*batch, (N - 1) d)``."""
        if shape[-2:] != (self.num_particles, self.dim):
            raise ValueError(
                f"MeanFreePositions: expected positions of shape (*batch, {self.num_particles}, {self.dim}), found "
                f"{tuple(shape)}"
            )
        return shape[:-2] + ((self.num_particles - 1) * self.dim,)

    def with_cache(self, cache_size: int = 1) -> MeanFreePositions:
        """This transform with another cache size."""
        cache_size = check_integer("cache_size", cache_size, 0, 1)
        return (
            self if cache_size == self._cache_size else type(self)(self.num_particles, self.dim, cache_size=cache_size)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MeanFreePositions) and (self.num_particles, self.dim) == (
            other.num_particles,
            other.dim,
        )

    def __hash__(self) -> int:
        return hash((type(self), self.num_particles, self.dim))
