# SPDX-License-Identifier: Apache-2.0
"""What a guide has built in and what it averages over; where it starts; averages of Pyro's guides."""

import copy
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import group, gspaces
from escnn.nn import FieldType
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch.distributions import constraints

import pyro_equiflow as pe
from pyro_equiflow.infer.supports import kept_inside
from pyro_equiflow.testing import invariance_error


def point(acting, *representations):
    return FieldType(gspaces.no_base_space(acting), list(representations))


O2, O3, D3, SO3 = group.o2_group(), group.o3_group(), group.dihedral_group(3), group.so3_group()
C2 = group.cyclic_group(2)
PRODUCT = group.direct_product(C2, SO3)
SYMMETRIES = {
    "O2": (point(O2, *3 * [O2.irrep(1, 1)], O2.irrep(1, 0)), 2, "SO(2)"),
    "O3": (point(O3, *2 * [O3.irrep(1, 1)], O3.irrep(0, 1)), 2, "SO(3)"),
    "D3": (point(D3, D3.irrep(1, 1), D3.regular_representation), 6, "C1"),
    "C2xSO3": (point(PRODUCT, *2 * [PRODUCT.irrep((1,), (1,))]), 2, "SO(3)"),
    "S3xO2": (pe.particle_type(3, O2.irrep(1, 1), permutations=True), 12, "SO(2)"),
}


def prior(size):
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(size, dtype=torch.float64), 1.0).to_event(1))

    return model


@pytest.mark.parametrize("name", SYMMETRIES)
def test_connected_part_is_built_in_and_the_rest_averaged(name):
    """The guide is invariant under the whole group, and its density the explicit sum over one element per coset."""
    kind, cosets, connected = SYMMETRIES[name]
    guide = pe.AutoEquivariantFlow(
        prior(kind.size),
        {"z": kind},
        lambda t: pe.equivariant_flow(t, num_transforms=2, hidden_dims=(16,), identity_init=False),
        init_scale=1.0,
    )
    guide()
    assert guide.field_type == kind and guide.flow_type.fibergroup.name == connected
    assert len(guide.orbit) == cosets
    flow = dist.TransformedDistribution(guide.get_base_dist(), guide.get_transform())
    average = guide.get_posterior()
    x = average.sample((6,))
    assert invariance_error(flow.log_prob, x, guide.flow_type) < 1e-9
    assert invariance_error(average.log_prob, x, kind) < 1e-9
    if name != "C2xSO3":  # a flow of two vectors alone commutes with their reflection as well
        assert invariance_error(flow.log_prob, x, kind) > 1e-3
    matrices = torch.from_numpy(guide.orbit.matrices)
    terms = torch.stack([flow.log_prob(x @ m) for m in matrices])  # x m = m^-1 x
    torch.testing.assert_close(average.log_prob(x), terms.logsumexp(0) - math.log(cosets))


def test_finite_group_that_escnn_cannot_restrict():
    cube = group.full_octa_group()
    kind = pe.field_type("full octahedral", vectors=2)
    guide = pe.AutoEquivariantFlow(prior(6), {"z": kind})
    guide()
    assert len(guide.orbit) == cube.order() and guide.flow_type.fibergroup.order() == 1
    pyro.clear_param_store()
    product = group.direct_product(cube, group.so2_group())
    irrep = next(r for r in product.irreps() if r.size > 2)
    whole = pe.AutoEquivariantFlow(prior(2 * irrep.size), {"z": point(product, irrep, irrep)})
    whole()
    assert whole.orbit is None and whole.flow_type == whole.field_type


def test_all_built_in():
    kind = SYMMETRIES["O2"][0]
    guide = pe.AutoEquivariantFlow(prior(kind.size), {"z": kind}, built_in="all")
    guide()
    assert guide.orbit is None and guide.flow_type == kind
    assert invariance_error(guide.get_posterior().log_prob, guide.get_posterior().sample((5,)), kind) < 1e-9


def test_large_finite_groups_are_built_in():
    kind = point(group.cyclic_group(200), *2 * [group.cyclic_group(200).irrep(1)])
    guide = pe.AutoEquivariantFlow(prior(4), {"z": kind})
    guide()
    assert guide.orbit is None and guide.flow_type == kind


