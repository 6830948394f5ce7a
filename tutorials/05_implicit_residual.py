# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Implicit and residual flows: bounds, certificates, steep maps
#
# A coupling is invertible because it leaves half of its input alone. A residual transform moves everything at once,
#
# $$y = x + F(x), \qquad \mathrm{Lip}(F) \le c < 1,$$
#
# and is invertible by Banach's theorem: $x = y - F(x)$ has one solution, and iterating finds it. An implicit transform
# puts a second such map on the other side,
#
# $$x + F(x) = y + H(y), \qquad \mathrm{Lip}(F), \mathrm{Lip}(H) \le c < 1 .$$
#
# Both take any field type, a single vector too, since nothing is split. All of it rests on one inequality,
# $\mathrm{Lip} \le c$. This page is about keeping it (bounds), using it (certified inverses), and living with it (steep
# maps).

# %%
import math
import os
import time

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from escnn import group, gspaces
from escnn import nn as enn

from pyro_equiflow import (
    Compose,
    ConvergenceError,
    InvariantNormal,
    equivariant_actnorm,
    equivariant_implicit,
    equivariant_residual,
)
from pyro_equiflow.logdet import Exact, RussianRoulette
from pyro_equiflow.nn import SteerableConv, SteerableLinear, lipschitz_bound
from pyro_equiflow.plots import plot_training
from pyro_equiflow.solvers import FixedPoint

torch.manual_seed(0)
smoke_test = "CI" in os.environ

# %% [markdown]
# ## Bounds that hold
#
# The Lipschitz constant of a network is at most the product of its layers' operator norms. The usual way to a norm is
# power iteration, $u \leftarrow A^\top A u / |A^\top A u|$: every step gives a *lower* bound. A layer divided by a
# number below its norm is no contraction. `lipschitz_bound` gives numbers from above, by Gram iteration,
#
# $$\|A\|_2 \le \|(A^\top A)^{2^t}\|_F^{1 / 2^{t + 1}},$$
#
# which needs no starting vector and converges at once. Here are both against the true norms of random steerable layers.

# %%
D4 = gspaces.no_base_space(group.dihedral_group(4))
fields = enn.FieldType(D4, 8 * [D4.regular_repr])


def power_iteration(matrix, steps):
    u = torch.randn(matrix.shape[1])
    for _ in range(steps):
        u = matrix.T @ (matrix @ u)
        u = u / u.norm()
    return (matrix @ u).norm()


ratios = {"power iteration, 5 steps": [], "20 steps": [], "lipschitz_bound": []}
with torch.no_grad():
    for _ in range(20 if smoke_test else 200):
        layer = SteerableLinear(fields, fields)
        matrix = layer.filter()
        estimates = (power_iteration(matrix, 5), power_iteration(matrix, 20), lipschitz_bound(layer))
        for found, estimate in zip(ratios.values(), estimates):
            found.append(float(estimate / torch.linalg.matrix_norm(matrix, 2)))
    for name, found in ratios.items():
        print(f"{name:25s} {min(found):.4f} to {max(found):.4f} times the norm")

# %%
figure, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
bins = torch.linspace(0.8, 1.05, 101).tolist()
for (name, found), colour in zip(ratios.items(), ("0.75", "0.45", "C0")):
    axis.hist(found, bins, label=name, color=colour)
axis.axvline(1.0, color="black", linewidth=1)
axis.set(xlabel="estimate / true norm", ylabel="layers", xlim=(0.8, 1.05))
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# On grids the norm of a convolution is that over all frequencies; a dense matrix of the whole operator, which only
# small images allow, tells the truth to compare with.

# %%
plane = gspaces.flipRot2dOnR2(4)
maps = enn.FieldType(plane, 2 * [plane.regular_repr])
with torch.no_grad():
    for padding_mode in ("circular", "zeros"):
        layer = SteerableConv(maps, maps, 3, padding_mode=padding_mode, bias=False)
        basis = torch.eye(16 * 36).view(-1, 16, 6, 6)
        dense = layer(maps(basis)).tensor.flatten(1)
        truth = float(torch.linalg.matrix_norm(dense, 2))
        on_grid, anywhere = float(lipschitz_bound(layer, (6, 6))), float(lipschitz_bound(layer))
        print(f"{padding_mode:9s} norm on 6x6 {truth:.3f}, bound on 6x6 {on_grid:.3f}, on every grid {anywhere:.3f}")

