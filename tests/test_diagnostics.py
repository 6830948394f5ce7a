# SPDX-License-Identifier: Apache-2.0
"""k-hat against known tails, standard errors against known evidences, the report on guides known to be bad."""

import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import group, gspaces
from escnn import nn as enn
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.ops.stats import fit_generalized_pareto

from pyro_equiflow import AutoEquivariantFlow, EvidenceWarning, diagnose, equivariant_flow, evidence_estimate
from pyro_equiflow.infer import importance_weights
from pyro_equiflow.infer.evidence import estimate
from pyro_equiflow.infer.pareto import largest_trusted_shape, pareto_tail

SPACE = gspaces.no_base_space(group.o2_group())


# ---- the tail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [-0.3, 0.2, 0.5, 0.7, 1.0])
def test_shape_of_pareto_draws(k):
    """Generalised Pareto weights have that shape above any threshold; its error is (1 + k) / sqrt(m)."""
    uniform = torch.rand(20, 100_000, dtype=torch.float64)
    found = [pareto_tail(1 + (u**-k - 1) / k).shape for u in uniform]
    tail = 3 * math.sqrt(100_000)
    # The fit leans to one half by the weight of ten draws (Vehtari et al., appendix C).
    lean = 10 * (0.5 - k) / (tail + 10)
    assert abs(sum(found) / 20 - k - lean) < 4 * (1 + abs(k)) / math.sqrt(20 * tail)


def test_shape_of_a_narrow_normal():
    """Weights of N(0, 1) under N(0, s^2), s < 1, have a tail of shape 1 - s^2."""
    z = math.sqrt(0.4) * torch.randn(1_000_000, dtype=torch.float64)
    log_weights = -z.square() / 2 + z.square() / 0.8
    assert evidence_estimate(log_weights).pareto_k == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize("k", [0.3, 0.5])
def test_standard_error_of_the_tails_mean(k):
    """Beside the deviation of tail means fitted to many samples: no less, and four times as much at most."""
    n, m = 10_000, 300
    means, errors = [], []
    for u in torch.rand(200, n, dtype=torch.float64):
        tail = pareto_tail(1 + (u**-k - 1) / k)
        largest = (1 + (u**-k - 1) / k).sort().values[-m - 1 :]
        shape, scale = fit_generalized_pareto(largest[1:] - largest[0])
        means.append(m / n * scale / (1 - shape))
        errors.append(tail.mean_stderr)
    spread = float(torch.tensor(means).std())
    assert 0.9 * spread < float(torch.tensor(errors).median()) < 4 * spread


def test_no_tail():
    assert estimate(torch.full((100,), -3.0)).pareto_k == -math.inf
    assert estimate(-3.0 + 1e-7 * torch.randn(1000)).trustworthy
    assert math.isnan(estimate(torch.randn(20)).pareto_k) and not estimate(torch.zeros(20)).trustworthy
    ties = torch.tensor([0.0] * 2 + [-1.0] * 998)  # two above a threshold that all others share
    assert math.isnan(estimate(ties).pareto_k)
    assert not math.isnan(estimate(torch.randn(21)).pareto_k)
    half = torch.cat([torch.full((500,), -math.inf), 0.1 * torch.randn(500)])
    assert estimate(half).trustworthy


def test_threshold():
    """Table of Vehtari et al., section 3.2.4: 0.5 at 100 draws, 0.67 at 1000, 0.7 from some 2200 on."""
    assert largest_trusted_shape(100) == pytest.approx(0.5)
    assert largest_trusted_shape(1000) == pytest.approx(2 / 3)
    assert largest_trusted_shape(2200) == pytest.approx(0.7, abs=1e-3) and largest_trusted_shape(10**6) == 0.7


def test_warning():
    with pytest.warns(EvidenceWarning, match=r"k-hat of at most 0.67 for 1000 weights, found [01]\.\d\d: a few draws"):
        found = evidence_estimate(4 * torch.randn(1000))
    assert not found.trustworthy and found.log_evidence_stderr == math.inf
    with pytest.warns(EvidenceWarning, match="enough weights to fit a tail to, found 6"):
        evidence_estimate(torch.zeros(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evidence_estimate(0.5 * torch.randn(1000)).trustworthy


# ---- coverage ---------------------------------------------------------------------------------------------------


def narrow(dimension, variances):
    """The prior N(0, I) as the posterior of no data, and normals of less variance: the evidence is 1."""

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(dimension).double(), 1.0).to_event(1))

    def guide(scale):
        pyro.sample("z", dist.Normal(torch.zeros(dimension).double(), scale).to_event(1))

    return model, [lambda scale=v**0.5: guide(scale) for v in variances]


#: Posteriors, of evidence 1 all of them, and guides from good to bad.
POSTERIORS = [narrow(1, (0.8, 0.2)), narrow(2, (0.8, 0.2)), narrow(4, (0.8, 0.2)), narrow(8, (0.7, 0.3))]


def skewed():
    """A Gamma posterior, an exponential guide: weights are bounded, powers, or without a mean by its rate."""

    def model():
        pyro.sample("z", dist.Gamma(torch.tensor(2.0).double(), 1.0))

    def guide(rate):
        pyro.sample("z", dist.Exponential(torch.tensor(rate).double()))

    return model, [lambda: guide(0.7), lambda: guide(2.5)]


