# SPDX-License-Identifier: Apache-2.0
"""Path gradients: their mean is that of Pyro's, or in closed form; they are exact where the guide is the posterior."""

import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from escnn import group, gspaces
from escnn import nn as enn
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow, AutoNormalMessenger

from pyro_equiflow import AutoEquivariantFlow, equivariant_flow
from pyro_equiflow.infer import TracePathGradient_ELBO

SPACE = gspaces.no_base_space(group.o2_group())
POINTS = enn.FieldType(SPACE, 3 * [SPACE.irrep(1, 1)])
SIDES = torch.tensor([1.0, 1.0, 1.5])


def triangle():
    z = pyro.sample("z", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    distance = (z - z.roll(1, -2)).square().sum(-1).add(1e-2).sqrt()
    pyro.sample("y", dist.Normal(distance, 0.5 + scale[..., None]).to_event(1), obs=SIDES)


def equivariant(**options):
    return AutoEquivariantFlow(
        triangle,
        {"z": POINTS},
        lambda kind: equivariant_flow(kind, num_transforms=2, hidden_dims=(8,), identity_init=False),
        **options,
    )


def plain_flow(size):
    return T.ComposeTransformModule([T.affine_coupling(size, hidden_dims=[8]), T.permute(size)])


def hierarchical():
    """One site's law rests on another's draw, and on parameters of its own; a sum of both is the second latent."""
    loc = pyro.param("loc", torch.tensor([0.3, -0.2]))
    slope = pyro.param("slope", torch.tensor(0.7))
    scale = pyro.param("spread", torch.tensor(0.4), constraint=dist.constraints.positive)
    scaled = pyro.sample("scale", dist.LogNormal(loc[0], 0.3 + scale))
    with pyro.poutine.scale(scale=1.5):  # of both sides, as in a subsampled plate
        centre = slope * scaled[..., None, None].expand(*scaled.shape, 3, 2)
        pyro.sample("z", dist.Normal(centre + loc, scale * scaled[..., None, None]).to_event(2))


def pushed():
    """A draw pushed forward by hand: the log-density of the delta is no score."""
    loc = pyro.param("loc", torch.zeros(3, 2))
    stretch = pyro.param("stretch", torch.tensor([-0.5, 0.3]))
    noise = pyro.sample("noise", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2), infer={"is_auxiliary": True})
    value = loc + noise * stretch.exp()
    density = -3 * stretch.sum()
    pyro.sample("z", dist.Delta(value, log_density=density.expand(value.shape[:-2]), event_dim=2))
    pyro.sample("scale", dist.Delta(pyro.param("at", torch.tensor(0.5), constraint=dist.constraints.positive)))


GUIDES = {
    "equivariant": equivariant,
    "equivariant, auxiliary": lambda: equivariant(auxiliary=2),
    "normal": lambda: AutoNormal(triangle),
    "multivariate": lambda: AutoMultivariateNormal(triangle),
    "flow": lambda: AutoNormalizingFlow(triangle, plain_flow),
    "hierarchical": lambda: hierarchical,
    "pushed": lambda: pushed,
}


def gradients(elbo, guide, repeats, model=triangle):
    """Gradients of all parameters, one row a repeat."""
    pyro.poutine.block(guide)()
    rows = []
    for _ in range(repeats):
        with pyro.poutine.trace(param_only=True) as caught:
            loss = elbo.differentiable_loss(model, guide)
        found = {name: site["value"].unconstrained() for name, site in caught.trace.nodes.items()}
        grads = torch.autograd.grad(loss, list(found.values()), allow_unused=True)
        pairs = zip(found.values(), grads, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]))
    return torch.stack(rows)


@pytest.mark.parametrize("case", GUIDES)
def test_mean_is_that_of_pyros_gradient(case):
    """On the same draws the two differ by the score, whose mean is zero."""
    pyro.set_rng_seed(1)
    guide = GUIDES[case]()
    guide()
    if isinstance(guide, torch.nn.Module):  # not at a symmetric start, where gradients vanish
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    repeats, found = 40, []
    for elbo in (TracePathGradient_ELBO, Trace_ELBO):
        pyro.set_rng_seed(2)
        options = {"num_particles": 400, "vectorize_particles": True, "max_plate_nesting": 0}
        found.append(gradients(elbo(**options), guide, repeats).double())
    score = found[0] - found[1]
    error = (score.std(0) / math.sqrt(repeats)).clamp_min(1e-6)
    # Each entry is Student's t of 39 degrees of freedom: none of hundreds above 5.5, their squares 1.05 on average.
    deviates = score.mean(0) / error
    assert deviates.abs().max() < 5.5 and deviates.square().mean() < 2
    assert found[1].mean(0).abs().max() > 10 * error.max()  # and there is something to see


