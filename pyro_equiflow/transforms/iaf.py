# SPDX-License-Identifier: Apache-2.0
"""Equivariant inverse autoregressive flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.maps.block_map import BlockMap
from pyro_equiflow.maps.blocks import block_layout
from pyro_equiflow.maps.named import block_map
from pyro_equiflow.nn import MaskedSteerableNet
from pyro_equiflow.nn.conditioner import Conditioner
from pyro_equiflow.ops.arguments import check_flag, check_instance, check_integers, check_keywords
from pyro_equiflow.ops.events import cat_channels
from pyro_equiflow.ops.representations import validate_field_type, validate_over
from pyro_equiflow.transforms.conditional import (
    CONTEXT_TYPE,
    ConditionableTransform,
    FamilyOfKind,
    with_context_fields,
)

__all__ = [
    "ConditionalEquivariantIAF",
    "EquivariantIAF",
    "conditional_equivariant_iaf",
    "equivariant_iaf",
]


class EquivariantIAF(ConditionableTransform):
    r"""Inverse autoregressive flow that commutes with a symmetry group.

    The event is cut into invariant subspaces in an order, :math:`x = (x_1, \ldots, x_n)`, never inside an irrep, and

    .. math:: y_i = \exp(s_i(x_{<i})) \cdot x_i + t_i(x_{<i}),

    where :math:`s_i` commutes with the group: for a field whose channels the group permutes, a field of the same type
    acting pointwise; for any other, one invariant scalar per irrep. On grids both are fields over positions. The scale
    is bounded smoothly on both sides. One masked network
    (:class:`~pyro_equiflow.nn.MaskedSteerableNet`) gives all :math:`s_i, t_i`, so the Jacobian is block triangular.
    Other maps of the blocks than this affine one are those of :mod:`pyro_equiflow.maps`, by ``transformer``.

    Log-det exact; one pass of the network. Inverse closed form, one block after the other: a pass per block, with
    weights expanded once, and as many to differentiate it. For density estimation ``Inverse(EquivariantIAF(...))`` is
    the masked autoregressive flow, which scores data in one pass.

    Example::

        >>> import torch, pyro.distributions as dist
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import EquivariantIAF
        >>> from pyro_equiflow.nn import MaskedSteerableNet
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 4 * [space.irrep(1, 1)])
        >>> net = MaskedSteerableNet(
        ...     *EquivariantIAF.conditioner_types(vectors), *EquivariantIAF.conditioner_degrees(vectors)
        ... )
        >>> transform = EquivariantIAF(vectors, net)
        >>> base = dist.Normal(torch.zeros(8), 1.0).to_event(1)
        >>> dist.TransformedDistribution(base, [transform]).rsample((3,)).shape
        torch.Size([3, 8])

    :param field_type: how the group acts on the event.
    :param conditioner: a :class:`~pyro_equiflow.nn.MaskedSteerableNet` between the types of :meth:`conditioner_types`,
        with the degrees of :meth:`conditioner_degrees`. No other network is taken: which output sees which input could
        not be told.
    :param order: a permutation of the blocks: which comes first, second, and so on; by default as they stand.
    :param split_by: blocks are ``"fields"`` or ``"irreps"``; ``None`` takes fields if there are two or more.
    :param transformer: the map of each block, see :class:`~pyro_equiflow.EquivariantCoupling`.
    :param log_scale_bound: likewise.
    :param context_type: field type of a context (see :class:`ConditionalEquivariantIAF`).
    :param cache_size: 0 or 1, see :class:`EquivariantTransform`.
    :raises TypeError: a conditioner that is not a masked network.
    :raises ValueError: a type of one block, an order that is no permutation, a conditioner of wrong types or degrees,
        an unknown transformer, a bound out of range or beside a map.

    References: Bose, Brubaker and Kobyzev, *Equivariant Finite Normalizing Flows* (arXiv 2110.08649); Kingma et al.,
    *Improving Variational Inference with Inverse Autoregressive Flow* (arXiv 1606.04934), section 3; Papamakarios,
    Pavlakou and Murray, *Masked Autoregressive Flow for Density Estimation* (arXiv 1705.07057), section 3.
    """

    def __init__(
        self,
        field_type: enn.FieldType,
        conditioner: MaskedSteerableNet,
        *,
        order: Sequence[int] | None = None,
        split_by: str | None = None,
        transformer: str | BlockMap = "affine",
        log_scale_bound: float | None = None,
        context_type: enn.FieldType | None = None,
        cache_size: int = 1,
    ) -> None:
        chosen = block_map(transformer, log_scale_bound)
        blocks = _OrderedBlocks(field_type, order, split_by, chosen)
        remedy = "an autoregressive map needs a network with masks"
        check_instance(
            "conditioner", conditioner, MaskedSteerableNet, "a pyro_equiflow.nn.MaskedSteerableNet", remedy=remedy
        )
        network = Conditioner(conditioner, *blocks.conditioner_types(context_type))
        for name, expected in zip(("in_degrees", "out_degrees"), blocks.conditioner_degrees(context_type)):
            found = getattr(conditioner, name)
            if found != expected:
                raise ValueError(f"conditioner: expected {name} {expected}, found {found}; see conditioner_degrees")
        super().__init__(field_type, context_type=context_type, cache_size=cache_size)
        self.conditioner = network
        self.transformer = chosen
        self._blocks = blocks

    @property
    def order(self) -> tuple[int, ...]:
        """The blocks in the order in which they depend on each other."""
        return self._blocks.order

    @staticmethod
    def conditioner_types(
        field_type: enn.FieldType,
        *,
        split_by: str | None = None,
        transformer: str | BlockMap = "affine",
        context_type: enn.FieldType | None = None,
    ) -> tuple[enn.FieldType, enn.FieldType]:
        """The field types between which the conditioner maps.

        :return: the type of the event's blocks (and of the context), and that of the map's parameters: for ``"affine"``
            the scales followed by the shifts.
        """
        chosen = block_map(transformer)
        return _OrderedBlocks(field_type, None, split_by, chosen).conditioner_types(context_type)

    @staticmethod
    def conditioner_degrees(
        field_type: enn.FieldType,
        *,
        order: Sequence[int] | None = None,
        split_by: str | None = None,
        transformer: str | BlockMap = "affine",
        context_type: enn.FieldType | None = None,
    ) -> tuple[list[int], list[int]]:
        """The degrees of all fields of :meth:`conditioner_types`.

        :return: for input and output a block's place in the order, from 1; 0 for a context.
        """
        chosen = block_map(transformer)
        return _OrderedBlocks(field_type, order, split_by, chosen).conditioner_degrees(context_type)

    def _architecture(self) -> dict[str, Any]:
        found = super()._architecture()
        found[""] |= {"order": self.order, "blocks": self._blocks.layout.names()}
        return found

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        blocks, dim = self._blocks, -self.event_dim
        x, context = self._with_context(x)
        z = blocks.layout.coordinates(x)
        out = self.conditioner(z if context is None else torch.cat([z, context], dim))
        z, ladj = blocks.map.forward(z, blocks.map.parameters(out))
        return blocks.layout.event(z), ladj

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        blocks, dim, spatial_dims = self._blocks, -self.event_dim, self.event_dim - 1
        y, context = self._with_context(y)
        targets = blocks.layout.coordinates(y).split(blocks.layout.sizes, dim)
        # No block sees those after it: zeros hold their places.
        found = [torch.zeros_like(target) for target in targets]
        network = self.conditioner.on_events()
        ladj = y.new_zeros(y.shape[:dim])
        for index in blocks.order:
            out = network(cat_channels(found if context is None else [*found, context], spatial_dims))
            own = blocks.map.of_block(blocks.map.parameters(out), index)
            found[index], own_ladj = blocks.maps[index].inverse(targets[index], own)
            ladj = ladj + own_ladj
        return blocks.layout.event(cat_channels(found, spatial_dims)), ladj


class _OrderedBlocks:
    """The blocks of an event, their order, and their maps, all together and one by one."""

    def __init__(
        self, field_type: enn.FieldType, order: Sequence[int] | None, split_by: str | None, transformer: BlockMap
    ) -> None:
        validate_field_type(field_type)
        self.field_type = field_type
        self.layout = block_layout(field_type, split_by, "EquivariantIAF")
        blocks, spatial_dims = self.layout.blocks, self.layout.spatial_dims
        self.order = _permutation(order, len(blocks))
        self.map = transformer.bind(blocks, spatial_dims)
        self.maps = [transformer.bind([block], spatial_dims) for block in blocks]

    def conditioner_types(self, context_type: enn.FieldType | None) -> tuple[enn.FieldType, enn.FieldType]:
        gspace = self.field_type.gspace
        fields = [field for block in self.layout.blocks for field in block.fields]
        in_type = with_context_fields(enn.FieldType(gspace, fields), context_type)
        return in_type, enn.FieldType(gspace, self.map.parameter_fields)

    def conditioner_degrees(self, context_type: enn.FieldType | None) -> tuple[list[int], list[int]]:
        if context_type is not None:
            validate_over(self.field_type.gspace, context_type, "context_type")
        places = [1 + self.order.index(i) for i in range(len(self.order))]
        fields = [place for place, block in zip(places, self.layout.blocks) for _ in block.fields]
        context = [] if context_type is None else len(context_type.representations) * [0]
        return [*fields, *context], [places[i] for i in self.map.parameter_blocks]

    def network(self, context_type: enn.FieldType | None, **kwargs: Any) -> MaskedSteerableNet:
        types, degrees = self.conditioner_types(context_type), self.conditioner_degrees(context_type)
        return MaskedSteerableNet(*types, *degrees, **kwargs)


def _permutation(order: Sequence[int] | None, count: int) -> tuple[int, ...]:
    given = check_integers("order", range(count) if order is None else order, also="None")
    if sorted(given) != list(range(count)):
        raise ValueError(f"order: expected a permutation of 0 to {count - 1}, found {list(given)}")
    return given


class ConditionalEquivariantIAF(FamilyOfKind):
    r"""Inverse autoregressive flow given a context, :math:`T(g \cdot x \mid g \cdot c) = g \cdot T(x \mid c)`.

    As :class:`EquivariantIAF`, with the context joined to :math:`x` in front of the network; every block sees it.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import ConditionalEquivariantIAF, EquivariantIAF
        >>> from pyro_equiflow.nn import MaskedSteerableNet
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> context_type = enn.FieldType(space, [space.irrep(1, 1), space.trivial_repr])
        >>> types = EquivariantIAF.conditioner_types(vectors, context_type=context_type)
        >>> degrees = EquivariantIAF.conditioner_degrees(vectors, context_type=context_type)
        >>> family = ConditionalEquivariantIAF(vectors, context_type, MaskedSteerableNet(*types, *degrees))
        >>> family.condition(torch.randn(5, 3))(torch.randn(5, 6)).shape
        torch.Size([5, 6])

    :param field_type: how the group acts on the event.
    :param context_type: how the group acts on the context.
    :param conditioners: a masked network between the types of ``EquivariantIAF.conditioner_types(field_type,
        context_type=context_type)``, with the degrees of ``EquivariantIAF.conditioner_degrees``.
    :param kwargs: the keywords of :class:`EquivariantIAF`.
    """

    kind = EquivariantIAF


def equivariant_iaf(
    field_type: enn.FieldType,
    *,
    hidden_dims: Sequence[int] = (64, 64),
    order: Sequence[int] | None = None,
    split_by: str | None = None,
    transformer: str | BlockMap = "affine",
    log_scale_bound: float | None = None,
    identity_init: bool = True,
    **net_kwargs: Any,
) -> EquivariantIAF:
    """An :class:`EquivariantIAF` with a :class:`~pyro_equiflow.nn.MaskedSteerableNet` as conditioner.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_iaf
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> equivariant_iaf(vectors)(torch.randn(5, 6)).shape
        torch.Size([5, 6])

    :param field_type: how the group acts on the event.
    :param hidden_dims: channels of the conditioner's hidden layers.
    :param order: see :class:`EquivariantIAF`.
    :param split_by: see :class:`EquivariantIAF`.
    :param transformer: see :class:`EquivariantIAF`.
    :param log_scale_bound: see :class:`EquivariantIAF`.
    :param identity_init: whether the transform starts as the identity.
    :param net_kwargs: further keywords of :class:`~pyro_equiflow.nn.MaskedSteerableNet`.
    """
    context_type = net_kwargs.pop(CONTEXT_TYPE, None)
    check_keywords(equivariant_iaf, net_kwargs, MaskedSteerableNet, without=["zero_init"])
    check_flag("identity_init", identity_init)
    chosen = block_map(transformer, log_scale_bound)
    blocks = _OrderedBlocks(field_type, order, split_by, chosen)
    net = blocks.network(context_type, hidden_dims=hidden_dims, zero_init=identity_init, **net_kwargs)
    return EquivariantIAF(
        field_type, net, order=order, split_by=split_by, transformer=chosen, context_type=context_type
    )


def conditional_equivariant_iaf(
    field_type: enn.FieldType, context_type: enn.FieldType, **kwargs: Any
) -> ConditionalEquivariantIAF:
    """A :class:`ConditionalEquivariantIAF` with a :class:`~pyro_equiflow.nn.MaskedSteerableNet` as conditioner.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import conditional_equivariant_iaf
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> context_type = enn.FieldType(space, [space.irrep(1, 1), space.trivial_repr])
        >>> family = conditional_equivariant_iaf(vectors, context_type)
        >>> family.condition(torch.randn(5, 3))(torch.randn(5, 6)).shape
        torch.Size([5, 6])

    :param field_type: how the group acts on the event.
    :param context_type: how the group acts on the context.
    :param kwargs: the keywords of :func:`equivariant_iaf`.
    """
    return ConditionalEquivariantIAF.made_by(equivariant_iaf, field_type, context_type, **kwargs)
