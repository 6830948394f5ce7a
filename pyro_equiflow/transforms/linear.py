# SPDX-License-Identifier: Apache-2.0
"""The exponential of an intertwiner: an invertible equivariant linear map."""

from __future__ import annotations

import numpy as np
import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.nn.gather import Gather
from pyro_equiflow.nn.parts import IrrepMap, IrrepParts
from pyro_equiflow.ops.arguments import check_flag, check_number
from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.events import channel_matmul
from pyro_equiflow.ops.representations import IrrepDecomposition
from pyro_equiflow.transforms.base import EquivariantTransform

__all__ = ["EquivariantLinear", "equivariant_linear"]

# An exponential of a small matrix costs the same whatever its size: up to this side all irreps share one.
_JOINT = 32


class EquivariantLinear(EquivariantTransform):
    r"""An invertible linear map that commutes with a symmetry group and mixes fields of equal irreps.

    .. math:: y = \exp(A)\, x, \qquad A \rho(g) = \rho(g) A,

    at every position of a grid alike. By Schur's lemma :math:`A` is a matrix over each irrep's endomorphism algebra,
    so the exponential is taken of small matrices over multiplicities, not of the whole of :math:`A`.

    Log-det exact, :math:`\operatorname{tr} A` times the number of positions; inverse closed, :math:`\exp(-A)`.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_linear
        >>> space = gspaces.no_base_space(group.so3_group())
        >>> transform = equivariant_linear(enn.FieldType(space, 3 * [space.irrep(1)]))
        >>> transform(torch.randn(5, 9)).shape
        torch.Size([5, 9])

    :param field_type: how the group acts on the event.
    :param cache_size: 0 or 1, see :class:`EquivariantTransform`.

    References: Bose, Brubaker and Kobyzev (arXiv 2110.08649); Hoogeboom et al., *The convolution exponential and
    generalized Sylvester flows* (arXiv 2006.01910), eq. 3.
    """

    def __init__(self, field_type: enn.FieldType, *, cache_size: int = 1) -> None:
        super().__init__(field_type, cache_size=cache_size)
        decomposition = IrrepDecomposition(field_type)
        isotypic = decomposition.isotypic()
        irreps = [(irrep, len(blocks)) for irrep, blocks in isotypic]
        self._map = IrrepMap(irreps, irreps)
        # Of a matrix over multiplicities, A = a (x) 1, and so is its exponential.
        copies = [irrep.size if self._map.is_real(i) else 1 for i, (irrep, _) in enumerate(irreps)]
        sides = [count * irrep.size // n for (irrep, count), n in zip(irreps, copies)]
        self._side = sum(sides) if sum(sides) <= _JOINT else None
        entries = _blocks(sides, joint=False)
        places = entries if self._side is None else _blocks(sides, joint=True)
        self._generator = _placed(places, entries, self._side, self._map.gather)
        # On points in the basis of irreps each irrep is mapped by itself, else channels by one matrix.
        self._parts = IrrepParts(field_type) if IrrepParts.fit(field_type) else None
        inside = np.concatenate([place.ravel() for place in places])
        self._inside = Gather(inside, np.ones(len(inside)))
        columns = [np.arange(b.start, b.start + b.size) for _, blocks in isotypic for b in blocks]
        basis = decomposition.change_of_basis[:, np.concatenate(columns)]
        # A basis that only puts irreps in another order costs nothing.
        reorders = bool(np.abs(basis - np.round(basis)).max() < 1e-12 and basis.min() > -0.5)
        order = basis.argmax(1) if reorders else np.arange(len(basis))
        index, factor = (array[np.ix_(order, order)] for array in _channel_matrix(places, copies))
        self._whole = Gather(index.ravel(), factor.ravel())
        trace = np.zeros(self._map.num_weights)
        for block, n in zip(entries, copies):
            np.add.at(trace, self._map.gather.index[block.diagonal()], n * self._map.gather.factor[block.diagonal()])
        self._constants = Constants(basis=None if reorders else basis, trace=trace)
        self._spatial_dims = self.event_dim - 1
        self.weight = torch.nn.Parameter(torch.zeros(self._map.num_weights))

    def reset_parameters(self, std: float = 0.0) -> None:
        """Draws the weights of :math:`A` with a standard deviation; 0 is the identity map."""
        torch.nn.init.normal_(self.weight, std=check_number("std", std, "[0, inf)"))

    def _exponentials(self, weight: Tensor) -> Tensor:
        """The entries of the exponentials of all irreps' matrices: of one matrix that holds all, or one by one."""
        if self._side is not None:
            return _matrix_exp(self._generator(weight).view(self._side, self._side)).flatten()
        return torch.cat([_matrix_exp(a).flatten() for a in self._map.expand(weight)])

    def _transform(self, x: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        constants = self._constants.like(x)
        exponentials = self._exponentials(self.weight if sign > 0 else -self.weight)
        positions = x.shape[x.dim() - self._spatial_dims :].numel()
        ladj = sign * positions * (constants["trace"] @ self.weight)
        ladj = ladj.expand(x.shape[: x.dim() - self.event_dim])
        if self._parts is not None and x.dim() == 2:
            matrices = self._map.matrices(self._inside(exponentials))
            return self._parts.merge(self._map.apply(self._parts.split(x.mT), matrices)).mT, ladj
        matrix = self._whole(exponentials).view(self.field_type.size, -1)
        basis = constants["basis"]
        if basis is not None:
            matrix = basis @ matrix @ basis.T
        return channel_matmul(matrix, x, self._spatial_dims), ladj

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._transform(x, 1.0)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._transform(y, -1.0)


def _blocks(sides: list[int], joint: bool) -> list[np.ndarray]:
    """Where the entries of square matrices stand: on the diagonal of one matrix, or one matrix after the other."""
    starts = np.cumsum([0, *sides[:-1]])
    if joint:
        grid = np.arange(sum(sides) ** 2).reshape(sum(sides), -1)
        return [grid[start : start + side, start : start + side] for start, side in zip(starts, sides)]
    ends = np.cumsum([side**2 for side in sides])
    return [np.arange(end - side**2, end).reshape(side, side) for end, side in zip(ends, sides)]


def _placed(places: list[np.ndarray], entries: list[np.ndarray], side: int | None, gather: Gather) -> Gather:
    """What ``gather`` gives, each of its entries at its place in one matrix, zeros elsewhere."""
    if side is None:
        return gather
    index, factor = np.zeros(side**2, dtype=np.int64), np.zeros(side**2)
    for place, entry in zip(places, entries):
        index[place], factor[place] = gather.index[entry], gather.factor[entry]
    return Gather(index, factor)


def _channel_matrix(places: list[np.ndarray], copies: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of ``a (x) 1`` for all irreps, the matrix over channels: where its entries stand, and 1 or 0 for each."""
    size = sum(n * len(place) for place, n in zip(places, copies))
    index, factor = np.zeros((size, size), dtype=np.int64), np.zeros((size, size))
    start = 0
    for place, n in zip(places, copies):
        stop = start + n * len(place)
        for component in range(n):
            own = slice(start + component, stop, n)
            index[own, own], factor[own, own] = place, 1.0
        start = stop
    return index, factor


def _matrix_exp(matrix: Tensor) -> Tensor:
    # In float32 torch's own is wrong by up to 3e-5 where the 1-norm is just below 0.58 (seen in torch 2.13).
    return torch.matrix_exp(matrix.double()).to(matrix.dtype)


def equivariant_linear(field_type: enn.FieldType, *, identity_init: bool = True) -> EquivariantLinear:
    """An :class:`EquivariantLinear`.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_linear
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> equivariant_linear(vectors, identity_init=False)(torch.randn(5, 6)).shape
        torch.Size([5, 6])

    :param field_type: how the group acts on the event.
    :param identity_init: whether it starts as the identity; else :math:`A` starts small and random.
    """
    identity_init = check_flag("identity_init", identity_init)
    transform = EquivariantLinear(field_type)
    if not identity_init:
        transform.reset_parameters(std=0.1)
    return transform
