# SPDX-License-Identifier: Apache-2.0
"""A guide or a density flow trained by several processes, with torch's own engine.

    torchrun --nproc_per_node=2 tutorials/distributed.py sensors
    torchrun --nproc_per_node=2 tutorials/distributed.py triangles --kind residual

``sensors`` fits an equivariant guide: where sensors stand in the plane, given noisy distances between them.
``triangles`` fits an equivariant density by maximum likelihood: random triangles, each turned at random. Both are
Pyro's ``Trace_ELBO()(model, guide)``, a module, in ``DistributedDataParallel``. Each rank holds a shard of the data and
draws its own noise; gradients are averaged. The loss of ``sensors`` that is printed is that of one mirror image, as
always in training; the guide's own is lower by up to log 2 (``docs/training.md``).

A run that is killed goes on from its last checkpoint and ends at the parameters of one that was not: start it again
with the same line, or let torchrun do so. ``docs/scale_out.md`` has the line for it and says what to do on many GPUs.
"""

import argparse
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as ranks
from escnn import group, gspaces
from escnn.nn import FieldType
from pyro.infer import Trace_ELBO
from pyro.infer.elbo import ELBOModule
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pyro_equiflow import AutoEquivariantFlow, InvariantNormal, equivariant_flow

NUM_SENSORS = 6
NOISE = 0.2


def plane_vectors(symmetry: group.Group, number: int) -> FieldType:
    """Points of the plane that move together."""
    space = gspaces.no_base_space(symmetry)
    vector = space.irrep(1, 1) if symmetry == group.o2_group() else space.irrep(1)
    return FieldType(space, number * [vector])


# ---- problems: a loss with its parameters made, and rows of data ------------------------------------------------


def sensors(kind: str, number: int, dtype: torch.dtype = torch.float32) -> tuple[ELBOModule, Tensor]:
    """Rows ``(i, j, distance)``; the posterior is invariant under rotations and reflections of all sensors."""
    source = torch.Generator().manual_seed(0)  # the data are not the run's seed's
    places = torch.randn(NUM_SENSORS, 2, generator=source, dtype=dtype)
    pairs = torch.triu_indices(NUM_SENSORS, NUM_SENSORS, 1)
    i, j = pairs[:, torch.randint(pairs.shape[1], (number,), generator=source)]
    noise = NOISE * torch.randn(number, generator=source, dtype=dtype)
    rows = torch.stack([i.to(dtype), j.to(dtype), (places[i] - places[j]).norm(dim=-1) + noise], -1)

    def model(rows: Tensor, scale: float) -> None:
        z = pyro.sample("z", dist.Normal(rows.new_zeros(NUM_SENSORS, 2), 1.0).to_event(2))
        i, j = rows[:, :2].long().T
        # The square root has no gradient where two points meet: a constant far below any distance gives it one.
        distance = (z[..., i, :] - z[..., j, :]).square().sum(-1).add(1e-12).sqrt()
        with pyro.poutine.scale(scale=scale):
            pyro.sample("distance", dist.Normal(distance, NOISE).to_event(1), obs=rows[:, 2])

    flow = partial(equivariant_flow, kind=kind, num_transforms=2, hidden_dims=(32, 32))
    guide = AutoEquivariantFlow(model, {"z": plane_vectors(group.o2_group(), NUM_SENSORS)}, flow)
    return Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)(model, guide), rows


