# SPDX-License-Identifier: Apache-2.0
"""Equivariant coupling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.maps.block_map import BlockMap
from pyro_equiflow.maps.blocks import block_layout
from pyro_equiflow.maps.named import block_map
from pyro_equiflow.nn import steerable_net
from pyro_equiflow.nn.conditioner import Conditioner
from pyro_equiflow.ops.arguments import check_flag, check_integers, check_keywords
from pyro_equiflow.ops.channels import ChannelGroups
from pyro_equiflow.ops.representations import validate_field_type
from pyro_equiflow.transforms.conditional import (
    CONTEXT_TYPE,
    ConditionableTransform,
    FamilyOfKind,
    with_context_fields,
)

__all__ = [
    "ConditionalEquivariantCoupling",
    "EquivariantCoupling",
    "conditional_equivariant_coupling",
    "equivariant_coupling",
]


class EquivariantCoupling(ConditionableTransform):
    r"""Coupling that commutes with a symmetry group.

    The event is split into invariant subspaces :math:`x = (x_a, x_b)`, never inside an irrep, and

    .. math:: y_a = x_a, \qquad y_b = \exp(s(x_a)) \cdot x_b + t(x_a),

    where :math:`s` commutes with the group: for a field whose channels the group permutes, a field of the same type
    acting pointwise; for any other, one invariant scalar per irrep. On grids both are fields over positions. The scale
    is bounded smoothly on both sides. That is the map :class:`~pyro_equiflow.maps.Affine`; others have more parameters
    :math:`\phi` for the conditioner to give, :math:`y_b = \tau(x_b; \phi(x_a))`: with
    :class:`~pyro_equiflow.maps.Commutant` a rotation inside each irrep of complex type, with
    :class:`~pyro_equiflow.maps.Spline` before that monotone rational-quadratic splines; or a
    :class:`~pyro_equiflow.maps.BlockMap` of one's own.

    Log-det exact, inverse closed: one pass of the conditioner in either direction.

    Example::

        >>> import torch, pyro.distributions as dist
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import EquivariantCoupling
        >>> from pyro_equiflow.nn import steerable_net
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 4 * [space.irrep(1, 1)])
        >>> in_type, out_type = EquivariantCoupling.conditioner_types(vectors)
        >>> transform = EquivariantCoupling(vectors, steerable_net(in_type, out_type))
        >>> base = dist.Normal(torch.zeros(8), 1.0).to_event(1)
        >>> dist.TransformedDistribution(base, [transform]).rsample((3,)).shape
        torch.Size([3, 8])

    :param field_type: how the group acts on the event.
    :param conditioner: an escnn ``EquivariantModule`` between the types of :meth:`conditioner_types`.
    :param split: indices of the blocks that condition, :math:`x_a`; by default the first half of the channels, whole
        blocks.
    :param split_by: blocks are ``"fields"`` or ``"irreps"``; ``None`` takes fields if there are two or more.
    :param transformer: the map of :math:`x_b`, such as ``Spline(bound=4.0, num_bins=10)`` of
        :mod:`pyro_equiflow.maps`; ``"affine"``, ``"commutant"`` or ``"spline"`` for one with its default settings.
    :param log_scale_bound: the largest :math:`|s|` of a map by name, positive; ``None`` takes the map's own.
    :param context_type: field type of a context (see :class:`ConditionalEquivariantCoupling`).
    :param cache_size: 0 or 1, see :class:`EquivariantTransform`.
    :raises ValueError: a type that cannot be split, a wrong split, a conditioner of wrong types, an unknown
        transformer, a bound out of range or beside a map.

    References: Bose, Brubaker and Kobyzev, *Equivariant Finite Normalizing Flows* (arXiv 2110.08649), G-coupling;
    Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP* (arXiv 1605.08803), eq. 7 and 8; Durkan et al.,
    *Neural Spline Flows* (arXiv 1906.04032).
    """

    def __init__(
        self,
        field_type: enn.FieldType,
        conditioner: enn.EquivariantModule,
        *,
        split: Sequence[int] | None = None,
        split_by: str | None = None,
        transformer: str | BlockMap = "affine",
        log_scale_bound: float | None = None,
        context_type: enn.FieldType | None = None,
        cache_size: int = 1,
    ) -> None:
        chosen = block_map(transformer, log_scale_bound)
        halves = _Halves(field_type, split, split_by, chosen)
        in_type, out_type = halves.conditioner_types(context_type)
        network = Conditioner(conditioner, in_type, out_type)
        super().__init__(field_type, context_type=context_type, cache_size=cache_size)
        self.conditioner = network
        self.transformer = chosen
        self._halves = halves

    @staticmethod
    def conditioner_types(
        field_type: enn.FieldType,
        *,
        split: Sequence[int] | None = None,
        split_by: str | None = None,
        transformer: str | BlockMap = "affine",
        context_type: enn.FieldType | None = None,
    ) -> tuple[enn.FieldType, enn.FieldType]:
        """The field types between which the conditioner maps.

        :return: the type of :math:`x_a` (and of the context), and that of the map's parameters: for ``"affine"`` the
            scales followed by :math:`t`.
        """
        chosen = block_map(transformer)
        return _Halves(field_type, split, split_by, chosen).conditioner_types(context_type)

    def _architecture(self) -> dict[str, Any]:
        found = super()._architecture()
        found[""] |= {"split": self._halves.kept, "blocks": self._halves.layout.names()}
        return found

    def _map_parameters(self, x_a: Tensor) -> list[Tensor]:
        x_a, context = self._with_context(x_a)
        out = self.conditioner(x_a if context is None else torch.cat([x_a, context], -self.event_dim))
        return self._halves.map.parameters(out)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_a, x_b = self._halves.of(x)
        y_b, ladj = self._halves.map.forward(x_b, self._map_parameters(x_a))
        return self._halves.joined(x_a, y_b), ladj

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y_a, y_b = self._halves.of(y)
        x_b, ladj = self._halves.map.inverse(y_b, self._map_parameters(y_a))
        return self._halves.joined(y_a, x_b), ladj


class _Halves:
    """The two halves of an event: which channels condition, which are transformed, and by which map."""

    def __init__(
        self, field_type: enn.FieldType, split: Sequence[int] | None, split_by: str | None, transformer: BlockMap
    ) -> None:
        validate_field_type(field_type)
        self.field_type = field_type
        layout = block_layout(field_type, split_by, "EquivariantCoupling")
        self.kept = layout.first_half() if split is None else _chosen_blocks(split, len(layout.blocks))
        self.layout = layout
        moved = [i for i in range(len(layout.blocks)) if i not in set(self.kept)]
        self.map = transformer.bind([layout.blocks[i] for i in moved], layout.spatial_dims)
        self._groups = ChannelGroups([layout.channels(self.kept), layout.channels(moved)], layout.spatial_dims)

    def conditioner_types(self, context_type: enn.FieldType | None) -> tuple[enn.FieldType, enn.FieldType]:
        gspace = self.field_type.gspace
        fields = [field for i in self.kept for field in self.layout.blocks[i].fields]
        in_type = with_context_fields(enn.FieldType(gspace, fields), context_type)
        return in_type, enn.FieldType(gspace, self.map.parameter_fields)

    def of(self, x: Tensor) -> tuple[Tensor, ...]:
        """What conditions, and what is mapped."""
        return self._groups.take_apart(self.layout.coordinates(x))

    def joined(self, x_a: Tensor, x_b: Tensor) -> Tensor:
        """The event of two halves; the first may lack the batch of contexts."""
        return self.layout.event(self._groups.put_together(x_a, x_b))


def _chosen_blocks(split: Sequence[int], count: int) -> list[int]:
    split = check_integers("split", split, also="None")
    kept = sorted(set(split))
    if len(kept) != len(split) or not 0 < len(kept) < count or kept[0] < 0 or kept[-1] >= count:
        raise ValueError(
            f"split: expected distinct indices of some but not all of the {count} blocks, found {list(split)}"
        )
    return kept


class ConditionalEquivariantCoupling(FamilyOfKind):
    r"""Equivariant coupling given a context, :math:`T(g \cdot x \mid g \cdot c) = g \cdot T(x \mid c)`.

    As :class:`EquivariantCoupling`, with the context joined to :math:`x_a` in front of the conditioner.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import ConditionalEquivariantCoupling, EquivariantCoupling
        >>> from pyro_equiflow.nn import steerable_net
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> context_type = enn.FieldType(space, [space.irrep(1, 1), space.trivial_repr])
        >>> types = EquivariantCoupling.conditioner_types(vectors, context_type=context_type)
        >>> family = ConditionalEquivariantCoupling(vectors, context_type, steerable_net(*types))
        >>> family.condition(torch.randn(5, 3))(torch.randn(5, 6)).shape
        torch.Size([5, 6])

    :param field_type: how the group acts on the event.
    :param context_type: how the group acts on the context.
    :param conditioners: a module between the types of ``EquivariantCoupling.conditioner_types(field_type,
        context_type=context_type)``.
    :param kwargs: the keywords of :class:`EquivariantCoupling`.
    """

    kind = EquivariantCoupling


def equivariant_coupling(
    field_type: enn.FieldType,
    *,
    hidden_dims: Sequence[int] = (64, 64),
    split: Sequence[int] | None = None,
    split_by: str | None = None,
    transformer: str | BlockMap = "affine",
    log_scale_bound: float | None = None,
    identity_init: bool = True,
    **net_kwargs: Any,
) -> EquivariantCoupling:
    """An :class:`EquivariantCoupling` with a :func:`~pyro_equiflow.nn.steerable_net` as conditioner.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_coupling
        >>> space = gspaces.no_base_space(group.so2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1)])
        >>> transform = equivariant_coupling(vectors, transformer="spline")
        >>> transform(torch.randn(5, 6)).shape
        torch.Size([5, 6])

    :param field_type: how the group acts on the event.
    :param hidden_dims: channels of the conditioner's hidden layers.
    :param split: see :class:`EquivariantCoupling`.
    :param split_by: see :class:`EquivariantCoupling`.
    :param transformer: see :class:`EquivariantCoupling`.
    :param log_scale_bound: see :class:`EquivariantCoupling`.
    :param identity_init: whether the transform starts as the identity.
    :param net_kwargs: further keywords of :func:`~pyro_equiflow.nn.steerable_net`.
    """
    context_type = net_kwargs.pop(CONTEXT_TYPE, None)
    check_keywords(equivariant_coupling, net_kwargs, steerable_net, without=["zero_init"])
    check_flag("identity_init", identity_init)
    chosen = block_map(transformer, log_scale_bound)
    types = _Halves(field_type, split, split_by, chosen).conditioner_types(context_type)
    net = steerable_net(*types, hidden_dims=hidden_dims, zero_init=identity_init, **net_kwargs)
    return EquivariantCoupling(
        field_type, net, split=split, split_by=split_by, transformer=chosen, context_type=context_type
    )


def conditional_equivariant_coupling(
    field_type: enn.FieldType, context_type: enn.FieldType, **kwargs: Any
) -> ConditionalEquivariantCoupling:
    """A :class:`ConditionalEquivariantCoupling` with a :func:`~pyro_equiflow.nn.steerable_net` as conditioner.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import conditional_equivariant_coupling
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> context_type = enn.FieldType(space, [space.irrep(1, 1), space.trivial_repr])
        >>> family = conditional_equivariant_coupling(vectors, context_type)
        >>> family.condition(torch.randn(5, 3))(torch.randn(5, 6)).shape
        torch.Size([5, 6])

    :param field_type: how the group acts on the event.
    :param context_type: how the group acts on the context.
    :param kwargs: the keywords of :func:`equivariant_coupling`.
    """
    return ConditionalEquivariantCoupling.made_by(equivariant_coupling, field_type, context_type, **kwargs)
