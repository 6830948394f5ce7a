# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Your own group, your own network
#
# The field types of escnn describe which symmetry acts on which numbers. Most tutorials take them ready-made. Here we
# build one by hand, from the matrices of a group, put our own escnn modules inside a flow, teach the package a layer of
# ours, and check every promise with `pyro_equiflow.testing`.
#
# The example is from molecular physics. Three equal atoms sit at the corners of a triangle. Some such molecules, Na$_3$
# among them, do not keep that shape: the triangle becomes isosceles of its own accord (the Jahn-Teller effect), and
# does so in one of three directions that nature cannot tell apart. We sample its Boltzmann distribution
# $e^{-E(x)} / Z$.

# %%
import math
import os

import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import torch
from escnn import group, gspaces
from escnn import nn as enn
from tqdm import tqdm

from pyro_equiflow import (
    Compose,
    EquivariantCoupling,
    EquivariantResidual,
    InvariantNormal,
    OrbitMixture,
    equivariant_linear,
    testing,
)
from pyro_equiflow.infer import evidence_estimate, weighted_draws
from pyro_equiflow.nn import Expanded, SteerableLinear, SteerableModule, expand, lipschitz_bound, weight_norm
from pyro_equiflow.plots import plot_equivariance_error

torch.manual_seed(0)
smoke_test = "CI" in os.environ

# %% [markdown]
# ## A group acts on six numbers
#
# An event is the displacement of each atom from its corner, $x = (u_1, u_2, u_3)$ with $u_i \in \mathbb{R}^2$. The
# group is $D_3$, the six rotations and reflections of the triangle. An element $g$ turns every displacement, and
# carries it to the atom at the corner where $g$ puts the old one:
#
# $$(g \cdot x)_{g(i)} = R(g)\, u_i .$$
#
# So $\rho(g) = P(g) \otimes R(g)$, a permutation times a rotation. It is not among escnn's ready-made ones, but escnn
# takes a table of matrices, one for each element. Nothing else is needed: it finds the irreps inside by itself. (A
# table that is no representation, by a wrong sign say, ends in an `InsufficientIrrepsException`.)

# %%
D3 = group.dihedral_group(3)
in_plane = D3.irrep(1, 1)  # how D_3 acts on the plane
angles = 2 * np.pi / 3 * np.arange(3)
corners = np.stack([np.cos(angles), np.sin(angles)], axis=1)


def displacement_matrix(g):
    moved = corners @ in_plane(g).T
    permutation = np.isclose(corners[:, None], moved[None]).all(-1)
    return np.kron(permutation, in_plane(g))


displacements = group.representation.build_from_discrete_group_representation(
    {g: displacement_matrix(g) for g in D3.elements}, "displacements", D3, supported_nonlinearities=[]
)
space = gspaces.no_base_space(D3)
field_type = enn.FieldType(space, [displacements])
print(field_type.size, "numbers, irreps", displacements.irreps)

# %% [markdown]
# In the language of spectroscopy: one $A_1$ (breathing), one $A_2$ (rotation), two $E$. A chemist finds the same by
# characters; the package uses them to know what may be scaled, split and mixed. Here are the modes, by hand. Only
# $Q = (Q_x, Q_y)$ changes the shape of the triangle.

# %%
directions = np.stack([angles, angles + np.pi / 2, 0 * angles, 0 * angles + np.pi / 2, -angles, np.pi / 2 - angles])
modes = np.stack([np.cos(directions), np.sin(directions)], axis=-1).reshape(6, 6) / np.sqrt(3)
names = ["breathing ($A_1$)", "rotation ($A_2$)", "shift $t_x$ (E)", "$t_y$ (E)", "shape $Q_x$ (E)", "$Q_y$ (E)"]

figure, axes = plt.subplots(1, 6, figsize=(10, 2))
for axis, name, mode in zip(axes, names, modes):
    axis.fill(*corners.T, facecolor="0.93", edgecolor="0.7")
    axis.quiver(*corners.T, *mode.reshape(3, 2).T, color="C0", angles="xy", scale_units="xy", scale=0.7, width=0.03)
    axis.set(xlim=(-1.7, 2.1), ylim=(-1.9, 1.9), aspect="equal", title=name)
    axis.title.set_fontsize(9)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## A target with that symmetry
