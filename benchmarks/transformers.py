# SPDX-License-Identifier: Apache-2.0
r"""Affine, commutant and spline couplings with equally many parameters, on two densities known exactly.

**vectors**: three vectors of the plane under SO(2). The first is normal, :math:`u = |x_1|^2`. The second has two long
spots, at either side of the origin, in a frame that is turned from the first vector's direction by :math:`1.5 |x_1|`.
The third lies on two rings, with radii that grow by :math:`\exp(0.3 \sin u)`. Turning a frame is a rotation in the
commutant of SO(2); two rings are a matter of the radius.

**channels**: two regular fields of C_4, whose channels the group permutes. Those of the first have three modes, those
of the second two, about a point that hangs on two neighbouring channels of the first. Permutation fields leave no
rotation, so the commutant is the affine map there, and not run again.

Both densities are normalised by construction, so their entropies are known: closed forms and one-dimensional
quadrature. Every flow has 4 couplings with actnorms and linear maps between them, hidden layers of a width such that
the numbers of parameters agree, and is trained by maximum likelihood on fresh points (Adam, cosine decay, gradients
clipped). Negative log-likelihoods are those of 20,000 further points in float64, found as the entropy plus the mean of
``log p - log q``, whose noise is far below that of ``-log q``. Standard errors are over seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from escnn import group, gspaces
from escnn import nn as enn
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal, TransformedDistribution

from pyro_equiflow import Compose, InvariantNormal, equivariant_flow
from pyro_equiflow.testing import assert_invariant


def mixture(centres: list[float], width: float) -> MixtureSameFamily:
    """Equal mixture of normals on the line."""
    means = torch.tensor(centres, dtype=torch.float64)
    return MixtureSameFamily(Categorical(torch.ones_like(means)), Normal(means, width))


def mean(density: MixtureSameFamily, function: Callable[[Tensor], Tensor], reach: float = 8.0) -> float:
    """An expectation on the line by the midpoint rule, exact to rounding for what is smooth and vanishes outside."""
    x = (torch.arange(20000, dtype=torch.float64) + 0.5) * (2 * reach / 20000) - reach
    return float((density.log_prob(x).exp() * function(x)).sum() * (2 * reach / 20000))


def entropy(density: MixtureSameFamily) -> float:
    """The entropy on the line in nats."""
    return -mean(density, density.log_prob)


def normal_entropy(width: float) -> float:
    """The entropy of a normal on the line."""
    return 0.5 + math.log(width * math.sqrt(2 * math.pi))


class Vectors:
    """Three vectors under SO(2): spots in a turned frame, and rings."""

    spots, across = mixture([-1.5, 1.5], 0.5), 0.15
    rings = mixture([1.0, 2.2], 0.12)  # of radii; below 0 lies a part of 1e-17
    transformers = ("affine", "commutant", "spline")
    reach = 3.6

    def __init__(self) -> None:
        space = gspaces.no_base_space(group.so2_group())
        self.field_type = enn.FieldType(space, 3 * [space.irrep(1)])
        # |x_1|^2 is exponential of mean 2, so the mean of its sine is 2 / 5.
        radial = entropy(self.rings) + mean(self.rings, lambda r: r.abs().log()) + math.log(2 * math.pi) + 0.6 * 0.4
        self.entropy = 2 * normal_entropy(1.0) + entropy(self.spots) + normal_entropy(self.across) + radial

    @staticmethod
    def frame(first: Tensor, turn: float = 1.5) -> Tensor:
        """The first axis of the turned frame as a complex number."""
        z = torch.view_as_complex(first.contiguous())
        return torch.polar(torch.ones_like(z.abs()), z.angle() + turn * z.abs())

    @staticmethod
    def growth(first: Tensor) -> Tensor:
        """The logarithm of the rings' size."""
        return 0.3 * first.square().sum(-1).sin()

    def sample(self, count: int) -> Tensor:
        """Points of shape ``(count, 6)``."""
        first = torch.randn(count, 2, dtype=torch.float64)
        second = torch.complex(self.spots.sample((count,)), self.across * torch.randn(count, dtype=torch.float64))
        second = torch.view_as_real(second * self.frame(first))
        radius = self.rings.sample((count,)) * self.growth(first).exp()
        angle = 2 * math.pi * torch.rand(count, dtype=torch.float64)
        return torch.cat([first, second, torch.view_as_real(torch.polar(radius, angle))], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density."""
        first, second, third = x.split(2, -1)
        turned = torch.view_as_complex(second.contiguous()) * self.frame(first).conj()
        growth, radius = self.growth(first), third.norm(dim=-1)
        return (
            Normal(0.0, 1.0).log_prob(first).sum(-1)
            + self.spots.log_prob(turned.real)
            + Normal(0.0, self.across).log_prob(turned.imag)
            + self.rings.log_prob(radius * (-growth).exp())
            - growth
            - (2 * math.pi * radius).log()
        )

    def views(self, x: Tensor) -> dict[str, Tensor]:
        """What to draw: planes in which the density has its structure."""
        first, second, third = x.split(2, -1)
        turned = torch.view_as_real(torch.view_as_complex(second.contiguous()) * self.frame(first).conj())
        return {"$x_2$, in its frame": turned, "$x_3$, by its size": third * (-self.growth(first)).exp().unsqueeze(-1)}


class Channels:
    """Two regular fields of C_4 with modes in every channel."""

    first, second = mixture([-2.0, 0.0, 2.0], 0.25), mixture([-0.8, 0.8], 0.2)
    transformers = ("affine", "spline")
    reach = 3.6

    def __init__(self) -> None:
        space = gspaces.no_base_space(group.cyclic_group(4))
        self.field_type = enn.FieldType(space, 2 * [space.regular_repr])
        self.entropy = 4 * (entropy(self.first) + entropy(self.second))

    @staticmethod
    def centre(first: Tensor) -> Tensor:
        """Where the second field's channels have their modes: cyclic, without a mirror."""
        return first.sin() + 0.5 * first.roll(1, -1)

    def sample(self, count: int) -> Tensor:
        """Points of shape ``(count, 8)``."""
        first = self.first.sample((count, 4))
        return torch.cat([first, self.centre(first) + self.second.sample((count, 4))], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density."""
        first, second = x.split(4, -1)
        return (self.first.log_prob(first) + self.second.log_prob(second - self.centre(first))).sum(-1)

    def views(self, x: Tensor) -> dict[str, Tensor]:
        """What to draw: planes in which the density has its structure."""
        first, second = x.split(4, -1)
        rest = second - self.centre(first)
        return {
            "two channels of the first field": first[:, :2],
            "first field, second about its centre": torch.stack([first[:, 0], rest[:, 0]], -1),
        }


class Fit(NamedTuple):
    """A trained flow, its score and its cost."""

    flow: Compose
    nll: float
    seconds: float


def make(field_type: enn.FieldType, transformer: str, width: int) -> Compose:
    """A stack of couplings; it takes data to the base."""
    return equivariant_flow(field_type, num_transforms=4, hidden_dims=(width, width), transformer=transformer)


def size(flow: torch.nn.Module) -> int:
    """Its number of parameters."""
    return sum(p.numel() for p in flow.parameters())


def widths(toy: Vectors | Channels, target: int) -> dict[str, int]:
    """For each transformer the hidden width whose number of parameters is nearest to the target."""
    grid = range(4, 129, 2)
    counts = {t: {w: size(make(toy.field_type, t, w)) for w in grid} for t in toy.transformers}
    return {t: min(grid, key=lambda w, own=own: abs(own[w] - target)) for t, own in counts.items()}


def density(flow: Compose, field_type: enn.FieldType) -> TransformedDistribution:
    """The flow's distribution."""
    one = next(flow.parameters()).new_ones(len(InvariantNormal(field_type).scale))
    return TransformedDistribution(InvariantNormal(field_type, scale=one), [flow.inv])


def fit(toy: Vectors | Channels, transformer: str, width: int, seed: int, args: argparse.Namespace) -> Fit:
    """Trains and scores one flow."""
    torch.manual_seed(seed)
    flow = make(toy.field_type, transformer, width).to(args.device)
    start = time.process_time()
    optimizer = torch.optim.Adam(flow.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    q = density(flow, toy.field_type)
    for _ in range(args.steps):
        optimizer.zero_grad()
        loss = -q.log_prob(toy.sample(args.batch).float().to(args.device)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
    seconds = time.process_time() - start
    flow = flow.double().eval()
    torch.manual_seed(10_000 + seed)
    x = toy.sample(args.test)
    with torch.no_grad():
        q = density(flow, toy.field_type)
        nll = toy.entropy + float((toy.log_prob(x) - q.log_prob(x.to(args.device)).cpu()).mean())
        assert_invariant(q, x[:100].to(args.device), toy.field_type, tolerance=1e-8)
    return Fit(flow, nll, seconds)


def summary(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), spread


def draw(path: Path, toys: dict[str, Vectors | Channels], fits: dict[str, dict[str, list[Fit]]]) -> None:
    """Draws of targets in the first column, of the flows beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(name, view) for name, toy in toys.items() for view in toy.views(toy.sample(1))]
    figure, axes = plt.subplots(len(rows), 4, figsize=(9.2, 2.5 * len(rows)), layout="constrained", dpi=110)
    for row, (name, view) in zip(axes, rows):
        toy = toys[name]
        columns = {"target": toy.sample(40_000)}
        with torch.no_grad():
            columns |= {t: density(own[0].flow, toy.field_type).sample((40_000,)) for t, own in fits[name].items()}
        edges = np.linspace(-toy.reach, toy.reach, 91)
        images = {t: np.histogram2d(*toy.views(x.cpu())[view].T.numpy(), bins=edges)[0].T for t, x in columns.items()}
        for axis in row[len(images) :]:
            axis.set_axis_off()
        for axis, (t, image) in zip(row, images.items()):
            axis.imshow(
                image, origin="lower", cmap="cividis", vmin=0, vmax=images["target"].max(), extent=2 * (-3.6, 3.6)
            )
            axis.set(xticks=(-2, 0, 2), yticks=(-2, 0, 2), title=t)
        row[0].set_ylabel(view, fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Fits, prints the tables, and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps: the numbers mean nothing")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="seeds")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--parameters", type=int, default=12_000, help="aimed at")
    parser.add_argument("--test", type=int, default=20_000, help="fresh points to score")
    parser.add_argument("--picture", type=Path, help="where to draw")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.repeats, args.test = 3, 2, 500
    torch.set_num_threads(1)
    toys: dict[str, Vectors | Channels] = {"vectors": Vectors(), "channels": Channels()}
    fits: dict[str, dict[str, list[Fit]]] = {}
    for name, toy in toys.items():
        settings = f"{args.steps} steps of {args.batch} points, {args.repeats} seeds"
        print(f"\n{name}: entropy {toy.entropy:.4f}; {settings}\n")
        print("| map | width | parameters | NLL | s.e. | above the entropy | less than affine (paired s.e.) | CPU s |")
        print("|---|---|---|---|---|---|---|---|")
        fits[name] = {}
        for transformer, width in widths(toy, args.parameters).items():
            own = [fit(toy, transformer, width, args.seed + i, args) for i in range(args.repeats)]
            fits[name][transformer] = own
            nll, error = summary([f.nll for f in own])
            gain, gain_error = summary([a.nll - f.nll for a, f in zip(fits[name]["affine"], own)])
            seconds = statistics.mean(f.seconds for f in own)
            print(
                f"| {transformer} | {width} | {size(own[0].flow)} | {nll:.4f} | {error:.4f} | {nll - toy.entropy:.4f} "
                f"| {gain:.4f} ({gain_error:.4f}) | {seconds:.0f} |",
                flush=True,
            )
    if args.picture:
        draw(args.picture, toys, fits)


if __name__ == "__main__":
    main()
