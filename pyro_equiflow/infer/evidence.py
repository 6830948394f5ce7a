# SPDX-License-Identifier: Apache-2.0
"""How good is a guide: importance weights, and the bounds and diagnostics that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor

from pyro_equiflow.infer.latents import preserved_random_state

__all__ = ["EvidenceEstimate", "evidence_estimate", "importance_weighted_bound", "importance_weights"]


class EvidenceEstimate(NamedTuple):
    r"""What the log weights :math:`\log w_i = \log p(z_i, y) - \log q(z_i)`, :math:`z_i \sim q`, say of a guide.

    :ivar elbo: mean of the log weights, in nats.
    :ivar elbo_stderr: its standard error.
    :ivar log_evidence: log of the mean weight: a consistent estimate of :math:`\log p(y)`, low on average.
    :ivar log_evidence_stderr: its standard error by the delta method; too small where the effective sample size is
        (below 100, say).
    :ivar effective_sample_size: :math:`(\sum w)^2 / \sum w^2`.
    :ivar num_samples: number of weights.
    """

    elbo: float
    elbo_stderr: float
    log_evidence: float
    log_evidence_stderr: float
    effective_sample_size: float
    num_samples: int

    @property
    def efficiency(self) -> float:
        """Effective sample size as a share of the samples, 0 to 1."""
        return self.effective_sample_size / self.num_samples


@torch.no_grad()
def importance_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    batch_size: int = 1000,
    max_plate_nesting: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Log importance weights of draws from a guide, vectorised; no gradients.

    Wraps :func:`pyro.infer.importance.vectorized_importance_weights`: model and guide have to allow a plate on their
    left, as for ``Trace_ELBO(vectorize_particles=True)``.

    :param model: a Pyro model.
    :param guide: its guide.
    :param args: arguments of both.
    :param num_samples: number of draws.
    :param batch_size: draws made at once.
    :param max_plate_nesting: largest number of nested plates; found by running both once if not given.
    :param kwargs: keyword arguments of both.
    :return: shape ``(num_samples,)``.
    :raises ValueError: a number that is not positive.
    """
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, found {value!r}")
    if max_plate_nesting is None:
        max_plate_nesting = _plate_nesting(model, guide, args, kwargs)
    weights = []
    for start in range(0, num_samples, batch_size):
        size = min(batch_size, num_samples - start)
        found = vectorized_importance_weights(
            model, guide, *args, num_samples=size, max_plate_nesting=max_plate_nesting, **kwargs
        )[0]
        weights.append(torch.as_tensor(found).reshape(-1))
    return torch.cat(weights)


def _plate_nesting(model: Any, guide: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    with preserved_random_state(), pyro.poutine.block():
        guide_trace = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = pyro.poutine.trace(pyro.poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    dims = [
        frame.dim
        for trace in (guide_trace, model_trace)
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return -min(dims, default=0)


def _checked(log_weights: Tensor) -> Tensor:
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
    """ELBO, log evidence and effective sample size from log weights.

    Example::

        >>> import torch
        >>> from pyro_equiflow.infer import evidence_estimate
        >>> evidence_estimate(torch.full((100,), -3.0)).log_evidence
        -3.0

    :param log_weights: shape ``(n,)``, as of :func:`importance_weights`; two at least.
    :raises ValueError: fewer than two weights, or some that are NaN or infinite.
    """
    log_weights = _checked(log_weights)
    count = len(log_weights)
    largest = log_weights.max()
    weights = (log_weights - largest).exp()
    mean = weights.mean()
    return EvidenceEstimate(
        elbo=float(log_weights.mean()),
        elbo_stderr=float(log_weights.std()) / math.sqrt(count),
        log_evidence=float(largest + mean.log()),
        log_evidence_stderr=float(weights.std() / mean) / math.sqrt(count),
        effective_sample_size=float(weights.sum().square() / weights.square().sum()),
        num_samples=count,
    )


def importance_weighted_bound(log_weights: Tensor, num_particles: int) -> tuple[float, float]:
    r"""The bound :math:`E \log \frac{1}{K} \sum_{k=1}^K w_k \le \log p(y)` and its standard error.

    :param log_weights: shape ``(n,)``; cut into ``n // num_particles`` groups, two at least.
    :param num_particles: :math:`K`; 1 gives the ELBO.
    :raises ValueError: fewer than two groups, or weights that are NaN or infinite.

    Reference: Burda, Grosse and Salakhutdinov, *Importance weighted autoencoders* (arXiv 1509.00519), eq. 8.
    """
    log_weights = _checked(log_weights)
    groups = len(log_weights) // num_particles if num_particles > 0 else 0
    if groups < 2:
        raise ValueError(
            f"num_particles: expected a positive integer up to half of the {len(log_weights)} weights, found "
            f"{num_particles}"
        )
    bounds = log_weights[: groups * num_particles].view(groups, num_particles).logsumexp(1) - math.log(num_particles)
    return float(bounds.mean()), float(bounds.std()) / math.sqrt(groups)
