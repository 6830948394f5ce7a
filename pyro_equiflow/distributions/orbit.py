# SPDX-License-Identifier: Apache-2.0
"""Finite lists of orthogonal maps of events, over which densities are averaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from escnn.group import GroupElement
from escnn.nn import FieldType
from scipy.spatial import cKDTree
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_equiflow.ops.arguments import check_integer, found
from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.events import act, channel_matrix, event_dim, on_grid
from pyro_equiflow.ops.representations import validate_field_type
from pyro_equiflow.ops.tracing import is_traced

__all__ = ["Action", "Orbit", "Turn", "matrix_group", "orbit_of"]

Action: TypeAlias = FieldType | Tensor | np.ndarray | Sequence[Any]
"""How a finite group acts: a field type, or the matrices of all elements."""

_GATHERED = 2**22  # entries of all matrices of a batch

_TOLERANCE = 1e-5  # of matrices given in float32, and of their products


class Orbit:
    """Where a finite list of orthogonal matrices moves vectors, by one after the other.

    :param matrices: float64, ``(order, C, C)``.
    :param field_type: how the group acts that the average is invariant under, if escnn knows it.
    """

    event_dim = 1

    def __init__(self, matrices: np.ndarray, field_type: FieldType | None = None) -> None:
        self.matrices = matrices
        self.field_type = field_type
        self._constants = Constants(matrices=matrices)

    @classmethod
    def of_elements(cls, field_type: FieldType, elements: Iterable[GroupElement]) -> Orbit:
        """By some elements of a field type's group, without a base space."""
        return cls(np.stack([channel_matrix(field_type, g) for g in elements]), field_type)

    @property
    def size(self) -> int:
        """Number of channels."""
        return int(self.matrices.shape[-1])

    def __len__(self) -> int:
        return len(self.matrices)

    def turn(self, x: Tensor, which: Tensor, inverse: bool = False) -> Tensor:
        """Every event of a batch, moved by an element of its own or back.

        :param x: shape ``(*batch, *event)``.
        :param which: the elements' numbers, of a shape that broadcasts with the batch.
        """
        batch = torch.broadcast_shapes(which.shape, x.shape[: x.dim() - self.event_dim])
        x, which = x.expand(*batch, *x.shape[x.dim() - self.event_dim :]), which.expand(batch)
        if self._gathers(x):
            matrices = self._constants.like(x)["matrices"][which]
            return ((matrices.mT if inverse else matrices) @ x.unsqueeze(-1)).squeeze(-1)
        turned = x.clone()
        for index in which.unique().tolist():
            mask = which == index
            turned[mask] = self._image(index, x[mask], inverse)
        return turned

    def _gathers(self, x: Tensor) -> bool:
        """Whether a matrix per event is looked up: where it is little memory, or values may not be looked at."""
        return x.numel() * self.size < _GATHERED or is_traced(x)

    def _image(self, index: int, x: Tensor, inverse: bool) -> Tensor:
        matrix = self._constants.like(x)["matrices"][index]
        return x @ (matrix if inverse else matrix.mT)

    def preimages(self, x: Tensor) -> Tensor:
        """What every element would move to these events, ``(order, *batch, *event)``."""
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        return (rows @ self._constants.like(x)["matrices"]).view(len(self), *x.shape)

    def __mul__(self, other: Orbit) -> Orbit:
        """All products, each once: the average over both one after the other."""
        products = np.einsum("aij,bjk->abik", self.matrices, other.matrices).reshape(-1, self.size, self.size)
        return Orbit(products[_distinct(products)])


class GridOrbit(Orbit):
    """Where the elements of a finite group move events on a grid, which they permute."""

    def __init__(self, field_type: FieldType) -> None:
        super().__init__(np.eye(field_type.size)[None], field_type)
        self.event_dim = event_dim(field_type)
        self._elements = list(field_type.fibergroup.elements)
        self._acting = field_type

    def __len__(self) -> int:
        return len(self._elements)

    def _gathers(self, x: Tensor) -> bool:
        return False

    def _image(self, index: int, x: Tensor, inverse: bool) -> Tensor:
        element = self._elements[index]
        return act(self._acting, ~element if inverse else element, x)

    def preimages(self, x: Tensor) -> Tensor:
        """What every element would move to these events, ``(order, *batch, *event)``."""
        return torch.stack([act(self._acting, ~g, x) for g in self._elements])