# ---- draws and scores ------------------------------------------------------------------------------------------


def shifted():
    """Two modes, at 3 and -3."""
    z = pyro.sample("z", dist.Normal(torch.zeros(1), 3.0).to_event(1))
    pyro.sample("y", dist.Normal(z.abs().sum(-1), 0.5), obs=torch.tensor(3.0))


SIGN = {"z": point(C2, C2.irrep(1))}


def at_three():
    return pe.AutoEquivariantFlow(shifted, SIGN, init_loc_fn=init_to_value(values={"z": torch.tensor([3.0])}))


@pytest.mark.filterwarnings("ignore::pyro_equiflow.errors.PrecisionWarning")
def test_draws_visit_all_modes_always():
    guide = at_three()
    for mode in (guide.train, guide.eval):
        mode()
        signs = torch.stack([guide()["z"].sign() for _ in range(60)])
        assert 12 < int((signs > 0).sum()) < 48  # binomial: beyond 4.6 standard deviations
    draws = Predictive(shifted, guide=guide, num_samples=400, parallel=True, return_sites=["z"])()["z"]
    assert abs(float((draws > 0).float().mean()) - 0.5) < 0.11


def test_training_scores_without_the_sum():
    """With gradients the score is that of the flow where the draw comes from; without, or in eval mode, the average."""
    guide = at_three()
    guide()
    flow = dist.TransformedDistribution(guide.get_base_dist(), guide.get_transform())

    def score():
        trace = pyro.poutine.trace(guide).get_trace()
        return trace.nodes["z"]["value"], trace.log_prob_sum()

    z, found = score()
    torch.testing.assert_close(found, flow.log_prob(z.abs()))  # far from 0 the draw came from the positive mode
    for context, mode in ((torch.no_grad(), guide.train), (torch.enable_grad(), guide.eval)):
        mode()
        with context:
            z, found = score()
        torch.testing.assert_close(found, guide.get_posterior().log_prob(z))
        assert float(found.detach()) == pytest.approx(float(flow.log_prob(z.abs()).detach()) - math.log(2), abs=1e-3)


def test_averaged_bound_is_higher_by_the_entropy_of_the_modes():
    guide = at_three()
    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=0)
    guide()
    unaveraged = -float(elbo.differentiable_loss(shifted, guide).detach())
    with torch.no_grad():
        averaged = -elbo.loss(shifted, guide)
    assert averaged - unaveraged == pytest.approx(math.log(2), abs=0.05)


# ---- starts ----------------------------------------------------------------------------------------------------


def test_start():
    """Invariant coordinates at their initial value with ``init_scale``, moving ones with the size of theirs."""
    kind = point(O2, O2.irrep(1, 1), O2.irrep(0, 0), O2.irrep(1, 1))
    value = torch.tensor([3.0, -4.0, 2.0, 0.0, 0.01], dtype=torch.float64)
    guide = pe.AutoEquivariantFlow(
        prior(5), {"z": kind}, init_loc_fn=init_to_value(values={"z": value}), init_scale=0.2, auxiliary=1
    )
    guide()
    z = guide.get_posterior().joint.sample((40_000,))
    # Five standard errors.
    expected = torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    scales = torch.tensor([5 / 2**0.5, 5 / 2**0.5, 0.2, 0.2, 0.2, 1.0], dtype=torch.float64)
    torch.testing.assert_close(z.mean(0) / scales, expected / scales, atol=5 / 200, rtol=0)
    torch.testing.assert_close(z.std(0), scales, rtol=5 / 282, atol=0)


def test_start_of_a_finite_group_is_the_value():
    guide = pe.AutoEquivariantFlow(
        prior(8), {"z": SYMMETRIES["D3"][0]}, init_loc_fn=init_to_value(values={"z": torch.arange(8).double()})
    )
    guide()
    flow = dist.TransformedDistribution(guide.get_base_dist(), guide.get_transform())
    x = torch.arange(8).double() + 0.1 * torch.randn(5, 8).double()
    expected = dist.Normal(torch.arange(8).double(), 0.1).to_event(1)
    torch.testing.assert_close(flow.log_prob(x), expected.log_prob(x))