# %% [markdown]
# The transforms find these bounds anew at every call, from the present weights, and scale a layer down where it exceeds
# its share of $c$. So the inequality survives what users do: large steps of an optimizer, loading, casting. Below, a
# network is thrown about; `transform.lipschitz_bound()` is what the transform claims, beside it the largest Jacobian
# norm at a thousand points. Random weights do not align the worst directions of all layers, so they stay below the
# claim; [07](07_own_group.ipynb) has an attack that reaches it.

# %%
SO2 = gspaces.no_base_space(group.so2_group())
vectors = enn.FieldType(SO2, 2 * [SO2.irrep(1)])
transform = equivariant_residual(vectors, hidden_dims=(32,), lipschitz=0.9, identity_init=False)
points = torch.cat([torch.randn(500, 4), 0.1 * torch.randn(500, 4)])
for what in ("as built", "after noise", "after weights times 100"):
    with torch.no_grad():
        for parameter in transform.parameters():
            if what == "after noise":
                parameter.add_(torch.randn_like(parameter))
            elif what != "as built":
                parameter.mul_(100)
    jacobians = torch.func.vmap(torch.func.jacrev(transform.conditioner))(points)
    steepest = float(torch.linalg.matrix_norm(jacobians.detach(), 2).max())
    print(f"{what:24s} claimed {transform.lipschitz_bound():.4f}, steepest found {steepest:.4f}")

# %% [markdown]
# ## Certified inverses
#
# How far is an approximate inverse $x$ of $y$ from the true one $x^*$? With $\phi(x) = y - F(x)$,
#
# $$|x - x^*| \le \frac{|\phi(x) - x|}{1 - c} .$$
#
# The right side is known. `inverse_solution` returns it for every sample, with the rounding of $\phi$ counted in,
# beside the value and the steps spent; `tolerance` means this error, not the residual. Let us test it where the truth
# is known: draw $x$, compute $y$, ask for inverses to many tolerances, and plot real errors against certified ones.

# %%
certified, real, spent = {}, {}, {}
for c in (0.5, 0.9, 0.99):
    certified[c], real[c], spent[c] = [], [], {}
    for exponent in range(1, 12):
        torch.manual_seed(1)
        transform = equivariant_residual(
            vectors, hidden_dims=(32,), lipschitz=c, identity_init=False, tolerance=10.0**-exponent
        ).double()
        with torch.no_grad():
            for parameter in transform.parameters():
                parameter.mul_(10)  # as steep as c allows
        x = torch.randn(100, 4, dtype=torch.float64)
        with torch.no_grad():
            solution = transform.inverse_solution(transform(x))
        certified[c] += solution.error.tolist()
        real[c] += (solution.value - x).norm(dim=1).tolist()
        spent[c][exponent] = float(solution.steps.double().mean())

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for c, colour in zip(certified, ("C0", "C1", "C2")):
    left.loglog(certified[c], real[c], ".", markersize=3, color=colour, label=f"c = {c}", alpha=0.6)
    right.plot(list(spent[c]), list(spent[c].values()), ".-", color=colour, label=f"c = {c}")
left.plot([1e-14, 1], [1e-14, 1], "k-", linewidth=1, label="error = certificate")
left.set(xlabel="certified error", ylabel="real error", xlim=(1e-14, 1), ylim=(1e-17, 1))
right.set(xlabel="tolerance $10^{-k}$, k", ylabel="evaluations of F a sample")
left.legend(markerscale=4)
right.legend()
plt.show()
above = [r > e for c in real for r, e in zip(real[c], certified[c])]
print(f"{sum(above)} of {len(above)} real errors are above their certificate")

# %% [markdown]
# No point lies above the line. Certificates are cautious, by a factor of 3 for $c = 0.5$ and of hundreds for $c = 0.99$
# here: $c$ bounds the worst case, and these maps contract faster. The solver is Anderson's, which gains by that: plain
# iteration needs about $\log \epsilon / \log c$ evaluations where a map is as steep as it may be, 2700 for $10^{-12}$
# and $c = 0.99$.
#
# Where a solver cannot meet the tolerance, it says so. It never returns a poor inverse in silence (unless asked to, by
# `on_failure`).

