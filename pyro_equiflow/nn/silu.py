# SPDX-License-Identifier: Apache-2.0
"""SiLU with cheap first and second derivatives, which log-dets take several times."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_equiflow.ops.tracing import in_torch_func, is_legacy_batched, is_traced

__all__ = ["silu", "silu_slope"]


def silu(x: Tensor) -> Tensor:
    r""":math:`x \sigma(x)`, differentiable to any order.

    torch finds the slope anew in every backward pass and takes ten passes over memory for the second derivative; here
    the slope is kept, and half as many serve.
    """
    if x.requires_grad and torch.is_grad_enabled() and not is_traced():
        return _Silu.apply(x)
    # torch has no tangent of the backward pass of its own function.
    return x * torch.sigmoid(x) if in_torch_func() else F.silu(x)


def silu_slope(x: Tensor) -> Tensor:
    """The derivative of :func:`silu`."""
    gate = torch.sigmoid(x)
    return _slope(x, gate)


def _slope(x: Tensor, gate: Tensor) -> Tensor:
    # s + x s (1 - s)
    return torch.addcmul(gate, x * gate, 1 - gate)


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, y = torch.sigmoid(x), F.silu(x)  # the value to the last bit as without a graph
        ctx.save_for_backward(x, gate, torch.addcmul(gate, y, 1 - gate))
        return y

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Tensor:
        (upstream,) = upstreams
        x, gate, slope = ctx.saved_tensors
        # A batch of upstream gradients: functions of ours are recorded there, and their graph is lost.
        if is_traced() or is_legacy_batched(upstream):
            return upstream * silu_slope(x)
        if torch.is_grad_enabled():
            return _SiluBackward.apply(upstream, x, gate, slope)
        return upstream * slope


class _SiluBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, upstream: Tensor, x: Tensor, gate: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(upstream, x, gate, slope)
        return upstream * slope

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        (again,) = upstreams
        upstream, x, gate, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # what was kept has no graph to x
            gate = torch.sigmoid(x)
            slope = _slope(x, gate)
        # The second derivative: 2 s (1 - s) + (1 - 2 s) x s (1 - s), and x s (1 - s) is the slope less s.
        rest = 1 - gate
        curvature = torch.addcmul((slope - gate) * (rest - gate), gate, rest, value=2)
        return again * slope, again * upstream * curvature, None, None