#
# Springs hold all modes but $Q$; the shape has a ring of low energy with three dips on it,
#
# $$E = k b^2 + \tfrac{k}{2} r^2 + \tfrac{k}{2} |t|^2
#   + 4 \left(|Q|^2 - 1\right)^2 - 3\, \mathrm{Re}\,(Q_x + i Q_y)^3, \qquad k = 6, \quad b = b_0 + 0.3\, (|Q|^2 - 1),$$
#
# where $b_0$ is the breathing mode. The last two terms are the textbook form of the effect, a "Mexican hat" warped by a
# term that only a threefold axis allows. Since the shift of $b$ has Jacobian 1, $Z$ is a product of Gaussian integrals
# and one over the plane of $Q$, so we know $\log Z$ to many digits.

# %%
to_modes = torch.tensor(modes)
stiffness = 6.0


def shape_energy(q):
    squared = q.square().sum(-1)
    return 4 * (squared - 1).square() - 3 * (q[..., 0] ** 3 - 3 * q[..., 0] * q[..., 1] ** 2)


def log_density(x):
    breathing, rotation, shift, q = (x @ to_modes.T.to(x)).split([1, 1, 2, 2], -1)
    breathing = breathing[..., 0] + 0.3 * (q.square().sum(-1) - 1)
    held = breathing.square() + 0.5 * rotation[..., 0].square() + 0.5 * shift.square().sum(-1)
    return -stiffness * held - shape_energy(q)


axis_points = torch.linspace(-4, 4, 1601, dtype=torch.float64)
grid = torch.stack(torch.meshgrid(axis_points, axis_points, indexing="xy"), -1)
log_z = float(torch.logsumexp(-shape_energy(grid).flatten(), 0)) + 2 * math.log(8 / 1600)
log_z += 0.5 * math.log(math.pi / stiffness) + 1.5 * math.log(2 * math.pi / stiffness)
print(f"log Z = {log_z:.6f}")

# %% [markdown]
# Does this energy have the symmetry that we claim? `invariance_error` moves points by every element of the group and
# compares. A sign wrong in `displacement_matrix`, or a direction wrong in `modes`, would show here, before any
# training.

# %%
x = torch.randn(100, 6, dtype=torch.float64)
print(f"largest change of log p under D_3: {testing.invariance_error(log_density, x, field_type):.1e} nats")

# %% [markdown]
# ### One kind of representation is refused
#
# Lattice vectors of a crystal are often written in the lattice's own basis, where $D_3$ acts by matrices of whole
# numbers. These are not orthogonal, and a normal distribution of such coordinates is not invariant. The package says
# so.

# %%
lattice = np.array([[1.0, -0.5], [0.0, np.sqrt(3) / 2]])
oblique = group.representation.build_from_discrete_group_representation(
    {g: np.linalg.inv(lattice) @ in_plane(g) @ lattice for g in D3.elements}, "oblique", D3, supported_nonlinearities=[]
)
try:
    InvariantNormal(enn.FieldType(space, [oblique]))
except ValueError as error:
    print(error)

# %% [markdown]
# The cure is Cartesian coordinates: flow there, and end with the constant matrix as one more transform.
#
# ## Your own network inside a coupling
#
# A transform says which types its conditioner has to join; any escnn module between them will do. We take linear layers
# and ELU of escnn itself, on hidden fields of the regular representation, whose channels the group only permutes, so
# that pointwise functions commute with it. A coupling splits along irreps, since our only field cannot be cut
# otherwise.

# %%
hidden = enn.FieldType(space, 8 * [space.regular_repr])
split = {"split": [0, 1, 2], "split_by": "irreps"}  # A_1, A_2 and one E condition the other E
in_type, out_type = EquivariantCoupling.conditioner_types(field_type, **split)
net = enn.SequentialModule(enn.Linear(in_type, hidden), enn.ELU(hidden), enn.Linear(hidden, out_type))
coupling = EquivariantCoupling(field_type, net, **split)
print(f"float32: {testing.equivariance_error(coupling, x.float()):.1e}")
print(f"float64: {testing.equivariance_error(coupling.double(), x):.1e}")

