# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # A sampler for lattice field theory
#
# A scalar field $\phi$ lives on the sites of a periodic square lattice, with the density $e^{-S(\phi)} / Z$ and the
# action
#
# $$S(\phi) = \sum_x (m^2 + 4)\, \phi_x^2 + \lambda \phi_x^4 - 2 \sum_{x, \mu} \phi_x \phi_{x + \mu},
#   \qquad m^2 = -4, \quad \lambda = 8 .$$
#
# Markov chains draw from it, but they are slow near criticality, and they do not tell $Z$. A normalizing flow gives
# independent draws with a known density $q$. Its importance weights $w = e^{-S} / q$ estimate $Z$ without bias, and a
# Metropolis test on them makes an exact sampler of any flow, however poor. How good the flow is decides only how many
# draws are wasted.
#
# The action has many symmetries: translations, the rotations and reflections of the square ($D_4$), and
# $\phi \to -\phi$. We start with a ready-made flow that has some of them, then build one that has all. The lattice is
# $4 \times 4$, where a transfer matrix gives $\log Z = 2.40513896$, so that we can judge.

# %%
import math
import os
import time

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from escnn import gspaces
from escnn import nn as enn
from pyro.ops.stats import autocorrelation, effective_sample_size
from tqdm import tqdm

from pyro_equiflow import Compose, EquivariantResidual, InvariantNormal, equivariant_actnorm, image_flow, testing
from pyro_equiflow.infer import evidence_estimate, metropolis, weighted_draws
from pyro_equiflow.logdet import Exact
from pyro_equiflow.nn import Expanded, PointwiseNonLinearity, SteerableConv, SteerableModule, weight_norm
from pyro_equiflow.plots import plot_training

torch.manual_seed(0)
smoke_test = "CI" in os.environ
side, coupling, exact_log_z = 4, 8.0, 2.40513896


# %%
def log_density(field):
    """Minus the action, from (..., 1, L, L) to (...); the term in m^2 + 4 vanishes."""
    phi = field.squeeze(-3)
    links = phi * (phi.roll(1, -1) + phi.roll(1, -2))
    return (2 * links - coupling * phi**4).sum((-2, -1))


square = gspaces.flipRot2dOnR2(4)
field_type = enn.FieldType(square, [square.trivial_repr])
fields = torch.randn(20, 1, side, side, dtype=torch.float64)
print(f"change of the action under D_4: {testing.invariance_error(log_density, fields, field_type):.0e}")

# %% [markdown]
# ## Training without data
#
# The reverse Kullback-Leibler divergence needs draws of the flow only: minimise the mean of $\log q + S$. Its negative
# is the ELBO, a lower bound of $\log Z$; the gap between them is the divergence.


# %%
def distribution(flow, dtype=torch.float32):
    noise = InvariantNormal(field_type, (side, side), scale=torch.ones(1, dtype=dtype))
    return dist.TransformedDistribution(noise, [flow])


