# SPDX-License-Identifier: Apache-2.0
"""The exact log-det, from the dense Jacobian of every sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_equiflow.logdet.base import (
    LogDet,
    check_call,
    forward_pass,
    rounding_allowance,
)
from pyro_equiflow.ops.arguments import check_integer, set_fields
from pyro_equiflow.ops.dense import log_det_definite
from pyro_equiflow.ops.tracing import full_precision

__all__ = ["Exact"]


@dataclass(frozen=True, kw_only=True)
class Exact:
    r"""The exact log-determinant, from every sample's dense Jacobian.

    .. math:: \log|\det(I + J_f(x))|

    One forward pass, :math:`D` reverse passes run as a batch, then determinants by elimination, written out up to
    3 x 3 and by LU beyond. Differentiable in ``x`` and ``tensors`` as often as ``fn`` is. The error given is an
    allowance for rounding, :math:`\epsilon D (32 + 4 |x|) / (1 - c)`.

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
        set_fields(self, rows=check_integer("rows", self.rows, 1))

    @full_precision
    def __call__(
        self, fn: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor], *, lipschitz: float, training: bool
    ) -> LogDet:
        """The exact log-det at ``x``; ``training`` makes no difference. See :class:`Estimator`."""
        check_call(x, lipschitz)
        size = x.shape[1:].numel()
        with forward_pass(fn, x, tensors) as run:
            x, y, keep = run.x, run.y, run.keep
            jacobian = run.jacobian(self.rows)
            value = log_det_definite(jacobian + torch.eye(size, dtype=x.dtype, device=x.device))
            if not keep:
                value, y = value.detach(), y.detach()
        error = rounding_allowance(x, lipschitz)
        return LogDet(value, error, torch.zeros_like(error), y, jacobian.detach())
