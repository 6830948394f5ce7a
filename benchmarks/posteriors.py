# SPDX-License-Identifier: Apache-2.0
"""Ten posteriors with a symmetry: the equivariant guide with nothing said beside four plain guides of Pyro's.

Models, data and the evidence are in ``posterior_models.py``. Ours is ``AutoEquivariantFlow(model, representations)`` at
one learning rate for all; each of Pyro's guides runs at three rates with the first seed, and at the best of them with
the others. Everything else is alike: ``Trace_ELBO`` with one particle, Adam, gradients clipped to norm 10, a cosine of
the learning rate over the budget. Budgets are seconds, of processor time, setting up included, and steps. The score is
the ELBO of the guide as it draws and scores after training, on all of the data, in nats.

A density that sits on one of the modes that the group maps onto each other loses log(modes), which an average over the
group would win back; the list names that number, and the scores of Pyro's guides are left as they are.

Results are appended to ``out/posteriors.jsonl``: a run that is interrupted goes on where it stopped, and what is there
is not run again. Remove the file, or name another with ``--results``, when guides have changed.

``--cost`` prints what a step costs, ``--evidence`` estimates the evidence anew by annealing (``annealing.py``),
``--picture PATH`` draws how far the guides fall short.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import annealing
import pyro
import torch
from posterior_models import EVIDENCE, POSTERIORS, Evidence, Posterior
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from timing import clock, ratio

from pyro_equiflow.infer import AutoEquivariantFlow, evidence_estimate, importance_weights

OURS = "AutoEquivariantFlow"
PAIRS_AT_ONCE = 2_000_000  # evaluation's draws at once, times the size of a model's largest array


def autoregressive(latent_dim: int) -> torch.nn.Module:
    """Three affine autoregressive transforms: stronger than the single one of ``AutoIAFNormal``."""
    return iterated(3, affine_autoregressive, latent_dim, hidden_dims=[max(64, latent_dim)])


#: By name how a guide is made, and the learning rates to choose from.
GUIDES: dict[str, tuple[Callable[[Posterior], Any], tuple[float, ...]]] = {
    OURS: (lambda p: AutoEquivariantFlow(p.model, p.representations), (5e-3,)),
    "AutoNormal": (lambda p: AutoNormal(p.model), (3e-3, 1e-2, 3e-2)),
    "AutoMultivariateNormal": (lambda p: AutoMultivariateNormal(p.model), (3e-3, 1e-2, 3e-2)),
    "AutoLowRankMultivariateNormal": (lambda p: AutoLowRankMultivariateNormal(p.model), (3e-3, 1e-2, 3e-2)),
    "IAF": (lambda p: AutoNormalizingFlow(p.model, autoregressive), (1e-3, 3e-3, 1e-2)),
}


class Run(NamedTuple):
    """What names a training: two of the same name are the same."""

    posterior: str
    guide: str
    rate: float
    unit: str
    budget: float
    particles: int
    seed: int


# ---- one training ----------------------------------------------------------------------------------------------


class Training:
    """A guide with its optimizer; parameters exist from the first call of the ELBO on."""

    def __init__(self, posterior: Posterior, guide: Any, particles: int) -> None:
        self.guide, self._args = guide, posterior.args
        elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)
        self._elbo = elbo(posterior.model, guide)
        self._elbo(*self._args)
        self._parameters = list(guide.parameters())
        self._optimizer = torch.optim.Adam(self._parameters)

    def step(self, rate: float = 1e-3) -> float:
        """One step at a learning rate; returns the loss."""
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = rate
        self._optimizer.zero_grad()
        loss = self._elbo(*self._args)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 10.0)
        self._optimizer.step()
        return loss.item()


def fit(posterior: Posterior, run: Run, now: Callable[[], float]) -> tuple[Any, int, float]:
    """The trained guide, its steps and seconds; the budget's share that is spent rules the learning rate.

    :raises ArithmeticError: a loss that is not a number, after which no step can mend the guide.
    """
    start, steps = now(), 0
    training = Training(posterior, GUIDES[run.guide][0](posterior), run.particles)
    while (share := (steps if run.unit == "steps" else now() - start) / run.budget) < 1:
        loss = training.step(run.rate * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2))
        if math.isnan(loss):
            raise ArithmeticError(f"the loss was NaN at step {steps}")
        steps += 1
    return training.guide, steps, now() - start


def score(posterior: Posterior, guide: Any, draws: int) -> dict[str, float]:
    """ELBO, importance-weighted evidence and effective share of the guide's draws, on all of the data."""
    guide.eval()
    largest = max(value.numel() for value in posterior.data if isinstance(value, torch.Tensor))
    at_once = max(1, min(1000, PAIRS_AT_ONCE // largest))
    found = evidence_estimate(
        importance_weights(posterior.model, guide, *posterior.data, num_samples=draws, batch_size=at_once)
    )
    return {"elbo": found.elbo, "stderr": found.elbo_stderr, "bound": found.log_evidence, "ess": found.efficiency}


def trained(run: Run, draws: int, now: Callable[[], float]) -> dict[str, Any]:
    """The row of a run: its name and its score, or the error that ended it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(run.seed)
    posterior = POSTERIORS[run.posterior]()
    try:
        guide, steps, seconds = fit(posterior, run, now)
        found: dict[str, Any] = {"steps": steps, "seconds": round(seconds, 2), **score(posterior, guide, draws)}
    except (ArithmeticError, ValueError, RuntimeError) as error:  # of other kinds would be this script's own
        found = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
    return {**run._asdict(), **found}


# ---- all trainings ---------------------------------------------------------------------------------------------


class Book:
    """Rows by run, kept in a file of one JSON object a line, if there is one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: dict[Run, dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._rows[Run(*(row[name] for name in Run._fields))] = row

    def row(self, run: Run, make: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
        """The row of a run, made and written down where it is not there yet."""
        if run not in self._rows:
            row = self._rows[run] = make(run)
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if "error" in row:
                result = row["error"]
            else:
                result = f"{row['steps']:6d} steps  {row['seconds']:6.1f} s  ELBO {row['elbo']:.3f}"
            label = f"{run.posterior:14} {run.guide:30} {run.rate:<6g} {run.budget:g} {run.unit}  seed {run.seed}"
            print(f"{label}  {result}", flush=True)
        return self._rows[run]


def runs(
    name: str, guide: str, unit: str, budget: float, args: argparse.Namespace, row: Callable[[Run], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of a guide by seed, at the learning rate that is the best with the first seed."""
    tuning = [row(Run(name, guide, rate, unit, budget, args.particles, args.seed)) for rate in GUIDES[guide][1]]
    best = max(tuning, key=elbo)
    others = range(args.seed + 1, args.seed + args.seeds)
    return [best, *(row(Run(name, guide, best["rate"], unit, budget, args.particles, seed)) for seed in others)]


def elbo(row: dict[str, Any]) -> float:
    """The ELBO of a run, -infinity where it failed."""
    value = row.get("elbo", -math.inf)
    return -math.inf if math.isnan(value) else value


class Cell(NamedTuple):
    """A guide on a posterior: mean over seeds, half the range, the mean standard error of one score."""

    mean: float
    spread: float
    stderr: float
    rate: float
    steps: float


def cell(rows: list[dict[str, Any]]) -> Cell:
    values = [elbo(row) for row in rows]
    mean = statistics.fmean(values)
    spread = (max(values) - min(values)) / 2 if math.isfinite(mean) else math.nan
    stderr, steps = (statistics.fmean(row.get(key, math.nan) for row in rows) for key in ("stderr", "steps"))
    return Cell(mean, spread, stderr, rows[0]["rate"], steps)


# ---- what it comes to ------------------------------------------------------------------------------------------


def table(cells: dict[str, dict[str, Cell]]) -> Iterator[str]:
    """Lines: each guide on each posterior, its distance to the evidence or, where that is unknown, to the best."""
    yield f"{'posterior':14} {'guide':30} {'rate':>6} {'steps':>7} {'ELBO':>9} {'+-':>6} {'s.e.':>6} {'short by':>9}"
    for name, by_guide in cells.items():
        known = EVIDENCE.get(name)
        goal = known.value if known else max(c.mean for c in by_guide.values())
        for guide, c in by_guide.items():
            yield (
                f"{name:14} {guide:30} {c.rate:6g} {c.steps:7.0f} {c.mean:9.3f} {c.spread:6.3f} {c.stderr:6.3f} "
                f"{goal - c.mean:9.3f}"
            )


def summary(cells: dict[str, dict[str, Cell]]) -> Iterator[str]:
    """How often the default guide is the best or near it, and how often near the evidence."""
    best = [name for name, by in cells.items() if by[OURS].mean > max(c.mean for c in by.values()) - 0.1]
    yield f"{OURS} is best or within .1 nat of the best on {len(best)} of {len(cells)}: {', '.join(best)}"
    small = [name for name in cells if name in EVIDENCE and POSTERIORS[name]().dimension <= 10]
    near = [name for name in small if cells[name][OURS].mean > EVIDENCE[name].value - 0.15]
    yield f"within .15 nat of the evidence on {len(near)} of {len(small)} of 10 dimensions at most: {', '.join(near)}"


def draw(cells: dict[str, dict[str, Cell]], path: Path) -> None:
    """By posterior how far each guide falls short of the evidence, or of the best where that is unknown."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 4.4), layout="constrained", dpi=150)
    for guide, marker in zip(GUIDES, "osD^v"):
        places, short = [], []
        for place, (name, by_guide) in enumerate(cells.items()):
            goal = EVIDENCE[name].value if name in EVIDENCE else max(c.mean for c in by_guide.values())
            if guide in by_guide and math.isfinite(by_guide[guide].mean):
                places.append(place)
                short.append(goal - by_guide[guide].mean)
        fill = "black" if guide == OURS else "none"
        axis.scatter(short, places, s=30, facecolors=fill, edgecolors="black", marker=marker, label=guide)
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set_yticks(range(len(cells)), list(cells))
    axis.invert_yaxis()
    axis.set_xlabel("nats below the log evidence (symmetric logarithmic scale)")
    axis.grid(axis="x", linewidth=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)


def costs(name: str, particles: int, rounds: int, now: Callable[[], float]) -> str:
    """A line: milliseconds of a step of ours and of ``AutoMultivariateNormal``, in turns, and their ratio."""
    posterior = POSTERIORS[name]()
    pyro.clear_param_store()
    pair = [Training(posterior, GUIDES[guide][0](posterior), particles) for guide in (OURS, "AutoMultivariateNormal")]
    ours, theirs, times = ratio(pair[0].step, pair[1].step, rounds, now)
    return f"{name:14} {1e3 * ours:8.2f} {1e3 * theirs:8.2f} {times:7.2f}"


def annealed(name: str, args: argparse.Namespace) -> Evidence:
    """The evidence by annealing, in double precision."""
    torch.set_default_dtype(torch.float64)
    posterior = POSTERIORS[name]()
    joint = annealing.Joint(posterior.model, posterior.data)
    count = 50 if args.smoke else args.chains
    value, stderr, _ = annealing.log_evidence(joint, count, 2 if args.smoke else args.repeats, progress=print)
    return Evidence(value, stderr)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two steps of everything; nothing is written down")
    parser.add_argument("--only", nargs="+", choices=tuple(POSTERIORS), default=list(POSTERIORS), metavar="POSTERIOR")
    parser.add_argument("--guides", nargs="+", choices=tuple(GUIDES), default=list(GUIDES), metavar="GUIDE")
    parser.add_argument("--seconds", type=float, default=60.0, help="the first budget, 0 to leave it out")
    parser.add_argument("--steps", type=int, default=2000, help="the second budget, 0 to leave it out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--particles", type=int, default=1, help="of each step of every guide")
    parser.add_argument("--draws", type=int, default=20_000, help="draws behind a score")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "out" / "posteriors.jsonl")
    parser.add_argument("--cost", action="store_true", help="time steps only")
    parser.add_argument("--evidence", action="store_true", help="estimate the evidence only")
    parser.add_argument("--chains", type=int, default=1000, help="particles behind an estimate of the evidence")
    parser.add_argument("--repeats", type=int, default=10, help="estimates whose mean it is")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", type=Path, help="file for the picture, at equal seconds")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_default_device(args.device)
    now = clock(args.device)
    pyro.set_rng_seed(args.seed)
    if args.evidence:
        for name in args.only:
            known, start = EVIDENCE.get(name), time.process_time()
            found = annealed(name, args)
            seconds = time.process_time() - start
            print(f"{name:14} {found.value:.4f} +- {found.stderr:.4f}, {seconds:.0f} s; known: {known}", flush=True)
        return
    if args.cost:
        print(f"{'ms a step':14} {'ours':>8} {'normal':>8} {'ratio':>7}")
        for name in args.only:
            print(costs(name, args.particles, 2 if args.smoke else 50, now), flush=True)
        return
    if args.smoke:
        args.seconds, args.steps, args.seeds, args.draws = 0.0, 2, 1, 100
    book = Book(None if args.smoke else args.results)

    def row(run: Run) -> dict[str, Any]:
        return book.row(run, lambda run: trained(run, args.draws, now))

    for unit, budget in (("seconds", args.seconds), ("steps", float(args.steps))):
        if not budget:
            continue
        cells: dict[str, dict[str, Cell]] = {}
        for name in args.only:
            cells[name] = {guide: cell(runs(name, guide, unit, budget, args, row)) for guide in args.guides}
        print(f"\n{budget:g} {unit}, {args.seeds} seeds, {args.particles} particles a step")
        for line in table(cells):
            print(line)
        if OURS in args.guides:
            for line in summary(cells):
                print(line)
        if args.picture and (unit == "seconds" or not args.seconds):
            draw(cells, args.picture)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*Encountered (NaN|\\+inf).*")
    main()
