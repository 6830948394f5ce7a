# SPDX-License-Identifier: Apache-2.0
"""Pickling and copying of escnn's groups, representations, gspaces and field types.

escnn's objects hold local functions, which ``pickle`` refuses and ``deepcopy`` clones with everything that hangs on
them. Registered with ``copyreg`` they are written down as what defines them (a group by its class and keys, a
representation by its irreps and change of basis, a field type by its fields) and rebuilt from it; groups, being
singletons in escnn, stay the same object under ``deepcopy``.
"""

from __future__ import annotations

import copyreg
from typing import Any

import numpy as np
import torch
from escnn import group as egroup
from escnn import gspaces
from escnn.group import Group, GroupElement, IrreducibleRepresentation, Representation
from escnn.nn import FieldType

__all__ = ["forget_param_store", "register_reducers"]


def _make_group(name: str, keys: dict[str, Any]) -> Group:
    return egroup.groups_dict[name]._generator(**keys)


def _reduce_group(group: Group) -> tuple:
    return _make_group, (type(group).__name__, dict(group._keys))


def _reduce_element(element: GroupElement) -> tuple:
    return element.group.element, (element.value, element.param)


def _reduce_irrep(irrep: IrreducibleRepresentation) -> tuple:
    return irrep.group.irrep, irrep.id


def _make_representation(
    group: Group, name: str, irreps: list[tuple], basis: np.ndarray, nonlinearities: list[str]
) -> Representation:
    known = group.representations.get(name)
    if known is not None and known.irreps == irreps and np.array_equal(known.change_of_basis, basis):
        return known
    return Representation(group, name, irreps, basis, nonlinearities)


def _reduce_representation(representation: Representation) -> tuple:
    return _make_representation, (
        representation.group,
        representation.name,
        representation.irreps,
        np.asarray(representation.change_of_basis),
        sorted(representation.supported_nonlinearities),
    )


def _make_gspace(kind: str, subgroup_id: Any, maximum_frequency: int | None, name: str) -> gspaces.GSpace:
    options = {} if maximum_frequency is None else {"maximum_frequency": maximum_frequency}
    space = getattr(gspaces, kind)(subgroup_id, **options)
    space.name = name
    return space


def _reduce_gspace(space: gspaces.GSpace) -> tuple:
    frequency = getattr(space.fibergroup, "_maximum_frequency", None)
    return _make_gspace, (type(space).__name__, space._sg_id, frequency, space.name)


def _reduce_point(space: gspaces.GSpace0D) -> tuple:
    return gspaces.GSpace0D, (space.fibergroup,)


def _reduce_field_type(field_type: FieldType) -> tuple:
    # Many fields share few representations: pickle's memo writes each once.
    return FieldType, (field_type.gspace, field_type.representations)


def forget_param_store(module: torch.nn.Module) -> None:
    """Takes off a module's parameters the weak reference that Pyro's parameter store leaves on them.

    ``pickle`` refuses it; the store sets it anew whenever it hands the parameter out.
    """
    for parameter in module.parameters():
        parameter.__dict__.pop("unconstrained", None)


def register_reducers() -> None:
    """Makes ``pickle``, ``torch.save`` and ``copy.deepcopy`` work on escnn's types; harmless when called twice."""
    reducers: dict[type, Any] = {
        GroupElement: _reduce_element,
        IrreducibleRepresentation: _reduce_irrep,
        Representation: _reduce_representation,
        gspaces.GSpace0D: _reduce_point,
        gspaces.GSpace2D: _reduce_gspace,
        gspaces.GSpace3D: _reduce_gspace,
        FieldType: _reduce_field_type,
    }
    for group_class in egroup.groups_dict.values():
        reducers[group_class] = _reduce_group
    for cls, reducer in reducers.items():
        copyreg.pickle(cls, reducer)
