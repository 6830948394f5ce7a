# SPDX-License-Identifier: Apache-2.0
"""Representation theory of field types, as arrays: probes, intertwiners, irreps, invariants.

Everything here is float64 numpy and is computed once per representation; layers and transforms turn it
into tensors of their own dtype and device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from escnn.group import IrreducibleRepresentation, Representation
from escnn.gspaces import GSpace
from escnn.nn import FieldType

from pyro_equiflow._escnn.elements import probe_elements

__all__ = [
    "IrrepBlock",
    "IrrepDecomposition",
    "intertwiner_basis",
    "invariant_basis",
    "irreps_of",
    "is_permutation",
    "probe_elements",
    "validate_field_type",
    "validate_over",
]

_TOLERANCE = 1e-9


@functools.lru_cache(maxsize=4096)
def is_permutation(representation: Representation) -> bool:
    """Whether the representation permutes its channels, so that pointwise maps commute with it."""
    for element in probe_elements(representation.group):
        matrix = np.asarray(representation(element))
        if np.abs(matrix - np.round(matrix)).max() > _TOLERANCE:
            return False
        matrix = np.round(matrix)
        if (matrix < 0).any() or not ((matrix.sum(0) == 1).all() and (matrix.sum(1) == 1).all()):
            return False
    return True


@functools.lru_cache(maxsize=4096)
def _orthogonality_error(representation: Representation) -> float:
    basis = np.asarray(representation.change_of_basis)
    error = np.abs(basis @ basis.T - np.eye(len(basis))).max()
    for element in probe_elements(representation.group):
        matrix = np.asarray(representation(element))
        error = max(error, np.abs(matrix @ matrix.T - np.eye(len(matrix))).max())
    return float(error)


def validate_field_type(field_type: FieldType, argument: str = "field_type") -> None:
    """Raises unless ``field_type`` is an escnn field type whose representations are all orthogonal.

    :raises TypeError: not a field type.
    :raises ValueError: a representation is not orthogonal. Lipschitz bounds and invariant normals rest on
        orthogonality: an equivalent orthogonal representation always exists (compact groups).
    """
    if not isinstance(field_type, FieldType):
        raise TypeError(
            f"{argument}: expected an escnn.nn.FieldType, found {type(field_type).__name__}; build one with "
            "escnn.nn.FieldType(gspace, [representation, ...])"
        )
    for representation in set(field_type.representations):
        error = _orthogonality_error(representation)
        if error > 1e-6:
            raise ValueError(
                f"{argument}: expected orthogonal representations, found {representation} whose matrices "
                f"differ from orthogonal ones by {error:.1e}; use an orthogonal change of basis"
            )


def validate_over(gspace: GSpace, field_type: FieldType, argument: str) -> None:
    """Raises unless ``field_type`` is one of :func:`validate_field_type`'s, over ``gspace``.

    :raises TypeError: not a field type.
    :raises ValueError: over another gspace, or not orthogonal.
    """
    validate_field_type(field_type, argument)
    if field_type.gspace != gspace:
        raise ValueError(f"{argument}: expected a type over {gspace}, found one over {field_type.gspace}")


@functools.lru_cache(maxsize=4096)
def irreps_of(representation: Representation) -> tuple[tuple[IrreducibleRepresentation, int], ...]:
    """The irreps of a representation with the first column of each in its change of basis."""
    blocks, start = [], 0
    for irrep_id in representation.irreps:
        irrep = representation.group.irrep(*irrep_id)
        blocks.append((irrep, start))
        start += irrep.size
    return tuple(blocks)


@functools.lru_cache(maxsize=4096)
def intertwiner_basis(in_rep: Representation, out_rep: Representation) -> np.ndarray:
    r"""A basis of the intertwiners between two representations.

    By Schur's lemma they are :math:`Q_\mathrm{out} (a \otimes E) Q_\mathrm{in}^T` over pairs of equal
    irreps, with :math:`E` in the irrep's endomorphism algebra (real: 1, complex: 2, quaternionic: 4). Two
    permutation representations have the sparser basis of orbit indicators on pairs of channels.

    :return: shape ``(number, out_rep.size, in_rep.size)``, float64, of Frobenius norm the root of ``out_rep.size``:
        between equal irreps, and between regular representations, all entries are then 0 and 1 (or -1).
    """
    if is_permutation(in_rep) and is_permutation(out_rep) and in_rep.group.order() > 0:
        basis = _orbit_indicators(in_rep, out_rep)
    else:
        q_in, q_out = np.asarray(in_rep.change_of_basis), np.asarray(out_rep.change_of_basis)
        elements = []
        for out_irrep, o in irreps_of(out_rep):
            for in_irrep, i in irreps_of(in_rep):
                if out_irrep.id == in_irrep.id:
                    columns_out = q_out[:, o : o + out_irrep.size]
                    columns_in = q_in[:, i : i + in_irrep.size]
                    for endomorphism in np.asarray(out_irrep.endomorphism_basis()):
                        elements.append(columns_out @ endomorphism @ columns_in.T)
        basis = np.array(elements).reshape(-1, out_rep.size, in_rep.size)
    norms = np.linalg.norm(basis, axis=(1, 2), keepdims=True)
    basis = basis * (np.sqrt(out_rep.size) / np.where(norms > 0, norms, 1.0))
    basis.setflags(write=False)
    return basis


def _orbit_indicators(in_rep: Representation, out_rep: Representation) -> np.ndarray:
    size_in, size_out = in_rep.size, out_rep.size
    label = np.arange(size_out * size_in).reshape(size_out, size_in)
    images = [(np.argmax(out_rep(g), axis=0), np.argmax(in_rep(g), axis=0)) for g in probe_elements(in_rep.group)]
    # Union of orbits under the generators: labels fall to the least of their orbit until none changes.
    while True:
        before = label.copy()
        for to_out, to_in in images:
            moved = label[np.ix_(to_out, to_in)]
            label = np.minimum(label, moved)
            label[np.ix_(to_out, to_in)] = np.minimum(label[np.ix_(to_out, to_in)], label)
        if (label == before).all():
            break
    return np.array([(label == orbit).astype(float) for orbit in np.unique(label)])


@functools.lru_cache(maxsize=4096)
def invariant_basis(representation: Representation) -> np.ndarray:
    """Orthonormal columns that span the invariant vectors: shape ``(size, number of trivial irreps)``."""
    q = np.asarray(representation.change_of_basis)
    columns = [q[:, i] for irrep, i in irreps_of(representation) if irrep.is_trivial()]
    return np.array(columns).reshape(-1, representation.size).T


@dataclass(frozen=True)
class IrrepBlock:
    """One irrep inside a field type: its columns are ``start`` to ``start + irrep.size``."""

    irrep: IrreducibleRepresentation
    start: int
    field: int

    @property
    def size(self) -> int:
        return int(self.irrep.size)


class IrrepDecomposition:
    r"""A field type in the basis of its irreps: :math:`x = Q z`, :math:`z` a stack of irreps.

    :ivar change_of_basis: :math:`Q`, orthogonal, shape ``(size, size)``, float64.
    :ivar blocks: the irreps in the order of :math:`z`.
    :ivar sizes: their dimensions.
    :ivar is_identity: whether :math:`Q` is the identity.
    """

    def __init__(self, field_type: FieldType) -> None:
        self.field_type = field_type
        self.change_of_basis = np.zeros((field_type.size, field_type.size))
        blocks: list[IrrepBlock] = []
        start = 0
        for index, rep in enumerate(field_type.representations):
            stop = start + rep.size
            self.change_of_basis[start:stop, start:stop] = rep.change_of_basis
            blocks += [IrrepBlock(irrep, start + offset, index) for irrep, offset in irreps_of(rep)]
            start = stop
        self.blocks: Sequence[IrrepBlock] = tuple(blocks)
        self.sizes = np.array([block.size for block in blocks])
        self.is_identity = bool(np.abs(self.change_of_basis - np.eye(start)).max() < _TOLERANCE)

    @property
    def trivial(self) -> list[int]:
        """Columns of ``change_of_basis`` that are invariant vectors."""
        return [block.start for block in self.blocks if block.irrep.is_trivial()]

    def isotypic(self) -> list[tuple[IrreducibleRepresentation, list[IrrepBlock]]]:
        """The blocks gathered by irrep, in order of first appearance."""
        gathered: dict[tuple, tuple[IrreducibleRepresentation, list[IrrepBlock]]] = {}
        for block in self.blocks:
            gathered.setdefault(block.irrep.id, (block.irrep, []))[1].append(block)
        return list(gathered.values())
