# SPDX-License-Identifier: Apache-2.0
r"""Transforms as layers of a classifier: implicit against residual blocks at equal parameters and equal constants.

Lu et al. (*Implicit Normalizing Flows*, arXiv 2103.09527) take networks of residual blocks ``x + F(x)`` and of
implicit blocks ``x + F(x) = y + H(y)``, with the Lipschitz constant of all branches held to c, and report a lower
test error of the implicit ones at each c on CIFAR-10 and CIFAR-100. Here the same is asked on small images, each
turned by a random quarter turn: MNIST, and Fashion-MNIST if ``--fashion`` names its archive.

An image of 28x28 pixels is averaged to 14x14 and squeezed to 7x7. Two stages follow, on 7x7 and on 3x3 points; each
is a free convolution with SiLU, then one implicit block or two residual ones. As many networks of the same widths are
the same number of parameters. An actnorm, the maximum over the group and the mean over positions make invariants; a
linear layer makes logits of them. All of it commutes with quarter turns under C_4 ("equivariant"), so the logits are
invariant. "Plain" is the same code under the trivial group with half the channels, hence nearly equal parameters
(within 2%).

Blocks are used for their maps alone, no log-det is taken. Implicit ones are solved to a relative certified error of
1e-3, in training and test; a sample of test images is classified again in float64 with the default tolerance.

Adam on cross entropy, batches of 64, gradients clipped to 0.5, one cycle of the learning rate, the weights of the
last step. The largest learning rate is one for everything: the best by the mean validation error of all four networks
at c = 0.9 on MNIST with the first seed. A seed decides parts, turns, batches and weights, the same for all networks;
both kinds of a symmetry start with the same map. Standard errors are over the seeds, differences are paired by seed.
Seconds are the process's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from escnn import gspaces
from escnn import nn as enn
from images import Labelled, fashion_classes, labelled, mnist_classes
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from pyro_equiflow import EquivariantActNorm, EquivariantSqueeze, equivariant_implicit, equivariant_residual
from pyro_equiflow.nn import Conditioner, SteerableConv
from pyro_equiflow.solvers import ImplicitAdjoint

KINDS, SYMMETRIES, CONSTANTS = ("implicit", "residual"), ("equivariant", "plain"), (0.99, 0.9, 0.8, 0.7, 0.6)
CLASSES, TOLERANCE, CHECKED, CLIP = 10, 1e-3, 50, 0.5
TRAIN, VALIDATION = 3500, 500
TEST = {"MNIST": 1000, "Fashion-MNIST": 2000}


class Classifier(torch.nn.Module):
    """Logits of images ``(number, 1, side, side)``, invariant under C_4 or nothing.

    :param kind: ``"implicit"``, one block a stage, or ``"residual"``, two.
    :param symmetry: ``"equivariant"`` (C_4) or ``"plain"``.
    :param lipschitz: the constant c of each block's networks.
    :param widths: channels of each stage under C_4; half of them without a symmetry.
    """

    def __init__(self, kind: str, symmetry: str, lipschitz: float, widths: Sequence[int] = (24, 48)) -> None:
        super().__init__()
        space = gspaces.rot2dOnR2(4) if symmetry == "equivariant" else gspaces.trivialOnR2()
        self.squeeze = EquivariantSqueeze(enn.FieldType(space, [space.trivial_repr]))
        types = [self.squeeze.out_type]
        for width in widths:
            fields = width // 4 if symmetry == "equivariant" else width // 2
            types.append(enn.FieldType(space, fields * [space.regular_repr]))
        self.convolutions = torch.nn.ModuleList(
            [Conditioner(SteerableConv(before, after), before, after) for before, after in zip(types, types[1:])]
        )
        self.norm = EquivariantActNorm(types[-1], cache_size=0)
        self.head = torch.nn.Linear(len(types[-1]), CLASSES)
        # After the layers above, which so get the same weights with either kind of blocks: those start as the identity.
        self.stages = torch.nn.ModuleList(torch.nn.ModuleList(blocks(kind, fields, lipschitz)) for fields in types[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(number, 10)``."""
        x = self.squeeze(x)
        for index, (convolution, stage) in enumerate(zip(self.convolutions, self.stages)):
            if index:
                x = F.avg_pool2d(x, 3, stride=2)  # 7x7 to 3x3 points, centre to centre
            x = F.silu(convolution(x))
            for block in stage:
                x = block(x)
        x = F.silu(self.norm(x)).unflatten(1, (self.head.in_features, -1)).amax(2)
        return self.head(x.mean((-2, -1)))


