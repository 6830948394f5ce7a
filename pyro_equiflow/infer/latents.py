# SPDX-License-Identifier: Apache-2.0
"""Traces of a model and their latent sites."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["preserved_random_state"]

HIDDEN = "_hidden"  # in a site's ``infer``: hidden from guides by ``poutine.block``


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leaves the generators of torch (all devices), numpy and Python as they were before the block."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def unconstrained_sites(trace: Trace) -> dict[str, Tensor]:
    """The unconstrained values of a trace's continuous latent sites, in its order; those marked hidden left out."""
    values = {}
    site: Any
    for name, site in trace.iter_stochastic_nodes():
        fn = site["fn"]
        if not site_is_subsample(site) and not fn.support.is_discrete and HIDDEN not in site["infer"]:
            values[name] = biject_to(fn.support).inv(site["value"]).detach()
    return values


def initial_trace(model: Any, args: tuple, kwargs: dict[str, Any]) -> Trace:
    """One trace of the model's sites, hidden from whatever handlers are active outside."""
    with pyro.poutine.block():
        return pyro.poutine.trace(model).get_trace(*args, **kwargs)


def plate_nesting(*traces: Trace) -> int:
    """How many batch dimensions the plates of some traces take."""
    nodes: Any = [site for trace in traces for site in trace.nodes.values() if site["type"] == "sample"]
    return -min((frame.dim for site in nodes for frame in site["cond_indep_stack"] if frame.vectorized), default=0)


def subsampled_plate(site: Any) -> Any:
    """The frame of a plate about the site that holds part of its rows only, if there is one."""
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None and frame.size < frame.full_size:
            return frame
    return None


def refuse_subsampled_latents(trace: Any) -> None:
    """Raises where a latent site of a model stands in a subsampled plate.

    :raises ValueError: naming site, plate and remedy.
    """
    for name, site in trace.iter_stochastic_nodes():
        plate = subsampled_plate(site)
        if plate is not None and not site_is_subsample(site):
            raise ValueError(
                f"model: expected latent sites outside of subsampled plates, found {name!r} in plate {plate.name!r}, "
                f"{plate.size} of {plate.full_size} rows: the guide has one value per row of the first subsample and "
                "would take it for other rows at every step; use the whole plate, or hide the site (poutine.block) and "
                "guide it by a conditional flow of each row's data within the plate, as the documentation's page "
                '"Plates" shows, or by Pyro\'s AutoNormal, whose parameters are those of all rows'
            )
