# SPDX-License-Identifier: Apache-2.0
"""Maps ``x + F(x)`` with a contraction ``F``: pushed, solved, and their log-dets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.logdet import Estimator, LogDet, default_estimator
from pyro_equiflow.nn import lipschitz_net
from pyro_equiflow.nn.lipschitz.conditioner import LipschitzConditioner
from pyro_equiflow.ops.arguments import check_flag, check_instance
from pyro_equiflow.ops.events import flatten_batch
from pyro_equiflow.ops.representations import validate_field_type
from pyro_equiflow.ops.tracing import full_precision, refuse_records
from pyro_equiflow.solvers import Adjoint, Solution, Solver, fixed_point
from pyro_equiflow.solvers.checks import OnFailure, check_stopping
from pyro_equiflow.solvers.iteration import event_norm
from pyro_equiflow.transforms.base import Deferred
from pyro_equiflow.transforms.conditional import ConditionableTransform, with_context_fields
from pyro_equiflow.transforms.contracting import Contraction, Pushed, WithContext
from pyro_equiflow.transforms.precision import Solved

__all__ = ["ContractionTransform", "Step", "lipschitz_nets"]

# Estimators and solvers want a positive constant; a network whose last layer is zero has the constant 0.
_LEAST_BOUND = 1e-6

# Relative certified error in float32, and the least that is asked for where the way back stretches it; where rounding
# certifies less, near a constant of 1, float64 steps are added.
_FLOAT32 = 5e-6
_LEAST_FLOAT32 = 2e-7


class _JacobianToCome:
    """The Jacobian of a solved step: its log-det finds it, before a backward pass asks for it.

    Found anew there it would be 10 to 20% of a step of training, for 2 to 8 entries.
    """

    found: Tensor | None = None

    def __call__(self) -> Tensor | None:
        return self.found


class Step(NamedTuple):
    """A map ``x + F(x)``.

    :ivar conditioner: its ``F``.
    :ivar forwards: whether the map is run, or else its inverse, which is solved for.
    """

    conditioner: LipschitzConditioner
    forwards: bool


def lipschitz_nets(
    count: int,
    field_type: enn.FieldType,
    context_type: enn.FieldType | None,
    hidden_dims: Sequence[int],
    identity_init: bool,
    options: dict[str, Any],
) -> list[enn.SequentialModule]:
    """Networks for a factory; takes the keywords of :func:`lipschitz_net` out of ``options``."""
    identity_init = check_flag("identity_init", identity_init)
    validate_field_type(field_type)
    in_type, out_type = ContractionTransform.conditioner_types(field_type, context_type=context_type)
    names = inspect.signature(lipschitz_net).parameters
    chosen = {name: options.pop(name) for name in list(options) if name in names}
    return [
        lipschitz_net(in_type, out_type, hidden_dims=hidden_dims, zero_init=identity_init, **chosen)
        for _ in range(count)
    ]


class ContractionTransform(Solved, ConditionableTransform):
    r"""What transforms made of maps :math:`x + F(x)`, :math:`\operatorname{Lip}(F) \le c < 1`, have in common.

    A subclass holds its networks, made by ``_conditioner``, and lists them in ``_steps``; both directions, the
    log-dets and the gradients follow.

    :param field_type: how the group acts on the event.
    :param log_det: estimator of the log-det; by default :func:`~pyro_equiflow.logdet.default_estimator`'s choice.
    :param solver: of the fixed point; by default :class:`~pyro_equiflow.solvers.Anderson`.
    :param adjoint: how gradients pass through the solution; by default implicit differentiation.
    :param tolerance: relative certified error of the solution, by default 1e-12 in float64; in float32 5e-6, or less
        where the way back stretches errors, reached by steps in float64 where need be (see
        :func:`~pyro_equiflow.solvers.fixed_point`). Where contexts and biases are so much longer than an event that
        float64 rounds more coarsely than that, the default gives way up to 4e-4, and what was reached is in
        ``inverse_solution``; a tolerance that was passed does not.
    :param max_steps: most evaluations per sample.
    :param on_failure: ``"raise"``, ``"warn"`` or ``"ignore"`` samples that did not converge.
    :param context_type: how the group acts on the context.
    :param cache_size: 0 or 1, see :class:`~pyro_equiflow.EquivariantTransform`.
    """

    def __init__(
        self,
        field_type: enn.FieldType,
        *,
        log_det: Estimator | None = None,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        tolerance: float | None = None,
        max_steps: int | None = None,
        on_failure: OnFailure = "raise",
        context_type: enn.FieldType | None = None,
        cache_size: int = 1,
    ) -> None:
        super().__init__(field_type, context_type=context_type, cache_size=cache_size)
        if log_det is not None:
            check_instance("log_det", log_det, Callable, "an estimator such as pyro_equiflow.logdet.Exact()")
        if solver is not None:
            check_instance("solver", solver, Solver, "a solver such as pyro_equiflow.solvers.Anderson()")
        if adjoint is not None:
            check_instance("adjoint", adjoint, Adjoint, "an adjoint such as pyro_equiflow.solvers.ImplicitAdjoint()")
        check_stopping(tolerance, max_steps, on_failure)
        self.log_det = log_det
        self.solver = solver
        self.adjoint = adjoint
        self.tolerance = tolerance
        self.max_steps = max_steps
        self.on_failure = on_failure

    @staticmethod
    def conditioner_types(
        field_type: enn.FieldType, *, context_type: enn.FieldType | None = None
    ) -> tuple[enn.FieldType, enn.FieldType]:
        """The field types between which a conditioner maps: the event's (and the context's), and the event's."""
        validate_field_type(field_type)
        return with_context_fields(field_type, context_type), field_type

    def _conditioner(self, network: enn.EquivariantModule, lipschitz: float) -> LipschitzConditioner:
        in_type, out_type = self.conditioner_types(self.field_type, context_type=self.context_type)
        return LipschitzConditioner(network, in_type, out_type, lipschitz)

    def _steps(self) -> Sequence[Step]:
        """What makes up the transform, in order."""
        raise NotImplementedError

    # ---- what users ask -------------------------------------------------------------------------------------------

    @full_precision
    @torch.no_grad()
    def lipschitz_bound(self, spatial_shape: Sequence[int] | None = None) -> float:
        """An upper bound of the networks' Lipschitz constants with the present weights, below 1; the largest of them.

        :param spatial_shape: the grid; ``None`` for a bound that holds on every grid.
        """
        return max(conditioner.normalized(spatial_shape).bound for conditioner, _ in self._steps())

    def inverse_solution(self, y: Tensor) -> Solution:
        """The inverse at ``y`` as its solver found it: with certified errors, steps and convergence per sample.

        :param y: shape ``(*batch, C, *spatial)``.
        :return: a :class:`~pyro_equiflow.solvers.Solution` of batch shape ``batch``, no graph.
        :raises ConvergenceError: a sample did not converge, unless ``on_failure`` says otherwise.
        """
        return self._solution(y, self._backwards())

    def _architecture(self) -> dict[str, Any]:
        found = super()._architecture()
        for name in ("tolerance", "max_steps", "on_failure"):  # how closely the map is computed, not which
            found[""].pop(name, None)  # no setting where it is None
        return found

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self._run(x, self._steps(), deferred=False)
        return y, ladj()

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._run(y, self._backwards(), deferred=False)
        return x, ladj()

    def _call_deferred(self, x: Tensor) -> tuple[Tensor, Deferred]:
        return self._run(x, self._steps(), deferred=True)

    def _inverse_deferred(self, y: Tensor) -> tuple[Tensor, Deferred]:
        return self._run(y, self._backwards(), deferred=True)

    def _log_det(self, x: Tensor, y: Tensor) -> Tensor:
        # A forward step comes first and starts at x, a solved one comes last and ends at y: nothing is solved here.
        total = x.new_zeros(())
        for conditioner, forwards in self._steps():
            point, context, batch = self._batch(x if forwards else y)
            value = self._estimate(self._contraction(conditioner, point, context), point).value.reshape(batch)
            total = total + value if forwards else total - value
        return total

    # ---- the work -------------------------------------------------------------------------------------------------

    def _backwards(self) -> Sequence[Step]:
        return [Step(conditioner, not forwards) for conditioner, forwards in reversed(self._steps())]

    def _run(self, x: Tensor, steps: Sequence[Step], deferred: bool) -> tuple[Tensor, Deferred]:
        x, context, batch = self._batch(x)
        parts: list[Deferred] = []
        before: Pushed | None = None
        for conditioner, forwards in steps:
            map_ = self._contraction(conditioner, x, context)
            after = Pushed(map_, x) if forwards else None
            x, ladj = self._push(map_, x, deferred) if forwards else self._pull(map_, x, before, deferred)
            before = after
            parts.append(ladj)
        return x.reshape(*batch, *x.shape[1:]), lambda: sum((f() for f in parts[1:]), parts[0]()).reshape(batch)

    @full_precision
    @torch.no_grad()
    def _solution(self, x: Tensor, steps: Sequence[Step]) -> Solution:
        """What the solver says where a transform of one solved step is run."""
        self._check(x, self.field_type)
        x, context, batch = self._batch(x)
        before: Pushed | None = None
        for conditioner, forwards in steps:
            map_ = self._contraction(conditioner, x, context)
            if forwards:
                before, x = Pushed(map_, x), x + map_.fn(x, *map_.tensors)
            else:
                solution = self._root(map_, x, before)[1]
                x = solution.value
        value = solution.value.reshape(*batch, *x.shape[1:])
        return Solution(value, *(field.reshape(batch) for field in solution[1:]))

    def _batch(self, x: Tensor) -> tuple[Tensor, Tensor | None, torch.Size]:
        """Events and contexts with one batch dimension, and the batch shape."""
        x, context = self._with_context(x)
        flat, batch = flatten_batch(x, self.event_dim)
        return flat, None if context is None else flatten_batch(context, self.event_dim)[0], batch

    def _contraction(self, conditioner: LipschitzConditioner, x: Tensor, context: Tensor | None) -> Contraction:
        refuse_records(type(self).__name__, x)
        ((fn, tensors), bound), added = conditioner.with_offset(x.shape[2:])
        batched: tuple[bool, ...] = len(tensors) * (False,)
        if context is not None:
            fn, tensors, batched = WithContext(fn), (context, *tensors), (True, *batched)
        bound = max(bound, _LEAST_BOUND)
        return Contraction(fn, tensors, batched, bound, conditioner.is_expanded, lambda: added.length(context))

    def _estimate(self, map_: Contraction, x: Tensor) -> LogDet:
        estimator = self.log_det or default_estimator(x.shape[1:].numel())
        return estimator(map_.fn, x, map_.tensors, lipschitz=map_.bound, training=self.training)

    def _push(self, map_: Contraction, x: Tensor, deferred: bool) -> tuple[Tensor, Deferred]:
        """``x + F(x)``, and what gives its log-det."""
        if deferred:
            return x + map_.fn(x, *map_.tensors), lambda: self._estimate(map_, x).value
        found = self._estimate(map_, x)
        return x + found.output, lambda: found.value

    def _pull(self, map_: Contraction, y: Tensor, before: Pushed | None, deferred: bool) -> tuple[Tensor, Deferred]:
        """The root of ``x + F(x) = y``, and what gives the log-det of that inverse map."""
        jacobian = _JacobianToCome()
        x = self._root(map_, y, before, jacobian)[0]
        if deferred:
            return x, lambda: -self._estimate(map_, x).value
        found = self._estimate(map_, x)
        if found.jacobian is not None:
            jacobian.found = -found.jacobian  # of y - F(x)
        return x, lambda: -found.value

    def _root(
        self,
        map_: Contraction,
        y: Tensor,
        before: Pushed | None,
        jacobian: Callable[[], Tensor | None] = lambda: None,
    ) -> tuple[Tensor, Solution]:
        fn, tolerance, strict = map_.fn, self.tolerance, self.tolerance is not None
        refine = map_.refine and (before is None or before.map_.refine)
        if tolerance is None and refine and y.dtype == torch.float32:
            # The way back stretches errors, and the point that they are relative to may be as much longer.
            stretch = 1.0 if before is None else (1 + map_.bound) / (1 - before.map_.bound)
            tolerance = max(_FLOAT32 / stretch**2, _LEAST_FLOAT32)

        # What y - F(x) adds up besides x and c |x|; y may be a sum of its own.
        scale = event_norm(y.detach()) + map_.offset()
        if before is not None:
            scale = scale + before.scale()

        def wide() -> list[Tensor]:
            return [y.detach().double() if before is None else before.wide(), *map_.wide()]

        def phi(x: Tensor, y: Tensor, *tensors: Tensor) -> Tensor:
            return y - fn(x, *tensors)

        return fixed_point(
            phi,
            y.detach(),
            (y, *map_.tensors),
            lipschitz=map_.bound,
            batched=(True, *map_.batched),
            solver=self.solver,
            adjoint=self.adjoint,
            tolerance=tolerance,
            strict=strict,
            scale=scale,
            max_steps=self.max_steps,
            on_failure=self.on_failure,
            refine=refine,
            wide=wide,
            jacobian=jacobian,
        )