# %%
transform = equivariant_residual(
    vectors, lipschitz=0.99, identity_init=False, solver=FixedPoint(), max_steps=5
).double()
with torch.no_grad():
    for parameter in transform.parameters():
        parameter.mul_(10)
try:
    transform.inv(torch.randn(50, 4, dtype=torch.float64))
except ConvergenceError as error:
    print(error)

# %% [markdown]
# ### Log-determinants
#
# $\log |\det (I + J_F)|$ is exact up to 16 entries an event. For images that would be dear, and an estimator takes its
# place while training: a power series cut at a random length, weighted so that value and gradient are unbiased (Russian
# roulette). Here both on the same points.

# %%
torch.manual_seed(2)
transform = equivariant_residual(vectors, hidden_dims=(32,), lipschitz=0.9, identity_init=False, log_det=Exact())
x = torch.randn(1, 4)
with torch.no_grad():
    exact = float(transform.log_abs_det_jacobian(x, transform(x)))
    transform.log_det = RussianRoulette()
    repeated = x.expand(2000 if smoke_test else 20_000, 4)
    estimates = transform.log_abs_det_jacobian(repeated, transform(repeated.clone()))
error = float(estimates.std()) / len(estimates) ** 0.5
print(f"exact {exact:.4f}, mean of {len(estimates)} estimates {float(estimates.mean()):.4f} (s.e. {error:.4f})")
print(f"spread of one estimate {float(estimates.std()):.3f}")

# %% [markdown]
# ## Steep maps: what one implicit block can do
#
# Two points can move apart by a factor of at most $1 + c$ under a residual block, so by $(1 + c)^l$ under $l$ of them.
# An implicit block is $(I + H)^{-1} \circ (I + F)$, and the inverse of $I + H$ may stretch by $1 / (1 - c)$. Together
#
# $$\frac{1 + c}{1 - c},$$
#
# 39 for $c = 0.95$, where a residual block reaches 1.95. If the target is steeper than a residual stack can be, no
# training helps: on an interval it errs by at least what its steepest line through 0 misses. (Lu et al. prove it in any
# dimension: on some function of Lipschitz constant $L$, $l < \log_2 L$ blocks err by $(r/2)(L - 2^l)$ and more on a
# ball of radius $r$.)
#
# One number and one sign are enough to see it. The group is $C_2$ with $x \mapsto -x$, so every transform is an odd
# function. The target $f(x) = 4\, \mathrm{arsinh}(3x)$ has slope 12 at 0.

# %%
C2 = gspaces.no_base_space(group.cyclic_group(2))
number = enn.FieldType(C2, [C2.irrep(1)])
x = torch.linspace(-2, 2, 401)[:, None]


def target(x):
    return 4 * torch.asinh(3 * x)


def stack(factory, count, c=0.95):
    torch.manual_seed(0)
    return Compose([factory(number, hidden_dims=(64,), lipschitz=c, function="tanh") for _ in range(count)])


