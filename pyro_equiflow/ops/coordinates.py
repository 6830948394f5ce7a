# SPDX-License-Identifier: Apache-2.0
"""Coordinates in which the group acts field by field, and numbers that act on fields."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from escnn.nn import FieldType
from torch import Tensor

from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.events import channel_matmul, event_dim
from pyro_equiflow.ops.representations import IrrepDecomposition

__all__ = ["Coordinates", "FieldScalars", "IrrepCoordinates"]


class FieldScalars:
    """Numbers that act on a block's channels: one per channel of a permutation field, one per irrep.

    Example::

        >>> import torch
        >>> from pyro_equiflow.maps import FieldScalars
        >>> scalars = FieldScalars([2, 1], spatial_dims=0)
        >>> scalars.times(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 0.0]))
        tensor([10., 20.,  0.])
        >>> scalars.squares(torch.tensor([1.0, 2.0, 3.0])), scalars.total(torch.tensor([1.0, 5.0]))
        (tensor([5., 9.]), tensor(7.))

    :param repeats: how many channels each number stands for.
    :param spatial_dims: dimensions of the grid.
    """

    def __init__(self, repeats: Sequence[int], spatial_dims: int) -> None:
        self.repeats = counts = np.array(repeats, dtype=int)
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
        return x * self.per_channel(factors)

    def per_channel(self, values: Tensor) -> Tensor:
        """Every number as often as it stands for channels."""
        if self.uniform == 1:
            return values
        return values.index_select(-1 - self.spatial_dims, self._constants.like(values)["channel_of"])

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


class Coordinates:
    r"""Coordinates :math:`z = P^T x` of an event's channels.

    :ivar basis: :math:`P`, orthogonal float64 of shape ``(C, C)``; ``None`` where it is the identity.
    :ivar spatial_dims: dimensions of the grid.
    """

    def __init__(self, basis: np.ndarray | None, spatial_dims: int) -> None:
        self.basis, self.spatial_dims = basis, spatial_dims
        self._matrix = Constants(basis=basis)

    def coordinates(self, x: Tensor) -> Tensor:
        """An event's coordinates :math:`z`, shape ``(*batch, C, *spatial)``."""
        basis = self._matrix.like(x)["basis"]
        return x if basis is None else channel_matmul(basis.T, x, self.spatial_dims)

    def event(self, z: Tensor) -> Tensor:
        """The event of some coordinates."""
        basis = self._matrix.like(z)["basis"]
        return z if basis is None else channel_matmul(basis, z, self.spatial_dims)

    def everywhere(self, values: Tensor) -> Tensor:
        """Numbers ``(*batch, n)`` that are the same at all positions, as ``(*batch, n, *ones)``."""
        return values[(...,) + self.spatial_dims * (None,)]


class IrrepCoordinates(Coordinates):
    """Coordinates in the basis of irreps: what commutes with the group scales each irrep, and shifts invariant ones.

    :param field_type: how the group acts on events.
    :ivar irreps: numbers, one per irrep, in the order of ``field_type.irreps``.
    :ivar trivial: the coordinates that are invariant, one per trivial irrep.
    :ivar trivial_irreps: which irreps these are.
    """

    def __init__(self, field_type: FieldType) -> None:
        decomposition = IrrepDecomposition(field_type)
        basis, spatial_dims = decomposition.change_of_basis, event_dim(field_type) - 1
        super().__init__(None if decomposition.is_identity else basis, spatial_dims)
        self.irreps = FieldScalars(decomposition.sizes.tolist(), spatial_dims)
        self.trivial = decomposition.trivial
        self.trivial_irreps = [i for i, block in enumerate(decomposition.blocks) if block.irrep.is_trivial()]
        self._invariants = Constants(vectors=basis[:, self.trivial].T)

    def invariant(self, values: Tensor) -> Tensor:
        """The invariant event, the same at all positions, of coordinates ``(*batch, len(trivial))``."""
        return self.everywhere(values @ self._invariants.like(values)["vectors"])
