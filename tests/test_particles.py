# SPDX-License-Identifier: Apache-2.0
"""Mean-free particle systems: against explicit permutation and rotation of positions, and closed forms."""

import copy
import itertools
import math
import pickle

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from escnn import group

import pyro_equiflow as pe
from pyro_equiflow import testing
from pyro_equiflow.ops.events import act

O2, SO3 = group.o2_group(), group.so3_group()
VECTORS = {
    "O2": lambda: O2.irrep(1, 1),
    "SO2": lambda: group.so2_group().irrep(1),
    "SO3": lambda: SO3.irrep(1),
    "O3": lambda: group.o3_group().irrep(1, 1),
    "C4": lambda: group.cyclic_group(4).irrep(1),
    "D2": lambda: group.dihedral_group(2).irrep(1, 0) + group.dihedral_group(2).irrep(1, 1),
    "trivial": lambda: group.directsum(2 * [group.trivial_group().trivial_representation]),
}


def coordinates(x):
    return pe.MeanFreePositions(*x.shape[-2:]).inv(x)


def mean_free(*shape):
    x = torch.randn(*shape, dtype=torch.float64)
    return x - x.mean(-2, keepdim=True)


@pytest.mark.parametrize("count", [2, 3, 4, 13])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_positions(count, dim):
    """Back and forth, mean 0, an isometry: its Jacobian has orthonormal columns, so the surface's log-det is 0."""
    transform = pe.MeanFreePositions(count, dim)
    z = torch.randn(5, (count - 1) * dim, dtype=torch.float64)
    x = transform(z)
    assert (
        x.shape == (5, count, dim) == transform.forward_shape(z.shape) and transform.inverse_shape(x.shape) == z.shape
    )
    torch.testing.assert_close(x.mean(-2), torch.zeros(5, dim, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(transform.inv(x), z, rtol=0, atol=1e-14)
    assert transform.codomain.check(x).all() and not transform.codomain.check(x + 1e-3).any()
    jacobian = torch.autograd.functional.jacobian(transform, z[0]).reshape(-1, z.shape[1])
    gram = torch.linalg.slogdet(jacobian.T @ jacobian)[1] / 2
    assert transform.log_abs_det_jacobian(z, x).shape == (5,) and abs(gram) < 1e-13
    torch.testing.assert_close(transform.log_abs_det_jacobian(z[0], x[0]), gram, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", VECTORS)
def test_rotating_positions_rotates_coordinates(name):
    vector = VECTORS[name]()
    kind = pe.particle_type(5, vector)
    x = mean_free(3, 5, vector.size)
    for g in list(kind.fibergroup.testing_elements())[:30]:
        turned = x @ torch.as_tensor(vector(g), dtype=x.dtype).T
        torch.testing.assert_close(coordinates(turned), act(kind, g, coordinates(x)), rtol=0, atol=1e-12)


JOINT = [*itertools.product([2, 3], VECTORS), (4, "O2"), (4, "SO3"), (4, "trivial")]


@pytest.mark.parametrize("count, name", JOINT)
def test_permuting_and_rotating_positions_is_the_groups_action(count, name):
    """By brute force, and every permutation occurs."""
    vector = VECTORS[name]()
    kind = pe.particle_type(count, vector, permutations=True)
    product = kind.fibergroup
    x = mean_free(2, count, vector.size)
    found = set()
    rotations = list(vector.group.testing_elements())[-2:]
    for s, r in itertools.product(product.G1.elements, rotations):
        g = product.inclusion1(s) @ product.inclusion2(r)
        to = pe.particle_permutation(count, g)
        found.add(tuple(to.tolist()))
        moved = torch.empty_like(x)
        moved[:, to] = x @ torch.as_tensor(vector(r), dtype=x.dtype).T
        torch.testing.assert_close(coordinates(moved), act(kind, g, coordinates(x)), rtol=0, atol=1e-12)
        assert torch.equal(to, pe.particle_permutation(count, s))
    assert found == set(itertools.permutations(range(count)))


@pytest.mark.parametrize("count, name", [(3, "O2"), (3, "C4"), (4, "trivial")])
@pytest.mark.parametrize("kind", ["residual", "implicit"])
def test_flow_of_identical_particles(count, name, kind):
    """Solved transforms take the joint irrep: density of positions under permutations and rotations."""
    vector = VECTORS[name]()
    field_type = pe.particle_type(count, vector, permutations=True)
    factory = {"residual": pe.equivariant_residual, "implicit": pe.equivariant_implicit}[kind]
    flow = factory(field_type, hidden_dims=(16,), lipschitz=0.7, identity_init=False).double()
    elements = list(field_type.fibergroup.testing_elements())[:12]
    z = torch.randn(2, field_type.size, dtype=torch.float64)
    testing.assert_equivariant(flow, z, elements=elements, tolerance=1e-11)
    testing.assert_log_det(flow, z)
    num_scales = pe.InvariantNormal(field_type).num_scales
    base = pe.InvariantNormal(field_type, scale=torch.ones(num_scales, dtype=torch.float64))
    density = dist.TransformedDistribution(base, [flow, pe.MeanFreePositions(count, vector.size)])
    x = density.sample((4,))
    reference = density.log_prob(x)
    for permutation in itertools.permutations(range(count)):
        turned = x[:, list(permutation)] @ torch.as_tensor(vector(next(iter(vector.group.testing_elements()))).T)
        torch.testing.assert_close(density.log_prob(turned), reference, rtol=0, atol=1e-9)
    assert (flow(z) - z).abs().max() > 1e-3


def test_average_over_permutations():
    """Of an asymmetric density of four particles, by hand."""
    kind = pe.particle_type(4, VECTORS["trivial"](), permutations=True)
    base = dist.Normal(torch.arange(6.0).double(), 0.7 + torch.rand(6).double()).to_event(1)
    mixture = pe.OrbitMixture(base, kind)
    x = mean_free(5, 4, 2)
    terms = [base.log_prob(coordinates(x[:, list(p)])) for p in itertools.permutations(range(4))]
    expected = torch.stack(terms).logsumexp(0) - math.log(24)
    torch.testing.assert_close(mixture.log_prob(coordinates(x)), expected, rtol=1e-12, atol=1e-12)


def test_standard_normal_of_positions():
    """Its density is that of the subspace, of dimension (N - 1) d; positions have covariance 1 - 1/N."""
    kind = pe.particle_type(4, O2.irrep(1, 1))
    base = pe.InvariantNormal(kind, scale=torch.ones(3, dtype=torch.float64))
    density = dist.TransformedDistribution(base, [pe.MeanFreePositions(4, 2)])
    assert density.event_shape == (4, 2) and density.batch_shape == ()
    x = density.sample((20_000,))
    expected = -x.square().sum((-2, -1)) / 2 - 3 * math.log(2 * math.pi)
    torch.testing.assert_close(density.log_prob(x), expected, rtol=1e-12, atol=1e-12)
    covariance = x[..., 0].T.cov()
    wanted = torch.eye(4, dtype=torch.float64) - 0.25
    torch.testing.assert_close(covariance, wanted, rtol=0, atol=5 / math.sqrt(20_000))
    with pytest.raises(ValueError, match=r"support .MeanFree"):
        dist.TransformedDistribution(base, [pe.MeanFreePositions(4, 2)], validate_args=True).log_prob(x + 1)


def test_positions_survive_copies():
    transform = pe.MeanFreePositions(3, 2)
    z = torch.randn(4, 4)
    for other in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)), transform.with_cache(1)):
        assert other == transform and hash(other) == hash(transform)
        torch.testing.assert_close(other(z), transform(z), rtol=0, atol=0)
    assert transform != pe.MeanFreePositions(2, 3) and transform(z.double()).dtype == torch.float64
    torch.testing.assert_close(transform(z.double()).float(), transform(z))


