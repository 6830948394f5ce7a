# SPDX-License-Identifier: Apache-2.0
"""Does a model have the symmetry that is declared for it?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from escnn.group import GroupElement
from escnn.nn import FieldType
from torch import Tensor

from pyro_equiflow.infer.actions import (
    Numbered,
    Representations,
    field_norms,
    moved,
    site_actions,
    validate_representations,
)
from pyro_equiflow.infer.joint_density import LogJoint
from pyro_equiflow.infer.latents import preserved_random_state
from pyro_equiflow.ops.arguments import check_instance, check_integer, check_number
from pyro_equiflow.ops.events import check_elements
from pyro_equiflow.ops.representations import probe_elements

__all__ = ["InvarianceReport", "SiteChange", "check_model_invariance"]

_MAX_ELEMENTS = 24  # of a continuous group; two of them at random decide already, with probability one
_SPREADS = (1.0, 0.3, 3.0)  # standard deviations of the draws, in turn
_PROBES = 6  # latent values at rounding distance, per draw
_CLOSER = 60  # as many more before a model is refused: what is rounded coarsely answers to few of them
_CLEAR = 100.0  # but where a change is that many times what rounding explains, there is no doubt
_NOISE = 2.0  # their distance in machine epsilons
_SAFETY = 4.0  # by which the seen effect of rounding, and that of its terms' own, are multiplied


class SiteChange(NamedTuple):
    """How far a site's log-density changes, in nats, and how much of it rounding may explain.

    Example::

        >>> from pyro_equiflow.infer import SiteChange
        >>> SiteChange(change=0.1, allowance=1e-5).exceeds
        True

    :ivar change: the absolute change.
    :ivar allowance: four times what rounding of the latent values and of the site's own terms does; see
        :func:`check_model_invariance`. The tolerance is in it.
    """

    change: float
    allowance: float

    @property
    def exceeds(self) -> bool:
        """Whether the change is more than rounding explains."""
        return not self.change <= self.allowance


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

    :ivar invariant: whether all changes are explained by rounding, or sites that change make up for each other.
    :ivar absolute: the largest change of the log joint, in nats.
    :ivar sites: for each site its largest change, as measured by its allowance, largest first. Sites that one summed
        out ties together count as one, their names joined with ``+``.
    :ivar element: the group element where the log joint changes most; ``None`` if only rounding changes it.
    :ivar evaluations: how many pairs of log joints were compared.
    :ivar summed: discrete sites that were summed out.
    :ivar held: discrete and hidden sites that kept one value.
    """

    invariant: bool
    absolute: float
    sites: dict[str, SiteChange]
    element: GroupElement | Numbered | None
    evaluations: int
    summed: tuple[str, ...] = ()
    held: tuple[str, ...] = ()

    @property
    def offenders(self) -> list[str]:
        """Names of the sites that change by more than rounding explains, largest first."""
        return [name for name, site in self.sites.items() if site.exceeds]

    def __str__(self) -> str:
        verdict, cause = ("invariant", "no more") if self.invariant else ("not invariant", "more")
        lines = [
            f"{verdict}: the log joint changes by at most {self.absolute:.2g} nats, {cause} than rounding explains, "
            f"over {self.evaluations} comparisons"
        ]
        if self.offenders:
            lines.append("sites trade density:" if self.invariant else "largest changes by site:")
            lines += [
                f"  {name}: {site.change:.2g} nats, of which rounding explains {site.allowance:.1g}"
                for name, site in self.sites.items()
            ]
        if not self.invariant:
            lines.append(f"largest at the group element {self.element}")
        if self.summed:
            lines.append(f"summed out: {', '.join(self.summed)}")
        if self.held:
            lines.append(f"held fixed: {', '.join(self.held)}")
        return "\n".join(lines)


