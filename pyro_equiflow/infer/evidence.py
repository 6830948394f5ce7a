# SPDX-License-Identifier: Apache-2.0
"""How good is a flow or a guide: weighted draws, and what follows from log weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_equiflow.errors import EvidenceWarning
from pyro_equiflow.infer.pareto import largest_trusted_shape, pareto_tail
from pyro_equiflow.ops.arguments import check_instance, check_integer
from pyro_equiflow.ops.warning import warn_caller

__all__ = [
    "EvidenceEstimate",
    "WeightedDraws",
    "checked_log_weights",
    "doubt",
    "estimate",
    "evidence_estimate",
    "importance_weighted_bound",
    "weighted_draws",
]


class EvidenceEstimate(NamedTuple):
    r"""What the log weights :math:`\log w_i = \log p(z_i, y) - \log q(z_i)`, :math:`z_i \sim q`, say of a guide.

    For a target :math:`p = e^{-S} / Z` known up to :math:`Z` the log evidence is :math:`\log Z`.

    Example::

        >>> import torch
        >>> from pyro_equiflow.infer import evidence_estimate
        >>> evidence_estimate(torch.zeros(100)).efficiency
        1.0

    Weights with a heavy tail look better than they are: the draws that would tell are rare. Both the standard error
    and :attr:`trustworthy` therefore rest on the shape :math:`\hat k` of a generalised Pareto distribution fitted to
    the largest weights. Neither sees a mode of the posterior that no draw reached.

    :ivar elbo: mean of the log weights, in nats.
    :ivar elbo_stderr: its standard error.
    :ivar log_evidence: log of the mean weight: a consistent estimate of :math:`\log p(y)`, low on average.
    :ivar log_evidence_stderr: its standard error by the delta method, from the weights' own deviation or from the
        error of the fitted tail's mean, whichever is larger; infinite where the tail may have no mean.
    :ivar effective_sample_size: :math:`(\sum w)^2 / \sum w^2`.
    :ivar num_samples: number of weights.
    :ivar pareto_k: :math:`\hat k`; ``-inf`` where the largest weights are equal, NaN where they are too few to tell
        (below 21).

    References: Vehtari et al., *Pareto smoothed importance sampling* (JMLR 2024, arXiv 1507.02646); Yao et al., *Yes,
    but did it work?: evaluating variational inference* (arXiv 1802.02538).
    """

    elbo: float
    elbo_stderr: float
    log_evidence: float
    log_evidence_stderr: float
    effective_sample_size: float
    num_samples: int
    pareto_k: float = math.nan

    @property
    def pareto_k_threshold(self) -> float:
        r"""The largest :math:`\hat k` at which so many draws are enough, :math:`\min(1 - 1/\log_{10} n, 0.7)`."""
        return largest_trusted_shape(self.num_samples)

    @property
    def trustworthy(self) -> bool:
        """Whether evidence and standard error may be believed, as far as weights can tell."""
        return self.pareto_k <= self.pareto_k_threshold

    @property
    def efficiency(self) -> float:
        """Effective sample size as a share of the samples, 0 to 1."""
        return self.effective_sample_size / self.num_samples


class WeightedDraws(NamedTuple):
    """Draws from a distribution, and their log importance weights.

    Example::

        >>> import pyro.distributions as dist
        >>> from pyro_equiflow.infer import weighted_draws
        >>> found = weighted_draws(dist.Normal(0.0, 1.0), lambda x: -x.square() / 2, num_samples=100)
        >>> found.draws.shape, found.log_weights.shape
        (torch.Size([100]), torch.Size([100]))

    :ivar draws: shape ``(num_samples, *event_shape)``.
    :ivar log_weights: shape ``(num_samples,)``.
    """

    draws: Tensor
    log_weights: Tensor


@torch.no_grad()
def weighted_draws(
    distribution: Distribution,
    log_density: Callable[[Tensor], Tensor],
    *,
    num_samples: int = 1000,
    batch_size: int = 1000,
    progress: Callable[[int, int], Any] | None = None,
) -> WeightedDraws:
    r"""Draws from a distribution, a flow say, weighted for a target known up to a constant; no gradients.

    .. math:: \log w_i = \log \tilde p(x_i) - \log q(x_i), \qquad x_i \sim q

    and :math:`-\infty` where :math:`\tilde p` vanishes. For Pyro models and guides there is :func:`importance_weights`.
    Transforms that are modules are in ``eval()`` mode meanwhile: random log-determinants, as of training, would bias
    the weights.

    Example::

        >>> import pyro.distributions as dist
        >>> from pyro_equiflow.infer import evidence_estimate, weighted_draws
        >>> draws, log_weights = weighted_draws(dist.Normal(0.0, 1.0), lambda x: -x.square() / 2, num_samples=100)
        >>> round(evidence_estimate(log_weights).log_evidence, 4)  # log of the root of 2 pi
        0.9189

    :param distribution: :math:`q`, of batch shape ``()``.
    :param log_density: :math:`\log \tilde p`, from ``(n, *event_shape)`` to ``(n,)``.
    :param num_samples: number of draws.
    :param batch_size: draws made at once.
    :param progress: called with the draws made and ``num_samples`` after each batch.
    :raises ValueError: a number that is not positive, a distribution with a batch shape, a log-density of another
        shape.
    """
    check_instance("distribution", distribution, Distribution, "a distribution")
    check_instance("log_density", log_density, Callable, "a function from draws to log-densities")
    num_samples, batch_size = check_integer("num_samples", num_samples, 1), check_integer("batch_size", batch_size, 1)
    if progress is not None:
        check_instance("progress", progress, Callable, "a function of two integers or None")
    if distribution.batch_shape:
        raise ValueError(
            f"distribution: expected batch shape (), found {tuple(distribution.batch_shape)}; take one of the batch, "
            "or .to_event() where all of it is one event"
        )
    draws, weights = [], []
    for start in range(0, num_samples, batch_size):
        size = min(batch_size, num_samples - start)
        with evaluating(distribution):
            x = distribution.sample(torch.Size((size,)))
            density = distribution.log_prob(x)
        target = log_density(x)
        if target.shape != (size,):
            raise ValueError(f"log_density: expected shape ({size},), found {tuple(target.shape)}")
        draws.append(x)
        # Where the target vanishes, so does the weight, whether or not the distribution's density is a number there.
        weights.append(torch.where(target == -math.inf, target, target - density))
        if progress is not None:
            progress(start + size, num_samples)
    return WeightedDraws(torch.cat(draws), torch.cat(weights))


@contextmanager
def evaluating(*owners: Any) -> Iterator[None]:
    """Modules, and those that distributions are made of, are in ``eval()`` mode within the block."""
    parts = [part for owner in owners for part in _parts(owner)]
    before = [(module, module.training) for part in parts for module in part.modules()]
    try:
        for part in parts:
            part.eval()
        yield
    finally:
        for module, training in before:  # parents first, whose call goes on to their children
            if module.training != training:
                module.train(training)


def _parts(owner: Any) -> Iterator[torch.nn.Module]:
    if isinstance(owner, torch.nn.Module):
        yield owner
    elif isinstance(owner, Distribution):
        for part in (getattr(owner, "base_dist", None), *getattr(owner, "transforms", ())):
            yield from _parts(part)


def checked_log_weights(log_weights: Tensor) -> Tensor:
    """Log weights in float64, flat and without a graph.

    :raises TypeError: no tensor of floating-point numbers.
    :raises ValueError: fewer than two, or some that are NaN or +infinity.
    """
    check_instance("log_weights", log_weights, Tensor, "a torch.Tensor of shape (n,)")
    if not log_weights.is_floating_point():
        raise TypeError(f"log_weights: expected a floating-point tensor, found {log_weights.dtype}")
    log_weights = log_weights.detach().double().reshape(-1)
    if len(log_weights) < 2:
        raise ValueError(f"log_weights: expected two at least, found {len(log_weights)}")
    if bool(torch.isnan(log_weights).any()) or bool((log_weights == math.inf).any()):
        raise ValueError(
            "log_weights: expected numbers below infinity, found NaN or +infinity; the guide's or the model's "
            "log-density is not finite at some draws"
        )
    return log_weights


def evidence_estimate(log_weights: Tensor) -> EvidenceEstimate:
    """ELBO, log evidence, effective sample size and Pareto k-hat from log weights.

    Warns (:class:`~pyro_equiflow.EvidenceWarning`) where the standard error of the evidence is not to be believed.

    Example::

        >>> import torch
        >>> from pyro_equiflow.infer import evidence_estimate
        >>> evidence_estimate(torch.full((100,), -3.0)).log_evidence
        -3.0

    :param log_weights: shape ``(n,)``, as of :func:`importance_weights`; two at least.
    :raises ValueError: fewer than two weights, some that are NaN or +infinity, or none above -infinity.
    """
    found = estimate(log_weights)
    if not found.trustworthy:
        remedy = "train the guide longer or take a more flexible one, then more draws; diagnose(guide, model) says more"
        warn_caller(f"log_weights: {doubt(found)}; {remedy}", EvidenceWarning)
    return found


def estimate(log_weights: Tensor) -> EvidenceEstimate:
    """As :func:`evidence_estimate`, without a warning."""
    log_weights = checked_log_weights(log_weights)
    count = len(log_weights)
    largest = log_weights.max()
    if largest == -math.inf:
        raise ValueError(
            f"log_weights: expected one above -inf at least, found {count} of -inf; no draw is where the target is"
        )
    weights = (log_weights - largest).exp()
    mean, tail = float(weights.mean()), pareto_tail(weights)
    return EvidenceEstimate(
        elbo=float(log_weights.mean()),
        elbo_stderr=float(log_weights.std()) / math.sqrt(count),
        log_evidence=float(largest) + math.log(mean),
        log_evidence_stderr=max(float(weights.std()) / math.sqrt(count), tail.mean_stderr) / mean,
        effective_sample_size=float(weights.sum().square() / weights.square().sum()),
        num_samples=count,
        pareto_k=tail.shape,
    )


def doubt(found: EvidenceEstimate) -> str:
    """Why an estimate is not to be trusted."""
    if math.isnan(found.pareto_k):
        return (
            f"expected enough weights to fit a tail to, found {found.num_samples}: nothing tells whether the evidence "
            "and its standard error can be believed"
        )
    return (
        f"expected a Pareto k-hat of at most {found.pareto_k_threshold:.2f} for {found.num_samples} weights, found "
        f"{found.pareto_k:.2f}: a few draws outweigh the others, and the evidence and its standard error are not to be "
        "believed"
    )


def importance_weighted_bound(log_weights: Tensor, num_particles: int) -> tuple[float, float]:
    r"""The bound :math:`E \log \frac{1}{K} \sum_{k=1}^K w_k \le \log p(y)` and its standard error.

    Example::

        >>> import torch
        >>> from pyro_equiflow.infer import importance_weighted_bound
        >>> bound, stderr = importance_weighted_bound(torch.full((100,), -3.0), num_particles=10)
        >>> round(bound, 4)
        -3.0

    :param log_weights: shape ``(n,)``; cut into ``n // num_particles`` groups, two at least.
    :param num_particles: :math:`K`; 1 gives the ELBO.
    :raises ValueError: fewer than two groups, or weights that are NaN or infinite.

    Reference: Burda, Grosse and Salakhutdinov, *Importance weighted autoencoders* (arXiv 1509.00519), eq. 8.
    """
    log_weights = checked_log_weights(log_weights)
    most = len(log_weights) // 2
    remedy = f"at most half of the {len(log_weights)} weights"
    num_particles = check_integer("num_particles", num_particles, 1, most, remedy=remedy)
    groups = len(log_weights) // num_particles
    bounds = log_weights[: groups * num_particles].view(groups, num_particles).logsumexp(1) - math.log(num_particles)
    return float(bounds.mean()), float(bounds.std()) / math.sqrt(groups)
