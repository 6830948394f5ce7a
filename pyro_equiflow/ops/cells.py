# SPDX-License-Identifier: Apache-2.0
r"""The field type of an event whose 2x2 (2x2x2) cells of grid points became channels, as arrays.

An element that permutes the grid carries cells to cells and permutes the sites inside them, by a permutation
representation :math:`\pi`. A field of representation :math:`\rho` so becomes one of :math:`\pi \otimes \rho`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from escnn.group import Representation
from escnn.group.representation import build_from_discrete_group_representation
from escnn.nn import FieldType

from pyro_equiflow.ops.events import on_grid, signed_permutation
from pyro_equiflow.ops.representations import is_permutation, validate_field_type

__all__ = ["check_cells", "squeezed_type"]


def squeezed_type(field_type: FieldType, haar: bool) -> tuple[FieldType, np.ndarray]:
    r"""The field type after a squeeze, and the basis it is written in.

    :param field_type: that of the event, over a grid that the whole group permutes.
    :param haar: whether sites are given by their Haar coefficients.
    :return: the type, and the orthogonal matrix ``(C 2^d, C 2^d)`` to its channels from natural ones, ``c 2^d + site``
        with sites in the order of the array.
    :raises ValueError: no base space, or elements of the group that do not permute the grid.
    """
    check_cells(field_type)
    sites = _site_matrices(field_type)
    fields, rows = zip(*(_haar_fields(field_type, sites) if haar else _site_fields(field_type, sites)))
    return FieldType(field_type.gspace, fields), np.concatenate(rows)


def check_cells(field_type: FieldType) -> None:
    """Raises unless the type's group permutes the cells of its grid, and the sites inside them.

    :raises TypeError: not a field type.
    :raises ValueError: no base space, or elements of the group that do not permute the grid.
    """
    validate_field_type(field_type)
    if field_type.gspace.dimensionality == 0:
        raise ValueError(
            f"field_type: expected a type over a 2-D or 3-D grid, found {field_type}, which has no base space; take "
            "one of escnn.gspaces on R^2 or R^3, such as gspaces.rot2dOnR2(4)"
        )
    group = field_type.fibergroup
    outside = [g for g in group.elements if not on_grid(field_type, g)] if group.order() > 0 else None
    if outside or outside is None:
        count = "infinitely many" if outside is None else len(outside)
        raise ValueError(
            "field_type: expected a group of quarter turns and flips, which permute the sites of a cell, found "
            f"{group} with {count} elements that do not: under them the channels of a cell have no representation. "
            "Take a subgroup, such as C_4 (gspaces.rot2dOnR2(4)) or D_4 (gspaces.flipRot2dOnR2(4)), or no squeeze"
        )


def _site_matrices(field_type: FieldType) -> np.ndarray:
    """The permutation of a cell's sites by every element: shape ``(|G|, 2^d, 2^d)``."""
    sites = list(itertools.product((0, 1), repeat=int(field_type.gspace.dimensionality)))
    matrices = []
    for g in field_type.fibergroup.elements:
        axes, signs = signed_permutation(field_type, g)
        matrix = np.zeros((len(sites), len(sites)))
        for row, site in enumerate(sites):
            source = dict(zip(axes, (p if sign > 0 else 1 - p for p, sign in zip(site, signs))))
            matrix[row, sites.index(tuple(source[a] for a in range(len(axes))))] = 1.0
        matrices.append(matrix)
    return np.array(matrices)


def _matrices(representation: Representation) -> np.ndarray:
    return np.array([np.asarray(representation(g)) for g in representation.group.elements])


