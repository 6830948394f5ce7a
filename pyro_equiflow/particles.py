# SPDX-License-Identifier: Apache-2.0
"""Systems of particles whose centre of mass is at the origin: positions, coordinates, field types."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from escnn import group as egroup
from escnn import gspaces
from escnn.group import Group, GroupElement, IrreducibleRepresentation, Representation
from escnn.nn import FieldType
from torch import Tensor

from pyro_equiflow._escnn.bases import compute_irrep_embeddings_general
from pyro_equiflow.ops.arguments import check_flag, check_instance, check_integer

__all__ = ["particle_permutation", "particle_type"]


def helmert(num_particles: int) -> np.ndarray:
    """Orthonormal columns that span the vectors of mean 0, ``(N, N - 1)``."""
    basis = np.triu(np.ones((num_particles, num_particles - 1)))
    below = np.arange(1, num_particles)
    basis[below, below - 1] = -below
    return basis / np.sqrt(below * (below + 1))


def particle_type(num_particles: int, vector: Representation, *, permutations: bool = False) -> FieldType:
    r"""How rotations, and permutations if asked for, act on the coordinates of :class:`MeanFreePositions`.

    Without permutations :math:`N - 1` fields ``vector`` of its own group. With them the group is the direct product of
    :math:`S_N` and that group, and the coordinates are one field, :math:`\sigma(\pi) \otimes \rho(g)`, with
    :math:`\sigma(\pi) = B^T P_\pi B` the standard representation of :math:`S_N` in the coordinates' basis.

    Of an irreducible ``vector`` that field is irreducible as well, so couplings and IAF have nothing to split. Residual
    and implicit transforms take it; under a finite group their default networks are general, under a continuous one
    they see the length of the whole field only and their maps are radial. Identical particles under continuous
    rotations are the better served by a flow without permutations, averaged over these:
    :class:`~pyro_equiflow.OrbitMixture` with the type that the trivial group's ``vector`` gives.

    escnn has no symmetric groups. Up to four particles they are groups that it has: :math:`S_2 = C_2`,
    :math:`S_3 = D_3`, :math:`S_4 = O`, the rotations of the cube, which permute its diagonals. From five on there is
    none.

    Example::

        >>> from escnn import group
        >>> from pyro_equiflow import particle_type
        >>> vector = group.o2_group().irrep(1, 1)
        >>> particle_type(7, vector).size, particle_type(3, vector, permutations=True).fibergroup
        (12, D3 X O(2))

    :param num_particles: :math:`N`, two at least.
    :param vector: how rotations act on one particle's position in :math:`R^d`.
    :param permutations: whether the particles are identical.
    :return: a field type of size :math:`(N - 1) d` over no base space.
    :raises ValueError: fewer than two particles, or permutations of more than four.
    :raises TypeError: ``vector`` is not a representation of escnn.
    """
    num_particles = check_integer("num_particles", num_particles, 2)
    expected = "an escnn representation such as group.o2_group().irrep(1, 1)"
    check_instance("vector", vector, Representation, expected)
    if not check_flag("permutations", permutations):
        return FieldType(gspaces.no_base_space(vector.group), (num_particles - 1) * [vector])
    standard = _standard(num_particles)
    product = egroup.direct_product(standard.group, vector.group)
    return FieldType(gspaces.no_base_space(product), [_tensor_product(product, standard, vector)])


def particle_permutation(num_particles: int, element: GroupElement) -> Tensor:
    """Which permutation an element of the group of :func:`particle_type` is: particle ``i`` goes to place ``p[i]``.

    Example::

        >>> from escnn import group
        >>> from pyro_equiflow import particle_permutation, particle_type
        >>> kind = particle_type(2, group.o2_group().irrep(1, 1), permutations=True)
        >>> particle_permutation(2, kind.fibergroup.inclusion1(group.cyclic_group(2).generators[0]))
        tensor([1, 0])

    :param num_particles: two to four.
    :param element: of the direct product, or of its first factor.
    :return: shape ``(num_particles,)``.
    :raises ValueError: an element of another group, or more than four particles.
    """
    standard = _standard(num_particles)
    check_instance("element", element, GroupElement, "an element of an escnn group")
    first = getattr(element.group, "G1", element.group)
    if first != standard.group:
        raise ValueError(f"element: expected one of {standard.group} or of its direct products, found {element.group}")
    if element.group != first:
        element = element.group.split_element(element)[0]
    basis = helmert(num_particles)
    return torch.as_tensor((basis @ standard(element) @ basis.T).argmax(0))


def _symmetric_group(num_particles: int) -> IrreducibleRepresentation:
    """The irrep by which :math:`S_N` acts on a regular simplex."""
    remedy = "escnn has no symmetric group of more letters; leave permutations out"
    check_integer("num_particles", num_particles, 2, 4, remedy=remedy)
    if num_particles == 2:
        return egroup.cyclic_group(2).irrep(1)
    if num_particles == 3:
        return egroup.dihedral_group(3).irrep(1, 1)
    # Of the irreps of size 3 the one that is not the cube's own: half turns that swap two diagonals have trace 1.
    return egroup.octa_group().irrep(-1)


def _standard(num_particles: int) -> Representation:
    r""":math:`B^T P_\pi B` as a representation of escnn."""
    irrep = _symmetric_group(num_particles)
    simplex = _simplex(irrep, num_particles)
    # B z and V z are positions in two bases of one subspace.
    change = helmert(num_particles).T @ simplex
    return Representation(irrep.group, f"permutations of {num_particles}", [irrep.id], change, [])


def _simplex(irrep: IrreducibleRepresentation, num_particles: int) -> np.ndarray:
    """Corners of a regular simplex that the irrep permutes, as rows; columns orthonormal."""
    for element in irrep.group.elements:
        powers = [irrep(element)]
        while len(powers) < num_particles - 1:
            powers.append(powers[-1] @ powers[0])
        fixed = np.mean(powers, 0)
        # A cycle of all letters but one fixes that corner, and no other direction.
        if np.allclose(powers[-1], np.eye(irrep.size)) and np.isclose(np.trace(fixed), 1):
            corner = fixed[:, np.abs(fixed).sum(0).argmax()]
            corner = corner / np.linalg.norm(corner)
            break
    corners: list[np.ndarray] = []
    for element in irrep.group.elements:
        image = irrep(element) @ corner
        if not any(np.allclose(image, other) for other in corners):
            corners.append(image)
    return np.array(corners) * np.sqrt((num_particles - 1) / num_particles)


def _tensor_product(product: Group, first: Representation, second: Representation) -> Representation:
    """The outer tensor product, with channels of ``second`` innermost; ``first`` is one irrep in some basis."""
    irreps: list[Any] = []
    blocks, start = [], 0
    (first_irrep,) = (first.group.irrep(*irrep_id) for irrep_id in first.irreps)
    for irrep_id in second.irreps:
        irrep = second.group.irrep(*irrep_id)
        joint = product.irrep(first_irrep.id, irrep_id)

        def factors(element: GroupElement, irrep: Representation = irrep) -> np.ndarray:
            one, two = product.split_element(element)
            return np.kron(first_irrep(one), irrep(two))

        # escnn may have the product in another basis. Between real irreps an embedding is orthogonal (Schur).
        embedding = compute_irrep_embeddings_general(factors, joint)[:, :, 0]
        columns = second.change_of_basis[:, start : start + irrep.size]
        blocks.append(np.kron(first.change_of_basis, columns) @ embedding)
        irreps.append(joint.id)
        start += irrep.size
    return Representation(product, f"{first.name} x {second.name}", irreps, np.concatenate(blocks, 1), [])
