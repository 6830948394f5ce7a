# SPDX-License-Identifier: Apache-2.0
r"""The evidence of a Pyro model by annealing from prior to posterior, with no flow about: an independent yardstick.

A sequential Monte Carlo sampler: a cloud of particles goes through :math:`p(u)\, p(y \mid u)^{b}` as :math:`b` rises
from 0 to 1; at each step particles are weighed by the likelihood's change, resampled and moved by Hamiltonian
trajectories with Metropolis's test. The product of mean weights is an unbiased estimate of the evidence where steps and
step sizes are fixed beforehand, so a pilot run finds them, and runs of their own use them.

Reference: Del Moral, Doucet and Jasra, *Sequential Monte Carlo samplers* (JRSS B 2006); Neal, *Annealed importance
sampling* (Statistics and Computing 2001).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to

_RESAMPLE = 0.5  # effective share of the particles below which they are resampled
_ACCEPT = 0.8  # what the pilot's step sizes aim at


class Joint:
    """Log prior and log likelihood of many particles, as functions of all unconstrained latent values in one vector."""

    def __init__(self, model: Callable[..., Any], args: tuple) -> None:
        self._model, self._args = model, args
        sites = self._sites(pyro.poutine.trace(model).get_trace(*args))
        self._nesting = -min((f.dim for site in sites.values() for f in site["cond_indep_stack"]), default=0)
        self._latent = {name: site["fn"] for name, site in sites.items() if not site["is_observed"]}

    @staticmethod
    def _sites(trace: Any) -> dict[str, Any]:
        nodes = prune_subsample_sites(trace).nodes
        return {name: site for name, site in nodes.items() if site["type"] == "sample"}

    def _particles(self, model: Callable[..., Any], number: int) -> dict[str, Any]:
        # A trajectory that runs away ends in infinities, and is not accepted.
        with pyro.validation_enabled(False), pyro.plate("particles", number, dim=-1 - self._nesting):
            return self._sites(pyro.poutine.trace(model).get_trace(*self._args))

    def prior_draws(self, number: int) -> Tensor:
        """Shape ``(number, d)``."""
        sites = self._particles(self._model, number)
        parts = [biject_to(fn.support).inv(sites[name]["value"]) for name, fn in self._latent.items()]
        return torch.cat([part.reshape(number, -1) for part in parts], 1)

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log prior and log likelihood, each ``(number,)``."""
        values, jacobian, start = {}, u.new_zeros(len(u)), 0
        for name, fn in self._latent.items():
            size = math.prod(fn.event_shape)
            part = u[:, start : start + size].reshape(len(u), *self._nesting * (1,), *fn.event_shape)
            transform = biject_to(fn.support)
            values[name] = transform(part)
            jacobian = jacobian + transform.log_abs_det_jacobian(part, values[name]).reshape(len(u), -1).sum(1)
            start += size
        prior = likelihood = u.new_zeros(len(u))
        for name, site in self._particles(pyro.condition(self._model, data=values), len(u)).items():
            term = site["fn"].log_prob(site["value"]).reshape(len(u), -1).sum(1)
            prior, likelihood = (prior + term, likelihood) if name in values else (prior, likelihood + term)
        return prior + jacobian, likelihood


class Plan(NamedTuple):
    """What a pilot run found: by temperature its inverse, the step size and the scales of the latent values."""

    powers: list[float]
    steps: list[float]
    scales: list[Tensor]


