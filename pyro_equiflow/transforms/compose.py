# SPDX-License-Identifier: Apache-2.0
"""Equivariant transforms one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pyro_equiflow.ops.arguments import check_items
from pyro_equiflow.transforms.base import Deferred, EquivariantTransform

__all__ = ["Compose"]

_LogDet = TypeVar("_LogDet", Tensor, Deferred)


class Compose(EquivariantTransform):
    """Equivariant transforms one after the other, as one: first in the list, first applied.

    Equivariant because each part is; the log-det is the sum of the parts'.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import Compose, equivariant_actnorm, equivariant_coupling
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> flow = Compose([equivariant_actnorm(vectors), equivariant_coupling(vectors)])
        >>> flow(torch.randn(5, 6)).shape
        torch.Size([5, 6])

    :param transforms: parts, each of the field type that the one before it gives.
    :param cache_size: 0 or 1, see :class:`EquivariantTransform`.
    :raises TypeError: no list, or a part of another kind.
    :raises ValueError: no part, or field types that do not fit.
    """

    def __init__(self, transforms: list[EquivariantTransform], *, cache_size: int = 1) -> None:
        remedy = "other transforms compose in a TransformedDistribution's list"
        transforms = check_items(
            "transforms", transforms, EquivariantTransform, "a list of EquivariantTransform parts", remedy=remedy
        )
        if not transforms:
            raise ValueError("transforms: expected at least one part, found none")
        for before, part in zip(transforms, transforms[1:]):
            if part.field_type != before.out_type:
                raise ValueError(
                    f"transforms: expected parts that fit, with field type {before.out_type} after "
                    f"{type(before).__name__}, found {type(part).__name__} with {part.field_type}"
                )
        super().__init__(transforms[0].field_type, out_type=transforms[-1].out_type, cache_size=cache_size)
        self.transforms = torch.nn.ModuleList(transforms)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladjs = _one_by_one(x, [part._call_and_ladj for part in self])
        return y, sum(ladjs[1:], ladjs[0])

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladjs = _one_by_one(y, [part._inverse_and_ladj for part in reversed(list(self))])
        return x, sum(ladjs[1:], ladjs[0])

    def _call_deferred(self, x: Tensor) -> tuple[Tensor, Deferred]:
        y, ladjs = _one_by_one(x, [part._call_deferred for part in self])
        return y, lambda: sum((ladj() for ladj in ladjs[1:]), ladjs[0]())

    def _inverse_deferred(self, y: Tensor) -> tuple[Tensor, Deferred]:
        x, ladjs = _one_by_one(y, [part._inverse_deferred for part in reversed(list(self))])
        return x, lambda: sum((ladj() for ladj in ladjs[1:]), ladjs[0]())

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the image of a tensor of this shape: what the parts make of it."""
        for part in self:
            shape = part.forward_shape(shape)
        return shape

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the preimage of a tensor of this shape: what the parts make of it."""
        for part in reversed(list(self)):
            shape = part.inverse_shape(shape)
        return shape

    def __iter__(self) -> Iterator[EquivariantTransform]:
        return iter(self.transforms)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.transforms)

    def __getitem__(self, index: int) -> EquivariantTransform:
        return self.transforms[index]  # type: ignore[return-value]


def _one_by_one(x: Tensor, hooks: Sequence[Callable[[Tensor], tuple[Tensor, _LogDet]]]) -> tuple[Tensor, list[_LogDet]]:
    """What hooks make of an event in order, and the log-det of each."""
    ladjs = []
    for hook in hooks:
        x, ladj = hook(x)
        ladjs.append(ladj)
    return x, ladjs
