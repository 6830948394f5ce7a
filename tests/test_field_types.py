# SPDX-License-Identifier: Apache-2.0
"""Field types by name: against matrices written down here, and scipy's rotations."""

import itertools
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import group
from scipy.spatial.transform import Rotation

import pyro_equiflow as pe
from pyro_equiflow.testing import act

TURNS = Rotation.random(4, random_state=0)
SPACE = ("SO(3)", "O(3)", "octahedral", "full octahedral", "icosahedral", "full icosahedral")
PLANE = ("SO(2)", "O(2)", "C_1", "C_2", "C_5", "D_1", "D_2", "D_3", "D_8")


def plane(angle, flip):
    """Turned by an angle, after the reflection that changes the sign of y."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]]) @ np.diag([1, (-1) ** flip])


def moves(name):
    """Elements of a group, each with its matrix on (x, y) or (x, y, z)."""
    of = pe.field_type(name, scalars=1).fibergroup
    if name in ("SO(2)", "O(2)"):
        angles = [0.3, 2.0, -1.1]
        if name == "SO(2)":
            return [(of.element(a, "radians"), plane(a, 0)) for a in angles]
        return [(of.element((f, a), "radians"), plane(a, f)) for a in angles for f in (0, 1)]
    if name[0] in "CD":
        number = int(name[2:])
        if name[0] == "C":
            return [(of.element(k, "int"), plane(2 * math.pi * k / number, 0)) for k in range(number)]
        pairs = itertools.product((0, 1), range(number))
        return [(of.element((f, k), "int"), plane(2 * math.pi * k / number, f)) for f, k in pairs]
    if name == "SO(3)":
        return [(of.element(r, "MAT"), r) for r in TURNS.as_matrix()]
    if name == "O(3)":
        return [(of.element((f, r), "MAT"), (-1) ** f * r) for r in TURNS.as_matrix() for f in (0, 1)]
    if name.startswith("full"):
        # The parity, and the quaternion of a rotation.
        pairs = [(g, *g.value) for g in of.elements]
        return [(g, (-1) ** f * Rotation.from_quat(q).as_matrix()) for g, f, q in pairs]
    return [(g, Rotation.from_quat(g.to("Q")).as_matrix()) for g in of.elements]


@pytest.mark.parametrize("name", PLANE + SPACE)
def test_arrays_turn_by_the_matrix(name):
    """A user's (n, d) array of vectors, in the order x, y, z; pseudovectors and pseudoscalars with the determinant."""
    dim = 2 if name in PLANE else 3
    kind = pe.field_type(name, vectors=2, pseudovectors=1, scalars=2, pseudoscalars=1)
    assert kind.size == 3 * dim + 3 and len(kind.representations) == 6
    x, axial = torch.randn(5, 2, dim, dtype=torch.float64), torch.randn(5, dim, dtype=torch.float64)
    scalars, signed = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    for element, matrix in moves(name):
        r, sign = torch.as_tensor(matrix), round(np.linalg.det(matrix))
        expected = torch.cat([(x @ r.T).flatten(1), sign * axial @ r.T, scalars, sign * signed], 1)
        found = act(kind, element, torch.cat([x.flatten(1), axial, scalars, signed], 1))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14 * 10)


def test_the_cube_and_the_icosahedron():
    """All signed permutations; matrices of the golden ratio's group have traces 3, -1, 0 and (1 +- sqrt 5)/2."""
    for name, order in (("octahedral", 24), ("full octahedral", 48)):
        found = {tuple(np.round(m).astype(int).flatten()) for _, m in moves(name)}
        signed = [
            np.diag(s) @ np.eye(3)[list(p)]
            for s in itertools.product((1, -1), repeat=3)
            for p in itertools.permutations(range(3))
        ]
        assert found == {tuple(m.astype(int).flatten()) for m in signed if order == 48 or np.linalg.det(m) > 0}
    traces = sorted({round(np.trace(m), 6) for _, m in moves("icosahedral")})
    np.testing.assert_allclose(traces, [-1, (1 - 5**0.5) / 2, 0, (1 + 5**0.5) / 2, 3], atol=1e-6)


