# SPDX-License-Identifier: Apache-2.0
"""What a computation by a module is made of, written down so that a change of any of it shows."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Fingerprint", "optimizer_steps"]

# Fused optimizers change parameters without a trace in Tensor._version, so steps are counted as well.
_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def optimizer_steps() -> int:
    """How many steps optimizers of torch have made in this process."""
    return _optimizer_steps


class Fingerprint:
    """All that a pass of a module depends on, as it is now: the tree of modules, their parameters and buffers, every
    attribute (modes, constants, estimators, solvers) and some further tensors.

    Edits through ``tensor.data`` in place, and changes inside an attribute that is no tensor, leave no trace.

    :param module: the module.
    :param tensors: further tensors: the input, the output, a context.
    """

    __slots__ = ("_marks", "_objects", "_steps", "has_inference_tensors")

    def __init__(self, module: torch.nn.Module, tensors: Sequence[Tensor]) -> None:
        objects: list[Any] = []
        found: list[Tensor | None] = list(tensors)
        parts: list[torch.nn.Module | None] = [module]
        seen: set[int] = set()
        # By hand: parameters() and buffers() spend ten times as long on names that nobody wants here.
        while parts:
            part = parts.pop()
            if part is None or id(part) in seen:
                continue
            seen.add(id(part))
            own = vars(part)
            found += own["_parameters"].values()
            found += own["_buffers"].values()
            objects.append(part.training)
            objects += own.values()
            # Not the module itself: what its memory holds must not hold it.
            objects += own["_modules"].values()
            parts += own["_modules"].values()
        objects += found
        self._objects = objects
        self._steps = _optimizer_steps
        self._marks: list[tuple[int, int]] = []
        #: Whether a tensor of inference mode is among them: those have no version, so a change would not show.
        self.has_inference_tensors = False
        for tensor in found:
            if tensor is not None:
                if tensor.is_inference():
                    self.has_inference_tensors = True
                else:
                    self._marks.append((tensor._version, tensor.data_ptr()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        return (
            self._steps == other._steps
            and self._marks == other._marks
            and len(self._objects) == len(other._objects)
            and all(map(is_, self._objects, other._objects))
        )

    __hash__ = None  # type: ignore[assignment]
