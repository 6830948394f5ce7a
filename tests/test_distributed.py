# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does on the joint batch, and a killed run ends where one that was not does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
import torch.distributed as ranks
import torch.multiprocessing as processes
from torch.nn.parallel import DistributedDataParallel

import pyro_equiflow as pe
from tests.cases import field_type
from tests.distributed_workers import FLOWS, ROOT, WORLD, gradients, likelihood, sensors, tutorial, work

pytestmark = pytest.mark.skipif(not ranks.is_available() or not ranks.is_gloo_available(), reason="needs gloo")

RUN = ["sensors", "--rows", "31", "--batch", "8", "--steps", "9", "--every", "2", "--seed", "11"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(folder):
    """What two processes found, rank by rank."""
    arguments = (folder, tutorial.parse(RUN))
    processes.start_processes(work, arguments, nprocs=WORLD, start_method="spawn")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def assert_gradients(found, name, expected):
    """To 1e-10 of the largest entry, on every rank: sums in another order differ by rounding, 1e-13 of it."""
    scale = max(gradient.abs().max() for gradient in expected.values() if gradient.numel())
    assert scale > 0.1
    for rank in found:
        assert rank[name].keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(rank[name][key] / scale, gradient / scale, rtol=0, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", FLOWS)
def test_gradients_of_a_density_are_those_of_the_joint_batch(found, name):
    module, rows = likelihood(name)
    module.zero_grad()
    module(rows).backward()
    assert_gradients(found, name, gradients(module))


def test_gradients_of_a_guide_are_those_of_the_joint_batch(found):
    """With the same draws on every rank, the mean of the ranks' ELBOs is that of all data."""
    module, rows = sensors()
    module.zero_grad()
    pyro.set_rng_seed(7)
    module(rows, 1.0).backward()
    assert_gradients(found, "same noise", gradients(module))


def test_ranks_draw_their_own_noise(found):
    """The gradient is the mean of those that one process finds by each rank's seed on each rank's rows."""
    module, rows = sensors()
    module.zero_grad()
    for rank in range(WORLD):
        pyro.set_rng_seed(7 + rank)
        (module(rows[rank::WORLD], float(WORLD)) / WORLD).backward()
    assert_gradients(found, "own noise", gradients(module))


def test_every_row_counts_once(found):
    """31 rows in shards of 16 and 15, by batches of 8: the gradient's scale is that of all data."""
    for rank in found:
        assert rank["rows"] == 31


def test_ranks_start_from_the_first_ones_first_batch(found):
    """A rank whose actnorm saw no batch keeps what it is handed: parameters are equal, and set by the first rank's."""
    first, second = (rank["actnorm"] for rank in found)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    flags = [value for key, value in first.items() if key.endswith("initialized")]
    assert flags and all(flags)


@pytest.fixture
def alone(tmp_path):
    ranks.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    ranks.destroy_process_group()


def test_nothing_is_set_inside_a_wrapped_module(alone):
    """A first batch of actnorm, or a first call of a guide, would leave each rank with parameters of its own."""
    norm = DistributedDataParallel(pe.equivariant_actnorm(field_type("O2")))
    rows = torch.randn(20, 8)
    norm(rows[:15])  # too few rows set nothing
    with pytest.raises(ValueError, match="EquivariantActNorm: expected parameters .* call the module once, then wrap"):
        norm(rows)
    norm.module(rows)
    assert norm(rows).square().mean() < 1.1

    elbo, rows = tutorial.sensors("coupling", 10)
    elbo.own = torch.nn.Parameter(torch.zeros(1))  # DDP itself refuses a module without parameters
    wrapped = DistributedDataParallel(elbo)
    with pytest.raises(ValueError, match="AutoEquivariantFlow: expected parameters .* call the module once, then wrap"):
        wrapped(rows, 1.0)
    elbo(rows, 1.0)


def test_a_killed_run_ends_where_one_that_was_not_does(found, folder):
    """One rank is killed after the step behind a checkpoint; torchrun starts both anew, and they go on from there.

    More restarts than one, since gloo may abort a process that is done, while its interpreter shuts down (pytorch
    179291): then the ranks start once more, and find nothing left to do.
    """
    path = folder / "killed.pt"
    script = Path(__file__).with_name("distributed_workers.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}"]
    torchrun += ["--max_restarts=3", "--monitor_interval=0.1", f"--log_dir={folder}"]
    command = [*torchrun, str(script), "5", *RUN]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    # Without it restarted ranks may be handed the addresses of the dead (pytorch issues 135712, 167288).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    done = subprocess.run(
        [*command, "--checkpoint", str(path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"(exitcode: -{signal.SIGKILL.value}) local_rank: 1" in done.stderr, done.stderr
    killed = torch.load(path, weights_only=True)
    assert killed["step"] == 9
    whole = found[0]["trained"]
    assert whole.keys() == killed["module"].keys()
    for rank in found:
        for key, value in rank["trained"].items():
            assert torch.equal(value, killed["module"][key]), key


def test_checkpoints_are_of_as_many_ranks(found, folder, alone):
    elbo, rows = tutorial.sensors("coupling", 10)
    elbo(rows, 1.0)
    with pytest.raises(ValueError, match="whole.pt: expected a checkpoint of 1 ranks, found one of 2"):
        tutorial.resume(folder / "whole.pt", elbo, torch.optim.Adam(elbo.parameters()))
    assert tutorial.resume(folder / "none.pt", elbo, torch.optim.Adam(elbo.parameters())) == 0
