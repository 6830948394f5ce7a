# SPDX-License-Identifier: Apache-2.0
"""Transforms that a context can steer, and the families of transforms that a context picks from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from escnn import nn as enn
from pyro.distributions import ConditionalTransformModule
from torch import Tensor

from pyro_equiflow.ops.arguments import check_instance, check_keywords
from pyro_equiflow.ops.events import check_event, event_dim
from pyro_equiflow.ops.representations import validate_field_type, validate_over
from pyro_equiflow.ops.tracing import full_precision, is_traced
from pyro_equiflow.transforms.base import EquivariantTransform
from pyro_equiflow.transforms.precision import check_finite

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "CONTEXT_TYPE",
    "ConditionableTransform",
    "ConditionalEquivariantTransform",
    "FamilyOfKind",
    "with_context_fields",
]

#: The keyword by which conditional factories tell plain ones of a context: what those make alone has none.
CONTEXT_TYPE = "_context_type"


def with_context_fields(field_type: enn.FieldType, context_type: enn.FieldType | None) -> enn.FieldType:
    """The type of events of ``field_type`` followed by a context, what a conditioner takes.

    :raises TypeError: the context's type is no field type.
    :raises ValueError: the two lie over unlike gspaces.
    """
    if context_type is None:
        return field_type
    validate_over(field_type.gspace, context_type, "context_type")
    return enn.FieldType(field_type.gspace, [*field_type.representations, *context_type.representations])


class ConditionableTransform(EquivariantTransform):
    """A transform that may depend on a context, once conditioned on one.

    :param field_type: how the group acts on the event.
    :param context_type: how it acts on the context; ``None`` where there is none.
    :param cache_size: 0 or 1, see :class:`~pyro_equiflow.EquivariantTransform`.
    """

    def __init__(
        self, field_type: enn.FieldType, *, context_type: enn.FieldType | None = None, cache_size: int = 1
    ) -> None:
        super().__init__(field_type, cache_size=cache_size)
        self.context_type = context_type
        self.context: Tensor | None = None

    def _sources(self) -> tuple[Tensor, ...]:
        return () if self.context is None else (self.context,)

    def _joint_shape(self, shape: torch.Size, field_type: enn.FieldType) -> torch.Size:
        # With the context's batch, so that a base distribution is expanded to it: a draw of its own for each context.
        shape = super()._joint_shape(shape, field_type)
        if self.context is None:
            return shape
        dim = -self.event_dim
        return torch.Size((*_joint_batch(shape[:dim], self.context.shape[:dim]), *shape[dim:]))

    def _with_context(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``x`` and the context, both of the joint batch shape and on the grid of ``x``."""
        if self.context_type is None:
            return x, None
        if self.context is None:
            raise ValueError(
                f"{type(self).__name__}: expected a context of type {self.context_type}, found none; call "
                "condition(context) on the conditional transform"
            )
        return _broadcast(x, self.context, -self.event_dim)


