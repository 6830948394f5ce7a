# SPDX-License-Identifier: Apache-2.0
"""Equivariant implicit transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.logdet import Estimator
from pyro_equiflow.nn import lipschitz_net
from pyro_equiflow.ops.arguments import check_keywords
from pyro_equiflow.solvers import Adjoint, Solution, Solver
from pyro_equiflow.solvers.checks import OnFailure
from pyro_equiflow.transforms.conditional import CONTEXT_TYPE, FamilyOfKind
from pyro_equiflow.transforms.contraction import ContractionTransform, Step, lipschitz_nets

__all__ = [
    "ConditionalEquivariantImplicit",
    "EquivariantImplicit",
    "conditional_equivariant_implicit",
    "equivariant_implicit",
]


# What the factories say themselves.
_SET = ("zero_init", "context_type")


class EquivariantImplicit(ContractionTransform):
    r"""Implicit transform that commutes with a symmetry group: :math:`y` is the root of

    .. math:: x + F(x) - y - H(y) = 0, \qquad \operatorname{Lip}(F), \operatorname{Lip}(H) \le c < 1,

    that is :math:`y = (I + H)^{-1}(x + F(x))`, with equivariant networks :math:`F` and :math:`H` held below :math:`c`
    as in :class:`~pyro_equiflow.EquivariantResidual`. Its Lipschitz constant may reach :math:`(1 + c)/(1 - c)`, where a
    residual transform's is at most :math:`1 + c`: one block meets maps that no stack of few residual ones can.

    .. math:: \log\Bigl|\det \frac{\partial y}{\partial x}\Bigr|
              = \log|\det(I + J_F(x))| - \log|\det(I + J_H(y))|

    Log-det exact or estimated, by the size of the event; both directions are solved, to certified errors, and both are
    differentiable. Any field type will do: nothing is split.

    Example::

        >>> import torch, pyro.distributions as dist
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import EquivariantImplicit
        >>> from pyro_equiflow.nn import lipschitz_net
        >>> space = gspaces.no_base_space(group.dihedral_group(4))
        >>> vector = enn.FieldType(space, [space.irrep(1, 1)])
        >>> transform = EquivariantImplicit(vector, lipschitz_net(vector, vector), lipschitz_net(vector, vector))
        >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> dist.TransformedDistribution(base, [transform]).rsample((5,)).shape
        torch.Size([5, 2])

    :param field_type: how the group acts on the event.
    :param conditioner_x: the network :math:`F`, as for :class:`~pyro_equiflow.EquivariantResidual`.
    :param conditioner_y: the network :math:`H`, likewise.
    :param lipschitz: :math:`c`, inside (0, 1).
    :param log_det: estimator of the log-dets, as for :class:`~pyro_equiflow.EquivariantResidual`.
    :param solver: likewise.
    :param adjoint: likewise.
    :param tolerance: likewise.
    :param max_steps: likewise.
    :param on_failure: likewise.
    :param context_type: field type of a context (see :class:`ConditionalEquivariantImplicit`).
    :param cache_size: 0 or 1, see :class:`EquivariantTransform`.
    :raises TypeError: a layer without a Lipschitz rule.
    :raises ValueError: ``lipschitz`` outside (0, 1), a conditioner of wrong types.

    References: Lu, Chen, Li, Wang and Zhu, *Implicit Normalizing Flows* (arXiv 2103.09527), eq. 5 to 8.
    """

    def __init__(
        self,
        field_type: enn.FieldType,
        conditioner_x: enn.EquivariantModule,
        conditioner_y: enn.EquivariantModule,
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
        self.conditioner_x = self._conditioner(conditioner_x, lipschitz)
        self.conditioner_y = self._conditioner(conditioner_y, lipschitz)

    def _steps(self) -> Sequence[Step]:
        return [Step(self.conditioner_x, True), Step(self.conditioner_y, False)]

    def forward_solution(self, x: Tensor) -> Solution:
        """The forward map at ``x`` as its solver found it, as :meth:`inverse_solution` for the inverse.

        :param x: shape ``(*batch, C, *spatial)``.
        """
        return self._solution(x, self._steps())


class ConditionalEquivariantImplicit(FamilyOfKind):
    r"""Equivariant implicit transform given a context, :math:`x + F(x, c) - y - H(y, c) = 0`.

    As :class:`EquivariantImplicit`, with the context joined to :math:`x` and to :math:`y` in front of the networks,
    whose weights for the context are free.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import ConditionalEquivariantImplicit, EquivariantImplicit
        >>> from pyro_equiflow.nn import lipschitz_net
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 1 * [space.irrep(1, 1)])
        >>> context_type = enn.FieldType(space, [space.irrep(1, 1), space.trivial_repr])
        >>> types = EquivariantImplicit.conditioner_types(vectors, context_type=context_type)
        >>> nets = lipschitz_net(*types), lipschitz_net(*types)
        >>> family = ConditionalEquivariantImplicit(vectors, context_type, *nets)
        >>> family.condition(torch.randn(5, 3))(torch.randn(5, 2)).shape
        torch.Size([5, 2])

    :param field_type: how the group acts on the event.
    :param context_type: how the group acts on the context.
    :param conditioners: two modules, for :math:`F` and for :math:`H`, each between the types of
        ``EquivariantImplicit.conditioner_types(field_type, context_type=context_type)``.
    :param kwargs: the keywords of :class:`EquivariantImplicit`.
    """

    kind = EquivariantImplicit


def equivariant_implicit(
    field_type: enn.FieldType, *, hidden_dims: Sequence[int] = (64, 64), identity_init: bool = True, **kwargs: Any
) -> EquivariantImplicit:
    """An :class:`EquivariantImplicit` with a :func:`~pyro_equiflow.nn.lipschitz_net` for each conditioner.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_implicit
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 1 * [space.irrep(1, 1)])
        >>> equivariant_implicit(vectors)(torch.randn(5, 2)).shape
        torch.Size([5, 2])

    :param field_type: how the group acts on the event.
    :param hidden_dims: channels of the conditioners' hidden layers.
    :param identity_init: whether the transform starts as the identity.
    :param kwargs: further keywords of :func:`~pyro_equiflow.nn.lipschitz_net` and of :class:`EquivariantImplicit`.
    """
    context_type = kwargs.pop(CONTEXT_TYPE, None)
    check_keywords(equivariant_implicit, kwargs, lipschitz_net, EquivariantImplicit, without=_SET)
    nets = lipschitz_nets(2, field_type, context_type, hidden_dims, identity_init, kwargs)
    return EquivariantImplicit(field_type, *nets, context_type=context_type, **kwargs)


def conditional_equivariant_implicit(
    field_type: enn.FieldType, context_type: enn.FieldType, **kwargs: Any
) -> ConditionalEquivariantImplicit:
    """A :class:`ConditionalEquivariantImplicit` with a :func:`~pyro_equiflow.nn.lipschitz_net` for each conditioner.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import conditional_equivariant_implicit
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 1 * [space.irrep(1, 1)])
        >>> context_type = enn.FieldType(space, [space.irrep(1, 1), space.trivial_repr])
        >>> family = conditional_equivariant_implicit(vectors, context_type)
        >>> family.condition(torch.randn(5, 3))(torch.randn(5, 2)).shape
        torch.Size([5, 2])

    :param field_type: how the group acts on the event.
    :param context_type: how the group acts on the context.
    :param kwargs: the keywords of :func:`equivariant_implicit`.
    """
    return ConditionalEquivariantImplicit.made_by(equivariant_implicit, field_type, context_type, **kwargs)
