# SPDX-License-Identifier: Apache-2.0
"""Importance weights of models and guides against closed forms, and what they refuse; guides and subsampled plates."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import group, gspaces
from escnn.nn import FieldType
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex

from pyro_equiflow.flows import equivariant_flow
from pyro_equiflow.infer import (
    AutoEquivariantFlow,
    evidence_estimate,
    importance_weights,
    weighted_draws,
)

DATA = torch.tensor([-2.0, -1.8, 2.0, 2.2, 1.9])
WEIGHTS = torch.tensor([0.3, 0.7])
MEANS = torch.tensor([-1.0, 2.0])
FLIP = gspaces.no_base_space(group.cyclic_group(2))
SWAP = {"m": FieldType(FLIP, [FLIP.regular_repr])}


def small_flow(field_type):
    return equivariant_flow(field_type, kind="iaf", num_transforms=2, hidden_dims=(8,))


def shifted(kind="plate", mask=None, scale=1.0, mark="parallel"):
    """Two components about a common normal shift: the evidence is a sum of normal densities."""
    shift = pyro.sample("shift", dist.Normal(0.0, 0.5))
    infer = {"enumerate": mark}
    if kind == "global":
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=infer)
    with pyro.plate("data", len(DATA)):
        if kind == "plate":
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=infer)
        elif kind == "nested":
            with pyro.plate("twice", 2):
                j = pyro.sample("k", dist.Categorical(WEIGHTS), infer=infer)
                pyro.sample("x", dist.Normal(MEANS[j] + shift, 1.0), obs=DATA.expand(2, -1))
            return
        with poutine.mask(mask=True if mask is None else mask), poutine.scale(scale=scale):
            pyro.sample("y", dist.Normal(MEANS[k] + shift, 1.0), obs=DATA)


def shift_guide(*args, **kwargs):
    pyro.sample("shift", dist.Normal(0.2, 0.6))


def by_quadrature(log_likelihood):
    """log of the integral over the shift."""
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    terms = log_likelihood(grid) + dist.Normal(torch.tensor(0.0).double(), 0.5).log_prob(grid)
    return float(terms.logsumexp(0) + math.log(16 / 20_000))


def rows(grid):
    """By value of the shift, row and component."""
    return dist.Normal(MEANS.double() + grid[:, None, None], 1.0).log_prob(DATA.double()[:, None]) + WEIGHTS.log()


MASK = torch.tensor([True, False, True, True, False])
EXACT = {
    "plate": ({}, lambda grid: rows(grid).logsumexp(-1).sum(-1)),
    "global": (
        {"kind": "global"},
        lambda grid: ((rows(grid) - WEIGHTS.log()).sum(-2) + WEIGHTS.log()).logsumexp(-1),
    ),
    "nested": ({"kind": "nested"}, lambda grid: 2 * rows(grid).logsumexp(-1).sum(-1)),
    "masked": ({"mask": MASK}, lambda grid: rows(grid).logsumexp(-1)[:, MASK].sum(-1)),
}


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("nesting", [None, 3])
def test_evidence_of_enumerated_models(case, nesting):
    kwargs, log_likelihood = EXACT[case]
    exact = by_quadrature(log_likelihood)
    weights = importance_weights(shifted, shift_guide, num_samples=4000, max_plate_nesting=nesting, **kwargs)
    assert weights.shape == (4000,)
    found = evidence_estimate(weights)
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_stderr < 0.2
    # The mean of the log weights is the ELBO, of Pyro as of ours.
    elbo = TraceEnum_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=2)
    pyros = -elbo.loss(shifted, shift_guide, **kwargs)
    assert abs(found.elbo - pyros) < 6 * found.elbo_stderr


def test_scales_stand_outside_of_the_sum():
    """Where all that is tied together is scaled."""

    def model():
        shift = pyro.sample("shift", dist.Normal(0.0, 0.5))
        with poutine.scale(scale=0.5), pyro.plate("data", len(DATA)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(MEANS[k] + shift, 1.0), obs=DATA)

    exact = by_quadrature(lambda grid: 0.5 * rows(grid).logsumexp(-1).sum(-1))
    found = evidence_estimate(importance_weights(model, shift_guide, num_samples=4000))
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_stderr < 0.2
    with pytest.raises(ValueError, match="expected one scale"):
        importance_weights(shifted, shift_guide, scale=0.5)


@pytest.mark.parametrize("size", [1, 2, 300])
def test_weights_do_not_hang_on_the_batch(size):
    pyro.set_rng_seed(0)
    weights = importance_weights(shifted, shift_guide, num_samples=300, batch_size=size)
    assert weights.shape == (300,) and weights.dtype == torch.float32
    found = evidence_estimate(weights)
    assert abs(found.log_evidence - by_quadrature(EXACT["plate"][1])) < 4 * found.log_evidence_stderr


def test_each_weight_is_that_of_its_draw():
    """Impossible components among them."""
    seen = []

    def model():
        shift = pyro.sample("shift", dist.Normal(0.0, 0.5))
        seen.append(shift.reshape(-1))
        with pyro.plate("data", len(DATA)):
            k = pyro.sample(
                "k", dist.Categorical(logits=torch.tensor([-math.inf, 0.0])), infer={"enumerate": "parallel"}
            )
            pyro.sample("y", dist.Normal(MEANS[k] + shift, 1.0), obs=DATA)

    weights = importance_weights(model, shift_guide, num_samples=9, max_plate_nesting=1)
    shift = seen[-1][:, None]
    expected = dist.Normal(2.0 + shift, 1.0).log_prob(DATA).sum(-1) + dist.Normal(0.0, 0.5).log_prob(shift[:, 0])
    torch.testing.assert_close(weights, expected - dist.Normal(0.2, 0.6).log_prob(shift[:, 0]))


def test_chains():
    """A hidden Markov model with a fixed emission: the forward algorithm written out."""
    turn = torch.tensor([[0.9, 0.1], [0.4, 0.6]])

    def model():
        shift = pyro.sample("shift", dist.Normal(0.0, 0.5))
        k = 0
        for t in pyro.markov(range(len(DATA))):
            k = pyro.sample(f"k{t}", dist.Categorical(Vindex(turn)[k]), infer={"enumerate": "parallel"})
            pyro.sample(f"y{t}", dist.Normal(MEANS[k] + shift, 1.0), obs=DATA[t])

    def forward(grid):
        log, emit = turn.log().double(), rows(grid) - WEIGHTS.log()
        alpha = log[0] + emit[:, 0]
        for t in range(1, len(DATA)):
            alpha = (alpha[:, :, None] + log).logsumexp(1) + emit[:, t]
        return alpha.logsumexp(-1)

    found = evidence_estimate(importance_weights(model, shift_guide, num_samples=4000))
    assert abs(found.log_evidence - by_quadrature(forward)) < 4 * found.log_evidence_stderr < 0.2


@pytest.mark.parametrize("mark", ["parallel", "sequential", None])
def test_discrete_sites_of_the_guide_are_drawn(mark):
    """Weights p / q of the draws themselves; the evidence is the same."""

    def guide():
        pyro.sample("shift", dist.Normal(0.2, 0.6))
        with pyro.plate("data", len(DATA)):
            chances = (dist.Normal(MEANS, 1.0).log_prob(DATA[:, None]) + WEIGHTS.log()).softmax(-1)
            pyro.sample("k", dist.Categorical(chances), infer={"enumerate": mark})

    weights = importance_weights(shifted, guide, num_samples=20_000, batch_size=5000).double().exp()
    # Unlikely assignments weigh most, in lumps that a Pareto tail does not fit: the weights' own deviation it is.
    stderr = float(weights.std() / weights.mean()) / 20_000**0.5
    assert abs(float(weights.mean().log()) - by_quadrature(EXACT["plate"][1])) < 4 * stderr < 0.2


# ---- what is no importance weight ------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["sequential", None])
def test_discrete_sites_that_nothing_sums_out(mark):
    with pytest.raises(ValueError, match="found 'k' in neither: it would be drawn from its prior; mark it"):
        importance_weights(shifted, shift_guide, mark=mark)


def test_latent_sites_that_the_guide_leaves_out():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("a", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="found 'b' in neither.*give it a site in the guide"):
        importance_weights(model, guide)
    sampled = poutine.infer_config(model, config_fn=lambda s: {"enumerate": "parallel", "num_samples": 5})
    with pytest.raises(ValueError, match="found 'b' in neither"):
        importance_weights(sampled, guide)


def test_sites_that_the_model_does_not_have():
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    def guide(extra, **infer):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample(extra, dist.Normal(0.0, 1.0), infer=infer)

    for name, words in (("b", "not there"), ("y", "observed")):
        with pytest.raises(ValueError, match=f"found '{name}', which is {words}"):
            importance_weights(lambda _: model(), guide, name)
    marked = importance_weights(lambda _: model(), lambda name: guide(name, is_auxiliary=True), "b")
    assert marked.shape == (1000,)


def test_scaled_and_masked_guides():
    def model(rows=True):
        with pyro.plate("rows", 5), poutine.mask(mask=rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5), poutine.mask(mask=rows):
            pyro.sample("y", dist.Normal(z, 1.0), obs=DATA)

    def guide(rows=None):
        with pyro.plate("rows", 5), poutine.mask(mask=True if rows is None else rows):
            pyro.sample("z", dist.Normal(DATA / 2, 0.5**0.5))

    exact = dist.Normal(0.0, 2.0**0.5).log_prob(DATA)
    assert torch.allclose(importance_weights(model, guide), exact.sum().expand(1000), atol=1e-4)
    assert torch.allclose(importance_weights(model, guide, MASK), exact[MASK].sum().expand(1000), atol=1e-4)
    with pytest.raises(ValueError, match="expected one mask of the latent site 'z'"):
        importance_weights(lambda rows: model(rows), lambda rows: guide(), MASK)
    with pytest.raises(ValueError, match="'z' of scale 1"):
        importance_weights(model, poutine.scale(guide, 0.1))


def subsampled(size=2, local=False):
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", 5, subsample_size=size) as index:
        mean = m.sum(-1)
        if local:
            mean = mean + pyro.sample("shift", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=DATA[index])


def test_subsampled_plates():
    def guide(*args):
        pyro.sample("m", dist.Normal(torch.zeros(2), 3.0).to_event(1))

    with pytest.raises(ValueError, match="the whole of plate 'data' at site 'y', 5 rows, found a subsample of 2"):
        importance_weights(subsampled, guide)
    total = torch.cat([torch.eye(5) + 18, DATA[:, None]], 1)
    exact = dist.MultivariateNormal(torch.zeros(5), total[:, :5]).log_prob(DATA)
    found = evidence_estimate(importance_weights(subsampled, guide, 5, num_samples=50_000, batch_size=50_000))
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_stderr < 0.2


@pytest.mark.parametrize("nesting, error", [(-1, ValueError), (1.5, TypeError), ("1", TypeError)])
def test_wrong_nesting(nesting, error):
    with pytest.raises(error, match="max_plate_nesting: expected"):
        importance_weights(shifted, shift_guide, max_plate_nesting=nesting)


# ---- modes and weights -----------------------------------------------------------------------------------------


def test_flows_are_evaluated():
    """Log-determinants of 20 entries are random in training; exponentials of unbiased log weights are biased."""
    space = FieldType(FLIP, 10 * [FLIP.regular_repr])
    flow = equivariant_flow(space, kind="residual", num_transforms=1, hidden_dims=(8,), identity_init=False)
    density = dist.TransformedDistribution(dist.Normal(torch.zeros(20), 1.0).to_event(1), [flow])
    modes = []

    def target(x):
        modes.append(flow.training)
        return -x.square().sum(-1) / 2

    flow.train()
    x, log_weights = weighted_draws(density, target, num_samples=4)
    assert flow.training and modes == [True]  # the target sees what it would see
    flow.eval()
    torch.testing.assert_close(log_weights, target(x) - density.log_prob(x), atol=1e-4, rtol=0)


def test_guides_are_evaluated():
    data = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))

    def model():
        m = pyro.sample("m", dist.Normal(torch.zeros(10, 2), 3.0).to_event(2))
        pyro.sample("y", dist.Normal(m, 1.0).to_event(2), obs=data)

    kinds = {"m": FieldType(FLIP, 20 * [FLIP.trivial_repr])}
    guide = AutoEquivariantFlow(
        model, kinds, lambda t: equivariant_flow(t, kind="residual", num_transforms=1, identity_init=False)
    )
    guide()
    pyro.set_rng_seed(0)
    first = importance_weights(model, guide, num_samples=5, max_plate_nesting=0)
    pyro.set_rng_seed(0)
    guide.eval()
    second = importance_weights(model, guide, num_samples=5, max_plate_nesting=0)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
    guide.train()
    importance_weights(model, guide, num_samples=5, max_plate_nesting=0)
    assert all(module.training for module in guide.modules())


def test_impossible_weights_alone():
    with pytest.raises(ValueError, match="log_weights: expected one above -inf at least"):
        evidence_estimate(torch.full((3,), -math.inf))


# ---- guides ----------------------------------------------------------------------------------------------------


def test_latents_in_a_subsampled_plate_are_refused():
    """The guide would hold two values, and take them for other rows at each step."""
    guide = AutoEquivariantFlow(subsampled, SWAP, small_flow)
    words = "found 'shift' in plate 'data', 2 of 5 rows.*conditional flow"
    for _ in range(2):  # a failed first call leaves nothing half-made
        with pytest.raises(ValueError, match=words):
            guide(2, True)
    svi = SVI(subsampled, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    with pytest.raises(ValueError, match=words):
        svi.step(2, True)
    assert guide(5, True)["shift"].shape == (5,)

    def given_rows():
        with pyro.plate("data", 5, subsample=torch.tensor([1, 3])):
            pyro.sample("m", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="found 'm' in plate 'data', 2 of 5 rows"):
        AutoEquivariantFlow(given_rows, SWAP)()


def test_subsamples_of_data_alone_work():
    guide = AutoEquivariantFlow(subsampled, SWAP, small_flow)
    svi = SVI(subsampled, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(3))


def test_weights_of_a_mixtures_guide():
    """The guide of the components, the assignments summed out: evidence by a grid over both means."""

    @config_enumerate
    def model():
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", 5):
            k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("y", dist.Normal(Vindex(m)[..., k], 1.0), obs=DATA)

    guide = AutoEquivariantFlow(poutine.block(model, hide=["k"]), SWAP, small_flow, init_scale=1.0)
    guide()
    found = evidence_estimate(importance_weights(model, guide, num_samples=20_000, batch_size=5000))
    grid = torch.linspace(-12, 12, 601)
    m = torch.cartesian_prod(grid, grid).double()
    joint = dist.Normal(torch.tensor(0.0).double(), 2.0).log_prob(m).sum(-1)
    for y in DATA:
        joint = joint + dist.Normal(m, 1.0).log_prob(y).logsumexp(-1) - math.log(2)
    exact = float(joint.logsumexp(0)) + 2 * math.log(24 / 600)
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_stderr < 0.4