def blocks(kind: str, fields: enn.FieldType, lipschitz: float) -> list[torch.nn.Module]:
    """The blocks of one stage: two networks."""
    # Without a cache a call is the map alone, no log-det is estimated.
    options: dict[str, Any] = {"hidden_dims": (fields.size,), "lipschitz": lipschitz, "cache_size": 0}
    if kind == "residual":
        return [equivariant_residual(fields, **options) for _ in range(2)]
    return [equivariant_implicit(fields, tolerance=TOLERANCE, adjoint=ImplicitAdjoint(tolerance=TOLERANCE), **options)]


def prepared(source: tuple[np.ndarray, np.ndarray], seed: int, parts: Sequence[int], device: str) -> list[Labelled]:
    """Parts of a data set, averaged to half the side, of mean 0 and variance 1 by the first part's."""
    found = [Labelled(F.avg_pool2d(x, 2).to(device), y.to(device)) for x, y in labelled(source, seed, parts)]
    mean, deviation = found[0].images.mean(), found[0].images.std()
    return [Labelled((x - mean) / deviation, y) for x, y in found]


class Fit(NamedTuple):
    """What one training came to; errors are shares of the images.

    ``turned`` is the largest change of a logit under quarter turns, and ``reclassified`` the share of images whose
    class is another where the blocks are solved to the default tolerance; both in float64, on some test images.
    """

    test: float
    validation: float
    loss: float
    parameters: int
    seconds: float
    turned: float
    reclassified: float


@torch.no_grad()
def predicted(classifier: torch.nn.Module, x: Tensor) -> Tensor:
    """The class of each image."""
    return torch.cat([classifier(part).argmax(1) for part in x.split(200)])


@torch.no_grad()
def checks(classifier: Classifier, x: Tensor) -> tuple[float, float]:
    """``turned`` and ``reclassified`` of :class:`Fit`; casts the classifier to float64."""
    before = predicted(classifier, x)
    classifier.double()
    for stage in classifier.stages:
        for block in stage:
            block.tolerance = None
    logits = classifier(x.double())
    turned = max(float((classifier(x.double().rot90(k, (-2, -1))) - logits).abs().max()) for k in (1, 2, 3))
    return turned, float((logits.argmax(1) != before).double().mean())


