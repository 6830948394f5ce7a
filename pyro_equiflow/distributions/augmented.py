# SPDX-License-Identifier: Apache-2.0
"""Flows on events that cannot be split, by auxiliary fields: draws are exact, the density is bounded."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from escnn.nn import FieldType
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_equiflow.ops.arguments import check_flag, check_instance, check_integer
from pyro_equiflow.ops.events import check_event, event_dim
from pyro_equiflow.ops.representations import validate_field_type, validate_over
from pyro_equiflow.ops.support import real_events

__all__ = ["AugmentedDistribution", "augment"]


def augment(field_type: FieldType, auxiliary: FieldType | int) -> FieldType:
    r"""The field type of events with auxiliary fields, :math:`x \oplus e`: the event's channels first.

    A single irrep has no invariant part to split off; with auxiliary fields beside it couplings and autoregressive
    transforms apply (see :class:`AugmentedDistribution`). Invariant ones let lengths be reshaped; where the
    group leaves several modes to choose from (a finite group, say), take vectors.

    Example::

        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import augment
        >>> space = gspaces.no_base_space(group.so3_group())
        >>> vector = enn.FieldType(space, [space.irrep(1)])
        >>> augment(vector, 2).size, augment(vector, vector).size
        (5, 6)

    :param field_type: how the group acts on the event.
    :param auxiliary: how it acts on the auxiliary fields; or a number of invariant (trivial) ones.
    :raises TypeError: neither a field type nor an integer.
    :raises ValueError: a number that is not positive, or a field type of another gspace.
    """
    validate_field_type(field_type)
    gspace = field_type.gspace
    if not isinstance(auxiliary, FieldType):
        count = check_integer("auxiliary", auxiliary, 1, also="an escnn.nn.FieldType")
        auxiliary = FieldType(gspace, count * [gspace.trivial_repr])
    validate_over(gspace, auxiliary, "auxiliary")
    return FieldType(gspace, [*field_type.representations, *auxiliary.representations])


class AugmentedDistribution(TorchDistribution):
    r"""The distribution of an event alone, under a joint flow of the event and auxiliary fields.

    .. math:: p(x) = \int p(x, e)\, de, \qquad
              \log p(x) \ge E_{e_1, \dots, e_K \sim r} \log \frac{1}{K} \sum_{k=1}^K \frac{p(x, e_k)}{r(e_k)},
              \qquad r = N(0, I).

    Draws are exact: those of the joint, without :math:`e`. The density is not tractable; :meth:`log_prob_bound` draws
    the bound, which rises with :math:`K` to :math:`\log p(x)`, and :meth:`log_prob` refuses. Where the joint is
    invariant, so is the marginal, :math:`p(g \cdot x) = p(x)`: the group acts on :math:`e` orthogonally. A proposal
    :math:`r(e \mid x)` with a mean and a scale is no gain of generality: it equals one more coupling in the joint
    flow.

    Where the density itself is needed (likelihoods to report, scores of a model's latent values) prefer
    :func:`~pyro_equiflow.equivariant_residual` or :func:`~pyro_equiflow.equivariant_implicit`, which take any type
    and score it without auxiliary fields; an augmented coupling has a closed inverse and may stretch as far as its
    scales allow.

    From a joint flow that keeps :math:`x` and :math:`e` apart the bound has no gradient towards joining them; couplings
    leave this saddle sooner with ``identity_init=False``.

    The bound scores given data, so the joint flow needs a cheap inverse: couplings as they are, others turned
    round, ``transform.inv``. In an objective of Pyro the bound is a factor::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import AugmentedDistribution, InvariantNormal, augment, equivariant_flow
        >>> space = gspaces.no_base_space(group.so3_group())
        >>> vector = enn.FieldType(space, [space.irrep(1)])
        >>> pair = augment(vector, 2)
        >>> flow = equivariant_flow(pair, num_transforms=2, hidden_dims=(16,), identity_init=False)
        >>> density = AugmentedDistribution(dist.TransformedDistribution(InvariantNormal(pair), [flow]), vector)
        >>> x = density.sample((100,))
        >>> density.log_prob_bound(x, num_particles=8).shape
        torch.Size([100])
        >>> def model(x):
        ...     pyro.module("flow", flow)
        ...     with pyro.plate("data", 100, subsample_size=20) as index:
        ...         pyro.factor("x", density.log_prob_bound(x[index], num_particles=8))
        >>> elbo = pyro.infer.Trace_ELBO()
        >>> loss = pyro.infer.SVI(model, lambda x: None, pyro.optim.Adam({"lr": 1e-3}), elbo).step(x)

    :param joint: a distribution of events ``(C + C_e, *spatial)`` of type ``augment(field_type, auxiliary)``; as a
        rule a flow over an :class:`~pyro_equiflow.InvariantNormal`.
    :param field_type: how the group acts on the event, its ``C`` channels.
    :param validate_args: whether arguments are checked; by default as :func:`pyro.enable_validation` says.
    :raises TypeError: ``joint`` is no distribution.
    :raises ValueError: a joint event without room for the event and auxiliary channels.

    References: Huang, Dinh and Courville, *Augmented Normalizing Flows* (arXiv 2002.07101); Midgley et al., *SE(3)
    Equivariant Augmented Coupling Flows* (arXiv 2308.10364); Burda, Grosse and Salakhutdinov, *Importance weighted
    autoencoders* (arXiv 1509.00519), eq. 8.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, joint: Distribution, field_type: FieldType, *, validate_args: bool | None = None) -> None:
        remedy = "put a transform on a base: dist.TransformedDistribution(InvariantNormal(joint_type), [transform])"
        check_instance("joint", joint, Distribution, "a distribution", remedy=remedy)
        if validate_args is not None:
            check_flag("validate_args", validate_args, also="None")
        validate_field_type(field_type)
        shape, size = joint.event_shape, field_type.size
        if len(shape) != event_dim(field_type) or shape[0] <= size:
            spatial = "".join(f", spatial_{i}" for i in range(1, event_dim(field_type)))
            raise ValueError(
                f"joint: expected events of shape (C{spatial}) with more than the {size} channels of {field_type}, "
                f"found {tuple(shape)}; build the joint for augment(field_type, auxiliary)"
            )
        self.joint = joint
        self.field_type = field_type
        super().__init__(joint.batch_shape, torch.Size((size, *shape[1:])), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry gradients: the joint's."""
        return bool(self.joint.has_rsample)

    @property
    def support(self) -> constraints.Constraint:
        """Real events."""
        return real_events(len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> AugmentedDistribution:
        """The distribution over the expanded joint."""
        return AugmentedDistribution(self.joint.expand(batch_shape), self.field_type, validate_args=False)

    def split(self, joint_event: Tensor) -> tuple[Tensor, Tensor]:
        """The event ``(*batch, C, *spatial)`` and the auxiliary fields ``(*batch, C_e, *spatial)`` of a joint event."""
        size = self.event_shape[0]
        x, e = joint_event.split([size, self.joint.event_shape[0] - size], -len(self.event_shape))
        return x, e

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Exact draws: shape ``sample_shape + batch_shape + event_shape``."""
        return self.split(self.joint.sample(torch.Size(sample_shape)))[0]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """As :meth:`sample`, with gradients to the joint."""
        return self.rsample_augmented(sample_shape)[0]

    def rsample_augmented(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Draws of the event with the auxiliary fields that came with them, both with gradients to the joint."""
        return self.split(self.joint.rsample(torch.Size(sample_shape)))

    def auxiliary_log_prob(self, e: Tensor) -> Tensor:
        r"""The log-density :math:`\log r(e)` of auxiliary fields under the standard normal, of the batch's shape.

        :param e: shape ``(*batch, C_e, *spatial)``.
        """
        flat = e.flatten(-len(self.event_shape))
        return -0.5 * (flat.square().sum(-1) + flat.shape[-1] * math.log(2 * math.pi))

    def log_prob_bound(self, value: Tensor, num_particles: int = 1) -> Tensor:
        r"""A draw of a lower bound of the log-density, :math:`\log \frac{1}{K} \sum_k p(x, e_k) / r(e_k)`.

        Its *expectation* is below :math:`\log p(x)` and tends to it as :math:`K` grows; a single draw may lie above.
        Maximise it by stochastic gradients with a few particles; to report a likelihood take many. Random numbers are
        torch's, and each event has its own.

        :param value: shape ``(*batch, C, *spatial)``, the batch broadcasting with the distribution's.
        :param num_particles: :math:`K`; the joint is evaluated on :math:`K` times the batch at once.
        :return: the broadcast batch's shape.
        :raises TypeError: not a floating tensor.
        :raises ValueError: another event shape, or a number that is not positive.
        """
        num_particles = check_integer("num_particles", num_particles, 1)
        check_event(value, self.field_type, "value")
        dimensions = len(self.event_shape)
        if value.shape[-dimensions:] != self.event_shape:
            raise ValueError(
                f"value: expected events of shape {tuple(self.event_shape)}, without auxiliary fields, found "
                f"{tuple(value.shape[-dimensions:])}"
            )
        batch = torch.broadcast_shapes(value.shape[: value.dim() - dimensions], self.batch_shape)
        channels = self.joint.event_shape[0] - self.event_shape[0]
        x = value.expand(num_particles, *batch, *self.event_shape)
        e = torch.randn(
            (num_particles, *batch, channels, *self.event_shape[1:]), dtype=value.dtype, device=value.device
        )
        weights = self.joint.log_prob(torch.cat([x, e], -dimensions)) - self.auxiliary_log_prob(e)
        return weights.logsumexp(0) - math.log(num_particles)

    def log_prob(self, value: Tensor) -> NoReturn:
        """Refused: the marginal density is not tractable.

        :raises NotImplementedError: always; :meth:`log_prob_bound` bounds it, ``joint.log_prob`` scores both parts.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: expected no exact log_prob, the auxiliary fields would have to be integrated out; "
            "use log_prob_bound(value, num_particles) (in a model pyro.factor(name, bound)), joint.log_prob for event "
            "and auxiliary fields together, or equivariant_residual or equivariant_implicit for an exact density"
        )