# %% [markdown]
# In float64 one sees more: escnn keeps the bases of its filters in float32, so its layers commute with the group up to
# $10^{-7}$ only. `SteerableLinear` (and `SteerableConv` on grids) are our layers with bases kept in float64, and fit
# between escnn's own modules. A function builds the flow from them; the last layer starts at zero, so the flow starts
# as the identity.


# %%
def network(in_type, out_type, width=8):
    hidden = enn.FieldType(in_type.gspace, width * [in_type.gspace.regular_repr])
    last = SteerableLinear(hidden, out_type)
    torch.nn.init.zeros_(last.weight)
    return enn.SequentialModule(
        SteerableLinear(in_type, hidden), enn.ELU(hidden), SteerableLinear(hidden, hidden), enn.ELU(hidden), last
    )


def build(field_type, splits, width, count=8):
    steps = []
    for index in range(count):
        options = {"split": splits[index % len(splits)], "split_by": "irreps", "transformer": "spline"}
        types = EquivariantCoupling.conditioner_types(field_type, **options)
        coupling = EquivariantCoupling(field_type, network(*types, width), **options)
        steps += [equivariant_linear(field_type), coupling]
    return Compose(steps)


flow = build(field_type, [[0, 1, 2], [2, 3], [0, 1, 3], [2, 3]], width=8)
testing.assert_equivariant(flow.double(), x)
testing.assert_inverse(flow, x)
testing.assert_log_det(flow, x[:5])
flow = flow.float()

# %% [markdown]
# No error, so the flow keeps its promises to the tolerances that the package's own tests use (`testing.TOLERANCES`).
#
# ## Does the symmetry matter?
#
# We fit by the reverse Kullback-Leibler divergence: draw from the flow, lower the mean of $\log q + E$. Beside it the
# same code under the trivial group, with couplings of the six coordinates. Reverse fits are known to forget modes. And
# a third density, which needs no training of its own: `OrbitMixture` averages the plain flow over the six elements of
# our group, exactly.