def train(flow, steps, rate=1e-2, batch=64):
    parameters = [p for p in flow.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    q, gaps = distribution(flow), []
    start = time.process_time()
    for _ in tqdm(range(steps)):
        x = q.rsample((batch,))
        loss = (q.log_prob(x) - log_density(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        schedule.step()
        gaps.append(exact_log_z + loss.item())
    print(f"{sum(p.numel() for p in parameters)} parameters, {time.process_time() - start:.0f} CPU s")
    return gaps


def judge(flow, draws):
    x, log_weights = weighted_draws(distribution(flow.double().eval(), torch.float64), log_density, num_samples=draws)
    found, chain = evidence_estimate(log_weights), metropolis(log_weights)
    print(f"effective draws {found.efficiency:.3f}, acceptance {chain.acceptance_rate:.3f}")
    print(f"log Z {found.log_evidence:.4f} (s.e. {found.log_evidence_stderr:.4f}), exact {exact_log_z:.4f}")
    return x, log_weights, chain


steps, draws = (5, 500) if smoke_test else (500, 20_000)

# %% [markdown]
# ## Ready-made: `image_flow` on a periodic grid
#
# A field is an image with one channel. With `padding_mode="circular"` the flow commutes with $D_4$, and with
# translations by multiples of 4, the side of its coarsest cells: on this lattice, none but the identity.

# %%
couplings = image_flow(
    field_type, (side, side), padding_mode="circular", transformer="spline", hidden_dims=(16,) if smoke_test else (32,)
)
gaps = {"image_flow": train(couplings, steps)}
_ = judge(couplings, draws)

# %% [markdown]
# It works out of the box: half of the proposals are accepted, and $\log Z$ is right within its error. But an eighth of
# the draws count in importance weights, since a few weights are large. We can do better by building in what we know.
#
# ## With every symmetry built in
#
# A residual flow keeps the lattice as it is, so it can commute with *all* translations. Each block is
#
# $$\phi \mapsto \phi + W_2 * \sin(W_1 * \phi),$$
#
# periodic steerable convolutions without biases around sines: translations, $D_4$, and, as sines are odd,
# $\phi \to -\phi$. Blocks invert to a certified error, and the log-determinants of a 16-dimensional event are exact.
#
# One thing is worth a layer of our own. A log-determinant takes one backward pass a site, and on so few sites a
# convolution is faster as one dense matrix. What it computes is the `SteerableConv` inside, so its norm is bounded by
# the same rule ([07](07_own_group.ipynb) has more on such rules).


# %%
class LatticeConv(SteerableModule):
    """A periodic convolution with a 3x3 kernel, applied as one matrix over all sites."""

    def __init__(self, in_type, out_type):
        super().__init__(in_type, out_type)
        self.conv = SteerableConv(in_type, out_type, 3, padding_mode="circular", bias=False)
        sites = torch.arange(side**2).view(side, side)
        shifts = [(1 - row, 1 - column) for row in range(3) for column in range(3)]
        self.neighbours = torch.stack([sites.roll(shift, (0, 1)).flatten() for shift in shifts])

    def expanded(self):
        neighbours, here = self.neighbours, torch.arange(side**2).expand(9, -1)

        def fn(x, weight):
            out, channels = weight.shape[:2]
            matrix = weight.new_zeros(out, channels, side**2, side**2)
            matrix[:, :, here, neighbours] = weight.flatten(2).unsqueeze(-1).expand(-1, -1, -1, side**2)
            matrix = matrix.transpose(1, 2).reshape(out * side**2, channels * side**2)
            return (x.flatten(1) @ matrix.T).view(len(x), out, side, side)

        return Expanded(fn, (self.conv.filter(),))


@weight_norm.register(LatticeConv)
def norm_of_lattice_conv(module, weight, spatial_shape=None):
    return weight_norm(module.conv, weight, spatial_shape)


# %% [markdown]
# Under a Lipschitz constant a sine bends the more the larger its input, so blocks work at scale 2, and a learned scale
# ends at the field's own size, about 0.4. Actnorms serve as scales; their shift stays 0, for the change of sign.


# %%
def scale(value):
    part = equivariant_actnorm(field_type, data_init=False)
    torch.nn.init.constant_(part.log_scale, math.log(value))
    part.loc.requires_grad_(False)
    return part


def build(blocks, channels):
    hidden = enn.FieldType(square, channels // 8 * [square.regular_repr])
    parts = [scale(2.0)]
    for index in range(blocks):
        first, last = LatticeConv(field_type, hidden), LatticeConv(hidden, field_type)
        torch.nn.init.zeros_(last.conv.weight)
        net = enn.SequentialModule(first, PointwiseNonLinearity(hidden, "sin2pi"), last)
        parts.append(EquivariantResidual(field_type, net, lipschitz=0.995, log_det=Exact()))
        parts.append(scale(1.0 if index < blocks - 1 else 0.2))
    return Compose(parts)


flow = build(blocks=2 if smoke_test else 6, channels=8 if smoke_test else 24)
gaps["all symmetries"] = train(flow, steps)
x, log_weights, chain = judge(flow, draws)

# %%
figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
plot_training(gaps, smooth=1 if smoke_test else 20, ylabel="log Z - ELBO, nats", ax=axis)
axis.set_yscale("log")
plt.show()

# %% [markdown]
# About 95% effective draws with 223 parameters, and $\log Z$ to three digits behind the point. Before we believe more
# of it, the symmetries, on the trained flow: under $D_4$ by `testing`, under translations and the change of sign by
# hand.

# %%
q = distribution(flow, torch.float64)
some = x[:200]
with torch.no_grad():
    shifted = (q.log_prob(some.roll((1, 2), (-2, -1))) - q.log_prob(some)).abs().max()
    flipped = (q.log_prob(-some) - q.log_prob(some)).abs().max()
print(f"change of log q, in nats: D_4 {testing.invariance_error(q, some, field_type):.0e}, ", end="")
print(f"translation {float(shifted):.0e}, sign {float(flipped):.0e}")

# %% [markdown]
# ## Against a long Markov chain
#
# The reference is what a physicist would run first: local Metropolis, one site after the other, here on even and odd
# sites in turn, and 500 chains at once.


# %%
def local_metropolis(chains, sweeps, width=0.9):
    phi = torch.zeros(chains, 1, side, side, dtype=torch.float64)
    even = (torch.arange(side)[:, None] + torch.arange(side)) % 2
    kept = []
    for _ in tqdm(range(sweeps)):
        for parity in (0, 1):
            proposal = phi + width * (torch.rand_like(phi) - 0.5) * (even == parity)
            around = sum(phi.roll(step, axis) for step in (1, -1) for axis in (-1, -2))
            change = 2 * (proposal - phi) * around - coupling * (proposal**4 - phi**4)
            phi = torch.where(torch.rand_like(phi).log() < change, proposal, phi)
        kept.append(phi)
    return torch.stack(kept)


sweeps = 100 if smoke_test else 2000
start = time.process_time()
chains = local_metropolis(500, sweeps)[sweeps // 10 :]
print(f"{time.process_time() - start:.0f} CPU s for {chains.shape[0] * chains.shape[1]} states")

# %% [markdown]
# Three ways to the same averages: flow draws reweighted by $w$, the Metropolis chain over flow draws, and the local
# chains. Standard errors are by batches, so that they count correlations. First $\langle \phi^2 \rangle$ and $\langle
# |M| \rangle$, with $M$ the mean of the field.


# %%
def by_batches(values, weights=None, batches=50):
    """Mean and standard error of values (n, ...) by batches in order."""
    count = len(values) // batches * batches
    weights = torch.ones(len(values), dtype=values.dtype) if weights is None else weights
    shape = (batches, -1, *(1,) * (values.dim() - 1))
    weights, values = weights[:count].view(shape), values[:count].unflatten(0, (batches, -1))
    means = (weights * values).sum(1) / weights.sum(1)
    return (weights * values).sum((0, 1)) / weights.sum((0, 1)), means.std(0) / batches**0.5


weights = (log_weights - log_weights.max()).exp()
observables = {
    "phi^2": lambda field: field.square().mean((-3, -2, -1)),
    "|M|": lambda field: field.mean((-3, -2, -1)).abs(),
}
for name, observable in observables.items():
    estimates = {
        "flow, reweighted": by_batches(observable(x), weights),
        "flow, Metropolis": by_batches(observable(x[chain.indices])),
        "local chains": by_batches(observable(chains).T.flatten()),
    }
    for method, (mean, error) in estimates.items():
        print(f"{name:6s} {method:17s} {float(mean):.5f} (s.e. {float(error):.5f})")

# %% [markdown]
# Then the two-point function $G(t)$, the correlation of a field's mean over one column with that $t$ columns away, and
# what correlates in the chains themselves.


# %%
def two_point(field):
    columns = field.squeeze(-3).mean(-2)
    return torch.stack([(columns * columns.roll(t, -1)).mean(-1) for t in range(side + 1)], -1)


figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
bins = torch.linspace(-0.8, 0.8, 65).tolist()
magnetisation = chains.mean((-3, -2, -1))
left.hist(x.mean((-3, -2, -1)).numpy(), bins, density=True, color="0.75", label="flow")
left.hist(x[chain.indices].mean((-3, -2, -1)).numpy(), bins, density=True, histtype="step", label="flow, Metropolis")
left.hist(magnetisation.flatten().numpy(), bins, density=True, histtype="step", color="black", label="local chains")
left.set(xlabel="mean of the field, M", ylabel="density", ylim=(0, 2.4))
left.legend(fontsize=8)

mean, error = by_batches(two_point(x), weights)
reference, _ = by_batches(two_point(chains[::20].transpose(0, 1).flatten(0, 1)))
middle.plot(range(side + 1), reference, "o", color="black", markerfacecolor="none", markersize=9, label="local chains")
middle.errorbar(range(side + 1), mean, 2 * error, fmt="C0.", capsize=3, label="flow, reweighted, 2 s.e.")
middle.set(xlabel="t", ylabel="G(t)", xticks=range(side + 1))
middle.legend(fontsize=8)

lags = 60
right.plot(autocorrelation(x[chain.indices].mean((-3, -2, -1)))[:lags], label="flow, Metropolis")
right.plot(autocorrelation(magnetisation, 0).mean(1)[:lags], color="black", label="local chain, sweeps")
right.set(xlabel="lag", ylabel="autocorrelation of M")
right.legend(fontsize=8)
plt.show()
corrected = x[chain.indices].mean((-3, -2, -1))
print(f"a state is worth: {float(effective_sample_size(corrected[None])) / len(corrected):.2f} draws (flow), ", end="")
print(f"{float(effective_sample_size(magnetisation.T)) / magnetisation.numel():.3f} (local sweep)")

# %% [markdown]
# The three agree within two standard errors. A state of the flow's chain is worth two thirds of an independent draw;
# the local chain needs some 60 sweeps for one. On this small lattice a sweep costs almost nothing, so the local chain
# would still win a race. What the flow has over it: $Z$, and draws that remember nothing, however slow the local
# dynamics are.
#
# A few draws to look at, in the order of the chain. Where the test rejects, the field before it comes again.

# %%
figure, axes = plt.subplots(1, 10, figsize=(10, 1.3))
for axis, field in zip(axes, x[chain.indices[:10]]):
    axis.imshow(field[0], cmap="RdBu", vmin=-0.9, vmax=0.9)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## What the benchmark adds
#
# [RESULTS](../benchmarks/RESULTS.md) has larger and controlled runs of the same flow. With translations alone, at equal
# parameters, effective draws fall from 0.96 to 0.61 (three seeds, 0.47 to 0.84), with no symmetry at all to 0.17. But
# at equal *width* (eight times the parameters) translations alone reach 0.96 too: draws cost nothing in this kind of
# training, so there is no scarcity of data for $D_4$ to make good, and what it saves is parameters. At $L = 6$ the flow
# has 0.90, translations alone at equal parameters 0.73, and at $L = 8$ it has 0.84. Reaching much larger lattices takes
# more than this page shows, as effective draws fall exponentially with the volume for any flow of fixed quality.
#
# ## Where to go next
#
# - [05, implicit and residual flows](05_implicit_residual.ipynb): bounds and certified inverses of the blocks used
#   here.
# - [07, your own group, your own network](07_own_group.ipynb): rules for layers of your own, and a target where flows
#   lose modes.
# - [RESULTS](../benchmarks/RESULTS.md): rings, particles, and other targets with $\log Z$ known.
#
# References: Albergo, Kanwar and Shanahan, *Flow-based generative models for Markov chain Monte Carlo in lattice field
# theory* (arXiv 1904.12072); Nicoli et al., *Estimation of thermodynamic observables in lattice field theories with
# deep generative models* (arXiv 2007.07115); Chen et al., *Residual Flows* (arXiv 1906.02735).
