# SPDX-License-Identifier: Apache-2.0
"""Does a model have the symmetry that is declared for it?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from escnn.group import GroupElement
from escnn.nn import FieldType
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_equiflow.infer.latents import (
    initial_trace,
    preserved_random_state,
    site_field_types,
    unconstrained_sites,
    validate_representations,
)
from pyro_equiflow.ops.events import act
from pyro_equiflow.ops.representations import probe_elements

__all__ = ["InvarianceReport", "check_model_invariance"]

_MAX_ELEMENTS = 24  # of a continuous group; two of them at random decide already, with probability one
_SPREADS = (1.0, 0.3, 3.0)  # standard deviations of the draws, in turn


@dataclass(frozen=True)
class InvarianceReport:
    """How far a model's log joint density is from invariant under a declared action.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.infer import check_model_invariance
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.ones(2), 1.0).to_event(1))
        >>> space = gspaces.no_base_space(group.so2_group())
        >>> report = check_model_invariance(model, {"z": enn.FieldType(space, [space.irrep(1)])})
        >>> report.invariant, report.offenders
        (False, ['z'])

    :ivar absolute: the largest change of the log joint, in nats.
    :ivar relative: the largest change divided by the sum of the sites' absolute log-densities (at least 1).
    :ivar sites: for each site the largest change relative to the same sum, largest first. Sites may trade density
        among each other; the log joint decides.
    :ivar element: the group element where the log joint changes most; ``None`` if it never changes.
    :ivar tolerance: the largest relative change that passes.
    :ivar evaluations: how many pairs of log joints were compared.
    """

    absolute: float
    relative: float
    sites: dict[str, float]
    element: GroupElement | None
    tolerance: float
    evaluations: int

    @property
    def invariant(self) -> bool:
        """Whether the largest relative change is within the tolerance."""
        return self.relative <= self.tolerance

    @property
    def offenders(self) -> list[str]:
        """Names of the sites whose change is above the tolerance, largest first."""
        return [name for name, change in self.sites.items() if not change <= self.tolerance]

    def __str__(self) -> str:
        verdict = "invariant" if self.invariant else "not invariant"
        lines = [
            f"{verdict}: the log joint changes by at most {self.absolute:.3g} nats, {self.relative:.3g} of its size "
            f"(tolerance {self.tolerance:.1g}), over {self.evaluations} comparisons"
        ]
        if not self.invariant:
            lines.append(f"largest at the group element {self.element}; largest relative change by site:")
            lines += [f"  {name}: {change:.3g}" for name, change in self.sites.items()]
        return "\n".join(lines)


def check_model_invariance(
    model: Callable[..., Any],
    representations: Mapping[str, FieldType],
    *args: Any,
    num_samples: int = 3,
    tolerance: float | None = None,
    elements: Iterable[GroupElement] | None = None,
    **kwargs: Any,
) -> InvarianceReport:
    r"""Evaluates a model's log joint over group elements: :math:`\log p(g \cdot u, y) = \log p(u, y)`?

    :math:`u` are the unconstrained latent values, and the log joint counts :math:`\log|\det|` of the maps to the
    constrained ones. Draws of :math:`u` are normal about Pyro's feasible initial values. Every evaluation sees the
    same subsamples, the same discrete latent values and the same random numbers; scales, masks, observed and factor
    sites count as they do in inference. Pyro's random state and parameter store are left as they were.

    A passed check is strong evidence, no proof: a term that breaks the symmetry only far from the draws goes unseen.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.infer import check_model_invariance
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(z.norm(), 0.1), obs=torch.tensor(2.0))
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> check_model_invariance(model, {"z": enn.FieldType(space, [space.irrep(1, 1)])}).invariant
        True

    :param model: a Pyro model.
    :param representations: field types, without a base space, by latent site; sites left out are invariant.
    :param args: the model's arguments.
    :param num_samples: number of draws.
    :param tolerance: largest relative change that passes; by default 1e-4 in float32 and 1e-8 in float64.
    :param elements: group elements; by default generators of a finite group, and up to 24 of escnn's testing elements
        of a continuous one.
    :param kwargs: the model's keyword arguments.
    :raises ValueError: sites unknown to the model, sizes that do not fit, unlike gspaces, or no draw at which the log
        joint is finite.
    """
    validate_representations(representations)
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples: expected a positive integer, found {num_samples!r}")
    store = pyro.get_param_store()
    known = set(store.keys())
    try:
        with torch.no_grad(), preserved_random_state():
            return _check(model, representations, args, kwargs, num_samples, tolerance, elements)
    finally:
        for name in set(store.keys()) - known:
            del store[name]


def _check(
    model: Callable[..., Any],
    representations: Mapping[str, FieldType],
    args: tuple,
    kwargs: dict[str, Any],
    num_samples: int,
    tolerance: float | None,
    elements: Iterable[GroupElement] | None,
) -> InvarianceReport:
    start = initial_trace(InitMessenger(init_to_feasible)(model), args, kwargs)
    centre = unconstrained_sites(start)
    types = site_field_types(representations, {name: value.shape for name, value in centre.items()})
    single = any(value.dtype != torch.float64 for value in centre.values())
    tolerance = (1e-4 if single else 1e-8) if tolerance is None else tolerance
    chosen = _elements(next(iter(types.values())).fibergroup) if elements is None else list(elements)
    # One seed for all evaluations: what the model draws besides its replayed sites stays the same.
    seed = int(torch.randint(2**31, ()))
    worst, relative, where, count = 0.0, 0.0, None, 0
    by_site: dict[str, float] = {}
    # Drawn before any evaluation: each of those starts the generators anew.
    spreads = [_SPREADS[index % len(_SPREADS)] for index in range(num_samples)]
    draws = [{name: value + spread * torch.randn_like(value) for name, value in centre.items()} for spread in spreads]
    for draw in draws:
        reference = _site_log_densities(model, start, draw, args, kwargs, seed)
        size = max(1.0, sum(abs(value) for value in reference.values()))
        if not math.isfinite(size):
            continue
        for element in chosen:
            moved = {n: act(types[n], element, v.reshape(-1)).reshape(v.shape) for n, v in draw.items()}
            found = _site_log_densities(model, start, moved, args, kwargs, seed)
            changes = {name: _nan_to_inf(found[name] - reference[name]) for name in reference}
            change = abs(_nan_to_inf(math.fsum(found.values()) - math.fsum(reference.values())))
            count += 1
            for name, value in changes.items():
                by_site[name] = max(by_site.get(name, 0.0), abs(value) / size)
            worst = max(worst, change)
            if change / size > relative:
                relative, where = change / size, element
    if count == 0:
        raise ValueError(
            f"model: expected a finite log joint, found none at {num_samples} draws about Pyro's feasible initial "
            "values; check the model's supports, or scale its latent values"
        )
    ordered = dict(sorted(by_site.items(), key=lambda item: -item[1]))
    return InvarianceReport(worst, relative, ordered, where, tolerance, count)


def _nan_to_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _elements(group: Any) -> list[GroupElement]:
    elements = list(probe_elements(group))
    if len(elements) <= _MAX_ELEMENTS:
        return elements
    # A stride prime to the list's structure (rotations, then rotations times a reflection) visits all of it.
    return [elements[(index * len(elements)) // _MAX_ELEMENTS] for index in range(_MAX_ELEMENTS)]


def _site_log_densities(
    model: Callable[..., Any], start: Trace, values: dict[str, Tensor], args: tuple, kwargs: dict[str, Any], seed: int
) -> dict[str, float]:
    """Log-densities by site at some unconstrained values, every other random choice as in ``start``."""
    replayed = start.copy()
    for name, value in values.items():
        node: Any = dict(replayed.nodes[name])
        node["value"] = biject_to(node["fn"].support)(value)
        replayed.nodes[name] = node
    pyro.set_rng_seed(seed)
    # Far draws may overflow: then the log joint is not finite and the draw is left out, in silence.
    with pyro.validation_enabled(False):
        trace = initial_trace(pyro.poutine.replay(model, trace=replayed), args, kwargs)
        trace.compute_log_prob()
    densities = {}
    site: Any
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        density = site["log_prob_sum"]
        if name in values and not site["is_observed"]:
            fn = site["fn"]
            transform = biject_to(fn.support)
            jacobian = transform.log_abs_det_jacobian(values[name], site["value"])
            jacobian = sum_rightmost(jacobian, jacobian.dim() - site["value"].dim() + fn.event_dim)
            density = density + scale_and_mask(jacobian, site["scale"], site["mask"]).sum()
        densities[name] = float(density)
    return densities