def _kron(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kronecker products of all elements' matrices."""
    size = a.shape[1] * b.shape[1]
    return np.einsum("gij,gkl->gikjl", a, b).reshape(-1, size, size)


def _build(field_type: FieldType, name: str, matrices: np.ndarray, *, pointwise: bool = False) -> Representation:
    group = field_type.fibergroup
    kinds = {"norm", "gated", "concatenated"} | ({"pointwise"} if pointwise else set())
    return build_from_discrete_group_representation(dict(zip(group.elements, matrices)), name, group, kinds)


Fields = list[tuple[Representation, np.ndarray]]
"""Fields, each with its rows of the matrix from natural channels."""


def _each_field(field_type: FieldType, num_sites: int, local: Callable[[Representation], Fields]) -> Fields:
    """What every field becomes, from those of its representation alone: rows over ``rho.size num_sites``."""
    found: dict[Representation, Fields] = {}
    fields, start = [], 0
    for rho in field_type.representations:
        if rho not in found:
            found[rho] = local(rho)
        for field, rows in found[rho]:
            placed = np.zeros((len(rows), field_type.size * num_sites))
            placed[:, start : start + rows.shape[1]] = rows
            fields.append((field, placed))
        start += rho.size * num_sites
    return fields


def _site_fields(field_type: FieldType, sites: np.ndarray) -> Fields:
    """Channels are sites of fields. Of fields that permute their channels each orbit is one field."""
    num_sites = sites.shape[1]
    site_orbits = _orbits(field_type, sites)

    def local(rho: Representation) -> Fields:
        identity = np.eye(rho.size * num_sites)
        if is_permutation(rho):
            return [(field, identity[order]) for field, order in _orbits(field_type, _kron(_matrices(rho), sites))]
        fields = []
        for orbit, order in site_orbits:
            if orbit.is_trivial():
                field = rho
            else:
                field = _build(field_type, f"{orbit.name} x {rho.name}", _kron(_matrices(orbit), _matrices(rho)))
            fields.append((field, identity[(order[:, None] + num_sites * np.arange(rho.size)).ravel()]))
        return fields

    return _each_field(field_type, num_sites, local)


def _orbits(field_type: FieldType, matrices: np.ndarray) -> Fields:
    """The orbits of a permutation representation as fields, and the points of each in the order of its channels."""
    images = np.round(matrices).argmax(1)  # [g, point]
    stabilizers = [tuple(np.flatnonzero(column == point)) for point, column in enumerate(images.T)]
    left, orbits = set(range(images.shape[1])), []
    known: dict[tuple[int, ...], Representation] = {}
    while left:
        orbit = np.unique(images[:, min(left)])
        left -= set(orbit.tolist())
        # Points in the order of the elements that reach them from the base: as escnn orders regular fields. The
        # least stabilizer as base makes equal fields of isomorphic orbits.
        base = min(orbit.tolist(), key=lambda point: (stabilizers[point], point))
        reached, first = np.unique(images[:, base], return_index=True)
        order = reached[np.argsort(first)]
        stabilizer = stabilizers[base]
        if stabilizer not in known:
            known[stabilizer] = _cosets(field_type, stabilizer, matrices[:, order][:, :, order])
        orbits.append((known[stabilizer], order))
    return orbits


def _cosets(field_type: FieldType, stabilizer: tuple[int, ...], matrices: np.ndarray) -> Representation:
    """The permutation of the cosets of a subgroup, given by its elements' numbers."""
    group = field_type.fibergroup
    if len(stabilizer) == group.order():
        return group.trivial_representation
    if len(stabilizer) == 1:
        return group.regular_representation
    return _build(field_type, f"cosets{list(map(int, stabilizer))}", np.round(matrices), pointwise=True)


def _haar_fields(field_type: FieldType, sites: np.ndarray) -> Fields:
    """Averages over cells keep their fields, differences are irreps; averages of all fields come first."""
    num_sites = sites.shape[1]
    frequencies = list(itertools.product((0, 1), repeat=int(field_type.gspace.dimensionality)))
    haar = np.array([[(-1.0) ** np.dot(k, s) for s in frequencies] for k in frequencies]) / np.sqrt(num_sites)
    # Signed permutations: flips change signs of the coefficients, turns exchange axes.
    signed = np.round(haar @ sites @ haar.T)
    left, fields = sorted(range(num_sites), key=lambda k: (sum(frequencies[k]), k)), []
    while left:
        chosen = np.flatnonzero(signed[:, :, left[0]].any(0))
        left = [k for k in left if k not in chosen]
        block = signed[:, chosen][:, :, chosen]
        invariant = len(chosen) == 1 and bool((block == 1).all())
        name = "haar" + "".join(map(str, chosen))

        def local(
            rho: Representation,
            block: np.ndarray = block,
            rows: np.ndarray = haar[chosen],
            invariant: bool = invariant,
            name: str = name,
        ) -> Fields:
            # Row (k, a) of a block holds coefficient k of channel a.
            coefficients = np.einsum("ks,ab->kabs", rows, np.eye(rho.size)).reshape(-1, rho.size * num_sites)
            if invariant:
                return [(rho, coefficients)]
            found = _build(field_type, f"{name} x {rho.name}", _kron(block, _matrices(rho)))
            in_irreps = np.asarray(found.change_of_basis).T @ coefficients
            irreps = [field_type.fibergroup.irrep(*irrep) for irrep in found.irreps]
            starts = np.cumsum([0, *(irrep.size for irrep in irreps)])
            return [(irrep, in_irreps[a:b]) for irrep, a, b in zip(irreps, starts, starts[1:])]

        fields += _each_field(field_type, num_sites, local)
    return fields
