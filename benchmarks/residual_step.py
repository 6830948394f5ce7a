# SPDX-License-Identifier: Apache-2.0
"""Residual and implicit transforms against the public implementations' plain ones, on one thread.

1. A training step and the inverse of a residual transform, against normflows' ``Residual`` with the same widths, the
   same Lipschitz constant of every layer and the same number of log-det terms, both trained to the edge of that
   constant first. Inverses are stopped at the same true error, known from a float64 solve.
2. The step of the implicit flow of Lu et al. on their toy: 6 blocks, sine networks 2-128-128-2, batch 1000, exact
   log-det, plain and under D_4. Their own code is not a published package; RESULTS.md tells how it was timed.
3. Bytes that a training step keeps for its backward pass, as the solver is made to take more steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from escnn import group, gspaces
from escnn import nn as enn
from likelihood import likelihood_step
from normflows.flows import Residual
from normflows.nets import LipschitzMLP
from normflows.utils import update_lipschitz
from timing import clock, ratio, seconds
from torch import Tensor

from pyro_equiflow import Compose, EquivariantResidual, equivariant_implicit, equivariant_residual
from pyro_equiflow.logdet import Exact, PowerSeries
from pyro_equiflow.solvers import Anderson

TERMS = 8
LAYER = 0.97
# Distance to the true root that an inverse may be off, for any sample.
ERROR = 1e-4


def plain_type(size: int) -> enn.FieldType:
    """Events without symmetry."""
    space = gspaces.no_base_space(group.trivial_group())
    return enn.FieldType(space, size * [space.trivial_repr])


def vectors(size: int) -> enn.FieldType:
    """Vectors of D_4, in the plane."""
    space = gspaces.no_base_space(group.dihedral_group(4))
    return enn.FieldType(space, size // 2 * [space.irrep(1, 1)])


def residual(field_type: enn.FieldType, log_det: PowerSeries | None = None) -> EquivariantResidual:
    """Layers as normflows' network has them but for its activation of the input."""
    return equivariant_residual(
        field_type, hidden_dims=(128, 128), lipschitz=LAYER**3, log_det=log_det or PowerSeries(terms=TERMS)
    )


def data(size: int, device: str, batch: int = 1000) -> Tensor:
    """Two clusters, so that training wants a steep map."""
    centre = torch.randint(0, 2, (batch, 1)) * 8.0 - 4.0
    return (centre + 0.3 * torch.randn(batch, size)).to(device)


def our_step(flow: EquivariantResidual | Compose, x: Tensor) -> Callable[[], None]:
    """A step of maximum likelihood, data to latents."""
    return likelihood_step(flow, lambda: flow.call_and_ladj(x), lr=1e-3)


def their_step(theirs: Residual, x: Tensor) -> Callable[[], None]:
    """The same step, power iterations included; their map from data to latents is ``inverse``."""
    likelihood = likelihood_step(theirs, lambda: theirs.inverse(x), lr=1e-3)

    def step() -> None:
        likelihood()
        update_lipschitz(theirs, 5)

    return step


def true_error(x: Tensor, y: Tensor, net: Callable[[Tensor], Tensor]) -> float:
    """Largest distance to the root of ``x + net(x) = y`` by a float64 solve."""
    y = y.double()
    root = Anderson().solve(lambda x, i: (y if i is None else y[i]) - net(x), y, lipschitz=LAYER**3).value
    return float((x.double() - root).norm(dim=1).max())


def inverses(ours: EquivariantResidual, theirs: Residual, y: Tensor) -> tuple[Callable, Callable, float, float]:
    """Both inverses, each stopped as early as the true error of every sample, at most ``ERROR``, allows."""
    block = theirs.iresblock
    update_lipschitz(theirs, 200)  # else their map need not be a contraction
    wide = LipschitzMLP([y.shape[1], 128, 128, y.shape[1]], LAYER).to(y.device).double()
    wide.load_state_dict(block.nnet.state_dict())
    (fn, tensors), _ = ours.conditioner.normalized()
    tensors = tuple(t.detach().double() for t in tensors)

    @torch.no_grad()
    def our_inverse() -> Tensor:
        return ours._inverse(y)

    @torch.no_grad()
    def their_inverse() -> Tensor:
        return block._inverse_fixed_point(y, tolerance, tolerance)

    with torch.no_grad():
        for ours.tolerance in (2.0**-k for k in range(6, 20)):
            error = true_error(our_inverse(), y, lambda x: fn(x, *tensors))
            if error <= ERROR:
                break
        for k in range(6, 36):
            tolerance = 2.0**-k
            found = true_error(their_inverse(), y, wide)
            if found <= ERROR:
                break
    return our_inverse, their_inverse, error, found