def check_model_invariance(
    model: Callable[..., Any],
    representations: Representations,
    *args: Any,
    num_samples: int = 3,
    tolerance: float = 0.0,
    elements: Iterable[GroupElement] | None = None,
    **kwargs: Any,
) -> InvarianceReport:
    r"""Evaluates a model's log joint over group elements: :math:`\log p(g \cdot u, y) = \log p(u, y)`?

    :math:`u` are the unconstrained latent values, and the log joint counts :math:`\log|\det|` of the maps to the
    constrained ones. Draws of :math:`u` are normal about Pyro's feasible initial values. Every evaluation sees the
    same subsamples and the same random numbers; scales, masks, observed and factor sites count as they do in
    inference. Pyro's random state and parameter store are left as they were.

    Discrete sites of finite support are summed out, as ``TraceEnum_ELBO`` does, whether they are marked for
    enumeration or hidden from a guide by ``poutine.block`` (or neither): the model has to allow parallel enumeration.
    Those marked ``infer={"enumerate": None}``, those of infinite support and hidden continuous sites keep one value
    drawn from their prior; the report names them.

    A change passes where rounding explains it. Site by site it may be four times the sum of two numbers: machine
    epsilon times the absolute values of the site's terms (those of the Jacobian too, each at least 1 nat), and the
    largest change seen at values that differ from :math:`u` by rounding, :math:`g^{-1} \cdot (g \cdot u + \delta)`
    with :math:`\delta` normal, of two epsilons of each field's norm. Sites that change more than that may make up
    for each other: their changes are added up, and so are their allowances. However large the data, they hide no
    change of another site.

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
    :param representations: field types, without a base space, by latent site; sites left out are invariant. Or, of a
        finite group, the matrices of all elements (:func:`~pyro_equiflow.matrix_group`), in one order for all sites.
    :param args: the model's arguments.
    :param num_samples: number of draws.
    :param tolerance: a change in nats that passes besides rounding, of a site and of the log joint: for symmetries
        that a model has approximately only, or with constants that are rounded more coarsely than its latent values.
    :param elements: group elements; by default generators of a finite group, and up to 24 of escnn's testing elements
        of a continuous one. Of a group given by matrices up to 24 of these are taken.
    :param kwargs: the model's keyword arguments.
    :raises ValueError: sites unknown to the model, sizes that do not fit, unlike gspaces, no draw at which the log
        joint is finite, or a model that does not run with its discrete sites enumerated.
    """
    check_instance("model", model, Callable, "a Pyro model")
    representations = validate_representations(representations)
    num_samples = check_integer("num_samples", num_samples, 1)
    tolerance = check_number("tolerance", tolerance, "[0, inf)")
    first = next(iter(representations.values()))
    if not isinstance(first, FieldType):
        if elements is not None:
            raise ValueError("elements: expected None beside matrices, which are the elements; leave it out")
        elements = _some([Numbered(number) for number in range(len(first))])
    elif elements is not None:
        elements = check_elements(first, elements)
        if not elements:
            raise ValueError(f"elements: expected elements of {first.fibergroup}, one at least, found none")
    else:
        elements = _some(list(probe_elements(first.fibergroup)))
    store = pyro.get_param_store()
    known = set(store.keys())
    try:
        with torch.no_grad(), preserved_random_state():
            return _check(LogJoint(model, args, kwargs), representations, num_samples, tolerance, elements)
    finally:
        for name in set(store.keys()) - known:
            del store[name]


def _check(
    joint: LogJoint,
    representations: Mapping[str, Any],
    num_samples: int,
    tolerance: float,
    elements: list[Any],
) -> InvarianceReport:
    actions = site_actions(representations, {name: value.shape for name, value in joint.latents.items()})
    actions = {name: actions[name] for name in representations}  # the others stay as they are
    # Drawn before any evaluation: each of those starts the generators anew.
    spreads = [_SPREADS[index % len(_SPREADS)] for index in range(num_samples)]
    draws = [
        {name: value + spread * torch.randn_like(value) for name, value in joint.latents.items()} for spread in spreads
    ]
    orbits = [_Orbit(joint, actions, elements, draw) for draw in draws]
    orbits = [orbit for orbit in orbits if orbit.is_finite]
    if not orbits:
        raise ValueError(
            f"model: expected a finite log joint, found none at {num_samples} draws about Pyro's feasible initial "
            "values; check the model's supports, or scale its latent values"
        )
    report, ratio = _judge(joint, orbits, tolerance)
    if 1 < ratio < _CLEAR:
        for orbit in orbits:
            orbit.probe(_CLOSER)
        report, _ = _judge(joint, orbits, tolerance)
    return report