class Triangles(pyro.nn.PyroModule):
    """A density of triangles that rotations leave unchanged; without latent sites the ELBO is the log-likelihood."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.field_type = plane_vectors(group.so2_group(), 3)
        flow = equivariant_flow(self.field_type, kind=kind, num_transforms=2, hidden_dims=(32, 32))
        self.flow = flow.to(dtype).inv  # from data to noise is the flow's own direction, so scoring solves nothing

    def forward(self, rows: Tensor, scale: float) -> None:
        base = InvariantNormal(self.field_type, scale=rows.new_ones(3))
        density = dist.TransformedDistribution(base, [self.flow])
        with pyro.plate("triangles", len(rows)), pyro.poutine.scale(scale=scale):
            pyro.sample("corners", density, obs=rows)


def triangles(kind: str, number: int, dtype: torch.dtype = torch.float32) -> tuple[ELBOModule, Tensor]:
    """Rows of three corners, nearly equilateral, each triangle turned by an angle of its own."""
    source = torch.Generator().manual_seed(0)
    thirds = torch.arange(3) * (2 * math.pi / 3)
    angle = thirds + 2 * math.pi * torch.rand(number, 1, generator=source, dtype=dtype)
    corners = torch.stack([angle.cos(), angle.sin()], -1)
    rows = (corners + 0.1 * torch.randn(corners.shape, generator=source, dtype=dtype)).flatten(1)
    return Trace_ELBO()(Triangles(kind, dtype), lambda rows, scale: None), rows


PROBLEMS = {"sensors": sensors, "triangles": triangles}


# ---- checkpoints ------------------------------------------------------------------------------------------------


def generator_states() -> dict[str, Tensor]:
    """Of the generators that draws come from; a rank on a GPU draws from the GPU's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def save(path: Path, elbo: ELBOModule, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Writes all that the next step hangs on; called by every rank, written by the first."""
    first = ranks.get_rank() == 0
    generators: list[Any] | None = ranks.get_world_size() * [None] if first else None
    ranks.gather_object(generator_states(), generators)
    if not first:
        return
    state = {"module": elbo.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "generators": generators}
    # Under its name the file is whole at every moment: whoever dies while writing leaves the one before.
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def resume(path: Path, elbo: ELBOModule, optimizer: torch.optim.Optimizer) -> int:
    """Goes back to a checkpoint, if there is one, and says how many steps are done.

    :raises ValueError: the checkpoint is of another number of ranks.
    """
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    generators, world = state["generators"], ranks.get_world_size()
    if len(generators) != world:
        raise ValueError(
            f"{path}: expected a checkpoint of {world} ranks, found one of {len(generators)}; start as many, or "
            "name another file"
        )
    elbo.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    own = generators[ranks.get_rank()]
    torch.set_rng_state(own["cpu"])
    if "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"])
    return state["step"]


# ---- training ---------------------------------------------------------------------------------------------------


def fit(args: argparse.Namespace) -> ELBOModule:
    """Trains on this rank's shard, in step with the others; the process group is there already."""
    rank, world = ranks.get_rank(), ranks.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    pyro.set_rng_seed(args.seed)
    elbo, rows = PROBLEMS[args.problem](args.kind, args.rows)
    shard = rows[rank::world].to(device)
    # Guides make their parameters and actnorm sets its own at the first call: before DDP hands out the first rank's.
    elbo.to(device)(shard[:1024], 1.0)
    module = DistributedDataParallel(elbo)
    optimizer = torch.optim.Adam(module.parameters(), lr=args.lr)
    # DDP takes the mean over ranks: times their number it is the sum over shards, and that is the whole data's.
    scale = world * len(shard) / args.batch
    # DDP lays out its buckets anew after the first backward pass, and sums over ranks follow the layout. With one pass
    # ahead a resumed run takes them in the same order as one that was not killed.
    module(shard[: args.batch], scale).backward()
    pyro.set_rng_seed(args.seed + rank)
    for step in range(resume(args.checkpoint, elbo, optimizer), args.steps):
        batch = shard[torch.randint(len(shard), (args.batch,)).to(device)]
        optimizer.zero_grad()
        loss = module(batch, scale)
        loss.backward()
        optimizer.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            save(args.checkpoint, elbo, optimizer, step + 1)
            ranks.reduce(mean := loss.detach(), 0)
            if rank == 0:
                print(f"step {step + 1}: loss {mean.item() / world:.2f}", flush=True)
    return elbo


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", choices=sorted(PROBLEMS))
    parser.add_argument("--kind", default="coupling", help="of equivariant_flow")
    parser.add_argument("--rows", type=int, default=600, help="of data, over all ranks")
    parser.add_argument("--batch", type=int, default=64, help="rows per rank and step")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--checkpoint", type=Path, default=Path("distributed.pt"), help="on a disk that all ranks see")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    pyro.settings.set(module_local_params=True)  # DDP knows the module's parameters, not those of Pyro's store
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    ranks.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    fit(args)
    ranks.destroy_process_group()


if __name__ == "__main__":
    main()