@pytest.mark.parametrize(
    "support, value",
    [
        (constraints.positive, -200.0),
        (constraints.positive, 200.0),
        (constraints.greater_than(1.0), -40.0),
        (constraints.independent(constraints.positive, 1), [-200.0, 0.5]),
        (constraints.simplex, [-300.0, 300.0]),
    ],
)
def test_values_stay_in_their_support(support, value):
    value = torch.tensor(value, requires_grad=True)
    bijection = torch.distributions.biject_to(support)
    assert not bool((support.check(bijection(value)) & bijection(value).isfinite().all()).all()) or (
        support is constraints.simplex
    )
    found = bijection(kept_inside(value, support))
    assert bool(support.check(found).all()) and bool(found.isfinite().all())
    found.sum().backward()
    assert value.grad.isfinite().all()
    usual = 0.1 * torch.ones_like(value)
    assert kept_inside(usual, support) is usual


def test_edge_of_a_support_is_the_nearest_number():
    found = kept_inside(torch.tensor([-200.0, -3.0, 200.0]), constraints.positive)
    torch.testing.assert_close(found, torch.tensor([-72.78, -3.0, 72.78]), atol=0.02, rtol=0)


@pytest.mark.filterwarnings("ignore::pyro_equiflow.errors.PrecisionWarning")
def test_far_draws_are_scored():
    """A guide whose draws underflow the support of a log-normal trains on."""

    def model():
        pyro.sample("s", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))

    guide = pe.AutoEquivariantFlow(model, {"s": point(C2, C2.regular_representation)}, init_scale=200.0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(20))


def test_single_vector_needs_no_more():
    """Nothing to split: the default takes steps that need no split."""

    def ring():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.norm(dim=-1), 0.3), obs=torch.tensor(1.5))

    guide = pe.AutoEquivariantFlow(ring, {"z": point(O2, O2.irrep(1, 1))})
    svi = SVI(ring, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(3))


# ---- averages of Pyro's guides ---------------------------------------------------------------------------------

DATA = torch.tensor([-2.0, -1.8, -2.3, 0.1, 0.3, -0.2, 2.2, 2.5, 1.9])
RELABELLED = torch.eye(3)[torch.tensor(list(itertools.permutations(range(3))))]


def mixture():
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.zeros(3) - 1, 0.5).to_event(1))
    parts = dist.Normal(mu[..., None, :], sigma[..., None, :]).log_prob(DATA[:, None])
    pyro.factor("y", parts.logsumexp(-1).sum(-1))


def at_data():
    return init_to_value(values={"mu": torch.tensor([-2.0, 0.0, 2.0]), "sigma": torch.full((3,), 0.3)})


GUIDES = {
    "normal": lambda: AutoNormal(mixture, init_loc_fn=at_data()),
    "full": lambda: AutoMultivariateNormal(mixture, init_loc_fn=at_data()),
    "low rank": lambda: AutoLowRankMultivariateNormal(mixture, init_loc_fn=at_data(), rank=2),
    "iaf": lambda: AutoIAFNormal(mixture),
}


@pytest.mark.parametrize("name", GUIDES)
def test_average_of_a_guide(name):
    """Before training and after, the density is the explicit sum; the bound gains at most log 6, here nearly that."""
    plain = GUIDES[name]()
    guide = pe.AutoOrbitMixture(plain, {"mu": RELABELLED, "sigma": RELABELLED})
    svi = SVI(mixture, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step() for _ in range(3)]
    assert all(map(math.isfinite, losses)) and len(list(guide.parameters())) == len(list(plain.parameters()))
    average = guide.get_posterior()
    x = average.sample((4,))
    inner = guide._get_unaveraged()
    turns = [torch.block_diag(m, m) for m in RELABELLED]
    expected = torch.stack([inner.log_prob(x @ m) for m in turns]).logsumexp(0) - math.log(6)
    torch.testing.assert_close(average.log_prob(x), expected, atol=1e-4, rtol=1e-4)
    if name == "iaf":
        return  # starts far from any mode
    elbo = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=0)
    with torch.no_grad():
        gain = elbo.loss(mixture, plain) - elbo.loss(mixture, guide)
    assert 1.0 < gain < math.log(6) + 0.3
    assert guide.median()["mu"].shape == (3,)
    for clone in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        torch.testing.assert_close(clone.get_posterior().log_prob(x), average.log_prob(x))


