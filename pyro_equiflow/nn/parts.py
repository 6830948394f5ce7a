# SPDX-License-Identifier: Apache-2.0
"""Features of irreps held as one tensor an irrep: the layout in which networks on points run.

An intertwiner never mixes different irreps (Schur's lemma), so a network of irreps is several small products of
matrices and never one large one. Where the endomorphisms of an irrep are the real numbers alone, the free
parameters are the matrix, and all components of a vector are columns of one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from escnn import nn as enn
from escnn.group import IrreducibleRepresentation
from torch import Tensor

from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.representations import IrrepDecomposition

__all__ = ["ExpandedParts", "IrrepParts", "irrep_parts"]


class ExpandedParts(NamedTuple):
    """A module on irreps expanded: ``fn(parts, *tensors)`` maps lists of parts ``(fields * size, batch)``."""

    fn: Callable[..., list[Tensor]]
    tensors: tuple[Tensor, ...]
    in_parts: IrrepParts
    out_parts: IrrepParts


class IrrepParts:
    """Which channels of a field type hold which irrep, the irreps in order of first appearance."""

    def __init__(self, field_type: enn.FieldType) -> None:
        self.irreps: list[IrreducibleRepresentation] = []
        self.counts: list[int] = []
        rows = []
        for irrep, blocks in IrrepDecomposition(field_type).isotypic():
            self.irreps.append(irrep)
            self.counts.append(len(blocks))
            rows.append(np.concatenate([np.arange(b.start, b.start + b.size) for b in blocks]))
        self.ids = [irrep.id for irrep in self.irreps]
        self.sizes = [len(r) for r in rows]
        self.trivial = next((i for i, irrep in enumerate(self.irreps) if irrep.is_trivial()), None)
        order = np.concatenate(rows)
        in_order = bool((order == np.arange(len(order))).all())
        self._constants = Constants(order=None if in_order else order, inverse=None if in_order else np.argsort(order))

    def split(self, x: Tensor) -> list[Tensor]:
        """The parts of a tensor ``(channels, batch)``."""
        order = self._constants.like(x)["order"]
        return list((x if order is None else x.index_select(0, order)).split(self.sizes, 0))

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor ``(channels, batch)`` of which these are the parts."""
        x = parts[0] if len(parts) == 1 else torch.cat(list(parts), 0)
        inverse = self._constants.like(x)["inverse"]
        return x if inverse is None else x.index_select(0, inverse)


def irrep_parts(field_type: enn.FieldType) -> IrrepParts | None:
    """The parts of a type with no base space whose fields are irreps as they stand; ``None`` for any other."""
    if field_type.gspace.dimensionality:
        return None
    if not all(len(r.irreps) == 1 for r in set(field_type.representations)):
        return None
    return IrrepParts(field_type) if IrrepDecomposition(field_type).is_identity else None
