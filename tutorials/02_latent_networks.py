# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Latent-space networks without Procrustes
#
# A social network can be read as a map. Hoff, Raftery and Handcock (2002) give every member $i$ a position $z_i$ in a
# plane that nobody sees, and let ties become rarer with distance:
#
# $$\operatorname{logit} P(y_{ij} = 1) = a - |z_i - z_j|, \qquad z_i \sim N(0, 2^2 I), \quad a \sim N(0, 2^2).$$
#
# The likelihood knows distances only. Turn the map, or look at it in a mirror, and nothing changes: the posterior of
# $z = (z_1, \dots, z_n)$ is invariant under $O(2)$. The usual remedy is *Procrustes*: draw from the posterior, then
# turn every draw towards a reference, so that the draws lie on top of each other. It looks harmless. This page shows
# what it does, fits a guide that carries the symmetry and needs no alignment, and sorts the questions one may ask
# into those that never needed it and those whose answer it invents.

# %%
import inspect
import math
import os

import karate  # tutorials/karate.py: the model and the network
import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.patches import Ellipse
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_equiflow import align, field_type
from pyro_equiflow.infer import AutoEquivariantFlow, check_model_invariance, diagnose
from pyro_equiflow.plots import plot_samples, plot_training

smoke_test = "CI" in os.environ
steps, num_draws = (5, 200) if smoke_test else (800, 4000)
pyro.set_rng_seed(0)
torch.set_num_threads(1)  # tensors are small here
pyro.settings.set(module_local_params=True)  # every guide keeps its own parameters

# %% [markdown]
# ## The network and the model
#
# Zachary (1977) watched a karate club of 34 members break up. Its instructor, "Mr. Hi", and its president fell out,
# and every member went with one of them. Ties are friendships from before that.

# %%
network = karate.load_network()
members = len(network.graph)
instructor, president = 0, members - 1
stayed = torch.tensor([network.graph.nodes[i]["club"] == "Mr. Hi" for i in network.graph])
print(f"{members} members, {int(network.tied.sum())} ties; {int(stayed.sum())} went with the instructor")
print(inspect.getsource(karate.model))

# %% [markdown]
# A field type says how a group acts on the 68 coordinates: 34 vectors that turn together, under $O(2)$, the rotations
# and reflections of the plane. The offset $a$ is left out, which means that nothing acts on it. The model has the
# symmetry that we claim:

# %%
points = field_type("O(2)", vectors=members)
print(check_model_invariance(karate.model, {"z": points}, network))

# %% [markdown]
# ## Two guides
#
# Mean-field inference with `AutoNormal` is what one would try first. Beside it stands an `AutoEquivariantFlow` with
# nothing more said: four couplings with splines between whole vectors, each of which commutes with rotations, and an
# average over a reflection.


