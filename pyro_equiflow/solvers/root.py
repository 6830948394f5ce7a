# SPDX-License-Identifier: Apache-2.0
"""The differentiable fixed point: solver and adjoint joined, with float64 steps for float32 where it cannot certify."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_equiflow.ops.arguments import check_flag, check_instance
from pyro_equiflow.ops.tracing import full_precision, in_torch_func, is_traced, refuse_dual_numbers
from pyro_equiflow.solvers.adjoint import Adjoint, DenseAdjoint, ImplicitAdjoint, UnrolledAdjoint
from pyro_equiflow.solvers.checks import OnFailure, check_batch, check_certificate, check_contraction, check_stopping
from pyro_equiflow.solvers.functional import Solve, Task, solve
from pyro_equiflow.solvers.iteration import Solution, Solver, event_norm, report
from pyro_equiflow.solvers.methods import Anderson
from pyro_equiflow.solvers.problem import OnRows, Problem, per_sample

__all__ = ["fixed_point"]

# Backward on 1000 samples, network of width 128: dense took half the time of vector-Jacobian products at 2 entries,
# 1.1 of it at 8 and 2 at 16 where the map contracts quickly; a third of it at 8 and all of it at 16 where it does not.
_DENSE = 8

# Made once: what does not change can be shared.
_SOLVER, _DENSE_ADJOINT, _IMPLICIT_ADJOINT = Anderson(), DenseAdjoint(), ImplicitAdjoint()

# Relative, of a refined float32 value.
_REFINED = 2e-6


@full_precision
def fixed_point(
    phi: Callable[..., Tensor],
    x0: Tensor,
    tensors: Sequence[Tensor],
    *,
    lipschitz: float,
    batched: Sequence[bool] | None = None,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    tolerance: float | None = None,
    strict: bool | None = None,
    scale: Tensor | None = None,
    max_steps: int | None = None,
    on_failure: OnFailure = "raise",
    refine: bool = False,
    wide: Callable[[], Sequence[Tensor]] | None = None,
    jacobian: Callable[[], Tensor | None] = lambda: None,
) -> tuple[Tensor, Solution]:
    r"""The fixed point :math:`x^* = \phi(x^*, \theta)` of a contraction, differentiable with respect to :math:`\theta`.

    Example::

        >>> import torch
        >>> a, b = torch.tensor(0.5, requires_grad=True), torch.ones(3, 2)
        >>> x, solution = fixed_point(lambda x, a, b: a * x + b, b, (a, b), lipschitz=0.5, batched=(False, True))
        >>> torch.autograd.grad(x.sum(), a)[0].round(decimals=3)  # of 6 / (1 - a)
        tensor(24.)

    :param phi: the map, ``phi(x, *tensors)``; each row of the result depends on the same row of ``x`` and of the
        batched tensors only.
    :param x0: where to start, shape ``(B, *event)``, float32 or float64; no gradient flows to it.
    :param tensors: everything :math:`\phi` depends on that needs a gradient or has a row for each sample.
    :param lipschitz: upper bound of the Lipschitz constant in ``x``, 2-norm over the event, in [0, 1).
    :param batched: for each tensor whether its first dimension is the batch, so that converged samples can be left
        out; by default none is.
    :param solver: by default ``Anderson()``.
    :param adjoint: by default ``DenseAdjoint()`` for events of up to 8 entries, else ``ImplicitAdjoint()``.
    :param tolerance: as in :meth:`Solver.solve`.
    :param strict: likewise.
    :param scale: likewise.
    :param max_steps: likewise.
    :param on_failure: likewise.
    :param refine: whether a float32 solution is improved in float64, where rounding keeps float32 from certifying it:
        samples whose certified relative error exceeds ``tolerance``, then by default 2e-6, are solved further with the
        floating-point ``tensors`` cast to float64, and rounded. :math:`\phi` must take either precision, ``lipschitz``
        must bound it in both, and ``max_steps`` holds in each. The certified error counts that last rounding in,
        :math:`2^{-24} |x|`; the residual is the one before it. The root is that of the map in exact arithmetic on the
        float32 ``tensors``, or on those of ``wide``. Without effect in float64.
    :param wide: gives float64 tensors in place of those cast, where more of their digits are known.
    :param jacobian: what the adjoint may ask for in the backward pass, see :meth:`Adjoint.attach`.
    :return: the value with its graph, and the :class:`Solution`.
    :raises ValueError: as :meth:`Solver.solve`, or ``batched`` that does not fit.
    :raises ConvergenceError: as :meth:`Solver.solve`.
    :raises RuntimeError: under ``torch.compile``, ``torch.export`` and the like.

    Under ``torch.func`` derivatives of any order, in reverse and forward mode, and batches over samples and over
    weights are solved for as well, by the ``adjoint``'s solver; there ``tensors`` have to be all that :math:`\phi`
    depends on, and ``wide`` and ``jacobian`` are not asked.

    Reference for ``refine``: Higham, *Accuracy and stability of numerical algorithms*, chapter 12.
    """
    if is_traced() and not in_torch_func():
        raise RuntimeError(
            "expected plain tensors, found those of torch.compile, torch.export or the like: a solver decides by "
            "values, which these do not show; leave it out of the graph"
        )
    refuse_dual_numbers("fixed_point")
    check_instance("phi", phi, Callable, "a map (x, *tensors) to x")
    check_batch("x0", x0)
    if solver is not None:
        check_instance("solver", solver, Solver, "a solver such as pyro_equiflow.solvers.Anderson()")
    if adjoint is not None:
        check_instance("adjoint", adjoint, Adjoint, "an adjoint such as pyro_equiflow.solvers.ImplicitAdjoint()")
    check_flag("refine", refine)
    if wide is not None:
        check_instance("wide", wide, Callable, "a function without arguments or None")
    check_stopping(tolerance, max_steps, on_failure)
    strict = check_certificate(strict, scale, x0, tolerance)
    check_instance("jacobian", jacobian, Callable, "a function without arguments")
    problem = Problem(phi, per_sample(tensors, batched, x0), check_contraction(lipschitz), jacobian)
    solver = solver or _SOLVER

    def solved(problem: Problem, x0: Tensor, scale: Tensor | None, tensors: Sequence[Tensor]) -> Solution:
        if refine and x0.dtype == torch.float32:
            asked = _REFINED if tolerance is None else tolerance
            solution = _refined(problem, solver, x0, tensors, wide, asked, strict, scale, max_steps)
            report(solution, asked, lipschitz, on_failure)
            return solution
        phi = OnRows(problem, tensors)
        return solver._iterate(phi, x0, lipschitz, tolerance, strict, scale, max_steps, on_failure)

    if in_torch_func():
        wide = None  # it closes over tensors, which the solver must not see there
        return _functional(problem, x0, scale, tensors, solved, adjoint)
    solution = solved(problem, x0, scale, [t.detach() for t in tensors])
    adjoint = adjoint or (_DENSE_ADJOINT if x0.shape[1:].numel() <= _DENSE else _IMPLICIT_ADJOINT)
    return adjoint._attach(problem, solution.value, tensors), solution


def _functional(
    problem: Problem,
    x0: Tensor,
    scale: Tensor | None,
    tensors: Sequence[Tensor],
    solved: Solve,
    adjoint: Adjoint | None,
) -> tuple[Tensor, Solution]:
    """As :func:`fixed_point`, on tensors of ``torch.func``."""
    by = adjoint if isinstance(adjoint, ImplicitAdjoint) else _IMPLICIT_ADJOINT

    def solve_linear(problem: Problem, x0: Tensor, scale: Tensor | None, tensors: Sequence[Tensor]) -> Solution:
        return by._solved(OnRows(problem, tensors), x0, problem.lipschitz)

    solution = solve(Task(problem, solved, solve_linear), x0, scale, tensors)
    value, known = solution.value, solution._replace(value=solution.value.detach())
    if isinstance(adjoint, UnrolledAdjoint):
        value = adjoint._attach(problem, known.value, tensors)
    return value, known


def _refined(
    problem: Problem,
    solver: Solver,
    x0: Tensor,
    tensors: Sequence[Tensor],
    wide: Callable[[], Sequence[Tensor]] | None,
    tolerance: float,
    strict: bool,
    scale: Tensor | None,
    max_steps: int | None,
) -> Solution:
    rounding = torch.finfo(x0.dtype).eps / 2
    if not tolerance > 2 * rounding:
        raise ValueError(
            f"tolerance: expected above {2 * rounding:.1e}, twice what rounding to {x0.dtype} leaves, found "
            f"{tolerance!r}: raise it or use float64"
        )
    lipschitz = problem.lipschitz
    first_tolerance = max(tolerance, solver._default_tolerance(x0.dtype, lipschitz))
    phi = OnRows(problem, tensors)
    first = solver._iterate(phi, x0, lipschitz, first_tolerance, False, scale, max_steps, "ignore")
    converged = first.error <= tolerance * event_norm(first.value).clamp(min=1)
    if converged.all():
        return first._replace(converged=converged)
    rows = (torch.ones_like(converged) if problem.whole else ~converged).nonzero()[:, 0]
    known = tensors if wide is None else wide()
    cast = [t.double() if t.is_floating_point() else t for t in problem.rows(known, rows)]
    start, scale = first.value.index_select(0, rows).double(), None if scale is None else scale.index_select(0, rows)
    phi = OnRows(problem, cast)
    further = solver._iterate(phi, start, lipschitz, tolerance - rounding, strict, scale, max_steps, "ignore")
    return Solution(
        first.value.index_copy(0, rows, further.value.to(x0.dtype)),
        first.error.index_copy(0, rows, further.error + rounding * event_norm(further.value)),
        first.residual.index_copy(0, rows, further.residual),
        converged.index_copy(0, rows, further.converged),
        first.steps.index_add(0, rows, further.steps),
    )