@pytest.mark.parametrize("permutations", [False, True])
def test_types_survive_copies(permutations):
    kind = pe.particle_type(3, O2.irrep(1, 1), permutations=permutations)
    for other in (copy.deepcopy(kind), pickle.loads(pickle.dumps(kind))):
        g = list(kind.fibergroup.testing_elements())[3]
        np.testing.assert_array_equal(other.representation(g), kind.representation(g))


@pytest.mark.parametrize("call, error, message", [
    (lambda: pe.particle_type(5, O2.irrep(1, 1), permutations=True), ValueError, "from 2 to 4, found 5; .* letters"),
    (lambda: pe.particle_type(1, O2.irrep(1, 1)), ValueError, "num_particles: expected .* at least 2, found 1"),
    (lambda: pe.particle_type(3, O2), TypeError, "vector: expected an escnn representation .* found O2"),
    (lambda: pe.MeanFreePositions(3, 0), ValueError, "dim: expected a positive integer, found 0"),
    (lambda: pe.MeanFreePositions(3, 2)(torch.zeros(5)), ValueError, r"coordinates of shape \(\*batch, 4\), found"),
    (lambda: pe.MeanFreePositions(3, 2).inv(torch.zeros(4, 2)), ValueError, r"positions of shape \(\*batch, 3, 2\)"),
    (lambda: pe.particle_permutation(3, O2.identity), ValueError, "element: expected one of D3"),
])  # fmt: skip
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_identical_particles_cannot_be_split():
    with pytest.raises(ValueError, match="equivariant_residual"):
        pe.equivariant_coupling(pe.particle_type(3, O2.irrep(1, 1), permutations=True))