# %%
def fit(guide, learning_rate, particles=64):
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=0)(karate.model, guide)
    elbo(network)  # guides make their parameters at the first call
    optimizer = torch.optim.Adam(guide.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = elbo(network)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 10.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


normal = AutoNormal(karate.model)
flow = AutoEquivariantFlow(karate.model, {"z": points})
pyro.set_rng_seed(0)
curves = {"AutoNormal": fit(normal, 3e-2), "AutoEquivariantFlow": fit(flow, 5e-3)}

# %%
figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
plot_training(curves, smooth=min(20, steps), ylabel="negative ELBO, nats", ax=ax)
if not smoke_test:
    ax.set_ylim(215, 300)
plt.show()

# %% [markdown]
# How good are they? `diagnose` gives the evidence lower bound, says whether more than that can be believed, and what to
# do. In 69 dimensions a few draws outweigh all others, so the bound is what can be compared:

# %%
for guide in (normal, flow):
    print(diagnose(guide, karate.model, network, num_samples=num_draws, max_plate_nesting=0), end="\n\n")

# %% [markdown]
# Some nats of the difference are the orbit itself: mean-field has to hold the map at one angle, though the posterior
# is indifferent to all of them. The flow's angle costs nothing, because its base distribution, a standard normal, has
# the symmetry, and its map passes it on. Where are the two leaders?

# %%
with torch.no_grad():
    z, a = karate.draw(flow, network, num_draws)
    z_normal, a_normal = karate.draw(normal, network, num_draws)
point = field_type("SO(2)", vectors=1)
figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained", sharex=True, sharey=True)
for ax, name, draws in zip(axes, curves, (z_normal, z)):
    leaders = {"instructor": draws[:800, instructor], "president": draws[:800, president]}
    plot_samples(leaders, field_type=point, point=draws[0, instructor], ax=ax)
    ax.set_title(name)
axes[0].get_legend().remove()  # one is enough
plt.show()

# %% [markdown]
# Draws of the flow cover the circle. The mean of every position is then 0, as it is under the true posterior, and
# says nothing. The star is the instructor's place in one draw, the dashed line its orbit.
#
# ## Questions that need no alignment
#
# A question about the network is a question about an *invariant*: a function with $f(g \cdot z) = f(z)$. How far
# apart are the leaders? How likely is a tie between two members? Is member $i$ nearer to the instructor or to the
# president? For these every draw is as good as it comes.


# %%
def distance(draws, i, j):
    return (draws[:, i] - draws[:, j]).norm(dim=-1)


def invariants(draws, offset):
    return {
        "distance of the leaders": distance(draws, instructor, president),
        "probability of a tie between them": torch.sigmoid(offset - distance(draws, instructor, president)),
        "radius of the map": (draws - draws.mean(1, keepdim=True)).square().sum(-1).mean(-1).sqrt(),
    }


def interval(values):
    low, middle, high = values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    return f"{middle:5.2f} ({low:.2f} to {high:.2f})"


aligned = align(z, None, "O(2)")
tables = [invariants(z_normal, a_normal), invariants(z, a), invariants(aligned, a)]
print(f"{'median (5% to 95%)':36}{'AutoNormal':>22}{'flow':>22}{'flow, aligned':>22}")
for name in tables[0]:
    print(f"{name:36}" + "".join(f"{interval(table[name]):>22}" for table in tables))

# %% [markdown]
# The last two columns are equal: alignment turns whole maps, and distances do not notice. The intervals of the first
# are narrower. That guide gives every coordinate a spread of its own, independent of all others, around one map held
# at one angle.
#
# The club's own question was who sides with whom. Being nearer to one leader than to the other is invariant, so its
# posterior probability is an average over draws, nothing more.

# %%
side = ((z - z[:, [instructor]]).norm(dim=-1) < (z - z[:, [president]]).norm(dim=-1)).float().mean(0)
order = side.argsort()
figure, ax = plt.subplots(figsize=(9.5, 2.8), layout="constrained")
looks = {True: ("#0072B2", "o", "went with the instructor"), False: ("#E69F00", "s", "went with the president")}
for went, (colour, marker, label) in looks.items():
    places = (stayed[order] == went).nonzero().flatten()
    ax.scatter(places, side[order][places], color=colour, marker=marker, edgecolor="black", linewidth=0.5, label=label)
ax.axhline(0.5, color="black", linestyle=":", linewidth=1)
ax.set_xticks(range(members), [str(i) for i in order.tolist()], fontsize="x-small")
ax.set(xlabel="member", ylabel="P(nearer to the instructor)")
ax.legend()
plt.show()
right = int(((side > 0.5) == stayed).sum())
print(f"{right} of {members} members went with the leader that they are probably nearer to")

# %% [markdown]
# The exception, member 8 (number 9 in the paper, which counts from 1), is known to the literature: Zachary reports
# that he sided with the president, but was three weeks from his test for the black belt, for which he needed the
# instructor.
#
# ## What Procrustes does
#
# Alignment answers another kind of question: where *is* member $i$, and how sure are we? Given a reference map
# $z^\ast$, each draw is replaced by
#
# $$z R^\ast, \qquad R^\ast = \arg\min_{R \in O(2)} \| z R - z^\ast \|_F = U V^\top, \quad z^\top z^\ast = U \Sigma
# V^\top.$$
#
# `align(z, reference, "O(2)")` does it; with no reference, as above, the draws are aligned to their own mean. That is a
# choice of coordinates, a *gauge* as physicists say, and there are others. One may turn each map so that
# the instructor lies on the horizontal axis, with the president above it. Both are legitimate, both give a cloud for
# each member, and the clouds differ. The ellipses below are one standard deviation around the means of the same draws
# in the two gauges.


# %%
def instructor_level(draws):
    """Each map turned until the instructor is on the right of the origin, mirrored if the president is below."""
    angle = torch.atan2(draws[:, instructor, 1], draws[:, instructor, 0])
    rows = torch.stack([torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)], -1)
    turned = draws @ rows.view(-1, 2, 2)
    sign = turned[:, president, 1].sign()
    return turned * torch.stack([torch.ones_like(sign), sign], -1)[:, None]


