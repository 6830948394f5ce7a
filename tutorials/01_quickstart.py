# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Quickstart: a guide that keeps the symmetry of your posterior
#
# Some models cannot tell their latent values from rotated ones. Positions known by their distances, factors of a
# matrix, directions of a molecule: turn all of them together, and the likelihood is the same. The posterior then has
# the symmetry too,
#
# $$p(g \cdot z \mid y) = p(z \mid y) \quad \text{for every } g \text{ in a group } G,$$
#
# and spreads over the whole orbit $\{g \cdot z\}$ of everything that fits the data. A normal guide cannot do that. It
# picks one place on the orbit and is sure of a direction of which the data say nothing.
#
# A normalizing flow can, if its map $T$ commutes with a group of continuous motions:
#
# $$T(g \cdot \epsilon) = g \cdot T(\epsilon), \quad \epsilon \sim N(0, 1) \qquad \Longrightarrow \qquad q(g \cdot z) =
# q(z).$$
#
# The symmetry is then there before the first step of training, and no weight of the network can break it. Finitely
# many elements more, a reflection say, are averaged over, which is as exact. This page fits such guides in Pyro, shows
# the law at work, and helps to choose between the four kinds of transform.

# %%
import math
import os
import time
from functools import partial

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from escnn import group, gspaces
from escnn import nn as enn
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormalizingFlow

from pyro_equiflow import equivariant_flow
from pyro_equiflow.infer import AutoEquivariantFlow, check_model_invariance, evidence_estimate, importance_weights
from pyro_equiflow.plots import plot_density, plot_equivariance_error, plot_samples, plot_training
from pyro_equiflow.testing import invariance_error

smoke_test = "CI" in os.environ
steps = 5 if smoke_test else 400
pyro.set_rng_seed(0)
torch.set_num_threads(1)  # tensors are small here
pyro.settings.set(module_local_params=True)  # every guide keeps its own parameters

# %% [markdown]
# ## One beacon
#
# A ship hears a beacon. The strength of the signal tells the distance, 2 miles give or take 0.3; of the direction it
# says nothing. (The small number under the root gives it a gradient at the origin.)


# %%
def length(z):
    return z.square().sum(-1).add(1e-12).sqrt()


def beacon():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    pyro.sample("distance", dist.Normal(length(z), 0.3), obs=torch.tensor(2.0))


# %% [markdown]
# How a group acts on a latent value is said by a *field type* of escnn: a group and a list of its representations.
# Here it is $O(2)$, the rotations and reflections of the plane, and one ordinary vector, which is the representation
# `irrep(1, 1)`. Whether the model really has the symmetry is not a matter of trust:

# %%
space = gspaces.no_base_space(group.o2_group())
vector = enn.FieldType(space, [space.irrep(1, 1)])
print(check_model_invariance(beacon, {"z": vector}))

# %% [markdown]
# `AutoEquivariantFlow` is a guide like Pyro's own: it takes the model and the field types of its sites, and builds a
# flow. The flow commutes with the part of the group that is connected, here the rotations. What is left, here a
# reflection, the guide averages over: its draws and its density have the whole symmetry.
#
# By default the flow is made of couplings, which transform one part of the latent by the other. A single vector has no
# parts, and any split of it, say into $x$ and $y$, would break the symmetry; of one the default are residual steps.
# Here we choose the flow ourselves: implicit transforms, which need no split either and bend more in one step.
# Training is Pyro's ELBO and an optimizer of torch.