@pytest.mark.parametrize("name", ["O(3)", "full octahedral"])
def test_products_of_vectors(name):
    """Cross products are pseudovectors, triple products pseudoscalars, lengths scalars."""
    x, y, z = torch.randn(3, 3, dtype=torch.float64)
    made = torch.cat([torch.linalg.cross(x, y), x @ x[:, None], torch.linalg.cross(x, y) @ z[:, None]])
    kind = pe.field_type(name, pseudovectors=1, scalars=1, pseudoscalars=1)
    for element, matrix in moves(name):
        r = torch.as_tensor(matrix)
        u, v, w = x @ r.T, y @ r.T, z @ r.T
        moved = torch.cat([torch.linalg.cross(u, v), u @ u[:, None], torch.linalg.cross(u, v) @ w[:, None]])
        torch.testing.assert_close(act(kind, element, made), moved, rtol=0, atol=1e-13)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_permutations(number):
    kind = pe.field_type(f"S_{number}", vectors=1)
    eye = torch.eye(number, dtype=torch.float64)
    found = {tuple(act(kind, g, eye).round().int().flatten().tolist()) for g in kind.fibergroup.elements}
    every = {tuple(eye[list(p)].int().flatten().tolist()) for p in itertools.permutations(range(number))}
    assert found == every
    for g in kind.fibergroup.elements:
        torch.testing.assert_close(act(kind, g, eye), act(kind, g, eye).round(), rtol=0, atol=1e-14)


def test_signs_and_nothing():
    kind = pe.field_type("O(1)", vectors=2, scalars=1)
    assert act(kind, kind.fibergroup.generators[0], torch.tensor([1.0, 2, 3])).tolist() == [-1, -2, 3]
    assert pe.field_type("trivial", scalars=4).size == 4


@pytest.mark.parametrize("kind", ["coupling", "iaf", "residual", "implicit"])
@pytest.mark.parametrize("name", ["C_2", "D_5", "O(2)", "SO(3)", "O(3)", "S_3"])
def test_every_family_takes_them(name, kind):
    """Flows commute with the matrices on a user's array, and split between vectors."""
    field_type = pe.field_type(name, vectors=3, scalars=1)
    torch.manual_seed(0)
    flow = pe.equivariant_flow(field_type, kind=kind, num_transforms=2, hidden_dims=(12,), identity_init=False)
    flow = flow.double().eval()
    if name == "S_3":
        pairs = [(g, np.asarray(field_type.representations[0](g))) for g in field_type.fibergroup.elements]
    else:
        pairs = moves(name)
    x = torch.randn(4, field_type.size, dtype=torch.float64)
    points, scalar = x[:, :-1].unflatten(1, (3, -1)), x[:, -1:]
    with torch.no_grad():
        y = flow(x)
        assert (y - x).abs().max() > 1e-2
        for _, matrix in pairs[:6]:
            r = torch.as_tensor(matrix)
            moved = flow(torch.cat([(points @ r.T).flatten(1), scalar], 1))
            expected = torch.cat([(y[:, :-1].unflatten(1, (3, -1)) @ r.T).flatten(1), y[:, -1:]], 1)
            torch.testing.assert_close(moved, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name, kind, told", [
    ("SO(3)", "coupling", True), ("SO(3)", "iaf", False), ("SO(3)", "residual", False), ("SO(3)", "implicit", False),
    ("SO(2)", "iaf", True), ("SO(2)", "residual", True), ("octahedral", "iaf", True), ("octahedral", "residual", True),
])  # fmt: skip
def test_left_and_right(name, kind, told):
    """What the page "Which transform?" says of default networks: whether the map commutes with a reflection as well."""
    dim = 2 if name in PLANE else 3
    torch.manual_seed(0)
    flow = pe.equivariant_flow(
        pe.field_type(name, vectors=4, scalars=1), kind=kind, num_transforms=2, hidden_dims=(48,), identity_init=False
    )
    flow = flow.double().eval()
    mirror = torch.ones(4, dim, dtype=torch.float64)
    mirror[:, -1] = -1
    mirror = torch.cat([mirror.flatten(), torch.ones(1, dtype=torch.float64)])
    x = torch.randn(20, 4 * dim + 1, dtype=torch.float64)
    with torch.no_grad():
        error = (flow(mirror * x) - mirror * flow(x)).abs().max()
    assert error > 1e-2 if told else error < 1e-7


