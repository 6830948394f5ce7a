# SPDX-License-Identifier: Apache-2.0
"""What a transform keeps between calls: its last pass, and its inverse while that is in use."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_equiflow.ops.fingerprint import Fingerprint

if TYPE_CHECKING:
    from pyro_equiflow.transforms.base import EquivariantTransform

__all__ = ["Deferred", "Memory", "Pass"]

Deferred = Callable[[], Tensor]


@dataclass
class Pass:
    """One pass: its ends, the forward log-det, which of the two ends was the product, and what it was made of."""

    x: Tensor
    y: Tensor
    ladj: Tensor | Deferred
    product: Tensor
    grad_enabled: bool
    made_of: Fingerprint

    def log_det(self) -> Tensor:
        """The forward log-det, found when it is first asked for."""
        if not isinstance(self.ladj, Tensor):
            self.ladj = self.ladj()
        return self.ladj


class Memory:
    """What a transform keeps between calls, for one caller: copies, deep ones and pickles too, begin with none.

    An object of its own, so that a pass changes no attribute of the transform: by those, among others,
    :class:`~pyro_equiflow.ops.fingerprint.Fingerprint` tells whether a pass still holds.

    :ivar last: the last pass.
    """

    def __init__(self) -> None:
        self.last: Pass | None = None
        # Weakly: if each held the other, the last pass and its graph would stay until a collection of garbage, for
        # every condition(context) of every step.
        self._inverse: weakref.ref[EquivariantTransform] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()

    def inverse(self) -> EquivariantTransform | None:
        """The inverse, if one is in use."""
        return None if self._inverse is None else self._inverse()

    def offer(self, inverse: EquivariantTransform) -> None:
        """Remembers an inverse, unless another one is in use."""
        if self.inverse() is None:
            self._inverse = weakref.ref(inverse)

    def keep(
        self, transform: EquivariantTransform, x: Tensor, y: Tensor, ladj: Tensor | Deferred, product: Tensor
    ) -> None:
        """Puts a pass of a transform in the last one's place, unless a change of what it was made of would not show."""
        made_of = _fingerprint(transform, x, y)
        # Tensors of inference mode have no version.
        kept = not made_of.has_inference_tensors
        self.last = Pass(x, y, ladj, product, torch.is_grad_enabled(), made_of) if kept else None

    def recall(self, transform: EquivariantTransform, x: Tensor | None, y: Tensor | None) -> Pass | None:
        """The last pass of a transform between these ends, of which one given alone was its product; ``None`` if there
        is none, or one made of other things than there are now."""
        last = self.last
        if last is None or (x is not None and x is not last.x) or (y is not None and y is not last.y):
            return None
        if (y is None and last.product is not x) or (x is None and last.product is not y):
            return None  # a user's tensor
        if _fingerprint(transform, last.x, last.y) != last.made_of:
            self.last = None
            return None
        # A pass made without a graph cannot answer where gradients are wanted.
        return last if last.grad_enabled or not torch.is_grad_enabled() else None


def _fingerprint(transform: EquivariantTransform, x: Tensor, y: Tensor) -> Fingerprint:
    return Fingerprint(transform, (x, y, *transform._sources()))
