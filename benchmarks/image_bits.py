# SPDX-License-Identifier: Apache-2.0
r"""Bits per dimension of turned images: flows with a symmetry built in against the same flow without.

Each image is turned once by a random quarter turn (``images.py``), so that the source is C_4 symmetric. It is not D_4
symmetric, since a mirrored digit is as a rule no digit: the D_4 arm builds in a little more than is true.

All arms are one multi-scale stack of affine couplings (``pyro_equiflow.image_flow``) under C_4, D_4 or the trivial
group, of a normal base distribution, with uniform dequantisation and a logit (``dequantize``, ``LogitTransform``):

- "C_4" and "D_4", and "plain": the trivial group, hidden layers so wide that the numbers of parameters agree within 2%;
- "plain, wide": as wide as C_4, with about four times its parameters;
- "plain, turned": as "plain", and every batch is turned at random.

Adam with cosine decay on batches of 50; the parameters that score best on the validation images are kept, and training
ends when none scored better for a quarter of the steps. Each arm takes from one grid the learning rate that scores best
on validation images with the most training images and the first seed. A seed decides parts, turns, weights and
batches, the same for all arms; validation noise is the same at each step and for each arm. Bits on test images are
:func:`pyro_equiflow.bits_per_dim` in float64, an upper bound by 8 draws of the noise an image. Standard errors are
over the seeds, differences paired by seed. Seconds are the process's.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import pyro.distributions as dist
import torch
from escnn import gspaces
from escnn import nn as enn
from images import SOURCES, load, quarter_turns
from torch import Tensor

from pyro_equiflow import Inverse, LogitTransform, MultiScale, bits_per_dim, dequantize, image_flow

BATCH, ALPHA = 50, 0.05


class Arm(NamedTuple):
    """A symmetry, the channels of the hidden layers, and whether batches are turned at random."""

    space: gspaces.GSpace
    widths: tuple[int, int]
    turned: bool = False

    def flow(self, shape: tuple[int, int]) -> Inverse:
        """Its flow of gray images."""
        gray = enn.FieldType(self.space, [self.space.trivial_repr])
        # Averages and both first differences go on, three channels. A group with quarter turns makes one field of the
        # differences; where they are two, the default would stop one of them.
        kept = range(len(MultiScale.types(gray, haar=True)[0]) - 1)
        return image_flow(gray, shape, hidden_dims=self.widths, kept=kept)


def arms(smoke: bool = False) -> dict[str, Arm]:
    """What is compared."""
    c4, d4, trivial = gspaces.rot2dOnR2(4), gspaces.flipRot2dOnR2(4), gspaces.trivialOnR2()
    wide, wider, narrow = ((8, 8), (8, 8), (4, 4)) if smoke else ((64, 64), (96, 88), (29, 29))
    return {
        "C_4": Arm(c4, wide),
        "D_4": Arm(d4, wider),
        "plain": Arm(trivial, narrow),
        "plain, wide": Arm(trivial, wide),
        "plain, turned": Arm(trivial, narrow, turned=True),
    }


class Fit(NamedTuple):
    """One fit: bits per dimension on validation and test images, and how it went.

    ``turned`` and ``mirrored`` are the largest changes of the log-density in nats under quarter turns, and under
    quarter turns of the mirrored image.
    """

    validation: float
    bits: float
    turned: float
    mirrored: float
    parameters: int
    seconds: float
    steps: int
    best_step: int
    curve: list[tuple[int, float]]


def density(flow: torch.nn.Module, like: Tensor) -> dist.TransformedDistribution:
    """The distribution of pixels in [0, 1] that a flow makes, in the dtype and on the device of ``like``."""
    noise = dist.Normal(like.new_zeros(like.shape[-3:]), 1.0).to_event(3)
    return dist.TransformedDistribution(noise, [flow, LogitTransform(ALPHA).inv])


@torch.no_grad()
def bits(flow: torch.nn.Module, images: Tensor, levels: int, draws: int, seed: int) -> float:
    """Mean bits a dimension of integer images, with noise of its own seed, in the flow's dtype."""
    like = images[:1].to(next(flow.parameters()).dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = [
            bits_per_dim(density(flow, like), part.long(), num_levels=levels, num_samples=draws, dtype=like.dtype)
            for part in images.split(200)
        ]
    return float(torch.cat(found).mean())


@torch.no_grad()
def symmetry_errors(flow: torch.nn.Module, images: Tensor, levels: int) -> tuple[float, float]:
    """The largest changes of the log-density in nats, over images, under quarter turns, and mirrored besides."""
    pixels = dequantize(images.long(), num_levels=levels, dtype=next(flow.parameters()).dtype)
    fitted = density(flow, pixels)
    before = fitted.log_prob(pixels)
    turned, mirrored = (
        max(float((fitted.log_prob(x.rot90(k, (-2, -1))) - before).abs().max()) for k in range(4))
        for x in (pixels, pixels.flip(-1))
    )
    return turned, mirrored


def fit(arm: Arm, count: int, seed: int, lr: float, args: argparse.Namespace) -> Fit:
    """Fits one arm to ``count`` images and scores it."""
    train, held_back, test, largest = load(args.data, seed)
    train, levels = train[:count], largest + 1
    held_back, test = (x[: args.scored].to(args.device) for x in (held_back, test))
    torch.manual_seed(seed)
    flow = arm.flow(train.shape[-2:]).to(args.device)
    pixels = density(flow, held_back)
    with torch.no_grad():
        bits_per_dim(pixels, train.to(args.device).long(), num_levels=levels)  # sets the actnorms
    optimizer = torch.optim.Adam(flow.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    batches, turns = (torch.Generator().manual_seed(seed) for _ in range(2))
    best, curve = (math.inf, 0, flow.state_dict()), []
    start = time.process_time()
    every = max(1, args.steps // 40)
    for step in range(1, args.steps + 1):
        x = train[torch.randperm(count, generator=batches)[:BATCH]]
        if arm.turned:
            x = quarter_turns(x, torch.randint(4, (len(x),), generator=turns))
        loss = bits_per_dim(pixels, x.to(args.device).long(), num_levels=levels).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == args.steps:
            flow.eval()
            curve.append((step, bits(flow, held_back, levels, 1, seed)))
            flow.train()
            if curve[-1][1] < best[0]:
                best = (curve[-1][1], step, copy.deepcopy(flow.state_dict()))
            if step - best[1] >= args.steps / 4:
                break
    seconds = time.process_time() - start
    flow.load_state_dict(best[2])
    flow.eval().double()
    return Fit(
        best[0],
        bits(flow, test, levels, args.draws, 1000 + seed),
        *symmetry_errors(flow, test[:100], levels),
        sum(p.numel() for p in flow.parameters()),
        seconds,
        step,
        best[1],
        curve,
    )


def best_so_far(curve: list[tuple[int, float]], steps: list[int]) -> Tensor:
    """The best score up to each of some steps."""
    return torch.tensor([min((score for at, score in curve if at <= step), default=math.inf) for step in steps])


def steps_to_reach(curve: list[tuple[int, float]], score: float) -> int | None:
    """The first step whose score is as low, if any."""
    return next((step for step, found in curve if found <= score), None)


def spread(values: list[float]) -> str:
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ({error:.3f})"


Fits = dict[tuple[str, int, int], Fit]


def tables(fits: Fits, args: argparse.Namespace) -> None:
    """Test bits and differences from the first arm; then how soon validation bits are reached, and the symmetry."""
    first = args.arms[0]
    print(f"\n| images | arm | test bits per dimension | less {first}'s | kept step | CPU s |\n" + 6 * "|---" + "|")
    for count in args.sizes:
        base = {seed: f for (arm, n, seed), f in fits.items() if (arm, n) == (first, count)}
        for name in args.arms:
            mine = {seed: f for (arm, n, seed), f in fits.items() if (arm, n) == (name, count)}
            if not mine:
                continue
            less = [f.bits - base[seed].bits for seed, f in mine.items() if seed in base]
            cells = (
                count,
                name,
                spread([f.bits for f in mine.values()]),
                spread(less) if less and name != first else "",
                " ".join(str(f.best_step) for f in mine.values()),
                f"{statistics.mean(f.seconds for f in mine.values()):.0f}",
            )
            print("| " + " | ".join(map(str, cells)) + " |")
    reach = " | ".join(f"{score:g} bits" for score in args.reach)
    print(f"\n| arm | parameters | {reach} | ms a step | log p turned | mirrored |")
    print((5 + len(args.reach)) * "|---" + "|")
    for name in args.arms:
        mine = [f for (arm, n, _), f in fits.items() if (arm, n) == (name, args.sizes[-1])]
        every = [f for (arm, _, _), f in fits.items() if arm == name]
        if not mine:
            continue
        steps = [" ".join(str(steps_to_reach(f.curve, score) or "-") for f in mine) for score in args.reach]
        cells = (
            name,
            mine[0].parameters,
            *steps,
            f"{1000 * statistics.median(f.seconds / f.steps for f in mine):.0f}",
            f"{max(f.turned for f in every):.1e}",
            f"{max(f.mirrored for f in every):.1e}",
        )
        print("| " + " | ".join(map(str, cells)) + " |")


def draw(fits: Fits, args: argparse.Namespace) -> None:
    """Test bits against the number of training images, and validation bits against steps at the most of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {
        "C_4": ("-", "o", "black", r"$C_4$ built in"),
        "D_4": ("-.", "s", "#009e73", r"$D_4$ built in"),
        "plain": ("--", "v", "#d55e00", "none, equal parameters"),
        "plain, wide": ((0, (5, 1, 1, 1, 1, 1)), "^", "#cc79a7", "none, equal widths"),
        "plain, turned": (":", "D", "#0072b2", "none, batches turned"),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained", dpi=150)
    most = args.sizes[-1]
    shown = []
    for index, name in enumerate(args.arms):
        line, marker, color, label = styles[name]
        scores = {n: [f.bits for (arm, m, _), f in fits.items() if (arm, m) == (name, n)] for n in args.sizes}
        scores = {n: found for n, found in scores.items() if found}
        error = [statistics.stdev(s) / len(s) ** 0.5 if len(s) > 1 else 0.0 for s in scores.values()]
        shift = 1.04 ** (index - (len(args.arms) - 1) / 2)  # side by side, not on top of each other
        means = [statistics.mean(s) for s in scores.values()]
        look = {"linestyle": line, "color": color, "label": label, "linewidth": 1.8}
        left.errorbar([n * shift for n in scores], means, error, marker=marker, markersize=5, capsize=3, **look)
        curves = [f.curve for (arm, n, _), f in fits.items() if (arm, n) == (name, most)]
        if not curves:
            continue
        steps = [step for step, _ in max(curves, key=len)]
        found = torch.stack([best_so_far(curve, steps) for curve in curves])
        right.fill_between(steps, found.min(0).values, found.max(0).values, color=color, alpha=0.15, linewidth=0)
        right.plot(steps, found.mean(0), **look)
        shown.append(found.mean(0))
    left.set(xscale="log", xlabel="training images", ylabel="test bits per dimension", xticks=args.sizes)
    left.set_xticklabels(map(str, args.sizes))
    left.minorticks_off()
    left.legend(fontsize=8.5, frameon=False, handlelength=4, loc="upper right")
    left.set_title("test images: mean and standard error", fontsize=10)
    lowest = min(float(scores.min()) for scores in shown)
    start = max(float(scores[len(scores) // 10]) for scores in shown)
    right.set(xlabel="step", ylabel="validation bits per dimension", ylim=(lowest - 0.02, start), xlim=(0, None))
    right.set_title(f"{most} training images: best so far, mean and range", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(args.picture)


def chosen_rate(name: str, found: dict[tuple[str, int, int, float], Fit], args: argparse.Namespace) -> float:
    """The learning rate of an arm with the lowest validation bits, first seed, most training images."""
    return min(args.lr, key=lambda lr: found[name, args.sizes[-1], args.seed, lr].validation)


def main() -> None:
    """Chooses learning rates, fits every arm to every number of images with every seed, prints tables, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps of small networks")
    parser.add_argument("--data", choices=tuple(SOURCES), default="digits")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--repeats", type=int, default=3, help="seeds")
    parser.add_argument("--steps", type=int, default=300, help="of one fit, at most")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 300, 1000], help="training images, in order")
    parser.add_argument("--arms", nargs="+", choices=tuple(arms()), default=list(arms()))
    parser.add_argument("--lr", type=float, nargs="+", default=[0.005, 0.01, 0.02], help="the grid to choose from")
    parser.add_argument("--reach", type=float, nargs="+", default=[2.5, 2.4, 2.3], help="validation bits to reach")
    parser.add_argument("--draws", type=int, default=8, help="draws of the noise of a test image")
    parser.add_argument("--scored", type=int, default=500, help="images to validate and to test on, at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, help="a file that keeps finished fits, and gives them back")
    parser.add_argument("--picture", type=Path, help="where to draw")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.repeats, args.sizes, args.lr, args.draws, args.scored = 4, 2, [100, 200], [0.01], 1, 20
    torch.set_num_threads(args.threads)
    found: dict[tuple[str, int, int, float], Fit] = {}
    if args.out and args.out.exists():
        found = {key: Fit(**value) for key, value in torch.load(args.out).items()}

    def fitted(name: str, count: int, seed: int, lr: float) -> Fit:
        key = (name, count, seed, lr)
        if key not in found:
            found[key] = result = fit(arms(args.smoke)[name], count, seed, lr, args)
            print(
                f"{name}, {count} images, seed {seed}, learning rate {lr:g}: validation {result.validation:.4f}, test "
                f"{result.bits:.4f}, step {result.best_step} of {result.steps}, {result.seconds:.0f} CPU s",
                flush=True,
            )
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                torch.save({key: value._asdict() for key, value in found.items()}, args.out)
        return found[key]

    for name in args.arms:
        for lr in args.lr:
            fitted(name, args.sizes[-1], args.seed, lr)
    rates = {name: chosen_rate(name, found, args) for name in args.arms}
    print("learning rates:", rates)
    fits = {
        (name, count, seed): fitted(name, count, seed, rates[name])
        for seed in range(args.seed, args.seed + args.repeats)
        for count in args.sizes
        for name in args.arms
    }
    tables(fits, args)
    total = sum(f.seconds for f in found.values())
    print(f"\n{args.data}, at most {args.steps} steps; training of all {len(found)} fits: {total:.0f} CPU seconds")
    if args.picture:
        draw(fits, args)


if __name__ == "__main__":
    main()
