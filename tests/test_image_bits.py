# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/image_bits.py``: equal parameters, the law of every arm, and bits that are bits."""

from __future__ import annotations

import argparse
import math

import pytest
import torch

from pyro_equiflow import EquivariantActNorm
from tests.cases import randomize
from tests.test_amortized import benchmark

image_bits, images = benchmark("image_bits"), benchmark("images")
ARGS = argparse.Namespace(data="digits", steps=80, draws=2, scored=40, device="cpu")


def test_arms_differ_in_their_symmetry_only():
    """Parameters agree, as many channels go on to the second level, and one arm is as wide as the first."""
    deeper = [arm.flow((8, 8)).transform[2].transform.field_type.size for arm in image_bits.arms().values()]
    assert deeper == 5 * [3]
    sizes = {name: sum(p.numel() for p in arm.flow((8, 8)).parameters()) for name, arm in image_bits.arms().items()}
    assert {name for name, size in sizes.items() if abs(size / sizes["C_4"] - 1) < 0.02} == {*sizes} - {"plain, wide"}
    assert image_bits.arms()["plain, wide"].widths == image_bits.arms()["C_4"].widths


@pytest.mark.parametrize("name, turns, mirrors", [("C_4", True, False), ("D_4", True, True), ("plain", False, False)])
def test_what_leaves_the_density_unchanged(name, turns, mirrors):
    """To rounding where the symmetry is built in, not at all without: the mirrored digit counts under D_4 only."""
    torch.manual_seed(0)
    flow = randomize(image_bits.arms()[name]._replace(widths=(8, 8)).flow((8, 8))).double()
    for part in flow.modules():
        if isinstance(part, EquivariantActNorm):  # left to the first batch, which the other layers' weights do not know
            torch.nn.init.zeros_(part.log_scale)
            torch.nn.init.zeros_(part.loc)
    errors = image_bits.symmetry_errors(flow, images.load().test[:5], 17)
    assert [error < 1e-10 for error in errors] == [turns, mirrors]
    assert all(error < 1e-10 or error > 0.1 for error in errors)


def test_bits_of_a_known_density():
    """The flow starts as the identity: bits of the logistic-normal pixel density, by quadrature over each bin."""
    flow = image_bits.arms()["C_4"]._replace(widths=(8, 8)).flow((8, 8)).eval().double()
    levels, alpha, test = 17, image_bits.ALPHA, images.load().test[:50]
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    s = alpha + (1 - 2 * alpha) * (torch.arange(levels)[:, None] + u) / levels
    normal = torch.distributions.Normal(0.0, 1.0)
    log_density = normal.log_prob(s.logit()) - s.log() - (-s).log1p() + math.log(1 - 2 * alpha)
    # One draw bounds the bits by the mean of the log-density over a bin, which is what many images see.
    expected = (math.log(levels) - log_density.mean(1)[test.long()]).mean() / math.log(2)
    found = image_bits.bits(flow, test, levels, 1, 3)
    noise = log_density.std(1).max() / math.log(2) / math.sqrt(test.numel())
    assert abs(found - expected) < 4 * noise < 0.05
    assert found == image_bits.bits(flow, test, levels, 1, 3) != image_bits.bits(flow, test, levels, 1, 4)


def test_scores_along_a_curve():
    curve = [(10, 3.0), (20, 2.5), (30, 2.6), (40, 2.4)]
    assert image_bits.best_so_far(curve, [5, 10, 35, 40, 50]).tolist() == pytest.approx([math.inf, 3.0, 2.5, 2.4, 2.4])
    assert [image_bits.steps_to_reach(curve, score) for score in (3.5, 2.5, 2.0)] == [10, 20, None]


def test_short_training():
    """A hasty fit codes images in fewer bits than independent pixels, each by its own histogram, and keeps its law."""
    arm = image_bits.arms()["C_4"]._replace(widths=(16, 16))
    run = image_bits.fit(arm, 300, 0, 2e-2, ARGS)
    parts = images.load("digits", 0)
    counts = torch.stack([(parts.train[:300] == level).sum(0) + 1.0 for level in range(17)])
    log_prob = (counts / counts.sum(0)).log2()
    test = parts.test[:40].long()
    independent = -float(log_prob.gather(0, test).mean())
    assert run.bits < independent
    assert run.turned < 1e-10 and run.mirrored > 0.1
    assert run.validation == min(score for _, score in run.curve) == dict(run.curve)[run.best_step]
