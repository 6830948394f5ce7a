# SPDX-License-Identifier: Apache-2.0
"""Path gradients beside Pyro's: the noise of the gradient, and what the same seconds of training come to.

On the posterior of the karate club (``tutorials/karate.py``, a guide under SO(2) of four affine couplings) and
on the lattice field of ``phi4.py`` (side 4, log Z known; a flow of spline couplings on the periodic grid). Both ELBOs
train from one start for the same CPU seconds, at a rate that falls to zero with the last of them; then each gradient's
noise is measured there: the root of its total variance over draws. Not the library's times but the ratio of the two is
what a table of this says.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from escnn import gspaces
from escnn.nn import FieldType
from phi4 import EXACT, log_density
from pyro.infer import ELBO, Trace_ELBO

from pyro_equiflow import InvariantNormal, equivariant_flow, field_type, image_flow
from pyro_equiflow.infer import AutoEquivariantFlow, TracePathGradient_ELBO, diagnose

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorials"))
import karate as tutorial

ELBOS = {"plain": Trace_ELBO, "path": TracePathGradient_ELBO}
SIDE, COUPLING = 4, 8.0


class Problem(NamedTuple):
    """What is trained.

    :ivar model: a model without arguments.
    :ivar guide: makes a guide, called once, from the present seed.
    :ivar rate: Adam's, at the start.
    :ivar seconds: of training, by default.
    """

    model: Callable[[], None]
    guide: Callable[[], torch.nn.Module]
    rate: float
    seconds: float


def karate() -> Problem:
    """The tutorial's model and guide."""
    network = tutorial.load_network()
    model = partial(tutorial.model, network)
    points = field_type("SO(2)", vectors=len(network.graph))
    flow = partial(equivariant_flow, num_transforms=4, hidden_dims=(64, 64))
    return Problem(model, lambda: AutoEquivariantFlow(model, {"z": points}, flow, check_invariance=False), 5e-3, 40.0)


def lattice() -> Problem:
    """The density of ``phi4.py`` as a model: a prior, and a factor that makes the action of it."""
    normal = dist.Normal(torch.zeros(1, SIDE, SIDE), 1.0).to_event(3)
    space = gspaces.flipRot2dOnR2(4)
    field_type = FieldType(space, [space.trivial_repr])

    def model() -> None:
        phi = pyro.sample("phi", normal)
        pyro.factor("action", log_density(phi, COUPLING) - normal.log_prob(phi))

    class Guide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = image_flow(
                field_type, (SIDE, SIDE), padding_mode="circular", transformer="spline", hidden_dims=(32,)
            )
            base = InvariantNormal(field_type, (SIDE, SIDE), scale=torch.ones(1))
            self.density = dist.TransformedDistribution(base, [self.flow])

        def forward(self) -> None:
            pyro.module("flow", self.flow)
            pyro.sample("phi", self.density)

    return Problem(model, Guide, 1e-2, 20.0)


PROBLEMS = {"karate": karate, "phi4": lattice}


def estimator(name: str, particles: int) -> ELBO:
    """An ELBO by name."""
    return ELBOS[name](num_particles=particles, vectorize_particles=True, max_plate_nesting=0)


def train(problem: Problem, name: str, guide: torch.nn.Module, particles: int, seconds: float) -> int:
    """Trains for some CPU seconds; returns the steps taken."""
    elbo, parameters = estimator(name, particles), [p for p in guide.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=problem.rate, betas=(0.9, 0.99))
    start, steps = time.process_time(), 0
    while (done := (time.process_time() - start) / seconds) < 1:
        for part in optimizer.param_groups:
            part["lr"] = problem.rate * min(1.0, (steps + 1) / 50) * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        elbo.differentiable_loss(problem.model, guide).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        steps += 1
    return steps


def noise(problem: Problem, name: str, guide: torch.nn.Module, particles: int, repeats: int) -> float:
    """The root of a gradient's total variance."""
    elbo, parameters = estimator(name, particles), [p for p in guide.parameters() if p.requires_grad]
    rows = []
    for _ in range(repeats):
        found = torch.autograd.grad(elbo.differentiable_loss(problem.model, guide), parameters, allow_unused=True)
        rows.append(torch.cat([g.flatten() for g in found if g is not None]))
    return float(torch.stack(rows).var(0).sum().sqrt())


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds and draws so few that the numbers mean nothing")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="times are CPU times")
    parser.add_argument("--repeats", type=int, default=3, help="seeds")
    parser.add_argument("--problems", nargs="+", choices=tuple(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--particles", type=int, default=32, help="draws per step")
    parser.add_argument("--scale-seconds", type=float, default=1.0, help="factor on the seconds of training")
    parser.add_argument("--draws", type=int, default=20_000, help="for the ELBO")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.scale_seconds, args.draws, args.particles, args.repeats = 0.01, 100, 4, 1
    torch.set_num_threads(1)
    print("| posterior | seed | gradient | steps | ELBO | s.e. | ESS | noise of plain | noise of path | path / plain |")
    print(10 * "|---" + "|")
    for which in args.problems:
        problem = PROBLEMS[which]()
        for seed in range(args.seed, args.seed + args.repeats):
            for name in ELBOS:
                pyro.clear_param_store()
                pyro.set_rng_seed(seed)
                guide = problem.guide()
                guide()
                steps = train(problem, name, guide, args.particles, args.scale_seconds * problem.seconds)
                noises = [noise(problem, n, guide, args.particles, 4 if args.smoke else 50) for n in ELBOS]
                report = diagnose(guide, problem.model, num_samples=args.draws).estimate
                print(
                    f"| {which} | {seed} | {name} | {steps} | {report.elbo:.3f} | {report.elbo_stderr:.3f} "
                    f"| {report.efficiency:.3f} | {noises[0]:.3g} | {noises[1]:.3g} | {noises[1] / noises[0]:.2f} |",
                    flush=True,
                )
    print(f"log Z of phi4: {EXACT[SIDE, COUPLING]:.4f}")


if __name__ == "__main__":
    main()