def _broadcast(x: Tensor, context: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    spatial = x.shape[x.dim() + dim + 1 :]
    grid = context.shape[context.dim() + dim + 1 :]
    if grid != spatial and grid.numel() > 1:  # a grid of one point is a vector, spread evenly
        raise ValueError(f"context: expected the event's grid {tuple(spatial)}, found {tuple(grid)}")
    batch = _joint_batch(x.shape[:dim], context.shape[:dim])
    return x.expand(*batch, *x.shape[dim:]), context.expand(*batch, context.shape[dim], *spatial)


def _joint_batch(events: torch.Size, contexts: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(events, contexts)
    except RuntimeError as error:
        raise ValueError(
            f"context: expected a batch shape that broadcasts against the event's {tuple(events)}, found "
            f"{tuple(contexts)}"
        ) from error


class ConditionalEquivariantTransform(ConditionalTransformModule):
    r"""A family of transforms indexed by a context, :math:`T(g \cdot x \mid g \cdot c) = g \cdot T(x \mid c)`.

    Given a batch of contexts, a transform's batch is joined with theirs: a distribution of it has their batch shape,
    and every context draws noise of its own.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import conditional_equivariant_coupling
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> context_type = enn.FieldType(space, [space.irrep(1, 1)])
        >>> family = conditional_equivariant_coupling(vectors, context_type)
        >>> family.condition(torch.randn(5, 2))(torch.randn(5, 6)).shape
        torch.Size([5, 6])

    :param transform: the transform; its conditioner takes the context's channels after its own.
    :param context_type: how the group acts on the context.
    """

    def __init__(self, transform: ConditionableTransform, context_type: enn.FieldType) -> None:
        super().__init__()
        check_instance("transform", transform, ConditionableTransform, "a transform that takes a context")
        validate_over(transform.field_type.gspace, context_type, "context_type")
        self.transform = transform
        self.context_type = context_type

    @property
    def field_type(self) -> enn.FieldType:
        """How the group acts on the event."""
        return self.transform.field_type

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: which of the transforms is meant, the context says.

        :raises TypeError: always.
        """
        name = type(self).__name__
        raise TypeError(
            f"{name}: expected condition(context) before a call, found a call of the family itself; write "
            "family.condition(context)(x)"
        )

    @full_precision
    def condition(self, context: Tensor) -> EquivariantTransform:
        """The transform given a context; parameters are shared, contexts of two calls do not mix.

        :param context: shape ``(*batch, C_context, *spatial)``, or ``(*batch, C_context)`` for one context spread
            evenly over the grid; its batch shape broadcasts against the event's.
        :raises TypeError: not a tensor, or not of the parameters' dtype or device.
        :raises ValueError: wrong shape.
        """
        owner = f"{type(self).__name__}.condition"
        size, spatial = self.context_type.size, event_dim(self.context_type) - 1
        if isinstance(context, Tensor) and spatial and context.shape[-1:] == (size,):
            has_channels_before_grid = context.dim() > spatial and context.shape[-1 - spatial] == size
            if not has_channels_before_grid:
                context = context[(...,) + spatial * (None,)]
        parameter = next(self.transform.parameters(), None)
        dtype, device = (None, None) if parameter is None else (parameter.dtype, parameter.device)
        check_event(context, self.context_type, owner, dtype, device)
        if not is_traced(context):
            check_finite(context, spatial + 1, owner)
        conditioned = copy.copy(self.transform)
        # Not by setattr: a context that is a torch.nn.Parameter would join the parameters that all calls share.
        conditioned.__dict__["context"] = context
        return conditioned


class FamilyOfKind(ConditionalEquivariantTransform):
    """What the families of one kind of transform have in common; a subclass names the kind.

    :param field_type: how the group acts on the event.
    :param context_type: how the group acts on the context.
    :param conditioners: the kind's networks, between its ``conditioner_types(field_type, context_type=context_type)``.
    :param kwargs: the kind's keywords.
    """

    kind: ClassVar[type[ConditionableTransform]]

    def __init__(
        self,
        field_type: enn.FieldType,
        context_type: enn.FieldType,
        *conditioners: enn.EquivariantModule,
        **kwargs: Any,
    ) -> None:
        validate_field_type(context_type, "context_type")
        # Networks may come by their names.
        named = [name for name in kwargs if not name.startswith("conditioner")]
        check_keywords(type(self), named, self.kind, without=["context_type"])
        super().__init__(self.kind(field_type, *conditioners, context_type=context_type, **kwargs), context_type)

    @classmethod
    def made_by(
        cls,
        factory: Callable[..., ConditionableTransform],
        field_type: enn.FieldType,
        context_type: enn.FieldType,
        **kwargs: Any,
    ) -> Self:
        """The family of what a factory of the kind makes, which takes its context's type by :data:`CONTEXT_TYPE`."""
        validate_field_type(context_type, "context_type")
        family = cls.__new__(cls)
        transform = factory(field_type, **{CONTEXT_TYPE: context_type}, **kwargs)
        ConditionalEquivariantTransform.__init__(family, transform, context_type)
        return family
