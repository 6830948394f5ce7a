# SPDX-License-Identifier: Apache-2.0
"""The one table of cases: every kind of transform, on every group and base space, with random weights.

A new transform is one new line of ``KINDS``, a new group or grid one of ``TYPES``; every property then runs on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from escnn import group, gspaces
from escnn import nn as enn

import pyro_equiflow as pe

BATCH_SHAPES = [(), (3,), (2, 3)]
DTYPES = [torch.float32, torch.float64]


def point(g: group.Group, *fields: group.Representation) -> enn.FieldType:
    """A field type without a base space."""
    return enn.FieldType(gspaces.no_base_space(g), list(fields))


def _point(g: group.Group, *irreps: tuple, regular: bool = False, quotient: tuple | None = None) -> enn.FieldType:
    # Fields of one irrep stand apart from each other, permutation fields between them: no order is assumed.
    fields = [g.irrep(*i) for i in irreps]
    if regular:
        fields.insert(1, g.regular_representation)
    if quotient:
        fields.insert(2, g.quotient_representation(*quotient))
    return point(g, *fields)


def _grid(space: gspaces.GSpace, *irreps: tuple, regular: bool = False) -> enn.FieldType:
    fields = [space.irrep(*i) for i in irreps]
    if regular:
        fields.insert(1, space.regular_repr)
    return enn.FieldType(space, fields)


#: Field types with the shapes of a grid to try them on: odd and even, and not square where the group allows.
TYPES: dict[str, tuple[Callable[[], enn.FieldType], tuple[int, ...]]] = {
    "trivial": (lambda: point(group.trivial_group(), *4 * [group.trivial_group().trivial_representation]), ()),
    "flips": (lambda: _point(group.cyclic_group(2), (1,), (0,), (1,), regular=True), ()),
    "C4": (lambda: _point(group.cyclic_group(4), (1,), (0,), (2,), (1,), regular=True, quotient=(2,)), ()),
    "C5": (lambda: _point(group.cyclic_group(5), (1,), (2,), (1,), regular=True), ()),
    "D3": (lambda: _point(group.dihedral_group(3), (1, 1), (1, 0), (1, 1), regular=True), ()),
    "D4": (lambda: _point(group.dihedral_group(4), (1, 1), (0, 0), (0, 2), quotient=((0, 1),)), ()),
    "D8": (lambda: _point(group.dihedral_group(8), (1, 1), (0, 0), (1, 3), quotient=((0, 1),)), ()),
    "SO2": (lambda: _point(group.so2_group(), (1,), (0,), (2,), (1,), (1,)), ()),
    "O2": (lambda: _point(group.o2_group(), (1, 1), (0, 0), (1, 2), (1, 0), (1, 1)), ()),
    "SO3": (lambda: _point(group.so3_group(), (1,), (0,), (2,), (1,)), ()),
    "O3": (lambda: _point(group.o3_group(), (1, 1), (0, 0), (0, 1), (1, 1), (1, 0)), ()),
    "octahedral": (lambda: _point(group.octa_group(), (1,), (0,), (2,), (-1,), (1,)), ()),
    "octahedral-regular": (lambda: _point(group.octa_group(), (1,), (0,), regular=True), ()),
    "icosahedral": (lambda: _point(group.ico_group(), (1,), (0,), (2,), (1,)), ()),
    "cylinder": (lambda: _point(group.full_cylinder_group(3), ((0,), (1, 1)), ((1,), (0, 0)), ((1,), (1, 1))), ()),
    "trivial-plane": (lambda: _grid(gspaces.trivialOnR2(), (0,), (0,), (0,)), (3, 4)),
    "flips-plane": (lambda: _grid(gspaces.flip2dOnR2(), (1,), (0,), regular=True), (3, 4)),
    "C4-plane": (lambda: _grid(gspaces.rot2dOnR2(4), (1,), (0,), regular=True), (3, 3)),
    "C8-plane": (lambda: _grid(gspaces.rot2dOnR2(8), (1,), (0,), (3,)), (4, 4)),
    "D4-plane": (lambda: _grid(gspaces.flipRot2dOnR2(4), (1, 1), (0, 0), (1, 0)), (4, 4)),
    "SO2-plane": (lambda: _grid(gspaces.rot2dOnR2(-1, 3), (1,), (0,), (2,)), (3, 3)),
    "O2-plane": (lambda: _grid(gspaces.flipRot2dOnR2(-1, 3), (1, 1), (0, 0), (1, 0), (1, 1)), (3, 3)),
    "flips-space": (lambda: _grid(gspaces.mirOnR3(), (1,), (0,), (1,)), (2, 2, 3)),
    "octahedral-space": (lambda: _grid(gspaces.octaOnR3(), (1,), (0,), (1,)), (2, 2, 2)),
    "icosahedral-space": (lambda: _grid(gspaces.icoOnR3(), (1,), (0,), (0,)), (2, 2, 2)),
    "SO3-space": (lambda: _grid(gspaces.rot3dOnR3(2), (1,), (0,)), (3, 3, 3)),
    "O3-space": (lambda: _grid(gspaces.flipRot3dOnR3(2), (1, 1), (0, 0)), (2, 2, 2)),
    "cylinder-space": (lambda: _grid(gspaces.fullCylindricalOnR3(), ((0,), (1, 1)), ((0,), (0, 0))), (2, 2, 2)),
}


@functools.cache
def field_type(name: str) -> enn.FieldType:
    """The field type of a line of ``TYPES``, built once."""
    return TYPES[name][0]()


def spatial_shape(name: str) -> tuple[int, ...]:
    """The grid of a line of ``TYPES``."""
    return TYPES[name][1]


@torch.no_grad()
def randomize(module: torch.nn.Module, std: float = 0.3) -> torch.nn.Module:
    """Draws what a constructor starts at zero (biases, scales, exponents), so that no term hides."""
    for parameter in module.parameters():
        parameter.copy_(torch.where(parameter == 0, std * torch.randn_like(parameter), parameter))
    return module


def _net_options(kind: enn.FieldType) -> dict:
    # On 3-D grids regular hidden fields cost seconds to build; gates are exact there too.
    return {"nonlinearity": "gated"} if kind.gspace.dimensionality == 3 else {}


def _coupling(kind: enn.FieldType, **options) -> pe.EquivariantTransform:
    options = {"hidden_dims": (16,), "identity_init": False, "log_scale_bound": 1.0, **_net_options(kind), **options}
    return pe.equivariant_coupling(kind, **options)


def _iaf(kind: enn.FieldType, **options) -> pe.EquivariantTransform:
    options = {"hidden_dims": (16,), "identity_init": False, "log_scale_bound": 1.0, **_net_options(kind), **options}
    return pe.equivariant_iaf(kind, **options)


def _spline(factory: Callable[..., pe.EquivariantTransform], kind: enn.FieldType) -> pe.EquivariantTransform:
    transform = factory(
        kind, transformer=pe.maps.Spline(bound=2.0, num_bins=4, log_scale_bound=1.0), log_scale_bound=None
    )
    # Steep splines lose digits going back, in float32 more than the tolerance has room for.
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.mul_(0.6)
    return transform


def _flow(kind: enn.FieldType) -> pe.EquivariantTransform:
    flow = pe.equivariant_flow(kind, num_transforms=2, hidden_dims=(16,), log_scale_bound=1.0, **_net_options(kind))
    # Sets the actnorms, as the first batch of a training would.
    flow(1.0 + 2.0 * torch.randn(20, kind.size, *kind.gspace.dimensionality * (3,)))
    return flow


def _squeeze(kind: enn.FieldType) -> pe.EquivariantTransform:
    # There and back, around a map of the squeezed type: alone it has no parameters, and another shape.
    squeeze = pe.equivariant_squeeze(kind)
    return pe.Compose([squeeze, pe.equivariant_linear(squeeze.out_type), squeeze.inv])


def _multiscale(kind: enn.FieldType) -> pe.EquivariantTransform:
    squeezed_type, deeper_type = pe.MultiScale.types(kind, haar=True)
    return pe.MultiScale(kind, _coupling(squeezed_type), pe.equivariant_linear(deeper_type), haar=True)


def _solved(factory: Callable[..., pe.EquivariantTransform], kind: enn.FieldType) -> pe.EquivariantTransform:
    # Exact, where the default would be an estimate: properties are to be held against exact values.
    options = {"log_det": pe.logdet.Exact(), "lipschitz": 0.7, **_net_options(kind)}
    return factory(kind, hidden_dims=(16,), identity_init=False, **options)


#: Kinds of transform, on a field type. New ones go here.
KINDS: dict[str, Callable[[enn.FieldType], pe.EquivariantTransform]] = {
    "coupling": _coupling,
    "coupling-by-irreps": functools.partial(_coupling, split_by="irreps"),
    "coupling-commutant": functools.partial(_coupling, transformer="commutant"),
    "coupling-spline": functools.partial(_spline, _coupling),
    "iaf": _iaf,
    "iaf-spline": functools.partial(_spline, _iaf),
    "residual": functools.partial(_solved, pe.equivariant_residual),
    "implicit": functools.partial(_solved, pe.equivariant_implicit),
    "linear": pe.equivariant_linear,
    "actnorm": functools.partial(pe.equivariant_actnorm, data_init=False),
    "flow": _flow,
    "squeeze": _squeeze,
    "multiscale": _multiscale,
    "inverse-of-coupling": lambda kind: pe.Inverse(_coupling(kind)),
}

_SPLINES = ("trivial", "flips", "SO2", "O2", "SO3", "C4-plane")

#: Those that need a grid of even sides, permuted by the whole group.
ON_EVEN_GRIDS = ("squeeze", "multiscale")

# Stacks and turned-round transforms add no mathematics of their own: a point, a plane and a volume say it.
_ONLY: dict[str, tuple[str, ...]] = {
    "coupling-by-irreps": ("C4", "D3", "octahedral-regular", "C4-plane"),
    "coupling-commutant": ("C4", "SO2", "C4-plane", "SO2-plane"),
    "coupling-spline": (*_SPLINES, "C4", "D3", "octahedral-regular", "D4-plane"),
    "iaf-spline": _SPLINES,
    "flow": ("O2", "C4-plane", "octahedral-space"),
    **dict.fromkeys(ON_EVEN_GRIDS, ("D4-plane",)),
    "inverse-of-coupling": ("O2", "C4-plane"),
}


def make(kind: str, type_name: str) -> pe.EquivariantTransform:
    """A transform with random weights, the same ones at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return randomize(KINDS[kind](field_type(type_name)))


#: Every case: an id that reads ``kind-group-base`` and a factory of the transform.
CASES: dict[str, Callable[[], pe.EquivariantTransform]] = {
    f"{kind}-{name}": functools.partial(make, kind, name)
    for kind in KINDS
    for name in TYPES
    if name in _ONLY.get(kind, TYPES)
}

#: One case a kind without a base space, and one on a plane, for what does not hang on the group.
ONE_OF_EACH: dict[str, Callable[[], pe.EquivariantTransform]] = {
    f"{kind}-{name}": functools.partial(make, kind, name)
    for kind in KINDS
    for name in ("O2", "D4-plane" if kind in ON_EVEN_GRIDS else "C4-plane")
    if f"{kind}-{name}" in CASES
}


def events(case: str, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Standard normal events of a case."""
    name = next(n for n in sorted(TYPES, key=len, reverse=True) if case.endswith("-" + n))
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch, field_type(name).size, *spatial_shape(name))
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
