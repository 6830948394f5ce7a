# SPDX-License-Identifier: Apache-2.0
"""Gradients of a fixed point with respect to what its map depends on: implicit, or unrolled for checking."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_equiflow.solvers.iteration import Map, OnFailure, Solution, Solver, event_norm
from pyro_equiflow.solvers.methods import Anderson

__all__ = ["Adjoint", "ImplicitAdjoint", "UnrolledAdjoint", "fixed_point"]


class _Problem(NamedTuple):
    """The map ``phi(x, *tensors)``, which tensors hold a row for each sample, and its Lipschitz bound."""

    phi: Callable[..., Tensor]
    batched: tuple[bool, ...]
    lipschitz: float

    def rows(self, tensors: Sequence[Tensor], index: Tensor | None) -> list[Tensor]:
        if index is None:
            return list(tensors)
        return [t[index] if per_sample else t for t, per_sample in zip(tensors, self.batched)]


class Adjoint(ABC):
    """How gradients pass from a fixed point to the tensors that its map depends on."""

    @abstractmethod
    def attach(
        self,
        phi: Callable[..., Tensor],
        value: Tensor,
        tensors: Sequence[Tensor],
        *,
        lipschitz: float,
        batched: Sequence[bool] | None = None,
    ) -> Tensor:
        r"""The fixed point with a graph to ``tensors``.

        :param phi: the map, ``phi(x, *tensors)``, differentiable; it may depend on nothing else that needs a gradient.
        :param value: the solved fixed point, shape ``(B, *event)``.
        :param tensors: what the map depends on: weights and data.
        :param lipschitz: upper bound of the map's Lipschitz constant in ``x``, in [0, 1).
        :param batched: for each tensor whether its first dimension is the batch; by default none is.
        :return: shape and dtype of ``value``.
        """


@dataclass(frozen=True, kw_only=True)
class ImplicitAdjoint(Adjoint):
    r"""Implicit differentiation: with :math:`J = \partial\phi/\partial x` at the fixed point and an upstream gradient
    :math:`u`,

    .. math:: (1 - J^\top)\, g = u, \qquad \bar\theta = \Bigl(\frac{\partial\phi}{\partial\theta}\Bigr)^{\!\top} g.

    :math:`g` is itself the fixed point of :math:`g \mapsto J^\top g + u`, a contraction with the same constant, solved
    by vector-Jacobian products after each sample's :math:`u` is scaled by a power of two to a length of about 1: a
    loss scaled up or down gives the gradient scaled alike, and the certified error of :class:`Solver` holds relative
    to :math:`u`.
    The graph holds the value and ``tensors`` only, however many steps were taken. Derivatives of any order are right:
    with ``create_graph=True`` the linear solve is differentiated implicitly too.

    :param solver: of the linear system.
    :param tolerance: relative to :math:`u`, as in :meth:`Solver.solve`.
    :param max_steps: as in :meth:`Solver.solve`.
    :param on_failure: as in :meth:`Solver.solve`; the error is raised by ``backward()``.

    References: Bai, Kolter and Koltun, *Deep equilibrium models* (arXiv 1909.01377); Blondel et al., *Efficient and
    modular implicit differentiation* (arXiv 2105.15183).
    """

    solver: Solver = field(default_factory=Anderson)
    tolerance: float | None = None
    max_steps: int | None = None
    on_failure: OnFailure = "raise"

    def attach(
        self,
        phi: Callable[..., Tensor],
        value: Tensor,
        tensors: Sequence[Tensor],
        *,
        lipschitz: float,
        batched: Sequence[bool] | None = None,
    ) -> Tensor:
        """See :meth:`Adjoint.attach`; what ``value`` holds is returned to the last bit."""
        problem = _Problem(phi, _per_sample(tensors, batched, value), lipschitz)
        return _Implicit.apply(self, problem, value.detach(), *tensors)

    def _solve(self, problem: _Problem, value: Tensor, tensors: Sequence[Tensor], upstream: Tensor) -> Tensor:
        """The solution of the linear system, without a graph."""
        if not torch.isfinite(upstream).all():
            raise ValueError("expected a finite gradient at the fixed point in backward(), found one that is not")
        exponent = torch.frexp(event_norm(upstream)).exponent.clamp(-120, 120)
        exponent = exponent.reshape(-1, *(1 for _ in upstream.shape[1:]))
        scaled = torch.ldexp(upstream, -exponent)
        solution = self.solver.solve(
            _transposed(problem, value, tensors, scaled),
            scaled,
            lipschitz=problem.lipschitz,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
            on_failure=self.on_failure,
        )
        return torch.ldexp(solution.value, exponent)


@dataclass(frozen=True, kw_only=True)
class UnrolledAdjoint(Adjoint):
    r"""Steps :math:`x \mapsto \phi(x)` from the fixed point with a graph through each: a reference to check others by.

    The gradient is the sum of :math:`(J^\top)^k u` for :math:`k` below ``steps``, so it lacks at most
    :math:`c^n / (1 - c)` of :math:`u`. Memory grows with the steps.

    :param steps: how many; by default what brings that remainder below 1e-12.
    """

    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: expected a positive integer or None, found {self.steps!r}")

    def attach(
        self,
        phi: Callable[..., Tensor],
        value: Tensor,
        tensors: Sequence[Tensor],
        *,
        lipschitz: float,
        batched: Sequence[bool] | None = None,
    ) -> Tensor:
        """See :meth:`Adjoint.attach`; the value is that of the last step."""
        _per_sample(tensors, batched, value)
        steps = self.steps
        if steps is None:
            steps = math.ceil(math.log(1e-12 * (1 - lipschitz)) / math.log(min(max(lipschitz, 1e-3), 1 - 1e-12)))
        x = value.detach()
        for _ in range(steps):
            x = phi(x, *tensors)
        return x


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
    max_steps: int | None = None,
    on_failure: OnFailure = "raise",
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
    :param adjoint: by default ``ImplicitAdjoint()``.
    :param tolerance: as in :meth:`Solver.solve`, and so are ``max_steps`` and ``on_failure``.
    :return: the value with its graph, and the :class:`Solution`.
    :raises ValueError: as :meth:`Solver.solve`, or ``batched`` that does not fit.
    :raises ConvergenceError: as :meth:`Solver.solve`.
    """
    problem = _Problem(phi, _per_sample(tensors, batched, x0), lipschitz)
    solution = (solver or Anderson()).solve(
        _on_rows(problem, [t.detach() for t in tensors]),
        x0,
        lipschitz=lipschitz,
        tolerance=tolerance,
        max_steps=max_steps,
        on_failure=on_failure,
    )
    adjoint = adjoint or ImplicitAdjoint()
    return adjoint.attach(phi, solution.value, tensors, lipschitz=lipschitz, batched=batched), solution


