# SPDX-License-Identifier: Apache-2.0
"""One call that says how good a guide is, whether its figures can be believed, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from escnn.nn import FieldType
from torch import Tensor
from torch.distributions import Distribution

from pyro_equiflow.distributions.augmented import augment
from pyro_equiflow.distributions.orbit import Orbit
from pyro_equiflow.infer.evidence import EvidenceEstimate, doubt, estimate, evaluating, importance_weighted_bound
from pyro_equiflow.infer.importance import importance_weights
from pyro_equiflow.infer.latents import preserved_random_state
from pyro_equiflow.ops.arguments import check_instance, check_integer
from pyro_equiflow.ops.events import act
from pyro_equiflow.ops.representations import probe_elements

__all__ = ["GuideReport", "diagnose", "largest_change"]

_GROUPS = 20  # of draws, for the bound: its standard error has about a sixth's error of its own
_INVARIANCE_DRAWS = 100
_MATRICES = 24  # of a group given by matrices
_MUCH = 0.1  # nats: a gap, an error or a change of the guide's density below it asks for nothing


@dataclass(frozen=True, eq=False)
class GuideReport:
    """What :func:`diagnose` found; ``str`` gives it as a table, with what to do.

    Example::

        >>> import torch
        >>> from pyro_equiflow.infer import GuideReport, evidence_estimate
        >>> found = evidence_estimate(torch.full((100,), -3.0))
        >>> GuideReport("AutoNormal", found, (-3.0, 0.0), 5, torch.full((100,), -3.0)).trustworthy
        True

    :ivar guide: the guide's name.
    :ivar estimate: ELBO, evidence, effective sample size and k-hat.
    :ivar bound: the importance-weighted bound of the evidence, and its standard error.
    :ivar bound_particles: number of draws per term of the bound.
    :ivar log_weights: of the draws, shape ``(num_samples,)``.
    :ivar group: the group that the guide declares, in words, if it declares one.
    :ivar invariance: largest change of the guide's log-density under it, in nats, at some draws.
    """

    guide: str
    estimate: EvidenceEstimate
    bound: tuple[float, float]
    bound_particles: int
    log_weights: Tensor = field(repr=False)
    group: str | None = None
    invariance: float | None = None

    @property
    def trustworthy(self) -> bool:
        """Whether evidence and standard error may be believed, as far as draws of the guide can tell."""
        return self.estimate.trustworthy

    @property
    def gap(self) -> float:
        """By how many nats the ELBO is below the evidence, as estimated: the guide's Kullback-Leibler divergence."""
        return self.estimate.log_evidence - self.estimate.elbo

    @property
    def advice(self) -> list[str]:
        """What to do, in words."""
        return list(self._advice())

    def _advice(self) -> Iterator[str]:
        found = self.estimate
        if not math.isfinite(found.elbo):
            share = float((self.log_weights == -math.inf).double().mean())
            yield (
                f"{share:.2g} of the draws lie where the model has no density: give the guide the model's support, or "
                "mask what the model rules out in both"
            )
        if not found.trustworthy:
            yield f"Weights: {doubt(found)}"
        wide = self.gap > _MUCH or found.pareto_k > found.pareto_k_threshold
        if wide and math.isfinite(found.elbo):
            yield (
                f"The ELBO is {self.gap:.2g} nats or more below the evidence. Train until the loss is flat, with "
                "several particles and a rate that falls; then take a guide that bends more: a flow in place of a "
                "normal, splines, more transforms, wider networks"
            )
        if wide and self.group is None:
            yield (
                "Where a group leaves the model as it is, AutoEquivariantFlow builds it in, and averages over a finite "
                "one, whose copies of a mode a plain guide covers badly"
            )
        if self.invariance is not None and not self.invariance <= _MUCH:
            yield (
                f"The guide is not invariant under {self.group}: average it over the finite group, or the finite part "
                "of the group, that exchanges modes, and see that the flow commutes with the rest"
            )
        if found.trustworthy and found.log_evidence_stderr > _MUCH:
            yield (
                f"More draws (num_samples) narrow the evidence: its standard error falls as their root, from "
                f"{found.log_evidence_stderr:.2g} now"
            )

    def __str__(self) -> str:
        found = self.estimate
        mark = "" if found.trustworthy else "  not to be believed, see below"
        rows = [
            ("ELBO", f"{found.elbo:.3f} ± {found.elbo_stderr:.3f}", ""),
            (f"bound, {self.bound_particles} draws each", f"{self.bound[0]:.3f} ± {self.bound[1]:.3f}", ""),
            ("log evidence", f"{found.log_evidence:.3f} ± {found.log_evidence_stderr:.3f}", mark),
            ("effective sample size", f"{found.effective_sample_size:.0f} of {found.num_samples}", ""),
            ("Pareto k-hat", f"{found.pareto_k:.2f}", f"  trusted up to {found.pareto_k_threshold:.2f}"),
        ]
        if self.group is not None:
            shown = "not known" if self.invariance is None else f"to {self.invariance:.1g} nats"
            rows.append((f"invariant under {self.group}", shown, ""))
        width = max(len(name) for name, *_ in rows)
        lines = [self.guide, *(f"  {name:{width}}  {value}{note}" for name, value, note in rows)]
        lines += [f"- {line}." for line in self.advice or ["Nothing to do, by these figures"]]
        lines.append(
            "- Draws of the guide say nothing of modes that it does not reach: compare fits from other starts, or a "
            "few chains of MCMC."
        )
        return "\n".join(lines)


