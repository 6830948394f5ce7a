# SPDX-License-Identifier: Apache-2.0
"""Far from the data maps grow like linear ones: one outlier does not ruin a likelihood."""

import functools
import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import TransformedDistribution

import pyro_equiflow as pe
from tests.cases import CASES, events, field_type, randomize

FAR = (10.0, 1e3, 1e6)
# Volumes add no mathematics of their own; Lipschitz networks grow linearly by construction.
PLACES = [
    *(case for case in CASES if not case.endswith("-space") and not case.startswith(("residual", "implicit"))),
    *("coupling-SO3-space", "residual-O2", "implicit-SO3"),
]


def length(x, dimensions):
    return x.flatten(x.dim() - dimensions).double().norm(dim=-1)


@pytest.mark.parametrize("case", PLACES)
def test_growth_is_at_most_linear(case):
    """Homogeneous maps of degree one have one ratio everywhere; quadratic ones gain a factor 1000 in the last step."""
    transform, x = CASES[case]().eval(), events(case, (6,))
    solved = any(isinstance(part, (pe.EquivariantResidual, pe.EquivariantImplicit)) for part in transform.modules())
    for function in (transform._call_and_ladj,) if solved else (transform._call_and_ladj, transform._inverse_and_ladj):
        ratios = []
        for scale in FAR:
            far = (scale * x).requires_grad_()
            y, ladj = function(far)
            loss = ladj.sum() - y.square().sum() / scale**2
            gradients = torch.autograd.grad(loss, [far, *transform.parameters()], allow_unused=True)
            for tensor in (y, ladj, *(g for g in gradients if g is not None)):
                assert tensor.isfinite().all()
            ratios.append(length(y.detach(), transform.event_dim) / length(far.detach(), transform.event_dim))
        assert (ratios[2] < 3 * ratios[1] + 1e-3).all() and (ratios[1] < 100 * ratios[0] + 1e-3).all()


CONTINUOUS = ("SO2", "O2", "SO3", "O3")
BUILT = {
    "affine": pe.equivariant_flow,
    "spline": functools.partial(pe.equivariant_flow, transformer="spline"),
    "iaf": functools.partial(pe.equivariant_flow, kind="iaf"),
    "iaf-backwards": lambda *args, **kwargs: pe.Inverse(pe.equivariant_flow(*args, kind="iaf", **kwargs)),
}


@pytest.mark.parametrize("name", [*CONTINUOUS, "trivial", "C4", "D3", "octahedral"])
@pytest.mark.parametrize("built", BUILT)
def test_whole_flows_with_wild_weights(built, name):
    """Stacks: powers of powers would show here first. Three scales of at most exp(3) may all be reached."""
    torch.manual_seed(0)
    kind = field_type(name)
    flow = randomize(BUILT[built](kind, num_transforms=3, hidden_dims=(16,)), std=0.5).eval()
    x = torch.randn(20, kind.size)
    for function in (flow._call, flow._inverse):
        ratios = [length(function(scale * x), 1) / length(scale * x, 1) for scale in (1.0, *FAR)]
        assert all((ratio < 100 * math.exp(9)).all() for ratio in ratios)


@pytest.mark.filterwarnings("ignore::pyro_equiflow.PrecisionWarning")  # a million times as far out it may well be said
@pytest.mark.parametrize("name, transformer", [("O2", "spline"), ("SO2", "affine"), ("SO3", "affine")])
def test_far_points_after_training(name, transformer):
    """The log-density falls with the square of the distance, at a rate that data of order one could have taught."""
    torch.manual_seed(0)
    kind = field_type(name)
    flow = pe.equivariant_flow(kind, num_transforms=3, transformer=transformer, hidden_dims=(32,))
    q = TransformedDistribution(pe.InvariantNormal(kind), [flow])
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    stretch = 1 + torch.arange(kind.size) % 3

    def data(count):
        x = torch.randn(count, kind.size)
        return x * stretch * (0.5 + x[:, :1].square())

    for _ in range(40):
        optimizer.zero_grad()
        loss = -q.log_prob(data(128)).mean()
        loss.backward()
        optimizer.step()
    x = data(200)
    near = q.log_prob(x).detach()
    for scale in FAR:
        far = (scale * x).requires_grad_()
        score = q.log_prob(far)
        assert score.isfinite().all() and torch.autograd.grad(score.sum(), far)[0].isfinite().all()
        assert (score > 1e3 * scale**2 * near.clamp(max=-1.0)).all()


def test_an_outlier_leaves_a_mean_likelihood_alive():
    """One event of a thousand at ten times the distance, in an untrained flow with random weights."""
    torch.manual_seed(0)
    kind = field_type("SO3")
    flow = pe.equivariant_flow(kind, num_transforms=3, hidden_dims=(16,), identity_init=False)
    q = TransformedDistribution(dist.Normal(torch.zeros(kind.size), 1.0).to_event(1), [flow.inv])
    x = torch.randn(1000, kind.size)
    before = q.log_prob(x).mean()
    x[0] *= 10
    assert q.log_prob(x).mean() - before > -0.5 * before.abs() - 10
