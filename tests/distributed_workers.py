# SPDX-License-Identifier: Apache-2.0
"""What the ranks of ``test_distributed.py`` do; run by torchrun, a rank that dies in the middle of training."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as ranks
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

import pyro_equiflow as pe
from pyro_equiflow.logdet import Exact
from tests.cases import field_type, randomize

ROOT = Path(__file__).resolve().parent.parent
WORLD = 2


def _tutorial() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tutorial_distributed", ROOT / "tutorials" / "distributed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tutorial = _tutorial()


class Likelihood(torch.nn.Module):
    """The mean negative log-density of rows under a flow."""

    def __init__(self, flow: pe.EquivariantTransform) -> None:
        super().__init__()
        self.flow = flow
        self.base = dist.Normal(torch.zeros(flow.field_type.size, dtype=torch.float64), 1.0).to_event(1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return -dist.TransformedDistribution(self.base, [self.flow]).log_prob(rows).mean()


def _flow(kind: str, **options) -> pe.Compose:
    torch.manual_seed(3)
    flow = pe.equivariant_flow(field_type("O2"), kind=kind, num_transforms=2, hidden_dims=(8, 8), **options)
    return randomize(flow.double())


#: Scored backwards a coupling is closed; a residual flow is solved there, with its adjoint in the backward pass, and
#: scored forwards (its ``.inv``) it differentiates the Jacobian of every sample twice.
FLOWS: dict[str, Callable[[], pe.EquivariantTransform]] = {
    "coupling": lambda: _flow("coupling"),
    "residual": lambda: _flow("residual", log_det=Exact()).inv,
    "residual, solved": lambda: _flow("residual", log_det=Exact()),
    "implicit": lambda: _flow("implicit", log_det=Exact()),
}


def likelihood(name: str) -> tuple[Likelihood, torch.Tensor]:
    """A loss with all parameters set, and the joint batch."""
    flow = FLOWS[name]()
    rows = torch.randn(12, flow.field_type.size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    module = Likelihood(flow)
    module(torch.cat([rows, rows]))  # actnorm's first batch
    return module, rows


def sensors() -> tuple[torch.nn.Module, torch.Tensor]:
    """The tutorial's guide, its flow far from the identity, and the joint batch."""
    pyro.set_rng_seed(4)
    elbo, rows = tutorial.sensors("coupling", 10, torch.float64)
    elbo(rows, 1.0)
    return randomize(elbo, 0.1), rows


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def _of_ranks(module: torch.nn.Module, seed: int | None, *args) -> dict[str, torch.Tensor]:
    wrapped = DistributedDataParallel(module)
    for _ in range(2):  # DDP's buckets are others after the first pass
        module.zero_grad()
        if seed is not None:
            pyro.set_rng_seed(seed)
        wrapped(*args).backward()
    return gradients(module)


def _initialized_by_the_first_rank(rank: int) -> dict[str, torch.Tensor]:
    flow, rows = _flow("coupling"), torch.randn(20, 8, generator=torch.Generator().manual_seed(rank)).double()
    module = Likelihood(flow)
    if rank == 0:
        module(rows)
    else:
        randomize(flow)  # ranks that start apart are made alike too
    wrapped = DistributedDataParallel(module)
    wrapped(rows).backward()
    return module.state_dict()


class Ones(torch.nn.Module):
    """Each row adds one to the gradient of the only parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, rows: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * self.weight * rows.sum()


def _counted(path: Path, arguments: Namespace) -> torch.Tensor:
    tutorial.PROBLEMS["ones"] = lambda kind, number: (Ones(), torch.ones(number))
    arguments = Namespace(**{**vars(arguments), "problem": "ones", "checkpoint": path, "steps": 1})
    return tutorial.fit(arguments).weight.grad


def _trained(path: Path, arguments: Namespace) -> dict[str, torch.Tensor]:
    return tutorial.fit(Namespace(**{**vars(arguments), "checkpoint": path})).state_dict()


def work(rank: int, folder: Path, arguments: Namespace) -> None:
    """One rank: everything that the tests look at, in a file."""
    torch.set_num_threads(1)
    pyro.settings.set(module_local_params=True)
    ranks.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    found = {}
    for name in FLOWS:
        module, rows = likelihood(name)
        found[name] = _of_ranks(module, None, rows[rank::WORLD])
    for name, seed in (("same noise", 7), ("own noise", 7 + rank)):
        module, rows = sensors()
        found[name] = _of_ranks(module, seed, rows[rank::WORLD], float(WORLD))
    found["actnorm"] = _initialized_by_the_first_rank(rank)
    found["rows"] = _counted(folder / "ones.pt", arguments)
    found["trained"] = _trained(folder / "whole.pt", arguments)
    torch.save(found, folder / f"rank{rank}.pt")
    ranks.destroy_process_group()


def die_at(step: int) -> None:
    """The second rank kills itself after so many optimizer steps, the first time that it runs."""
    if os.environ["RANK"] != "1" or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    steps = 0

    def count(*_) -> None:
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)


if __name__ == "__main__":
    torch.set_num_threads(1)
    die_at(int(sys.argv.pop(1)))
    tutorial.main()
