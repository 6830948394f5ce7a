# SPDX-License-Identifier: Apache-2.0
"""The loop that every solver shares: certified errors, a stopping rule for each sample, reports of failure."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_equiflow.errors import ConvergenceError
from pyro_equiflow.ops.arguments import check_dtype, check_instance, check_number, set_fields
from pyro_equiflow.ops.warning import warn_caller
from pyro_equiflow.solvers.checks import OnFailure, check_batch, check_certificate, check_contraction, check_stopping

__all__ = [
    "Map",
    "Proposals",
    "Solution",
    "Solver",
    "event_norm",
    "power_of_two",
    "report",
]

Map = Callable[[Tensor, "Tensor | None"], Tensor]

# Up to where the default tolerance gives way to what rounding leaves, relative.
_COARSEST = 1e-4


class Solution(NamedTuple):
    r"""What a solver found, sample by sample.

    Example::

        >>> import torch
        >>> from pyro_equiflow.solvers import Anderson
        >>> solution = Anderson().solve(lambda x, index: 0.5 * x + 1, torch.zeros(3, 2), lipschitz=0.5)
        >>> bool(((solution.value - 2).norm(dim=1) <= solution.error).all()), bool(solution.converged.all())
        (True, True)

    :ivar value: the root as found, shape ``(B, *event)``, no graph.
    :ivar error: bound on the distance (2-norm over the event) to the true root, shape ``(B,)``, float64.
    :ivar residual: :math:`|\phi(x) - x|` at ``value``, shape ``(B,)``, float64.
    :ivar converged: whether ``error`` met the tolerance, shape ``(B,)``, bool.
    :ivar steps: evaluations of :math:`\phi` spent on each sample, shape ``(B,)``, int64.
    """

    value: Tensor
    error: Tensor
    residual: Tensor
    converged: Tensor
    steps: Tensor


def event_norm(x: Tensor) -> Tensor:
    """2-norm over all but the first dimension, in float64: squares of small float32 numbers would vanish."""
    return torch.linalg.vector_norm(x if x.dim() == 2 else _flat(x), dim=1, dtype=torch.float64)


def power_of_two(u: Tensor) -> Tensor:
    """About the largest entry of each event, 1 where that is 0, without a graph; shape ``(B, *(1, ...))``.

    The right-hand sides of linear systems are divided by it, which is exact: so that systems are solved relative to
    them.
    """
    largest = _flat(u.detach()).abs().amax(1).double()
    exponent = torch.where(largest > 0, largest, 1.0).log2().floor()
    limit = 120 if u.dtype == torch.float32 else 1000
    return torch.exp2(exponent.clamp(-limit, limit)).to(u.dtype).reshape(-1, *(1 for _ in u.shape[1:]))


class Proposals(Protocol):
    """Where to evaluate next: the part in which solvers differ. Rows are the samples still active."""

    def propose(self, x: Tensor, f: Tensor, residual: Tensor) -> Tensor:
        """The next points, from the last ones ``x``, their images ``f`` and residuals; shape ``(b, n)``."""

    def keep(self, rows: Tensor) -> None:
        """Forgets all rows but these (indices)."""


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    r"""Finds :math:`x^* = \phi(x^*)` for a batch of samples, where :math:`\phi` has Lipschitz constant :math:`c < 1`.

    By Banach's theorem the root exists, is the only one, and

    .. math:: |x - x^*| \le \frac{|\phi(x) - x|}{1 - c}

    in the norm in which :math:`c` holds, here the 2-norm over the event. The **certified error** is that bound with
    the rounding of :math:`\phi` counted in,

    .. math:: \frac{|\phi(x) - x| + k \epsilon\, (\max(1, |x|) + s)}{1 - c},

    where :math:`s`, ``scale``, is the size of what :math:`\phi` adds to what it makes of :math:`x`: data, contexts and
    biases may be far longer than the root. Without it a residual that rounds to 0 would claim an exact root.

    A sample has converged when its certified error is at most ``tolerance`` times :math:`\max(1, |x|)`: relative to the
    root where :math:`|x| > 1`, absolute below, whatever :math:`s` is. Where rounding alone leaves more, for a large
    :math:`s`, a tolerance that was asked for is not met, and that is a failure. The default one gives way: it becomes
    four times what rounding leaves, where that is at most 1e-4; else the sample has failed as well.

    A converged sample leaves the batch: :math:`\phi` is evaluated on the others only, and what it returns for one
    sample enters no other. So a sample's result is the same to the last bit whatever its batch, if :math:`\phi` itself
    rounds a sample alike in any batch (matrix products need not).

    Example::

        >>> import torch
        >>> from pyro_equiflow.solvers import Anderson, FixedPoint
        >>> problem = lambda x, index: 0.9 * x.cos(), torch.zeros(1, 2)
        >>> plain, mixed = (solver.solve(*problem, lipschitz=0.9) for solver in (FixedPoint(), Anderson()))
        >>> bool(mixed.steps < plain.steps)
        True

    :param rounding: :math:`k`: how many machine epsilons, relative to :math:`\max(1, |x|) + s`, an evaluation of
        :math:`\phi` may be off. A model of its rounding, not a proof: raise it for deep or badly scaled maps.
    """

    rounding: float = 2.0

    def __post_init__(self) -> None:
        set_fields(self, rounding=check_number("rounding", self.rounding, "[0, inf)"))

    @abstractmethod
    def _proposals(self, lipschitz: float) -> Proposals:
        """The rule of this solver, for one call of :meth:`solve`."""

    def _headroom(self, lipschitz: float) -> float:
        """How far above what rounding leaves the default tolerance has to stay for the iteration to get there."""
        return 4.0

    def solve(
        self,
        phi: Map,
        x0: Tensor,
        *,
        lipschitz: float,
        tolerance: float | None = None,
        strict: bool | None = None,
        scale: Tensor | None = None,
        max_steps: int | None = None,
        on_failure: OnFailure = "raise",
    ) -> Solution:
        r"""Solves :math:`x = \phi(x)`, without a graph.

        :param phi: ``phi(x, index)``: ``x`` has shape ``(b, *event)``, and ``index`` says which samples of the batch
            its rows are: an int64 tensor of shape ``(b,)``, or ``None`` for all of them in order.
        :param x0: where to start, shape ``(B, *event)``, float32 or float64.
        :param lipschitz: an upper bound :math:`c` of the Lipschitz constant, in [0, 1).
        :param tolerance: the relative certified error to reach; by default 1e-12, and where rounding allows less, in
            float32, four times what it leaves: about ``1e-6 / (1 - c)`` (more for :class:`FixedPoint` at ``c > 0.94``).
        :param strict: whether a sample fails whose rounding alone leaves more than ``tolerance``; by default where one
            is given. Otherwise the tolerance gives way for it as the default one does.
        :param scale: :math:`s` for each sample, shape ``(B,)``: the lengths, summed, of data, contexts and biases that
            :math:`\phi` adds to what it makes of :math:`x`; by default 0.
        :param max_steps: most evaluations per sample; by default 20 more than twice what the contraction guarantees for
            the plain iteration, so that failing means that ``lipschitz`` is no bound or that :math:`\phi`
            rounds coarsely.
        :param on_failure: ``"raise"``, ``"warn"`` or ``"ignore"`` samples that have not converged; the best point seen
            is what they return.
        :return: a :class:`Solution`.
        :raises ValueError: an argument out of range, a tolerance below what the dtype can certify, a non-finite ``x0``,
            or :math:`\phi` non-finite or of another shape or dtype there.
        :raises ConvergenceError: a sample did not converge, with ``on_failure="raise"``.

        References: Banach's fixed-point theorem; Behrmann et al., *Invertible residual networks* (arXiv 1811.00995).
        """
        check_instance("phi", phi, Callable, "a map (x, index) to x")
        check_batch("x0", x0)
        check_contraction(lipschitz)
        check_stopping(tolerance, max_steps, on_failure)
        strict = check_certificate(strict, scale, x0, tolerance)
        return self._iterate(phi, x0, lipschitz, tolerance, strict, scale, max_steps, on_failure)

    @torch.no_grad()
    def _iterate(
        self,
        phi: Map,
        x0: Tensor,
        lipschitz: float,
        tolerance: float | None,
        strict: bool,
        scale: Tensor | None,
        max_steps: int | None,
        on_failure: OnFailure,
    ) -> Solution:
        """As :meth:`solve`, of arguments that have been checked."""
        slack, headroom = self.rounding * torch.finfo(x0.dtype).eps, self._headroom(lipschitz)
        if tolerance is None:
            tolerance = self._default_tolerance(x0.dtype, lipschitz)
        elif not slack / (1 - lipschitz) < tolerance:
            raise ValueError(
                f"tolerance: expected above {slack / (1 - lipschitz):.1e}, which is what rounding leaves in {x0.dtype} "
                f"with lipschitz={lipschitz:g}, found {tolerance!r}: raise it or use float64"
            )
        _check_finite("x0: expected finite values", x0)
        x = _flat(x0.detach())
        total = len(x)
        value = x.clone()
        relative = x.new_full((total,), math.inf, dtype=torch.float64)
        residual = relative.clone()
        steps = torch.zeros(total, dtype=torch.long, device=x.device)
        active = torch.arange(total, device=x.device)
        added = torch.zeros_like(relative) if scale is None else slack * scale.detach().to(relative)
        all_added = added
        best, best_relative, best_residual = x, relative, residual
        proposals = self._proposals(lipschitz)
        step, limit = 0, max_steps or 0
        while len(active):
            step += 1
            index = None if len(active) == total else active
            image = phi(x.reshape(len(x), *x0.shape[1:]), index)
            if step == 1:
                _check_image(image, x0)
            f = _flat(image)
            found = event_norm(f - x)
            size = event_norm(x).clamp(min=1)
            measured = ((found + added) / size + slack) / (1 - lipschitz)
            if not limit:
                # c^n r <= (tolerance (1 - c) - k eps) max(1, |x|) - k eps s for the plain iteration, where positive.
                room = tolerance * (1 - lipschitz) - slack
                distance = (found / torch.where(added < room, room - added, room / 4)).max().item()
                guaranteed = math.log(max(distance, 1.0)) / -math.log(max(lipschitz, 1e-3))
                limit = 2 * math.ceil(guaranteed) + 20
            better = measured < best_relative
            best = torch.where(better[:, None], x, best)
            best_relative = torch.where(better, measured, best_relative)
            best_residual = torch.where(better, found, best_residual)
            leaving = measured <= tolerance
            if scale is not None:
                # What rounding leaves more to is as near as more steps would come.
                left = (added / size + slack) / (1 - lipschitz)
                leaving |= (measured <= headroom * left) & (not strict or left >= tolerance)
            if step >= limit:
                leaving = torch.ones_like(leaving)
            if leaving.any():
                out = leaving.nonzero()[:, 0]  # and index_select: half the time of masks on small tensors
                gone = active.index_select(0, out)
                value.index_copy_(0, gone, best.index_select(0, out))
                relative.index_copy_(0, gone, best_relative.index_select(0, out))
                residual.index_copy_(0, gone, best_residual.index_select(0, out))
                steps.index_fill_(0, gone, step)
                if len(out) == len(active):
                    break
                rows = (~leaving).nonzero()[:, 0]
                active, added, best, best_relative, best_residual, x, f, found = [
                    t.index_select(0, rows) for t in (active, added, best, best_relative, best_residual, x, f, found)
                ]
                proposals.keep(rows)
            x = proposals.propose(x, f, found)
        size = event_norm(value).clamp(min=1)
        converged = relative <= tolerance
        if not strict:
            left = (all_added / size + slack) / (1 - lipschitz)
            converged |= (relative <= headroom * left) & (left <= _COARSEST)
        solution = Solution(value.reshape(x0.shape), relative * size, residual, converged, steps)
        report(solution, tolerance, lipschitz, on_failure)
        return solution

    def default_tolerance(self, dtype: torch.dtype, lipschitz: float) -> float:
        """The relative certified error that is asked for where none is given, see :meth:`solve`."""
        check_dtype("dtype", dtype)
        check_contraction(lipschitz)
        return self._default_tolerance(dtype, lipschitz)

    def _default_tolerance(self, dtype: torch.dtype, lipschitz: float) -> float:
        floor = max(self.rounding, 1.0) * torch.finfo(dtype).eps / (1 - lipschitz)
        return max(1e-12, self._headroom(lipschitz) * floor)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _count(flags: Tensor) -> str:
    return f"{int(flags.sum())} of {len(flags)} samples (first: {int(flags.nonzero()[0, 0])})"


def _check_image(image: Tensor, x0: Tensor) -> None:
    if image.shape != x0.shape or image.dtype != x0.dtype:
        raise ValueError(
            f"phi: expected {x0.dtype} of shape {tuple(x0.shape)} as x0, found {image.dtype} of {tuple(image.shape)}"
        )
    _check_finite("phi: expected finite values at x0", image, ": look at the weights")


def _check_finite(expected: str, x: Tensor, remedy: str = "") -> None:
    finite = torch.isfinite(_flat(x)).all(dim=1)
    if not finite.all():
        raise ValueError(f"{expected}, found {_count(~finite)} that are not{remedy}")


def report(solution: Solution, tolerance: float, lipschitz: float, on_failure: OnFailure) -> None:
    """Raises or warns, as ``on_failure`` says, where a sample has not converged."""
    if on_failure == "ignore" or solution.converged.all():
        return
    relative = solution.error / event_norm(solution.value).clamp(min=1)
    worst = int(relative.argmax())
    message = (
        f"{_count(~solution.converged)} did not converge in {int(solution.steps.max())} steps: worst residual "
        f"{solution.residual[worst].item():.2e}, certified error {solution.error[worst].item():.2e}, relative "
        f"{relative[worst].item():.2e}, expected at most tolerance={tolerance:.2e} with lipschitz={lipschitz:g}. "
        "Raise max_steps or tolerance, use float64, a smaller Lipschitz coefficient, or contexts and biases that are "
        "not far longer than the events, since their rounding counts; if max_steps was not set, "
        "check that lipschitz does bound the map"
    )
    if on_failure == "raise":
        raise ConvergenceError(message)
    warn_caller(message, RuntimeWarning)
