# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/posteriors.py``: the models' symmetries, exact evidence by quadrature, annealing, kept runs."""

from __future__ import annotations

import argparse
import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_equiflow.infer import check_model_invariance
from tests.test_amortized import benchmark

posteriors, models, annealing = (benchmark(name) for name in ("posteriors", "posterior_models", "annealing"))

# Guides of two steps: nothing of theirs is to be believed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pyro_equiflow.errors.EvidenceWarning"),
    pytest.mark.filterwarnings("ignore::pyro_equiflow.errors.PrecisionWarning"),
]

PAIRS = [(name, guide) for name in models.POSTERIORS for guide in posteriors.GUIDES]


# ---- models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.POSTERIORS)
def test_symmetry(name):
    """The log joint is the same after every element of the group; of the values that the model says."""
    posterior = models.POSTERIORS[name]()
    assert check_model_invariance(posterior.model, posterior.representations, *posterior.data).invariant
    joint = annealing.Joint(posterior.model, posterior.data)
    assert joint.prior_draws(2).shape == (2, posterior.dimension)


@pytest.mark.parametrize("name", models.POSTERIORS)
def test_likelihood_is_not_constant(name):
    """The data say something: by far the most of the latent values are not the prior's own."""
    joint = annealing.Joint(models.POSTERIORS[name]().model, models.POSTERIORS[name]().data)
    assert joint(joint.prior_draws(20))[1].std() > 1


@pytest.mark.parametrize("name, guide", PAIRS)
def test_two_steps(name, guide):
    """Every guide trains on every posterior, and its draws are scored on all of the data."""
    run = posteriors.Run(name, guide, 1e-3, "steps", 2.0, 1, 0)
    row = posteriors.trained(run, 20, iter(range(1000)).__next__)
    assert "error" not in row
    assert row["steps"] == 2
    assert math.isfinite(row["elbo"])


@torch.no_grad()
def test_score_takes_the_plate_whole():
    """The subsamples of training are gone: the mean is that of other draws weighed by hand, with all measurements."""
    posterior = models.landmarks()
    guide = posteriors.GUIDES["AutoNormal"][0](posterior)
    guide(*posterior.args)
    found = posteriors.score(posterior, guide, 4000)
    loc, scale = (torch.cat([part.x.flatten(), part.noise.flatten()]) for part in (guide.locs, guide.scales))
    q = dist.Normal(loc, scale).to_event(1)
    u = q.sample((4000,))
    weights = sum(annealing.Joint(posterior.model, posterior.data)(u)) - q.log_prob(u)
    assert abs(found["elbo"] - weights.mean()) < 5 * math.hypot(found["stderr"], weights.std() / 4000**0.5)


# ---- the evidence ----------------------------------------------------------------------------------------------


def normal(x, scale):
    return np.exp(-((x / scale) ** 2) / 2) / (scale * math.sqrt(2 * math.pi))


def legendre(low, high, number):
    nodes, weights = np.polynomial.legendre.leggauss(number)
    return low + (high - low) * (nodes + 1) / 2, (high - low) * weights / 2


def test_evidence_of_power():
    """In polar coordinates Re z^N is R sin(phi), R = r^N, and phi as uniform as the angle of z."""
    y, scale = 1.0, 0.2
    r, w = legendre(0.0, 12.0, 400)
    low, high = (np.arcsin(np.clip((y + side * scale) / r**5, -1, 1)) for side in (-12, 12))
    u, v = legendre(0.0, 1.0, 400)
    angle = low[:, None] + (high - low)[:, None] * u
    inner = (v * normal(y - r[:, None] ** 5 * np.sin(angle), scale)).sum(1) * (high - low) / math.pi
    exact = math.log((w * r * np.exp(-(r**2) / 2) * inner).sum())
    assert models.EVIDENCE["power"] == (pytest.approx(exact, abs=1e-6), 0)


def test_evidence_of_signs():
    """Two integrals over the half-line, each twice."""
    z, w = legendre(0.0, 8.0, 1000)
    exact = sum(math.log(2 * (w * normal(z, 1) * normal(y - z, 0.2)).sum()) for y in (1.0, 0.3))
    assert models.EVIDENCE["signs"] == (pytest.approx(exact, abs=1e-6), 0)


