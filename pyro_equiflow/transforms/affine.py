# SPDX-License-Identifier: Apache-2.0
"""Affine maps of blocks whose scales commute with the group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from escnn.group import Representation
from torch import Tensor

from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.transforms.blocks import Block

__all__ = ["BlockAffine", "check_log_scale_bound"]


def check_log_scale_bound(bound: float) -> float:
    """The bound, a positive finite number.

    :raises ValueError: it is not.
    """
    if not 0 < bound < float("inf"):
        raise ValueError(f"log_scale_bound: expected a positive finite number, found {bound}")
    return float(bound)


class BlockAffine:
    r"""The map :math:`y = \exp(s) \cdot x + t` of some blocks of an event, :math:`|s| \le` a bound.

    :param blocks: the blocks, in the order of the channels of ``x``.
    :param spatial_dims: dimensions of the grid.
    :ivar scale_fields: the representations of the raw scales, all blocks'.
    :ivar shift_fields: those of the shifts: the blocks' own.
    :ivar num_scales: channels of the scales.
    :ivar num_channels: channels of the blocks.
    """

    def __init__(self, blocks: Sequence[Block], spatial_dims: int) -> None:
        self.scale_fields: list[Representation] = [s for block in blocks for s in block.scales]
        self.shift_fields: list[Representation] = [f for block in blocks for f in block.fields]
        repeats = np.array([r for block in blocks for r in block.repeats])
        self.num_scales = len(repeats)
        self.num_channels = int(repeats.sum())
        self.spatial_dims = spatial_dims
        # Channels of every scale, where all have equally many: then no index is needed.
        self.uniform = int(repeats[0]) if (repeats == repeats[0]).all() else 0
        self.constants = Constants(
            channel_of=np.repeat(np.arange(len(repeats)), repeats), repeats=repeats.astype(float)
        )

    def forward(self, x: Tensor, raw: Tensor, shift: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        """The image of ``x`` and the log-det, from scales not yet bounded."""
        scale = self._bounded(raw, bound)
        return self._scaled(x, scale.exp()) + shift, self._log_det(scale)

    def inverse(self, y: Tensor, raw: Tensor, shift: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        """The preimage of ``y`` and the log-det of the inverse."""
        scale = self._bounded(raw, bound)
        return self._scaled(y - shift, (-scale).exp()), -self._log_det(scale)

    def _bounded(self, raw: Tensor, bound: float) -> Tensor:
        return bound * torch.tanh(raw / bound)

    def _scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        """The channels times one factor a channel, or one an irrep."""
        dim = -1 - self.spatial_dims
        if self.uniform == 1:
            return x * factor
        if self.uniform:
            fields = x.unflatten(dim, (self.num_scales, self.uniform))
            return (fields * factor.unsqueeze(dim)).flatten(dim - 1, dim)
        return x * factor.index_select(dim, self.constants.like(factor)["channel_of"])

    def _log_det(self, scale: Tensor) -> Tensor:
        """The sum of the scales over channels and positions."""
        if self.spatial_dims:
            scale = scale.flatten(-self.spatial_dims).sum(-1)
        if self.uniform:
            return self.uniform * scale.sum(-1)
        return scale @ self.constants.like(scale)["repeats"]