class Turn(Transform):
    """Moves events by elements of an orbit: what a draw of the unaveraged density goes through.

    :param which: the elements' numbers, one per event.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, orbit: Orbit, which: Tensor) -> None:
        super().__init__(cache_size=1)
        self.orbit, self.which = orbit, which

    def _call(self, x: Tensor) -> Tensor:
        return self.orbit.turn(x, self.which)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.orbit.turn(y, self.which, inverse=True)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero: the elements act orthogonally."""
        return y.new_zeros(y.shape[:-1])

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of turned events."""
        return torch.Size((*torch.broadcast_shapes(torch.Size(shape[:-1]), self.which.shape), shape[-1]))

    inverse_shape = forward_shape


def orbit_of(action: Action, name: str = "action") -> Orbit:
    """The orbit of a finite group.

    :param action: a field type of a finite group, or the matrices of all its elements.
    :raises TypeError: neither.
    :raises ValueError: an infinite group, elements that do not permute the grid, matrices that are no group.
    """
    if not isinstance(action, FieldType):
        matrices = check_orthogonal(action, name)
        _check_closed(matrices, name)
        return Orbit(matrices)
    validate_field_type(action, name)
    check_finite_group(action, name)
    group = action.fibergroup
    if event_dim(action) == 1:
        return Orbit.of_elements(action, group.elements)
    outside = sum(not on_grid(action, g) for g in group.elements)
    if outside:
        raise ValueError(
            f"{name}: expected a group that permutes the grid, found {group} with {outside} elements that do "
            "not; take the subgroup of quarter turns and flips"
        )
    return GridOrbit(action)


def check_finite_group(field_type: FieldType, name: str) -> None:
    """Raises where nothing can be summed over.

    :raises ValueError: an infinite group.
    """
    group = field_type.fibergroup
    if group.order() < 1:
        raise ValueError(f"{name}: expected a finite group to average over, found {group}; take a finite subgroup")


def check_orthogonal(matrices: Any, name: str) -> np.ndarray:
    """A list of orthogonal matrices in float64, the nearest to those given, ``(number, C, C)``."""
    expected = f"{name}: expected a field type, or orthogonal matrices of shape (order, C, C)"
    try:
        rows = [m.detach().cpu().numpy() if isinstance(m, Tensor) else m for m in matrices]
        if any(np.iscomplexobj(row) for row in rows):
            raise TypeError("complex entries")
        given = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError) as cause:
        raise TypeError(f"{expected}, found {found(matrices)}") from cause
    if given.ndim != 3 or given.shape[1] != given.shape[2] or not given.size:
        raise ValueError(f"{expected}, found shape {given.shape}")
    error = np.abs(given @ given.mT - np.eye(given.shape[-1])).max((1, 2))
    if not (error < _TOLERANCE).all():
        raise ValueError(f"{expected}, found one of M M^T - 1 up to {error.max():.2g}: matrix {int(error.argmax())}")
    # Float32 matrices keep a density to 1e-7 only: the nearest orthogonal ones do exactly.
    left, _, right = np.linalg.svd(given)
    return left @ right


def _distinct(matrices: np.ndarray) -> list[int]:
    """Indices of the matrices that no earlier one equals."""
    # Three numbers tell a matrix from every other, with probability one.
    left, right = _probe(matrices, 3), _probe(matrices, 1)
    pairs = cKDTree(matrices @ right[0] @ left.T).query_pairs(_TOLERANCE, output_type="ndarray")
    return sorted(set(range(len(matrices))) - set(pairs.max(1, initial=-1).tolist()))


def _probe(matrices: np.ndarray, number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((number, matrices.shape[-1]))


def _check_closed(matrices: np.ndarray, name: str) -> None:
    """Raises unless products of matrices are among them, each as often."""
    left, right = _probe(matrices, 2)
    products = np.sort((left @ matrices) @ (matrices @ right).T)  # a number for each product, the rows sorted
    if not np.allclose(products, np.sort(matrices @ right @ left), atol=_TOLERANCE * np.linalg.norm(left)):
        raise ValueError(
            f"{name}: expected the matrices of all elements of a group, found {len(matrices)} with products that are "
            "not among them; matrix_group(matrices) gives the group they generate"
        )


def matrix_group(generators: Tensor | np.ndarray | Sequence[Any], *, max_order: int = 5040) -> Tensor:
    r"""All products of some orthogonal matrices: the finite group that they generate.

    For groups that escnn does not know, such as the permutations of more than four labels, alone or with signs.

    Example::

        >>> import torch
        >>> from pyro_equiflow import matrix_group
        >>> swap, cycle = torch.eye(5)[[1, 0, 2, 3, 4]], torch.eye(5)[[1, 2, 3, 4, 0]]
        >>> matrix_group([swap, cycle]).shape
        torch.Size([120, 5, 5])

    :param generators: orthogonal matrices, ``(number, C, C)``.
    :param max_order: the largest group to build; from there on the group is taken for infinite.
    :return: float64, ``(order, C, C)``, the identity first.
    :raises TypeError: no matrices.
    :raises ValueError: matrices that are not orthogonal, or that generate more than ``max_order``.
    """
    max_order = check_integer("max_order", max_order, 1)
    steps = check_orthogonal(generators, "generators")
    found = fresh = np.eye(steps.shape[-1])[None]
    while len(fresh):
        products = np.einsum("aij,bjk->abik", fresh, steps).reshape(-1, *steps.shape[1:])
        both = np.concatenate([found, products])
        fresh = both[[index for index in _distinct(both) if index >= len(found)]]
        found = np.concatenate([found, fresh])
        if len(found) > max_order:
            raise ValueError(
                f"generators: expected a group of at most max_order={max_order} elements, found more; raise it, or "
                "take matrices that generate a finite group"
            )
    return torch.from_numpy(found)
