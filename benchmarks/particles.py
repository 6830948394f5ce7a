# SPDX-License-Identifier: Apache-2.0
r"""Four particles in the plane with a double well between every two, DW4: test log-likelihood against the entropy.

.. math:: U(x) = \sum_{i < j} 0.9\, (d_{ij} - 4)^4 - 4\, (d_{ij} - 4)^2, \qquad d_{ij} = |x_i - x_j|,

at temperature 1 and with centre of mass 0: density :math:`e^{-U} / Z` on a subspace of 6 dimensions, with its surface
measure. It is invariant under O(2) and under permutations of the particles. log Z = 29.667232 and the mean energy is
-22.5415, so its entropy is 7.125724 nats, below which no model's negative log-likelihood is on average.

Data come from Hamiltonian Monte Carlo in float64, many chains at once, their mean energy held against the exact one.
Flows of spline couplings on the three vectors of :func:`~pyro_equiflow.particle_type` are fitted to them by maximum
likelihood.

=========  =========================================================================================================
arm        what is built in
=========  =========================================================================================================
all        O(2), and permutations by the exact average over S_4 (``OrbitMixture``): 24 evaluations of the flow a point
O(2)       O(2); every batch moved by random permutations
none       the same couplings of six numbers under the trivial group; batches moved by permutations, turns, reflections
=========  =========================================================================================================

The flow's draws weighted by :math:`e^{-U}` give log Z back, the effective sample size (ESS) and the acceptance rate of
independence Metropolis.

``--picture PATH`` draws the distribution of distances.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyro.distributions as dist
import torch
from escnn import group
from torch import Tensor

from pyro_equiflow import InvariantNormal, MeanFreePositions, OrbitMixture, equivariant_flow, particle_type
from pyro_equiflow.infer import EvidenceEstimate, evidence_estimate, metropolis, weighted_draws

LOG_Z = 29.667232
MEAN_ENERGY = -22.5415
ENTROPY = 7.125724
PARTICLES = 4

ARMS = ("all", "O(2)", "none")

FIRST, SECOND = torch.combinations(torch.arange(PARTICLES)).T


def distances(x: Tensor) -> Tensor:
    """Distances of all pairs, from ``(..., 4, 2)`` to ``(..., 6)``."""
    return (x[..., FIRST, :] - x[..., SECOND, :]).square().sum(-1).clamp(min=1e-24).sqrt()


def energy(x: Tensor) -> Tensor:
    """U, from ``(..., 4, 2)`` to ``(...)``."""
    d = distances(x) - 4
    return (0.9 * d**4 - 4 * d**2).sum(-1)


def log_density(x: Tensor) -> Tensor:
    """Minus U; -infinity above 1e5, where the density is 0 in any arithmetic and a flow's may overflow."""
    u = energy(x)
    return torch.where(u < 1e5, -u, -math.inf)


def force(x: Tensor) -> Tensor:
    """Minus the gradient of U, of the shape of ``x``."""
    d = distances(x)[..., None]
    pull = -(3.6 * (d - 4) ** 3 - 8 * (d - 4)) / d * (x[..., FIRST, :] - x[..., SECOND, :])
    return torch.zeros_like(x).index_add(-2, FIRST, pull).index_add(-2, SECOND, -pull)


