# SPDX-License-Identifier: Apache-2.0
"""The patterns of the page on plates, against exact answers: rows' posteriors, and mixtures summed by hand."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import group, gspaces
from escnn import nn as enn
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex

from pyro_equiflow import (
    AutoEquivariantFlow,
    InvariantNormal,
    TracePathGradient_ELBO,
    conditional_equivariant_coupling,
    diagnose,
    equivariant_flow,
)
from pyro_equiflow.testing import act

SPACE = gspaces.no_base_space(group.o2_group())
LATENT = enn.FieldType(SPACE, 2 * [SPACE.irrep(1, 1)])
SEEN = enn.FieldType(SPACE, 3 * [SPACE.irrep(1, 1)])
MIXING = torch.tensor([[1.0, 0.0], [0.5, 1.0], [-0.5, 1.0]])


def model(data, size=None):
    with pyro.plate("data", len(data), subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        mean = (MIXING @ z.unflatten(-1, (2, 2))).flatten(-2)
        pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=data[rows])


class RowGuide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.flow = torch.nn.ModuleList(
            conditional_equivariant_coupling(LATENT, SEEN, hidden_dims=(32,), split=[kept]) for kept in (0, 1, 0)
        )
        self.base = InvariantNormal(LATENT)

    def posterior(self, data):
        return dist.ConditionalTransformedDistribution(self.base, list(self.flow)).condition(data)

    def forward(self, data, size=None):
        pyro.module("rows", self)
        with pyro.plate("data", len(data), subsample_size=size) as rows:
            pyro.sample("z", self.posterior(data[rows]))


def rows(count):
    return (MIXING @ torch.randn(count, 2, 2) + 0.5 * torch.randn(count, 3, 2)).flatten(1)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TracePathGradient_ELBO])
def test_rows_posteriors(elbo):
    """A hundred thousand rows, two vectors each: ELBO, means and covariances beside the exact normal's."""
    data, steps = rows(100_000), 150
    guide = RowGuide()
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 2e-2, "lrd": 0.02 ** (1 / steps)}), elbo())
    for _ in range(steps):
        svi.step(data, size=64)
    precision = torch.eye(2) + MIXING.T @ MIXING / 0.25
    gain = torch.linalg.solve(precision, MIXING.T / 0.25)
    evidence = dist.MultivariateNormal(torch.zeros(6), torch.kron(MIXING @ MIXING.T + torch.eye(3) / 4, torch.eye(2)))
    with torch.no_grad():
        # The divergence of all rows: an average over 100 000 of them, to 0.003 nats.
        gap = float(evidence.log_prob(data).mean()) + Trace_ELBO().loss(model, guide, data) / len(data)
        assert 0 < gap < 0.2
        new = rows(500)
        draws = guide.posterior(new).sample((2000,))
    # A divergence of d nats is a mean off by less than sqrt(2 d) of its standard deviations; draws add 1 in 45.
    exact = (gain @ new.unflatten(-1, (3, 2))).flatten(-2)
    spread = torch.linalg.inv(precision).diagonal().sqrt().repeat_interleave(2)
    off = ((draws.mean(0) - exact) / spread).square().mean().sqrt()
    assert off < math.sqrt(2 * 0.2)
    assert off < 0.2 * (exact / spread).square().mean().sqrt()
    assert ((draws.std(0).mean(0) / spread).log().abs() < 0.2).all()


def test_rows_turn_together():
    """q(g z | g y) = q(z | y), to rounding, of an untrained guide as well."""
    guide = RowGuide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    data, z = rows(50), torch.randn(50, 4)
    for element in SPACE.fibergroup.testing_elements():
        turned = guide.posterior(act(SEEN, element, data)).log_prob(act(LATENT, element, z))
        torch.testing.assert_close(turned, guide.posterior(data).log_prob(z), rtol=0, atol=1e-4)


def test_rows_draw_noise_of_their_own():
    same = torch.ones(3, 6)
    draws = poutine.trace(RowGuide()).get_trace(same).nodes["z"]["value"]
    assert draws.shape == (3, 4) and (draws[0] - draws[1]).abs().min() > 1e-3


