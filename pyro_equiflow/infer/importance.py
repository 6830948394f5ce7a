# SPDX-License-Identifier: Apache-2.0
"""Importance weights of a guide's draws for a Pyro model, its enumerated sites summed out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_equiflow.infer.enumeration import is_enumerated, marginal_terms
from pyro_equiflow.infer.evidence import evaluating
from pyro_equiflow.infer.latents import plate_nesting, preserved_random_state, subsampled_plate
from pyro_equiflow.ops.arguments import check_instance, check_integer

__all__ = ["importance_weights"]

_PARTICLES = "num_particles_vectorized"  # Pyro's own name for the plate


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
    r"""Log importance weights of draws from a guide, vectorised; no gradients.

    .. math:: \log w_i = \log \sum_k p(z_i, k, y) - \log q(z_i), \qquad z_i \sim q

    with :math:`k` the model's sites that are marked ``infer={"enumerate": "parallel"}`` and not in the guide: they are
    summed out as in ``TraceEnum_ELBO``. Discrete sites of the guide are drawn, whatever their marks. Model and guide
    have to allow a plate on their left, as for ``Trace_ELBO(vectorize_particles=True)``; modules are in ``eval()``
    mode meanwhile. Scales and masks of observed sites count: the weights are those of the scaled density.

    What would give other weights than these is refused: latent sites that the guide leaves out and nothing sums out,
    which the model would draw from the prior; scales and masks of the guide that the model does not share; and
    subsampled plates, where a weight is an estimate, unbiased for the ELBO but not for the evidence.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_equiflow.infer import importance_weights
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(0.0, 0.5**0.5))
        >>> importance_weights(model, guide, num_samples=3)  # of the posterior itself: all are the evidence
        tensor([-1.2655, -1.2655, -1.2655])

    :param model: a Pyro model.
    :param guide: its guide.
    :param args: arguments of both.
    :param num_samples: number of draws.
    :param batch_size: draws made at once.
    :param max_plate_nesting: largest number of nested plates; found by running both once if not given.
    :param kwargs: keyword arguments of both.
    :return: shape ``(num_samples,)``.
    :raises ValueError: a number that is not positive, or a model and a guide as above; the site or plate is named.
    """
    check_instance("model", model, Callable, "a Pyro model")
    check_instance("guide", guide, Callable, "a guide")
    num_samples, batch_size = check_integer("num_samples", num_samples, 1), check_integer("batch_size", batch_size, 1)
    if max_plate_nesting is not None:
        max_plate_nesting = check_integer("max_plate_nesting", max_plate_nesting, 0, also="None")
    else:
        max_plate_nesting = _plate_nesting(model, guide, args, kwargs)
    weights = []
    with evaluating(model, guide):
        for start in range(0, num_samples, batch_size):
            size = min(batch_size, num_samples - start)
            weights.append(_batch(model, guide, args, kwargs, size, max_plate_nesting))
    return torch.cat(weights)


def _batch(model: Any, guide: Any, args: tuple, kwargs: dict[str, Any], size: int, nesting: int) -> Tensor:
    def particles(fn: Callable[..., Any]) -> Callable[..., Any]:
        def vectorized(*args: Any, **kwargs: Any) -> Any:
            with pyro.plate(_PARTICLES, size, dim=-1 - nesting):
                return fn(*args, **kwargs)

        return vectorized

    guide_trace = pyro.poutine.trace(particles(guide)).get_trace(*args, **kwargs)
    replayed = pyro.poutine.replay(EnumMessenger(-2 - nesting)(particles(model)), trace=guide_trace)
    model_trace = pyro.poutine.trace(replayed).get_trace(*args, **kwargs)
    _check_match(model_trace, guide_trace)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, nesting + 1)
    guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
    for trace in (guide_trace, model_trace):
        trace.compute_log_prob()
        if is_validation_enabled():
            for _, site in _sample_sites(trace):
                check_site_shape(site, nesting + 1)
    guide_trace.pack_tensors()
    model_trace.pack_tensors(guide_trace.plate_to_symbol)
    symbol = guide_trace.plate_to_symbol.get(_PARTICLES) or model_trace.plate_to_symbol[_PARTICLES]
    target = [term.log_prob for term in marginal_terms(model_trace)]
    proposal: list[Any] = [site["packed"]["log_prob"] for _, site in _sample_sites(guide_trace)]
    total = sum(_by_particle(term, symbol) for term in target) - sum(_by_particle(term, symbol) for term in proposal)
    dtype = target[0].dtype if target else torch.get_default_dtype()
    for term in (*target, *proposal):
        dtype = torch.promote_types(dtype, term.dtype)
    return torch.as_tensor(total).to(dtype).expand(size)


def _by_particle(term: Any, symbol: str) -> Tensor:
    """Summed over all plates but the particles'; in double precision, since there may be many data."""
    others = [dim for dim, name in enumerate(term._pyro_dims) if name != symbol]
    return term.double().sum(others) if others else term.double()


def _plate_nesting(model: Any, guide: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    with preserved_random_state(), pyro.poutine.block():
        guide_trace = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = pyro.poutine.trace(pyro.poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return plate_nesting(guide_trace, model_trace)


def _sample_sites(trace: Trace) -> list[tuple[str, Any]]:
    return [(n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)]


def _check_match(model_trace: Trace, guide_trace: Trace) -> None:
    """Raises unless the ratio of the traces' densities is an importance weight."""
    model_sites, guide_sites = dict(_sample_sites(model_trace)), dict(_sample_sites(guide_trace))
    for name, site in (*model_sites.items(), *guide_sites.items()):
        plate = subsampled_plate(site)
        if plate is not None:
            raise ValueError(
                f"model: expected the whole of plate {plate.name!r} at site {name!r}, {plate.full_size} rows, found a "
                f"subsample of {plate.size}: its weights would be estimates, whose mean is not the evidence; call with "
                "subsample_size=None, or take the ELBO from pyro.infer.Trace_ELBO().loss"
            )
    for name, site in model_sites.items():
        if not site["is_observed"] and name not in guide_sites:
            _check_summed(name, site)
    for name, site in guide_sites.items():
        if site["is_observed"]:
            continue
        target = model_sites.get(name)
        if (target is None or target["is_observed"]) and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"guide: expected sites that are latent in the model, found {name!r}, which is "
                f"{'not there' if target is None else 'observed'}; leave it out, or mark an auxiliary one "
                'infer={"is_auxiliary": True}'
            )
        scale = torch.as_tensor(site["scale"])
        if not bool((scale == 1).all()):
            raise ValueError(
                f"guide: expected a site {name!r} of scale 1, found {scale.tolist()}: a scaled density is not that of "
                "the draws; call with the guide, and the model, outside of poutine.scale"
            )
        masks = [torch.as_tensor(True if s is None or s["mask"] is None else s["mask"]) for s in (target, site)]
        if not bool((masks[0] == masks[1]).all()):
            raise ValueError(
                f"model, guide: expected one mask of the latent site {name!r}, found entries that one of them leaves "
                "out: they are drawn, but do not count on both sides; mask observed sites only, or the site in both"
            )


def _check_summed(name: str, site: Any) -> None:
    if is_enumerated(site) and site["infer"].get("num_samples") is None:
        return
    if getattr(site["fn"], "has_enumerate_support", False):
        remedy = 'mark it infer={"enumerate": "parallel"} (pyro.infer.config_enumerate) to have it summed out'
    else:
        remedy = "give it a site in the guide"
    raise ValueError(
        f"model: expected each latent site in the guide or enumerated, found {name!r} in neither: it would be drawn "
        f"from its prior; {remedy}"
    )
