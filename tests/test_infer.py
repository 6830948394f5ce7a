# SPDX-License-Identifier: Apache-2.0
"""The equivariant guide and what goes with it: Pyro's contract, packing, errors, the check of models, evidence."""

import copy
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import group, gspaces
from escnn.nn import FieldType
from pyro import poutine
from pyro.infer import HMC, MCMC, SVI, Predictive, Trace_ELBO
from pyro.infer.reparam import NeuTraReparam
from torch.distributions import constraints

import pyro_equiflow
from pyro_equiflow.flows import equivariant_flow
from pyro_equiflow.infer import (
    AutoEquivariantFlow,
    check_model_invariance,
    evidence_estimate,
    importance_weighted_bound,
    importance_weights,
)
from pyro_equiflow.infer.quantiles import constrained_quantiles
from pyro_equiflow.ops.events import act
from pyro_equiflow.ops.representations import probe_elements
from pyro_equiflow.testing import invariance_error

POINT = gspaces.no_base_space(group.o2_group())
VECTOR = POINT.irrep(1, 1)
DISTANCES = torch.tensor([1.0, 1.5, 2.0])


def vectors(count):
    return FieldType(POINT, count * [VECTOR])


def distances(z):
    return (z - z.roll(1, -2)).square().sum(-1).add(1e-12).sqrt()


