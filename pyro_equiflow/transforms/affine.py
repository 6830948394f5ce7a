# SPDX-License-Identifier: Apache-2.0
"""Maps of blocks that are linear given their parameters, in the commutant of the group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from escnn.group import IrreducibleRepresentation, Representation
from torch import Tensor

from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.events import channel_matmul
from pyro_equiflow.transforms.block_map import BlockMap, FieldScalars, Head
from pyro_equiflow.transforms.blocks import Block

__all__ = ["BlockAffine", "BlockCommutant"]


class BlockAffine(BlockMap):
    r"""The map :math:`y = \exp(s) \cdot x + t` of some blocks of an event, :math:`|s| \le` a bound.

    A raw scale :math:`u` counts as :math:`s = b \tanh(u / b)`.

    :param blocks: the blocks, in the order of the channels of ``x``.
    :param spatial_dims: dimensions of the grid.
    :param log_scale_bound: the bound :math:`b`.
    :param between: heads that a subclass has between scales and shifts.
    """

    def __init__(
        self, blocks: Sequence[Block], spatial_dims: int, log_scale_bound: float, between: Sequence[Head] = ()
    ) -> None:
        scales, shifts = Head([block.scales for block in blocks]), Head([block.fields for block in blocks])
        super().__init__(blocks, spatial_dims, [scales, *between, shifts])
        self.scalars = FieldScalars([r for block in blocks for r in block.repeats], spatial_dims)
        self.log_scale_bound = log_scale_bound

    def forward(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The image of ``x`` and the log-det."""
        raw, shift = parameters
        scale = self._bounded(raw)
        return self.scalars.times(x, scale.exp()) + shift, self.scalars.total(scale)

    def inverse(self, y: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The preimage of ``y`` and the log-det of the inverse."""
        raw, shift = parameters
        scale = self._bounded(raw)
        return self.scalars.times(y - shift, (-scale).exp()), -self.scalars.total(scale)

    def _bounded(self, raw: Tensor) -> Tensor:
        bound = self.log_scale_bound
        return bound * torch.tanh(raw / bound)


class BlockCommutant(BlockAffine):
    r"""The map :math:`y = \exp(s) \exp(\theta J)\, x + t`, with a rotation where the group leaves room for one.

    Linear maps that commute with an irrep of complex type are :math:`a I + b J` with :math:`J^2 = -I`, :math:`J^T =
    -J` (Schur's lemma): frequencies of SO(2) and of C_N below N/2, say. So :math:`\exp(\theta J) = \cos\theta\, I +
    \sin\theta\, J` commutes with the group if :math:`\theta` is invariant, and its determinant is 1. Irreps of real
    type leave nothing but scales, and :math:`\theta` is left out; those of quaternionic type, which no group of escnn
    has, are treated likewise, and so are permutation fields.

    :param blocks: the blocks, in the order of the channels of ``x``.
    :param spatial_dims: dimensions of the grid.
    :param log_scale_bound: the bound of the scale.
    """

    def __init__(self, blocks: Sequence[Block], spatial_dims: int, log_scale_bound: float) -> None:
        found = [[_complex_structure(field) for field in block.fields] for block in blocks]
        angles = Head(
            [
                tuple(scale for scale, j in zip(block.scales, structures) if j is not None)
                for block, structures in zip(blocks, found)
            ]
        )
        super().__init__(blocks, spatial_dims, log_scale_bound, [angles])
        self.num_angles = sum(len(fields) for fields in angles.fields)
        # Scales that no angle goes with take the last one, where a zero will stand.
        angle_of = np.full(self.scalars.number, self.num_angles)
        generator = np.zeros((self.scalars.channels, self.scalars.channels))
        scale = channel = angle = 0
        for block, structures in zip(blocks, found):
            for field, own, j in zip(block.fields, block.scales, structures):
                if j is not None:
                    generator[channel : channel + field.size, channel : channel + field.size] = j
                    angle_of[scale] = angle
                    angle += 1
                scale, channel = scale + own.size, channel + field.size
        self.angle_constants = Constants(generator=generator, angle_of=angle_of)

    def forward(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The image of ``x`` and the log-det."""
        raw, angle, shift = parameters
        if not self.num_angles:
            return super().forward(x, (raw, shift))
        scale = self._bounded(raw)
        return self._turned(x, scale.exp(), self._all_angles(angle)) + shift, self.scalars.total(scale)

    def inverse(self, y: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The preimage of ``y`` and the log-det of the inverse."""
        raw, angle, shift = parameters
        if not self.num_angles:
            return super().inverse(y, (raw, shift))
        scale = self._bounded(raw)
        return self._turned(y - shift, (-scale).exp(), -self._all_angles(angle)), -self.scalars.total(scale)

    def _turned(self, x: Tensor, factor: Tensor, angle: Tensor) -> Tensor:
        jx = channel_matmul(self.angle_constants.like(x)["generator"], x, self.spatial_dims)
        return self.scalars.times(x, factor * angle.cos()) + self.scalars.times(jx, factor * angle.sin())

    def _all_angles(self, angle: Tensor) -> Tensor:
        """An angle for each scale, zero where none belongs."""
        if self.num_angles == self.scalars.number:
            return angle
        dim = -1 - self.spatial_dims
        padded = torch.cat([angle, torch.zeros_like(angle.narrow(dim, 0, 1))], dim)
        return padded.index_select(dim, self.angle_constants.like(angle)["angle_of"])


def _complex_structure(field: Representation) -> np.ndarray | None:
    """The skew matrix J with :math:`J^2 = -I` that commutes with an irrep of complex type; else ``None``."""
    if not isinstance(field, IrreducibleRepresentation) or field.type != "C":
        return None
    return next(j for j in np.asarray(field.endomorphism_basis()) if abs(np.trace(j)) < 1e-9)