def trajectories(
    joint: Joint, u: Tensor, power: float, step: float, scale: Tensor, moves: int, leaps: int
) -> tuple[Tensor, float]:
    """Particles after some Hamiltonian moves under the tempered density, and the share of moves accepted."""

    def energy(u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            prior, likelihood = joint(u)
            value = -(prior + power * likelihood)
            (slope,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), slope

    value, slope = energy(u)
    accepted = 0.0
    for _ in range(moves):
        size = step * scale * (0.5 + torch.rand(len(u), 1))  # of random length, so that no orbit is periodic
        p = torch.randn_like(u)
        there, force, q = u, slope, p
        for _ in range(leaps):
            q = q - size * force / 2
            there = there + size * q
            new, force = energy(there)
            q = q - size * force / 2
        change = value + p.square().sum(1) / 2 - new - q.square().sum(1) / 2
        take = torch.rand(len(u)).log() < torch.nan_to_num(change, nan=-math.inf)
        u, slope = torch.where(take[:, None], there, u), torch.where(take[:, None], force, slope)
        value = torch.where(take, new, value)
        accepted += float(take.double().mean()) / moves
    return u, accepted


def resampled(log_weights: Tensor) -> Tensor:
    """Indices drawn by the weights, systematically."""
    number = len(log_weights)
    places = (torch.rand(1) + torch.arange(number)) / number
    return torch.searchsorted(log_weights.softmax(0).cumsum(0), places).clamp(max=number - 1)


def next_power(likelihood: Tensor, log_weights: Tensor, power: float, share: float) -> float:
    """The power at which the effective share of the particles' further weights falls to ``share``, by bisection."""

    def effective(new: float) -> float:
        extra = (new - power) * likelihood
        w = log_weights.softmax(0)
        top = (w * (extra - extra.max()).exp()).sum().square()
        return float(top / (w * (2 * (extra - extra.max())).exp()).sum())

    if effective(1.0) > share:
        return 1.0
    low, high = power, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(middle) > share else (low, middle)
    return low


@torch.no_grad()
def anneal(
    joint: Joint, particles: int, plan: Plan | None = None, *, share: float = 0.9, moves: int = 3, leaps: int = 8
) -> tuple[float, Plan]:
    """One run: the log of an estimate of the evidence, and its plan. Without a plan it is a pilot, slightly biased.

    :param share: the effective share of the particles at a pilot's next temperature.
    :param moves: Hamiltonian moves at each temperature.
    :param leaps: leapfrog steps of a move.
    """
    u = joint.prior_draws(particles)
    log_weights, log_evidence = u.new_zeros(particles), 0.0
    found = Plan([], [], [])
    power, step = 0.0, 0.3
    while power < 1:
        likelihood, index = joint(u)[1], len(found.powers)
        new = next_power(likelihood, log_weights, power, share) if plan is None else plan.powers[index]
        extra = (new - power) * likelihood
        log_evidence += float((log_weights.log_softmax(0) + extra).logsumexp(0))
        log_weights, power = log_weights + extra, new
        w = log_weights.softmax(0)
        if 1 / float(w.square().sum()) < _RESAMPLE * particles:
            u, log_weights = u[resampled(log_weights)], torch.zeros_like(log_weights)
        if plan is None:
            scale = u.std(0)
        else:
            step, scale = plan.steps[index], plan.scales[index]
        u, accepted = trajectories(joint, u, power, step, scale, moves, leaps)
        found.powers.append(power)
        found.steps.append(step)
        found.scales.append(scale)
        if plan is None:
            step *= math.exp(accepted - _ACCEPT)
    return log_evidence, found


def log_evidence(
    joint: Joint, particles: int, runs: int, progress: Callable[[str], Any] = print, **settings: Any
) -> tuple[float, float, int]:
    """The log of the mean of some independent estimates, its standard error, and the number of temperatures."""
    pilot, plan = anneal(joint, particles, **settings)
    progress(f"pilot {pilot:.4f}, {len(plan.powers)} temperatures")
    found = []
    for _ in range(runs):
        found.append(anneal(joint, particles, plan, **settings)[0])
        progress(f"run {len(found)}: {found[-1]:.4f}")
    logs = torch.tensor(found, dtype=torch.float64)
    weights = (logs - logs.max()).exp()
    stderr = float(weights.std() / weights.mean()) / math.sqrt(runs)
    return float(logs.logsumexp(0)) - math.log(runs), stderr, len(plan.powers)