def test_guide_by_name():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4, 3]).to_event(2))
        size = pyro.sample("size", dist.LogNormal(0.0, 1.0))
        pyro.sample(
            "y", dist.Normal(size * torch.linalg.det(z[..., 1:, :] - z[..., :1, :]), 0.1), obs=torch.tensor(1.0)
        )

    pyro.clear_param_store()
    guide = pe.AutoEquivariantFlow(model, {"z": pe.field_type("SO(3)", vectors=4)})
    assert guide()["z"].shape == (4, 3) and guide.invariance_report.invariant
    pyro.clear_param_store()
    # The volume is a pseudoscalar, so that a mirror image is told from its original.
    with pytest.raises(pe.EquivarianceError, match="y"):
        pe.AutoEquivariantFlow(model, {"z": pe.field_type("O(3)", vectors=4)})()


@pytest.mark.parametrize("name", [*PLANE, *SPACE, "O(1)", "S_3", "S_4"])
def test_read_back(name):
    kind = pe.field_type(name, vectors=2, scalars=1)
    assert pickle.loads(pickle.dumps(kind)) == kind
    if name in PLANE + SPACE:
        assert pe.field_type(kind.fibergroup, scalars=1, vectors=2) == kind
    assert pe.augment(kind, 2).size == kind.size + 2


def test_particles_by_name():
    kind = pe.particle_type(5, "SO(3)")
    assert kind == pe.field_type("SO(3)", vectors=4)
    both = pe.particle_type(3, "O(3)", permutations=True)
    x = torch.randn(3, 3, dtype=torch.float64)
    x = x - x.mean(0)
    transform = pe.MeanFreePositions(3, 3)
    product = both.fibergroup
    for element, matrix in moves("O(3)"):
        moved = act(both, product.inclusion2(element), transform.inv(x))
        torch.testing.assert_close(transform(moved), x @ torch.as_tensor(matrix).T, rtol=0, atol=1e-13)


def test_names_and_objects():
    """Spellings, escnn's objects, and fields of escnn's own."""
    spelt = [pe.field_type(n, vectors=2) for n in ("D_5", "D5", "d_5", " D5 ", group.dihedral_group(5))]
    assert all(kind == spelt[0] for kind in spelt)
    assert pe.field_type("so(3)", vectors=1).representations[0] == group.so3_group().standard_representation()
    assert pe.field_type("O(2)", vectors=1).representations[0] == group.o2_group().irrep(1, 1)
    assert pe.field_type("Full-Octahedral", scalars=1) == pe.field_type(group.full_octa_group(), scalars=1)


@pytest.mark.parametrize("make, error, words", [
    (lambda: pe.field_type("U(1)", scalars=1), ValueError, r'group: expected one of .*"O\(3\)".* found .U\(1\).*Type'),
    (lambda: pe.field_type("S_5", vectors=1), ValueError, "group: expected one of .*S_4.* found .S_5"),
    (lambda: pe.field_type("C_0", vectors=1), ValueError, "group: expected"),
    (lambda: pe.field_type(2, vectors=1), TypeError, "group: expected one of .* found int"),
    (lambda: pe.field_type("O(2)"), ValueError, "vectors: expected a positive number .* found 0"),
    (lambda: pe.field_type("trivial", vectors=2), ValueError, "vectors: expected 0 .* found 2; take scalars"),
    (lambda: pe.field_type("S_3", pseudovectors=2), ValueError, "pseudovectors: expected 0 .* found 2"),
    (lambda: pe.field_type("O(2)", scalars=-1), ValueError, "scalars: expected an integer of at least 0, found -1"),
    (lambda: pe.particle_type(3, "trivial"), ValueError, "vector: expected a group with vectors"),
    (lambda: pe.particle_type(3, "SU(2)"), ValueError, "vector: expected one of"),
])  # fmt: skip
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make()
