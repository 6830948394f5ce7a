# SPDX-License-Identifier: Apache-2.0
"""What couplings and autoregressive flows ask of the map of their blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from escnn.group import Representation
from torch import Tensor

from pyro_equiflow.maps.blocks import Block
from pyro_equiflow.ops.arguments import check_items
from pyro_equiflow.ops.coordinates import FieldScalars

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BlockMap", "FieldScalars", "Head"]


class Head(NamedTuple):
    """Parameters of one role: for each block some fields, all of them so many times over.

    Example::

        >>> from escnn import group
        >>> from pyro_equiflow.maps import Block, Head
        >>> blocks = [Block((group.so3_group().irrep(1),)), Block((group.so3_group().irrep(2),))]
        >>> [len(fields) for fields in Head([block.scales for block in blocks]).fields]
        [1, 1]

    :ivar fields: for each block a tuple of representations, empty where it takes none.
    :ivar copies: how many times over, as a dimension in front of the channels; 0 is once, without that dimension.
    """

    fields: Sequence[tuple[Representation, ...]]
    copies: int = 0


class BlockMap:
    r"""An invertible map of some blocks, whose parameters are fields that a conditioner gives.

    It commutes with the group if the parameters transform as their fields say. Such maps are called transformers by
    Papamakarios et al., *Normalizing Flows for Probabilistic Modeling and Inference* (arXiv 1912.02762), section 3.1.

    A subclass takes its settings, checks them and keeps them as attributes; :meth:`heads` says which fields its
    parameters are, :meth:`forward` and :meth:`inverse` map. Where a map is used it is bound to blocks: a copy of it
    knows them, and :meth:`prepare` may make constants. A map holds no parameters of its own.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_coupling
        >>> from pyro_equiflow.maps import BlockMap, Head
        >>> class Scale(BlockMap):
        ...     def heads(self, blocks):
        ...         return [Head([block.scales for block in blocks])]
        ...     def forward(self, x, parameters):
        ...         return self.scalars.times(x, parameters[0].exp()), self.scalars.total(parameters[0])
        ...     def inverse(self, y, parameters):
        ...         return self.scalars.times(y, (-parameters[0]).exp()), -self.scalars.total(parameters[0])
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> transform = equivariant_coupling(vectors, transformer=Scale(), identity_init=False)
        >>> x = torch.randn(5, 6)
        >>> bool((transform.inv(transform(x).clone()) - x).abs().max() < 1e-5)
        True

    :ivar blocks: of a bound map: its blocks, in the order of the channels of ``x``.
    :ivar spatial_dims: of a bound map: dimensions of the grid.
    :ivar scalars: of a bound map: numbers that act on its channels, one for each of ``block.scales``.
    :ivar parameter_fields: of a bound map: the representations of the parameters.
    :ivar parameter_blocks: of a bound map: for each of them the index of its block.
    """

    blocks: tuple[Block, ...]
    spatial_dims: int
    scalars: FieldScalars
    parameter_fields: list[Representation]
    parameter_blocks: list[int]

    # ---- what a subclass gives ----------------------------------------------------------------------------------

    def heads(self, blocks: Sequence[Block]) -> Sequence[Head]:
        """The parameters that the map takes for some blocks, by role."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Makes constants for ``blocks``; called once, when the map is bound."""

    def forward(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The image of a bound map, and its log-det.

        :param x: shape ``(*batch, C, *spatial)``.
        :param parameters: for each head shape ``(*batch, [copies,] channels, *spatial)``; raw zeros should give the
            identity, since that is where transforms start.
        :return: shapes ``(*batch, C, *spatial)`` and ``batch``.
        """
        raise NotImplementedError

    def inverse(self, y: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The preimage of a bound map, and the log-det of the inverse."""
        raise NotImplementedError

    # ---- what transforms use ------------------------------------------------------------------------------------

    def architecture(self) -> dict[str, Any]:
        """The class and the settings, by name: what checkpoints compare."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_") and name not in _BOUND}
        return {"class": type(self).__name__, **own}

    def __repr__(self) -> str:
        settings = self.architecture()
        return f"{settings.pop('class')}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def bind(self, blocks: Sequence[Block], spatial_dims: int) -> Self:
        """The map of some blocks: a copy.

        :raises TypeError: heads that are none.
        :raises ValueError: a head without fields for each of the blocks.
        """
        bound = copy.copy(self)
        bound.blocks, bound.spatial_dims = tuple(blocks), spatial_dims
        bound.scalars = FieldScalars([r for block in blocks for r in block.repeats], spatial_dims)
        heads = check_items("heads", self.heads(blocks), Head, "a sequence of Head")
        for i, head in enumerate(heads):
            if len(head.fields) != len(blocks):
                raise ValueError(
                    f"heads: expected fields for each of {len(blocks)} blocks, an empty tuple where there are none, "
                    f"found {len(head.fields)} in head {i} of {self!r}"
                )
        bound.parameter_fields, bound.parameter_blocks = [], []
        for head in heads:
            copies = max(1, head.copies)
            bound.parameter_fields += copies * [f for fields in head.fields for f in fields]
            bound.parameter_blocks += copies * [i for i, fields in enumerate(head.fields) for _ in fields]
        widths = [[sum(f.size for f in fields) for fields in head.fields] for head in heads]
        bound._runs = [[(sum(own[:i]), own[i]) for own in widths] for i in range(len(blocks))]
        bound._sizes = [max(1, head.copies) * sum(own) for head, own in zip(heads, widths)]
        bound._copies = [
            (i, (head.copies, sum(own))) for i, (head, own) in enumerate(zip(heads, widths)) if head.copies
        ]
        bound.prepare()
        return bound

    @property
    def num_parameters(self) -> int:
        """Channels of all parameters of a bound map."""
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

    _runs: list[list[tuple[int, int]]]
    _sizes: list[int]
    _copies: list[tuple[int, tuple[int, int]]]


_BOUND = ("blocks", "spatial_dims", "scalars", "parameter_fields", "parameter_blocks")
