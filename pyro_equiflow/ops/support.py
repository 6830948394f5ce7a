# SPDX-License-Identifier: Apache-2.0
"""Where events live: all real tensors, batches of none included."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import IndependentTransform, identity_transform

__all__ = ["real_events"]


class _RealEvents(constraints.independent):
    """torch's own for real events of some dimensions, whose check fails on a batch of none."""

    def check(self, value: Tensor) -> Tensor:
        batch = value.shape[: max(0, value.dim() - self.reinterpreted_batch_ndims)]
        return super().check(value) if value.numel() else value.isfinite().new_ones(batch)


@biject_to.register(_RealEvents)
@transform_to.register(_RealEvents)
def _(constraint: Any) -> IndependentTransform:
    return IndependentTransform(identity_transform, constraint.reinterpreted_batch_ndims)


@functools.cache
def real_events(dimensions: int) -> constraints.Constraint:
    """The constraint of real events of ``dimensions`` dimensions."""
    return _RealEvents(constraints.real, dimensions)
