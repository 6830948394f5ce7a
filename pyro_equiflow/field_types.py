# SPDX-License-Identifier: Apache-2.0
"""Field types by one call: vectors and scalars under a group that has a name."""

from __future__ import annotations

from escnn import gspaces
from escnn.group import Group
from escnn.nn import FieldType

from pyro_equiflow.ops.arguments import check_integer
from pyro_equiflow.ops.named_groups import named_group

__all__ = ["field_type"]


def field_type(
    group: str | Group, *, vectors: int = 0, pseudovectors: int = 0, scalars: int = 0, pseudoscalars: int = 0
) -> FieldType:
    r"""How a group acts on so many vectors and scalars, whose coordinates stand in the order x, y, z.

    An array ``(n, d)`` of ``n`` points of the plane or of space is ``vectors=n``: flattened, it is the first point's
    coordinates, then the second's, and a rotation by the matrix :math:`R` is ``x @ R.T``. Every vector is a field of
    its own, so couplings and IAF split between vectors. Fields come in the order of the keywords.

    ========================================= ================= ===================================================
    name                                      a vector is       the group
    ========================================= ================= ===================================================
    ``"SO(2)"``, ``"O(2)"``                   :math:`(x, y)`    rotations of the plane; and reflections
    ``"C_5"``, ``"D_5"``                      :math:`(x, y)`    those of a polygon of 5 corners, one of them on the
                                                                x axis; any number serves
    ``"SO(3)"``, ``"O(3)"``                   :math:`(x, y, z)` rotations of space; and the inversion :math:`-1`,
                                                                so reflections too
    ``"octahedral"``, ``"full octahedral"``   :math:`(x, y, z)` rotations of a cube; and the inversion
    ``"icosahedral"``, ``"full icosahedral"`` :math:`(x, y, z)` those of an icosahedron; and the inversion
    ``"O(1)"``                                a number          its sign, of all of them at once
    ``"S_2"``, ``"S_3"``, ``"S_4"``           as many numbers   permutations: of mixture components, say
    ``"trivial"``                             none              no symmetry: all are scalars
    ========================================= ================= ===================================================

    *Pseudovectors* (cross products, angular momenta, magnetic fields) turn as vectors do and take the determinant of a
    reflection as a further sign; *pseudoscalars* (triple products, signed areas)
    take that sign alone. A group without reflections does not tell them from vectors and scalars.

    escnn's own representations serve as well, wherever a field type is taken. There ``irrep(1)`` of SO(3) and O(3) has
    the order y, z, x, ``standard_representation()`` has x, y, z.

    Example::

        >>> import torch
        >>> from pyro_equiflow import field_type
        >>> from pyro_equiflow.testing import act
        >>> landmarks = field_type("SO(3)", vectors=4, scalars=1)
        >>> landmarks.size
        13
        >>> turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # a quarter, from x to y
        >>> element = landmarks.fibergroup.element(turn.numpy(), "MAT")
        >>> act(field_type("SO(3)", vectors=1), element, torch.tensor([1.0, 2, 3])).round(decimals=4)
        tensor([-2.,  1.,  3.])

    :param group: a name, or escnn's object for the group.
    :param vectors: how many vectors.
    :param pseudovectors: how many pseudovectors.
    :param scalars: how many invariant numbers.
    :param pseudoscalars: how many numbers that reflections change the sign of.
    :return: a field type over no base space.
    :raises TypeError: an argument of another kind.
    :raises ValueError: an unknown group, no fields at all, or some that the group does not have.
    """
    named = named_group(group)
    representations = {
        "vectors": (named.vector, vectors),
        "pseudovectors": (named.pseudovector, pseudovectors),
        "scalars": (named.group.trivial_representation, scalars),
        "pseudoscalars": (named.pseudoscalar, pseudoscalars),
    }
    fields = []
    for name, (representation, count) in representations.items():
        count = check_integer(name, count, 0)
        if count and representation is None:
            raise ValueError(f"{name}: expected 0 for the group {group!r}, which has none, found {count}; take scalars")
        fields += count * [representation]
    if not fields:
        raise ValueError("vectors: expected a positive number of them, or of another kind of field, found 0")
    return FieldType(gspaces.no_base_space(named.group), fields)