def fit(kind: str, symmetry: str, c: float, seed: int, lr: float, data: list[Labelled], args: Any) -> Fit:
    """Trains one classifier and scores it."""
    train, validation, test = data
    torch.manual_seed(seed)
    classifier = Classifier(kind, symmetry, c, args.widths).to(args.device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=args.steps)
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    losses = []
    start = time.process_time()
    for _ in tqdm(range(args.steps), desc=f"{kind}, {symmetry}, c {c:g}, seed {seed}", leave=False, disable=None):
        if not batches:
            order = torch.randperm(len(train.images), generator=generator).to(args.device)
            batches = list(order.split(args.batch)[: max(1, len(order) // args.batch)])
        chosen = batches.pop()
        loss = F.cross_entropy(classifier(train.images[chosen]), train.classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.process_time() - start
    classifier.eval()
    errors = [
        float((predicted(classifier, part.images) != part.classes).double().mean()) for part in (test, validation)
    ]
    parameters = sum(p.numel() for p in classifier.parameters())
    return Fit(
        *errors, statistics.mean(losses[-20:]), parameters, seconds, *checks(classifier, test.images[: args.checked])
    )


Key = tuple[str, str, str, float, int, float]
Fits = dict[Key, Fit]


class Record:
    """Finished trainings, kept line by line in a file, so that an interrupted run goes on where it stood.

    :param path: of the file; ``None`` for none.
    :param settings: what all trainings share; lines with other settings are left alone.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings, self.fits = path, settings, Fits()
        if path and path.exists():
            for line in path.read_text().splitlines():
                found = json.loads(line)
                if found["settings"] == settings:
                    self.fits[tuple(found["key"])] = Fit(**found["fit"])

    def get(self, key: Key, make: Callable[[], Fit]) -> Fit:
        """The fit of a key, made and written down if there is none yet."""
        if key not in self.fits:
            self.fits[key] = found = make()
            tqdm.write(
                f"{', '.join(map(str, key))}: test {found.test:.2%}, validation {found.validation:.2%}, loss "
                f"{found.loss:.3f}, {found.seconds:.0f} CPU s, turned {found.turned:.0e}, reclassified "
                f"{found.reclassified:.0%}"
            )
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps({"settings": self.settings, "key": key, "fit": found._asdict()}) + "\n")
        return self.fits[key]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def verdict(differences: Sequence[float]) -> str:
    """Whether implicit minus residual is below 0, by Student's t on both sides at 95%."""
    mean, error = spread(differences)
    if not error >= 0 or abs(mean) <= stats.t.ppf(0.975, len(differences) - 1) * error:
        return "undecided"
    return "confirmed" if mean < 0 else "refuted"


Errors = dict[tuple[str, str, str, float], list[float]]


def errors_of(fits: Fits, lr: float, seeds: Sequence[int]) -> Errors:
    """Test errors in %, a list over the seeds by data, kind, symmetry and c; those that miss a seed are left out."""
    found: Errors = {}
    for data, kind, symmetry, c, *_ in fits:
        runs = [fits.get((data, kind, symmetry, c, seed, lr)) for seed in seeds]
        found[data, kind, symmetry, c] = [100 * run.test for run in runs if run]
    return {key: values for key, values in found.items() if len(values) == len(seeds)}


def table(errors: Errors, names: Sequence[str], args: Any) -> None:
    """Errors of each network, and paired differences: for each c, and of the means over c."""
    print("\n| data | network | c | implicit | residual | implicit minus residual | the paper's claim |")
    print(7 * "|---" + "|")
    for data in names:
        for symmetry in args.symmetries:
            rows = [(f"{c:g}", *(errors[data, kind, symmetry, c] for kind in KINDS)) for c in args.constants]
            means = [[statistics.mean(runs) for runs in zip(*(row[i] for row in rows))] for i in (1, 2)]
            for c, implicit, residual in [*rows, ("mean", *means)]:
                less = [a - b for a, b in zip(implicit, residual)]
                cells = ["{:.2f} ({:.2f})".format(*spread(values)) for values in (implicit, residual)]
                cells.append("{:+.2f} ({:.2f})".format(*spread(less)))
                print("| " + " | ".join((data, symmetry, c, *cells, verdict(less))) + " |")


def summary(fits: Fits) -> None:
    """Parameters, time and checks of each arm."""
    print("\n| network | blocks | parameters | CPU s a training | logits turned | reclassified |\n" + 6 * "|---" + "|")
    for symmetry in SYMMETRIES:
        for kind in KINDS:
            mine = [run for (_, k, s, *_), run in fits.items() if (k, s) == (kind, symmetry)]
            if mine:
                turned, changed = max(run.turned for run in mine), max(run.reclassified for run in mine)
                seconds = statistics.mean(run.seconds for run in mine)
                print(f"| {symmetry} | {kind} | {mine[0].parameters} | {seconds:.1f} | {turned:.0e} | {changed:.1%} |")
    print(f"\nall {len(fits)} trainings: {sum(run.seconds for run in fits.values()):.0f} CPU seconds")


def draw(errors: Errors, names: Sequence[str], args: Any) -> None:
    """Test error against c, and below it the paired differences."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(data, symmetry) for data in names for symmetry in args.symmetries]
    shape = (2, len(panels))
    figure, axes = plt.subplots(*shape, figsize=(3.1 * len(panels), 5), layout="constrained", squeeze=False, dpi=130)
    styles = {"implicit": ("o", "-", "black"), "residual": ("s", "--", "#d55e00")}
    for (upper, lower), (data, symmetry) in zip(axes.T, panels):
        runs = {kind: [errors[data, kind, symmetry, c] for c in args.constants] for kind in KINDS}
        for shift, (kind, (marker, line, color)) in zip((-0.005, 0.005), styles.items()):
            look = {"marker": marker, "linestyle": line, "color": color, "capsize": 3, "markersize": 5}
            mean, error = zip(*map(spread, runs[kind]))
            upper.errorbar([c + shift for c in args.constants], mean, error, label=f"{kind} blocks", **look)
        pairs = zip(runs["implicit"], runs["residual"])
        mean, error = zip(*(spread([a - b for a, b in zip(*pair)]) for pair in pairs))
        lower.axhline(0, color="gray", linewidth=0.8)
        lower.errorbar(
            args.constants, mean, error, marker="o", linestyle="none", color="black", capsize=3, markersize=5
        )
        upper.set_title(f"{data}, {'$C_4$ built in' if symmetry == 'equivariant' else 'plain'}", fontsize=10)
        lower.set_xlabel("Lipschitz constant $c$ of each branch")
        for axis in (upper, lower):
            axis.set_xticks(args.constants, [f"{c:g}" for c in args.constants])
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25, linewidth=0.6)
    axes[0][0].set_ylabel("test error, %")
    axes[1][0].set_ylabel("implicit minus residual,\npaired, %")
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.savefig(args.picture)


def main() -> None:
    """Chooses the learning rate, trains every classifier with every seed, prints tables, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps of narrow networks")
    parser.add_argument("--fashion", type=Path, help="archive of Fashion-MNIST; without it MNIST only")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--constants", type=float, nargs="+", default=list(CONSTANTS), help="Lipschitz constants c")
    parser.add_argument("--symmetries", nargs="+", choices=SYMMETRIES, default=list(SYMMETRIES))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs=2, default=[24, 48], help="channels of the stages under C_4")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.04, 0.06, 0.09], help="the grid to choose from")
    parser.add_argument("--checked", type=int, default=CHECKED, help="test images looked at again in float64")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument(
        "--out", type=Path, help="a file of JSON lines that keeps finished trainings, and gives them back"
    )
    parser.add_argument("--picture", type=Path, help="where to draw")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.seeds, args.widths, args.lr, args.constants, args.checked = 2, 2, [8, 8], [0.01], [0.9], 5
    torch.set_num_threads(args.threads)
    sources = {"MNIST": mnist_classes()}
    if args.fashion:
        sources["Fashion-MNIST"] = fashion_classes(args.fashion)
    settings = {name: getattr(args, name) for name in ("steps", "batch", "widths")}
    record = Record(args.out, settings)
    seeds = range(args.seed, args.seed + args.seeds)

    def trained(data: str, kind: str, symmetry: str, c: float, seed: int, lr: float) -> Fit:
        def make() -> Fit:
            parts = prepared(sources[data], seed, (TRAIN, VALIDATION, TEST[data]), args.device)
            return fit(kind, symmetry, c, seed, lr, parts, args)

        return record.get((data, kind, symmetry, c, seed, lr), make)

    lr = args.lr[0]
    if len(args.lr) > 1:
        tried = [("MNIST", kind, symmetry, 0.9, args.seed) for symmetry in args.symmetries for kind in KINDS]
        scores = {rate: statistics.mean(trained(*arm, rate).validation for arm in tried) for rate in args.lr}
        lr = min(scores, key=lambda rate: scores[rate])
        print("mean validation error by learning rate:", {rate: f"{score:.2%}" for rate, score in scores.items()})
    # Seeds outermost: what is there of an interrupted run is balanced.
    arms = [(data, k, s, c) for data in sources for c in args.constants for s in args.symmetries for k in KINDS]
    for seed, arm in tqdm([(seed, arm) for seed in seeds for arm in arms], desc="trainings", disable=None):
        trained(*arm, seed, lr)
    errors = errors_of(record.fits, lr, seeds)
    table(errors, list(sources), args)
    summary(record.fits)
    if args.picture:
        draw(errors, list(sources), args)


if __name__ == "__main__":
    main()
