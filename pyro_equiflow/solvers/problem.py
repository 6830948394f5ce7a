# SPDX-License-Identifier: Apache-2.0
"""The map whose fixed point is asked for, and which rows of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from pyro_equiflow.ops.arguments import check_items
from pyro_equiflow.solvers.iteration import Map, take

__all__ = ["Problem", "on_rows", "per_sample"]


class Problem(NamedTuple):
    """The map ``phi(x, *tensors)``, which tensors hold a row for each sample, and its Lipschitz bound.

    :ivar jacobian: gives the Jacobian at the fixed point, or ``None``, see :meth:`Adjoint.attach`.
    :ivar whole: whether the map takes all rows or none.
    """

    phi: Callable[..., Tensor]
    batched: tuple[bool, ...]
    lipschitz: float
    jacobian: Callable[[], Tensor | None] = lambda: None
    whole: bool = False

    def rows(self, tensors: Sequence[Tensor], index: Tensor | None) -> list[Tensor]:
        if index is None:
            return list(tensors)
        return [take(t, index) if per_sample else t for t, per_sample in zip(tensors, self.batched)]


def per_sample(tensors: Sequence[Tensor], batched: Sequence[bool] | None, x: Tensor) -> tuple[bool, ...]:
    """The flags ``batched``, one for each tensor; raises ``ValueError`` where they do not fit."""
    check_items("tensors", tensors, Tensor, "a sequence of tensors")
    if batched is not None:
        check_items("batched", batched, bool, "a sequence of flags or None")
    flags = tuple(batched) if batched is not None else len(tensors) * (False,)
    if len(flags) != len(tensors):
        raise ValueError(f"batched: expected one flag for each of {len(tensors)} tensors, found {len(flags)}")
    for i, (tensor, per_sample) in enumerate(zip(tensors, flags)):
        if per_sample and (tensor.dim() < 1 or len(tensor) != len(x)):
            raise ValueError(
                f"tensors[{i}]: expected {len(x)} rows, one for each sample, found shape {tuple(tensor.shape)}: "
                "change it or its flag in batched"
            )
    return flags


def on_rows(problem: Problem, tensors: Sequence[Tensor]) -> Map:
    """The map in the form solvers take; rows are taken once for each set of active samples."""
    last: tuple[Tensor | None, list[Tensor]] = (None, list(tensors))
    full: Tensor | None = None

    def phi(x: Tensor, index: Tensor | None) -> Tensor:
        nonlocal last
        if index is not last[0]:
            last = (index, problem.rows(tensors, index))
        return problem.phi(x, *last[1])

    def phi_of_all(x: Tensor, index: Tensor | None) -> Tensor:
        # Samples that have left stay where they were seen last.
        nonlocal full
        full = x if index is None or full is None else full.index_copy(0, index, x)
        image = problem.phi(full, *tensors)
        return image if index is None else take(image, index)

    return phi_of_all if problem.whole else phi
