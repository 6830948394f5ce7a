# SPDX-License-Identifier: Apache-2.0
"""What of an event may be split or ordered: whole fields, or the irreps inside them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from escnn.group import Representation
from escnn.nn import FieldType

from pyro_equiflow.ops.arguments import check_choice
from pyro_equiflow.ops.coordinates import Coordinates
from pyro_equiflow.ops.representations import IrrepDecomposition, is_permutation

__all__ = ["Block", "BlockLayout", "block_layout"]


@dataclass(frozen=True)
class Block:
    """An invariant subspace of the event, a run of channels of the layout.

    Example::

        >>> from escnn import group
        >>> from pyro_equiflow.maps import Block
        >>> c4 = group.cyclic_group(4)
        >>> Block((c4.irrep(1), c4.irrep(0))).repeats  # one number scales two channels, one a single channel
        (2, 1)

    :ivar fields: its representations: one permutation field, or irreps.
    """

    fields: tuple[Representation, ...]

    @property
    def scales(self) -> tuple[Representation, ...]:
        """The fields whose values act on the block's: its own for a permutation field, else a trivial one per irrep."""
        return tuple(
            field if field.size > 1 and is_permutation(field) else field.group.trivial_representation
            for field in self.fields
        )

    @property
    def repeats(self) -> tuple[int, ...]:
        """How many channels each channel of the scales stands for."""
        return tuple(r for f in self.fields for r in (f.size * (1,) if is_permutation(f) else (f.size,)))


class BlockLayout(Coordinates):
    r"""An event written in coordinates :math:`z = P^T x` in which invariant subspaces are runs of channels.

    :ivar blocks: the blocks in order.
    """

    def __init__(self, blocks: list[Block], basis: np.ndarray | None, spatial_dims: int) -> None:
        super().__init__(basis, spatial_dims)
        self.blocks = tuple(blocks)
        self.sizes = [sum(field.size for field in block.fields) for block in blocks]
        self.starts = np.cumsum([0, *self.sizes[:-1]]).tolist()

    def names(self) -> list[list[str]]:
        """The names of the blocks' fields."""
        return [[field.name for field in block.fields] for block in self.blocks]

    def first_half(self, start: int = 0) -> list[int]:
        """The first blocks up to half of the channels, at least one, never all.

        :param start: the block that counts as the first; blocks before it count as the last.
        """
        total = 0
        kept: list[int] = []
        for place in range(start, start + len(self.blocks) - 1):
            index = place % len(self.blocks)
            if kept and 2 * (total + self.sizes[index]) > sum(self.sizes) + 1:
                break
            kept.append(index)
            total += self.sizes[index]
        return sorted(kept)

    def channels(self, chosen: list[int]) -> np.ndarray:
        """The layout's channels of some blocks, in their order."""
        parts = [self.starts[i] + np.arange(self.sizes[i]) for i in chosen]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=int)


def block_layout(field_type: FieldType, split_by: str | None, owner: str) -> BlockLayout:
    """Cuts an event into at least two blocks.

    :param split_by: ``"fields"``, ``"irreps"``, or ``None``: fields if there are two of them, else irreps.
    :raises ValueError: fewer than two blocks, or an unknown ``split_by``.
    """
    if split_by is not None:
        check_choice("split_by", split_by, ("fields", "irreps"), also="None")
    else:
        split_by = "fields" if len(field_type.representations) > 1 else "irreps"
    decomposition = IrrepDecomposition(field_type)
    if split_by == "irreps":
        blocks = [Block((b.irrep,)) for b in decomposition.blocks]
        basis = None if decomposition.is_identity else decomposition.change_of_basis
        layout = BlockLayout(blocks, basis, int(field_type.gspace.dimensionality))
    else:
        layout = _fields_layout(field_type, decomposition)
    if len(layout.blocks) < 2:
        raise ValueError(
            f"{owner}: expected a type of at least two {split_by}, found {field_type} with {len(layout.blocks)}: it "
            "has no invariant part to split off. Add fields (auxiliary ones: augment(field_type, 2), or auxiliary=2 of "
            "AutoEquivariantFlow); or take a transform that needs no "
            "split, equivariant_residual or equivariant_implicit; or, for a finite group, OrbitMixture of a plain flow"
        )
    return layout


def _fields_layout(field_type: FieldType, decomposition: IrrepDecomposition) -> BlockLayout:
    blocks, identity = [], True
    basis = np.eye(field_type.size)
    start = 0
    for index, rep in enumerate(field_type.representations):
        stop = start + rep.size
        if is_permutation(rep):
            blocks.append(Block((rep,)))
        else:
            # Scales commute with this field in the basis of its irreps, so it is carried there.
            irreps = [b for b in decomposition.blocks if b.field == index]
            columns = decomposition.change_of_basis[start:stop, start:stop]
            if np.abs(columns - np.eye(rep.size)).max() > 1e-12:
                basis[start:stop, start:stop] = columns
                identity = False
            blocks.append(Block(tuple(b.irrep for b in irreps)))
        start = stop
    return BlockLayout(blocks, None if identity else basis, int(field_type.gspace.dimensionality))