# %%
def fit(flow, steps, batch=256, rate=5e-3):
    optimizer = torch.optim.Adam(flow.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    density = dist.TransformedDistribution(InvariantNormal(flow.field_type), [flow])
    for _ in tqdm(range(steps)):
        sample = density.rsample((batch,))
        loss = (density.log_prob(sample) - log_density(sample)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def in_float64(flow):
    one = torch.ones(len(flow.field_type.irreps), dtype=torch.float64)
    return dist.TransformedDistribution(InvariantNormal(flow.field_type, scale=one), [flow.double().eval()])


no_symmetry = gspaces.no_base_space(group.trivial_group())
plain_type = enn.FieldType(no_symmetry, 6 * [no_symmetry.trivial_repr])
plain = build(plain_type, [[0, 1, 2], [3, 4, 5], [0, 2, 4], [1, 3, 5]], width=16)
for candidate in (flow, plain):
    fit(candidate, steps=10 if smoke_test else 500)
densities = {
    "built in": in_float64(flow),
    "plain": in_float64(plain),
    "plain, averaged": OrbitMixture(in_float64(plain), field_type),
}

# %%
shapes = {}
for name, density in densities.items():
    draws, log_weights = weighted_draws(density, log_density, num_samples=1000 if smoke_test else 20_000)
    found = evidence_estimate(log_weights)
    q = shapes[name] = (draws @ to_modes.T)[:, 4:]
    well = ((torch.atan2(q[:, 1], q[:, 0]) / (2 * math.pi / 3)).round().long() % 3).bincount(minlength=3) / len(q)
    change = testing.invariance_error(density, draws[:200], field_type)
    print(
        f"{name:16s} effective draws {found.efficiency:.2f}, log Z {found.log_evidence:.3f} (s.e. "
        f"{found.log_evidence_stderr:.3f}), wells {[round(p, 2) for p in well.tolist()]}, change of log q {change:.0e}"
    )
print(f"exact: log Z {log_z:.3f}, a third in each well")

# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 3), sharex=True, sharey=True, layout="constrained")
levels = np.arange(-5, 12, 1.5)
shown = grid[::8, ::8]
axes[0].contourf(shown[..., 0], shown[..., 1], shape_energy(shown), levels=levels, cmap="Greys_r", extend="max")
axes[0].set(title="energy of the shape", ylabel="$Q_y$")
for axis, (name, q) in zip(axes[1:], shapes.items()):
    axis.contour(shown[..., 0], shown[..., 1], shape_energy(shown), levels=levels[::2], colors="0.8", linewidths=0.8)
    axis.plot(*q[:2000].T, ".", markersize=2, alpha=0.4)
    axis.set_title(name)
for axis in axes:
    axis.set(xlim=(-2.1, 2.1), ylim=(-2.1, 2.1), xlabel="$Q_x$", aspect="equal")
plt.show()

# %% [markdown]
# The plain flow has lost two wells. Its weights do not know: they report most draws as effective and a tiny standard
# error, around a $\log Z$ that is off by $\log 3 = 1.10$. With the symmetry built in no well can be lost without losing
# all three, and the shares are right. The fit is not yet good: a continuous map of one cloud onto three far wells
# leaves bridges between them, and puts too little elsewhere. Its $\log Z$ is more than two standard errors low, and
# standard errors are too small where single weights are large. (Exact draws, which this example allows, put 2.5% of the
# mass where $q$ is more than 20 times too small.)
#
# The average over the group mends all that: the plain flow has to fit one well only, and the group makes the others.
# For a finite group and a reverse fit it is hard to beat. It costs six evaluations of the flow for a density, and there
# is nothing like it for a group of all rotations.
#
# ## A layer of your own
#
# Residual transforms, $y = x + F(x)$, need $\mathrm{Lip}(F) < 1$, and so a bound for every layer. Let us write two
# layers that the package does not have. The first is a nonlinearity that works on any irrep,
#
# $$v \mapsto \tanh(|v|)\, \frac{v}{|v|},$$
#
# of Lipschitz constant 1, as $\tanh$ has slope at most 1 along the radius and $\tanh(r)/r \le 1$ across. A
# `SteerableModule` says what it computes on plain tensors in `expanded()`; an attribute `lipschitz` is its constant.


# %%
class Saturation(SteerableModule):
    lipschitz = 1.0

    def __init__(self, field_type):
        super().__init__(field_type, field_type)

    def expanded(self):
        sizes = [field.size for field in self.in_type.representations]

        def fn(x):
            fields = x.split(sizes, -1)
            # The small constant gives the norm a gradient at 0; the factor is the limit 1 there.
            lengths = [(v.square().sum(-1, keepdim=True) + 1e-30).sqrt() for v in fields]
            return torch.cat([v * torch.tanh(r) / r for v, r in zip(fields, lengths)], -1)

        return Expanded(fn, ())


# %% [markdown]
# The second is a linear layer with one factor for each irrep inside our field,
# $x \mapsto Q\, \mathrm{diag}(s)\, Q^\top x$, with the change of basis $Q$ that escnn has found. It is written as a
# plain escnn module, as if it came from somebody else. Such a class works in a coupling as it is. To be fast it wants a
# rule of `expand`: a function of plain tensors, and the tensors, found once a call however often a solver asks. To be
# held below a Lipschitz constant it wants a rule of `weight_norm`: a bound of its operator norm from the present
# weights. $Q$ is orthogonal, so here the largest $|s|$ is the norm itself.


# %%
class Gains(enn.EquivariantModule):
    def __init__(self, field_type):
        super().__init__()
        self.in_type = self.out_type = field_type
        sizes = [field_type.fibergroup.irrep(*irrep).size for irrep in field_type.irreps]
        self.gains = torch.nn.Parameter(torch.randn(len(sizes)))
        self.register_buffer("channel_of", torch.repeat_interleave(torch.tensor(sizes)))
        self.register_buffer("basis", torch.tensor(field_type.representation.change_of_basis))

    def matrix(self):
        basis = self.basis.to(self.gains)
        return basis * self.gains[self.channel_of] @ basis.T

    def forward(self, x):
        return enn.GeometricTensor(x.tensor @ self.matrix().T, self.out_type)

    def evaluate_output_shape(self, input_shape):
        return input_shape


@expand.register(Gains)
def expand_gains(module):
    return Expanded(lambda x, matrix: x @ matrix.T, (module.matrix(),))


try:
    EquivariantResidual(field_type, enn.SequentialModule(Gains(field_type)))
except TypeError as error:
    print(error)


# %% [markdown]
# Without the rule it is refused, by name. With it, layers of ours and of the package make one network.


# %%
@weight_norm.register(Gains)
def norm_of_gains(module, weight, spatial_shape=None):
    return module.gains.abs().max()


vectors = enn.FieldType(space, 6 * [space.irrep(1, 1)] + 3 * [space.trivial_repr])
net = enn.SequentialModule(
    Gains(field_type), SteerableLinear(field_type, vectors), Saturation(vectors), SteerableLinear(vectors, field_type)
)
residual = EquivariantResidual(field_type, net, lipschitz=0.9)
with torch.no_grad():
    print(f"the network as it is: at most {float(lipschitz_bound(net)):.2f}")
print(f"inside the transform: at most {residual.lipschitz_bound():.4f}")

# %% [markdown]
# The transform scales linear layers down at every call, whatever an optimizer made of the weights. A bound is a claim,
# and a claim of ours is not certified by anybody: attack it. We train the network to be as steep as it can be at the
# origin, where saturation does not help us, and look at norms of dense Jacobians on the way, at the origin and
# elsewhere.

# %%
residual = residual.double()
F = residual.conditioner
optimizer = torch.optim.Adam(F.parameters(), lr=0.05)
jacobians = torch.func.vmap(torch.func.jacrev(lambda point: F(point)))
for step in range(301):
    points = torch.cat([1e-3 * x[:20], x])
    norms = torch.linalg.matrix_norm(jacobians(points), 2)
    if step % 100 == 0:
        print(f"step {step:3d}: largest norm {float(norms.detach().max()):.7f}, bound {residual.lipschitz_bound():.7f}")
    optimizer.zero_grad()
    (-norms[0]).backward()
    optimizer.step()

# %% [markdown]
# ## Check everything
#
# Errors of all that we made, as numbers (`…_error`); in a test one would call the assertions. The last line is a
# network with a fault on purpose: `tanh` on each coordinate of a displacement, which does not commute with rotations.


# %%
class Faulty(Saturation):
    def expanded(self):
        return Expanded(torch.tanh, ())


def checked(name, transform, x):
    print(
        f"{name:22s} equivariance {testing.equivariance_error(transform, x):.0e}   "
        f"inverse {testing.inverse_error(transform, x):.0e}   log-det {testing.log_det_error(transform, x[:5]):.0e}"
    )


faulty = EquivariantResidual(field_type, enn.SequentialModule(Gains(field_type), Faulty(field_type))).double()
checked("flow, trained", flow, draws[:100])
checked("residual, own layers", residual, x)
checked("residual with a fault", faulty, x)
try:
    testing.assert_equivariant(faulty, x)
except AssertionError as error:
    print(error)

# %%
_, axis = plt.subplots(figsize=(9, 2.8), layout="constrained")
plot_equivariance_error({"flow": flow, "own layers": residual, "with a fault": faulty}, x, ax=axis)
plt.show()

# %% [markdown]
# One element does not see the fault: the mirror at 0° changes signs of coordinates, and `tanh` is odd. So ask all
# elements, as the checks do. Inverse and log-det of the faulty transform are as good as ever: a flow does not need its
# symmetry to be a flow. That is why it wants a check of its own.
#
# ## Where to go next
#
# - [05, implicit and residual flows](05_implicit_residual.ipynb): what the bounds are good for, and what they cost.
# - [04, a lattice field](04_phi4.ipynb): effective draws and log Z of a larger system; a layer with a rule of
#   `weight_norm`.
# - `particle_type` and `particle_permutation`: rotations and permutations of particles, ready-made.
# - [Adding a transform](../CONTRIBUTING.md) to the package.
#
# References: Jahn and Teller, *Stability of polyatomic molecules in degenerate electronic states* (Proc. R. Soc. A 161,
# 1937); Weiler and Cesa, *General E(2)-equivariant steerable CNNs* (arXiv 1911.08251); Cesa, Lang and Weiler, *A
# program to build E(N)-equivariant steerable CNNs* (ICLR 2022), which is escnn; Bose, Brubaker and Kobyzev,
# *Equivariant Finite Normalizing Flows* (arXiv 2110.08649).