def test_trained_guide_can_be_averaged_later():
    plain = GUIDES["normal"]()
    svi = SVI(mixture, plain, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(5):
        svi.step()
    before = {name: value.detach().clone() for name, value in plain.named_parameters()}
    guide = pe.AutoOrbitMixture(plain, {"mu": RELABELLED, "sigma": RELABELLED})
    guide()
    assert all(torch.equal(before[name], value) for name, value in plain.named_parameters())
    weights = pe.importance_weights(mixture, guide, num_samples=4000)
    once = pe.importance_weights(mixture, GUIDES["normal"](), num_samples=10)
    assert weights.isfinite().all() and once.isfinite().all()


def test_wrong_averages_of_guides():
    with pytest.raises(TypeError, match="guide: expected an AutoNormal"):
        pe.AutoOrbitMixture(mixture, {"mu": RELABELLED})
    with pytest.raises(pe.EquivarianceError, match="Sites that change"):
        pe.AutoOrbitMixture(GUIDES["normal"](), {"mu": RELABELLED})()
    with pytest.raises(ValueError, match="one matrix of every site"):
        pe.AutoOrbitMixture(GUIDES["normal"](), {"mu": RELABELLED, "sigma": RELABELLED[:2]})
    with pytest.raises(ValueError, match="finite group"):
        pe.AutoOrbitMixture(GUIDES["normal"](), {"mu": point(O3, O3.irrep(1, 1))})()


# ---- groups of matrices ----------------------------------------------------------------------------------------


def test_matrix_groups():
    eye = torch.eye(5)
    swap, cycle = eye[[1, 0, 2, 3, 4]], eye[[1, 2, 3, 4, 0]]
    assert pe.matrix_group([swap, cycle]).shape == (120, 5, 5)
    assert len(pe.matrix_group([swap[:3, :3], cycle.new_tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]]), -eye[:3, :3]])) == 12
    angle = 2 * math.pi / 7
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    found = pe.matrix_group([turn])
    assert found.shape == (7, 2, 2) and torch.equal(found[0], torch.eye(2, dtype=torch.float64))
    irrational = torch.tensor([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]], dtype=torch.float64)
    with pytest.raises(ValueError, match="max_order=5040"):
        pe.matrix_group([irrational])
    with pytest.raises(ValueError, match="orthogonal"):
        pe.matrix_group([2 * turn])
    with pytest.raises(TypeError, match="orthogonal matrices"):
        pe.matrix_group("ab")


def test_mixture_over_matrices_is_that_over_the_field_type():
    kind = point(D3, D3.irrep(1, 1))
    base = dist.Normal(torch.tensor([2.0, 0.5]).double(), 0.3).to_event(1)
    matrices = pe.matrix_group([D3.irrep(1, 1)(g) for g in D3.generators])
    one, other = pe.OrbitMixture(base, kind), pe.OrbitMixture(base, matrices.float())
    x = one.sample((5,))
    torch.testing.assert_close(one.log_prob(x), other.log_prob(x))
    with pytest.raises(ValueError, match="products that are not among them"):
        pe.OrbitMixture(base, matrices[1:])
    with pytest.raises(ValueError, match=r"base: expected events of shape \(3,\)"):
        pe.OrbitMixture(base, RELABELLED)


def test_model_check_over_matrices():
    report = pe.check_model_invariance(mixture, {"mu": RELABELLED, "sigma": RELABELLED})
    assert report.invariant
    report = pe.check_model_invariance(mixture, {"mu": RELABELLED})
    assert not report.invariant and "of matrix" in str(report)
    with pytest.raises(ValueError, match="expected None beside matrices"):
        pe.check_model_invariance(mixture, {"mu": RELABELLED}, elements=[O2.identity])
