# SPDX-License-Identifier: Apache-2.0
"""Checks of what solvers and adjoints are given, made once where a user calls."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from pyro_equiflow.ops.arguments import check_choice, check_flag, check_instance, check_integer, check_number

__all__ = ["OnFailure", "check_batch", "check_certificate", "check_contraction", "check_stopping"]

OnFailure = Literal["raise", "warn", "ignore"]


def check_batch(name: str, x: Tensor) -> None:
    """Raises unless ``x`` is a batch of events that a solver works on.

    :raises TypeError: not a tensor.
    :raises ValueError: of another dtype, or without a batch dimension.
    """
    check_instance(name, x, Tensor, "a torch.Tensor")
    if x.dim() < 1 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}: expected float32 or float64 of shape (B, *event), found {x.dtype} of {tuple(x.shape)}"
        )


def check_certificate(strict: bool | None, scale: Tensor | None, x0: Tensor, tolerance: float | None) -> bool:
    """Whether the tolerance is strict, see :meth:`Solver.solve`.

    :raises TypeError: ``strict`` is no flag, ``scale`` no tensor.
    :raises ValueError: ``scale`` without a number for each sample.
    """
    check_batch("x0", x0)
    if scale is not None:
        check_instance("scale", scale, Tensor, "a torch.Tensor or None")
        if scale.shape != x0.shape[:1] or not scale.is_floating_point():
            raise ValueError(
                f"scale: expected a floating-point number for each of {len(x0)} samples, found {scale.dtype} of "
                f"{tuple(scale.shape)}"
            )
    return tolerance is not None if strict is None else check_flag("strict", strict, also="None")


def check_contraction(lipschitz: float) -> float:
    """A Lipschitz bound in [0, 1)."""
    return check_number("lipschitz", lipschitz, "[0, 1)", remedy="only a contraction is solved")


def check_stopping(tolerance: float | None, max_steps: int | None, on_failure: str) -> None:
    """Raises unless a solver can stop by these.

    :raises TypeError: one of another type.
    :raises ValueError: one out of range.
    """
    if tolerance is not None:
        check_number("tolerance", tolerance, "(0, inf)", also="None")
    if max_steps is not None:
        check_integer("max_steps", max_steps, 1, also="None")
    check_choice("on_failure", on_failure, get_args(OnFailure))
