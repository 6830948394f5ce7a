# SPDX-License-Identifier: Apache-2.0
"""An intertwiner in triangular factors: an invertible equivariant linear map."""

from __future__ import annotations

import numpy as np
import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.nn.irreps.isotypic import IrrepMap, IsotypicLayout, is_of_irreps
from pyro_equiflow.nn.linear.entrywise import EntrywiseExpansion
from pyro_equiflow.ops.arguments import check_flag, check_number
from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.events import channel_matmul
from pyro_equiflow.ops.representations import IrrepDecomposition
from pyro_equiflow.transforms.base import EquivariantTransform

__all__ = ["EquivariantLinear", "equivariant_linear"]

# Small matrices cost the same whatever their size: up to this side all irreps share one.
_JOINT = 32


class EquivariantLinear(EquivariantTransform):
    r"""An invertible linear map that commutes with a symmetry group and mixes fields of equal irreps.

    By Schur's lemma a map :math:`A` with :math:`A \rho(g) = \rho(g) A` is, for each irrep, a matrix over its
    multiplicities, whose entries are of the irrep's endomorphism algebra :math:`\mathbb{K}`: real or complex numbers,
    or quaternions. With :math:`A = L + D + U`, what stands below, on and above the diagonal,

    .. math:: y = (1 + L)\, e^D\, (1 + U)\, x

    at every position of a grid alike. Near zero that is :math:`1 + A`. Log-det exact, :math:`\operatorname{tr} A` times
    the number of positions; inverse closed, by substitution. A pass costs :math:`O(n^2)` an event for :math:`n` equal
    irreps.

    Within reach is every such matrix whose leading principal minors are positive (real) or not zero, the positive
    definite ones among them; not, say, two equal irreps exchanged. Five maps in a row reach all of positive
    determinant (Ballantine 1968: they are products of five positive definite ones).

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

    References: Kingma and Dhariwal, *Glow* (arXiv 1807.03039), section 3.2, for triangular factors; Bose, Brubaker and
    Kobyzev (arXiv 2110.08649); Ballantine, *Products of positive definite matrices III*, J. Algebra 10 (1968).
    """

    def __init__(self, field_type: enn.FieldType, *, cache_size: int = 1) -> None:
        super().__init__(field_type, cache_size=cache_size)
        decomposition = IrrepDecomposition(field_type)
        isotypic = decomposition.isotypic()
        irreps = [(irrep, len(blocks)) for irrep, blocks in isotypic]
        self._map = IrrepMap(irreps, irreps)
        # Of a matrix over multiplicities, A = a (x) 1, and so are its factors.
        copies = [irrep.size if self._map.is_real(i) else 1 for i, (irrep, _) in enumerate(irreps)]
        widths = [irrep.size // n for (irrep, _), n in zip(irreps, copies)]
        sides = [count * width for (_, count), width in zip(irreps, widths)]
        self._joint = sum(sides) <= _JOINT
        entries = _blocks(sides, joint=False)
        places = _blocks(sides, joint=True) if self._joint else entries
        self._generator = (
            _placed(places, entries, sum(sides), self._map.expansion) if self._joint else self._map.expansion
        )
        blocks = [np.arange(side) // width for side, width in zip(sides, widths)]
        self._sides = [sum(sides)] if self._joint else sides
        self._factors = [_Factors(own) for own in ([_numbered(blocks)] if self._joint else blocks)]
        # On points in the basis of irreps each irrep is mapped by itself, else channels by one matrix.
        self._parts = IsotypicLayout(field_type) if is_of_irreps(field_type) else None
        inside = np.concatenate([place.ravel() for place in places])
        self._inside = EntrywiseExpansion(inside, np.ones(len(inside)))
        columns = [np.arange(b.start, b.start + b.size) for _, blocks in isotypic for b in blocks]
        basis = decomposition.change_of_basis[:, np.concatenate(columns)]
        # A basis that only puts irreps in another order costs nothing.
        reorders = bool(np.abs(basis - np.round(basis)).max() < 1e-12 and basis.min() > -0.5)
        order = basis.argmax(1) if reorders else np.arange(len(basis))
        index, factor = (array[np.ix_(order, order)] for array in _channel_matrix(places, copies))
        self._whole = EntrywiseExpansion(index.ravel(), factor.ravel())
        trace = np.zeros(self._map.num_weights)
        for block, n in zip(entries, copies):
            np.add.at(
                trace, self._map.expansion.index[block.diagonal()], n * self._map.expansion.factor[block.diagonal()]
            )
        self._constants = Constants(basis=None if reorders else basis, trace=trace)
        self._spatial_dims = self.event_dim - 1
        self.weight = torch.nn.Parameter(torch.zeros(self._map.num_weights))

    def reset_parameters(self, std: float = 0.0) -> None:
        """Draws the weights of :math:`A` with a standard deviation; 0 is the identity map."""
        torch.nn.init.normal_(self.weight, std=check_number("std", std, "[0, inf)"))

    def _generators(self) -> list[Tensor]:
        """The matrices :math:`A`: one that holds those of all irreps, or one for each."""
        parts = self._generator(self.weight).split([side**2 for side in self._sides])
        return [part.view(side, side) for part, side in zip(parts, self._sides)]

    def _formed(self, inverse: bool) -> Tensor:
        """The entries of all maps, one after the other."""
        return torch.cat([f.matrix(a, inverse).flatten() for f, a in zip(self._factors, self._generators())])

    def _on_parts(self, parts: list[Tensor], inverse: bool) -> list[Tensor]:
        """The images ``(count * size, batch)`` of the parts of irreps on points."""
        if self._joint:
            return self._map.apply(parts, self._map.matrices(self._inside(self._formed(inverse))))
        images = []
        for part, factors, a in zip(parts, self._factors, self._generators()):
            columns = part.reshape(len(a), -1)
            # To form a matrix costs as much as to apply its factors to as many columns as it has.
            wide = columns.shape[1] > len(a)
            image = factors.matrix(a, inverse) @ columns if wide else factors.apply(a, columns, inverse)
            images.append(image.reshape(part.shape))
        return images

    def _transform(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        constants = self._constants.like(x)
        positions = x.shape[x.dim() - self._spatial_dims :].numel()
        ladj = (-positions if inverse else positions) * (constants["trace"] @ self.weight)
        ladj = ladj.expand(x.shape[: x.dim() - self.event_dim])
        if self._parts is not None:
            parts = self._parts.split(x.reshape(-1, x.shape[-1]).mT)
            return self._parts.merge(self._on_parts(parts, inverse)).mT.reshape(x.shape), ladj
        matrix = self._whole(self._formed(inverse)).view(self.field_type.size, -1)
        basis = constants["basis"]
        if basis is not None:
            matrix = basis @ matrix @ basis.T
        return channel_matmul(matrix, x, self._spatial_dims), ladj

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._transform(x, inverse=False)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._transform(y, inverse=True)


class _Factors:
    r"""The map :math:`(1 + L) e^D (1 + U)` of a square matrix :math:`A = L + D + U`, and its inverse.

    :param blocks: for each row the number of its diagonal block, ascending. A block of :math:`D` holds an element
        :math:`r + K` of an algebra: :math:`r` on the diagonal, and :math:`K`, antisymmetric, with
        :math:`K^2 = -q`, the sum of squares of any of its columns. So
        :math:`e^{r + K} = e^r (\cos\sqrt q + K \sin\sqrt q / \sqrt q)`.
    """

    def __init__(self, blocks: np.ndarray) -> None:
        inside = (blocks[:, None] == blocks) & ~np.eye(len(blocks), dtype=bool)
        self._constants = Constants(inside=inside.astype(float) if inside.any() else None)

    def matrix(self, a: Tensor, inverse: bool) -> Tensor:
        """The matrix of the map."""
        return self.apply(a, torch.eye(len(a), dtype=a.dtype, device=a.device), inverse)

    def apply(self, a: Tensor, v: Tensor, inverse: bool) -> Tensor:
        """The images of columns ``v``, shape ``(side, n)``."""
        inside = self._constants.like(a)["inside"]
        turn = None if inside is None else a * inside
        rest = a if turn is None else a - turn
        upper, lower = rest.triu(1), rest.tril(-1)
        if inverse:
            v = torch.linalg.solve_triangular(lower, v, upper=False, unitriangular=True)
            v = _scaled(v, -a.diagonal(), None if turn is None else -turn)
            return torch.linalg.solve_triangular(upper, v, upper=True, unitriangular=True)
        v = _scaled(torch.addmm(v, upper, v), a.diagonal(), turn)
        return torch.addmm(v, lower, v)


def _scaled(v: Tensor, log_length: Tensor, turn: Tensor | None) -> Tensor:
    length = log_length.exp()[:, None]
    if turn is None:
        return length * v
    cosine, sine = _cosine_and_sine(turn.square().sum(0)[:, None])
    return length * (cosine * v + sine * (turn @ v))


def _cosine_and_sine(q: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\cos\sqrt q` and :math:`\sin\sqrt q / \sqrt q`, differentiable to any order at zero too."""
    small = q < 1e-4
    near = torch.where(small, q, 0.0)
    root = torch.where(small, 1.0, q).sqrt()
    # What the series leave out is below 1e-20.
    cosine = 1 - near / 2 * (1 - near / 12 * (1 - near / 30))
    sine = 1 - near / 6 * (1 - near / 20 * (1 - near / 42))
    return torch.where(small, cosine, root.cos()), torch.where(small, sine, root.sin() / root)


def _blocks(sides: list[int], joint: bool) -> list[np.ndarray]:
    """Where the entries of square matrices stand: on the diagonal of one matrix, or one matrix after the other."""
    starts = np.cumsum([0, *sides[:-1]])
    if joint:
        grid = np.arange(sum(sides) ** 2).reshape(sum(sides), -1)
        return [grid[start : start + side, start : start + side] for start, side in zip(starts, sides)]
    ends = np.cumsum([side**2 for side in sides])
    return [np.arange(end - side**2, end).reshape(side, side) for end, side in zip(ends, sides)]


def _numbered(blocks: list[np.ndarray]) -> np.ndarray:
    """Numbers of blocks of one matrix after the other, each counted from 0, counted on."""
    counts = [0, *(int(own.max()) + 1 for own in blocks[:-1])]
    return np.concatenate([own + start for own, start in zip(blocks, np.cumsum(counts))])


def _placed(
    places: list[np.ndarray], entries: list[np.ndarray], side: int, expansion: EntrywiseExpansion
) -> EntrywiseExpansion:
    """What ``expansion`` gives, each of its entries at its place in one matrix, zeros elsewhere."""
    index, factor = np.zeros(side**2, dtype=np.int64), np.zeros(side**2)
    for place, entry in zip(places, entries):
        index[place], factor[place] = expansion.index[entry], expansion.factor[entry]
    return EntrywiseExpansion(index, factor)


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