def monte_carlo(
    chains: int, snapshots: int, seed: int, *, warm_up: int = 600, every: int = 10, leaps: int = 10
) -> tuple[Tensor, float, float]:
    """Hamiltonian Monte Carlo from normal starts.

    :return: positions ``(snapshots * chains, 4, 2)``, their mean energy and its standard error over the chains.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        z = torch.randn(chains, PARTICLES, 2, dtype=torch.float64, generator=generator)
        return z - z.mean(-2, keepdim=True)

    x = 1.8 * normal()
    found = []
    for step in range(warm_up + every * snapshots):
        # Small steps until all chains have come down from their starts; random lengths against resonances.
        size = (0.01 if step < warm_up // 3 else 0.08) * (0.5 + torch.rand((), generator=generator).item())
        momentum, y = normal(), x
        before = energy(x) + momentum.square().sum((-2, -1)) / 2
        momentum = momentum + size / 2 * force(y)
        for leap in range(leaps):
            y = y + size * momentum
            momentum = momentum + (size if leap < leaps - 1 else size / 2) * force(y)
        after = energy(y) + momentum.square().sum((-2, -1)) / 2
        uniform = torch.rand(chains, dtype=torch.float64, generator=generator)
        x = torch.where((uniform.log() < before - after)[:, None, None], y, x)
        if step >= warm_up and (step - warm_up) % every == every - 1:
            found.append(x)
    of_chains = torch.stack([energy(x) for x in found]).mean(0)
    return torch.cat(found), float(of_chains.mean()), float(of_chains.std()) / math.sqrt(chains)


class Coupled(dist.TransformedDistribution):
    """A flow's distribution in which points beyond the range of numbers have density 0.

    The average over permutations looks at copies of a draw that the couplings may stretch without end.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, -infinity where the flow overflows."""
        return super().log_prob(value).nan_to_num(nan=-math.inf)


def build(
    arm: str, num_transforms: int, hidden_dims: tuple[int, ...], transformer: str
) -> tuple[torch.nn.Module, Callable]:
    """An arm's flow, from data's coordinates to the base, and what makes the distribution of positions of it."""
    trivial = group.trivial_group().trivial_representation
    plane = group.directsum([trivial, trivial])
    vector = plane if arm == "none" else group.o2_group().irrep(1, 1)
    kind = particle_type(PARTICLES, vector)
    flow = equivariant_flow(kind, num_transforms=num_transforms, hidden_dims=hidden_dims, transformer=transformer)
    swaps = particle_type(PARTICLES, plane, permutations=True)

    def distribution(flow: torch.nn.Module) -> dist.TransformedDistribution:
        scale = torch.ones(InvariantNormal(kind).num_scales, dtype=next(flow.parameters()).dtype)
        # Data are scored by one pass of the flow, draws by its inverse, which is closed.
        base = InvariantNormal(kind, scale=scale, validate_args=False)
        density = Coupled(base, [flow.inv], validate_args=False)
        if arm == "all":
            density = OrbitMixture(density, swaps)
        return dist.TransformedDistribution(density, [MeanFreePositions(PARTICLES, 2, cache_size=1)])

    return flow, distribution


def moved(x: Tensor, arm: str) -> Tensor:
    """Data moved by random symmetries that the arm does not have."""
    if arm == "all":
        return x
    order = torch.rand(x.shape[:-1]).argsort(-1)
    x = x.gather(-2, order[..., None].expand(x.shape))
    if arm == "O(2)":
        return x
    turn = torch.linalg.qr(torch.randn(len(x), 2, 2, dtype=x.dtype))
    return x @ turn.Q * torch.where(torch.rand(len(x), 1, 2) < 0.5, -1.0, 1.0).to(x.dtype)


class Result(NamedTuple):
    """What an arm came to."""

    arm: str
    parameters: int
    seconds: float
    likelihood: float
    error: float
    found: EvidenceEstimate
    acceptance: float
    draws: Tensor


def run(arm: str, train: Tensor, test: Tensor, args: argparse.Namespace) -> Result:
    """Fits an arm and scores it on fresh positions."""
    torch.manual_seed(args.seed)
    flow, distribution = build(arm, args.transforms, tuple(args.hidden), args.transformer)
    flow.to(args.device)
    density = distribution(flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=args.lr)
    seconds = 0.0
    for step in range(args.steps):
        start = time.process_time()
        for parameters in optimizer.param_groups:
            parameters["lr"] = args.lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        batch = train[torch.randint(len(train), (args.batch,))].float()
        loss = -density.log_prob(moved(batch, arm).to(args.device)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        seconds += time.process_time() - start
        if (step + 1) % max(1, args.steps // 10) == 0:
            print(f"  {arm}: step {step + 1}, {loss.item():.3f} nats, {seconds:.0f} s", file=sys.stderr, flush=True)
    density = distribution(copy.deepcopy(flow).double().eval())
    with torch.no_grad():
        scores = -torch.cat([density.log_prob(x.to(args.device)) for x in test.split(500)])
    print(f"  {arm}: test NLL {float(scores.mean()):.4f}", file=sys.stderr, flush=True)
    draws, log_weights = weighted_draws(density, log_density, num_samples=args.draws, batch_size=500)
    return Result(
        arm,
        sum(p.numel() for p in flow.parameters()),
        seconds,
        float(scores.mean()),
        float(scores.std()) / math.sqrt(len(scores)),
        evidence_estimate(log_weights),
        metropolis(log_weights).acceptance_rate,
        draws.cpu(),
    )


def draw(results: list[Result], test: Tensor, path: Path) -> None:
    """Distances between particles, of the data and of each arm's draws."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.6 * len(results), 3.2), layout="constrained", dpi=150)
    bins = torch.linspace(0, 8, 81).tolist()
    for axis, r in zip([axes] if len(results) == 1 else axes, results):
        axis.hist(distances(test).flatten(), bins, density=True, color="0.8", label="data")
        axis.hist(distances(r.draws).flatten(), bins, density=True, histtype="step", color="black", label="flow")
        name = {"all": "O(2) and permutations", "O(2)": "O(2)", "none": "nothing"}[r.arm]
        axis.set(title=f"{name} built in: {r.likelihood:.2f} nats", xlabel="distance of two particles", yticks=[])
        axis.legend(fontsize=8)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few steps and draws: the numbers mean nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--transforms", type=int, default=8, help="couplings")
    parser.add_argument("--transformer", default="spline", help="of the couplings: spline, affine or commutant")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 64], help="channels of the hidden layers")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--draws", type=int, default=20_000, help="for log Z")
    parser.add_argument("--picture", type=Path, help="file for the picture")
    args = parser.parse_args(arguments)
    chains, snapshots, warm_up = 2000, 60, 600
    if args.smoke:
        args.steps, args.hidden, args.batch, args.draws = 3, [8], 20, 200
        chains, snapshots, warm_up = 100, 2, 200
    torch.set_num_threads(args.threads)
    train, *trained_on = monte_carlo(chains, snapshots, args.seed, warm_up=warm_up)
    test, *tested_on = monte_carlo(chains, max(1, snapshots // 6), 1_000_000 + args.seed, warm_up=warm_up)
    for name, (mean, error) in (("training", trained_on), ("test", tested_on)):
        print(f"{name}: mean energy {mean:.4f}, s.e. {error:.4f}; exact {MEAN_ENERGY}")
    print(f"entropy {ENTROPY}, log Z {LOG_Z}; {args.steps} steps on {args.batch} points")
    print("| built in | parameters | CPU s | test NLL | s.e. | above the entropy | ESS | acceptance | log Z | s.e. |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    results = []
    for arm in args.arms:
        r = run(arm, train, test, args)
        results.append(r)
        print(
            f"| {arm} | {r.parameters} | {r.seconds:.0f} | {r.likelihood:.4f} | {r.error:.4f} "
            f"| {r.likelihood - ENTROPY:.4f} | {r.found.efficiency:.3f} | {r.acceptance:.3f} "
            f"| {r.found.log_evidence:.4f} | {r.found.log_evidence_stderr:.4f} |",
            flush=True,
        )
    if args.picture:
        draw(results, test, args.picture)


if __name__ == "__main__":
    main()
