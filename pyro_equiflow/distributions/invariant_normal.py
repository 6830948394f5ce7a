# SPDX-License-Identifier: Apache-2.0
"""A normal distribution that a symmetry group leaves unchanged."""

from __future__ import annotations

import math
from typing import Any

import torch
from escnn.nn import FieldType
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_equiflow.ops.arguments import check_flag, check_number
from pyro_equiflow.ops.coordinates import IrrepCoordinates
from pyro_equiflow.ops.events import channel_matmul, check_sides, event_dim
from pyro_equiflow.ops.representations import validate_field_type
from pyro_equiflow.ops.support import real_events
from pyro_equiflow.ops.tracing import full_precision

__all__ = ["InvariantNormal"]


class InvariantNormal(TorchDistribution):
    r"""A normal distribution that a symmetry group leaves unchanged, :math:`q(g \cdot x) = q(x)`.

    .. math:: x = Q (\sigma \cdot \epsilon) + \mu, \qquad \epsilon \sim N(0, 1), \quad \rho(g) \mu = \mu,

    at every position independently, with :math:`Q` the change of basis to irreps, one scale :math:`\sigma` an irrep
    (in the order of ``field_type.irreps``) and the mean in the invariant subspace, given by its coordinates there
    (one a trivial irrep). Learnable where ``loc`` and ``scale`` require gradients, as with every distribution of Pyro:
    ``scale=pyro.param("scale", torch.ones(n), constraint=constraints.positive)``.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import InvariantNormal
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> base = InvariantNormal(enn.FieldType(space, [space.irrep(1, 1), space.trivial_repr]))
        >>> base.num_scales, base.num_locs, base.sample((3,)).shape
        (2, 1, torch.Size([3, 3]))

    :param field_type: how the group acts on the event.
    :param spatial_shape: side lengths of the grid; empty without a base space.
    :param loc: invariant coordinates of the mean, shape ``(*batch, num_locs)``, or one number for all; default 0.
    :param scale: standard deviations, positive, shape ``(*batch, num_scales)``, or one number for all; default 1. Draws
        have its dtype and device.
    :param validate_args: whether arguments are checked; by default as :func:`pyro.enable_validation` says.
    :raises ValueError: shapes that do not fit the field type, scales that are not positive.
    """

    has_rsample = True
    arg_constraints = {"loc": constraints.real_vector, "scale": constraints.independent(constraints.positive, 1)}

    def __init__(
        self,
        field_type: FieldType,
        spatial_shape: tuple[int, ...] = (),
        *,
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        validate_field_type(field_type)
        spatial_shape = check_sides(spatial_shape, event_dim(field_type) - 1)
        if validate_args is not None:
            check_flag("validate_args", validate_args, also="None")
        self._coordinates = IrrepCoordinates(field_type)
        self.field_type = field_type
        self.spatial_shape = spatial_shape
        self.num_scales = self._coordinates.irreps.number
        self.num_locs = len(self._coordinates.trivial)
        for name, value, interval in (("loc", loc, "(-inf, inf)"), ("scale", scale, "(0, inf)")):
            if not isinstance(value, Tensor):
                check_number(name, value, interval, also="a tensor")
            elif not value.is_floating_point():
                raise TypeError(f"{name}: expected a floating-point tensor, found {value.dtype}; convert it with .to()")
        like = next((value for value in (scale, loc) if isinstance(value, Tensor)), torch.zeros(()))

        def of_all(value: Tensor | float, count: int) -> Tensor:
            value = value if isinstance(value, Tensor) else like.new_tensor(value)
            return value if value.dim() else value.expand(count)

        self.loc, self.scale = of_all(loc, self.num_locs), of_all(scale, self.num_scales)
        for name, value, count in (("loc", self.loc, self.num_locs), ("scale", self.scale, self.num_scales)):
            if value.shape[-1:] != (count,):
                raise ValueError(f"{name}: expected shape (*batch, {count}), found {tuple(value.shape)}")
        batch_shape = torch.broadcast_shapes(self.loc.shape[:-1], self.scale.shape[:-1])
        super().__init__(batch_shape, torch.Size((field_type.size, *spatial_shape)), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Real events."""
        return real_events(len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> InvariantNormal:
        """The distribution with another batch shape; ``loc`` and ``scale`` stay connected."""
        batch_shape = torch.Size(batch_shape)
        return InvariantNormal(
            self.field_type,
            self.spatial_shape,
            loc=self.loc.expand(*batch_shape, self.num_locs),
            scale=self.scale.expand(*batch_shape, self.num_scales),
            validate_args=False,
        )

    def _channel_scale(self) -> Tensor:
        return self._coordinates.irreps.per_channel(self._coordinates.everywhere(self.scale))

    @full_precision
    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws with gradients to ``loc`` and ``scale``: shape ``sample_shape + batch_shape + event_shape``."""
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self.scale.dtype, device=self.scale.device)
        return self._coordinates.event(noise * self._channel_scale()) + self._coordinates.invariant(self.loc)

    @full_precision
    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, of the value's batch shape broadcast with the distribution's."""
        if self._validate_args:
            self._validate_sample(value)
        centred = value - self._coordinates.invariant(self.loc)
        standard = self._coordinates.coordinates(centred) / self._channel_scale()
        quadratic = standard.square().flatten(-len(self.event_shape)).sum(-1)
        log_scale = self._coordinates.everywhere(self.scale.log())
        log_det = math.prod(self.spatial_shape) * self._coordinates.irreps.total(log_scale)
        return -0.5 * quadratic - log_det - 0.5 * self.event_shape.numel() * math.log(2 * math.pi)

    @property
    @full_precision
    def mean(self) -> Tensor:
        """The mean, an invariant event: shape ``batch_shape + event_shape``."""
        return self._coordinates.invariant(self.loc).expand(self.batch_shape + self.event_shape)

    @property
    @full_precision
    def variance(self) -> Tensor:
        """The variance of each channel, shape ``batch_shape + event_shape``."""
        variance, basis = self._channel_scale().square(), self._coordinates.basis
        if basis is not None:
            squares = torch.as_tensor(basis**2).to(variance)
            variance = channel_matmul(squares, variance, len(self.spatial_shape))
        return variance.expand(self.batch_shape + self.event_shape)
