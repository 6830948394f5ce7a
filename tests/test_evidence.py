# SPDX-License-Identifier: Apache-2.0
"""Weighted draws and the Metropolis correction: against closed forms, a loop written out, exact transition matrices."""

import math

import pyro.distributions as dist
import pytest
import torch
from escnn import group

import pyro_equiflow as pe
from pyro_equiflow.infer import evidence_estimate, metropolis, weighted_draws


def loop(log_weights, uniform):
    """Independence Metropolis as it is written in books."""
    state, states = 0, [0]
    for j in range(1, len(log_weights)):
        if uniform[j] < math.exp(min(0.0, log_weights[j] - log_weights[state])):
            state = j
        states.append(state)
    return states


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 1000])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_chain_is_the_loops(count, spread):
    for seed in range(20 if count < 10 else 3):
        torch.manual_seed(seed)
        log_weights = spread * torch.randn(count, dtype=torch.float64)
        state = torch.get_rng_state()
        chain = metropolis(log_weights)
        torch.set_rng_state(state)
        expected = loop(log_weights.tolist(), (1 - torch.rand(count, dtype=torch.float64)).tolist())
        assert chain.indices.tolist() == expected
        assert chain.acceptance_rate == pytest.approx(sum(a != b for a, b in zip(expected, expected[1:])) / (count - 1))


def test_chain_has_the_targets_law_and_the_exact_acceptance():
    """Four states, q and p known: frequencies are p's, transitions those of the exact matrix."""
    q, p = torch.tensor([0.4, 0.3, 0.2, 0.1]).double(), torch.tensor([0.1, 0.2, 0.1, 0.6]).double()
    draws = torch.multinomial(q, 200_000, replacement=True)
    chain = metropolis((p / q).log()[draws] + 5.0)  # a constant factor does not matter
    states = draws[chain.indices]
    ratio = (p / q)[None, :] / (p / q)[:, None]
    transition = q * ratio.clamp(max=1)
    acceptance = float(p @ transition.sum(1))  # a draw may be accepted and look like the state before
    # Second eigenvalue of the chain: how many states one independent draw is worth.
    kernel = transition + torch.diag(1 - transition.sum(1))
    slow = float(torch.linalg.eigvals(kernel).real.sort().values[-2])
    error = math.sqrt(0.25 * (1 + slow) / (1 - slow) / len(states))
    assert (torch.bincount(states, minlength=4) / len(states) - p).abs().max() < 4 * error
    assert abs(chain.acceptance_rate - acceptance) < 4 * error
    moves = torch.bincount(4 * states[:-1] + states[1:], minlength=16).view(4, 4).double()
    torch.testing.assert_close(moves / moves.sum(1, keepdim=True), kernel, rtol=0, atol=0.02)


def test_impossible_draws_are_left():
    inf = math.inf
    assert metropolis(torch.tensor([-inf, 0.0, -inf, -inf])).indices.tolist() == [0, 1, 1, 1]
    assert metropolis(torch.tensor([-inf, -inf, 0.0])).indices.tolist() == [0, 0, 2]
    with pytest.raises(ValueError, match="NaN"):
        metropolis(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="two at least"):
        metropolis(torch.zeros(1))


def test_weights_of_a_flow():
    """log Z of a normal density of other width, through a flow, in batches; the flow's inverse is not called."""
    kind = pe.particle_type(3, group.o2_group().irrep(1, 1))
    flow = pe.equivariant_residual(kind, identity_init=False, lipschitz=0.5, tolerance=1e-12, max_steps=1)
    base = pe.InvariantNormal(kind)
    density = dist.TransformedDistribution(base, [flow, pe.MeanFreePositions(3, 2, cache_size=1)])
    seen = []
    draws, log_weights = weighted_draws(
        density,
        lambda x: -x.square().sum((-2, -1)) / 2 / 0.81,
        num_samples=4100,
        batch_size=2000,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert draws.shape == (4100, 3, 2) and log_weights.shape == (4100,) and not log_weights.requires_grad
    assert seen == [(2000, 4100), (4000, 4100), (4100, 4100)]
    found = evidence_estimate(log_weights)
    exact = 2 * math.log(2 * math.pi * 0.81)
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_stderr < 0.1


@pytest.mark.parametrize("options, message", [
    ({"num_samples": 0}, "num_samples: expected a positive integer, found 0"),
    ({"distribution": dist.Normal(torch.zeros(2), 1.0)}, r"distribution: expected batch shape \(\), found \(2,\)"),
    ({"log_density": lambda x: x.sum()}, r"log_density: expected shape \(1000,\), found \(\)"),
])  # fmt: skip
def test_refused(options, message):
    arguments = {"distribution": dist.Normal(0.0, 1.0), "log_density": lambda x: -x.square(), **options}
    with pytest.raises(ValueError, match=message):
        weighted_draws(arguments.pop("distribution"), arguments.pop("log_density"), **arguments)


def test_draws_outside_the_target_weigh_nothing():
    """Even where the distribution's own density is no number."""

    class Overflowing(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value).where(value < 1, -math.inf)

    q = Overflowing(torch.tensor(0.0).double(), 1.0)
    weights = weighted_draws(q, lambda x: (-x.square() / 2).where(x < 1, -math.inf), num_samples=20_000).log_weights
    found = evidence_estimate(weights)
    exact = math.log(math.sqrt(2 * math.pi) * 0.8413447)
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_stderr < 0.05