@pytest.mark.parametrize("case", ["equivariant", "normal", "hierarchical"])
def test_particles_are_averaged(case):
    """One after another."""
    guide = GUIDES[case]()
    guide()
    pyro.set_rng_seed(4)
    single = gradients(TracePathGradient_ELBO(), guide, 3).mean(0)
    pyro.set_rng_seed(4)
    (looped,) = gradients(TracePathGradient_ELBO(num_particles=3), guide, 1)
    torch.testing.assert_close(looped, single, rtol=1e-3, atol=1e-4)


def test_gradient_of_a_normal_in_closed_form():
    """q = N(m, s^2), p = N(1, 1/2): d KL / dm = 2 (m - 1), d KL / d log s = 2 s^2 - 1."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    def guide():
        loc = pyro.param("m", torch.tensor(0.6))
        scale = pyro.param("s", torch.tensor(1.2).log())
        pyro.sample("z", dist.Normal(loc, scale.exp()))

    elbo = TracePathGradient_ELBO(num_particles=200_000, vectorize_particles=True, max_plate_nesting=0)
    (found,) = gradients(elbo, guide, 1, model)
    exact = torch.tensor([2 * (0.6 - 1), 2 * 1.44 - 1])
    # Of one draw: d/dm is 2 (z - 1) - (z - m) / s^2, of standard deviation |2 s - 1 / s|; times s e for the other.
    spread = (2 * 1.2 - 1 / 1.2) * 1.2 * 3 / math.sqrt(200_000)
    torch.testing.assert_close(found, exact, rtol=0, atol=5 * spread)


def test_no_noise_at_the_posterior():
    """Linear regression of three weights in a flow that can be its posterior: each single gradient is zero."""
    design = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, -0.5], [0.3, 0.0, 1.0], [1.0, 1.0, 1.0]]).double()
    precision = torch.eye(3).double() + design.T @ design / 0.25
    mean = torch.linalg.solve(precision, design.T @ torch.tensor([1.0, -1.0, 0.5, 0.2]).double() / 0.25)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z @ design.T, 0.5).to_event(1), obs=torch.tensor([1.0, -1.0, 0.5, 0.2]).double())

    guide = AutoMultivariateNormal(model)
    guide()
    with torch.no_grad():
        root = torch.linalg.cholesky(torch.linalg.inv(precision))
        guide.loc.copy_(mean)
        guide.scale = root.diagonal().clone()
        guide.scale_tril = root / root.diagonal()[:, None]
    noise = {elbo: gradients(elbo(), guide, 50, model).std(0).max() for elbo in (TracePathGradient_ELBO, Trace_ELBO)}
    assert noise[TracePathGradient_ELBO] < 1e-12 < 0.1 < noise[Trace_ELBO]


def test_loss_is_pyros():
    guide = equivariant()
    guide()
    losses = []
    for elbo in (Trace_ELBO, TracePathGradient_ELBO):
        for method in ("loss", "differentiable_loss", "loss_and_grads"):
            pyro.set_rng_seed(3)
            losses.append(float(torch.as_tensor(getattr(elbo(num_particles=2), method)(triangle, guide)).detach()))
    assert losses == pytest.approx(losses[:1] * 6, rel=1e-5)


def test_gradients_of_the_models_parameters():
    def model():
        z = pyro.sample("z", dist.Normal(pyro.param("prior", torch.tensor(0.5)), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.6)), 1.0))

    elbo = TracePathGradient_ELBO(num_particles=100_000, vectorize_particles=True, max_plate_nesting=0)
    elbo.loss_and_grads(model, guide)
    assert float(pyro.get_param_store()["prior"].grad) == pytest.approx(-0.1, abs=0.02)  # -(E z - prior)


def test_rows_of_a_subsampled_plate_stay():
    """The guide runs twice: its second run has the first one's rows."""
    data = torch.arange(50.0)
    seen = []

    def model():
        with pyro.plate("data", 50, subsample_size=5) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=data[rows])

    def guide():
        with pyro.plate("data", 50, subsample_size=5) as rows:
            seen.append(rows.tolist())
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * data[rows], 0.5**0.5))

    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1.0}), TracePathGradient_ELBO())
    svi.step()
    assert seen[0] == seen[1]
    # z ~ N(y / 2, 1 / 2) given y: the guide is the posterior, and no step moves it.
    assert pyro.param("slope").item() == pytest.approx(0.5, abs=1e-3)


def test_trains():
    pyro.set_rng_seed(0)
    guide = equivariant()
    svi = SVI(
        triangle,
        guide,
        pyro.optim.Adam({"lr": 1e-2}),
        TracePathGradient_ELBO(num_particles=16, vectorize_particles=True),
    )
    losses = [svi.step() for _ in range(100)]
    assert sum(losses[-20:]) < sum(losses[:20]) - 10


def test_draws_without_gradients_are_refused():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(2.0))

    def guide():
        pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))

    with pytest.raises(ValueError, match="guide: expected reparametrised draws, found site 'k' of Bernoulli"):
        TracePathGradient_ELBO().loss_and_grads(model, guide)
    with pytest.raises(TypeError, match="guide: expected a function or a module, found AutoNormalMessenger"):
        TracePathGradient_ELBO().loss_and_grads(triangle, AutoNormalMessenger(triangle))
