# SPDX-License-Identifier: Apache-2.0
"""A training step of an equivariant coupling stack against the same stack with plain torch.nn layers.

Both stacks are scored on the same batch (inverse, log-det, backward, Adam). The plain one has layers of the same
channel counts and the same affine maps; nothing of it knows the group.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from escnn import group, gspaces
from escnn import nn as enn
from likelihood import likelihood_step
from timing import clock, ratio
from torch import Tensor

from pyro_equiflow import Compose, equivariant_coupling, equivariant_flow


class PlainCoupling(torch.nn.Module):
    """The affine coupling of two halves with a plain network and the same bound on its scales."""

    def __init__(self, net: torch.nn.Module, sizes: tuple[int, int], swap: bool, repeats: int) -> None:
        super().__init__()
        self.net, self.sizes, self.swap, self.repeats = net, sizes, swap, repeats

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse map and its log-det."""
        first, second = y.split(self.sizes, 1)
        kept, moved = (second, first) if self.swap else (first, second)
        channels = moved.shape[1]
        raw, shift = self.net(kept).split([channels // self.repeats, channels], 1)
        scale = 3.0 * torch.tanh(raw / 3.0)
        factor = (-scale).exp()
        if self.repeats > 1:
            factor = factor.repeat_interleave(self.repeats, 1)
        moved = (moved - shift) * factor
        ladj = -self.repeats * scale.flatten(1).sum(1)
        return torch.cat([moved, kept] if self.swap else [kept, moved], 1), ladj


def _plain_mlp(sizes: list[int]) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [torch.nn.Linear(a, b), torch.nn.SiLU()]
    return torch.nn.Sequential(*layers[:-1])


def _plain_cnn(sizes: list[int]) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [torch.nn.Conv2d(a, b, 3, padding=1), torch.nn.SiLU()]
    return torch.nn.Sequential(*layers[:-1])


def _plain_step(stack: torch.nn.ModuleList, y: Tensor) -> Callable[[], None]:
    def score() -> tuple[Tensor, Tensor]:
        x, total = y, y.new_zeros(())
        for transform in reversed(stack):
            x, ladj = transform.inverse_and_ladj(x)
            total = total + ladj
        return x, total

    return likelihood_step(stack.to(y.device), score)


def _our_step(flow: Compose, y: Tensor) -> Callable[[], None]:
    return likelihood_step(flow.to(y.device), lambda: flow.inverse_and_ladj(y))


def vectors(blocks: int, batch: int, device: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """16 vectors of SO(2), hidden width 64."""
    space = gspaces.no_base_space(group.so2_group())
    field_type = enn.FieldType(space, 16 * [space.irrep(1)])
    ours = Compose(
        [
            equivariant_coupling(
                field_type, split=range(8) if i % 2 == 0 else range(8, 16), hidden_dims=(64, 64), identity_init=False
            )
            for i in range(blocks)
        ]
    )
    plain = torch.nn.ModuleList(
        PlainCoupling(_plain_mlp([16, 64, 64, 24]), (16, 16), i % 2 == 1, repeats=2) for i in range(blocks)
    )
    y = torch.randn(batch, 32, device=device)
    return _our_step(ours, y), _plain_step(plain, y)


def images(blocks: int, batch: int, device: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Images of 28x28 with 4 channels, each a scalar field under C_4; 32 hidden channels in 8 regular fields."""
    space = gspaces.rot2dOnR2(4)
    field_type = enn.FieldType(space, 4 * [space.trivial_repr])
    ours = Compose(
        [
            equivariant_coupling(
                field_type, split=(0, 1) if i % 2 == 0 else (2, 3), hidden_dims=(32, 32), identity_init=False
            )
            for i in range(blocks)
        ]
    )
    plain = torch.nn.ModuleList(
        PlainCoupling(_plain_cnn([2, 32, 32, 4]), (2, 2), i % 2 == 1, repeats=1) for i in range(blocks)
    )
    y = torch.randn(batch, 4, 28, 28, device=device)
    return _our_step(ours, y), _plain_step(plain, y)


def build() -> float:
    """Seconds to build a 6-block flow on 34 O(2) vectors, linear and actnorm layers included."""
    start = time.perf_counter()
    space = gspaces.no_base_space(group.o2_group())
    equivariant_flow(enn.FieldType(space, 34 * [space.irrep(1, 1)]), num_transforms=6)
    return time.perf_counter() - start


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    print(f"building 6 blocks on 34 O(2) vectors: {build():.2f} s (at most 2 s)")
    rounds = 10 if args.smoke else 60
    print(f"{'training step':34s} {'ours, ms':>9s} {'plain, ms':>9s} {'ratio':>6s} {'at most':>8s}")
    for name, steps, limit in (
        ("16 SO(2) vectors, width 64, B 1024", vectors(6, 1024, args.device), 1.3),
        ("28x28, C_4, 32 channels, B 32", images(2, 32, args.device), 1.15),
    ):
        ours, plain, quotient = ratio(*steps, rounds, clock(args.device))
        print(f"{name:34s} {1e3 * ours:9.2f} {1e3 * plain:9.2f} {quotient:6.2f} {limit:8.2f}")


if __name__ == "__main__":
    main()
