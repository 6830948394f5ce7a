# SPDX-License-Identifier: Apache-2.0
"""Equivariant residual transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from escnn import nn as enn

from pyro_equiflow.logdet import Estimator
from pyro_equiflow.nn import lipschitz_net
from pyro_equiflow.ops.arguments import check_keywords
from pyro_equiflow.solvers import Adjoint, Solver
from pyro_equiflow.solvers.checks import OnFailure
from pyro_equiflow.transforms.conditional import CONTEXT_TYPE, FamilyOfKind
from pyro_equiflow.transforms.contraction import ContractionTransform, Step, lipschitz_nets

__all__ = [
    "ConditionalEquivariantResidual",
    "EquivariantResidual",
    "conditional_equivariant_residual",
    "equivariant_residual",
]


# What the factories say themselves.
_SET = ("zero_init", "context_type")


class EquivariantResidual(ContractionTransform):
    r"""Residual transform that commutes with a symmetry group.

    .. math:: y = x + F(x), \qquad \operatorname{Lip}(F) \le c < 1,

    with an equivariant network :math:`F` whose layers are scaled by upper bounds of their norms, found anew from the
    present weights at every call (:class:`~pyro_equiflow.nn.LipschitzConditioner`). The Lipschitz constant of the map
    is below :math:`1 + c`, that of its inverse below :math:`1 / (1 - c)`. It keeps orientation: for maps that do not,
    add fields or other transforms.

    Log-det exact or estimated, by the size of the event (see ``log_det``); inverse solved to a certified error.
    Gradients pass through both directions. Any field type will do: nothing is split.

    For density estimation take the inverse of the transform, so that data need no solver: ``Inverse(transform)``, or
    ``transform.inv``.

    Example::

        >>> import torch, pyro.distributions as dist
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import EquivariantResidual
        >>> from pyro_equiflow.nn import lipschitz_net
        >>> space = gspaces.no_base_space(group.so3_group())
        >>> vector = enn.FieldType(space, [space.irrep(1)])
        >>> transform = EquivariantResidual(vector, lipschitz_net(vector, vector))
        >>> base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        >>> flow = dist.TransformedDistribution(base, [transform.inv])
        >>> flow.log_prob(torch.randn(5, 3)).shape
        torch.Size([5])
        >>> transform.lipschitz_bound() < 1
        True

    :param field_type: how the group acts on the event.
    :param conditioner: an escnn ``EquivariantModule`` between the types of :meth:`conditioner_types`, of layers with a
        rule of :func:`~pyro_equiflow.nn.lipschitz_bound`.
    :param lipschitz: :math:`c`, inside (0, 1).
    :param log_det: estimator of the log-det, see :mod:`pyro_equiflow.logdet`; by default exact up to 16 entries, beyond
        unbiased in training and deterministic under ``eval()``.
    :param solver: of the fixed points, see :mod:`pyro_equiflow.solvers`; by default
        :class:`~pyro_equiflow.solvers.Anderson`.
    :param adjoint: how gradients pass through a solution; by default implicit differentiation.
    :param tolerance: relative certified error of a solution, by default 1e-12 in float64; in float32 5e-6, or less
        where the way back stretches errors.
    :param max_steps: most evaluations per sample.
    :param on_failure: ``"raise"``, ``"warn"`` or ``"ignore"`` samples that did not converge.
    :param context_type: field type of a context (see :class:`ConditionalEquivariantResidual`).
    :param cache_size: 0 or 1, see :class:`EquivariantTransform`.
    :raises TypeError: a layer without a Lipschitz rule.
    :raises ValueError: ``lipschitz`` outside (0, 1), a conditioner of wrong types.

    References: Bose, Brubaker and Kobyzev, *Equivariant Finite Normalizing Flows* (arXiv 2110.08649), G-residual; Chen,
    Behrmann, Duvenaud and Jacobsen, *Residual Flows for Invertible Generative Modeling* (arXiv 1906.02735).
    """

    def __init__(
        self,
        field_type: enn.FieldType,
        conditioner: enn.EquivariantModule,
        *,
        lipschitz: float = 0.9,
        log_det: Estimator | None = None,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        tolerance: float | None = None,
        max_steps: int | None = None,
        on_failure: OnFailure = "raise",
        context_type: enn.FieldType | None = None,
        cache_size: int = 1,
    ) -> None:
        super().__init__(
            field_type,
            log_det=log_det,
            solver=solver,
            adjoint=adjoint,
            tolerance=tolerance,
            max_steps=max_steps,
            on_failure=on_failure,
            context_type=context_type,
            cache_size=cache_size,
        )
        self.conditioner = self._conditioner(conditioner, lipschitz)

    def _steps(self) -> Sequence[Step]:
        return [Step(self.conditioner, True)]


class ConditionalEquivariantResidual(FamilyOfKind):
    r"""Equivariant residual transform given a context, :math:`y = x + F(x, c)`.

    As :class:`EquivariantResidual`, with the context joined to :math:`x` in front of the network, which is held below
    :math:`c` in :math:`x` alone: the context's own weights in the first layer are free.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import ConditionalEquivariantResidual, EquivariantResidual
        >>> from pyro_equiflow.nn import lipschitz_net
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 1 * [space.irrep(1, 1)])
        >>> context_type = enn.FieldType(space, [space.irrep(1, 1), space.trivial_repr])
        >>> types = EquivariantResidual.conditioner_types(vectors, context_type=context_type)
        >>> family = ConditionalEquivariantResidual(vectors, context_type, lipschitz_net(*types))
        >>> family.condition(torch.randn(5, 3))(torch.randn(5, 2)).shape
        torch.Size([5, 2])

    :param field_type: how the group acts on the event.
    :param context_type: how the group acts on the context.
    :param conditioners: a module between the types of ``EquivariantResidual.conditioner_types(field_type,
        context_type=context_type)``.
    :param kwargs: the keywords of :class:`EquivariantResidual`.
    """

    kind = EquivariantResidual


def equivariant_residual(
    field_type: enn.FieldType, *, hidden_dims: Sequence[int] = (64, 64), identity_init: bool = True, **kwargs: Any
) -> EquivariantResidual:
    """An :class:`EquivariantResidual` with a :func:`~pyro_equiflow.nn.lipschitz_net` as conditioner.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_residual
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 1 * [space.irrep(1, 1)])
        >>> equivariant_residual(vectors)(torch.randn(5, 2)).shape
        torch.Size([5, 2])

    :param field_type: how the group acts on the event.
    :param hidden_dims: channels of the conditioner's hidden layers.
    :param identity_init: whether the transform starts as the identity.
    :param kwargs: further keywords of :func:`~pyro_equiflow.nn.lipschitz_net` and of :class:`EquivariantResidual`.
    """
    context_type = kwargs.pop(CONTEXT_TYPE, None)
    check_keywords(equivariant_residual, kwargs, lipschitz_net, EquivariantResidual, without=_SET)
    (net,) = lipschitz_nets(1, field_type, context_type, hidden_dims, identity_init, kwargs)
    return EquivariantResidual(field_type, net, context_type=context_type, **kwargs)


def conditional_equivariant_residual(
    field_type: enn.FieldType, context_type: enn.FieldType, **kwargs: Any
) -> ConditionalEquivariantResidual:
    """A :class:`ConditionalEquivariantResidual` with a :func:`~pyro_equiflow.nn.lipschitz_net` as conditioner.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import conditional_equivariant_residual
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 1 * [space.irrep(1, 1)])
        >>> context_type = enn.FieldType(space, [space.irrep(1, 1), space.trivial_repr])
        >>> family = conditional_equivariant_residual(vectors, context_type)
        >>> family.condition(torch.randn(5, 3))(torch.randn(5, 2)).shape
        torch.Size([5, 2])

    :param field_type: how the group acts on the event.
    :param context_type: how the group acts on the context.
    :param kwargs: the keywords of :func:`equivariant_residual`.
    """
    return ConditionalEquivariantResidual.made_by(equivariant_residual, field_type, context_type, **kwargs)
