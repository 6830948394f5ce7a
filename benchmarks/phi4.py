# SPDX-License-Identifier: Apache-2.0
r"""Lattice field theory: a scalar field with a quartic action on a periodic square, log Z known.

.. math:: S(\phi) = \sum_x (m^2 + 4) \phi_x^2 + \lambda \phi_x^4 - 2 \sum_{x, \mu} \phi_x \phi_{x + \mu},

each link once, with :math:`m^2 = -4`. The density :math:`e^{-S} / Z` is invariant under translations, the symmetries
D_4 of the square and the change of sign. A residual flow from the standard normal is trained by the reverse
Kullback-Leibler divergence, on draws of its own; then its importance weights give log Z, the effective sample size
(ESS, 1 for a perfect flow) and the acceptance rate of independence Metropolis, which makes an exact sampler of it.

========================  ==================================================================================
arm                       what is built in
========================  ==================================================================================
all                       translations (periodic convolutions), D_4 (steerable ones), change of sign (sines without
                          biases): everything there is
translations              periodic convolutions under the trivial group, with biases
none                      convolutions with zeros outside, under the trivial group, with biases
wide                      as translations, with as many channels as "all" in place of as many parameters
========================  ==================================================================================

All arms have 6 residual blocks of Lipschitz constant 0.995 with one hidden layer of sines, a learned scale around each,
the same number of parameters (but for "wide") as far as whole channels allow, the same steps, draws and learning rate,
exact log-dets.

Convolutions on so few sites are done as dense matrices: their Jacobians, one pass per site, cost 30 times less.

``--picture PATH`` draws learning curves and the magnetisation.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from escnn import gspaces
from escnn import nn as enn
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_equiflow import Compose, EquivariantResidual, InvariantNormal, equivariant_actnorm
from pyro_equiflow.infer import EvidenceEstimate, evidence_estimate, metropolis, weighted_draws
from pyro_equiflow.logdet import Exact
from pyro_equiflow.nn import PointwiseNonLinearity, SteerableConv, weight_norm
from pyro_equiflow.nn.expand import Expanded, SteerableModule

#: log Z by side and coupling.
EXACT = {(4, 8.0): 2.40513896, (4, 6.008): 4.20823266, (6, 8.0): 5.243046, (8, 8.0): 9.29136}

#: Whether an arm has D_4, the change of sign, and periodic convolutions.
ARMS = {
    "all": (True, True, True),
    "translations": (False, False, True),
    "none": (False, False, False),
    "wide": (False, False, True),
}


def log_density(field: Tensor, coupling: float) -> Tensor:
    """Minus the action at :math:`m^2 = -4`, from ``(..., 1, L, L)`` to ``(...)``."""
    phi = field.squeeze(-3)
    links = phi * (phi.roll(1, -1) + phi.roll(1, -2))
    return (2 * links - coupling * phi**4).sum((-2, -1))


class LatticeConv(SteerableModule):
    """A steerable convolution with kernel 3 on a lattice of given side, applied as one matrix.

    :param in_type: input field type.
    :param out_type: output field type.
    :param side: the lattice's, 3 at least.
    :param periodic: whether the lattice is; zeros lie outside otherwise.
    :param bias: whether to add a bias.
    """

    def __init__(self, in_type: enn.FieldType, out_type: enn.FieldType, side: int, periodic: bool, bias: bool) -> None:
        super().__init__(in_type, out_type)
        self.conv = SteerableConv(in_type, out_type, padding_mode="circular" if periodic else "zeros", bias=bias)
        row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        # Which entry of the kernel joins two sites; 9, a zero, where none does.
        entries = torch.full((side**2, side**2), 9)
        for entry in range(9):
            r, c = row + entry // 3 - 1, column + entry % 3 - 1
            inside = ((r % side == r) & (c % side == c)).flatten() | periodic
            sites = torch.arange(side**2)[inside]
            entries[sites, ((r % side) * side + c % side).flatten()[inside]] = entry
        self._entries = entries.flatten()

    def expanded(self) -> Expanded:
        """The convolution by its matrix on all sites."""
        entries, sites = self._entries, math.isqrt(self._entries.numel())

        def fn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            out, channels = weight.shape[:2]
            matrix = F.pad(weight.flatten(2), (0, 1)).index_select(2, entries.to(weight.device))
            matrix = matrix.view(out, channels, sites, sites).transpose(1, 2).reshape(out * sites, channels * sites)
            y = F.linear(x.flatten(1), matrix).view(len(x), out, *x.shape[2:])
            return y if bias is None else y + bias[:, None, None]

        bias = self.conv.expanded_bias()
        return Expanded(fn, (self.conv.filter(),) if bias is None else (self.conv.filter(), bias))


@weight_norm.register
def _(module: LatticeConv, weight: Tensor, spatial_shape: Sequence[int] | None = None) -> Tensor:
    return weight_norm(module.conv, weight, spatial_shape)


def build(side: int, arm: str, channels: int, blocks: int = 6) -> Compose:
    """An arm's flow from the standard normal to the field."""
    square, odd, periodic = ARMS[arm]
    space = gspaces.flipRot2dOnR2(4) if square else gspaces.trivialOnR2()
    field_type = enn.FieldType(space, [space.trivial_repr])
    hidden = enn.FieldType(space, max(1, channels // space.regular_repr.size) * [space.regular_repr])

    def scale(value: float) -> enn.EquivariantModule:
        part = equivariant_actnorm(field_type, data_init=False)
        torch.nn.init.constant_(part.log_scale, math.log(value))
        part.loc.requires_grad_(not odd)
        return part

    # Below a Lipschitz constant a sine bends the more the larger its input: blocks work at scale 2, fields have 0.4.
    parts = [scale(2.0)]
    for index in range(blocks):
        first = LatticeConv(field_type, hidden, side, periodic, bias=not odd)
        last = LatticeConv(hidden, field_type, side, periodic, bias=False)
        torch.nn.init.zeros_(last.conv.weight)
        net = enn.SequentialModule(first, PointwiseNonLinearity(hidden, "sin2pi"), last)
        parts += [EquivariantResidual(field_type, net, lipschitz=0.995, log_det=Exact())]
        parts += [scale(1.0 if index < blocks - 1 else 0.2)]
    return Compose(parts)


def count(flow: torch.nn.Module) -> int:
    """Free parameters."""
    return sum(p.numel() for p in flow.parameters() if p.requires_grad)


def matched(side: int, arm: str, channels: int) -> Compose:
    """The arm's flow with the channels that bring it nearest to the parameters of ``"all"``."""
    if arm in ("all", "wide"):
        return build(side, arm, channels)
    wanted = count(build(side, "all", channels))
    return min((build(side, arm, c) for c in range(1, channels + 1)), key=lambda flow: abs(count(flow) - wanted))


def distribution(flow: Compose, side: int) -> dist.TransformedDistribution:
    """The flow's distribution of fields."""
    one = next(flow.parameters()).detach().new_ones(1)
    return dist.TransformedDistribution(InvariantNormal(flow.field_type, (side, side), scale=one), [flow])


class Result(NamedTuple):
    """What an arm came to on a lattice."""

    side: int
    coupling: float
    arm: str
    seed: int
    parameters: int
    seconds: float
    curve: list[tuple[int, float]]
    found: EvidenceEstimate
    acceptance: float
    chain_efficiency: float
    magnetisation: Tensor
    corrected: Tensor


def run(side: int, coupling: float, arm: str, seed: int, args: argparse.Namespace) -> Result:
    """Trains an arm and weighs its draws."""
    torch.manual_seed(seed)
    flow = matched(side, arm, args.channels).to(args.device)
    q = distribution(flow, side)
    trained = [p for p in flow.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.lr)
    curve: list[tuple[int, float]] = []
    recent = seconds = 0.0
    every = max(1, args.steps // 25)
    for step in range(args.steps):
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        x = q.rsample((args.batch,))
        loss = (q.log_prob(x) - log_density(x, coupling)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        seconds += time.process_time() - start
        recent -= loss.item() / every
        if (step + 1) % every == 0:
            curve.append((step + 1, recent))
            recent = 0.0
            print(f"  {arm}, L = {side}: step {step + 1}, ELBO {curve[-1][1]:.3f}", file=sys.stderr, flush=True)
    torch.manual_seed(1000 + seed)
    q = distribution(flow.double().eval(), side)
    x, log_weights = weighted_draws(
        q, lambda x: log_density(x, coupling), num_samples=args.draws, batch_size=min(1000, args.draws)
    )
    chain = metropolis(log_weights)
    magnetisation = x.mean((-3, -2, -1))
    corrected = magnetisation[chain.indices]
    efficiency = float(effective_sample_size(corrected.abs()[None])) / args.draws
    return Result(
        side,
        coupling,
        arm,
        seed,
        count(flow),
        seconds,
        curve,
        evidence_estimate(log_weights),
        chain.acceptance_rate,
        efficiency,
        magnetisation.cpu(),
        corrected.cpu(),
    )


def draw(results: list[Result], path: Path) -> None:
    """Learning curves of all arms, and the magnetisation of the larger of two lattices; first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", dpi=150)
    styles = {"all": ("-", "black"), "translations": ("--", "0.35"), "none": (":", "0.35"), "wide": ("-.", "black")}
    results = [r for r in results if r.seed == results[0].seed]
    lattices = sorted({r.side for r in results if r.coupling == 8.0})[:2]
    for axis, side in zip(axes, lattices):
        for r in results:
            if (r.side, r.coupling) == (side, 8.0):
                line, colour = styles[r.arm]
                gaps = [max(EXACT[side, 8.0] - elbo, 1e-3) for _, elbo in r.curve]
                axis.plot(
                    [s for s, _ in r.curve], gaps, line, color=colour, label=f"{r.arm}: ESS {r.found.efficiency:.2f}"
                )
        axis.set(yscale="log", xlabel="steps", ylabel="log Z - ELBO, nats", title=f"$L = {side}$, $\\lambda = 8$")
        axis.legend(fontsize=8, title="built in")
    shown = [r for r in results if (r.side, r.coupling, r.arm) == (lattices[-1], 8.0, "all")]
    for r in shown:
        bins = torch.linspace(-0.8, 0.8, 65).tolist()
        axes[2].hist(r.magnetisation, bins, density=True, color="0.75", label="the flow's draws")
        axes[2].hist(r.corrected, bins, density=True, histtype="step", color="black", label="Metropolis")
        axes[2].set(
            xlabel="mean of the field", ylabel="density", title=f"$L = {r.side}$, all built in", xlim=(-0.8, 0.8)
        )
        # Room for the legend above the bars.
        axes[2].set_ylim(top=1.3 * axes[2].get_ylim()[1])
        axes[2].legend(fontsize=8, loc="upper center", ncols=2, frameon=False, columnspacing=1.0, handlelength=1.5)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few steps and draws: the numbers mean nothing")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--repeats", type=int, default=1, help="seeds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--sides", type=int, nargs="+", default=[4, 6], help="of the lattices, with lambda 8")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS)[:3])
    parser.add_argument("--more", action="store_true", help="L = 4 with lambda 6.008 as well, everything built in")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64, help="draws per step")
    parser.add_argument("--channels", type=int, default=24, help="hidden channels where everything is built in")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--draws", type=int, default=20_000, help="for log Z")
    parser.add_argument("--picture", type=Path, help="file for the picture")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.steps, args.channels, args.batch, args.draws, args.sides = 4, 8, 16, 200, [4]
    torch.set_num_threads(args.threads)
    lattices = [(side, 8.0, arm) for side in args.sides for arm in args.arms]
    if args.more:
        lattices.append((4, 6.008, "all"))
    runs = [(*lattice, args.seed + repeat) for lattice in lattices for repeat in range(args.repeats)]
    print(
        "| L | lambda | built in | seed | parameters | CPU s | ESS | acceptance | log Z | s.e. | exact | ELBO | chain |"
    )
    print(13 * "|---" + "|")
    results = []
    for side, coupling, arm, seed in runs:
        r = run(side, coupling, arm, seed, args)
        results.append(r)
        print(
            f"| {side} | {coupling:g} | {arm} | {seed} | {r.parameters} | {r.seconds:.0f} | {r.found.efficiency:.3f} "
            f"| {r.acceptance:.3f} | {r.found.log_evidence:.4f} | {r.found.log_evidence_stderr:.4f} "
            f"| {EXACT.get((side, coupling), math.nan):.4f} | {r.found.elbo:.3f} | {r.chain_efficiency:.3f} |",
            flush=True,
        )
    print("chain: independent draws that a state of the Metropolis chain is worth, by the mean field's absolute value")
    if args.picture:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