def test_two_standard_errors_cover_where_nothing_warns():
    covered, trusted, plain, all_of_them = 0, 0, 0, 0
    for model, guides in [*POSTERIORS, skewed()]:
        for guide in guides:
            for seed in range(10):
                pyro.set_rng_seed(seed)
                log_weights = importance_weights(model, guide, num_samples=1000, max_plate_nesting=0)
                found, weights = estimate(log_weights), log_weights.exp()
                covered += found.trustworthy and abs(found.log_evidence) <= 2 * found.log_evidence_stderr
                trusted += found.trustworthy
                plain += abs(float(weights.mean().log())) <= 2 * float(weights.std() / weights.mean()) / 1000**0.5
                all_of_them += 1
    assert trusted > 0.5 * all_of_them  # it does not warn of everything
    assert covered >= 0.9 * trusted
    assert plain < 0.8 * all_of_them  # and there is something to warn of


def test_bad_guides_are_warned_of():
    """Of weights without a variance nine in ten, of a good guide's none."""
    doubts = {0.8: 0, 0.1: 0}
    for variance in doubts:
        model, (guide,) = narrow(4, (variance,))
        for seed in range(20):
            pyro.set_rng_seed(seed)
            doubts[variance] += not diagnose(guide, model, num_samples=1000, max_plate_nesting=0).trustworthy
    assert doubts[0.1] >= 18 and doubts[0.8] <= 1


def test_a_missed_mode_leaves_no_trace():
    """As the page says: the estimate is short by log 2, and nothing can tell."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.abs(), 0.05), obs=torch.tensor(1.5))

    def guide():
        pyro.sample("z", dist.Normal(1.5 / 1.0025, 0.05 / 1.0025**0.5))

    report = diagnose(guide, model, num_samples=1000)
    exact = math.log(2) + float(dist.Normal(0.0, 1.0025**0.5).log_prob(torch.tensor(1.5)))
    assert report.trustworthy and report.estimate.log_evidence == pytest.approx(exact - math.log(2), abs=1e-4)
    assert "modes that it does not reach" in str(report)


# ---- the report ---------------------------------------------------------------------------------------------------


def conjugate(rows=None):
    """A vector of the plane seen through rotation-invariant noise, per row of a plate."""
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.square().sum(-1), 1.0), obs=torch.tensor([0.5, 1.0, 2.0]))


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, "flow", "auxiliary"])
def test_report_of_guides(kind):
    """Of Pyro's guides and ours, over plates, fresh ones too."""
    kinds = {"flow": {}, "auxiliary": {"auxiliary": enn.FieldType(SPACE, [SPACE.irrep(1, 1)])}}
    if isinstance(kind, str):
        field_type = enn.FieldType(SPACE, 3 * [SPACE.irrep(1, 1)])
        flow = partial(equivariant_flow, num_transforms=2, hidden_dims=(8,))
        guide = AutoEquivariantFlow(conjugate, {"z": field_type}, flow, **kinds[kind])
    else:
        guide = kind(conjugate)
    report = diagnose(guide, conjugate, num_samples=200)
    text = str(report)
    assert text.startswith(type(guide).__name__) and "effective sample size" in text and "Pareto k-hat" in text
    assert f"{report.estimate.elbo:.3f} ± {report.estimate.elbo_stderr:.3f}" in text
    assert report.bound_particles == 10 and report.log_weights.shape == (200,)
    assert report.estimate.elbo <= report.bound[0] <= report.estimate.log_evidence
    if isinstance(kind, str):
        assert report.group == "O(2)" and report.invariance < 1e-3 and "invariant under O(2)" in text
    else:
        assert report.group is None and "invariant under" not in text


def test_report_sees_a_guide_that_is_not_invariant():
    field_type = enn.FieldType(SPACE, 3 * [SPACE.irrep(1, 1)])

    def broken(kind):
        return dist.transforms.AffineTransform(torch.tensor([3.0, 0, 0, 0, 0, 0]), 1.0, event_dim=1)

    guide = AutoEquivariantFlow(conjugate, {"z": field_type}, broken)
    report = diagnose(guide, conjugate, num_samples=200)
    assert report.invariance > 1 and "The guide is not invariant under O(2)" in str(report)


def test_advice():
    model, (good, bad) = narrow(4, (0.9, 0.1))
    report = diagnose(good, model, num_samples=1000)
    assert report.advice == [] and "Nothing to do" in str(report) and report.gap < 0.1
    report = diagnose(bad, model, num_samples=1000)
    assert any("not to be believed" in line for line in report.advice) and "see below" in str(report)
    assert any("nats or more below the evidence" in line for line in report.advice)
    assert any("AutoEquivariantFlow" in line for line in report.advice)

    def half_line():
        pyro.sample("z", dist.HalfNormal(1.0, validate_args=False))

    def line():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pyro.validation_enabled(False):
        report = diagnose(line, half_line, num_samples=400, max_plate_nesting=0)
    assert any(line.startswith("0.5 of the draws") or "draws lie where" in line for line in report.advice)


def test_arguments_reach_both_and_random_numbers_are_pyros():
    def model(data, *, scale):
        with pyro.plate("data", len(data)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), scale), obs=data)

    def guide(data, *, scale):
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(data / (1 + scale**2), scale / (1 + scale**2) ** 0.5))

    data, found = torch.tensor([0.3, -1.0, 2.0]), []
    for _ in range(2):
        pyro.set_rng_seed(5)
        found.append(diagnose(guide, model, data, scale=0.5, num_samples=100))
    exact = float(dist.Normal(0.0, 1.25**0.5).log_prob(data).sum())
    assert found[0].estimate.log_evidence == pytest.approx(exact, abs=1e-4)
    assert torch.equal(found[0].log_weights, found[1].log_weights)
