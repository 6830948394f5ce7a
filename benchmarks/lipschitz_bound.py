# SPDX-License-Identifier: Apache-2.0
"""The share of bounding every layer's norm in a training step of a residual transform.

The step scores a batch of 28x28 images (forward map, default log-det in training mode, backward, Adam). The bounds are
those that it takes inside: of all layers, with their gradients in the expanded weights, found once a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from escnn import gspaces
from escnn import nn as enn
from likelihood import likelihood_step
from timing import clock, ratio
from torch import Tensor

from pyro_equiflow import EquivariantResidual, equivariant_residual
from pyro_equiflow.nn import expand, weight_norm

SIDE = 28


def training_step(transform: EquivariantResidual, x: Tensor) -> Callable[[], None]:
    """One step of maximum likelihood on Gaussian images under a Gaussian base."""
    return likelihood_step(transform, lambda: transform.call_and_ladj(x))


def bounds(transform: EquivariantResidual) -> Callable[[], None]:
    """The bounds of all linear layers with the present weights, and their gradients."""
    layers = [layer for layer in transform.conditioner.network if hasattr(layer, "weight")]

    def step() -> None:
        for layer in layers:
            weight = expand(layer).tensors[0].detach().requires_grad_()
            torch.autograd.grad(weight_norm(layer, weight, (SIDE, SIDE)), weight)

    return step


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few rounds of small batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rounds, batch = (2, 4) if args.smoke else (15, 64)
    space = gspaces.rot2dOnR2(4)
    print(f"28x28, batch {batch}, C_4, three 3x3 layers, 8 regular hidden fields (32 channels)")
    print(f"{'event':20s} {'bounds, ms':>10s} {'step, ms':>9s} {'share':>6s} {'at most':>8s}")
    for name, fields in (("4 scalar fields", 4 * [space.trivial_repr]), ("8 regular fields", 8 * [space.regular_repr])):
        field_type = enn.FieldType(space, fields)
        transform = equivariant_residual(field_type, hidden_dims=(32, 32), identity_init=False).to(args.device)
        x = torch.randn(batch, field_type.size, SIDE, SIDE, device=args.device)
        ours, step, share = ratio(bounds(transform), training_step(transform, x), rounds, clock(args.device))
        print(f"{name:20s} {1e3 * ours:10.2f} {1e3 * step:9.2f} {share:6.1%} {0.1:8.1%}")


if __name__ == "__main__":
    main()
