# SPDX-License-Identifier: Apache-2.0
"""Groups by name, and how each acts on vectors whose coordinates stand in the order x, y, z."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from escnn import group as egroup
from escnn.group import Group, IrreducibleRepresentation, Representation

from pyro_equiflow.ops.arguments import check_instance, check_integer

__all__ = ["TO_XYZ", "NamedGroup", "helmert", "named_group", "named_vector", "simplex_representation", "split_name"]

_KNOWN = (
    '"trivial", "O(1)", "SO(2)", "O(2)", "C_N", "D_N" (of the plane, any N), "SO(3)", "O(3)", "octahedral", '
    '"full octahedral", "icosahedral", "full icosahedral" (of space), "S_2", "S_3", "S_4" (permutations)'
)


class NamedGroup(NamedTuple):
    """A group, and how it acts on the usual quantities; ``None`` where it has no such.

    :ivar group: escnn's.
    :ivar vector: on ``(x, y)`` or ``(x, y, z)``; of permutations on the entries that they permute.
    :ivar pseudovector: as on a vector, times the determinant.
    :ivar pseudoscalar: by the determinant.
    """

    group: Group
    vector: Representation | None = None
    pseudovector: Representation | None = None
    pseudoscalar: Representation | None = None


def split_name(name: str) -> tuple[str, int | None]:
    """The family and the number in a name: ``"SO(3)"`` is ``("SO", 3)``, ``"D5"`` and ``"D_5"`` are ``("D", 5)``.

    A name without a number is its own family, in small letters without blanks, hyphens and underscores.
    """
    parts = re.fullmatch(r"(S?O) ?\(([1-9]\d*)\)|([CDS])_?([1-9]\d*)", name.strip(), re.IGNORECASE)
    if parts is None:
        return re.sub(r"[\s_-]", "", name).lower(), None
    return (parts[1] or parts[3]).upper(), int(parts[2] or parts[4])


def named_group(group: str | Group, argument: str = "group") -> NamedGroup:
    """The group of a name, or one of escnn's that has a name here.

    :raises TypeError: neither a string nor a group.
    :raises ValueError: an unknown one.
    """
    expected = f"one of {_KNOWN}, or escnn's object for it"
    check_instance(argument, group, str | Group, expected)
    family, number = split_name(group if isinstance(group, str) else group.name)
    if family in ("C", "D") and number is not None:
        return _polygon(family, number)
    if (family, number) not in _MAKERS:
        raise ValueError(
            f"{argument}: expected {expected}, found {group!r}; write down any other action as an "
            "escnn.nn.FieldType of representations of its group"
        )
    return _MAKERS[family, number]()


def named_vector(group: str | Group, argument: str = "group") -> Representation:
    """How the group of a name acts on a vector.

    :raises TypeError: neither a string nor a group.
    :raises ValueError: an unknown one, or one without vectors.
    """
    vector = named_group(group, argument).vector
    if vector is None:
        raise ValueError(f'{argument}: expected a group with vectors, found {group!r}; for the plane take "C_1"')
    return vector


# ---- the plane -------------------------------------------------------------------------------------------------

_QUARTER_TURN = np.array([[0.0, -1.0], [1.0, 0.0]])


def _made(group: Group, name: str, irreps: Sequence[tuple], basis: np.ndarray) -> Representation:
    kinds = set.intersection(*(set(group.irrep(*i).supported_nonlinearities) for i in irreps))
    return Representation(group, name, list(irreps), basis, sorted(kinds - {"pointwise"}))


def _plane(group: Group, irreps: Sequence[tuple], determinant: tuple) -> NamedGroup:
    """Reflections mirror at the x axis: the matrices are R(angle) diag(1, -1)^flip."""
    vector = group.irrep(*irreps[0]) if len(irreps) == 1 else _made(group, "vector", irreps, np.eye(2))
    pseudovector, pseudoscalar = vector, group.irrep(*determinant)
    if not pseudoscalar.is_trivial():
        # A quarter turn J commutes with rotations, not with reflections: J g J^-1 = det(g) g.
        pseudovector = _made(group, "pseudovector", irreps, _QUARTER_TURN)
    return NamedGroup(group, vector, pseudovector, pseudoscalar)


@functools.cache
def _polygon(family: str, number: int) -> NamedGroup:
    """Rotations that keep a regular polygon, and with D_N reflections."""
    if family == "C":
        rotating = {1: [(0,), (0,)], 2: [(1,), (1,)]}.get(number, [(1,)])
        return _plane(egroup.cyclic_group(number), rotating, (0,))
    mirrored = {1: [(0, 0), (1, 0)], 2: [(0, 1), (1, 1)]}.get(number, [(1, 1)])
    return _plane(egroup.dihedral_group(number), mirrored, (1, 0))


# ---- space -----------------------------------------------------------------------------------------------------

# escnn's irreps of rotations of space have the coordinates in the order y, z, x.
TO_XYZ = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def _rotations(group: Group) -> NamedGroup:
    """Of space: nothing tells pseudovectors from vectors."""
    vector = _standard(group)
    return NamedGroup(group, vector, vector, group.trivial_representation)


def _standard(group: Group) -> Representation:
    # A method of continuous groups, a property of finite ones.
    found = group.standard_representation
    return found if isinstance(found, Representation) else found()


def _o3() -> NamedGroup:
    """Vectors are odd under the inversion, pseudovectors even."""
    group = egroup.o3_group()
    return NamedGroup(group, _standard(group), _made(group, "pseudovector", [(0, 1)], TO_XYZ), group.irrep(1, 0))


def _with_inversion(group: Group) -> NamedGroup:
    """A direct product of the inversion and rotations."""
    vector, pseudovector = (
        _made(group, name, [((parity,), (1,), 0)], TO_XYZ) for name, parity in (("vector", 1), ("pseudovector", 0))
    )
    return NamedGroup(group, vector, pseudovector, group.irrep((1,), (0,)))


# ---- permutations ----------------------------------------------------------------------------------------------


@functools.cache
def _permuting(number: int) -> NamedGroup:
    """The N entries are their mean and the N - 1 coordinates about it."""
    rest = simplex_representation(number)
    basis = np.zeros((number, number))
    basis[:, 0] = number**-0.5
    basis[:, 1:] = helmert(number) @ rest.change_of_basis
    trivial = rest.group.trivial_representation.irreps
    kinds = ["pointwise", "norm", "gated", "concatenated"]
    return NamedGroup(rest.group, Representation(rest.group, "entries", trivial + rest.irreps, basis, kinds))


def helmert(num_particles: int) -> np.ndarray:
    """Orthonormal columns that span the vectors of mean 0, ``(N, N - 1)``."""
    basis = np.triu(np.ones((num_particles, num_particles - 1)))
    below = np.arange(1, num_particles)
    basis[below, below - 1] = -below
    return basis / np.sqrt(below * (below + 1))


def _simplex_irrep(num_particles: int) -> IrreducibleRepresentation:
    """The irrep by which :math:`S_N` acts on a regular simplex."""
    remedy = "escnn has no symmetric group of more letters; leave permutations out"
    check_integer("num_particles", num_particles, 2, 4, remedy=remedy)
    if num_particles == 2:
        return egroup.cyclic_group(2).irrep(1)
    if num_particles == 3:
        return egroup.dihedral_group(3).irrep(1, 1)
    # Of the irreps of size 3 the one that is not the cube's own: half turns that swap two diagonals have trace 1.
    return egroup.octa_group().irrep(-1)


def simplex_representation(num_particles: int) -> Representation:
    r""":math:`B^T P_\pi B` as a representation of escnn."""
    irrep = _simplex_irrep(num_particles)
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


# ---- all of them but polygons ----------------------------------------------------------------------------------


@functools.cache
def _signs() -> NamedGroup:
    group = egroup.cyclic_group(2)
    return NamedGroup(group, group.irrep(1))


_MAKERS: dict[tuple[str, int | None], Callable[[], NamedGroup]] = {
    ("trivial", None): lambda: NamedGroup(egroup.trivial_group()),
    ("O", 1): _signs,
    ("SO", 2): functools.cache(lambda: _plane(egroup.so2_group(), [(1,)], (0,))),
    ("O", 2): functools.cache(lambda: _plane(egroup.o2_group(), [(1, 1)], (1, 0))),
    ("SO", 3): functools.cache(lambda: _rotations(egroup.so3_group())),
    ("O", 3): functools.cache(_o3),
    ("octahedral", None): functools.cache(lambda: _rotations(egroup.octa_group())),
    ("icosahedral", None): functools.cache(lambda: _rotations(egroup.ico_group())),
    ("fulloctahedral", None): functools.cache(lambda: _with_inversion(egroup.full_octa_group())),
    ("fullicosahedral", None): functools.cache(lambda: _with_inversion(egroup.full_ico_group())),
    **{("S", number): functools.partial(_permuting, number) for number in (2, 3, 4)},
}