def test_evidence_of_cities():
    """Five integrals: Paris on a ray from London, Berlin on one side of it, Madrid anywhere, their mean left out."""
    lp, lb, lm, pb, pm, bm = 0.344, 0.932, 1.263, 0.877, 1.053, 1.869
    scale, reach, h = 0.1, 0.65, 0.08
    ticks = np.arange(-2.4 + h / 2, 2.4, h)
    points = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    london, total = np.zeros(2), 0.0

    def place(paris, from_london, from_paris):
        """Grid points where the two distances may be, and their densities."""
        errors = [np.linalg.norm(points - p, axis=1) - d for p, d in ((london, from_london), (paris, from_paris))]
        keep = np.all(np.abs(errors) < reach, axis=0)
        return points[keep], normal(errors[0][keep], scale) * normal(errors[1][keep], scale)

    for r, w in zip(*legendre(0.0, lp + reach, 12)):
        paris = np.array([r, 0.0])
        berlin, b = place(paris, lb, pb)
        berlin, b = berlin[berlin[:, 1] > 0], 2 * b[berlin[:, 1] > 0]
        madrid, m = place(paris, lm, pm)
        # Independent normals: the differences P - L, B - (L + P) / 2, M - (L + P + B) / 3 of variances 2, 3/2, 4/3.
        b = b * normal(berlin - paris / 2, math.sqrt(3 / 2)).prod(1) * h**2
        mean = (paris + berlin) / 3
        last = normal(madrid - mean[:, None], math.sqrt(4 / 3)).prod(2) * h**2
        between = normal(np.linalg.norm(madrid - berlin[:, None], axis=2) - bm, scale)
        total += w * r / 2 * math.exp(-(r**2) / 4) * normal(r - lp, scale) * (b[:, None] * m * last * between).sum()
    # The grid's reach of 6.5 deviations costs 6e-5.
    assert models.EVIDENCE["cities"] == (pytest.approx(math.log(total), abs=2e-4), 0)


def tilted(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z.sum(-1), scale), obs=y)


def test_annealing():
    """Against quadrature: a sum of two normals, and an unknown scale behind a map from the line."""
    torch.set_default_dtype(torch.float64)
    try:
        y = torch.tensor([2.0, 2.5, 1.0])
        s, ws = legendre(-4.0, 4.0, 200)
        t, wt = legendre(-12.0, 12.0, 400)
        likelihood = np.prod([normal(float(v) - t[:, None], np.exp(s)) for v in y], 0)
        exact = math.log((wt * normal(t, math.sqrt(2))) @ likelihood @ (ws * normal(s, 0.5)))
        joint = annealing.Joint(tilted, (y,))
        value, stderr, temperatures = annealing.log_evidence(joint, 500, 6, progress=id, share=0.8, leaps=4)
        assert temperatures > 2
        assert 0 < stderr < 0.05
        assert abs(value - exact) < 4 * stderr
    finally:
        torch.set_default_dtype(torch.float32)


# ---- the runs --------------------------------------------------------------------------------------------------


def test_runs_go_on_where_they_stopped(tmp_path):
    """What is in the file is not made again; the best rate of the first seed is the others'."""
    made = []

    def make(run):
        made.append(run)
        if run.rate == 3e-2:
            return {**run._asdict(), "error": "ArithmeticError: the loss was NaN"}
        return {**run._asdict(), "elbo": -run.rate - run.seed, "stderr": 0.1, "steps": 2, "seconds": 1.0}

    args = argparse.Namespace(particles=1, seed=0, seeds=3)

    def rows():
        book = posteriors.Book(tmp_path / "rows.jsonl")
        return posteriors.runs("signs", "AutoNormal", "steps", 2.0, args, lambda run: book.row(run, make))

    assert rows() == rows()
    assert [(run.rate, run.seed) for run in made] == [(3e-3, 0), (1e-2, 0), (3e-2, 0), (3e-3, 1), (3e-3, 2)]
    assert len([json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]) == 5
    found = posteriors.cell(rows())
    assert (found.mean, found.spread, found.rate) == (pytest.approx(-1.003), pytest.approx(1.0), 3e-3)


def test_summary():
    """A tenth of a nat behind the best still counts, and .15 behind the evidence; a failed guide is behind all."""
    exact = models.EVIDENCE["signs"].value

    def cells(ours, theirs):
        return {"signs": {n: posteriors.Cell(v, 0, 0, 1e-3, 2) for n, v in ((posteriors.OURS, ours), ("IAF", theirs))}}

    for ours, theirs, best, near in ((-0.14, -0.05, 1, 1), (-0.16, -0.05, 0, 0), (-math.inf, -9.0, 0, 0)):
        lines = list(posteriors.summary(cells(exact + ours, exact + theirs)))
        assert f"on {best} of 1" in lines[0]
        assert f"on {near} of 1" in lines[1]
    assert len(list(posteriors.table(cells(-1.0, -2.0)))) == 3
