# SPDX-License-Identifier: Apache-2.0
"""One level of a multi-scale flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.ops.arguments import check_instance, check_integers
from pyro_equiflow.ops.channels import ChannelGroups
from pyro_equiflow.transforms.base import Deferred, EquivariantTransform
from pyro_equiflow.transforms.compose import Compose
from pyro_equiflow.transforms.squeeze import EquivariantSqueeze

__all__ = ["MultiScale"]

_LogDet = TypeVar("_LogDet", Tensor, Deferred)


class MultiScale(Compose):
    r"""One level of a multi-scale flow: squeezed, transformed, and only part of the channels goes deeper.

    .. math:: y = S^{-1}\big(z_a, D(z_b)\big), \qquad (z_a, z_b) = T(S x),

    with :math:`S` an :class:`EquivariantSqueeze`, :math:`T` a transform of squeezed events and :math:`D` one of the
    fields that go on, itself a :class:`MultiScale` where there are more levels. The fields :math:`z_a` stop here. The
    image has the event's shape and field type, so levels stack with other transforms, and a
    ``TransformedDistribution`` takes any base distribution of that shape. :math:`S, T, D` commute with the group and
    fields are never cut, so the whole commutes too.

    Log-det the sum of the parts', inverse as closed as theirs. From data to noise, as multi-scale flows are drawn, is
    the forward direction; :class:`Inverse` of it makes noise to data, see :func:`~pyro_equiflow.image_flow`.

    Example::

        >>> import torch
        >>> from escnn import gspaces, nn as enn
        >>> from pyro_equiflow import MultiScale, equivariant_flow
        >>> space = gspaces.rot2dOnR2(4)
        >>> gray = enn.FieldType(space, [space.trivial_repr])
        >>> squeezed_type, deeper_type = MultiScale.types(gray, haar=True)
        >>> second = MultiScale(deeper_type, equivariant_flow(MultiScale.types(deeper_type)[0], num_transforms=1))
        >>> first = MultiScale(gray, equivariant_flow(squeezed_type, num_transforms=1), second, haar=True)
        >>> first(torch.randn(5, 1, 8, 8)).shape
        torch.Size([5, 1, 8, 8])

    :param field_type: how the group acts on the event.
    :param transform: :math:`T`, of the first type of :meth:`types`.
    :param deeper: :math:`D`, of the second; by default nothing goes on.
    :param haar: as in :class:`EquivariantSqueeze`.
    :param kept: indices of the squeezed fields that go on; by default the first ones, until they have half of
        the channels or more, never all.
    :param cache_size: 0 or 1, see :class:`EquivariantTransform`.
    :raises TypeError: parts that are not equivariant transforms.
    :raises ValueError: parts of other types, a wrong choice of fields, one field only; else as
        :class:`EquivariantSqueeze`.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP* (arXiv 1605.08803), section 3.6.
    """

    def __init__(
        self,
        field_type: enn.FieldType,
        transform: EquivariantTransform,
        deeper: EquivariantTransform | None = None,
        *,
        haar: bool = False,
        kept: Sequence[int] | None = None,
        cache_size: int = 1,
    ) -> None:
        squeeze = EquivariantSqueeze(field_type, haar=haar)
        _check_part("transform", transform, squeeze.out_type)
        if deeper is None and kept is not None:
            raise ValueError(f"kept: expected None where no transform goes deeper, found {kept!r}")
        parts = [squeeze, transform]
        if deeper is not None:
            parts.append(_OnFields(squeeze.out_type, _kept(squeeze.out_type, kept), deeper))
        super().__init__([*parts, squeeze.inv], cache_size=cache_size)

    @staticmethod
    def types(
        field_type: enn.FieldType, *, haar: bool = False, kept: Sequence[int] | None = None
    ) -> tuple[enn.FieldType, enn.FieldType]:
        """The field types of squeezed events and of their fields that go deeper.

        :raises ValueError: one field only, a wrong choice of fields; else as :class:`EquivariantSqueeze`.
        """
        squeezed_type = EquivariantSqueeze(field_type, haar=haar).out_type
        return squeezed_type, _select(squeezed_type, _kept(squeezed_type, kept))


class _OnFields(EquivariantTransform):
    """A transform of some fields of an event; the others stay as they are."""

    def __init__(self, field_type: enn.FieldType, chosen: list[int], transform: EquivariantTransform) -> None:
        _check_part("deeper", transform, _select(field_type, chosen))
        super().__init__(field_type, cache_size=0)
        self.transform = transform
        self._chosen = chosen
        ends = np.cumsum([field.size for field in field_type.representations])
        channels = np.split(np.arange(field_type.size), ends[:-1])
        rest = [i for i in range(len(channels)) if i not in chosen]
        groups = [np.concatenate([channels[i] for i in own]) for own in (rest, chosen)]
        self._groups = ChannelGroups(groups, self.event_dim - 1)

    def _joint_shape(self, shape: torch.Size, field_type: enn.FieldType) -> torch.Size:
        shape, dim = super()._joint_shape(shape, field_type), -self.event_dim
        deeper = torch.Size((*shape[:dim], self.transform.field_type.size, *shape[dim + 1 :]))
        return torch.Size((*self.transform.forward_shape(deeper)[:dim], *shape[dim:]))

    def _architecture(self) -> dict[str, Any]:
        found = super()._architecture()
        found[""]["chosen"] = self._chosen
        return found

    def _apply_to(self, x: Tensor, run: Callable[[Tensor], tuple[Tensor, _LogDet]]) -> tuple[Tensor, _LogDet]:
        rest, chosen = self._groups.take_apart(x)
        chosen, ladj = run(chosen)
        return self._groups.put_together(rest, chosen), ladj

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply_to(x, self.transform._call_and_ladj)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply_to(y, self.transform._inverse_and_ladj)

    def _call_deferred(self, x: Tensor) -> tuple[Tensor, Deferred]:
        return self._apply_to(x, self.transform._call_deferred)

    def _inverse_deferred(self, y: Tensor) -> tuple[Tensor, Deferred]:
        return self._apply_to(y, self.transform._inverse_deferred)


def _check_part(name: str, part: EquivariantTransform, field_type: enn.FieldType) -> None:
    check_instance(name, part, EquivariantTransform, "an EquivariantTransform")
    for found in (part.field_type, part.out_type):
        if found != field_type:
            raise ValueError(
                f"{name}: expected a transform of the type {field_type}, found {found}; see MultiScale.types"
            )


def _select(field_type: enn.FieldType, chosen: Sequence[int]) -> enn.FieldType:
    return enn.FieldType(field_type.gspace, [field_type.representations[i] for i in chosen])


def _kept(field_type: enn.FieldType, chosen: Sequence[int] | None) -> list[int]:
    """The fields that go on, in order."""
    fields = field_type.representations
    if len(fields) < 2:
        raise ValueError(
            f"MultiScale: expected a squeezed type of at least two fields, found {field_type}: no part can stop while "
            "another goes on; take haar=True, whose averages and differences are fields of their own, or one level less"
        )
    if chosen is not None:
        chosen = check_integers("kept", chosen, also="None")
        distinct = set(chosen) & set(range(len(fields)))
        if not 0 < len(distinct) == len(chosen) < len(fields):
            raise ValueError(
                f"kept: expected distinct indices of some but not all of the {len(fields)} fields, found {list(chosen)}"
            )
        return sorted(chosen)
    kept, size = [], 0
    for index, field in enumerate(fields[:-1]):
        if 2 * size >= field_type.size:
            break
        kept.append(index)
        size += field.size
    return kept
