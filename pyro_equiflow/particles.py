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

from pyro_equiflow.ops.arguments import check_flag, check_instance, check_integer
from pyro_equiflow.ops.named_groups import helmert, named_vector, simplex_representation
from pyro_equiflow.ops.representations import probe_elements

__all__ = ["particle_permutation", "particle_type"]

_TOLERANCE = 1e-6


def particle_type(num_particles: int, vector: Representation | str, *, permutations: bool = False) -> FieldType:
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

        >>> from pyro_equiflow import particle_type
        >>> particle_type(7, "O(2)").size, particle_type(3, "O(2)", permutations=True).fibergroup
        (12, D3 X O(2))

    :param num_particles: :math:`N`, two at least.
    :param vector: how rotations act on one particle's position in :math:`R^d`: a representation, or one of the groups
        by name of :func:`~pyro_equiflow.field_type`, with coordinates in the order x, y, z.
    :param permutations: whether the particles are identical.
    :return: a field type of size :math:`(N - 1) d` over no base space.
    :raises ValueError: fewer than two particles, permutations of more than four, or an unknown name.
    :raises TypeError: ``vector`` is neither a representation of escnn nor a name.
    """
    num_particles = check_integer("num_particles", num_particles, 2)
    if isinstance(vector, str):
        vector = named_vector(vector, "vector")
    expected = 'an escnn representation such as group.o2_group().irrep(1, 1), or a group by name such as "O(2)"'
    check_instance("vector", vector, Representation, expected)
    if not check_flag("permutations", permutations):
        return FieldType(gspaces.no_base_space(vector.group), (num_particles - 1) * [vector])
    simplex = simplex_representation(num_particles)
    product = egroup.direct_product(simplex.group, vector.group)
    return FieldType(gspaces.no_base_space(product), [_tensor_product(product, simplex, vector)])


def particle_permutation(num_particles: int, element: GroupElement) -> Tensor:
    """Which permutation an element of the group of :func:`particle_type` is: particle ``i`` goes to place ``p[i]``.

    Example::

        >>> from escnn import group
        >>> from pyro_equiflow import particle_permutation, particle_type
        >>> kind = particle_type(2, "O(2)", permutations=True)
        >>> particle_permutation(2, kind.fibergroup.inclusion1(group.cyclic_group(2).generators[0]))
        tensor([1, 0])

    :param num_particles: two to four.
    :param element: of the direct product, or of its first factor.
    :return: shape ``(num_particles,)``.
    :raises ValueError: an element of another group, or more than four particles.
    """
    simplex = simplex_representation(num_particles)
    check_instance("element", element, GroupElement, "an element of an escnn group")
    first = getattr(element.group, "G1", element.group)
    if first != simplex.group:
        raise ValueError(f"element: expected one of {simplex.group} or of its direct products, found {element.group}")
    if element.group != first:
        element = element.group.split_element(element)[0]
    basis = helmert(num_particles)
    return torch.as_tensor((basis @ simplex(element) @ basis.T).argmax(0))


def _tensor_product(product: Group, first: Representation, second: Representation) -> Representation:
    """The outer tensor product, with channels of ``second`` innermost; ``first`` is one irrep in some basis."""
    irreps: list[Any] = []
    blocks, start = [], 0
    (first_id,) = first.irreps
    for irrep_id in second.irreps:
        irrep = second.group.irrep(*irrep_id)
        joint = product.irrep(first_id, irrep_id)
        columns = second.change_of_basis[:, start : start + irrep.size]
        blocks.append(
            np.kron(first.change_of_basis, columns) @ _intertwiner(joint, first.group.irrep(*first_id), irrep)
        )
        irreps.append(joint.id)
        start += irrep.size
    return Representation(product, f"{first.name} x {second.name}", irreps, np.concatenate(blocks, 1), [])


def _intertwiner(
    joint: IrreducibleRepresentation, first: IrreducibleRepresentation, second: IrreducibleRepresentation
) -> np.ndarray:
    r"""Orthogonal :math:`Q` with :math:`\rho_1 \otimes \rho_2 = Q \rho Q^T`: escnn may have another basis."""
    elements = probe_elements(joint.group)
    gram = np.zeros((joint.size**2, joint.size**2))
    identity = np.eye(joint.size)
    for element in elements:
        one, two = joint.group.split_element(element)
        row = np.kron(np.kron(first(one), second(two)), identity) - np.kron(identity, joint(element).T)
        gram += row.T @ row / len(elements)
    values, vectors = np.linalg.eigh(gram)
    kernel = vectors[:, values < _TOLERANCE]
    # Which vectors span the kernel is up to the library; what the identity is projected to is not.
    for start in (identity, *np.eye(joint.size**2).reshape(-1, joint.size, joint.size)):
        q = (kernel @ (kernel.T @ start.reshape(-1))).reshape(joint.size, joint.size)
        norm = np.linalg.norm(q)
        if norm > _TOLERANCE:
            # Between real irreps an intertwiner is an isometry up to its scale (Schur).
            return q * np.sqrt(joint.size) / norm
    raise ValueError(f"expected a representation equivalent to {first} x {second}, found {joint}")
