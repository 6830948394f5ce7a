# SPDX-License-Identifier: Apache-2.0
"""What couplings and autoregressive flows ask of the map of their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from escnn.group import Representation
from torch import Tensor

from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.events import channel_matmul
from pyro_equiflow.transforms.blocks import Block

__all__ = ["BlockMap", "FieldScalars", "Head"]


class FieldScalars:
    """Numbers that act on a block's channels: one a channel of a permutation field, one an irrep.

    :param repeats: how many channels each number stands for.
    :param spatial_dims: dimensions of the grid.
    """

    def __init__(self, repeats: Sequence[int], spatial_dims: int) -> None:
        counts = np.array(repeats, dtype=int)
        self.number, self.channels = len(counts), int(counts.sum())
        self.spatial_dims = spatial_dims
        # Channels of every number, where all have equally many: then no index is needed.
        self.uniform = int(counts[0]) if self.number and (counts == counts[0]).all() else 0
        channel_of = np.repeat(np.arange(self.number), counts)
        self._constants = Constants(
            channel_of=channel_of,
            repeats=counts.astype(float),
            members=(channel_of == np.arange(self.number)[:, None]).astype(float),
        )

    def times(self, x: Tensor, factors: Tensor) -> Tensor:
        """The channels, each times the factor of its field."""
        dim = -1 - self.spatial_dims
        if self.uniform == 1:
            return x * factors
        if self.uniform:
            fields = x.unflatten(dim, (self.number, self.uniform))
            return (fields * factors.unsqueeze(dim)).flatten(dim - 1, dim)
        return x * factors.index_select(dim, self._constants.like(factors)["channel_of"])

    def squares(self, x: Tensor) -> Tensor:
        """The sum of squares of each number's channels."""
        dim = -1 - self.spatial_dims
        squares = x * x
        if self.uniform:
            return squares if self.uniform == 1 else squares.unflatten(dim, (self.number, self.uniform)).sum(dim)
        return channel_matmul(self._constants.like(x)["members"], squares, self.spatial_dims)

    def total(self, values: Tensor) -> Tensor:
        """The sum over channels and positions, of shape ``batch``."""
        if self.spatial_dims:
            values = values.flatten(-self.spatial_dims).sum(-1)
        if self.uniform:
            return self.uniform * values.sum(-1)
        return values @ self._constants.like(values)["repeats"]


class Head(NamedTuple):
    """Parameters of one role: for each block some fields, all of them ``copies`` times over (0: once, no dimension)."""

    fields: Sequence[tuple[Representation, ...]]
    copies: int = 0


class BlockMap:
    r"""An invertible map of some blocks, whose parameters are fields that a conditioner gives.

    It commutes with the group if the parameters transform as :attr:`parameter_fields` say. Such maps are called
    transformers by Papamakarios et al., *Normalizing Flows for Probabilistic Modeling and Inference* (arXiv
    1912.02762), section 3.1. Subclasses give :meth:`forward` and :meth:`inverse`.

    :param blocks: the blocks, in the order of the channels of ``x``.
    :param spatial_dims: dimensions of the grid.
    :param heads: the parameters by role.
    :ivar parameter_fields: the representations of the parameters.
    :ivar parameter_blocks: for each of them the index of its block.
    """

    def __init__(self, blocks: Sequence[Block], spatial_dims: int, heads: Sequence[Head]) -> None:
        self.spatial_dims = spatial_dims
        self.heads = tuple(heads)
        self.parameter_fields: list[Representation] = []
        self.parameter_blocks: list[int] = []
        for head in heads:
            self.parameter_fields += max(1, head.copies) * [f for fields in head.fields for f in fields]
            self.parameter_blocks += max(1, head.copies) * [i for i, fields in enumerate(head.fields) for _ in fields]
        widths = [[sum(f.size for f in fields) for fields in head.fields] for head in heads]
        self._runs = [[(sum(own[:i]), own[i]) for own in widths] for i in range(len(blocks))]
        self._sizes = [max(1, head.copies) * sum(own) for head, own in zip(heads, widths)]
        self._copies = [(i, (head.copies, sum(own))) for i, (head, own) in enumerate(zip(heads, widths)) if head.copies]

    @property
    def num_parameters(self) -> int:
        """Channels of all parameters."""
        return sum(self._sizes)

    def parameters(self, values: Tensor) -> list[Tensor]:
        """A conditioner's output, ``(*batch, num_parameters, *spatial)``, by heads.

        :return: for each head shape ``(*batch, [copies,] channels, *spatial)``.
        """
        dim = -1 - self.spatial_dims
        parts = list(values.split(self._sizes, dim))
        for index, shape in self._copies:
            parts[index] = parts[index].unflatten(dim, shape)
        return parts

    def of_block(self, parameters: Sequence[Tensor], index: int) -> list[Tensor]:
        """The parameters of one of the blocks."""
        dim = -1 - self.spatial_dims
        return [part.narrow(dim, *run) for part, run in zip(parameters, self._runs[index])]

    def forward(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The image of ``x``, shape ``(*batch, C, *spatial)``, and the log-det, shape ``batch``."""
        raise NotImplementedError

    def inverse(self, y: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The preimage of ``y`` and the log-det of the inverse."""
        raise NotImplementedError
