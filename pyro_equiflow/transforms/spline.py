# SPDX-License-Identifier: Apache-2.0
"""Monotone splines of blocks: channel by channel where the group permutes them, along the radius elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from escnn.group import Representation
from torch import Tensor

from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.events import cat_channels
from pyro_equiflow.ops.representations import is_permutation
from pyro_equiflow.ops.splines import UnitSpline, num_spline_parameters
from pyro_equiflow.transforms.affine import BlockCommutant
from pyro_equiflow.transforms.block_map import BlockMap, FieldScalars, Head
from pyro_equiflow.transforms.blocks import Block

__all__ = ["BlockSpline"]


class BlockSpline(BlockMap):
    r"""Rational-quadratic splines of some blocks, followed by :class:`~pyro_equiflow.transforms.affine.BlockCommutant`.

    - A permutation field: every channel has a monotone spline of :math:`[-B, B]`, whose knots are fields of the same
      type, so the group carries knots along with the channels they belong to.
    - Any other irrep: :math:`x \mapsto f(|x|)\, x / |x|` with :math:`f` a monotone spline of :math:`[0, B]` that has
      :math:`f(0) = 0`, whose knots are invariants. It commutes with every orthogonal representation. On an irrep of
      :math:`d` dimensions its log-det is :math:`\log f'(r) + (d - 1) \log (f(r) / r)` a position.

    Beyond :math:`B` both are the identity. The spline is the identity for raw zeros, so the maps of
    :class:`~pyro_equiflow.transforms.affine.BlockCommutant`, and with them all affine ones, are among these. Going back
    loses digits where a spline is flat, as with any inverse: in float32 more than an affine map does.

    :param blocks: the blocks, in the order of the channels of ``x``.
    :param spatial_dims: dimensions of the grid.
    :param log_scale_bound: the bound of the scale.
    :param spline_bound: the bound :math:`B`.
    :param num_bins: bins of each spline.

    References: Durkan, Bekasov, Murray and Papamakarios, *Neural Spline Flows* (arXiv 1906.04032), section 3; radial
    maps as in Rezende and Mohamed, *Variational Inference with Normalizing Flows* (arXiv 1505.05770), section 4.1.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        spatial_dims: int,
        log_scale_bound: float,
        spline_bound: float,
        num_bins: int,
    ) -> None:
        self.commutant = BlockCommutant(blocks, spatial_dims, log_scale_bound)
        self.spline_bound, self.num_bins = spline_bound, num_bins
        copies = num_spline_parameters(num_bins)
        kinds = [[is_permutation(field) for field in block.fields] for block in blocks]
        pointwise, radial = (
            Head([_chosen(block.scales, kind, wanted) for block, kind in zip(blocks, kinds)], copies)
            for wanted in (True, False)
        )
        super().__init__(blocks, spatial_dims, [pointwise, radial, *self.commutant.heads])
        moving = [field.size for block, kind in zip(blocks, kinds) for field in _chosen(block.fields, kind, False)]
        self.radii = FieldScalars(moving, spatial_dims)
        permuted = [p for block, kind in zip(blocks, kinds) for f, p in zip(block.fields, kind) for _ in range(f.size)]
        order = np.argsort(~np.array(permuted), kind="stable")
        self.num_pointwise = sum(permuted)
        self.constants = Constants(order=order, inverse_order=np.argsort(order))

    def forward(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The image of ``x`` and the log-det."""
        x, ladj = self._spline(x, parameters[:2], inverse=False)
        y, linear = self.commutant.forward(x, parameters[2:])
        return y, ladj + linear

    def inverse(self, y: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The preimage of ``y`` and the log-det of the inverse."""
        x, linear = self.commutant.inverse(y, parameters[2:])
        x, ladj = self._spline(x, parameters[:2], inverse=True)
        return x, ladj + linear

    def _spline(self, x: Tensor, raw: Sequence[Tensor], inverse: bool) -> tuple[Tensor, Tensor]:
        pointwise, radial = raw
        dim = -1 - self.spatial_dims
        x = x.expand(*pointwise.shape[: dim - 1], *x.shape[dim:])  # a batch of contexts on one event
        if not self.num_pointwise:
            return self._radial(x, radial, inverse)
        if not self.radii.number:
            return self._pointwise(x, pointwise, inverse)
        constants = self.constants.like(x)
        split = [self.num_pointwise, self.radii.channels]
        first, second = x.index_select(dim, constants["order"]).split(split, dim)
        first, ladj = self._pointwise(first, pointwise, inverse)
        second, radial_ladj = self._radial(second, radial, inverse)
        y = cat_channels([first, second], self.spatial_dims).index_select(dim, constants["inverse_order"])
        return y, ladj + radial_ladj

    def _pointwise(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        spline, bound = UnitSpline(raw, self.num_bins, -2 - self.spatial_dims), self.spline_bound
        unit = (x + bound) / (2 * bound)
        change, log_slope = spline.inverse(unit) if inverse else spline.forward(unit)
        # Of small values the way to the unit interval and back would lose all digits.
        return x + 2 * bound * change, log_slope.flatten(-1 - self.spatial_dims).sum(-1)

    def _radial(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        spline = UnitSpline(raw, self.num_bins, -2 - self.spatial_dims)
        squares = self.radii.squares(x) / self.spline_bound**2
        factor, log_slope = spline.radial_inverse(squares) if inverse else spline.radial(squares)
        log_factor = factor.log()
        across = (log_slope - log_factor).flatten(-1 - self.spatial_dims).sum(-1)
        return self.radii.times(x, factor), self.radii.total(log_factor) + across


def _chosen(fields: Sequence[Representation], kinds: Sequence[bool], wanted: bool) -> tuple[Representation, ...]:
    return tuple(field for field, kind in zip(fields, kinds) if kind == wanted)
