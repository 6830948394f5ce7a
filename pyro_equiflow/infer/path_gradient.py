# SPDX-License-Identifier: Apache-2.0
"""The ELBO's gradient along the path of the draws only, its score term left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_equiflow.ops.arguments import check_flag, check_integer

__all__ = ["TracePathGradient_ELBO"]


class TracePathGradient_ELBO(Trace_ELBO):
    r"""Pyro's ``Trace_ELBO`` with gradients through the draws only: without noise where the guide is the posterior.

    With a reparametrised draw :math:`z = T_\theta(\epsilon)` the ELBO's usual gradient is

    .. math:: \left(\frac{\partial}{\partial z} \log \frac{p(z, y)}{q_\theta(z)}\right)
              \frac{\partial T_\theta(\epsilon)}{\partial \theta}
              - \left.\frac{\partial}{\partial \theta} \log q_\theta(z)\right|_{z = T_\theta(\epsilon)} .

    The second term, the score, is zero on average and noise otherwise; here it is left out. Where :math:`q = p(z | y)`
    the first one is zero for every draw, so that its noise fades as the guide improves. Far from the posterior it may
    be the noisier one. Loss and expected gradient, that of the model's parameters too, are those of ``Trace_ELBO``.

    :math:`\log q` is evaluated a second time, at the draws held fixed, through the inverse of a flow: a step costs one
    inverse pass and its derivative more than a plain one. Cheap for couplings; autoregressive flows pay a pass per
    dimension or block, solved ones a solution more. The guide runs twice a step and has to do the same both times
    but for its draws: no dropout. Draws of discrete or otherwise unreparametrised sites are refused; discrete sites of
    the model are summed out by ``TraceEnum_ELBO`` only. Sites that are deltas, of any log-density, are differentiated
    in full.

    Of two fits measured at equal time (``benchmarks/RESULTS.md``), with steps 1.4 to 1.9 times as long and a quarter to
    a half of the noise gone, one ended a third of a nat better; the other, stopped early, a quarter worse.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_equiflow.infer import TracePathGradient_ELBO
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))
        >>> guide = AutoNormal(model, init_loc_fn=lambda site: torch.tensor(1.0), init_scale=0.5**0.5)
        >>> loss = TracePathGradient_ELBO(num_particles=3)(model, guide)()
        >>> loss.backward()
        >>> max(float(p.grad.abs().max()) for p in guide.parameters()) < 1e-6  # the posterior is N(1, 0.5)
        True

    :param num_particles: number of draws per step.
    :param max_plate_nesting: largest number of nested plates; found by running the model once if not given.
    :param vectorize_particles: whether the draws are made side by side, in a plate on the left of all others.
    :param retain_graph: whether ``loss_and_grads`` keeps the graph of each draw.
    :raises ValueError: with the first step, a latent site of the guide whose draws carry no gradient.

    References: Roeder, Wu and Duvenaud, *Sticking the landing* (arXiv 1703.09194); Vaitl et al., *Gradients should stay
    on path* (arXiv 2207.08219) and *Path-gradient estimators for continuous normalizing flows* (arXiv 2206.09016).
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        max_plate_nesting: int | None = None,
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        num_particles = check_integer("num_particles", num_particles, 1)
        if max_plate_nesting is not None:
            max_plate_nesting = check_integer("max_plate_nesting", max_plate_nesting, 0, also="None")
        vectorize_particles = check_flag("vectorize_particles", vectorize_particles)
        if retain_graph is not None:
            retain_graph = check_flag("retain_graph", retain_graph, also="None")
        super().__init__(
            num_particles,
            max_plate_nesting=math.inf if max_plate_nesting is None else max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[Trace, Trace]:
        inner = pyro.poutine.unwrap(guide)
        if isinstance(inner, Messenger):
            raise TypeError(
                f"guide: expected a function or a module, found {type(inner).__name__}, a messenger, which "
                "runs the model itself; take a guide of pyro.infer.autoguide whose name has no Messenger in it"
            )
        traced = pyro.poutine.trace(guide)  # what Pyro gives back is without the rows of subsampled plates
        model_trace, guide_trace = super()._get_trace(model, traced, args, kwargs)
        if torch.is_grad_enabled():
            for name, term in _path_terms(guide, traced.trace, args, kwargs).items():
                site: Any = guide_trace.nodes[name]
                site["score_parts"] = site["score_parts"]._replace(entropy_term=term)
        return model_trace, guide_trace


def _path_terms(guide: Callable, trace: Trace, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    r"""What has the gradient of :math:`\log q` along the draws, by site: :math:`\langle\nabla_z \log q, z\rangle`."""
    draws = {}
    for name, site in _sample_sites(trace):
        if _is_delta(site["fn"]):
            continue
        draws[name] = site["value"]
        if not site["fn"].has_rsample:
            raise ValueError(
                f"guide: expected reparametrised draws, found site {name!r} of {type(site['fn']).__name__}, whose "
                "draws carry no gradient; take pyro.infer.Trace_ELBO, or leave a discrete site out of the guide and "
                "let pyro.infer.TraceEnum_ELBO sum it out"
            )
    # The guide again, at the same draws as leaves of a graph of its own: derivatives with respect to these alone are
    # those at fixed parameters, also where one site's distribution rests on another's draw.
    held = {name: draw.detach().requires_grad_() for name, draw in draws.items()}
    fixed = Trace()
    for name, site in trace.nodes.items():
        if name in held or (site["type"] == "sample" and site_is_subsample(site)):
            fixed.add_node(name, **{**site, "value": held.get(name, site["value"])})
    again = pyro.poutine.trace(pyro.poutine.replay(guide, trace=fixed)).get_trace(*args, **kwargs)
    again.compute_log_prob(lambda name, site: name in held)
    sites: Any = again.nodes
    total = sum(sites[name]["log_prob_sum"] for name in held)
    if not isinstance(total, Tensor) or not total.requires_grad:
        return dict.fromkeys(held, 0.0)
    slopes = torch.autograd.grad(total, list(held.values()), allow_unused=True)
    return {name: 0.0 if s is None else s * draws[name] for name, s in zip(held, slopes, strict=True)}


def _sample_sites(trace: Trace) -> list[tuple[str, Any]]:
    sites: Any = trace.nodes.items()
    return [(n, s) for n, s in sites if s["type"] == "sample" and not s["is_observed"] and not site_is_subsample(s)]


def _is_delta(fn: Any) -> bool:
    """Whether a distribution is a point, wrapped or not: its log-density is no score, with no mean of zero."""
    while not isinstance(fn, Delta) and hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return isinstance(fn, Delta)
