# SPDX-License-Identifier: Apache-2.0
"""The karate club's posterior by every kind of flow, on one budget: which guide is best?

Model, fit and measures are those of ``tutorials/karate.py``: latent positions of 34 members in the plane, a posterior
that no rotation or reflection changes. Every guide is an ``AutoEquivariantFlow`` under SO(2) with the same number of
optimizer steps and draws per step; afterwards each is averaged over a reflection, so that it is invariant under O(2).
Residual and implicit flows train on unbiased estimates of the log-det and are scored with exact ones.

``--picture PATH`` draws every ELBO over the training's seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from timing import clock

from pyro_equiflow import equivariant_flow, field_type
from pyro_equiflow.infer import AutoEquivariantFlow
from pyro_equiflow.logdet import Exact

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorials"))
import karate as tutorial

#: For each kind its flow, and the learning rate: the best of those that RESULTS.md names.
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "coupling": ({"num_transforms": 4, "hidden_dims": (128, 128)}, 5e-3),
    "coupling, commutant": ({"num_transforms": 4, "hidden_dims": (128, 128), "transformer": "commutant"}, 5e-3),
    "coupling, spline": ({"num_transforms": 4, "hidden_dims": (128, 128), "transformer": "spline"}, 5e-3),
    "iaf": ({"kind": "iaf", "num_transforms": 4, "hidden_dims": (128, 128)}, 5e-3),
    "iaf, spline": ({"kind": "iaf", "num_transforms": 4, "hidden_dims": (128, 128), "transformer": "spline"}, 5e-3),
    "residual": ({"kind": "residual", "num_transforms": 4, "hidden_dims": (128, 128)}, 5e-3),
    "implicit": ({"kind": "implicit", "num_transforms": 2, "hidden_dims": (128, 128)}, 5e-3),
}


def score_exactly(guide: AutoEquivariantFlow) -> None:
    """From now on log-dets are exact."""
    for part in guide.transform:
        if hasattr(part, "log_det"):
            part.log_det = Exact()


def model_on(device: str, model: Callable, network: tutorial.Network) -> None:
    """The model with its priors on a device: no argument of its own says where it makes them."""
    with torch.device(device):
        model(network)


def run(name: str, flow: Callable, learning_rate: float, network: tutorial.Network, args: argparse.Namespace) -> list:
    """One guide trained and measured, alone and averaged over a reflection."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    guide = AutoEquivariantFlow(tutorial.model, {"z": field_type("SO(2)", vectors=len(network.graph))}, flow)
    now = clock(args.device)
    start = now()
    tutorial.fit(name, guide, learning_rate, network, args.steps, args.particles)
    seconds = now() - start
    guide.eval()
    score_exactly(guide)
    rows = [tutorial.measure(f"{name}: SO(2)", guide, network, args.draws, seconds)]
    guide.average_over({"z": field_type("D_1", vectors=len(network.graph))}, network)
    return [*rows, tutorial.measure("  averaged: O(2)", guide, network, args.draws, seconds)]


def draw(rows: list[tutorial.Row], path: Path) -> None:
    """ELBO over seconds, each kind twice, alone and averaged: pairs of neighbouring rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.8, 4.4), layout="constrained", dpi=150)
    alone, averaged = rows[::2], rows[1::2]
    near = 0.08 * (max(row.elbo for row in rows) - min(row.elbo for row in rows))
    for kind, fill in ((alone, "white"), (averaged, "black")):
        axis.errorbar(
            [row.seconds for row in kind],
            [row.elbo for row in kind],
            [row.elbo_stderr for row in kind],
            fmt="o",
            markersize=4,
            markerfacecolor=fill,
            color="black",
            capsize=5,
            elinewidth=0.8,
        )
    for first, second in zip(alone, averaged):
        # To the left where a neighbour would lie under the label.
        crowded = any(1 < r.seconds / second.seconds < 1.2 and abs(r.elbo - second.elbo) < near for r in averaged)
        axis.plot([first.seconds, second.seconds], [first.elbo, second.elbo], color="0.6", linewidth=0.8, zorder=0)
        axis.annotate(
            first.guide.removesuffix(": SO(2)"),
            (second.seconds, second.elbo),
            (-8 if crowded else 8, 0),
            textcoords="offset points",
            ha="right" if crowded else "left",
            va="center_baseline",
            fontsize=8.5,
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="training, seconds", ylabel="ELBO, nats")
    axis.set_title("open: under SO(2); filled: averaged, O(2); bars: one standard error", loc="left", fontsize=8.5)
    axis.margins(x=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Trains every kind, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--particles", type=int, default=128)
    parser.add_argument("--draws", type=int, default=20_000, help="draws behind a row of the table")
    parser.add_argument("--lr", type=float, help="one learning rate for all, in place of the script's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--picture", type=Path, help="where to draw")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.particles, args.draws = 3, 8, 2 * tutorial.BOUND_PARTICLES
    torch.set_num_threads(args.threads)
    network = tutorial.load_network()
    network = network._replace(pairs=network.pairs.to(args.device), tied=network.tied.to(args.device))
    if args.device != "cpu":
        tutorial.model = partial(model_on, args.device, tutorial.model)
    rows: list[tutorial.Row] = []
    for name in args.kinds:
        options, learning_rate = KINDS[name]
        rows += run(name, partial(equivariant_flow, **options), args.lr or learning_rate, network, args)
        print(tutorial.table(rows[-2:]), flush=True)
    print(f"\n{args.steps} steps of {args.particles} draws, seed {args.seed}; seconds of the training")
    print(tutorial.table(rows))
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
