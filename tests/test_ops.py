# SPDX-License-Identifier: Apache-2.0
"""The group's action and the representation theory, against escnn's own."""

import pickle

import numpy as np
import pytest
import torch
from escnn import group, gspaces
from escnn import nn as enn

from pyro_equiflow.ops.events import act, channel_matmul, grid_elements, on_grid
from pyro_equiflow.ops.representations import (
    IrrepDecomposition,
    intertwiner_basis,
    invariant_basis,
    is_permutation,
    probe_elements,
)
from tests.cases import TYPES, field_type, point, spatial_shape

POINTS = [name for name in TYPES if not spatial_shape(name)]
GRIDS = [name for name in TYPES if spatial_shape(name)]


@pytest.mark.parametrize("name", POINTS)
def test_act_is_escnns_on_points(name):
    kind = field_type(name)
    x = torch.randn(4, kind.size, dtype=torch.float32)
    for g in list(kind.testing_elements)[:12]:
        expected = enn.GeometricTensor(x, kind).transform(g).tensor
        torch.testing.assert_close(act(kind, g, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("side", [4, 5])
def test_act_is_escnns_on_grids(name, side):
    """Odd sizes, and even ones, which turn about a point between pixels."""
    kind = field_type(name)
    dimensions = kind.gspace.dimensionality
    x = torch.randn(2, kind.size, *dimensions * (side if dimensions == 2 else side - 1,))
    for g in grid_elements(kind)[:: 1 if dimensions == 2 else 5]:
        # escnn interpolates, exactly only up to the rounding of its grid.
        expected = enn.GeometricTensor(x, kind).transform(g).tensor
        torch.testing.assert_close(act(kind, g, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GRIDS + ["O2", "octahedral", "D4"])
def test_act_is_an_action(name):
    kind = field_type(name)
    side = max(spatial_shape(name), default=0)
    x = torch.randn(2, kind.size, *kind.gspace.dimensionality * (side,), dtype=torch.float64)
    elements = grid_elements(kind)
    generator = np.random.default_rng(0)
    for _ in range(8):
        g, h = (elements[i] for i in generator.integers(len(elements), size=2))
        torch.testing.assert_close(act(kind, g @ h, x), act(kind, g, act(kind, h, x)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(act(kind, kind.fibergroup.identity, x), x, rtol=1e-12, atol=1e-12)


EXPECTED_ELEMENTS = {
    "trivial-plane": 1, "flips-plane": 2, "C4-plane": 4, "C8-plane": 4, "D4-plane": 8, "SO2-plane": 4, "O2-plane": 8,
    "flips-space": 2, "octahedral-space": 24, "icosahedral-space": 12, "SO3-space": 24, "O3-space": 48,
    "cylinder-space": 16,
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_grid_elements_are_the_whole_subgroup(name):
    elements = grid_elements(field_type(name))
    assert len(elements) == EXPECTED_ELEMENTS[name]
    assert all(on_grid(field_type(name), g) for g in elements)
    for i, g in enumerate(elements):
        assert not any(g == h for h in elements[:i])


def test_act_refuses_what_would_need_interpolation():
    kind = field_type("C8-plane")
    with pytest.raises(ValueError, match="expected an element that permutes the grid, found"):
        act(kind, kind.fibergroup.element(1), torch.randn(5, 4, 4))


def test_channel_matmul_is_einsum():
    matrix = torch.randn(3, 4, dtype=torch.float64)
    for spatial in [(), (2, 3), (2, 3, 2)]:
        for batch in [(), (2,), (2, 3)]:
            x = torch.randn(*batch, 4, *spatial, dtype=torch.float64)
            flat = x.reshape(*batch, 4, -1)
            expected = torch.einsum("ij,...jp->...ip", matrix, flat).reshape(*batch, 3, *spatial)
            torch.testing.assert_close(channel_matmul(matrix, x, len(spatial)), expected)


def _average_dimension(in_rep, out_rep, elements):
    """The dimension of the space of intertwiners by characters' mean: the trace of the averaging projector."""
    return np.mean([np.trace(in_rep(g)) * np.trace(out_rep(g)) for g in elements])


FINITE = [name for name in POINTS if field_type(name).fibergroup.order() > 0]


@pytest.mark.parametrize("name", FINITE)
def test_intertwiners_by_characters(name):
    kind = field_type(name)
    reps = sorted(set(kind.representations), key=lambda r: r.name)
    elements = kind.fibergroup.elements
    for a in reps:
        for b in reps:
            basis = intertwiner_basis(a, b)
            assert len(basis) == round(_average_dimension(a, b, elements))
            for g in kind.fibergroup.testing_elements():
                np.testing.assert_allclose(b(g) @ basis, basis @ a(g), atol=1e-10)
            if len(basis):
                assert np.linalg.matrix_rank(basis.reshape(len(basis), -1)) == len(basis)


@pytest.mark.parametrize("name", POINTS)
def test_intertwiners_are_escnns(name):
    kind = field_type(name)
    for a in set(kind.representations):
        for b in set(kind.representations):
            layer = enn.Linear(point(kind.fibergroup, a), point(kind.fibergroup, b), initialize=False)
            assert len(intertwiner_basis(a, b)) == layer.weights.numel()


@pytest.mark.parametrize("name", POINTS)
def test_decomposition(name):
    kind = field_type(name)
    decomposition = IrrepDecomposition(kind)
    q = decomposition.change_of_basis
    np.testing.assert_allclose(q @ q.T, np.eye(kind.size), atol=1e-12)
    assert [b.irrep.id for b in decomposition.blocks] == list(kind.irreps)
    for g in list(kind.testing_elements)[:20]:
        blocks = q.T @ kind.representation(g) @ q
        for b in decomposition.blocks:
            inside = slice(b.start, b.start + b.size)
            np.testing.assert_allclose(blocks[inside, inside], b.irrep(g), atol=1e-8)
            blocks[inside, inside] = 0
        np.testing.assert_allclose(blocks, 0, atol=1e-8)
        for rep in set(kind.representations):
            vectors = invariant_basis(rep)
            np.testing.assert_allclose(rep(g) @ vectors, vectors, atol=1e-8)
    assert len(decomposition.trivial) == sum(invariant_basis(r).shape[1] for r in kind.representations)


def test_permutation_representations():
    c4, d4, so2 = group.cyclic_group(4), group.dihedral_group(4), group.so2_group()
    permuting = [c4.regular_representation, c4.trivial_representation, c4.quotient_representation(2),
                 d4.quotient_representation((0, 1)), so2.trivial_representation]  # fmt: skip
    turning = [c4.irrep(1), c4.irrep(2), d4.irrep(1, 1), d4.irrep(1, 0), so2.irrep(1)]
    assert all(map(is_permutation, permuting)) and not any(map(is_permutation, turning))


def test_probe_elements_generate():
    """Finite groups: products of the probes reach everything."""
    for g in (group.cyclic_group(6), group.dihedral_group(4), group.octa_group(), group.ico_group()):
        found, pending = [g.identity], [g.identity]
        while pending:
            element = pending.pop()
            for probe in probe_elements(g):
                product = probe @ element
                if not any(product == h for h in found):
                    found.append(product)
                    pending.append(product)
        assert len(found) == g.order()


@pytest.mark.parametrize("name", TYPES)
def test_field_types_survive_pickle(name):
    kind = field_type(name)
    twin = pickle.loads(pickle.dumps(kind))
    assert twin == kind
    assert twin.gspace == kind.gspace and twin.fibergroup is kind.fibergroup
    for g in list(kind.testing_elements)[:6]:
        np.testing.assert_array_equal(twin.representation(g), kind.representation(g))


def test_gspaces_of_unlike_names_survive_pickle():
    for space in [gspaces.flip2dOnR2(), gspaces.rot2dOnR2(-1, 5), gspaces.invOnR3(), gspaces.dihedralOnR3(4)]:
        twin = pickle.loads(pickle.dumps(space))
        assert twin == space and twin.fibergroup is space.fibergroup


def test_probes_of_a_direct_product_meet_both_factors():
    product = group.direct_product(group.cyclic_group(2), group.so2_group())
    swap = group.cyclic_group(2).regular_representation
    for left, right, permutes in [(swap.irreps[1], (0,), False), ((0,), (1,), False), ((0,), (0,), True)]:
        representation = product.irrep(left, right)
        assert is_permutation(representation) is permutes
        assert len(probe_elements(product)) < len(list(product.testing_elements()))
