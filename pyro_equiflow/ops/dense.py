# SPDX-License-Identifier: Apache-2.0
"""Dense Jacobians of small events, and closed-form algebra for batches of tiny matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from pyro_equiflow.ops.tracing import in_torch_func

__all__ = ["dense_jacobian", "log_det_definite", "pulled_jacobian", "solve_definite"]

# Elimination written out on columns beat batched LU up to here (1000 matrices, one thread).
_CLOSED_FORM = 3


def dense_jacobian(y: Tensor, x: Tensor, rows: int, create_graph: bool) -> Tensor:
    """Jacobians ``(B, D, D)`` of ``y = fn(x)`` a sample, ``rows`` rows at a time by batched reverse passes.

    Reverse passes over one forward pass were faster than forward mode at every event size tried, forward and
    backward together.

    :param y: shape ``(B, *event)``, on a graph to ``x`` that is kept; a row depends on the same row of ``x`` only.
    :param x: shape ``(B, *event)``.
    :param rows: with 1 the reverse passes run one by one, which asks nothing of :func:`torch.vmap`.
    :param create_graph: whether the result can be differentiated.
    """
    batch, size = x.shape[0], x.shape[1:].numel()
    if not y.requires_grad:
        return x.new_zeros(batch, size, size)
    identity = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:])
    if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
        rows = 1  # anomaly mode looks at values, which a batch of gradients does not show
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


def pulled_jacobian(pull: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """Jacobians ``(B, D, D)`` from ``p -> p^T J``, ``rows`` rows at a time; as differentiable as ``pull``.

    :param pull: takes and gives the shape of ``x``, under :func:`torch.vmap` too.
    :param x: shape ``(B, *event)``.
    """
    batch, size = x.shape[0], x.shape[1:].numel()
    identity = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:]).expand(-1, *x.shape)
    return torch.vmap(pull, chunk_size=rows)(identity).reshape(size, batch, size).transpose(0, 1)


def log_det_definite(matrix: Tensor) -> Tensor:
    r"""Log-determinant where :math:`A + A^\top` is positive definite, as of :math:`A = 1 + J` with :math:`|J| < 1`.

    The determinant is positive then. Near a singular matrix a sum of products cancels; pivots do not, see
    :func:`solve_definite`: what rounding does is what changes of some ulp in the entries would do.

    :param matrix: shape ``(*batch, D, D)``.
    :return: shape ``(*batch,)``, differentiable.
    """
    if matrix.shape[-1] > _CLOSED_FORM:
        if in_torch_func():
            # torch 2.13: second derivatives of slogdet, forward mode in a batch, are wrong; those of LU are right.
            return torch.linalg.lu_factor(matrix).LU.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        return torch.linalg.slogdet(matrix).logabsdet
    a, _ = _eliminated([list(row.unbind(-1)) for row in matrix.unbind(-2)])
    # One logarithm each: the product of small pivots may vanish.
    logs = [row[k].abs().log() for k, row in enumerate(a)]
    return sum(logs[1:], logs[0])


def solve_definite(matrix: Tensor, right: Tensor) -> Tensor:
    r"""Solves :math:`A z = b` where :math:`A + A^\top` is positive definite, as it is of :math:`A = 1 - J^\top` with
    :math:`|J| < 1` and of a Gram matrix with a shift.

    Such matrices need no pivots (Golub and Van Loan, *Matrix Computations*, section 4.2.2), so up to 3 x 3 the
    elimination is written out, elementwise: it rounds a matrix alike in any batch. Beyond, LU with pivots. A singular
    matrix gives non-finite numbers, no error.

    :param matrix: shape ``(B, D, D)``.
    :param right: shape ``(B, D)``.
    :return: shape ``(B, D)``, differentiable in both.
    """
    size = right.shape[1]
    if size > _CLOSED_FORM:
        return torch.linalg.solve_ex(matrix, right[:, :, None])[0][:, :, 0]
    a, b = _eliminated([list(row.unbind(1)) for row in matrix.unbind(1)], list(right.unbind(1)))
    z: list[Tensor] = []
    for k in reversed(range(size)):
        known = b[k]
        for j, value in zip(range(size - 1, k, -1), z):
            known = known - a[k][j] * value
        z.append(known / a[k][k])
    return torch.stack(z[::-1], 1) if z else right


def _eliminated(a: list[list[Tensor]], b: Sequence[Tensor] = ()) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Rows ``a`` of matrices, and right-hand sides, after elimination without pivots; ``a`` holds below its diagonal
    what it held before."""
    a, b = [list(row) for row in a], list(b)
    for k in range(len(a)):
        for i in range(k + 1, len(a)):
            factor = a[i][k] / a[k][k]
            for j in range(k + 1, len(a)):
                a[i][j] = a[i][j] - factor * a[k][j]
            if b:
                b[i] = b[i] - factor * b[k]
    return a, b
