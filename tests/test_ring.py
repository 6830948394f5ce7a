# SPDX-License-Identifier: Apache-2.0
"""The ring of ``benchmarks/ring.py``: its exact log Z, its symmetry, and a short training run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pyro
import pytest
import torch

from pyro_equiflow.testing import assert_invariant

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "ring.py"


@pytest.fixture(scope="module")
def ring():
    spec = importlib.util.spec_from_file_location("ring", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ring"] = module  # dataclasses and pickles look modules up by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ring"]


def test_quadrature(ring):
    """The values of the table are the integral to their last digit."""
    for target, exact in ring.RINGS.items():
        assert target.log_normalizer() == pytest.approx(exact, abs=1e-9)


def test_target_is_invariant(ring):
    """Under all of D_N, at draws where it is high and low, and not under a rotation that D_N lacks."""
    for target in ring.RINGS:
        x = torch.randn(50, 2, dtype=torch.float64) * target.radius
        assert_invariant(target.log_density, x, target.field_type())
        angle = torch.tensor(torch.pi / target.order, dtype=torch.float64)
        turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
        assert (target.log_density(x @ turn.T) - target.log_density(x)).abs().max() > 1


@pytest.mark.parametrize("kind, num_transforms", [("residual", 3), ("implicit", 1)])
def test_short_training(ring, kind, num_transforms):
    """Importance weights of a hasty fit still give log Z, and the flow has the target's symmetry."""
    target, exact = next(iter(ring.RINGS.items()))
    flow = ring.train(
        target, kind, num_transforms=num_transforms, lipschitz=0.95, learning_rate=1e-2, steps=200, particles=64
    )
    pyro.set_rng_seed(1)
    found = ring.evaluate(target, flow, 20_000)
    assert found.efficiency > 0.3  # or the standard error means little; a normal of the best width has 0.15
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_stderr
    assert found.elbo < exact + 4 * found.elbo_stderr
    posterior = ring.density(target, flow.double())
    # A log-density solves for the base's draw: as good as the solver's tolerance, times the map's slopes.
    assert_invariant(posterior, posterior.sample((50,)), target.field_type(), tolerance=1e-6)