@torch.no_grad()
def diagnose(
    guide: Callable[..., Any],
    model: Callable[..., Any],
    *args: Any,
    num_samples: int = 2000,
    batch_size: int = 1000,
    max_plate_nesting: int | None = None,
    **kwargs: Any,
) -> GuideReport:
    r"""How good a guide is: ELBO, bound, evidence, effective sample size, Pareto k-hat, invariance, and what to do.

    Any guide of Pyro's will do, and any model that :func:`importance_weights` takes. Figures are of draws from the
    guide. What it covers badly shows, since some draws there outweigh all others: :math:`\hat k` then is large. What
    it does not reach at all, a mode of several say, leaves no trace in any function of these weights: evidence and
    bound are then those of the modes that it has.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_equiflow.infer import diagnose
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(1.0))
        >>> guide = AutoNormal(model)
        >>> report = diagnose(guide, model, num_samples=500)
        >>> print(report)
        AutoNormal
          ELBO                    ...
        >>> report.estimate.num_samples
        500

    :param guide: a guide; one that was not called before is set up.
    :param model: the model it is of.
    :param args: arguments of both.
    :param num_samples: number of draws, 25 at least: fewer say nothing of a tail.
    :param batch_size: draws made at once.
    :param max_plate_nesting: largest number of nested plates; found by running both once if not given.
    :param kwargs: keyword arguments of both.
    :raises ValueError: what :func:`importance_weights` refuses, or no draw where the model has a density.

    References: Yao et al., *Yes, but did it work?: evaluating variational inference* (arXiv 1802.02538); Vehtari et
    al., *Pareto smoothed importance sampling* (JMLR 2024, arXiv 1507.02646); Burda, Grosse and Salakhutdinov,
    *Importance weighted autoencoders* (arXiv 1509.00519), eq. 8.
    """
    check_instance("guide", guide, Callable, "a guide")
    check_instance("model", model, Callable, "a Pyro model")
    num_samples = check_integer("num_samples", num_samples, 25)
    options: dict[str, Any] = {"batch_size": batch_size, "max_plate_nesting": max_plate_nesting}
    log_weights = importance_weights(model, guide, *args, num_samples=num_samples, **options, **kwargs)
    found, particles = estimate(log_weights), max(1, num_samples // _GROUPS)
    group, moves = _declared(guide)
    invariance = _invariance(guide, moves, args, kwargs) if moves else None
    return GuideReport(
        getattr(guide, "__name__", type(guide).__name__),
        found,
        importance_weighted_bound(log_weights, particles),
        particles,
        log_weights,
        group,
        invariance,
    )


def _declared(guide: Any) -> tuple[str | None, list[Callable[[Tensor], Tensor]]]:
    """The group that a guide declares, in words, and elements that decide for it as maps of its joint values."""
    field_type, orbit = getattr(guide, "field_type", None), getattr(guide, "orbit", None)
    moves: list[Callable[[Tensor], Tensor]] = []
    names = []
    if isinstance(field_type, FieldType) and field_type.fibergroup.order() != 1:
        names.append(str(field_type.fibergroup))
        auxiliary = getattr(guide, "auxiliary", None)
        acting = field_type if auxiliary is None else augment(field_type, auxiliary)
        moves += [partial(act, acting, g) for g in probe_elements(field_type.fibergroup)]
    if isinstance(orbit, Orbit) and orbit.field_type is None:
        names.append(f"a group of {len(orbit)} matrices")
        moves += [partial(orbit.turn, which=torch.tensor(index)) for index in range(min(len(orbit), _MATRICES))]
    return " and ".join(names) or None, moves


def _invariance(
    guide: Any, moves: list[Callable[[Tensor], Tensor]], args: tuple, kwargs: dict[str, Any]
) -> float | None:
    """The largest change of a guide's log-density at draws of its own, by some maps of them."""
    if not hasattr(guide, "get_posterior"):
        return None
    with evaluating(guide), preserved_random_state():
        posterior = guide.get_posterior(*args, **kwargs)
        joint = getattr(posterior, "joint", posterior)  # auxiliary fields are invariant as well, and so is their joint
        return largest_change(joint, moves, _INVARIANCE_DRAWS)


def largest_change(density: Distribution, moves: Iterable[Callable[[Tensor], Tensor]], number: int) -> float:
    """By how many nats a log-density changes at most, where so many draws of its own are moved."""
    draws = density.sample(torch.Size((number,)))
    before = density.log_prob(draws)
    return max((float((density.log_prob(move(draws)) - before).abs().max()) for move in moves), default=0.0)
