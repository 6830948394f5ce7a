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
    :param passing: attributes that do not count, because a pass changes them itself.
    """

    __slots__ = ("_grad_enabled", "_marks", "_objects", "_steps", "has_inference_tensors")

    def __init__(self, module: torch.nn.Module, tensors: Sequence[Tensor], passing: Sequence[str] = ()) -> None:
        objects, found = _walk(module, passing)
        found += tensors
        objects += found
        self._objects = objects
        self._steps = _optimizer_steps
        #: Whether a tensor of inference mode is among them: those have no version, so a change would not show.
        self.has_inference_tensors = any(map(Tensor.is_inference, found))
        self._marks = () if self.has_inference_tensors else [(t._version, t.data_ptr()) for t in found]

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


def _walk(module: torch.nn.Module, passing: Sequence[str]) -> tuple[list[Any], list[Tensor]]:
    """What stands in a module and in its parts, and their parameters and buffers.

    By hand, in one call: parameters() and buffers() spend ten times as long on names that nobody wants here.
    """
    objects: list[Any] = []
    tensors: list[Tensor] = []
    seen, pending = set(), [module]
    while pending:
        module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        own = vars(module)
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            if tensor is not None:
                tensors.append(tensor)
        for part in own["_modules"].values():
            if part is not None:
                objects.append(part)
                pending.append(part)
        objects.append(module.training)
        if not own.keys().isdisjoint(passing):
            own = {name: value for name, value in own.items() if name not in passing}
        objects += own.values()
    return objects, tensors
