# SPDX-License-Identifier: Apache-2.0
"""A variational step of equivariant inverse autoregressive flows against Pyro's own of the same channel counts.

Both are stacks of six in a ``TransformedDistribution``. A step draws, scores its own draws, and takes one Adam step up
the ELBO of a normal target. Pyro's networks have ReLU, as its factory makes them, and a second time SiLU, as ours have.
The inverse of one transform, which scores what another flow drew, is timed in passes of its network (a pass: the map
forward): ours takes one per block, Pyro's one per channel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pyro.distributions as dist
import torch
from escnn import group, gspaces
from escnn import nn as enn
from pyro.distributions.transforms import affine_autoregressive
from timing import clock, ratio

from pyro_equiflow import Compose, equivariant_iaf

TRANSFORMS, HIDDEN, BATCH = 6, (64, 64), 1024


def field_types() -> dict[str, enn.FieldType]:
    """The field types of the table, of 32 channels or 33."""
    spaces = {
        name: gspaces.no_base_space(g)
        for name, g in {
            "trivial": group.trivial_group(),
            "C_4": group.cyclic_group(4),
            "D_8": group.dihedral_group(8),
            "SO(2)": group.so2_group(),
            "O(2)": group.o2_group(),
            "SO(3)": group.so3_group(),
        }.items()
    }
    trivial, c4, d8, so2, o2, so3 = spaces.values()
    return {
        "32 scalars, trivial group": enn.FieldType(trivial, 32 * [trivial.trivial_repr]),
        "8 regular fields of C_4": enn.FieldType(c4, 8 * [c4.regular_repr]),
        "16 vectors of C_4": enn.FieldType(c4, 16 * [c4.irrep(1)]),
        "2 regular fields of D_8": enn.FieldType(d8, 2 * [d8.regular_repr]),
        "16 vectors of SO(2)": enn.FieldType(so2, 16 * [so2.irrep(1)]),
        "16 vectors of O(2)": enn.FieldType(o2, 16 * [o2.irrep(1, 1)]),
        "11 vectors of SO(3)": enn.FieldType(so3, 11 * [so3.irrep(1)]),
    }


def elbo_step(transforms: list[torch.nn.Module], channels: int, device: str) -> Callable[[], None]:
    """A step of Adam on the ELBO of draws, for a normal target of mean and scale 2."""
    base = dist.Normal(torch.zeros(channels, device=device), 1.0).to_event(1)
    target = dist.Normal(torch.full((channels,), 2.0, device=device), 2.0).to_event(1)
    guide = dist.TransformedDistribution(base, transforms)
    optimizer = torch.optim.Adam(torch.nn.ModuleList(transforms).to(device).parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        y = guide.rsample((BATCH,))
        loss = (guide.log_prob(y) - target.log_prob(y)).mean()
        loss.backward()
        optimizer.step()

    return step


def ours(field_type: enn.FieldType) -> list[torch.nn.Module]:
    """The equivariant stack."""
    return [Compose([equivariant_iaf(field_type, hidden_dims=HIDDEN, identity_init=False) for _ in range(TRANSFORMS)])]


def pyros(channels: int, function: torch.nn.Module | None = None) -> list[torch.nn.Module]:
    """Pyro's stack as its factory makes it, or with another function between the layers."""
    stack = [affine_autoregressive(channels, hidden_dims=list(HIDDEN)) for _ in range(TRANSFORMS)]
    if function is not None:
        for transform in stack:
            transform.arn.f = function
    return stack


def inverse_passes(
    transform: torch.nn.Module, channels: int, blocks: int, rounds: int, device: str
) -> tuple[float, float]:
    """The seconds of an inverse, and those of one block in passes."""
    transform.to(device)
    data = torch.randn(BATCH, channels, device=device)
    with torch.no_grad():  # copies: no cache answers
        back, _, quotient = ratio(
            lambda: transform.inv(data.clone()), lambda: transform(data.clone()), rounds, clock(device)
        )
    return back, quotient / blocks


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--only", default="", help="field types whose names hold this")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rounds = 10 if args.smoke else 60
    kinds = {name: kind for name, kind in field_types().items() if args.only in name}

    print(f"{'step, ms':28s} {'ours':>7s} {'Pyro':>7s} {'ratio':>6s} {'at most':>8s} {'SiLU':>7s} {'ratio':>6s}")
    for name, kind in kinds.items():
        step = elbo_step(ours(kind), kind.size, args.device)
        pyros_step = elbo_step(pyros(kind.size), kind.size, args.device)
        mine, theirs, quotient = ratio(step, pyros_step, rounds, clock(args.device))
        relative = elbo_step(pyros(kind.size, torch.nn.SiLU()), kind.size, args.device)
        _, alike, other = ratio(step, relative, rounds, clock(args.device))
        figures = f"{quotient:6.2f} {1.15:8.2f} {1e3 * alike:7.2f} {other:6.2f}"
        print(f"{name:28s} {1e3 * mine:7.2f} {1e3 * theirs:7.2f} {figures}", flush=True)

    print(f"\n{'inverse':28s} {'blocks':>7s} {'ms':>7s} {'passes per block':>15s} {'Pyro, ms':>9s} {'a channel':>10s}")
    for name, kind in kinds.items():
        transform = equivariant_iaf(kind, hidden_dims=HIDDEN, identity_init=False)
        blocks = len(transform.order)
        mine, passes = inverse_passes(transform, kind.size, blocks, rounds, args.device)
        theirs, pyros_passes = inverse_passes(pyros(kind.size)[0], kind.size, kind.size, rounds, args.device)
        figures = f"{passes:15.2f} {1e3 * theirs:9.2f} {pyros_passes:10.2f}"
        print(f"{name:28s} {blocks:7d} {1e3 * mine:7.2f} {figures}", flush=True)


if __name__ == "__main__":
    main()