def fit_curve(transform, steps):
    optimizer = torch.optim.Adam(transform.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (transform(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return transform(x)


curves = {}
for factory, count in [(equivariant_residual, l) for l in (1, 2, 3, 4)] + [(equivariant_implicit, 1)]:
    residual = factory is equivariant_residual
    name = f"{'residual' if residual else 'implicit'}, {count} block{'s' if count > 1 else ''}"
    curves[name] = fit_curve(stack(factory, count), 20 if smoke_test else 600)
    slope = 1.95**count if residual else 39
    least = max(float((target(x) - slope * x)[x > 0].max()), 0)
    error = float((curves[name] - target(x)).abs().max())
    print(f"{name:20s} slope at most {slope:5.2f}, error at least {least:.2f}, found {error:.2f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for axis, limits in zip(axes, ((-2, 2), (-0.5, 0.5))):
    axis.plot(x, target(x), color="C1", linewidth=5, alpha=0.35, label=r"$4\,\mathrm{arsinh}(3x)$")
    for name, curve in curves.items():
        look = {"color": "black", "linewidth": 1.8} if "implicit" in name else {"linestyle": "--", "linewidth": 1.2}
        axis.plot(x, curve, label=name, **look)
    inside = (x >= limits[0]) & (x <= limits[1])
    axis.set(xlim=limits, ylim=(1.1 * target(x)[inside].min(), 1.1 * target(x)[inside].max()), xlabel="x")
axes[0].legend(fontsize=8)
axes[1].set_title("near 0")
plt.show()

# %% [markdown]
# One implicit block, two networks, comes nearer than three residual ones ever could. Four residual ones may reach the
# slope, and here come nearer still, with twice the networks.
#
# ## And as densities?
#
# The same limits bind a density: two narrow peaks far apart need slopes that are large at the peaks and nearly zero
# between. Residual and implicit flows with the *same number of networks*, fitted to draws from
# $\frac{1}{2} N(\pm 2, 0.1^2)$ under $C_2$. For data the inverse of a residual transform stands in the flow, so that
# scoring them needs no solver; an implicit one solves either way.

# %%
entropy = math.log(2) + 0.5 * math.log(2 * math.pi * math.e * 0.1**2)


def draw_data(count):
    return 4.0 * torch.randint(2, (count, 1)) - 2 + 0.1 * torch.randn(count, 1)


def fit_density(transform, steps):
    density = dist.TransformedDistribution(InvariantNormal(number), [transform.inv])
    optimizer = torch.optim.Adam(transform.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        loss = -density.log_prob(draw_data(256)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item() - entropy)
    return density, losses


densities, losses = {}, {}
for factory, count in (
    (equivariant_residual, 4),
    (equivariant_implicit, 2),
    (equivariant_residual, 8),
    (equivariant_implicit, 4),
):
    name = f"{'residual' if factory is equivariant_residual else 'implicit'}, {count} blocks"
    start = time.process_time()
    transform = Compose([equivariant_actnorm(number), *stack(factory, count)])
    density, losses[name] = fit_density(transform, 20 if smoke_test else 400)
    seconds = time.process_time() - start
    with torch.no_grad():
        excess = -float(density.log_prob(draw_data(20_000)).mean()) - entropy
        densities[name] = density.log_prob(torch.linspace(-3, 3, 1201)[:, None]).exp()
    print(f"{name:19s} {excess:.3f} nats above the entropy, {seconds:.0f} CPU s")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
plot_training(losses, smooth=1 if smoke_test else 20, ylabel="nats above the entropy", ax=right)
grid = torch.linspace(-3, 3, 1201)
left.fill_between(grid, 0.5 * torch.exp(dist.Normal(2.0, 0.1).log_prob(grid.abs())), color="0.85", label="data")
for density, line in zip(densities.values(), right.get_lines()):
    left.plot(grid, density, color=line.get_color(), linestyle=line.get_linestyle(), linewidth=1.2)
left.set(xlabel="x", ylabel="density", ylim=(0, 2.1))
left.legend()
plt.show()

# %% [markdown]
# At equal numbers of networks implicit flows are ahead; a step of theirs costs about twice as much, because both
# directions are solved, so at equal time there is little between them. [RESULTS](../benchmarks/RESULTS.md) has a larger
# case, the checkerboard: 5.058 bits for 4 implicit blocks against 5.069 for 8 residual ones at equal steps, and equal
# bits at equal time. None of the four reaches the entropy here. The inequality that makes all this certain is also what
# limits it: where a type can be split, try spline couplings first.
#
# ## Where to go next
#
# - [04, a lattice field](04_phi4.ipynb): residual flows as a physicist's sampler.
# - [07, your own group, your own network](07_own_group.ipynb): a rule of `lipschitz_bound` for a layer of your own.
# - `pyro_equiflow.solvers` and `pyro_equiflow.logdet` work on plain tensors and callables, without any flow.
#
# References: Chen, Behrmann, Duvenaud and Jacobsen, *Residual Flows for Invertible Generative Modeling* (arXiv
# 1906.02735); Lu, Chen, Li, Wang and Zhu, *Implicit Normalizing Flows* (arXiv 2103.09527); Delattre, Barthélemy, Araujo
# and Allauzen, *Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram Iteration* (arXiv 2305.16173).
