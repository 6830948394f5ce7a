# SPDX-License-Identifier: Apache-2.0
"""Layers set by data are set before training or never: nothing that somebody has touched is overwritten."""

import copy
import io
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow

import pyro_equiflow as pe
from tests.cases import events, field_type

KIND = "O2"


def rows(count, seed=0):
    return 2.0 + 3.0 * events("actnorm-O2", (count,), seed=seed)


def small_steps(flow, data, count=3, lr=0.05):
    """Training on one batch of 8."""
    base = dist.Normal(torch.zeros(data.shape[1]), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [flow])
    optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], lr=lr)
    for _ in range(count):
        optimizer.zero_grad()
        (-density.log_prob(data).mean()).backward()
        optimizer.step()
    return density


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items() if not name.endswith("initialized")}


def unchanged(module, before):
    return all(torch.equal(value, before[name]) for name, value in state(module).items())


LARGE = {
    "sample": lambda flow, density: density.sample((1000,)),
    "score": lambda flow, density: density.log_prob(rows(1000)),
    "forward": lambda flow, density: flow(rows(50)),
    "inverse": lambda flow, density: flow.inv(rows(50)),
    "copy": lambda flow, density: flow.with_cache(0)(rows(50)),
    "deepcopy": lambda flow, density: copy.deepcopy(flow)(rows(50)),
}


@pytest.mark.parametrize("large", LARGE)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_large_batch_after_training_on_small_ones(large, frozen):
    """Whether or not the actnorm's own parameters took part in the training."""
    kind = field_type(KIND)
    flow = pe.Compose([pe.equivariant_actnorm(kind), pe.equivariant_linear(kind)])
    if frozen:
        flow[0].requires_grad_(False)
    density = small_steps(flow, rows(8))
    x = rows(8, seed=1)
    before, score = state(flow), density.log_prob(x)
    LARGE[large](flow, density)
    assert unchanged(flow, before)
    torch.testing.assert_close(density.log_prob(x.clone()), score, rtol=0, atol=0)


def test_gradients_count_before_any_step():
    """A backward pass is where training begins: a gradient of old parameters must not meet new ones."""
    transform = pe.equivariant_actnorm(field_type(KIND))
    transform(rows(8)).square().sum().backward()
    transform(rows(50))
    assert not any(p.any() for p in transform.parameters())


TOUCHES = {
    "in place": lambda t: t.log_scale.data.fill_(0.5),
    "assignment": lambda t: setattr(t, "log_scale", torch.nn.Parameter(torch.full_like(t.log_scale, 0.5))),
    "data exchanged": lambda t: setattr(t.log_scale, "data", t.log_scale.data + 0.5),
    "a shift": lambda t: t.loc.data.fill_(0.5),
    "load": lambda t: t.load_state_dict({"log_scale": t.log_scale + 0.5, "loc": t.loc}, strict=False),
    "load of zeros": lambda t: t.load_state_dict({"log_scale": 0 * t.log_scale, "loc": 0 * t.loc}, strict=False),
    "load of one trained on small batches": lambda t: t.load_state_dict(_trained().state_dict()),
    "vector_to_parameters": lambda t: torch.nn.utils.vector_to_parameters(
        torch.full((sum(p.numel() for p in t.parameters()),), 0.5), t.parameters()
    ),
}


def _trained():
    flow = pe.equivariant_actnorm(field_type(KIND))
    with torch.enable_grad():
        small_steps(flow, rows(8))
    return flow


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("inverse", [False, True])
def test_what_is_touched_is_not_overwritten(touch, inverse):
    transform = pe.equivariant_actnorm(field_type(KIND))
    with torch.no_grad():
        TOUCHES[touch](transform)
    before = state(transform)
    (transform.inv if inverse else transform)(rows(50))
    assert unchanged(transform, before)


def test_saved_before_and_loaded_after():
    """Through a file and a new object: the layer knows that it was trained."""
    buffer = io.BytesIO()
    torch.save(_trained().state_dict(), buffer)
    buffer.seek(0)
    fresh = pe.equivariant_actnorm(field_type(KIND))
    fresh.load_state_dict(torch.load(buffer))
    before = state(fresh)
    fresh(rows(1000))
    assert unchanged(fresh, before)


def test_an_untouched_layer_is_set_after_small_looks():
    """A look at a single event, a draw without a gradient and another model's training long ago change nothing."""
    other = torch.nn.Linear(1, 1)
    other(torch.ones(1)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    transform = pe.equivariant_actnorm(field_type(KIND))
    transform(rows(1))
    with torch.no_grad():
        transform.inv(rows(3))
    fresh = copy.deepcopy(transform)
    for layer in (transform, fresh):
        y = layer(rows(50))
        assert layer.initialized and abs(y.square().mean() - 1) < 0.2


def test_a_guide_of_pyros_keeps_its_posterior():
    """One particle a step, then Predictive with a thousand in parallel: the mean stays where it was found."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 0.1).to_event(1), obs=torch.tensor([4.83, -2.0]))

    trivial = field_type("trivial")
    pair = type(trivial)(trivial.gspace, 2 * [trivial.gspace.trivial_repr])
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AutoNormalizingFlow(model, partial(pe.equivariant_flow, pair, num_transforms=1, hidden_dims=(8,)))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 5e-2}), Trace_ELBO())
    for _ in range(150):
        svi.step()
    with torch.no_grad():
        mean = torch.stack([guide()["z"] for _ in range(200)]).mean(0)
    draws = Predictive(model, guide=guide, num_samples=1000, parallel=True, return_sites=("z",))()["z"]
    torch.testing.assert_close(draws.reshape(-1, 2).mean(0), mean, atol=0.3, rtol=0)
    assert mean[0] > 3