gauges = {"aligned to the mean map": aligned, "instructor on the axis": instructor_level(z)}
figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained", sharex=True, sharey=True)
for ax, (name, draws) in zip(axes, gauges.items()):
    for i in range(members):
        colour, marker, _ = looks[bool(stayed[i])]
        centre = draws[:, i].mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(draws[:, i].T))
        width, height = (2 * values.clamp(min=0).sqrt()).tolist()
        tilt = math.degrees(torch.atan2(vectors[1, 0], vectors[0, 0]))
        ax.add_patch(Ellipse(centre.tolist(), width, height, angle=tilt, facecolor=colour, alpha=0.12))
        ax.scatter(
            *centre, color=colour, marker=marker, s=60 if i in (instructor, president) else 14, edgecolor="black"
        )
    ax.set(title=name, aspect="equal")
plt.show()

# %%
print(f"{'standard deviation of the position of':40}" + "".join(f"{name:>26}" for name in gauges))
for name, i in {"the instructor": instructor, "the president": president, "member 11": 11, "member 16": 16}.items():
    spread = [draws[:, i].var(0).sum().sqrt().item() for draws in gauges.values()]
    print(f"{name:40}" + "".join(f"{value:26.2f}" for value in spread))

# %% [markdown]
# The draws are the same in both columns. Only the coordinates differ, and with them what looks certain. An error bar
# on an aligned map is a statement about the map *and* the gauge, and a paper that shows one has to say which. Aligned
# pictures are fine to look at; conclusions are safer with invariants.
#
# ## The mirror image
#
# Rotations are built into the flow. A reflection is another matter: no continuous map of a normal distribution does
# well on two mirror images at once. The flow learns the one that it happens to find, and the guide is the exact average
# over the two-element group of a reflection $h$,
#
# $$\bar q(z) = \tfrac{1}{2} \left( q(z) + q(h \cdot z) \right).$$
#
# Draws are those of the average: about half of the maps above were mirrored. In training a draw is scored by the $q$ it
# comes from, which saves half of the work; with `torch.no_grad()`, as in `diagnose`, by $\bar q$. So the loss seen in
# training is up to $\log 2 = 0.69$ nats above that of the guide one has in the end:

# %%
elbo = Trace_ELBO(num_particles=num_draws, vectorize_particles=True, max_plate_nesting=0)(karate.model, flow)
print(f"ELBO of one mirror image, as in training {-elbo(network).item():8.2f}")
with torch.no_grad():
    print(f"ELBO of the guide                        {-elbo(network).item():8.2f}")

# %% [markdown]
# ## Where to go next
#
# - `make demo` runs the comparison in full, with two more guides of Pyro's and errors over several fits;
#   `benchmarks/RESULTS.md` has every kind of flow on this posterior.
# - [Quickstart](01_quickstart.ipynb): which kind of transform to take.
# - [NeuTra](08_neutra_hmc.ipynb): the same guide as a change of variables for Hamiltonian Monte Carlo.
# - Your own model: write down which sites move together, give each a field type, call `check_model_invariance`, and
#   replace your guide by `AutoEquivariantFlow`.
#
# References: P. Hoff, A. Raftery, M. Handcock, *Latent space approaches to social network analysis* (JASA 97, 2002);
# W. Zachary, *An information flow model for conflict and fission in small groups* (Journal of Anthropological
# Research 33, 1977); P. Schönemann, *A generalized solution of the orthogonal Procrustes problem* (Psychometrika 31,
# 1966).
