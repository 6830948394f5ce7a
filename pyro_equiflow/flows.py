# SPDX-License-Identifier: Apache-2.0
"""Whole flows: ready stacks of equivariant transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from escnn.nn import FieldType

from pyro_equiflow.ops.representations import validate_field_type
from pyro_equiflow.transforms import (
    Compose,
    EquivariantTransform,
    equivariant_actnorm,
    equivariant_coupling,
    equivariant_iaf,
    equivariant_implicit,
    equivariant_linear,
    equivariant_residual,
)
from pyro_equiflow.transforms.blocks import block_layout

__all__ = ["equivariant_flow"]


def _coupling(field_type: FieldType, index: int, split_by: str | None, **kwargs: Any) -> EquivariantTransform:
    """Couplings take turns: the first half of the channels conditions the second, then the reverse."""
    layout = block_layout(field_type, split_by, "equivariant_flow")
    first = layout.first_half()
    split = first if index % 2 == 0 else [i for i in range(len(layout.blocks)) if i not in set(first)]
    return equivariant_coupling(field_type, split=split, split_by=split_by, **kwargs)


def _iaf(field_type: FieldType, index: int, split_by: str | None, **kwargs: Any) -> EquivariantTransform:
    """Every other step has the blocks in reverse order, so that each comes to depend on all."""
    order = range(len(block_layout(field_type, split_by, "equivariant_flow").blocks))
    return equivariant_iaf(field_type, order=order if index % 2 == 0 else order[::-1], split_by=split_by, **kwargs)


def _whole(factory: Callable[..., EquivariantTransform]) -> Callable[..., EquivariantTransform]:
    """A kind that transforms the whole event at every step."""

    def make(field_type: FieldType, index: int, split_by: str | None, **kwargs: Any) -> EquivariantTransform:
        if split_by is not None:
            raise ValueError(f"split_by: expected None where nothing is split, found {split_by!r}")
        return factory(field_type, **kwargs)

    return make


_KINDS: dict[str, Callable[..., EquivariantTransform]] = {
    "coupling": _coupling,
    "iaf": _iaf,
    "implicit": _whole(equivariant_implicit),
    "residual": _whole(equivariant_residual),
}


def equivariant_flow(
    field_type: FieldType,
    latent_dim: int | None = None,
    *,
    kind: str = "coupling",
    num_transforms: int = 6,
    hidden_dims: Sequence[int] = (64, 64),
    linear: bool = True,
    actnorm: bool = True,
    split_by: str | None = None,
    **kwargs: Any,
) -> Compose:
    r"""A ready stack of equivariant transforms, one :class:`~pyro_equiflow.Compose`.

    Each of the ``num_transforms`` steps is an actnorm, a linear map over equal irreps, and a transform of the chosen
    kind. Steps start as the identity, so the flow starts at its base distribution.

    Works where Pyro wants a callable of the latent dimension::

        >>> from functools import partial
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro.infer.autoguide import AutoNormalizingFlow
        >>> from pyro_equiflow import equivariant_flow
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> flow = equivariant_flow(vectors, num_transforms=2)
        >>> init_transform_fn = partial(equivariant_flow, vectors, num_transforms=2)
        >>> guide = AutoNormalizingFlow(lambda: None, init_transform_fn)

    :param field_type: how the group acts on the event.
    :param latent_dim: the event's size, if the caller knows it: checked against ``field_type.size``.
    :param kind: ``"coupling"``, ``"iaf"``, ``"residual"`` or ``"implicit"``.
    :param num_transforms: number of steps.
    :param hidden_dims: channels of the conditioners' hidden layers.
    :param linear: whether each step has an :class:`~pyro_equiflow.EquivariantLinear`.
    :param actnorm: whether each step has an :class:`~pyro_equiflow.EquivariantActNorm`, set by the first batch.
    :param split_by: blocks to split or to order are ``"fields"`` or ``"irreps"``, see
        :class:`~pyro_equiflow.EquivariantCoupling`.
    :param kwargs: further keywords of the factory of the kind, such as ``log_scale_bound`` or ``kernel_size``.
    :raises ValueError: a latent dimension unlike the field type's size, an unknown kind, no step, a type that
        cannot be split.
    """
    validate_field_type(field_type)
    if latent_dim is not None and latent_dim != field_type.size:
        raise ValueError(
            f"latent_dim: expected the size {field_type.size} of field_type {field_type}, found {latent_dim}; the "
            "field type has to list every latent value of the model, invariant ones as trivial fields"
        )
    if kind not in _KINDS:
        raise ValueError(f"kind: expected one of {sorted(_KINDS)}, found {kind!r}")
    if not isinstance(num_transforms, int) or num_transforms < 1:
        raise ValueError(f"num_transforms: expected a positive integer, found {num_transforms!r}")
    steps: list[EquivariantTransform] = []
    for index in range(num_transforms):
        if actnorm:
            steps.append(equivariant_actnorm(field_type))
        if linear:
            steps.append(equivariant_linear(field_type))
        steps.append(_KINDS[kind](field_type, index, split_by, hidden_dims=hidden_dims, **kwargs))
    return Compose(steps)
