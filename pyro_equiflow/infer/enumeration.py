# SPDX-License-Identifier: Apache-2.0
"""Log-densities of a trace whose discrete sites are enumerated in parallel: these are summed out, as the ELBO does."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine import Trace
from torch import Tensor

__all__ = ["MarginalTerm", "is_enumerated", "marginal_terms"]


class MarginalTerm(NamedTuple):
    """One addend of a log joint density.

    :ivar sites: the sites it is the density of: one, or those that enumerated sites tie together.
    :ivar log_prob: scaled and masked, packed: ``_pyro_dims`` names its plates.
    :ivar scale: of the sites.
    """

    sites: tuple[str, ...]
    log_prob: Tensor
    scale: float | Tensor


def is_enumerated(site: Any) -> bool:
    """Whether a site of a trace holds all its values side by side."""
    return site["type"] == "sample" and site["infer"].get("_enumerate_dim") is not None


def marginal_terms(trace: Trace) -> list[MarginalTerm]:
    r"""The addends of :math:`\log \sum_k p(u, k, y)`, with :math:`k` the enumerated sites.

    As in ``TraceEnum_ELBO``: variable elimination plate by plate, masks inside of the sum, scales outside.

    :param trace: with its log-densities computed and packed, without subsample sites.
    :raises ValueError: sites of unlike scales are tied together by an enumerated one.
    :raises NotImplementedError: enumerated sites tie plates together that are not nested.
    """
    summed = set(trace.symbol_to_dim) - set(trace.plate_to_symbol.values())
    terms: list[MarginalTerm] = []
    groups: list[tuple[set[str], list[str]]] = []
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        log_prob: Any = site["packed"]["log_prob"]
        symbols, names = summed.intersection(log_prob._pyro_dims), [name]
        if not symbols:
            terms.append(MarginalTerm((name,), log_prob, site["scale"]))
            continue
        for group in [group for group in groups if group[0] & symbols]:
            groups.remove(group)
            symbols, names = group[0] | symbols, group[1] + names
        groups.append((symbols, names))
    return terms + [term for symbols, names in groups for term in _eliminate(trace, symbols, names)]


def _eliminate(trace: Trace, symbols: set[str], tied: list[str]) -> list[MarginalTerm]:
    names = [name for name in trace.nodes if name in tied]
    scale = _common_scale(trace, names)
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for name in names:
        site: Any = trace.nodes[name]
        factor = site["packed"]["unscaled_log_prob"]
        if not is_enumerated(site):
            factor = packed.scale_and_mask(factor, mask=site["packed"]["mask"])
        plates = frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
        factors.setdefault(plates, []).append(factor)
    found = [term for terms in contract_tensor_tree(factors, symbols).values() for term in terms]
    return [MarginalTerm(tuple(names), packed.scale_and_mask(term, scale=scale), scale) for term in found]


def _common_scale(trace: Trace, names: list[str]) -> float | Tensor:
    scales: dict[str, Any] = {name: trace.nodes[name]["scale"] for name in names}
    values = {float(scale) if not isinstance(scale, Tensor) or scale.dim() == 0 else None for scale in scales.values()}
    if len(values) > 1 or None in values:
        shown = ", ".join(
            f"{n}: {tuple(s.shape) if isinstance(s, Tensor) and s.dim() else s}" for n, s in scales.items()
        )
        raise ValueError(
            f"model: expected one scale for all sites that an enumerated site ties together, found {shown}; a discrete "
            "site outside of a subsampled plate cannot be summed out over part of the data: take the whole plate"
        )
    return scales[names[0]]
