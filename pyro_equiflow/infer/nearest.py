# SPDX-License-Identifier: Apache-2.0
r"""The group element that brings a draw nearest to a reference, by kind of group.

A kind stands for one site. Its :meth:`overlap` is linear in the draw and adds up over sites; :meth:`nearest` reads the
element off the sum, :meth:`move` applies it. All groups here act orthogonally, so that the largest
:math:`\langle g \cdot x, x^\ast \rangle` is the least :math:`|g \cdot x - x^\ast|`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from escnn.group import O2, O3, SO2, SO3, Representation
from escnn.nn import FieldType
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyro_equiflow.ops.named_groups import TO_XYZ
from pyro_equiflow.ops.representations import IrrepDecomposition

__all__ = ["Kind", "Listed", "Orthogonal", "Permutations", "matrices_of", "rows_along"]


class Kind(Protocol):
    """What a group does at one site; values are flattened, ``(*batch, size)``.

    :ivar key: equal for sites that one element moves together.
    """

    key: tuple

    def overlap(self, x: Tensor, reference: Tensor) -> Tensor:
        """What decides on the element, in float64: to be added up over sites."""

    def nearest(self, overlap: Tensor) -> Tensor:
        """The best element for each of the batch."""

    def move(self, x: Tensor, elements: Tensor) -> Tensor:
        """The values moved."""


def rows_along(shape: Sequence[int], dim: int) -> Tensor:
    """Where the entries along ``dim`` stand in the flattened value: shape ``(others, shape[dim])``."""
    places = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return places.movedim(dim, -1).reshape(-1, shape[dim])


def _cross(x: Tensor, reference: Tensor, places: Tensor) -> Tensor:
    """Sums of outer products of a reference's vectors and a draw's, ``(*batch, d, d)``."""
    return torch.einsum("ni,...nj->...ij", reference.double()[places], x.double()[..., places])


def _turned(x: Tensor, places: Tensor, matrices: Tensor) -> Tensor:
    """``x`` with its vectors multiplied by a matrix for each of the batch."""
    moved = x.clone()
    moved[..., places] = x[..., places] @ matrices.to(x).mT
    return moved


class Orthogonal:
    r"""Rotations, and reflections if ``proper`` is false, by singular values (Schönemann; Kabsch).

    With :math:`M = \sum x^\ast x^\top = U \Sigma V^\top` the best is :math:`U V^\top`; of one determinant
    :math:`U \operatorname{diag}(1, \dots, 1, \pm 1) V^\top`, the sign at the least singular value.

    :param dim: of a vector.
    :param proper: whether the determinant is 1.
    :param vectors: where vectors stand, ``(n, dim)``.
    :param pseudovectors: where pseudovectors stand.
    :param pseudoscalars: where pseudoscalars stand.
    :param basis: orthogonal; vectors stand in ``x @ basis``.
    """

    def __init__(
        self,
        dim: int,
        proper: bool,
        vectors: Tensor,
        pseudovectors: Tensor | None = None,
        pseudoscalars: Tensor | None = None,
        basis: Tensor | None = None,
    ) -> None:
        none = torch.zeros(0, dtype=torch.long)
        self.key = ("SO" if proper else "O", dim)
        self.dim, self.proper, self.vectors, self.basis = dim, proper, vectors, basis
        self.pseudovectors = none.reshape(0, dim) if pseudovectors is None else pseudovectors
        self.pseudoscalars = none if pseudoscalars is None else pseudoscalars

    @classmethod
    def of_type(cls, field_type: FieldType) -> Orthogonal:
        """Of a field type whose irreps are vectors and scalars of some sort.

        :raises ValueError: another group, or other irreps.
        """
        group = field_type.fibergroup
        sorts = next((sorts for kind, sorts in _SORTS.items() if type(group) is kind), None)
        blocks = IrrepDecomposition(field_type)
        unknown = [b.irrep for b in blocks.blocks if sorts is None or b.irrep.id not in sorts]
        if sorts is None or unknown:
            raise ValueError(
                "action: expected a finite group, or vectors, pseudovectors, scalars and pseudoscalars of SO(2), O(2), "
                f"SO(3) or O(3), found {unknown[0]}; align by a finite subgroup"
            )
        found: dict[str, list] = {"vector": [], "pseudovector": [], "pseudoscalar": [], "scalar": []}
        basis = np.array(blocks.change_of_basis)
        for block in blocks.blocks:
            columns = slice(block.start, block.start + block.size)
            if block.size == 3:
                basis[:, columns] = basis[:, columns] @ TO_XYZ.T
            found[sorts[block.irrep.id]].append(list(range(block.start, block.start + block.size)))
        dim = 3 if isinstance(group, SO3 | O3) else 2
        places = {name: torch.tensor(rows, dtype=torch.long) for name, rows in found.items()}
        return cls(
            dim,
            isinstance(group, SO2 | SO3),
            places["vector"].reshape(-1, dim),
            places["pseudovector"].reshape(-1, dim),
            places["pseudoscalar"].flatten(),
            torch.tensor(basis),
        )

    def _in_basis(self, x: Tensor) -> Tensor:
        return x if self.basis is None else x @ self.basis.to(x)

    def overlap(self, x: Tensor, reference: Tensor) -> Tensor:
        """For determinants 1 and -1 the matrix M and, last, what else the determinant decides."""
        x, reference = self._in_basis(x), self._in_basis(reference)
        even, odd = (_cross(x, reference, p).flatten(-2) for p in (self.vectors, self.pseudovectors))
        signed = x.double()[..., self.pseudoscalars] @ reference.double()[self.pseudoscalars]
        upright = torch.cat([even + odd, signed[..., None]], -1)
        mirrored = torch.cat([even - odd, -signed[..., None]], -1)
        return torch.stack([upright, mirrored], -2)

    def nearest(self, overlap: Tensor) -> Tensor:
        """Orthogonal matrices, ``(*batch, dim, dim)``."""
        overlap = overlap[..., :1, :] if self.proper else overlap
        cross = overlap[..., :-1].unflatten(-1, (self.dim, self.dim))
        u, _, vh = torch.linalg.svd(cross)
        wanted = torch.tensor([1.0, -1.0], dtype=cross.dtype, device=cross.device)[: overlap.shape[-2]]
        u[..., -1] = u[..., -1] * (wanted * torch.linalg.det(u @ vh))[..., None]
        best = u @ vh
        which = ((best * cross).sum((-1, -2)) + overlap[..., -1]).argmax(-1)
        return best.take_along_dim(which[..., None, None, None], -3).squeeze(-3)

    def move(self, x: Tensor, elements: Tensor) -> Tensor:
        """Vectors times the matrix, the others with its determinant."""
        sign = torch.linalg.det(elements).round().to(x)[..., None]
        moved = self._in_basis(x).clone()
        moved = _turned(moved, self.vectors, elements)
        moved = _turned(moved, self.pseudovectors, sign[..., None] * elements.to(x))
        moved[..., self.pseudoscalars] = sign * moved[..., self.pseudoscalars]
        return moved if self.basis is None else moved @ self.basis.to(x).T


#: What the irreps of a group are; of SO(2) frequency 1, and so on.
_SORTS: dict[type, dict[tuple, str]] = {
    SO2: {(0,): "scalar", (1,): "vector"},
    O2: {(0, 0): "scalar", (1, 0): "pseudoscalar", (1, 1): "vector"},
    SO3: {(0,): "scalar", (1,): "vector"},
    O3: {(0, 0): "scalar", (1, 0): "pseudoscalar", (0, 1): "pseudovector", (1, 1): "vector"},
}


class Permutations:
    """All orders of the entries along one dimension, by the Hungarian method of scipy.

    :param places: where they stand, ``(others, number)``.
    """

    def __init__(self, places: Tensor) -> None:
        self.key = ("S", places.shape[-1])
        self.places = places

    def overlap(self, x: Tensor, reference: Tensor) -> Tensor:
        """What each pair of entries would bring, ``(*batch, number, number)``."""
        return _cross(x, reference, self.places)

    def nearest(self, overlap: Tensor) -> Tensor:
        """Which entry comes to each place, ``(*batch, number)``."""
        number = overlap.shape[-1]
        tables = overlap.reshape(-1, number, number).cpu().numpy()
        orders = np.array([linear_sum_assignment(table, maximize=True)[1] for table in tables], dtype=np.int64)
        return torch.from_numpy(orders.reshape(overlap.shape[:-1])).to(overlap.device)

    def move(self, x: Tensor, elements: Tensor) -> Tensor:
        """The entries in their new order."""
        moved = x.clone()
        rows = x[..., self.places]
        moved[..., self.places] = rows.take_along_dim(elements[..., None, :], -1)
        return moved


class Listed:
    """Finitely many matrices, all tried.

    :param key: which elements these are.
    :param parts: where vectors stand, ``(n, d)``, and what each element does to them, ``(number, d, d)``.
    """

    def __init__(self, key: Any, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.key = ("finite", key)
        self.parts = parts

    @classmethod
    def of_type(cls, field_type: FieldType) -> Listed:
        """Of a field type of a finite group, elements in the order of ``group.elements``."""
        places: dict[Representation, list[range]] = {}
        start = 0
        for representation in field_type.representations:
            places.setdefault(representation, []).append(range(start, start + representation.size))
            start += representation.size
        parts = [(torch.tensor([list(r) for r in rows]), matrices_of(r)) for r, rows in places.items()]
        return cls(field_type.fibergroup.name, parts)

    def overlap(self, x: Tensor, reference: Tensor) -> Tensor:
        """That of each element, ``(*batch, number)``."""
        terms = [
            torch.einsum("gij,...ij->...g", matrices.to(x.device), _cross(x, reference, places))
            for places, matrices in self.parts
        ]
        return torch.stack(terms).sum(0)

    def nearest(self, overlap: Tensor) -> Tensor:
        """The number of the best, ``(*batch,)``."""
        return overlap.argmax(-1)

    def move(self, x: Tensor, elements: Tensor) -> Tensor:
        """The values times the matrix of that number."""
        for places, matrices in self.parts:
            x = _turned(x, places, matrices.to(x.device)[elements])
        return x


def matrices_of(representation: Representation) -> Tensor:
    """A representation at all elements of its finite group, ``(order, size, size)``."""
    return torch.tensor(np.array([representation(g) for g in representation.group.elements]), dtype=torch.float64)
