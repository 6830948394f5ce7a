# SPDX-License-Identifier: Apache-2.0
"""The densities that the benchmarks fit have the entropies and symmetries that they are said to have."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch


def _toy_data() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "toy_data.py"
    spec = importlib.util.spec_from_file_location("toy_data", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOYS = _toy_data()


@pytest.mark.parametrize("name", ["ring", "four_spots"])
def test_entropy(name: str) -> None:
    """Quadrature agrees with a finer grid, and with the mean over draws within four standard errors."""
    torch.manual_seed(0)
    density = getattr(TOYS, name)()
    found = TOYS.entropy(density, points=400)
    assert abs(found - TOYS.entropy(density, points=600)) < 1e-9
    x, area = TOYS.grid(8.0, 400)
    assert abs(float(density.log_prob(x).exp().sum() * area) - 1) < 1e-9
    drawn = -density.log_prob(density.sample((100_000,)))
    assert abs(float(drawn.mean()) - found) < 4 * float(drawn.std()) / len(drawn) ** 0.5


@pytest.mark.parametrize(("name", "turns", "mirror"), [("ring", 8, True), ("four_spots", 4, False)])
def test_symmetry(name: str, turns: int, mirror: bool) -> None:
    """Turned points have the same density, mirrored ones only on the ring."""
    torch.manual_seed(0)
    density = getattr(TOYS, name)()
    x = density.sample((500,))
    angle = torch.tensor(2 * math.pi / turns, dtype=x.dtype)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])

    def change(y: torch.Tensor) -> float:
        return float((density.log_prob(y) - density.log_prob(x)).abs().max())

    assert change(x @ turn.T) < 1e-9
    assert (change(x * torch.tensor([1.0, -1.0])) < 1e-9) == mirror
    half = angle / 2
    between = torch.stack([torch.stack([half.cos(), -half.sin()]), torch.stack([half.sin(), half.cos()])])
    assert change(x @ between.T) > 0.1


def test_checkerboard() -> None:
    """Half of a square of area 64, drawn evenly; kept by the reflections in its diagonals, not by those in its axes."""
    generator = torch.Generator().manual_seed(0)
    x = TOYS.checkerboard(80_000, generator)
    assert abs(float(TOYS.on_checkerboard(TOYS.grid(4.0, 160)[0]).double().mean()) - 0.5) < 1e-12
    assert abs(TOYS.CHECKERBOARD_BITS - math.log2(32)) < 1e-12
    for image in (x, x.flip(1), -x.flip(1), -x):
        assert TOYS.on_checkerboard(image).all()
    assert not TOYS.on_checkerboard(x * torch.tensor([-1.0, 1.0])).any()
    squares = torch.unique(((x + 4) // 2).long() @ torch.tensor([4, 1]), return_counts=True)[1]
    assert len(squares) == 8
    assert float((squares / 10_000 - 1).abs().max()) < 0.05