def saved_bytes(step: Callable[[], None]) -> int:
    """What autograd keeps during a step."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.element_size() * tensor.nelement()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return total


def memory(device: str) -> None:
    """Solver steps and bytes kept, at several tolerances."""
    torch.manual_seed(0)
    print(f"\n{'implicit block, D = 2, batch 1000':40s} {'solver steps':>12s} {'MB kept for backward':>22s}")
    x = data(2, device).double()
    for tolerance in (1e-2, 1e-6, 1e-12):
        flow = equivariant_implicit(plain_type(2), hidden_dims=(128, 128), identity_init=False, tolerance=tolerance)
        flow.to(x)
        steps = int(flow.forward_solution(x).steps.max())
        z = saved_bytes(lambda flow=flow: flow.call_and_ladj(x)[0].sum().backward())
        print(f"{f'tolerance {tolerance:g}':40s} {steps:12d} {z / 1e6:22.2f}")


def implicit_step(field_type: enn.FieldType, warm: int, rounds: int, device: str) -> float:
    """Median seconds of a step of the toy, after ``warm`` steps of training."""
    flow = Compose(
        [
            equivariant_implicit(
                field_type, hidden_dims=(128, 128), function="sin2pi", lipschitz=0.99**3, log_det=Exact()
            )
            for _ in range(6)
        ]
    ).to(device)
    x = checkerboard(1000).to(device)
    step = our_step(flow, x)
    for _ in range(warm):
        step()
    times = sorted(seconds(step, clock(device)) for _ in range(rounds))
    return times[len(times) // 2]


def checkerboard(count: int) -> Tensor:
    """Uniform on the dark squares of a 4 x 4 board over [-4, 4] x [-4, 4]."""
    first = torch.rand(count) * 4 - 2
    second = torch.rand(count) - 2.0 * torch.randint(0, 2, (count,)) + first.floor() % 2
    return 2 * torch.stack([first, second], 1)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rounds, warm = (8, 30) if args.smoke else (40, 300)
    print(
        f"{'against normflows, width 128, batch 1000':40s} {'ours, ms':>9s} {'theirs, ms':>11s} {'ratio':>6s} at most"
    )
    for size in (2, 32):
        x = data(size, args.device)
        theirs = Residual(LipschitzMLP([size, 128, 128, size], LAYER), n_power_series=TERMS).to(args.device)
        names = {"plain": plain_type(size), "D_4": vectors(size)}
        for name, field_type in names.items():
            ours = residual(field_type).to(args.device)
            steps = our_step(ours, x), their_step(theirs, x)
            for _ in range(warm):
                for step in steps:
                    step()
            a, b, quotient = ratio(*steps, rounds, clock(args.device))
            label = f"training step, D = {size}, {name}"
            print(f"{label:40s} {1e3 * a:9.2f} {1e3 * b:11.2f} {quotient:6.2f} {0.6:8.2f}")
            *pair, error, found = inverses(ours, theirs, data(size, args.device))
            a, b, quotient = ratio(*pair, rounds, clock(args.device))
            label = f"inverse, D = {size}, {name}"
            print(
                f"{label:40s} {1e3 * a:9.2f} {1e3 * b:11.2f} {quotient:6.2f} {0.3:8.2f}"
                f"   (true errors {error:.0e}, {found:.0e}; bound {ours.lipschitz_bound():.2f})"
            )
    print(f"\n{'implicit flow, 6 blocks, exact log-det':40s} {'s per step':>9s}")
    for name, field_type in {"plain": plain_type(2), "D_4": vectors(2)}.items():
        for before in (0, warm):
            taken = implicit_step(field_type, before, rounds, args.device)
            print(f"{f'{name}, after {before} steps':40s} {taken:9.3f}")
    memory(args.device)


if __name__ == "__main__":
    main()
