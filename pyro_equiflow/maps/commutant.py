# SPDX-License-Identifier: Apache-2.0
"""Scales, rotations where the group leaves room for them, and shifts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from escnn.group import IrreducibleRepresentation, Representation
from torch import Tensor

from pyro_equiflow.maps.affine import Affine
from pyro_equiflow.maps.block_map import Head
from pyro_equiflow.maps.blocks import Block
from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.events import channel_matmul

__all__ = ["Commutant"]


class Commutant(Affine):
    r"""The map :math:`y = \exp(s) \exp(\theta J)\, x + t`, with a rotation where the group leaves room for one.

    Linear maps that commute with an irrep of complex type are :math:`a I + b J` with :math:`J^2 = -I`, :math:`J^T =
    -J` (Schur's lemma): frequencies of SO(2) and of C_N below N/2, say. So :math:`\exp(\theta J) = \cos\theta\, I +
    \sin\theta\, J` commutes with the group if :math:`\theta` is invariant, and its determinant is 1. Irreps of real
    type leave nothing but scales, and :math:`\theta` is left out; those of quaternionic type, which no group of escnn
    has, are treated likewise, and so are permutation fields.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_coupling
        >>> from pyro_equiflow.maps import Commutant
        >>> space = gspaces.no_base_space(group.so2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1)])
        >>> equivariant_coupling(vectors, transformer=Commutant())(torch.randn(5, 6)).shape
        torch.Size([5, 6])

    :param log_scale_bound: the bound of the scale, as of :class:`Affine`.
    """

    def heads(self, blocks: Sequence[Block]) -> Sequence[Head]:
        """Scales, angles and shifts."""
        scales, shifts = super().heads(blocks)
        return [scales, Head([self._angles(block) for block in blocks]), shifts]

    @staticmethod
    def _angles(block: Block) -> tuple[Representation, ...]:
        return tuple(scale for scale, field in zip(block.scales, block.fields) if _complex_structure(field) is not None)

    def prepare(self) -> None:
        """Makes the generator of all rotations, and which angle goes with which scale."""
        self._num_angles = sum(len(self._angles(block)) for block in self.blocks)
        # Scales that no angle goes with take the last one, where a zero will stand.
        angle_of = np.full(self.scalars.number, self._num_angles)
        generator = np.zeros((self.scalars.channels, self.scalars.channels))
        scale = channel = angle = 0
        for field, own in ((f, s) for block in self.blocks for f, s in zip(block.fields, block.scales)):
            j = _complex_structure(field)
            if j is not None:
                generator[channel : channel + field.size, channel : channel + field.size] = j
                angle_of[scale] = angle
                angle += 1
            scale, channel = scale + own.size, channel + field.size
        self._constants = Constants(generator=generator, angle_of=angle_of)

    def forward(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The image of ``x`` and the log-det."""
        raw, angle, shift = parameters
        if not self._num_angles:
            return super().forward(x, (raw, shift))
        scale = self._bounded(raw)
        return self._turned(x, scale.exp(), self._all_angles(angle)) + shift, self.scalars.total(scale)

    def inverse(self, y: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The preimage of ``y`` and the log-det of the inverse."""
        raw, angle, shift = parameters
        if not self._num_angles:
            return super().inverse(y, (raw, shift))
        scale = self._bounded(raw)
        return self._turned(y - shift, (-scale).exp(), -self._all_angles(angle)), -self.scalars.total(scale)

    def _turned(self, x: Tensor, factor: Tensor, angle: Tensor) -> Tensor:
        jx = channel_matmul(self._constants.like(x)["generator"], x, self.spatial_dims)
        return self.scalars.times(x, factor * angle.cos()) + self.scalars.times(jx, factor * angle.sin())

    def _all_angles(self, angle: Tensor) -> Tensor:
        """An angle for each scale, zero where none belongs."""
        if self._num_angles == self.scalars.number:
            return angle
        dim = -1 - self.spatial_dims
        padded = torch.cat([angle, torch.zeros_like(angle.narrow(dim, 0, 1))], dim)
        return padded.index_select(dim, self._constants.like(angle)["angle_of"])


def _complex_structure(field: Representation) -> np.ndarray | None:
    """The skew matrix J with :math:`J^2 = -I` that commutes with an irrep of complex type; else ``None``."""
    if not isinstance(field, IrreducibleRepresentation) or field.type != "C":
        return None
    return next(j for j in np.asarray(field.endomorphism_basis()) if abs(np.trace(j)) < 1e-9)