class _Orbit:
    """The log joint at a draw, where group elements move it, and at rounding distance from it."""

    def __init__(
        self,
        joint: LogJoint,
        actions: Mapping[str, Any],
        elements: list[Any],
        draw: dict[str, Tensor],
    ) -> None:
        self._joint, self._actions, self._draw = joint, actions, draw
        self.elements, self.reference = elements, joint(draw)
        self._probed, self._felt = 0, dict.fromkeys(self.reference, 0.0)
        self.probe(_PROBES)
        self.is_finite = all(math.isfinite(site.value + self._felt[name]) for name, site in self.reference.items())
        if self.is_finite:
            self._moved = [joint(moved(actions, element, draw)) for element in elements]

    def probe(self, count: int) -> None:
        """Looks at what rounding of the latent values does to each site."""
        for index in range(self._probed, self._probed + count):
            torch.manual_seed(index)  # an evaluation leaves the generator as it was at the last
            element = self.elements[index % len(self.elements)]
            for name, site in self._joint(_rounded(self._actions, element, self._draw)).items():
                self._felt[name] = max(self._felt[name], abs(_nan_to_inf(site.value - self.reference[name].value)))
        self._probed += count

    def changes(self) -> list[list[tuple[float, float]]]:
        """By element and site, what the element changes and what of it rounding explains."""
        return [
            [
                (
                    _nan_to_inf(moved[name].value - here.value),
                    _SAFETY * (self._felt[name] + max(here.rounding, _finite(moved[name].rounding))),
                )
                for name, here in self.reference.items()
            ]
            for moved in self._moved
        ]


def _nan_to_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _judge(joint: LogJoint, orbits: list[_Orbit], tolerance: float) -> tuple[InvarianceReport, float]:
    rows = torch.tensor([row for orbit in orbits for row in orbit.changes()], dtype=torch.float64)
    elements = [element for orbit in orbits for element in orbit.elements]
    changes, allowances = rows[..., 0], rows[..., 1] + tolerance
    sites = {}
    for name, change, allowance in zip(orbits[0].reference, changes.T.abs(), allowances.T):
        worst = int((change / allowance).argmax())
        sites[name] = SiteChange(float(change[worst]), float(allowance[worst]))
    ratios = _ratios(changes, allowances, tolerance)
    worst = int(ratios.argmax())
    report = InvarianceReport(
        invariant=bool((ratios <= 1).all()),
        absolute=float(changes.sum(1).abs().max()),
        sites=dict(sorted(sites.items(), key=lambda item: -item[1].change / item[1].allowance)),
        element=elements[worst] if ratios[worst] > 1 else None,
        evaluations=len(elements),
        summed=joint.summed,
        held=joint.held,
    )
    return report, float(ratios[worst])


def _ratios(changes: Tensor, allowances: Tensor, tolerance: float) -> Tensor:
    """The log joint's changes as multiples of what its sites are allowed; both of shape ``(comparisons, sites)``.

    Sites within their allowance count as unchanged, or rounding of a large site would hide the change of a small one;
    unless that takes back most of what the others change: then it is no rounding, but density traded with them.
    """
    whole, allowed = changes.sum(1), (allowances - tolerance).sum(1)
    moving = changes.abs() > allowances
    moved = torch.where(moving, changes, 0.0).sum(1)
    if whole.square().sum() >= moved.square().sum() / 4:
        whole, allowed = moved, torch.where(moving, allowances - tolerance, 0.0).sum(1)
    return whole.abs() / (allowed + tolerance).clamp(min=torch.finfo(allowed.dtype).tiny)


def _rounded(actions: Mapping[str, Any], element: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """There and back again by a group element, and further rounding of its size field by field."""
    noisy = {}
    for name, value in moved(actions, element, values).items():
        norm = field_norms(actions[name], value) if name in actions else value.abs()
        noisy[name] = value + _NOISE * torch.finfo(value.dtype).eps * norm * torch.randn_like(value)
    return moved(actions, ~element, noisy)


def _some(elements: list[Any]) -> list[Any]:
    """At most 24 elements, drawn from all over the list, as a list in order might begin with a subgroup."""
    if len(elements) <= _MAX_ELEMENTS:
        return elements
    chosen = np.random.default_rng(0).choice(len(elements), _MAX_ELEMENTS, replace=False)
    return [elements[index] for index in sorted(chosen.tolist())]
