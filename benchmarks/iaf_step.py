# SPDX-License-Identifier: Apache-2.0
"""A variational step of equivariant inverse autoregressive flows against Pyro's own of the same channel counts.

Both are six transforms in a ``TransformedDistribution``. A step draws, scores its own draws, and takes one Adam step up
the ELBO of a normal target. The inverse, which scores what another flow drew, is timed in passes of the network: ours
takes one a block, Pyro's one a channel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pyro.distributions as dist
import torch
from escnn import group, gspaces
from escnn import nn as enn
from pyro.distributions.transforms import affine_autoregressive
from pyro.nn import AutoRegressiveNN
from timing import ratio, seconds

from pyro_equiflow import Compose, EquivariantIAF, equivariant_iaf

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


def elbo_step(transforms: list[torch.nn.Module], channels: int) -> Callable[[], None]:
    """A step of Adam on the ELBO of draws, for a normal target of mean and scale 2."""
    base = dist.Normal(torch.zeros(channels), 1.0).to_event(1)
    target = dist.Normal(torch.full((channels,), 2.0), 2.0).to_event(1)
    guide = dist.TransformedDistribution(base, transforms)
    optimizer = torch.optim.Adam(torch.nn.ModuleList(transforms).parameters(), lr=1e-4)

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
    """Pyro's stack as its factory makes it, with ReLU, or with another function between its layers."""
    stack = [affine_autoregressive(channels, hidden_dims=list(HIDDEN)) for _ in range(TRANSFORMS)]
    if function is not None:
        for transform in stack:
            transform.arn.f = function
    return stack


def passes(transform: torch.nn.Module, blocks: int, rounds: int) -> tuple[float, float]:
    """The seconds of an inverse, and that in passes a block, a pass being the map there."""
    size = transform.field_type.size if isinstance(transform, EquivariantIAF) else transform.arn.input_dim
    data, noise = torch.randn(BATCH, size), torch.randn(BATCH, size)

    def inverse() -> None:
        transform.inv(data.clone())

    def forward() -> None:
        transform(noise.clone())

    with torch.no_grad():
        back, _, quotient = ratio(inverse, forward, rounds)
    return back, quotient / blocks


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--only", default="", help="field types whose names hold this")
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rounds = 10 if args.smoke else args.rounds
    for name, field_type in field_types().items():
        if args.only not in name: continue
        c = field_type.size
        o = elbo_step(ours(field_type), c)
        a, b, q = ratio(o, elbo_step(pyros(c), c), rounds)
        _, b2, q2 = ratio(o, elbo_step(pyros(c, torch.nn.SiLU()), c), rounds)
        mine = equivariant_iaf(field_type, hidden_dims=HIDDEN, identity_init=False)
        blocks = len(mine.order)
        t, p = passes(mine, blocks, rounds)
        tt, pp = passes(pyros(c)[0], c, rounds)
        print(f"{name:30s} {1e3*a:7.2f} {1e3*b:7.2f} {q:5.2f} {1e3*b2:7.2f} {q2:5.2f} | inv {blocks} {1e3*t:7.2f} {p:5.2f}  pyro {1e3*tt:7.2f} {pp:5.2f}", flush=True)


if __name__ == "__main__":
    main()
