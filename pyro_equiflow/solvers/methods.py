# SPDX-License-Identifier: Apache-2.0
"""Two solvers: the plain fixed-point iteration, and Anderson's mixing with the plain step as a safeguard."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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

    :param memory: how many differences are kept; each costs two tensors like the batch.
    :param regularization: :math:`\lambda`; never below 16 machine epsilons, where normal equations lose definiteness.
    :param rounding: see :class:`Solver`.

    References: Walker and Ni, *Anderson acceleration for fixed-point iterations* (SIAM J. Numer. Anal. 49, 2011);
    Zhang, O'Donoghue and Boyd (arXiv 1808.03971) on safeguards.
    """

    memory: int = 5
    regularization: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.memory, int) or self.memory < 1:
            raise ValueError(f"memory: expected a positive integer, found {self.memory!r}")
        if not 0 <= self.regularization < 1:
            raise ValueError(f"regularization: expected a number in [0, 1), found {self.regularization!r}")

    def _proposals(self, lipschitz: float) -> Proposals:
        return _Mixed(lipschitz, self.memory, self.regularization)


class _Mixed:
    """Slot ``i`` of a sample's memory holds one pair of differences; a slot never filled is zero and has no weight."""

    def __init__(self, lipschitz: float, memory: int, regularization: float) -> None:
        self._lipschitz = lipschitz
        self._memory = memory
        self._regularization = regularization
        self._slot = 0
        # Rows of samples: the kept point's image and residual, the bound on the next residual, whether the next point
        # is plain; the differences and the inner products of those of residuals.
        self._state: list[Tensor] = []

    def keep(self, rows: Tensor) -> None:
        self._state = [tensor[rows] for tensor in self._state]

    def propose(self, x: Tensor, f: Tensor, residual: Tensor) -> Tensor:
        r = f - x
        if not self._state:
            size, n = f.shape
            zeros = f.new_zeros(size, self._memory, n)
            gram = f.new_zeros(size, self._memory, self._memory, dtype=torch.float64)
            bound = self._lipschitz * residual
            self._state = [f, r, bound, torch.ones_like(bound, dtype=torch.bool), zeros, zeros.clone(), gram]
            return f
        base_f, base_r, bound, plain, delta_f, delta_r, gram = self._state
        self._remember(f - base_f, r - base_r, delta_f, delta_r, gram)
        # Not (a > b), so that a non-finite mixed point is refused; a plain one has nothing to fall back to.
        accepted = plain | (residual <= bound)
        column = accepted[:, None]
        base_f, base_r = torch.where(column, f, base_f), torch.where(column, r, base_r)
        bound = torch.where(accepted, self._lipschitz * bound, bound)
        self._state = [base_f, base_r, bound, ~accepted, delta_f, delta_r, gram]
        mixed = base_f - (self._weights(base_r, delta_r, gram)[:, :, None] * delta_f).sum(1)
        return torch.where(column, mixed, base_f)

    def _remember(self, new_f: Tensor, new_r: Tensor, delta_f: Tensor, delta_r: Tensor, gram: Tensor) -> None:
        # One non-finite pair would spoil every later mix.
        usable = (torch.isfinite(new_r).all(1) & torch.isfinite(new_f).all(1))[:, None]
        slot = self._slot
        delta_f[:, slot] = torch.where(usable, new_f, 0)
        delta_r[:, slot] = torch.where(usable, new_r, 0)
        # Sums of products, not batched matrix products: their rounding does not depend on the batch's size.
        row = (delta_r * delta_r[:, slot : slot + 1]).sum(2, dtype=torch.float64)
        gram[:, slot], gram[:, :, slot] = row, row
        self._slot = (slot + 1) % self._memory

    def _weights(self, r: Tensor, delta_r: Tensor, gram: Tensor) -> Tensor:
        scale = gram.diagonal(dim1=1, dim2=2).clamp(min=1e-300).rsqrt()
        matrix = scale[:, :, None] * gram * scale[:, None, :]
        shift = max(self._regularization, 16 * torch.finfo(r.dtype).eps)
        matrix = matrix + shift * torch.eye(self._memory, dtype=matrix.dtype, device=matrix.device)
        # Empty slots leave a zero row but for the shift, and a right-hand side of zero: no weight.
        right = scale * (delta_r * r[:, None]).sum(2, dtype=torch.float64)
        weights = scale * torch.linalg.solve_ex(matrix, right[:, :, None])[0][:, :, 0]
        return torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0).to(r.dtype)
