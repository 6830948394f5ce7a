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

from pyro_equiflow.ops.arguments import check_instance, check_integer, set_fields
from pyro_equiflow.ops.dense import dense_jacobian, solve_definite
from pyro_equiflow.ops.tracing import full_precision
from pyro_equiflow.solvers.checks import OnFailure, check_batch, check_contraction, check_stopping
from pyro_equiflow.solvers.iteration import Map, Solution, Solver, power_of_two
from pyro_equiflow.solvers.methods import Anderson
from pyro_equiflow.solvers.problem import Problem, per_sample

__all__ = ["Adjoint", "DenseAdjoint", "ImplicitAdjoint", "UnrolledAdjoint"]


class Adjoint(ABC):
    """How gradients pass from a fixed point to the tensors that its map depends on.

    Example::

        >>> import torch
        >>> from pyro_equiflow.solvers import ImplicitAdjoint
        >>> a, root = torch.tensor(0.5, requires_grad=True), torch.tensor([[2.0]])
        >>> x = ImplicitAdjoint().attach(lambda x, a: a * x + 1, root, (a,), lipschitz=0.5)
        >>> torch.autograd.grad(x.sum(), a)[0].round(decimals=3)  # of 1 / (1 - a)
        tensor(4.)
    """

    def attach(
        self,
        phi: Callable[..., Tensor],
        value: Tensor,
        tensors: Sequence[Tensor],
        *,
        lipschitz: float,
        batched: Sequence[bool] | None = None,
        jacobian: Callable[[], Tensor | None] = lambda: None,
    ) -> Tensor:
        r"""The fixed point with a graph to ``tensors``.

        :param phi: the map, ``phi(x, *tensors)``, differentiable; it may depend on nothing else that needs a gradient.
        :param value: the solved fixed point, shape ``(B, *event)``.
        :param tensors: what the map depends on: weights and data.
        :param lipschitz: upper bound of the map's Lipschitz constant in ``x``, in [0, 1).
        :param batched: for each tensor whether its first dimension is the batch; by default none is.
        :param jacobian: asked in the backward pass for :math:`\partial\phi/\partial x` at ``value``, shape
            ``(B, D, D)``, or ``None`` where it is not known; spares an adjoint that needs it the work.
        :return: shape and dtype of ``value``, which implicit adjoints return to the last bit.
        """
        check_instance("phi", phi, Callable, "a map (x, *tensors) to x")
        check_batch("value", value)
        check_contraction(lipschitz)
        check_instance("jacobian", jacobian, Callable, "a function without arguments")
        return self._attach(Problem(phi, per_sample(tensors, batched, value), lipschitz, jacobian), value, tensors)

    @abstractmethod
    def _attach(self, problem: Problem, value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """As :meth:`attach`, of arguments that have been checked."""


class _Linear(NamedTuple):
    r"""The system :math:`(1 - J^\top)\, g = u` of a problem at its fixed point, with one evaluation on a graph.

    :ivar leaves: ``tensors``, detached and with a graph to ``image`` where a gradient is needed.
    :ivar x: the fixed point, a leaf.
    :ivar image: ``phi(x, *leaves)``.
    :ivar upstream: :math:`u`.
    """

    problem: Problem
    leaves: list[Tensor]
    x: Tensor
    image: Tensor
    upstream: Tensor


class _AtTheRoot(Adjoint):
    r"""Implicit differentiation; subclasses say how the linear system is solved."""

    def _attach(self, problem: Problem, value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return _Implicit.apply(self, problem, value.detach(), *tensors)

    @abstractmethod
    def _solve(self, linear: _Linear) -> Tensor:
        """The solution of the linear system, shape and dtype of the upstream gradient, without a graph."""


@dataclass(frozen=True, kw_only=True)
class ImplicitAdjoint(_AtTheRoot):
    r"""Implicit differentiation: with :math:`J = \partial\phi/\partial x` at the fixed point and an upstream gradient
    :math:`u`,

    .. math:: (1 - J^\top)\, g = u, \qquad \bar\theta = \Bigl(\frac{\partial\phi}{\partial\theta}\Bigr)^{\!\top} g.

    :math:`g` is itself the fixed point of :math:`g \mapsto J^\top g + u`, a contraction with the same constant, solved
    by vector-Jacobian products after each sample's :math:`u` is scaled by a power of two to entries of about 1: a
    loss scaled up or down gives the gradient scaled alike, and the certified error of :class:`Solver` holds relative
    to :math:`u`.
    The graph holds the value and ``tensors`` only, however many steps were taken. Derivatives of any order are right:
    with ``create_graph=True`` the linear solve is differentiated implicitly too.

    Example::

        >>> import torch
        >>> from pyro_equiflow.solvers import ImplicitAdjoint, fixed_point
        >>> a, b = torch.tensor(0.5, requires_grad=True), torch.ones(3, 2)
        >>> x, _ = fixed_point(lambda x, a: a * x + b, b, (a,), lipschitz=0.5, adjoint=ImplicitAdjoint())
        >>> torch.autograd.grad(x.sum(), a)[0].round(decimals=3)  # of 6 / (1 - a)
        tensor(24.)

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

    def __post_init__(self) -> None:
        check_instance("solver", self.solver, Solver, "a solver such as pyro_equiflow.solvers.Anderson()")
        check_stopping(self.tolerance, self.max_steps, self.on_failure)

    def _solve(self, linear: _Linear) -> Tensor:
        upstream = linear.upstream
        length = power_of_two(upstream)
        scaled = upstream / length
        phi = _Transposed(linear._replace(upstream=scaled))
        return length * self._solved(phi, scaled, linear.problem.lipschitz).value

    def _solved(self, phi: Map, upstream: Tensor, lipschitz: float) -> Solution:
        """What the solver finds of a linear system, all of whose settings were checked."""
        strict = self.tolerance is not None
        return self.solver._iterate(
            phi, upstream, lipschitz, self.tolerance, strict, None, self.max_steps, self.on_failure
        )


@dataclass(frozen=True, kw_only=True)
class DenseAdjoint(_AtTheRoot):
    r"""Implicit differentiation as of :class:`ImplicitAdjoint`, with every sample's dense Jacobian: the system
    :math:`(1 - J^\top)\, g = u` is solved directly, up to 3 x 3 in closed form and by LU beyond.

    A backward pass is one evaluation of :math:`\phi` on a graph, one reverse pass for each entry of an event where the
    Jacobian is not known, and one to ``tensors``; memory :math:`B D^2`. So it suits small events. Linear in :math:`u`,
    and exact to rounding, :math:`\epsilon / (1 - c)` relative to :math:`u`, so there is no tolerance. Derivatives of
    any order are right.

    Example::

        >>> import torch
        >>> from pyro_equiflow.solvers import fixed_point
        >>> a, b = torch.tensor(0.5, requires_grad=True), torch.ones(3, 2)
        >>> x, _ = fixed_point(lambda x, a: a * x + b, b, (a,), lipschitz=0.5, adjoint=DenseAdjoint())
        >>> torch.autograd.grad(x.sum(), a)[0].round(decimals=3)
        tensor(24.)

    Reference: Lu et al., *Implicit normalizing flows* (arXiv 2103.09527), who solve the same system by Broyden's
    method.
    """

    def _solve(self, linear: _Linear) -> Tensor:
        jacobian = linear.problem.jacobian()
        if jacobian is None:
            # One reverse pass after another was as fast as all in one by vmap, and asks less of phi.
            jacobian = dense_jacobian(linear.image, linear.x, 1, create_graph=False)
        size = jacobian.shape[1]
        system = torch.eye(size, dtype=jacobian.dtype, device=jacobian.device) - jacobian.transpose(1, 2)
        flat = linear.upstream.reshape(len(system), size)
        return solve_definite(system, flat).reshape(linear.upstream.shape)


@dataclass(frozen=True, kw_only=True)
class UnrolledAdjoint(Adjoint):
    r"""Steps :math:`x \mapsto \phi(x)` from the fixed point with a graph through each: a reference to check others by.

    The gradient is the sum of :math:`(J^\top)^k u` for :math:`k` below ``steps``, so it lacks at most
    :math:`c^n / (1 - c)` of :math:`u`. Memory grows with the steps.

    Example::

        >>> import torch
        >>> from pyro_equiflow.solvers import UnrolledAdjoint, fixed_point
        >>> a, b = torch.tensor(0.5, requires_grad=True), torch.ones(3, 2)
        >>> x, _ = fixed_point(lambda x, a: a * x + b, b, (a,), lipschitz=0.5, adjoint=UnrolledAdjoint(steps=30))
        >>> torch.autograd.grad(x.sum(), a)[0].round(decimals=3)
        tensor(24.)

    :param steps: how many; by default what brings that remainder below 1e-12.
    """

    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            set_fields(self, steps=check_integer("steps", self.steps, 1, also="None"))

    def _attach(self, problem: Problem, value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        steps, lipschitz = self.steps, problem.lipschitz
        if steps is None:
            steps = math.ceil(math.log(1e-12 * (1 - lipschitz)) / math.log(min(max(lipschitz, 1e-3), 1 - 1e-12)))
        x = value.detach()
        for _ in range(steps):
            x = problem.phi(x, *tensors)
        return x


class _Transposed:
    r"""The map :math:`g \mapsto J^\top g + u` of a linear system, in the form that solvers take.

    The graph of an evaluation serves until half of its samples have left: pulling zeros back through those costs less
    than another evaluation.
    """

    def __init__(self, linear: _Linear) -> None:
        self._linear = linear
        # The graph in use, and which samples it holds: None for all.
        self._x, self._image = linear.x, linear.image
        self._held: Tensor | None = None
        # The active samples, their part of u, and where they stand in the graph: None where they are all of it.
        self._index: Tensor | None = None
        self._upstream = linear.upstream
        self._places: Tensor | None = None

    def __call__(self, g: Tensor, index: Tensor | None) -> Tensor:
        if index is not None and index is not self._index:
            self._keep(index)
        x, places = self._x, self._places
        spread = g if places is None else torch.zeros_like(x).index_copy_(0, places, g)
        pulled = _pull_back(self._image, x, spread, create_graph=False, retain_graph=True)
        return (pulled if places is None else pulled.index_select(0, places)) + self._upstream

    def _keep(self, index: Tensor) -> None:
        """Leaves out all samples but these."""
        linear = self._linear
        if 2 * len(index) <= len(self._x):
            with torch.enable_grad():
                self._x = linear.x.detach().index_select(0, index).requires_grad_()
                rows = linear.problem.rows([t.detach() for t in linear.leaves], index)
                self._image = linear.problem.phi(self._x, *rows)
            self._held = index
        # Active samples keep their order, so those that the graph holds are sorted.
        places = index if self._held is None else torch.searchsorted(self._held, index)
        self._places = places if len(places) < len(self._x) else None
        self._index, self._upstream = index, linear.upstream.index_select(0, index)


def _pull_back(image: Tensor, x: Tensor, g: Tensor, **graph: bool) -> Tensor:
    if not image.requires_grad:
        return torch.zeros_like(x)
    found = torch.autograd.grad(image, x, g, allow_unused=True, **graph)[0]
    return torch.zeros_like(x) if found is None else found


class _Implicit(torch.autograd.Function):
    """Forward hands the solved value on; backward solves the adjoint system at it."""

    @staticmethod
    def forward(ctx: Any, adjoint: _AtTheRoot, problem: Problem, value: Tensor, *tensors: Tensor) -> Tensor:
        output = value.clone()
        ctx.adjoint, ctx.problem = adjoint, problem
        ctx.save_for_backward(output, *tensors)
        return output

    @staticmethod
    @full_precision
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = upstreams
        value, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        adjoint, problem = ctx.adjoint, ctx.problem
        again = torch.is_grad_enabled()
        if not torch.isfinite(upstream).all():
            raise ValueError("expected a finite gradient at the fixed point in backward(), found one that is not")
        with torch.enable_grad():
            x = value.detach().requires_grad_()
            leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed)]
            image = problem.phi(x, *leaves)
        with torch.no_grad():
            g = adjoint._solve(_Linear(problem, leaves, x, image, upstream.detach()))
        if again:
            # g is the fixed point of a map of value, upstream and tensors: differentiable by the same rule.
            linear = Problem(_linear_map(problem.phi), (True, True, *problem.batched), problem.lipschitz)
            g = _Implicit.apply(adjoint, linear, g, value, upstream, *tensors)
            with torch.enable_grad():
                # Aliases: value depends on tensors as well, and that path is what g stands for.
                leaves = [t.view_as(t) for t in tensors]
                image = problem.phi(value, *leaves)
        if not image.requires_grad:
            return (None, None, None, *(None for _ in needed))
        wanted = [leaf for leaf, need in zip(leaves, needed) if need]
        with torch.enable_grad():
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
