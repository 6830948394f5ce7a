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
    connected, elements = _connected_part(field_type.fibergroup)
    if built_in == "all" or not 1 < len(elements) <= _MAX_COSETS:
        return field_type, None
    # Of the trivial group, which not every finite one can be restricted to in escnn, coordinate by coordinate.
    whole = field_type.fibergroup.order() > 0
    try:
        flow_type = trivial_type(field_type.size) if whole else field_type.restrict(connected)
    except NotImplementedError:  # of escnn, for products with groups whose subgroups it lacks
        return field_type, None
    return flow_type, Orbit.of_elements(field_type, elements)


def _connected_part(group: Group) -> tuple[Any, list[GroupElement]]:
    """By which escnn knows the connected part, and one element of every coset of it; these are a subgroup.

    A group that is none of those below counts as connected.
    """
    if group.order() > 0:
        return group.subgroup_trivial_id, list(group.elements)
    if isinstance(group, DirectProductGroup):
        (first, ones), (second, others) = _connected_part(group.G1), _connected_part(group.G2)
        return (first, second), [group.pair_elements(g, h) for g in ones for h in others]
    if isinstance(group, O2):
        return (None, -1), [group.identity, group.element((1, 0.0), "radians")]
    if isinstance(group, O3):
        return "so3", [group.identity, group.element((1, np.array([0.0, 0.0, 0.0, 1.0])), "Q")]
    return group.subgroup_self_id, [group.identity]
