# SPDX-License-Identifier: Apache-2.0
"""The loop that every solver shares: certified errors, a stopping rule for each sample, reports of failure."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from pyro_equiflow.errors import ConvergenceError
from pyro_equiflow.ops.arguments import (
    check_choice,
    check_dtype,
    check_flag,
    check_instance,
    check_integer,
    check_number,
    set_fields,
)
from pyro_equiflow.ops.warning import warn_caller

__all__ = [
    "Map",
    "OnFailure",
    "Proposals",
    "Solution",
    "Solver",
    "check_batch",
    "check_contraction",
    "check_stopping",
    "event_norm",
    "power_of_two",
    "report",
    "take",
]

Map = Callable[[Tensor, "Tensor | None"], Tensor]
OnFailure = Literal["raise", "warn", "ignore"]


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
    return torch.linalg.vector_norm(_flat(x), dim=1, dtype=torch.float64)


def power_of_two(u: Tensor) -> Tensor:
    """About the largest entry of each event, 1 where that is 0, without a graph; shape ``(B, *(1, ...))``.

    The right-hand sides of linear systems are divided by it, which is exact: so that systems are solved relative to
    them.
    """
    largest = _flat(u.detach()).abs().amax(1).double()
    exponent = torch.where(largest > 0, largest, 1.0).log2().floor()
    limit = 120 if u.dtype == torch.float32 else 1000
    return torch.exp2(exponent.clamp(-limit, limit)).to(u.dtype).reshape(-1, *(1 for _ in u.shape[1:]))


def take(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` for indices of rows, in half the time on small tensors."""
    return x.index_select(0, rows)


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

    @torch.no_grad()
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
        strict = check_certificate(strict, scale, x0, tolerance)
        tolerance = self._check(phi, x0, lipschitz, tolerance, max_steps, on_failure)
        slack = self.rounding * torch.finfo(x0.dtype).eps
        x = _flat(x0.detach())
        total = len(x)
        value = x.clone()
        relative, residual = (x.new_full((total,), math.inf, dtype=torch.float64) for _ in range(2))
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
                leaving |= (measured <= self._headroom(lipschitz) * left) & (not strict or left >= tolerance)
            if step >= limit:
                leaving = torch.ones_like(leaving)
            if leaving.any():
                out = leaving.nonzero()[:, 0]
                gone = take(active, out)
                value.index_copy_(0, gone, take(best, out))
                relative.index_copy_(0, gone, take(best_relative, out))
                residual.index_copy_(0, gone, take(best_residual, out))
                steps.index_fill_(0, gone, step)
                if len(out) == len(active):
                    break
                rows = (~leaving).nonzero()[:, 0]
                active, added, best, best_relative, best_residual, x, f, found = (
                    take(t, rows) for t in (active, added, best, best_relative, best_residual, x, f, found)
                )
                proposals.keep(rows)
            x = proposals.propose(x, f, found)
        size = event_norm(value).clamp(min=1)
        converged = relative <= tolerance
        if not strict:
            left = (all_added / size + slack) / (1 - lipschitz)
            converged |= (relative <= self._headroom(lipschitz) * left) & (left <= _COARSEST)
        solution = Solution(value.reshape(x0.shape), relative * size, residual, converged, steps)
        report(solution, tolerance, lipschitz, on_failure)
        return solution

    def default_tolerance(self, dtype: torch.dtype, lipschitz: float) -> float:
        """The relative certified error that is asked for where none is given, see :meth:`solve`."""
        check_dtype("dtype", dtype)
        check_contraction(lipschitz)
        floor = max(self.rounding, 1.0) * torch.finfo(dtype).eps / (1 - lipschitz)
        return max(1e-12, self._headroom(lipschitz) * floor)

    def _check(
        self, phi: Map, x0: Tensor, lipschitz: float, tolerance: float | None, max_steps: int | None, on_failure: str
    ) -> float:
        check_instance("phi", phi, Callable, "a map (x, index) to x")
        check_batch("x0", x0)
        check_contraction(lipschitz)
        check_stopping(tolerance, max_steps, on_failure)
        floor = self.rounding * torch.finfo(x0.dtype).eps / (1 - lipschitz)
        if tolerance is None:
            tolerance = self.default_tolerance(x0.dtype, lipschitz)
        elif not floor < tolerance:
            raise ValueError(
                f"tolerance: expected above {floor:.1e}, which is what rounding leaves in {x0.dtype} with "
                f"lipschitz={lipschitz:g}, found {tolerance!r}: raise it or use float64"
            )
        finite = torch.isfinite(_flat(x0)).all(dim=1)
        if not finite.all():
            raise ValueError(f"x0: expected finite values, found {_count(~finite)} that are not")
        return tolerance


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


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _count(flags: Tensor) -> str:
    return f"{int(flags.sum())} of {len(flags)} samples (first: {int(flags.nonzero()[0, 0])})"


def _check_image(image: Tensor, x0: Tensor) -> None:
    if image.shape != x0.shape or image.dtype != x0.dtype:
        raise ValueError(
            f"phi: expected {x0.dtype} of shape {tuple(x0.shape)} as x0, found {image.dtype} of {tuple(image.shape)}"
        )
    finite = torch.isfinite(_flat(image)).all(dim=1)
    if not finite.all():
        raise ValueError(
            f"phi: expected finite values at x0, found {_count(~finite)} that are not: look at the weights"
        )


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
