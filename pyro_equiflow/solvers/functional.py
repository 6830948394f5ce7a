# SPDX-License-Identifier: Apache-2.0
"""Fixed points under ``torch.func``: one function whose derivatives and batches are fixed points again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyro_equiflow.ops.tracing import forward_mode, is_of_torch_func, vjp
from pyro_equiflow.solvers.iteration import Solution, power_of_two
from pyro_equiflow.solvers.problem import Problem

__all__ = ["Solve", "Task", "solve"]

_EMPTY = CellType()

Solve = Callable[[Problem, Tensor, "Tensor | None", Sequence[Tensor]], Solution]


@dataclass(frozen=True)
class Task:
    """A fixed point to find: where, and how.

    :ivar problem: the map; it may close over no tensor that a transformation of ``torch.func`` holds.
    :ivar solve: ``solve(problem, x0, scale, tensors)``, on plain tensors.
    :ivar solve_linear: likewise, of the linear systems of derivatives.
    """

    problem: Problem
    solve: Solve
    solve_linear: Solve

    def linear(self, phi: Callable[..., Tensor]) -> Task:
        """The task of a map ``phi(g, x, u, *tensors)``, linear in ``g``, that contracts as this one's does."""
        problem = self.problem._replace(phi=phi, batched=(True, True, *self.problem.batched))
        return replace(self, problem=problem, solve=self.solve_linear)


def solve(task: Task, x0: Tensor, scale: Tensor | None, tensors: Sequence[Tensor]) -> Solution:
    r"""The fixed point :math:`x = \phi(x, \theta)`, under any of the transformations of ``torch.func``.

    With :math:`J = \partial\phi/\partial x` there, reverse and forward mode ask for fixed points of the same constant,

    .. math:: g = J^\top g + u, \qquad \dot x = J \dot x + \frac{\partial\phi}{\partial\theta} \dot\theta,

    which this function gives: so derivatives of any order are right. A batch over samples is solved as one larger
    batch. A batch over weights is too, with the map evaluated for all members together.

    :return: a :class:`Solution`, whose value has derivatives with respect to ``tensors``.
    :raises RuntimeError: the map closes over a tensor that a transformation holds: its derivatives would be lost.
    """
    if _holds_tensor_of_torch_func(task.problem.phi, set()):
        raise RuntimeError(
            "phi: expected a map of x and tensors alone under torch.func, found one that closes over a tensor which is "
            "differentiated or batched: pass it among tensors; for a network of a user's own, register a rule of "
            "expand that gives its weights"
        )
    return Solution(*_FixedPoint.apply(task, x0, scale, *tensors))


def _holds_tensor_of_torch_func(thing: object, seen: set[int]) -> bool:
    """Whether a function, or what it closes over, holds one, as far as can be seen."""
    if id(thing) in seen:
        return False
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return is_of_torch_func(thing)
    parts: Iterable[object] = ()
    if isinstance(thing, torch.nn.Module):
        parts = (*thing.parameters(), *thing.buffers())
    elif isinstance(thing, (list, tuple)):
        parts = thing
    elif isinstance(thing, dict):
        parts = thing.values()
    elif isinstance(thing, functools.partial):
        parts = (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, MethodType):
        parts = (thing.__func__, thing.__self__)
    elif isinstance(thing, FunctionType):
        parts = [cell.cell_contents for cell in thing.__closure__ or () if cell != _EMPTY]
    elif callable(thing) and type(thing).__module__ != "builtins":
        parts = getattr(thing, "__dict__", {}).values()
    return any(_holds_tensor_of_torch_func(part, seen) for part in parts)


