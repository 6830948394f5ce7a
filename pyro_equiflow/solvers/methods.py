# SPDX-License-Identifier: Apache-2.0
"""Two solvers: the plain fixed-point iteration, and Anderson's mixing with the plain step as a safeguard."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_equiflow.ops.arguments import check_integer, check_number, set_fields
from pyro_equiflow.ops.dense import solve_definite
from pyro_equiflow.solvers.iteration import Proposals, Solver

__all__ = ["Anderson", "FixedPoint"]


@dataclass(frozen=True, kw_only=True)
class FixedPoint(Solver):
    r"""The plain iteration :math:`x_{k+1} = \phi(x_k)`: each step shrinks the residual by :math:`c` or more.

    Example::

        >>> import torch
        >>> solution = FixedPoint().solve(lambda x, index: 0.5 * x + 1, torch.zeros(3, 2), lipschitz=0.5)
        >>> bool(((solution.value - 2).norm(dim=1) <= solution.error).all())
        True

    :param rounding: see :class:`Solver`.
    """

    def _proposals(self, lipschitz: float) -> Proposals:
        return _Plain()

    def _headroom(self, lipschitz: float) -> float:
        # Rounding errors of about 1 / (1 - c) steps add up, with random signs.
        return max(super()._headroom(lipschitz), 1 / math.sqrt(1 - lipschitz))


class _Plain:
    def propose(self, x: Tensor, f: Tensor, residual: Tensor) -> Tensor:
        return f

    def keep(self, rows: Tensor) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    r"""Anderson's mixing: with residuals :math:`r = \phi(x) - x` and their last differences,

    .. math::

        x_{k+1} = \phi(x_k) - \sum_i \gamma_i\, \Delta\phi_i, \qquad
        \gamma = \arg\min_\gamma \bigl|r_k - \sum_i \gamma_i\, \Delta r_i\bigr|^2
                 + \lambda \sum_i \gamma_i^2\, |\Delta r_i|^2,

    a least-squares problem of its own for every sample. The :math:`k`-th point is kept only if its residual is at most
    :math:`c^k |r_0|`, what the contraction guarantees for the plain iteration; else the plain step is taken from the
    point before, which meets that bound. So no sample takes more than twice the evaluations guaranteed for
    :class:`FixedPoint`; on smooth maps it takes far fewer.

    Example::

        >>> import torch
        >>> solution = Anderson().solve(lambda x, index: 0.9 * x.cos(), torch.zeros(3, 2), lipschitz=0.9)
        >>> bool(solution.converged.all())
        True

    :param memory: how many differences are kept, at most as many as an event has entries: more would be dependent.
        Each costs two tensors like the batch.
    :param regularization: :math:`\lambda`; never below 16 machine epsilons, where normal equations lose definiteness.
    :param rounding: see :class:`Solver`.

    References: Walker and Ni, *Anderson acceleration for fixed-point iterations* (SIAM J. Numer. Anal. 49, 2011);
    Zhang, O'Donoghue and Boyd (arXiv 1808.03971) on safeguards.
    """

    memory: int = 5
    regularization: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        set_fields(
            self,
            memory=check_integer("memory", self.memory, 1),
            regularization=check_number("regularization", self.regularization, "[0, 1)"),
        )

    def _proposals(self, lipschitz: float) -> Proposals:
        return _Mixed(lipschitz, self.memory, self.regularization)


class _Mixed:
    """Item ``i`` of the memory holds one pair of differences for every sample."""

    def __init__(self, lipschitz: float, memory: int, regularization: float) -> None:
        self._lipschitz = lipschitz
        self._memory = memory
        self._regularization = regularization
        self._slot = 0
        # Rows of samples: the kept point's image and residual, the bound on the next residual, whether the next point
        # is plain; the differences and the inner products of those of residuals.
        self._state: list[Tensor] = []
        self._delta_f: list[Tensor] = []
        self._delta_r: list[Tensor] = []

    def keep(self, rows: Tensor) -> None:
        self._state, self._delta_f, self._delta_r = (
            [tensor.index_select(0, rows) for tensor in tensors]
            for tensors in (self._state, self._delta_f, self._delta_r)
        )

    def propose(self, x: Tensor, f: Tensor, residual: Tensor) -> Tensor:
        r = f - x
        if not self._state:
            size, n = f.shape
            self._memory = min(self._memory, n)
            gram = f.new_zeros(size, self._memory, self._memory, dtype=torch.float64)
            bound = self._lipschitz * residual
            self._state = [f, r, bound, torch.ones_like(bound, dtype=torch.bool), gram]
            return f
        base_f, base_r, bound, plain, gram = self._state
        # Not (a > b), so that a non-finite mixed point is refused; a plain one has nothing to fall back to.
        accepted = plain | (residual <= bound)
        column = accepted[:, None]
        if self._memory:
            self._remember(f - base_f, r - base_r, torch.isfinite(residual)[:, None], gram)
        base_f, base_r = torch.where(column, f, base_f), torch.where(column, r, base_r)
        bound = torch.where(accepted, self._lipschitz * bound, bound)
        self._state = [base_f, base_r, bound, ~accepted, gram]
        mixed = base_f
        if self._memory:
            for weight, delta in zip(self._weights(base_r, gram).split(1, 1), self._delta_f):
                mixed = torch.addcmul(mixed, weight, delta, value=-1)
        return torch.where(column, mixed, base_f)

    def _remember(self, new_f: Tensor, new_r: Tensor, usable: Tensor, gram: Tensor) -> None:
        # One non-finite pair would spoil every later mix.
        if not usable.all():
            new_f, new_r = torch.where(usable, new_f, 0), torch.where(usable, new_r, 0)
        slot = self._slot
        self._delta_f[slot : slot + 1], self._delta_r[slot : slot + 1] = [new_f], [new_r]
        row = _products(self._delta_r, new_r)
        filled = row.shape[1]
        gram[:, slot, :filled], gram[:, :filled, slot] = row, row
        self._slot = (slot + 1) % self._memory

    def _weights(self, r: Tensor, gram: Tensor) -> Tensor:
        filled = len(self._delta_r)
        gram = gram[:, :filled, :filled]
        scale = gram.diagonal(dim1=1, dim2=2).clamp(min=1e-300).rsqrt()
        shift = max(self._regularization, 16 * torch.finfo(r.dtype).eps)
        # A pair of no difference leaves a zero row but for the shift, and a right-hand side of zero: no weight.
        matrix = scale[:, :, None] * gram * scale[:, None, :]
        matrix.diagonal(dim1=1, dim2=2).add_(shift)
        weights = scale * solve_definite(matrix, scale * _products(self._delta_r, r))
        return torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0).to(r.dtype)


def _products(rows: list[Tensor], vector: Tensor) -> Tensor:
    """Inner products, float64. Not by batched matrix products: their rounding depends on the batch's size."""
    return torch.stack([torch.linalg.vecdot(row, vector) for row in rows], 1).double()