def test_vectorized_particles():
    """The ELBO of a fixed guide, particles side by side or one after another."""
    data, guide = rows(1000), RowGuide()
    found = []
    for vectorized in (False, True):
        elbo = Trace_ELBO(num_particles=20, vectorize_particles=vectorized, max_plate_nesting=1)
        found.append(elbo.loss(model, guide, data) / 1000)
    assert found[0] == pytest.approx(found[1], abs=0.2)


def test_weights_of_few_rows():
    """Evidence of 5 rows by a guide that does not know them yet; a subsample is refused."""
    data = rows(5)
    exact = dist.MultivariateNormal(torch.zeros(6), torch.kron(MIXING @ MIXING.T + torch.eye(3) / 4, torch.eye(2)))

    class Wide(RowGuide):
        def posterior(self, data):
            gain = torch.linalg.solve(torch.eye(2) + MIXING.T @ MIXING / 0.25, MIXING.T / 0.25)
            return dist.Normal((gain @ data.unflatten(-1, (3, 2))).flatten(-2), 0.5).to_event(1)

    report = diagnose(Wide(), model, data, num_samples=4000)
    truth = float(exact.log_prob(data).sum())
    assert report.trustworthy and abs(report.estimate.log_evidence - truth) < 4 * report.estimate.log_evidence_stderr
    with pytest.raises(ValueError, match="subsample_size=None"):
        diagnose(Wide(), model, data, size=2)


def test_the_automatic_guide_names_the_pattern():
    guide = AutoEquivariantFlow(model, {"z": enn.FieldType(SPACE, 4 * 2 * [SPACE.irrep(1, 1)])})
    with pytest.raises(ValueError, match=r"'z' in plate 'data', 8 of 100 rows.*conditional flow.*page \"Plates\""):
        guide(rows(100), size=8)


# ---- discrete sites -----------------------------------------------------------------------------------------------

EXCHANGE = gspaces.no_base_space(group.cyclic_group(2))
LOCATIONS = enn.FieldType(EXCHANGE, [EXCHANGE.regular_repr])
DATA = torch.tensor([-2.2, -1.8, 2.1, 1.4, 2.6, -1.1])


@config_enumerate
def mixture(size=None):
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(DATA), subsample_size=size) as index:
        k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("y", dist.Normal(Vindex(m)[..., k], 0.7), obs=DATA[index])


def by_hand(size=None):
    """The same with its assignments summed out in closed form."""
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(DATA), subsample_size=size) as index:
        halves = dist.Categorical(torch.ones(2) / 2)
        pyro.sample("y", dist.MixtureSameFamily(halves, dist.Normal(m, 0.7)), obs=DATA[index])


def exchangeable(model):
    flow = partial(equivariant_flow, num_transforms=2, split_by="irreps", hidden_dims=(8,))
    return AutoEquivariantFlow(model, {"m": LOCATIONS}, flow)


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("vectorized", [False, True])
def test_mixture_is_that_summed_by_hand(size, vectorized):
    """Step by step the same losses and the same weights at the end, from one seed; the check passes on both."""
    losses, guides, start = [], [], {}
    options = {"num_particles": 3, "vectorize_particles": vectorized, "max_plate_nesting": 1}
    for target, elbo in ((mixture, TraceEnum_ELBO), (by_hand, Trace_ELBO)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = exchangeable(poutine.block(target, hide=["k"]))
        guide(size)
        assert guide.invariance_report.invariant
        if start:  # the model's own draws came before the weights'
            guide.load_state_dict(start)
        start = start or copy.deepcopy(guide.state_dict())
        pyro.set_rng_seed(1)
        svi = SVI(target, guide, pyro.optim.SGD({"lr": 1e-3}), elbo(**options))
        losses.append([svi.step(size) for _ in range(5)])
        guides.append(guide)
    assert guides[0].invariance_report.summed == ("k",) and guides[1].invariance_report.summed == ()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-3)
    for ours, theirs in zip(guides[0].parameters(), guides[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_unequal_weights_are_no_symmetry():
    @config_enumerate
    def uneven():
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", len(DATA)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("y", dist.Normal(Vindex(m)[..., k], 0.7), obs=DATA)

    with pytest.raises(ValueError, match="Sites that change: k . y"):
        exchangeable(poutine.block(uneven, hide=["k"]))()
