# SPDX-License-Identifier: Apache-2.0
"""Space to depth: the field type that really results, on every group that permutes the grid."""

import copy
import itertools
import pickle

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from escnn import gspaces
from escnn import nn as enn

import pyro_equiflow as pe
from pyro_equiflow import testing
from pyro_equiflow.ops.events import act, grid_elements
from pyro_equiflow.ops.representations import is_permutation

#: Spaces with a grid that the whole group permutes; not square where no element exchanges the axes.
SPACES = {
    "C1": (gspaces.trivialOnR2, (4, 6)),
    "C2": (lambda: gspaces.rot2dOnR2(2), (4, 6)),
    "C4": (lambda: gspaces.rot2dOnR2(4), (4, 4)),
    "flips": (gspaces.flip2dOnR2, (4, 6)),
    "other-flips": (lambda: gspaces.flip2dOnR2(0.0), (2, 4)),
    "diagonal-flips": (lambda: gspaces.flip2dOnR2(np.pi / 4), (4, 4)),
    "D1": (lambda: gspaces.flipRot2dOnR2(1), (4, 6)),
    "D2": (lambda: gspaces.flipRot2dOnR2(2), (4, 6)),
    "D2-diagonal": (lambda: gspaces.flipRot2dOnR2(2, axis=np.pi / 4), (4, 4)),
    "D4": (lambda: gspaces.flipRot2dOnR2(4), (4, 4)),
    "D4-other-axis": (lambda: gspaces.flipRot2dOnR2(4, axis=np.pi / 4), (4, 4)),
    "C4-space": (lambda: gspaces.rot2dOnR3(4), (4, 2, 2)),
    "D4-space": (lambda: gspaces.dihedralOnR3(4), (2, 2, 2)),
    "mirror-space": (gspaces.mirOnR3, (2, 4, 6)),
    "inversion-space": (gspaces.invOnR3, (2, 4, 6)),
    "octahedral-space": (gspaces.octaOnR3, (2, 2, 2)),
}
QUOTIENTS = {"C4": [2], "D2": [(None, 2), (0, 1)], "D4": [(0, 1), (1, 1), (None, 2)]}


def incoming(name):
    """Each kind of field by itself, and a mixture of them all."""
    space = SPACES[name][0]()
    fields = {f"irrep{irrep.id}": irrep for irrep in space.fibergroup.irreps()}
    fields["regular"] = space.regular_repr
    for subgroup in QUOTIENTS.get(name, []):
        fields[f"quotient{subgroup}"] = space.quotient_repr(subgroup)
    if name == "octahedral-space":  # 192 channels of a regular field take seconds
        fields = {key: fields[key] for key in ("irrep(0,)", "irrep(1,)")}
    types = {key: enn.FieldType(space, [field]) for key, field in fields.items()}
    types["mixed"] = enn.FieldType(space, [*fields.values(), space.trivial_repr])
    return types


