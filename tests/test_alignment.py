# SPDX-License-Identifier: Apache-2.0
"""Alignment of draws: against scipy, all group elements, and grids of angles."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.transform import Rotation

import pyro_equiflow as pe
from pyro_equiflow import align
from pyro_equiflow.testing import act

F64 = {"rtol": 0, "atol": 1e-12}


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def distance(x, reference):
    return (x - reference).flatten(x.dim() - reference.dim()).square().sum(-1)


# ---- rotations and reflections -----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
@pytest.mark.parametrize("number", [1, 2, 7])
def test_orthogonal_matrices_are_those_of_scipy(dim, number):
    draws, reference = randn(20, number, dim), randn(number, dim)
    aligned, elements = align(draws, reference, f"O({dim})", return_elements=True)
    torch.testing.assert_close(elements @ elements.mT, torch.eye(dim).double().expand(20, dim, dim), **F64)
    torch.testing.assert_close(draws @ elements.mT, aligned, **F64)
    for x, y, g in zip(draws, aligned, elements):
        r, _ = orthogonal_procrustes(x.numpy(), reference.numpy())
        np.testing.assert_allclose(y, x.numpy() @ r, atol=1e-10)
        if number >= dim:  # else the best one is not the only one
            np.testing.assert_allclose(g.T, r, atol=1e-10)


@pytest.mark.parametrize("number", [2, 3, 8])
def test_rotations_of_space_are_those_of_scipy(number):
    draws, reference = randn(20, number, 3), randn(number, 3)
    aligned, elements = align(draws, reference, "SO(3)", return_elements=True)
    torch.testing.assert_close(torch.linalg.det(elements), torch.ones(20).double(), **F64)
    for x, y, g in zip(draws, aligned, elements):
        best, _ = Rotation.align_vectors(reference.numpy(), x.numpy())
        np.testing.assert_allclose(y, best.apply(x.numpy()), atol=1e-8)
        np.testing.assert_allclose(g, best.as_matrix(), atol=1e-8)


def test_rotations_of_the_plane_by_a_grid_of_angles():
    draws, reference = randn(10, 4, 2), randn(4, 2)
    for name, flips in (("SO(2)", [1.0]), ("O(2)", [1.0, -1.0])):
        found = distance(align(draws, reference, name), reference)
        angle = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
        turns = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
        mirrored = [draws * torch.tensor([1.0, flip]) for flip in flips]
        tried = torch.stack([distance((x[:, None] @ turns.mT), reference) for x in mirrored]).amin((0, 2))
        assert (found <= tried + 1e-12).all() and (tried - found).max() < 1e-5


def test_proper_rotations_leave_a_mirror_image():
    reference = randn(5, 3)
    mirrored = reference * torch.tensor([1.0, 1.0, -1.0])
    assert distance(align(mirrored[None], reference, "O(3)"), reference) < 1e-20
    assert distance(align(mirrored[None], reference, "SO(3)"), reference) > 0.1


@pytest.mark.parametrize("name", ["SO(2)", "O(2)", "SO(3)", "O(3)"])
def test_field_types_of_continuous_groups(name):
    """As by name for vectors; with other fields better than all of many elements, and what the element does."""
    dim = int(name[-2])
    x, like = randn(6, 4, dim), randn(4, dim)
    by_type = align(x, like, pe.field_type(name, vectors=4), return_elements=True)
    for found, expected in zip(by_type, align(x, like, name, return_elements=True)):
        torch.testing.assert_close(found, expected, **F64)

    kind = pe.field_type(name, vectors=1, pseudovectors=1, scalars=2, pseudoscalars=2)
    x, like = randn(30, kind.size), randn(kind.size)
    aligned, elements = align(x, like, kind, return_elements=True)
    group = kind.fibergroup
    every = torch.stack([act(kind, g, x) for g in [group.sample() for _ in range(300)]])
    assert (distance(aligned, like) <= distance(every, like).amin(0) + 1e-12).all()
    signs = torch.linalg.det(elements).round()
    if name[0] == "O":
        assert set(signs.tolist()) == {1.0, -1.0}
    for before, after, matrix in zip(x, aligned, elements.numpy()):
        if name == "SO(2)":
            element = group.element(math.atan2(matrix[1, 0], matrix[0, 0]), "radians")
        elif name == "O(2)":
            flip = int(np.linalg.det(matrix) < 0)
            element = group.element((flip, math.atan2(matrix[1, 0], matrix[0, 0])), "radians")
        elif name == "SO(3)":
            element = group.element(matrix, "MAT")
        else:
            flip = int(np.linalg.det(matrix) < 0)
            element = group.element((flip, (-1) ** flip * matrix), "MAT")
        torch.testing.assert_close(after, act(kind, element, before), rtol=0, atol=1e-7)


def test_the_parity_of_pseudoscalars_decides():
    """One vector can be turned onto any other by either kind; which it is the sign of the pseudoscalar says."""
    kind = pe.field_type("O(3)", vectors=1, pseudoscalars=1)
    x, like = torch.tensor([[1.0, 0, 0, 2.0], [1.0, 0, 0, -2.0]]), torch.tensor([0.0, 1.0, 0.0, 2.0])
    aligned, elements = align(x, like, kind, return_elements=True)
    torch.testing.assert_close(aligned, like.expand(2, 4), rtol=0, atol=1e-6)
    assert torch.linalg.det(elements).round().tolist() == [1, -1]


def test_translations():
    """Kabsch with centring: of a moved and turned copy nothing is left over."""
    reference = randn(5, 3) + 4
    turns = torch.tensor(Rotation.random(7, random_state=0).as_matrix())
    draws = reference @ turns.mT + 10 * randn(7, 1, 3)
    aligned = align(draws, reference, "SO(3)", centre=True)
    torch.testing.assert_close(aligned, reference.expand(7, 5, 3), rtol=0, atol=1e-12)
    assert distance(align(draws, reference, "SO(3)"), reference).min() > 1
    # Two sites that move together have one centre.
    parts = {"a": draws[:, :2], "b": draws[:, 2:]}
    both = align(parts, {"a": reference[:2], "b": reference[2:]}, {"a": "SO(3)", "b": "SO(3)"}, centre=True)
    torch.testing.assert_close(torch.cat([both["a"], both["b"]], 1), aligned, **F64)
    free = align(draws, None, "SO(3)", centre=True)
    torch.testing.assert_close(free.mean(1), torch.zeros(7, 3).double(), **F64)
    assert free.var(0).max() < 1e-20


# ---- permutations and finite groups --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 5])
def test_every_order(number):
    draws, reference = randn(15, number, 3), randn(number, 3)
    aligned, orders = align(draws, reference, f"S_{number}", return_elements=True)
    torch.testing.assert_close(aligned, draws.take_along_dim(orders[..., None], 1), rtol=0, atol=0)
    every = [draws[:, list(p)] for p in itertools.permutations(range(number))]
    best = torch.stack([distance(x, reference) for x in every]).amin(0)
    torch.testing.assert_close(distance(aligned, reference), best, **F64)
    turned = align(draws.mT, reference.T, (f"S_{number}", 1))
    torch.testing.assert_close(turned.mT, aligned, rtol=0, atol=0)


TYPES = {
    "C_4": lambda: pe.field_type("C_4", vectors=3, scalars=1),
    "D_5": lambda: pe.field_type("D_5", vectors=2, pseudovectors=1, pseudoscalars=1),
    "O(1)": lambda: pe.field_type("O(1)", vectors=4),
    "S_3": lambda: pe.field_type("S_3", vectors=2, scalars=1),
    "full octahedral": lambda: pe.field_type("full octahedral", vectors=2, pseudovectors=1),
    "particles": lambda: pe.particle_type(3, "D_3", permutations=True),
}


@pytest.mark.parametrize("name", TYPES)
def test_every_element(name):
    kind = TYPES[name]()
    elements = list(kind.fibergroup.elements)
    draws, reference = randn(12, kind.size), randn(kind.size)
    aligned, numbers = align(draws, reference, kind, return_elements=True)
    every = torch.stack([act(kind, g, draws) for g in elements])
    torch.testing.assert_close(distance(aligned, reference), distance(every, reference).amin(0), **F64)
    torch.testing.assert_close(aligned, every[numbers, torch.arange(12)], **F64)
    matrices = [act(kind, g, torch.eye(kind.size).double()).T for g in elements]
    listed, same = align(draws, reference, matrices, return_elements=True)
    torch.testing.assert_close(listed, aligned, **F64)
    assert (same == numbers).all()
    assert (align(draws, reference, torch.stack(matrices)) == listed).all()


def test_names_of_finite_groups():
    draws, reference = randn(12, 4, 2), randn(4, 2)
    expected = align(draws, reference, pe.field_type("D_3", vectors=4))
    torch.testing.assert_close(align(draws, reference, "D_3"), expected, **F64)
    torch.testing.assert_close(align(draws.mT, reference.T, ("D_3", 0)).mT, expected, **F64)


# ---- sites, shapes, dtypes, references -----------------------------------------------------------------------


def test_sites_are_moved_together():
    """Hidden units: rows of one matrix and columns of another, and a site that nothing happens to."""
    first, second, offset = randn(8, 5, 3), randn(8, 2, 5), randn(8)
    likes = {"first": randn(5, 3), "second": randn(2, 5), "unused": randn(1)}
    action = {"first": "S_5", "second": ("S_5", 1)}
    draws = {"first": first, "second": second, "offset": offset}
    aligned, orders = align(draws, likes, action, return_elements=True)
    assert list(aligned) == list(draws) and aligned["offset"] is offset
    for i in range(8):
        best = min(
            itertools.permutations(range(5)),
            key=lambda p: float(
                distance(first[i, list(p)], likes["first"]) + distance(second[i][:, list(p)], likes["second"])
            ),
        )
        assert orders[i].tolist() == list(best)
        assert (aligned["second"][i] == second[i][:, list(best)]).all()
    # Alone the two would not agree.
    assert (align(first, likes["first"], "S_5", return_elements=True)[1] != orders).any()


def test_factors_of_a_matrix():
    """A product U V^T has O(k): the two factors turn together, and the product stays."""
    u, v = randn(6, 7, 2), randn(6, 4, 2)
    aligned = align({"u": u, "v": v}, None, {"u": "O(2)", "v": "O(2)"})
    torch.testing.assert_close(aligned["u"] @ aligned["v"].mT, u @ v.mT, **F64)
    joined = align(torch.cat([u, v], 1), None, "O(2)")
    torch.testing.assert_close(torch.cat([aligned["u"], aligned["v"]], 1), joined, **F64)


@pytest.mark.parametrize("action, event", [("O(3)", (4, 3)), ("S_4", (4, 3)), ("C_2", (3, 2)), ("SO(2)", (2,))])
@pytest.mark.parametrize("batch", [(), (3,), (2, 5), (0,)])
def test_batches(action, event, batch):
    draws, reference = randn(*batch, *event), randn(*event)
    aligned, elements = align(draws, reference, action, return_elements=True)
    assert aligned.shape == draws.shape and elements.shape[: len(batch)] == batch
    for one, index in zip(draws.reshape(-1, *event), np.ndindex(*batch)):
        torch.testing.assert_close(aligned[index], align(one, reference, action), **F64)


@pytest.mark.parametrize("action", ["O(3)", "S_4", "octahedral", pe.field_type("O(3)", vectors=4)], ids=str)
def test_dtypes_and_gradients(action):
    draws, reference = torch.randn(5, 4, 3, requires_grad=True), randn(4, 3)
    before = draws.detach().clone()
    aligned, elements = align(draws, reference, action, return_elements=True)
    assert aligned.dtype == torch.float32 and not aligned.requires_grad
    assert elements.dtype in (torch.float32, torch.int64)
    assert (draws == before).all()
    torch.testing.assert_close(aligned.double(), align(draws.double(), reference, action), rtol=0, atol=1e-5)


def test_without_a_reference():
    """The mean is a fixed point, no worse than the first draw as reference; orbits of one shape fall together."""
    shape = randn(6, 3)
    turns = torch.tensor(Rotation.random(50, random_state=0).as_matrix())
    draws = (shape + 0.1 * randn(50, 6, 3)) @ turns.mT
    aligned = align(draws, None, "SO(3)")
    torch.testing.assert_close(align(aligned, aligned.mean(0), "SO(3)"), aligned, rtol=0, atol=1e-5)
    spread = [(x - x.mean(0)).square().sum() for x in (aligned, align(draws, draws[0], "SO(3)"), draws)]
    assert spread[0] < spread[1] < spread[2] / 5
    # The frame is the first draw's; 18 coordinates less 3 angles are left to vary.
    assert distance(aligned[:1], draws[0]) < 0.1
    np.testing.assert_allclose(spread[0] / 49, 15 * 0.01, rtol=0.15)
    relabelled = align(draws[:, torch.randperm(6)], shape, "S_6")
    assert relabelled.shape == draws.shape


def test_medians_of_a_posterior():
    """Two exchangeable components: medians of raw draws are alike, those of aligned ones are the truth."""
    truth = torch.tensor([-2.0, 3.0])
    draws = {"mu": truth + 0.1 * torch.randn(400, 2), "size": 1 + 0.1 * torch.rand(400, 2)}
    swapped = torch.rand(400) < 0.5
    draws = {name: torch.where(swapped[:, None], value.flip(1), value) for name, value in draws.items()}
    aligned = align(draws, None, {"mu": "S_2", "size": "S_2"})["mu"]
    median = aligned.median(0).values.sort().values
    torch.testing.assert_close(median, truth, rtol=0, atol=0.05)  # 0.1 * sqrt(pi / 2 / 400) = 0.006
    assert aligned.std(0).max() < 0.12 < 2 < draws["mu"].std(0).min()


def test_draws_of_a_guide():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.square().sum((-1, -2)), 0.1), obs=torch.tensor(3.0))

    pyro.clear_param_store()
    kind = pe.field_type("O(2)", vectors=3)
    guide = pe.AutoEquivariantFlow(model, {"z": kind})
    guide()
    draws = pyro.infer.Predictive(model, guide=guide, num_samples=20)()
    aligned = align(draws, {"z": draws["z"][4]}, {"z": kind})
    assert aligned["z"].shape == draws["z"].shape and aligned["a"] is draws["a"]
    gram = draws["z"] @ draws["z"].mT
    torch.testing.assert_close(aligned["z"] @ aligned["z"].mT, gram, rtol=0, atol=1e-4)
    torch.testing.assert_close(aligned["z"][4], draws["z"][4], rtol=0, atol=1e-5)


# ---- errors --------------------------------------------------------------------------------------------------

X = torch.ones(5, 4, 3)


@pytest.mark.parametrize("call, error, words", [
    (lambda: align([1.0], None, "O(3)"), TypeError, "draws: expected a torch.Tensor, or a mapping"),
    (lambda: align(X, {"z": X[0]}, "O(3)"), TypeError, "reference: expected a torch.Tensor, as draws"),
    (lambda: align({"z": X}, X[0], {"z": "O(3)"}), TypeError, "reference: expected .*mapping .* found Tensor"),
    (lambda: align({"z": X}, None, "O(3)"), TypeError, "action: expected a mapping of the sites"),
    (lambda: align({"z": X}, None, {}), TypeError, "action: expected a mapping of the sites"),
    (lambda: align({"z": X}, None, {"x": "O(3)"}), ValueError, r"action: expected .* \['z'\], found 'x'"),
    (lambda: align({"z": X}, {}, {"z": "O(3)"}), ValueError, r"action: expected .* \[\], found 'z'"),
    (lambda: align(X.long(), None, "O(3)"), TypeError, "draws: expected a floating-point dtype"),
    (lambda: align(X * math.nan, None, "O(3)"), ValueError, "draws: expected finite values, found NaN"),
    (lambda: align({"z": X}, {"z": X[0] / 0}, {"z": "O(3)"}), ValueError, "reference: expected finite values at 'z'"),
    (lambda: align(X, X[:, :, 0], "O(3)"), ValueError, r"reference: expected one draw of shape \(4, 3\)"),
    (lambda: align(X[0, 0], X[0], "O(3)"), ValueError, "reference: expected one draw of shape"),
    (lambda: align(X[:0], None, "O(3)"), ValueError, r"draws: expected one draw at least.* found \(0,\)"),
    (lambda: align(torch.tensor(1.0), None, "O(3)"), ValueError, r"draws: expected one draw|action: expected values"),
    (lambda: align(X, None, "O(2)"), ValueError, r"action: expected 2 entries in dimension -1 .* found shape \(4, 3\)"),
    (lambda: align(X, None, ("O(3)", 0)), ValueError, "action: expected 3 entries in dimension 0"),
    (lambda: align(X, None, ("O(3)", 2)), ValueError, "action: expected an integer from -2 to 1, found 2"),
    (lambda: align(X, None, ("O(3)", "x")), TypeError, "action: expected an integer"),
    (lambda: align(X, None, "S_3"), ValueError, "action: expected 3 entries in dimension 0"),
    (lambda: align(X[:, 0, 0], None, "S_3"), ValueError, "action: expected values of one dimension .* found numbers"),
    (lambda: align(X, None, "U(3)"), ValueError, "action: expected one of .* found 'U"),
    (lambda: align(X, None, "trivial"), ValueError, "action: expected a group with vectors"),
    (lambda: align(X, None, 3), TypeError, "action: expected a field type, .* found 3"),
    (lambda: align(X, None, []), ValueError, "action: expected a field type, .* found shape"),
    (lambda: align(X, None, [torch.eye(3)]), ValueError, r"action: .* of size 12 for .* found \(1, 3, 3\)"),
    (lambda: align(X, None, [2 * torch.eye(12)]), ValueError, "action: .*orthogonal matrices.* up to 3"),
    (lambda: align(X, None, pe.field_type("O(3)", vectors=3)), ValueError, "action: expected a field type of size 12"),
    (lambda: align(X, None, "S_4", centre=True), ValueError, "centre: expected False with .* found 'S_4'"),
    (lambda: align(X, None, pe.field_type("O(3)", vectors=4), centre=True), ValueError, "centre: expected False"),
    (lambda: align({"a": X, "b": X[:3]}, None, {"a": "O(3)", "b": "O(3)"}), ValueError, "draws: .* one batch shape"),
    (lambda: align({"a": X, "b": X}, None, {"a": "O(3)", "b": "SO(3)"}), ValueError, "action: expected one group"),
    (lambda: align({"a": X, "b": X}, None, {"a": "O(3)", "b": "S_4"}), ValueError, "one after the other"),
    (lambda: align(X, None, "O(3)", centre=1), TypeError, "centre: expected True or False"),
])  # fmt: skip
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_other_irreps_are_refused():
    from escnn import group, gspaces, nn

    space = gspaces.no_base_space(group.so2_group())
    with pytest.raises(ValueError, match="action: expected a finite group, or vectors, .*irrep_2"):
        align(torch.ones(3, 2), None, nn.FieldType(space, [space.irrep(2)]))
    turned = gspaces.no_base_space(group.cylinder_group(1))
    with pytest.raises(ValueError, match="action: expected a finite group, or vectors"):
        align(torch.ones(3, 1), None, nn.FieldType(turned, [turned.trivial_repr]))
