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
        objects: list[Any] = []
        found = list(tensors)
        _walk(module, passing, objects, found, set())
        objects += found
        self._objects = objects
        self._steps = _optimizer_steps
        #: Whether a tensor of inference mode is among them: those have no version, so a change would not show.
        self.has_inference_tensors = any(t.is_inference() for t in found)
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


def _walk(
    module: torch.nn.Module, passing: Sequence[str], objects: list[Any], tensors: list[Tensor], seen: set[int]
) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    # By hand: parameters() and buffers() spend ten times as long on names that nobody wants here.
    own = vars(module)
    parameters, buffers, parts = own["_parameters"], own["_buffers"], own["_modules"]
    tensors += [t for t in parameters.values() if t is not None]
    tensors += [t for t in buffers.values() if t is not None]
    objects.append(module.training)
    if any(name in own for name in passing):
        own = {name: value for name, value in own.items() if name not in passing}
    objects += own.values()
    for part in parts.values():
        if part is not None:
            objects.append(part)
            _walk(part, passing, objects, tensors, seen)
