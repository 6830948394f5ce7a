# SPDX-License-Identifier: Apache-2.0
"""A compact group as its connected part and finitely many cosets: what a flow has built in, what is averaged over."""

from __future__ import annotations

from typing import Any

import numpy as np
from escnn.group import O2, O3, DirectProductGroup, Group, GroupElement
from escnn.nn import FieldType

from pyro_equiflow.distributions.orbit import Orbit
from pyro_equiflow.infer.actions import trivial_type

__all__ = ["split_symmetry"]

_MAX_COSETS = 128  # a density of the average costs one of the flow for each


def split_symmetry(field_type: FieldType, built_in: str) -> tuple[FieldType, Orbit | None]:
    r"""The connected part :math:`G_0` of a field type's group, and an element of every coset :math:`g G_0`.

    A density :math:`q` that :math:`G_0` leaves unchanged has the same values :math:`q(g^{-1} u)` for all elements of a
    coset, so the mean over one of each is invariant under the whole group.

    :param field_type: without a base space.
    :param built_in: ``"connected"``, or ``"all"`` for the whole group. More than 128 cosets count as ``"all"``,
        and so does a product with a group that escnn cannot restrict.
    :return: the field type of what is built in, and the cosets' elements, if there is more than one.
    """
    elements = [] if built_in == "all" else _coset_elements(field_type.fibergroup)
    if not 1 < len(elements) <= _MAX_COSETS:
        return field_type, None
    try:
        connected = _restricted(field_type)
    except NotImplementedError:  # of escnn, for products with groups whose subgroups it lacks
        return field_type, None
    return connected, Orbit.of_elements(field_type, elements)


def _coset_elements(group: Group) -> list[GroupElement]:
    """One element of every coset of the connected part; they are a subgroup. The identity alone of unknown groups."""
    if group.order() > 0:
        return list(group.elements)
    if isinstance(group, DirectProductGroup):
        first, second = _coset_elements(group.G1), _coset_elements(group.G2)
        return [group.pair_elements(g, h) for g in first for h in second]
    if isinstance(group, O2):
        return [group.identity, group.element((1, 0.0), "radians")]
    if isinstance(group, O3):
        return [group.identity, group.element((1, np.array([0.0, 0.0, 0.0, 1.0])), "Q")]
    return [group.identity]


def _restricted(field_type: FieldType) -> FieldType:
    """The field type of the connected part: coordinate by coordinate where that is trivial."""
    group = field_type.fibergroup
    return trivial_type(field_type.size) if group.order() > 0 else field_type.restrict(_connected_id(group))


def _connected_id(group: Group) -> Any:
    """By which escnn knows the connected part; not every finite group has its trivial subgroup there."""
    if group.order() > 0:
        return group.subgroup_trivial_id
    if isinstance(group, DirectProductGroup):
        return _connected_id(group.G1), _connected_id(group.G2)
    if isinstance(group, O2):
        return None, -1
    if isinstance(group, O3):
        return "so3"
    return group.subgroup_self_id
