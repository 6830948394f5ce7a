# SPDX-License-Identifier: Apache-2.0
"""Features of irreps held as one tensor per irrep, and the intertwiners between them.

An intertwiner never mixes different irreps (Schur's lemma), so a linear layer on irreps is several small products of
matrices and never one large one. Where the endomorphisms of an irrep are the real numbers alone, the free parameters
are the matrix, and all components of a vector are columns of one product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from escnn import nn as enn
from escnn.group import IrreducibleRepresentation
from torch import Tensor

from pyro_equiflow.nn.linear.entrywise import EntrywiseExpansion, block_entries
from pyro_equiflow.ops.channels import ChannelOrder
from pyro_equiflow.ops.events import split
from pyro_equiflow.ops.representations import IrrepDecomposition

__all__ = ["IrrepMap", "IsotypicLayout", "is_of_irreps"]


def is_of_irreps(field_type: enn.FieldType) -> bool:
    """Whether a type has no base space and is written in the basis of its irreps."""
    return field_type.gspace.dimensionality == 0 and IrrepDecomposition(field_type).is_identity


class IsotypicLayout:
    """Which channels of a field type hold which irrep, the irreps in order of first appearance.

    :param field_type: a type with no base space in the basis of its irreps, see :func:`is_of_irreps`.
    :ivar fields: for each irrep the fields in which it stands, one for each time.
    """

    def __init__(self, field_type: enn.FieldType) -> None:
        self.irreps: list[IrreducibleRepresentation] = []
        self.fields: list[list[int]] = []
        rows = []
        for irrep, blocks in IrrepDecomposition(field_type).isotypic():
            self.irreps.append(irrep)
            self.fields.append([block.field for block in blocks])
            rows.append(np.concatenate([np.arange(b.start, b.start + b.size) for b in blocks]))
        self.counts = [len(fields) for fields in self.fields]
        self.ids = [irrep.id for irrep in self.irreps]
        self.sizes = [len(r) for r in rows]
        self.trivial = next((i for i, irrep in enumerate(self.irreps) if irrep.is_trivial()), None)
        order = np.concatenate(rows)
        in_order = bool((order == np.arange(len(order))).all())
        # Samples stand where the points of a grid would.
        self._order = None if in_order else ChannelOrder(order, spatial_dims=1)

    def prepare(self, x: Tensor) -> None:
        """Makes the index tensors for the dtype and device of ``x``: ``torch.compile`` cannot, while it traces."""
        if self._order is not None:
            self._order.apply(x.new_empty(sum(self.sizes), 0))

    def split(self, x: Tensor) -> list[Tensor]:
        """One tensor per irrep, ``(count * size, batch)``, of a tensor ``(channels, batch)``."""
        return split(x if self._order is None else self._order.apply(x), self.sizes)

    def merge(self, components: Sequence[Tensor]) -> Tensor:
        """The tensor ``(channels, batch)`` of which :meth:`split` gives these."""
        x = components[0] if len(components) == 1 else torch.cat(list(components), 0)
        return x if self._order is None else self._order.undo(x)


class IrrepMap:
    """The intertwiners between two lists of irreps, given by a flat vector of ``num_weights`` numbers.

    :param inputs: irreps and their multiplicities; those that the output lacks are not read.
    :param outputs: irreps and their multiplicities; each has to be among the inputs.
    :ivar fields: the outputs.
    :ivar expansion: from the weights to the entries of all matrices.
    :ivar init_std: standard deviations of the weights that keep unit variance (He).
    """

    def __init__(
        self,
        inputs: Sequence[tuple[IrreducibleRepresentation, int]],
        outputs: Sequence[tuple[IrreducibleRepresentation, int]],
    ) -> None:
        self.fields = list(outputs)
        ids = [irrep.id for irrep, _ in inputs]
        self._blocks: list[tuple[int, int, int, int, int]] = []  # irrep read, outputs, inputs, algebra, size
        expansions, self._shapes = [EntrywiseExpansion(np.zeros(0, dtype=np.int64), np.zeros(0))], []
        std = [np.zeros(0)]
        for irrep, n_out in outputs:
            source = ids.index(irrep.id)
            n_in = inputs[source][1]
            algebra = np.asarray(irrep.endomorphism_basis())
            if len(algebra) > 1:
                # The units of complex numbers and quaternions share no entry: each entry is one weight or minus it.
                index, sign = block_entries(algebra, np.ones((n_out, n_in), dtype=bool))
            else:
                index, sign = np.arange(n_out * n_in).reshape(n_out, n_in), np.ones((n_out, n_in))
            expansions.append(EntrywiseExpansion(index.ravel(), sign.ravel()))
            self._shapes.append(index.shape)
            self._blocks.append((source, n_out, n_in, len(algebra), irrep.size))
            std.append(np.full(n_out * n_in * len(algebra), 1 / math.sqrt(n_in * len(algebra))))
        self._sizes = [rows * columns for rows, columns in self._shapes]
        self.init_std = np.concatenate(std)
        self.num_weights = len(self.init_std)
        self.expansion = EntrywiseExpansion.joined(expansions, [len(own) for own in std])

    def matrices(self, entries: Tensor) -> tuple[Tensor, ...]:
        """The matrix of each irrep: over its multiplicities, or over its channels where the algebra is not real.

        :param entries: of all matrices, in the order of :attr:`expansion`.
        """
        return tuple(map(Tensor.view, split(entries, self._sizes), self._shapes))

    def is_real(self, index: int) -> bool:
        """Whether the endomorphisms of the output's irrep ``index`` are multiples of the identity."""
        return self._blocks[index][3] == 1

    def per_weight(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """For every weight the value of its pair of fields, ``(fields out, fields in)`` per output irrep."""
        found = [np.repeat(own, block[3]) for own, block in zip(values, self._blocks)]
        return np.concatenate([np.zeros(0), *found])

    def apply(self, components: Sequence[Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
        """The images, one tensor ``(count * size, batch)`` per output irrep, of those of the inputs likewise."""
        images = []
        for matrix, (source, n_out, _, number, size) in zip(matrices, self._blocks):
            x = components[source]
            if number == 1 and size > 1:
                images.append((matrix @ x.reshape(matrix.shape[1], -1)).view(n_out * size, -1))
            else:
                images.append(matrix @ x)
        return images