class _FixedPoint(torch.autograd.Function):
    @staticmethod
    def forward(task: Task, x0: Tensor, scale: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = task.solve(task.problem, x0.detach(), scale, [t.detach() for t in tensors])
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        task, _, _, *tensors = inputs
        ctx.task = task
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[0], *tensors)
        ctx.save_for_forward(output[0], *tensors)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        phi = ctx.task.problem.phi

        def transposed(g: Tensor, x: Tensor, u: Tensor, *tensors: Tensor) -> Tensor:
            _, pull = vjp(lambda x: phi(x, *tensors), x)
            return pull(g)[0] + u

        g = _linear_root(ctx.task, transposed, x, upstreams[0], tensors)
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[3:]) if need]
        _, pull = vjp(lambda *some: phi(x, *_with(tensors, wanted, some)), *(tensors[i] for i in wanted))
        gradients: list[Tensor | None] = [None] * len(tensors)
        for i, gradient in zip(wanted, pull(g)):
            gradients[i] = gradient
        return (None, None, None, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        # torch runs this with forward mode off, and what it has saved carries the tangents of this very level: with
        # neither changed, tangents of tangents are wrong.
        with forward_mode():
            return (_FixedPoint._tangent(ctx, tangents), None, None, None, None)

    @staticmethod
    def _tangent(ctx: Any, tangents: Sequence[Tensor | None]) -> Tensor:
        x, *tensors = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
        phi = ctx.task.problem.phi

        def pushed(g: Tensor, x: Tensor, u: Tensor, *tensors: Tensor) -> Tensor:
            return torch.func.jvp(lambda x: phi(x, *tensors), (x,), (g,))[1] + u

        moved = [i for i, tangent in enumerate(tangents[3:]) if tangent is not None]
        u = torch.func.jvp(
            lambda *some: phi(x, *_with(tensors, moved, some)),
            tuple(tensors[i] for i in moved),
            tuple(tangents[3 + i] for i in moved),
        )[1]
        return _linear_root(ctx.task, pushed, x, u, tensors)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], task: Task, x0: Tensor, scale: Tensor | None, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size, dims, problem = info.batch_size, in_dims[3:], task.problem
        first = [t if dim is None else t.movedim(dim, 0) for t, dim in zip((x0, *tensors), (in_dims[1], *dims))]
        count = first[0].shape[0 if in_dims[1] is None else 1]

        def rows(t: Tensor, dim: int | None) -> Tensor:
            return (t.expand(size, *t.shape) if dim is None else t).flatten(0, 1).contiguous()

        x0 = rows(first[0], in_dims[1])
        if scale is not None:
            scale = rows(scale if in_dims[2] is None else scale.movedim(in_dims[2], 0), in_dims[2])
        folded = [rows(t, dim) if own else t for t, dim, own in zip(first[1:], dims, problem.batched)]
        if problem.whole or any(dim is not None and not own for dim, own in zip(dims, problem.batched)):
            # Rows differ in their weights as well, so the map is of members, each with rows.
            weights = tuple(0 if own or dim is not None else None for dim, own in zip(dims, problem.batched))
            task = replace(task, problem=_of_members(problem, size, count, weights))
        found = _FixedPoint.apply(task, x0, scale, *folded)
        return tuple(t.unflatten(0, (size, count)) for t in found), (0,) * len(found)


def _linear_root(task: Task, phi: Callable[..., Tensor], x: Tensor, u: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The root of ``g = phi(g, x, u, *tensors)``, linear in ``g`` and ``u``, to the tolerance relative to ``u``."""
    length = power_of_two(u)
    u = u / length
    return length * solve(task.linear(phi), u, None, (x, u, *tensors)).value


def _of_members(problem: Problem, size: int, count: int, in_dims: tuple[int | None, ...]) -> Problem:
    def phi(x: Tensor, *tensors: Tensor) -> Tensor:
        parts = [t.unflatten(0, (size, count)) if own else t for t, own in zip(tensors, problem.batched)]
        found = torch.vmap(problem.phi, in_dims=(0, *in_dims))(x.unflatten(0, (size, count)), *parts)
        return found.flatten(0, 1)

    return problem._replace(phi=phi, whole=True)


def _with(tensors: Sequence[Tensor], places: Sequence[int], others: Sequence[Tensor]) -> list[Tensor]:
    tensors = list(tensors)
    for i, tensor in zip(places, others):
        tensors[i] = tensor
    return tensors