def _per_sample(tensors: Sequence[Tensor], batched: Sequence[bool] | None, x: Tensor) -> tuple[bool, ...]:
    flags = tuple(batched) if batched is not None else len(tensors) * (False,)
    if len(flags) != len(tensors):
        raise ValueError(f"batched: expected one flag for each of {len(tensors)} tensors, found {len(flags)}")
    for i, (tensor, per_sample) in enumerate(zip(tensors, flags)):
        if per_sample and (tensor.dim() < 1 or len(tensor) != len(x)):
            raise ValueError(
                f"tensors[{i}]: expected {len(x)} rows, one for each sample, found shape {tuple(tensor.shape)}: "
                "change it or its flag in batched"
            )
    return flags


def _on_rows(problem: _Problem, tensors: Sequence[Tensor]) -> Map:
    """The map in the form solvers take; rows are taken once for each set of active samples."""
    last: tuple[Tensor | None, list[Tensor]] = (None, list(tensors))

    def phi(x: Tensor, index: Tensor | None) -> Tensor:
        nonlocal last
        if index is not last[0]:
            last = (index, problem.rows(tensors, index))
        return problem.phi(x, *last[1])

    return phi


def _transposed(problem: _Problem, value: Tensor, tensors: Sequence[Tensor], upstream: Tensor) -> Map:
    r"""The map :math:`g \mapsto J^\top g + u`; the graph of one evaluation serves until samples leave."""
    rows: tuple[Tensor, Tensor, Tensor] | None = None
    last: Tensor | None = None

    def phi(g: Tensor, index: Tensor | None) -> Tensor:
        nonlocal rows, last
        if rows is None or index is not last:
            with torch.enable_grad():
                x = (value if index is None else value[index]).detach().requires_grad_()
                image = problem.phi(x, *problem.rows([t.detach() for t in tensors], index))
            rows, last = (x, image, upstream if index is None else upstream[index]), index
        x, image, u = rows
        return _pull_back(image, x, g, create_graph=False, retain_graph=True) + u

    return phi


def _pull_back(image: Tensor, x: Tensor, g: Tensor, **graph: bool) -> Tensor:
    if not image.requires_grad:
        return torch.zeros_like(x)
    found = torch.autograd.grad(image, x, g, allow_unused=True, **graph)[0]
    return torch.zeros_like(x) if found is None else found


class _Implicit(torch.autograd.Function):
    """Forward hands the solved value on; backward solves the adjoint system at it."""

    @staticmethod
    def forward(ctx: Any, adjoint: ImplicitAdjoint, problem: _Problem, value: Tensor, *tensors: Tensor) -> Tensor:
        output = value.clone()
        ctx.adjoint, ctx.problem = adjoint, problem
        ctx.save_for_backward(output, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = upstreams
        value, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        adjoint, problem = ctx.adjoint, ctx.problem
        again = torch.is_grad_enabled()
        with torch.no_grad():
            g = adjoint._solve(problem, value, tensors, upstream.detach())
        if again:
            # g is the fixed point of a map of value, upstream and tensors: differentiable by the same rule.
            linear = _Problem(_linear_map(problem.phi), (True, True, *problem.batched), problem.lipschitz)
            g = _Implicit.apply(adjoint, linear, g, value, upstream, *tensors)
        with torch.enable_grad():
            # Aliases: value depends on tensors as well, and that path is what g stands for.
            x = value if again else value.detach()
            leaves = [
                (t.view_as(t) if again else t.detach().requires_grad_()) if need else t.detach()
                for t, need in zip(tensors, needed)
            ]
            image = problem.phi(x, *leaves)
            wanted = [leaf for leaf, need in zip(leaves, needed) if need]
            grads = iter(torch.autograd.grad(image, wanted, g, create_graph=again, allow_unused=True))
        return (None, None, None, *(next(grads) if need else None for need in needed))


def _linear_map(phi: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def transposed(g: Tensor, value: Tensor, upstream: Tensor, *tensors: Tensor) -> Tensor:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            x = value if value.requires_grad else value.detach().requires_grad_()
            pulled = _pull_back(phi(x, *tensors), x, g, create_graph=again)
        return pulled + upstream

    return transposed
