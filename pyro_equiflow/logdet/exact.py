# SPDX-License-Identifier: Apache-2.0
"""The exact log-det, from the dense Jacobian of every sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pyro_equiflow.logdet.base import (
    LogDet,
    check_call,
    check_positive,
    forward_pass,
    rounding_allowance,
)

__all__ = ["Exact", "dense_jacobian", "log_abs_det"]


def dense_jacobian(y: Tensor, x: Tensor, rows: int, create_graph: bool) -> Tensor:
    """Jacobians ``(B, D, D)`` of ``y = fn(x)`` a sample, ``rows`` rows at a time by batched reverse passes.

    Reverse passes over one forward pass were faster than forward mode at every event size tried, forward and
    backward together.
    """
    batch, size = x.shape[0], x.shape[1:].numel()
    if not y.requires_grad:
        return x.new_zeros(batch, size, size)
    identity = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:])
    batched = rows > 1
    parts = []
    for start in range(0, size, rows):
        chosen = identity[start : start + rows].expand(-1, *x.shape)
        found = torch.autograd.grad(
            y,
            x,
            chosen if batched else chosen[0],
            retain_graph=True,
            create_graph=create_graph,
            is_grads_batched=batched,
            allow_unused=True,
        )
        # None where y does not depend on x; torch's annotation leaves that out.
        part = cast("Tensor | None", found[0])
        if part is None:
            return x.new_zeros(batch, size, size)
        parts.append(part if batched else part[None])
    jacobian = parts[0] if len(parts) == 1 else torch.cat(parts)
    return jacobian.reshape(size, batch, size).transpose(0, 1)


def log_abs_det(matrix: Tensor) -> Tensor:
    """Log of the absolute determinant, ``(*batch, D, D)`` to ``(*batch,)``; closed form up to 3x3."""
    size = matrix.shape[-1]
    if size > 3:
        return torch.linalg.slogdet(matrix).logabsdet
    rows = [row.unbind(-1) for row in matrix.unbind(-2)]
    if size == 1:
        det = rows[0][0]
    elif size == 2:
        (a, b), (c, d) = rows
        det = a * d - b * c
    else:
        (a, b, c), (d, e, f), (g, h, i) = rows
        det = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    return det.abs().log()


@dataclass(frozen=True, kw_only=True)
class Exact:
    r"""The exact log-determinant, from every sample's dense Jacobian.

    .. math:: \log|\det(I + J_f(x))|

    One forward pass, :math:`D` reverse passes run as a batch, then determinants in closed form up to 3 x 3 and by LU
    beyond. Differentiable in ``x`` and ``tensors`` as often as ``fn`` is. The error given is an allowance for rounding,
    :math:`32\, \epsilon D / (1 - c)`.

    Example::

        >>> import torch
        >>> from pyro_equiflow.logdet import Exact
        >>> matrix = torch.tensor([[0.5, 0.0], [0.3, -0.5]])
        >>> found = Exact()(lambda x, a: x @ a.T, torch.randn(4, 2), (matrix,), lipschitz=0.7, training=True)
        >>> found.value.exp()  # 1.5 * 0.5
        tensor([0.7500, 0.7500, 0.7500, 0.7500])

    :param rows: rows of the Jacobian found at once: memory against speed. With 1 the reverse passes run one by one,
        which asks nothing of :func:`torch.vmap`.
    :raises ValueError: ``rows`` is not a positive integer. For what a call raises, see :class:`Estimator`.

    References: Lu et al., Implicit Normalizing Flows, arXiv 2103.09527, whose experiments on toys use it.
    """

    rows: int = 64

    def __post_init__(self) -> None:
        check_positive("rows", self.rows)

    def __call__(
        self, fn: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor], *, lipschitz: float, training: bool
    ) -> LogDet:
        """The exact log-det at ``x``; ``training`` makes no difference. See :class:`Estimator`."""
        check_call(x, lipschitz)
        size = x.shape[1:].numel()
        with forward_pass(fn, x, tensors) as (x, y, _, keep):
            jacobian = dense_jacobian(y, x, self.rows, create_graph=keep)
            value = log_abs_det(jacobian + torch.eye(size, dtype=x.dtype, device=x.device))
            if not keep:
                value, y = value.detach(), y.detach()
        error = torch.full_like(value, rounding_allowance(size, lipschitz, x.dtype), requires_grad=False)
        return LogDet(value, error, torch.zeros_like(error), y)