@pytest.mark.parametrize("haar", [False, True], ids=["sites", "haar"])
@pytest.mark.parametrize("name", SPACES)
def test_the_field_type_after_the_squeeze(name, haar):
    """On both sides the action is that of field types on events: permuted grid, then matrices of representations."""
    for field, kind in incoming(name).items():
        squeeze = pe.EquivariantSqueeze(kind, haar=haar)
        sides = SPACES[name][1]
        assert squeeze.out_type.size == kind.size * 2 ** len(sides)
        x = torch.randn(2, kind.size, *sides, dtype=torch.float64)
        y = squeeze(x)
        assert y.shape == (2, squeeze.out_type.size, *(side // 2 for side in sides))
        assert len(grid_elements(kind)) == kind.fibergroup.order()
        for g in grid_elements(kind):
            found, expected = squeeze(act(kind, g, x)), act(squeeze.out_type, g, y)
            assert (found - expected).abs().max() < 1e-13, (field, g)
        assert testing.equivariance_error(squeeze, x) < 1e-13
        assert testing.equivariance_error(squeeze.inv, y) < 1e-13
        back = squeeze.inv(y.clone())
        torch.testing.assert_close(back, x, rtol=0, atol=1e-13 if haar else 0)
        # Orthogonal: lengths are kept.
        torch.testing.assert_close(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=1e-13, atol=0)


def test_sites_are_pixels():
    """Without Haar every entry moves as it is: each cell's channels are its pixels."""
    kind = incoming("D4")["mixed"]
    x = torch.randn(kind.size, 4, 6)
    y = pe.EquivariantSqueeze(enn.FieldType(gspaces.trivialOnR2(), kind.size * [gspaces.trivialOnR2().trivial_repr]))(x)
    z = torch.nn.functional.pixel_unshuffle(x, 2)
    torch.testing.assert_close(y, z, rtol=0, atol=0)
    x = torch.randn(kind.size, 4, 4)
    y, z = pe.EquivariantSqueeze(kind)(x), torch.nn.functional.pixel_unshuffle(x, 2)
    torch.testing.assert_close(y.sort(0)[0], z.sort(0)[0], rtol=0, atol=0)


def test_permutation_fields_stay_permutation_fields():
    """So that scales of couplings stay pointwise; trivial and regular fields under their own names."""
    expected = {
        ("C1", "irrep(0,)"): 4 * ["irrep_0"],
        ("C2", "irrep(0,)"): 2 * ["regular"],
        ("C4", "irrep(0,)"): ["regular"],
        ("C4", "regular"): 4 * ["regular"],
        ("C4", "quotient2"): 2 * ["regular"],
        ("flips", "irrep(0,)"): 2 * ["regular"],
        ("flips", "regular"): 4 * ["regular"],
        ("D1", "irrep(0,)"): 2 * ["regular"],
        ("D2", "irrep(0, 0)"): ["regular"],
        ("D4", "regular"): 4 * ["regular"],
        ("diagonal-flips", "irrep(0,)"): ["regular", "irrep_0", "irrep_0"],
    }
    for (name, field), fields in expected.items():
        squeeze = pe.EquivariantSqueeze(incoming(name)[field])
        found = ["irrep_0" if f.is_trivial() else f.name for f in squeeze.out_type.representations]
        assert found == fields, (name, field, found)
    for name in SPACES:
        for field, kind in incoming(name).items():
            if all(map(is_permutation, kind.representations)):
                assert all(map(is_permutation, pe.EquivariantSqueeze(kind).out_type.representations)), (name, field)
    # Of D_4 on the four sites a diagonal's reflection fixes two: cosets of it, one field, the same at every squeeze.
    (cell,) = pe.EquivariantSqueeze(incoming("D4")["irrep(0, 0)"]).out_type.representations
    assert cell.size == 4 and is_permutation(cell)
    again = pe.EquivariantSqueeze(enn.FieldType(gspaces.flipRot2dOnR2(4), [cell])).out_type.representations
    assert sorted(field.size for field in again) == [4, 4, 8]
    assert [field == cell for field in again if field.size == 4] == [True, True]
    assert "regular" in [field.name for field in again]
    # Cosets of conjugate subgroups, the two diagonals' reflections, are one kind of field.
    space = gspaces.flipRot2dOnR2(4)
    conjugate = [enn.FieldType(space, [space.quotient_repr((axis, 1))]) for axis in (1, 3)]
    first, second = (pe.EquivariantSqueeze(kind).out_type.representations for kind in conjugate)
    assert {*first, *second} == {cell, space.regular_repr}


def test_haar_is_averages_and_differences():
    """Against the 2x2 Haar transform written out; averages keep their fields and stand first."""
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    a, b, c, d = (x[:, 0, i::2, j::2] for i, j in itertools.product((0, 1), repeat=2))
    average, right, down, diagonal = (a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2
    for name in ("C1", "C2", "flips", "D2", "C4", "D4"):
        kind = next(iter(incoming(name).values()))
        squeeze = pe.EquivariantSqueeze(kind, haar=True)
        y = squeeze(x)
        assert squeeze.out_type.representations[0].is_trivial()
        torch.testing.assert_close(y[:, 0], average, rtol=0, atol=1e-14)
        if name in ("C4", "D4"):  # an irrep of two dimensions: a basis of the same plane
            assert [field.size for field in squeeze.out_type.representations] == [1, 2, 1]
            torch.testing.assert_close(
                y[:, 1] ** 2 + y[:, 2] ** 2, right**2 + down**2, rtol=1e-12, atol=1e-12
            )  # fmt: skip
        else:
            lengths = torch.stack([y[:, 1].abs(), y[:, 2].abs()])
            torch.testing.assert_close(lengths, torch.stack([right.abs(), down.abs()]), rtol=0, atol=1e-14)
        torch.testing.assert_close(y[:, 3].abs(), diagonal.abs(), rtol=0, atol=1e-14)
    kind = enn.FieldType(gspaces.rot2dOnR2(4), [gspaces.rot2dOnR2(4).irrep(1), gspaces.rot2dOnR2(4).regular_repr])
    squeeze = pe.EquivariantSqueeze(kind, haar=True)
    assert squeeze.out_type.representations[:2] == kind.representations
    x = torch.randn(6, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(squeeze(x)[:6, 0, 0], x.sum((1, 2)) / 2, rtol=0, atol=1e-14)


@pytest.mark.parametrize("haar", [False, True], ids=["sites", "haar"])
@pytest.mark.parametrize("name", ["C4", "D4", "C4-space"])
def test_log_det_shapes_and_copies(name, haar):
    kind = incoming(name)["mixed"]
    kind = enn.FieldType(kind.gspace, kind.representations[:2])
    squeeze = pe.EquivariantSqueeze(kind, haar=haar)
    x = torch.randn(2, 3, kind.size, *SPACES[name][1])
    for dtype in (torch.float32, torch.float64):
        testing.assert_inverse(squeeze, x.to(dtype))
        testing.assert_log_det(squeeze, x[0, :1].to(dtype))
    y, ladj = squeeze.call_and_ladj(x)
    assert ladj.shape == (2, 3) and not ladj.any()
    assert squeeze.forward_shape(x.shape) == squeeze.inv.inverse_shape(x.shape) == y.shape
    assert squeeze.inverse_shape(y.shape) == squeeze.inv.forward_shape(y.shape) == x.shape
    assert squeeze(x[0, 0]).shape == y.shape[2:]
    torch.testing.assert_close(torch.func.vmap(squeeze._call)(x[0]), y[0], rtol=0, atol=0)
    for twin in (copy.deepcopy(squeeze), pickle.loads(pickle.dumps(squeeze))):
        assert twin.out_type == squeeze.out_type and twin.field_type == kind
        torch.testing.assert_close(twin(x), y, rtol=0, atol=0)


def test_in_a_distribution_and_in_a_stack():
    """Shapes of events change on the way, as Pyro lets a transform say; types have to fit."""
    kind = incoming("C4")["irrep(0,)"]
    first = pe.equivariant_squeeze(kind)
    second = pe.equivariant_squeeze(first.out_type, haar=True)
    stack = pe.Compose([first, second])
    assert stack.out_type == second.out_type and stack.inv.field_type == second.out_type
    density = dist.TransformedDistribution(dist.Normal(torch.zeros(1, 8, 8), 1.0).to_event(3), [stack])
    assert density.event_shape == (16, 2, 2)
    y = density.sample((5,))
    # An orthogonal map of a standard normal.
    expected = dist.Normal(torch.zeros(16, 2, 2), 1.0).to_event(3).log_prob(y)
    torch.testing.assert_close(density.log_prob(y), expected, rtol=1e-5, atol=1e-5)
    testing.assert_equivariant(stack, torch.randn(2, 1, 8, 8))
    testing.assert_inverse(stack, torch.randn(2, 1, 8, 8))
    assert stack.inverse_shape(torch.Size((5, 16, 2, 2))) == (5, 1, 8, 8)
    with pytest.raises(ValueError, match="transforms: expected parts that fit, .* found EquivariantSqueeze with"):
        pe.Compose([first, first])


def test_a_wrong_type_is_caught():
    """Planted: the sites in the order of the array, as if they were a regular field's."""
    kind = incoming("C4")["irrep(0,)"]
    regular = enn.FieldType(kind.gspace, [kind.gspace.regular_repr])
    x = torch.randn(2, 1, 4, 4)
    unshuffle = torch.nn.functional.pixel_unshuffle
    assert testing.equivariance_error(lambda x: unshuffle(x, 2), x, kind, out_type=regular) > 0.1
    assert testing.equivariance_error(pe.EquivariantSqueeze(kind), x) == 0.0


@pytest.mark.parametrize("space, found", [
    (gspaces.rot2dOnR2(8), "found C8 with 4 elements"),
    (gspaces.rot2dOnR2(3), "found C3 with 2 elements"),
    (gspaces.flipRot2dOnR2(6), "found D6 with 8 elements"),
    (gspaces.flip2dOnR2(np.pi / 8), "found C2 with 1 elements"),
    (gspaces.rot2dOnR2(-1, 2), r"found SO\(2\) with infinitely many"),
    (gspaces.flipRot2dOnR2(-1, 2), r"found O\(2\) with infinitely many"),
    (gspaces.icoOnR3(), "found Icosahedral with 48 elements"),
    (gspaces.rot3dOnR3(2), r"found SO\(3\) with infinitely many"),
], ids=str)  # fmt: skip
def test_groups_that_do_not_permute_the_grid(space, found):
    with pytest.raises(ValueError, match=f"expected a group of quarter turns and flips, .*{found}.* Take a subgroup"):
        pe.EquivariantSqueeze(enn.FieldType(space, [space.trivial_repr]))


def test_refusals():
    space = gspaces.rot2dOnR2(4)
    squeeze = pe.EquivariantSqueeze(enn.FieldType(space, [space.trivial_repr]))
    with pytest.raises(ValueError, match=r"expected even side lengths, found \(7, 7\); pad or crop"):
        squeeze(torch.randn(2, 1, 7, 7))
    with pytest.raises(ValueError, match="expected even side lengths"):
        squeeze.forward_shape(torch.Size((1, 7, 7)))
    with pytest.raises(ValueError, match=r"expected an input of shape \(\*batch, 4, .* found \(2, 1, 4, 4\)"):
        squeeze.inv(torch.randn(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"expected a shape \(\*batch, 4, "):
        squeeze.inverse_shape(torch.Size((1, 4, 4)))
    with pytest.raises(ValueError, match=r"expected a grid that .* found \(4, 6\)"):
        squeeze(torch.randn(2, 1, 4, 6))
    point = gspaces.no_base_space(space.fibergroup)
    with pytest.raises(ValueError, match="field_type: expected a type over a 2-D or 3-D grid, found .*no base space"):
        pe.EquivariantSqueeze(enn.FieldType(point, [point.trivial_repr]))
    with pytest.raises(ValueError, match="field_type: expected a type over a 2-D or 3-D grid, found .*no base space"):
        pe.MultiScale.types(enn.FieldType(point, [point.trivial_repr]))
    for direction, channels in ((squeeze, 1), (squeeze.inv, 4)):
        with pytest.raises(ValueError, match=r"expected a grid of at least one point a side, found \(0, 0\)"):
            direction(torch.randn(2, channels, 0, 0))
    with pytest.raises(TypeError, match="field_type: expected an escnn.nn.FieldType, found int"):
        pe.EquivariantSqueeze(4)
