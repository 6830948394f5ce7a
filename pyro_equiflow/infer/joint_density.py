# SPDX-License-Identifier: Apache-2.0
"""A model's log joint density, site by site, as a function of its unconstrained latent values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from pyro.poutine import Trace
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger, _bound_partial
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_equiflow.infer.enumeration import MarginalTerm, marginal_terms
from pyro_equiflow.infer.latents import HIDDEN, initial_trace, plate_nesting, unconstrained_sites

__all__ = ["LogJoint", "SiteDensity"]


class SiteDensity(NamedTuple):
    """A site's log-density, and how large rounding of its own terms may be.

    :ivar value: the sum of its terms, in nats.
    :ivar rounding: machine epsilon times the sum of their absolute values, each term counted as at least one.
    """

    value: float
    rounding: float


class LogJoint:
    r""":math:`\log p(u, y) = \log \sum_k p(u, k, y)`, with :math:`\log|\det|` of the maps from :math:`u`.

    Discrete sites :math:`k` of finite support are summed out, whether marked for enumeration or hidden by
    ``poutine.block`` or neither, unless marked ``infer={"enumerate": None}``. Everything else that is random is the
    same at every evaluation: subsamples, other discrete sites, hidden continuous ones, and what the model draws
    besides its sites.

    :param model: a Pyro model; what :func:`pyro.poutine.block` hides on its outside is seen all the same, since the
        ELBO sees it.
    """

    def __init__(self, model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
        self._model = _unblocked(model)
        self._arguments = args, kwargs
        self._start = initial_trace(InitMessenger(_initial_value)(self._model), args, kwargs)
        #: Unconstrained values to start from, by site.
        self.latents = unconstrained_sites(self._start)
        others = [
            (name, site)
            for name, site in self._start.iter_stochastic_nodes()
            if name not in self.latents and not site_is_subsample(site)
        ]
        #: Names of the sites summed out.
        self.summed = tuple(name for name, site in others if _is_finite(site))
        #: Names of the sites held fixed.
        self.held = tuple(name for name, _ in others if name not in self.summed)
        self._nesting = plate_nesting(self._start)
        self._seed = int(torch.randint(2**31, ()))

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, SiteDensity]:
        """By site, or by names joined with ``+`` where sites that are summed out tie several together."""
        # Far draws may overflow: then the log joint is not finite and the draw is left out, in silence.
        with pyro.validation_enabled(False):
            if self.summed:
                terms, jacobians = self._marginal_terms(values)
            else:
                trace, jacobians = self._trace(values, self._model)
                terms = [MarginalTerm((name,), site["log_prob"], site["scale"]) for name, site in _sites(trace)]
        found: dict[str, SiteDensity] = {}
        for term in terms:
            name, density = " + ".join(term.sites), term.log_prob.double()
            count = scale_and_mask(torch.ones_like(density), term.scale).sum()
            # The term is that of the log-density and the Jacobian together, which may cancel.
            size = density.abs().sum() + count + sum(2 * jacobians[site] for site in term.sites if site in jacobians)
            before = found.get(name, SiteDensity(0.0, 0.0))
            rounding = torch.finfo(term.log_prob.dtype).eps * float(size)
            found[name] = SiteDensity(before.value + float(density.sum()), before.rounding + rounding)
        return found

    def _marginal_terms(self, values: Mapping[str, Tensor]) -> tuple[list[MarginalTerm], dict[str, Tensor]]:
        def configure(site: Any) -> Any:
            return {"enumerate": "parallel" if site["name"] in self.summed else None, "num_samples": None}

        model = EnumMessenger(-1 - self._nesting)(pyro.poutine.infer_config(self._model, config_fn=configure))
        try:
            trace, jacobians = self._trace(values, model)
            trace.pack_tensors()
            return marginal_terms(trace), jacobians
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"model: expected one that runs with its discrete sites {', '.join(self.summed)} enumerated in "
                f"parallel, found {type(error).__name__}: {reason}; write it such that their values broadcast on the "
                'left, or mark those to be held fixed with infer={"enumerate": None}'
            ) from error

    def _trace(self, values: Mapping[str, Tensor], model: Callable[..., Any]) -> tuple[Trace, dict[str, Tensor]]:
        """A trace with its log-densities at unconstrained values, and the sizes of the Jacobian terms in them."""
        replayed, jacobians = Trace(), {}
        start: Any = self._start
        for name, site in start.iter_stochastic_nodes():
            if name in self.summed:
                continue
            node = {**site, "infer": dict(site["infer"])}
            if name in values:
                # The map of the first trace, as in an autoguide, also where the support depends on other sites.
                transform = biject_to(node["fn"].support)
                node["value"] = transform(values[name])
                jacobian = transform.log_abs_det_jacobian(values[name], node["value"])
                jacobians[name] = sum_rightmost(jacobian, jacobian.dim() - node["value"].dim() + node["fn"].event_dim)
            replayed.add_node(name, **node)
        # What the model draws besides its replayed sites stays the same.
        pyro.set_rng_seed(self._seed)
        args, kwargs = self._arguments
        trace = initial_trace(pyro.poutine.replay(model, trace=replayed), args, kwargs)
        trace = prune_subsample_sites(trace)
        trace.compute_log_prob()
        for name, jacobian in jacobians.items():
            site = trace.nodes[name]
            site["unscaled_log_prob"] = site["unscaled_log_prob"] + jacobian
            site["log_prob"] = scale_and_mask(site["unscaled_log_prob"], site["scale"], site["mask"])
            jacobians[name] = scale_and_mask(jacobian.double().abs(), site["scale"], site["mask"]).sum()
        return trace, jacobians


class _Unblocked(Messenger):
    """In place of a ``BlockMessenger``: what that would hide is marked as hidden, and drawn where it stands."""

    def __init__(self, hides: Callable[[Any], bool | None]) -> None:
        super().__init__()
        self._hides = hides

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["value"] is None and not site_is_subsample(msg) and self._hides(msg):
            msg["infer"] = {**msg["infer"], HIDDEN: True}
            msg["value"] = msg["fn"].sample()


def _unblocked(model: Any) -> Any:
    """The model without the blocks wrapped around it; those within are its own."""
    wrapped = model.func if isinstance(model, _bound_partial) else model
    if not (isinstance(wrapped, partial) and len(wrapped.args) == 2 and isinstance(wrapped.args[0], Messenger)):
        return model
    messenger, inner = wrapped.args
    if isinstance(messenger, BlockMessenger):
        messenger = _Unblocked(messenger.hide_fn)
    return messenger(_unblocked(inner))


def _initial_value(site: Any) -> Tensor:
    return site["fn"].sample() if site["fn"].support.is_discrete else init_to_feasible(site)


def _is_finite(site: Any) -> bool:
    enumerable = getattr(site["fn"], "has_enumerate_support", False)
    return bool(enumerable) and site["infer"].get("enumerate", "parallel") is not None


def _sites(trace: Trace) -> Iterator[tuple[str, Any]]:
    return ((name, site) for name, site in trace.nodes.items() if site["type"] == "sample")
