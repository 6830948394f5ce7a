# SPDX-License-Identifier: Apache-2.0
"""Monotone splines of blocks: channel by channel where the group permutes them, along the radius elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from escnn.group import Representation
from torch import Tensor

from pyro_equiflow.maps.block_map import BlockMap, FieldScalars, Head
from pyro_equiflow.maps.blocks import Block
from pyro_equiflow.maps.commutant import Commutant
from pyro_equiflow.ops.arguments import check_integer, check_number
from pyro_equiflow.ops.channels import ChannelGroups
from pyro_equiflow.ops.representations import is_permutation
from pyro_equiflow.ops.splines import MIN_BIN, UnitSpline, num_spline_parameters

__all__ = ["Spline"]


class Spline(BlockMap):
    r"""Rational-quadratic splines of some blocks, followed by :class:`Commutant`.

    - A permutation field: every channel has a monotone spline of :math:`[-B, B]`, whose knots are fields of the same
      type, so the group carries knots along with the channels they belong to.
    - Any other irrep: :math:`x \mapsto f(|x|)\, x / |x|` with :math:`f` a monotone spline of :math:`[0, B]` that has
      :math:`f(0) = 0`, whose knots are invariants. It commutes with every orthogonal representation. On an irrep of
      :math:`d` dimensions its log-det is :math:`\log f'(r) + (d - 1) \log (f(r) / r)` a position.

    Beyond :math:`B` both are the identity. The spline is the identity for raw zeros, so the maps of
    :class:`Commutant`, and with them all affine ones, are among these. Going back
    loses digits where a spline is flat, as with any inverse: in float32 more than an affine map does.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_coupling
        >>> from pyro_equiflow.maps import Spline
        >>> space = gspaces.no_base_space(group.so3_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1)])
        >>> equivariant_coupling(vectors, transformer=Spline(bound=4.0, num_bins=10))(torch.randn(5, 9)).shape
        torch.Size([5, 9])

    :param bound: the bound :math:`B`, positive. By default one number of a standard normal base in 1.7 million lies
        beyond; a larger one spreads the same bins over places where no data are.
    :param num_bins: bins of each spline, from 2.
    :param log_scale_bound: of the map that follows, as of :class:`Affine`.
    :raises TypeError: a setting of another type.
    :raises ValueError: one out of its range.

    References: Durkan, Bekasov, Murray and Papamakarios, *Neural Spline Flows* (arXiv 1906.04032), section 3; radial
    maps as in Rezende and Mohamed, *Variational Inference with Normalizing Flows* (arXiv 1505.05770), section 4.1.
    """

    def __init__(self, *, bound: float = 5.0, num_bins: int = 8, log_scale_bound: float = 3.0) -> None:
        most = int(0.5 / MIN_BIN)  # so that least lengths leave half of the interval to choose
        self.bound = check_number("bound", bound, "(0, inf)")
        self.num_bins = check_integer("num_bins", num_bins, 2, most)
        self._linear = Commutant(log_scale_bound=log_scale_bound)
        self.log_scale_bound = self._linear.log_scale_bound

    def heads(self, blocks: Sequence[Block]) -> Sequence[Head]:
        """Knots of channels and of radii, then what :class:`Commutant` takes."""
        copies = num_spline_parameters(self.num_bins)
        pointwise, radial = (
            Head([_chosen(block, block.scales, permuted) for block in blocks], copies) for permuted in (True, False)
        )
        return [pointwise, radial, *self._linear.heads(blocks)]

    def prepare(self) -> None:
        """Binds the map that follows, and tells channels from radii."""
        self._linear = self._linear.bind(self.blocks, self.spatial_dims)
        moving = [field.size for block in self.blocks for field in _chosen(block, block.fields, False)]
        self._radii = FieldScalars(moving, self.spatial_dims)
        fields = [field for block in self.blocks for field in block.fields]
        permuted = np.array([is_permutation(field) for field in fields for _ in range(field.size)])
        self._num_pointwise = int(permuted.sum())
        self._groups = ChannelGroups([np.flatnonzero(own) for own in (permuted, ~permuted)], self.spatial_dims)

    def forward(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The image of ``x`` and the log-det."""
        x, ladj = self._spline(x, parameters[:2], inverse=False)
        y, linear = self._linear.forward(x, parameters[2:])
        return y, ladj + linear

    def inverse(self, y: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The preimage of ``y`` and the log-det of the inverse."""
        x, linear = self._linear.inverse(y, parameters[2:])
        x, ladj = self._spline(x, parameters[:2], inverse=True)
        return x, ladj + linear

    def _spline(self, x: Tensor, raw: Sequence[Tensor], inverse: bool) -> tuple[Tensor, Tensor]:
        pointwise, radial = raw
        dim = -1 - self.spatial_dims
        x = x.expand(*pointwise.shape[: dim - 1], *x.shape[dim:])  # a batch of contexts on one event
        if not self._num_pointwise:
            return self._radial(x, radial, inverse)
        if not self._radii.number:
            return self._pointwise(x, pointwise, inverse)
        first, second = self._groups.take_apart(x)
        first, ladj = self._pointwise(first, pointwise, inverse)
        second, radial_ladj = self._radial(second, radial, inverse)
        return self._groups.put_together(first, second), ladj + radial_ladj

    def _pointwise(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        spline, bound = UnitSpline(raw, self.num_bins, -2 - self.spatial_dims), self.bound
        unit = (x + bound) / (2 * bound)
        change, log_slope = spline.inverse(unit) if inverse else spline.forward(unit)
        # Of small values the way to the unit interval and back would lose all digits.
        return x + 2 * bound * change, log_slope.flatten(-1 - self.spatial_dims).sum(-1)

    def _radial(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        spline = UnitSpline(raw, self.num_bins, -2 - self.spatial_dims)
        squares = self._radii.squares(x) / self.bound**2
        factor, log_slope = spline.radial_inverse(squares) if inverse else spline.radial(squares)
        log_factor = factor.log()
        across = (log_slope - log_factor).flatten(-1 - self.spatial_dims).sum(-1)
        return self._radii.times(x, factor), self._radii.total(log_factor) + across


def _chosen(block: Block, values: Sequence[Representation], permuted: bool) -> tuple[Representation, ...]:
    """Those values, one for each field of a block, whose field the group permutes, or does not."""
    return tuple(value for value, field in zip(values, block.fields) if is_permutation(field) == permuted)