def triangle(data=DISTANCES):
    """Three points by their distances; a plate, a positive and a simplex site beside them."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("points", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=data.dtype), 2.0).to_event(1))
        sigma = pyro.sample("sigma", dist.Gamma(torch.tensor(4.0, dtype=data.dtype), 20.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3, dtype=data.dtype)))
    weights = weights.squeeze(-2) if weights.dim() > 1 else weights
    with pyro.plate("pairs", 3):
        pyro.sample("d", dist.Normal(scale * distances(z) + 0.01 * weights, sigma), obs=data)


def points(data=DISTANCES, offset=0.0):
    """Three points by their distances; ``offset`` breaks the symmetry."""
    z = pyro.sample("z", dist.Normal(offset * torch.ones(3, 2, dtype=data.dtype), 1.5).to_event(2))
    a = pyro.sample("a", dist.LogNormal(torch.zeros((), dtype=data.dtype), 0.3))
    pyro.sample("d", dist.Normal(a[..., None] * distances(z), 0.2).to_event(1), obs=data)


def small_flow(field_type):
    return equivariant_flow(field_type, num_transforms=2, hidden_dims=(16,))


def make_guide(model=points, representations=None, **kwargs):
    return AutoEquivariantFlow(model, representations or {"z": vectors(3)}, small_flow, **kwargs)


def train(guide, model=points, args=(), steps=30, particles=8):
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.01}), elbo)
    return [svi.step(*args) for _ in range(steps)]


# ---- inference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [False, True])
def test_svi_lowers_the_loss(vectorize):
    guide = make_guide()
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=vectorize, max_plate_nesting=0)
    svi = SVI(points, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    losses = [svi.step() for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(math.isfinite(loss) for loss in losses)


def test_default_flow():
    guide = AutoEquivariantFlow(points, {"z": vectors(3)})
    losses = train(guide, steps=5)
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("kind", ["residual", "implicit"])
def test_flows_that_are_solved(kind):
    """As a guide: training, draws without log-dets, invariance after training, and a copy."""

    def flow(field_type):
        return equivariant_flow(field_type, kind=kind, num_transforms=2, hidden_dims=(16,), lipschitz=0.8)

    guide = AutoEquivariantFlow(points, {"z": vectors(3)}, flow)
    losses = train(guide, args=(DISTANCES.double(),), steps=16)
    assert sum(losses[-5:]) < sum(losses[:5]) - 5
    posterior = guide.get_posterior()
    draws = posterior.sample((4,))
    assert invariance_error(posterior.log_prob, draws, guide.field_type) < 1e-8
    clone = pickle.loads(pickle.dumps(guide))
    assert torch.equal(clone.get_posterior().log_prob(draws), posterior.log_prob(draws.clone()))
    site = Predictive(points, guide=guide, num_samples=5, parallel=True, return_sites=["z"])(DISTANCES.double())["z"]
    assert site.shape == (5, 3, 2)


def test_neutra_with_a_residual_flow():
    guide = AutoEquivariantFlow(
        points,
        {"z": vectors(3)},
        lambda field_type: equivariant_flow(field_type, kind="residual", num_transforms=1, hidden_dims=(8,)),
    )
    train(guide, steps=3)
    neutra = NeuTraReparam(guide)
    model = poutine.reparam(points, config=lambda _: neutra)
    mcmc = MCMC(HMC(model, step_size=0.1, num_steps=2), num_samples=2, warmup_steps=1, disable_progbar=True)
    mcmc.run()
    samples = neutra.transform_sample(mcmc.get_samples()["z_shared_latent"])
    assert samples["z"].shape == (2, 3, 2) and bool((samples["a"] > 0).all())


def test_first_call_leaves_the_random_state():
    pyro.set_rng_seed(3)
    make_guide(check_invariance=False)()
    expected = torch.rand(3)
    pyro.set_rng_seed(3)
    make_guide(check_invariance=True)()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_invariant_at_rounding_level_after_training(dtype):
    data = DISTANCES.to(dtype)
    guide = make_guide()
    train(guide, args=(data,))
    posterior = guide.get_posterior()
    draws = posterior.sample((20,))
    assert draws.dtype == dtype
    error = invariance_error(posterior.log_prob, draws, guide.field_type)
    assert error < (1e-3 if dtype == torch.float32 else 1e-11)


def test_packing_of_several_sites():
    guide = AutoEquivariantFlow(triangle, {"z": vectors(3)}, small_flow)
    guide()
    sizes = {name: shape.numel() for name, shape in guide._unconstrained_shapes.items()}
    assert list(sizes.items()) == [("scale", 1), ("z", 6), ("sigma", 3), ("weights", 2)]
    kinds = [representation.name for representation in guide.field_type.representations]
    trivial = POINT.trivial_repr.name
    assert kinds == [trivial] + 3 * [VECTOR.name] + 5 * [trivial]
    # The group moves z alone: positions 1 to 6 of the latent.
    element = list(guide.field_type.fibergroup.testing_elements())[5]
    latent = torch.randn(12)
    moved = act(guide.field_type, element, latent)
    unpacked = {site["name"]: value for site, value in guide._unpack_latent(moved)}
    before = {site["name"]: value for site, value in guide._unpack_latent(latent)}
    rotation = torch.as_tensor(VECTOR(element), dtype=torch.float32)
    assert torch.allclose(unpacked["z"], before["z"] @ rotation.T, atol=1e-6)
    assert all(torch.equal(unpacked[name], before[name]) for name in ("scale", "sigma", "weights"))


def test_constrained_supports_and_plates():
    guide = AutoEquivariantFlow(triangle, {"z": vectors(3)}, small_flow)
    train(guide, triangle, steps=3)
    values = guide()
    assert values["z"].shape == (3, 2) and values["sigma"].shape == (3,)
    assert bool((values["sigma"] > 0).all()) and values["scale"] > 0
    assert torch.allclose(values["weights"].sum(), torch.tensor(1.0), atol=1e-5)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    guide = AutoEquivariantFlow(triangle, {"z": vectors(3)}, small_flow)
    train(guide, triangle, steps=2)
    draws = Predictive(triangle, guide=guide, num_samples=6, parallel=parallel, return_sites=["z", "sigma", "d"])()
    assert draws["z"].shape == (6, 3, 2)
    assert draws["sigma"].shape == (6, 3)


def test_quantiles_repeat_under_the_seed():
    guide = AutoEquivariantFlow(triangle, {"z": vectors(3)}, small_flow)
    guide()
    pyro.set_rng_seed(1)
    first = guide.quantiles([0.1, 0.5, 0.9])
    pyro.set_rng_seed(1)
    second = guide.quantiles(torch.tensor([0.1, 0.5, 0.9]))
    for name, value in first.items():
        assert torch.equal(value, second[name])
    assert first["z"].shape == (3, 3, 2) and first["weights"].shape == (3, 3)
    assert bool((first["sigma"][0] < first["sigma"][1]).all()) and bool((first["sigma"] > 0).all())
    assert torch.allclose(first["weights"].sum(-1), torch.ones(3), atol=1e-5)
    median = guide.median()
    assert median["z"].shape == (3, 2)
    # An invariant guide's median lies at the fixed point of the group: 5 standard errors, 1.25 % of the spread each.
    assert float(median["z"].abs().max()) < 0.1


@pytest.mark.parametrize("count", [1, 2, 5, 101])
def test_quantiles_are_torchs(count):
    """The ends are the least and the largest value; between two values by a straight line, after the constraint."""
    values, levels = torch.randn(count, 3, 2, dtype=torch.float64), torch.linspace(0, 1, 8, dtype=torch.float64)
    found = constrained_quantiles(values, levels, constraints.real)
    torch.testing.assert_close(found, torch.quantile(values, levels, dim=0))
    found = constrained_quantiles(values, levels, constraints.positive)
    torch.testing.assert_close(found, torch.quantile(values.exp(), levels, dim=0))


def test_quantiles_of_the_base():
    guide = AutoEquivariantFlow(points, {"z": vectors(3)}, lambda t: equivariant_flow(t, num_transforms=1))
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.zero_()
    found = guide.quantiles([0.05, 0.5, 0.95])
    expected = dist.Normal(0.0, 1.0).icdf(torch.tensor([0.05, 0.5, 0.95]))
    # 5 standard errors of 10 000 draws.
    assert torch.allclose(found["z"], expected[:, None, None].expand(3, 3, 2), atol=0.11)
    assert torch.allclose(found["a"], expected.exp(), rtol=0.11)


def test_neutra_with_hmc():
    guide = make_guide()
    train(guide)
    neutra = NeuTraReparam(guide)
    model = poutine.reparam(points, config=lambda _: neutra)
    mcmc = MCMC(HMC(model, step_size=0.1, num_steps=3), num_samples=4, warmup_steps=2, disable_progbar=True)
    mcmc.run()
    samples = neutra.transform_sample(mcmc.get_samples()["z_shared_latent"])
    assert samples["z"].shape == (4, 3, 2)
    assert bool((samples["a"] > 0).all())


# ---- the average over a finite group ----------------------------------------------------------------------------

TURNS = gspaces.no_base_space(group.so2_group())
FLIP = gspaces.no_base_space(group.cyclic_group(2))
REFLECTED = {"z": FieldType(FLIP, 3 * [VECTOR.restrict((0.0, 1))])}


def make_average():
    guide = AutoEquivariantFlow(points, {"z": FieldType(TURNS, 3 * [VECTOR.restrict((None, -1))])}, small_flow)
    train(guide, args=(DISTANCES.double(),), steps=20)
    guide.average_over(REFLECTED, DISTANCES.double())
    return guide


def test_average_is_invariant_under_both_groups():
    guide = make_average()
    both = FieldType(POINT, [*vectors(3).representations, POINT.trivial_repr])
    average = guide.get_posterior()
    flow = dist.TransformedDistribution(guide.get_base_dist(), guide.get_transform())
    latent = average.sample((20,))
    assert invariance_error(average.log_prob, latent, both) < 1e-11
    assert invariance_error(flow.log_prob, latent, both) > 1e-3
    turned = FieldType(FLIP, [*REFLECTED["z"].representations, FLIP.trivial_repr])
    mirrored = act(turned, FLIP.fibergroup.elements[1], latent)
    expected = torch.logaddexp(flow.log_prob(latent), flow.log_prob(mirrored)) - math.log(2)
    assert torch.allclose(average.log_prob(latent), expected)


def test_average_in_inference(tmp_path):
    guide = make_average()
    data = DISTANCES.double()
    assert all(math.isfinite(loss) for loss in train(guide, args=(data,), steps=3))
    draws = Predictive(points, guide=guide, num_samples=5, parallel=True, return_sites=["z", "d"])(data)
    assert draws["z"].shape == (5, 3, 2)
    latent = guide.get_posterior().sample((4,))
    for clone in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert torch.equal(clone.get_posterior().log_prob(latent), guide.get_posterior().log_prob(latent))


def test_wrong_averages():
    guide = AutoEquivariantFlow(points, {"z": FieldType(TURNS, 3 * [VECTOR.restrict((None, -1))])}, small_flow)
    with pytest.raises(ValueError, match="call guide"):
        guide.average_over(REFLECTED)
    guide()
    with pytest.raises(ValueError, match="finite group"):
        guide.average_over({"z": vectors(3)})
    with pytest.raises(pyro_equiflow.EquivarianceError, match="Sites that change: z"):
        guide.average_over(REFLECTED, DISTANCES, 0.1)
    assert guide.orbit is None


# ---- saving ----------------------------------------------------------------------------------------------------


def test_state_dict():
    guide = make_guide()
    train(guide, steps=3)
    latent = torch.randn(4, 7)
    expected = guide.get_posterior().log_prob(latent)
    state = guide.state_dict()
    pyro.clear_param_store()
    fresh = make_guide()
    with pytest.raises(ValueError, match="call guide"):
        fresh.load_state_dict(state)
    fresh()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.get_posterior().log_prob(latent), expected)


@pytest.mark.parametrize("called_before_loading", [False, True])
def test_param_store(tmp_path, called_before_loading):
    guide = make_guide()
    train(guide, steps=3)
    latent = torch.randn(4, 7)
    expected = guide.get_posterior().log_prob(latent)
    pyro.get_param_store().save(str(tmp_path / "store"))
    pyro.clear_param_store()
    fresh = make_guide()
    if called_before_loading:
        fresh()
        pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store"))
    fresh()
    assert torch.equal(fresh.get_posterior().log_prob(latent), expected)
    before = fresh.get_posterior().log_prob(latent).detach()
    train(fresh, steps=1)
    assert not torch.equal(fresh.get_posterior().log_prob(latent), before)


def test_parameters_of_another_guide_in_the_store():
    make_guide()()
    other = AutoEquivariantFlow(points, {"z": vectors(3)}, lambda t: equivariant_flow(t, hidden_dims=(8,)))
    # The first parameter has the same shape in both, the hidden layers have not.
    with pytest.raises(ValueError, match="clear_param_store"):
        other()


@pytest.mark.parametrize("called", [False, True])
def test_deepcopy(called):
    guide = make_guide()
    if called:
        train(guide, steps=2)
    clone = copy.deepcopy(guide)
    assert guide.model is not None and clone.model is guide.model
    if called:
        latent = torch.randn(4, 7)
        assert torch.equal(clone.get_posterior().log_prob(latent), guide.get_posterior().log_prob(latent))
        assert not {id(p) for p in clone.parameters()} & {id(p) for p in guide.parameters()}
    pyro.clear_param_store()
    train(clone, steps=1)


def test_pickle():
    guide = make_guide()
    train(guide, steps=2)
    read = pickle.loads(pickle.dumps(guide))
    assert guide.model is not None
    latent = torch.randn(4, 7)
    assert torch.equal(read.get_posterior().log_prob(latent), guide.get_posterior().log_prob(latent))
    assert read()["z"].shape == (3, 2)


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "representations, error, words",
    [
        ({"x": vectors(3)}, ValueError, "continuous latent sites"),
        ({"d": vectors(3)}, ValueError, "continuous latent sites"),
        ({"z": vectors(2)}, ValueError, "size 6"),
        ({}, ValueError, "found none"),
        ({"z": FieldType(gspaces.rot2dOnR2(4), [gspaces.rot2dOnR2(4).trivial_repr])}, ValueError, "base space"),
        (
            {
                "z": vectors(3),
                "a": FieldType(
                    gspaces.no_base_space(group.so2_group()),
                    [gspaces.no_base_space(group.so2_group()).trivial_repr],
                ),
            },
            ValueError,
            "one gspace",
        ),
        ({"z": "vector"}, TypeError, "field types"),
        ([vectors(3)], TypeError, "dict"),
    ],
    ids=["unknown", "observed", "size", "none", "base-space", "mixed", "kind", "list"],
)
def test_wrong_representations(representations, error, words):
    with pytest.raises(error, match=words):
        AutoEquivariantFlow(points, representations, small_flow)()
    with pytest.raises(error, match=words):
        check_model_invariance(points, representations)


def test_wrong_flow():
    with pytest.raises(TypeError, match="callable"):
        AutoEquivariantFlow(points, {"z": vectors(3)}, small_flow(vectors(3)))
    with pytest.raises(TypeError, match="gives a transform"):
        AutoEquivariantFlow(points, {"z": vectors(3)}, lambda field_type: None)()


def test_fresh_guide_says_what_to_do():
    guide = make_guide()
    for use in (guide.median, guide.get_posterior, guide.get_transform, guide.get_base_dist):
        with pytest.raises(ValueError, match="call guide"):
            use()


# ---- the check of models ---------------------------------------------------------------------------------------


def test_planted_wrong_symmetry_is_caught():
    guide = AutoEquivariantFlow(points, {"z": vectors(3)}, small_flow)
    with pytest.raises(pyro_equiflow.EquivarianceError, match="Sites that change: z"):
        guide(DISTANCES, 0.1)
    # A failed set-up leaves nothing half-made.
    assert guide(DISTANCES, 0.0)["z"].shape == (3, 2)
    report = check_model_invariance(points, {"z": vectors(3)}, DISTANCES, offset=0.1)
    assert not report.invariant and report.offenders == ["z"] and report.element is not None
    assert "not invariant" in str(report) and "z:" in str(report)


def test_unchecked_guide():
    guide = make_guide(check_invariance=False)
    assert guide(DISTANCES, 0.1)["z"].shape == (3, 2)
    assert guide.invariance_report is None


@pytest.mark.parametrize("planted", [False, True])
def test_likelihood_terms_count(planted):
    direction = torch.tensor([1.0, 0.2])

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        length = z @ direction if planted else z.norm(dim=-1)
        pyro.factor("f", -length.square())

    report = check_model_invariance(model, {"z": vectors(1)})
    assert report.invariant is not planted
    assert report.offenders == (["f"] if planted else [])


def test_jacobian_of_constrained_sites_counts():
    # Swapping the coordinates of (a, b) is a symmetry where both have one law, in unconstrained space too.
    space = gspaces.no_base_space(group.cyclic_group(2))
    swap = {"s": FieldType(space, [space.regular_repr])}

    def model(rates):
        s = pyro.sample("s", dist.Exponential(rates).to_event(1))
        pyro.sample("y", dist.Normal(s.sum(-1), 1.0), obs=torch.tensor(1.0))

    assert check_model_invariance(model, swap, torch.tensor([2.0, 2.0])).invariant
    assert check_model_invariance(model, swap, torch.tensor([2.0, 2.1])).offenders == ["s"]


@pytest.mark.parametrize("planted", [False, True])
def test_subsampling_scale_mask_and_randomness(planted):
    data = torch.randn(50).abs()

    def model():
        p = pyro.param("noise", torch.tensor(0.5))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        jitter = torch.rand(())  # as dropout would be
        plate = pyro.plate("data", 50, subsample_size=10)
        with plate as index, poutine.mask(mask=data[index] > 0.2), poutine.scale(scale=2.0):
            mean = z[..., 0] if planted else z.norm(dim=-1)
            pyro.sample("y", dist.Normal(mean + jitter, p), obs=data[index])

    pyro.set_rng_seed(5)
    state = torch.get_rng_state()
    report = check_model_invariance(model, {"z": vectors(1)})
    assert report.invariant is not planted
    assert torch.equal(torch.get_rng_state(), state)
    assert "noise" not in pyro.get_param_store()


def test_draws_are_distinct():
    lengths = set()

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        lengths.add(round(float(z.norm()), 4))

    check_model_invariance(model, {"z": vectors(1)}, num_samples=7)
    assert len(lengths) == 8  # the initial value and seven draws, each moved along its orbit


def test_draws_that_overflow_are_left_out():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        rate = pyro.sample("rate", dist.Exponential(1.0))
        pyro.sample("y", dist.Normal(z.norm(dim=-1), (40.0 * rate).exp()), obs=torch.tensor(1.0))

    report = check_model_invariance(model, {"z": vectors(1)}, num_samples=30)
    elements = len(probe_elements(vectors(1).fibergroup))
    assert report.invariant and report.evaluations % elements == 0 and 0 < report.evaluations < 30 * elements
    assert torch.distributions.Distribution._validate_args

    def never():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", z.sum() - math.inf)

    with pytest.raises(ValueError, match="finite log joint"):
        check_model_invariance(never, {"z": vectors(1)})


def test_double_precision_is_checked_at_its_own_level():
    report = check_model_invariance(points, {"z": vectors(3)}, DISTANCES.double(), offset=1e-5)
    assert not report.invariant and report.sites["z"].allowance < 1e-10
    assert check_model_invariance(points, {"z": vectors(3)}, DISTANCES.double()).absolute < 1e-11


# ---- evidence --------------------------------------------------------------------------------------------------


def test_evidence_of_a_conjugate_model():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.7))

    def exact():
        pyro.sample("z", dist.Normal(0.35, math.sqrt(0.5)))

    def off():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    truth = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(0.7)))
    weights = importance_weights(model, exact, num_samples=50)
    assert weights.shape == (50,)
    assert torch.allclose(weights, torch.tensor(truth), atol=1e-5)
    weights = importance_weights(model, off, num_samples=5000, batch_size=2000)
    found = evidence_estimate(weights)
    assert abs(found.log_evidence - truth) < 4 * found.log_evidence_stderr
    assert found.elbo < found.log_evidence and 0 < found.efficiency < 1
    bound, error = importance_weighted_bound(weights, 10)
    assert found.elbo < bound < truth + 4 * error
    assert importance_weighted_bound(weights, 1)[0] == pytest.approx(found.elbo)


def test_evidence_of_a_guide_with_plates():
    guide = AutoEquivariantFlow(triangle, {"z": vectors(3)}, small_flow)
    weights = importance_weights(triangle, guide, num_samples=7)
    assert weights.shape == (7,) and bool(torch.isfinite(weights).all())


def test_wrong_weights():
    with pytest.raises(ValueError, match="two at least"):
        evidence_estimate(torch.zeros(1))
    with pytest.raises(ValueError, match="NaN"):
        evidence_estimate(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="num_particles"):
        importance_weighted_bound(torch.zeros(10), 6)
    with pytest.raises(ValueError, match="num_samples"):
        importance_weights(points, make_guide(), num_samples=0)


# ---- the demo --------------------------------------------------------------------------------------------------


def test_demo_runs(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("networkx")
    script = Path(__file__).parents[1] / "tutorials" / "karate.py"
    command = [sys.executable, "-W", "error", str(script), "--steps", "3", "--draws", "2000", "--particles", "4"]
    done = subprocess.run(
        [*command, "--fits", "2", "--out", str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"4 guides, 2 fits of each, 3 steps per fit: about 1 min\n", done.stdout)
    ours, *others = [line.split() for line in done.stdout.splitlines() if line.startswith("Auto")]
    assert ours[0] == "AutoEquivariantFlow" and len(others) == 3
    rotations, reflections = map(float, ours[7:9])
    assert max(rotations, reflections) < 1e-9 and all(min(map(float, row[7:9])) > 1e-3 for row in others)
    assert (tmp_path / "karate.png").stat().st_size > 10_000
