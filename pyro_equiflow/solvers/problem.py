# SPDX-License-Identifier: Apache-2.0
"""The map whose fixed point is asked for, and which rows of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from pyro_equiflow.ops.arguments import check_items

__all__ = ["OnRows", "Problem", "per_sample"]


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
        return [t.index_select(0, index) if per_sample else t for t, per_sample in zip(tensors, self.batched)]


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


class OnRows:
    """A problem's map in the form that solvers take, ``(x, index)``.

    Rows of tensors are taken once for each set of active samples. Where the map takes all rows or none, samples that
    have left stay where they were seen last.

    :param problem: the map.
    :param tensors: what it depends on.
    """

    def __init__(self, problem: Problem, tensors: Sequence[Tensor]) -> None:
        self._problem, self._tensors = problem, tensors
        self._index: Tensor | None = None
        self._active = list(tensors)  # the rows of index
        self._full: Tensor | None = None  # every sample where it was seen last, of a map that takes all

    def __call__(self, x: Tensor, index: Tensor | None) -> Tensor:
        problem = self._problem
        if problem.whole:
            self._full = x if index is None or self._full is None else self._full.index_copy(0, index, x)
            image = problem.phi(self._full, *self._tensors)
            return image if index is None else image.index_select(0, index)
        if index is not self._index:
            self._index, self._active = index, problem.rows(self._tensors, index)
        return problem.phi(x, *self._active)
