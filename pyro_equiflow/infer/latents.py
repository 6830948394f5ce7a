# SPDX-License-Identifier: Apache-2.0
"""How a symmetry group acts on a model's latent values: one field type for all of them, in packing order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from escnn.nn import FieldType
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_equiflow.ops.arguments import check_instance
from pyro_equiflow.ops.representations import validate_field_type

__all__ = ["latent_field_type", "preserved_random_state", "validate_representations"]

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


def validate_representations(representations: Mapping[str, FieldType]) -> None:
    """Raises unless ``representations`` maps site names to field types of one gspace without a base space.

    :raises TypeError: not a mapping, or values that are not field types.
    :raises ValueError: nothing in it, a base space, or unlike gspaces.
    """
    expected = "a dict of latent site names and escnn field types"
    check_instance("representations", representations, Mapping, expected)
    if not representations:
        raise ValueError(
            "representations: expected a field type for one latent site at least, found none; a guide without a "
            "symmetry is pyro.infer.autoguide.AutoNormalizingFlow"
        )
    first, gspace = "", None
    for name, field_type in representations.items():
        check_instance("representations", name, str, "names of latent sites")
        validate_field_type(field_type, f"representations[{name!r}]")
        if field_type.gspace.dimensionality:
            raise ValueError(
                f"representations[{name!r}]: expected a field type without a base space, found one over "
                f"{field_type.gspace}; build it with escnn.gspaces.no_base_space(group), for the flattened value"
            )
        if gspace is None:
            first, gspace = name, field_type.gspace
        elif field_type.gspace != gspace:
            raise ValueError(
                f"representations: expected field types of one gspace, found {gspace} for {first!r} and "
                f"{field_type.gspace} for {name!r}; one group acts on the whole latent at once"
            )


def unconstrained_sites(trace: Trace) -> dict[str, Tensor]:
    """The unconstrained values of a trace's continuous latent sites, in its order; those marked hidden left out."""
    values = {}
    site: Any
    for name, site in trace.iter_stochastic_nodes():
        fn = site["fn"]
        if not site_is_subsample(site) and not fn.support.is_discrete and HIDDEN not in site["infer"]:
            values[name] = biject_to(fn.support).inv(site["value"]).detach()
    return values


def site_field_types(
    representations: Mapping[str, FieldType], shapes: Mapping[str, torch.Size]
) -> dict[str, FieldType]:
    """The field type of each latent site: the declared one, or trivial fields.

    :param shapes: the shape of each site's unconstrained value.
    :raises ValueError: a site unknown to the model, or a size that is not the value's.
    """
    unknown = [name for name in representations if name not in shapes]
    if unknown:
        raise ValueError(
            f"representations: expected names of the model's continuous latent sites {sorted(shapes)}, found "
            f"{unknown[0]!r}"
        )
    gspace = next(iter(representations.values())).gspace
    types = {}
    for name, shape in shapes.items():
        field_type = representations.get(name)
        if field_type is None:
            field_type = FieldType(gspace, shape.numel() * [gspace.trivial_repr])
        elif field_type.size != shape.numel():
            raise ValueError(
                f"representations[{name!r}]: expected a field type of size {shape.numel()} for an unconstrained value "
                f"of shape {tuple(shape)}, found size {field_type.size}; it acts on the flattened value, so a "
                "representation is repeated for each row of a plate"
            )
        types[name] = field_type
    return types


def latent_field_type(representations: Mapping[str, FieldType], shapes: Mapping[str, torch.Size]) -> FieldType:
    """The field type of all latent values, flattened and joined in the order of ``shapes``.

    :param representations: field types by latent site; sites left out are invariant.
    :param shapes: the shape of each site's unconstrained value, in packing order.
    :raises ValueError: as for the parts: an unknown site, a size that is not the value's.
    """
    types = site_field_types(representations, shapes)
    gspace = next(iter(types.values())).gspace
    return FieldType(gspace, [r for t in types.values() for r in t.representations])


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
