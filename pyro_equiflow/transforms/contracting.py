# SPDX-License-Identifier: Apache-2.0
"""A contraction ``F`` as one call of a transform sees it: expanded, given a context, run in either precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_equiflow.solvers.iteration import event_norm

__all__ = ["Contraction", "Pushed", "WithContext"]


class Contraction(NamedTuple):
    """``fn(x, *tensors)``, expanded for one call.

    :ivar batched: which tensors have a row for each sample.
    :ivar bound: of the Lipschitz constant.
    :ivar refine: whether ``fn`` takes float64 tensors where the parameters are float32.
    :ivar offset: gives a bound of ``|fn(0, *tensors)|`` with nothing cancelled.
    """

    fn: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    batched: tuple[bool, ...]
    bound: float
    refine: bool
    offset: Callable[[], Tensor]

    def wide(self) -> list[Tensor]:
        """The tensors in float64, without a graph."""
        return [tensor.detach().double() for tensor in self.tensors]


class WithContext:
    """A network's map on event and context, joined, as a map of the event: ``fn(x, context, *tensors)``."""

    per_sample = 1

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self._fn = fn

    def __call__(self, x: Tensor, context: Tensor, *tensors: Tensor) -> Tensor:
        return self._fn(torch.cat([x, context], 1), *tensors)

    def linearize(
        self, x: Tensor, context: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        """As a network's own, see :func:`~pyro_equiflow.logdet.base.forward_pass`."""
        linearize = getattr(self._fn, "linearize", None)
        found = linearize and linearize(torch.cat([x, context], 1), *tensors)
        if found is None:
            return None
        y, pull = found
        return y, lambda p: pull(p)[:, : x.shape[1]]


class Pushed(NamedTuple):
    """A step ``x + F(x)`` that was made, where from: to make it again in float64."""

    map_: Contraction
    x: Tensor

    def wide(self) -> Tensor:
        """The image in float64, without a graph."""
        x = self.x.detach().double()
        with torch.no_grad():
            return x + self.map_.fn(x, *self.map_.wide())

    def scale(self) -> Tensor:
        """The size of what was added, a sample."""
        return (1 + self.map_.bound) * event_norm(self.x.detach()) + self.map_.offset()
