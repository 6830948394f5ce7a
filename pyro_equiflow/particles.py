# SPDX-License-Identifier: Apache-2.0
"""Systems of particles whose centre of mass is at the origin: positions, coordinates, field types."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from escnn import group as egroup
from escnn import gspaces
from escnn.group import Group, GroupElement, Representation
from escnn.nn import FieldType
from torch import Tensor

from pyro_equiflow._escnn.bases import compute_irrep_embeddings_general
from pyro_equiflow.ops.arguments import check_flag, check_instance, check_integer
from pyro_equiflow.ops.named_groups import helmert, named_vector, simplex_representation

__all__ = ["particle_permutation", "particle_type"]


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