# %%
def fit(model, guide, steps=steps, particles=64, learning_rate=5e-3):
    """Losses of every step, and CPU seconds."""
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=0)(model, guide)
    elbo()  # guides make their parameters at the first call
    optimizer = torch.optim.Adam(guide.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, start = [], time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = elbo()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 10.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, time.process_time() - start


implicit = partial(equivariant_flow, kind="implicit", num_transforms=2, hidden_dims=(32, 32), lipschitz=0.97)
flow_guide = AutoEquivariantFlow(beacon, {"z": vector}, implicit)
normal_guide = AutoMultivariateNormal(beacon)
flow_losses, flow_seconds = fit(beacon, flow_guide)
normal_losses, _ = fit(beacon, normal_guide)
print(f"{steps} steps of the flow: {flow_seconds:.0f} s of CPU time")

# %% [markdown]
# The posterior is a ring. Below it stands beside what the two guides make of it, each with the orbit of one point:
# under $O(2)$ a circle. An invariant density has one value along it.


# %%
def log_joint(z):
    return dist.Normal(torch.zeros(2), 2.0).to_event(1).log_prob(z) + dist.Normal(length(z), 0.3).log_prob(
        torch.tensor(2.0)
    )


figure, axes = plt.subplots(1, 3, figsize=(10, 3.3), layout="constrained", sharey=True)
densities = {
    "posterior": log_joint,
    "AutoMultivariateNormal": normal_guide.get_posterior(),
    "AutoEquivariantFlow": flow_guide.get_posterior(),
}
for ax, (name, density) in zip(axes, densities.items()):
    plot_density(density, limits=(-3.5, 3.5), field_type=vector, point=(1.6, 1.2), resolution=120, ax=ax)
    ax.set_title(name)
plt.show()

# %% [markdown]
# How good is a guide? Its importance weights tell: their mean log is the ELBO, the log of their mean estimates the
# evidence $\log p(y)$, and the effective sample size is the share of draws that count. Here an integral over the
# distance gives the evidence to many digits.

# %%
r = torch.linspace(1e-6, 12, 20_001, dtype=torch.float64)
rayleigh = r / 4 * torch.exp(-r.square() / 8)  # density of the length of a vector drawn from the prior
exact = torch.trapezoid(rayleigh * dist.Normal(r, 0.3).log_prob(torch.tensor(2.0)).exp(), r).log().item()

print(f"{'':24}{'ELBO':>8}{'log evidence':>14}{'s.e.':>7}{'ESS':>7}")
for name, guide in {"AutoMultivariateNormal": normal_guide, "AutoEquivariantFlow": flow_guide}.items():
    found = evidence_estimate(importance_weights(beacon, guide, num_samples=10_000, max_plate_nesting=0))
    print(
        f"{name:24}{found.elbo:8.3f}{found.log_evidence:14.3f}{found.log_evidence_stderr:7.3f}{found.efficiency:7.1%}"
    )
print(f"{'exact':24}{'':8}{exact:14.3f}")

# %% [markdown]
# Mind the normal guide's estimate of the evidence. It is far off, and an infinite standard error says that the weights
# are too uneven to tell by how much; `evidence_estimate` warns as well. Not every fault shows in the weights, though:
# draws that never leave one side of the ring cannot know of the other. `diagnose(guide, model)` gives these figures in
# one call, with what to do.
#
# ## The law, checked
#
# `pyro_equiflow.testing` measures the promise, $|T(g \cdot \epsilon) - g \cdot T(\epsilon)|$ relative to
# $|T(\epsilon)|$, for every transform, and for yours. The figure shows it by angle of rotation, beside one of Pyro's
# own couplings. That one maps a rotated point somewhere else altogether; ours is off by rounding. How the rotations act
# on what the flow maps is the guide's `flow_type`. The guide's density, an average, is invariant under all of $O(2)$:

# %%
draws = flow_guide.get_posterior().sample((200,))
print(f"log q changes by at most {invariance_error(flow_guide.get_posterior(), draws, vector):.1e}")
angles = [group.so2_group().element(2 * math.pi * k / 12, "radians") for k in range(12)]
plain = T.affine_coupling(2, hidden_dims=[32])
figure, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
plot_equivariance_error(
    {"implicit flow of the guide": flow_guide.transform, "Pyro's affine coupling": plain},
    torch.randn(200, 2),
    field_type=flow_guide.flow_type,
    elements=angles,
    ax=ax,
)
plt.show()

# %% [markdown]
# ## Four kinds of transform
#
# | kind | map | inverse |
# |---|---|---|
# | coupling | $y_a = x_a, \quad y_b = e^{s(x_a)} x_b + t(x_a)$ | closed form |
# | IAF | $y_i = e^{s_i(x_{<i})} x_i + t_i(x_{<i})$, block by block | one network pass a block |
# | residual | $y = x + F(x)$, $\operatorname{Lip}(F) < 1$ | solved by iteration |
# | implicit | the root $y$ of $x + F(x) = y + H(y)$, both Lipschitz below 1 | solved, and so is the map itself |
#
# The first two split the latent into parts: whole vectors, never single coordinates. With `transformer="spline"` they
# bend the length of each vector by a monotone spline, in place of a scale. The last two take anything, a single
# vector too.
#
# To compare them we need a latent that can be split. Three ships hear each other: three positions, known by three
# noisy distances. The guide with nothing said, which is couplings with splines, all four kinds of flow, and two guides
# of Pyro get the same number of steps.

# %%
measured = torch.tensor([1.2, 1.5, 1.9])


def ships():
    z = pyro.sample("z", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    distances = length(z - z.roll(1, -2))
    pyro.sample("distances", dist.Normal(distances, 0.2).to_event(1), obs=measured)


def plain_flow(size):
    couplings = [T.affine_coupling(size, hidden_dims=[64, 64]) for _ in range(4)]
    return T.ComposeTransformModule([part for coupling in couplings for part in (coupling, T.permute(size))])


positions = enn.FieldType(space, 3 * [space.irrep(1, 1)])
kinds = {
    "default: splines": None,
    "coupling, affine": partial(equivariant_flow, num_transforms=4),
    "IAF": partial(equivariant_flow, kind="iaf", num_transforms=4),
    "residual": partial(equivariant_flow, kind="residual", num_transforms=4, lipschitz=0.97),
    "implicit": partial(equivariant_flow, kind="implicit", num_transforms=3, lipschitz=0.97),
}
guides = {name: AutoEquivariantFlow(ships, {"z": positions}, flow) for name, flow in kinds.items()}
guides["AutoMultivariateNormal"] = AutoMultivariateNormal(ships)
guides["AutoNormalizingFlow"] = AutoNormalizingFlow(ships, plain_flow)


# %%
def cpu_milliseconds(function, repeats=3):
    start = time.process_time()
    for _ in range(repeats):
        function()
    return 1000 * (time.process_time() - start) / repeats


curves = {}
print(f"{'':24}{'ELBO':>7}{'log ev.':>9}{'s.e.':>6}{'ESS':>6}{'params':>8}{'step':>7}{'draw':>6}{'score':>7}")
for name, guide in guides.items():
    pyro.set_rng_seed(0)
    curves[name], seconds = fit(ships, guide)
    found = evidence_estimate(importance_weights(ships, guide, num_samples=10_000, max_plate_nesting=0))
    with torch.no_grad():
        posterior = guide.get_posterior()
        draws = posterior.sample((1000,)).clone()
        draw = cpu_milliseconds(lambda p=posterior: p.sample((1000,)))
        score = cpu_milliseconds(lambda p=posterior, x=draws: p.log_prob(x))
    print(
        f"{name:24}{found.elbo:7.2f}{found.log_evidence:9.2f}{found.log_evidence_stderr:6.2f}{found.efficiency:6.0%}"
        f"{sum(p.numel() for p in guide.parameters()):8}{1000 * seconds / steps:7.1f}{draw:6.0f}{score:7.0f}"
    )
print("Step: CPU milliseconds of one training step of 64 draws. Draw, score: of 1000 draws, of 1000 given points.")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(3, 2))
shown = ("AutoMultivariateNormal", "AutoNormalizingFlow", "default: splines", "residual")
plot_training({name: curves[name] for name in shown}, smooth=min(20, steps), ylabel="negative ELBO, nats", ax=left)
left.set_ylim(top=min(20, left.get_ylim()[1]))
with torch.no_grad():
    draws = {name: guides[name].get_posterior().sample((1500,)) for name in (shown[2], shown[0])}
sides = {name: values[:, :2] - values[:, 2:4] for name, values in draws.items()}
plot_samples(sides, field_type=vector, point=sides[shown[2]][0], ax=right)
plt.show()

# %% [markdown]
# Reading the table: all kinds have the whole symmetry, and they differ in how fast they learn the shape of the
# triangle. Splines pay off here, since they can open the hole in the ring that a scale cannot. Solved transforms come
# close to that with fewer parameters, at two to four times the cost of a step; residual ones draw cheaply and score
# dearly, implicit ones do neither cheaply. With 400 steps the affine couplings and the IAF have not got far. The
# guides of Pyro cover a piece of the orbit; that is why their estimates of the evidence are low, or have no standard
# error (`inf`: a few draws outweigh the others). Scores of the averaged guides take two passes, one per mirror image;
# steps of training take one.
#
# Left: training. Right: the way from the second ship to the first in draws of two guides, with the orbit of one draw.
# The flow's draws go all the way round.
#
# ## Which one, then?
#
# | you have | take | because |
# |---|---|---|
# | a posterior | the guide's default | couplings with splines, cheap and exact both ways |
# | a guide trained on its own draws | `kind="iaf"` too | cheap on its own draws, dearer on other points |
# | one vector or irrep | the default again, or `kind="implicit"` | residual steps, no split; a few times dearer |
# | one vector, a bound of its density will do | `auxiliary=1` | couplings, with a helper beside the latent |
# | modes that the group exchanges | nothing: the guide averages | a flow is continuous, a sum need not be |
# | modes that another finite group exchanges | `guide.average_over`, `AutoOrbitMixture` | the same, for any guide |
# | images | `image_flow` | squeezes, several scales, steerable convolutions |
#
# Among solved transforms, residual ones map forwards at once and solve for the inverse; implicit ones solve both ways
# and bend more in one step. Every inverse comes with a certified error (`transform.inverse_solution(y)`).
#
# ## Where to go next
#
# - [Latent networks](02_latent_networks.ipynb): this posterior with 34 members of a karate club, and what becomes of
#   Procrustes alignment.
# - [NeuTra](08_neutra_hmc.ipynb): the guide as a change of variables for Hamiltonian Monte Carlo.
# - [README](../README.md): every class, what is exact and what is not; `pyro_equiflow.testing` for transforms of your
#   own.
#
# References: A. J. Bose, M. Brubaker, I. Kobyzev, *Equivariant Finite Normalizing Flows* (arXiv 2110.08649); J.
# Köhler, L. Klein, F. Noé, *Equivariant Flows* (arXiv 2006.02425), theorem 1; C. Lu et al., *Implicit Normalizing
# Flows* (arXiv 2103.09527).
