# SPDX-License-Identifier: Apache-2.0
"""The average of a density over a finite group."""

from __future__ import annotations

import math
from typing import Any

import torch
from escnn.nn import FieldType
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_equiflow.distributions.orbit import Action, Orbit, orbit_of
from pyro_equiflow.errors import PrecisionWarning
from pyro_equiflow.ops.arguments import check_flag, check_instance
from pyro_equiflow.ops.rounding import neighbours
from pyro_equiflow.ops.support import real_events
from pyro_equiflow.ops.tracing import full_precision
from pyro_equiflow.ops.warning import held_back, warn_caller

__all__ = ["OrbitMixture"]

_CHANGE = 0.03  # nats: what importance weights do not feel


class OrbitMixture(TorchDistribution):
    r"""The exact average of any density over a finite group: the baseline for equivariant flows.

    .. math:: q(x) = \frac{1}{|G|} \sum_{g \in G} p(g^{-1} \cdot x)

    is invariant whatever :math:`p` is (:math:`\rho` is orthogonal, so no Jacobian appears). A density costs
    :math:`|G|` evaluations of the base; a draw costs one. Draws carry gradients to the base (``rsample``), given the
    random group element.

    Example::

        >>> import torch, pyro.distributions as dist
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import OrbitMixture
        >>> space = gspaces.no_base_space(group.dihedral_group(4))
        >>> base = dist.Normal(torch.tensor([2.0, 0.5]), 0.3).to_event(1)
        >>> mixture = OrbitMixture(base, enn.FieldType(space, [space.irrep(1, 1)]))
        >>> x = mixture.sample()
        >>> torch.allclose(mixture.log_prob(x), mixture.log_prob(x.flip(-1)), atol=1e-4)
        True

    :param base: a distribution of events ``(C, *spatial)``.
    :param action: how a finite group acts on them: a field type, on grids of elements that permute the grid; or the
        orthogonal matrices of all its elements, shape ``(order, C, C)``, for vectors (see :func:`matrix_group`).
    :param validate_args: whether arguments are checked; by default as :func:`pyro.enable_validation` says.
    :raises TypeError: ``base`` or ``action`` of another kind.
    :raises ValueError: an infinite group, elements that do not permute the grid, matrices that are not orthogonal or no
        group, or another event shape.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, base: Distribution, action: Action | Orbit, *, validate_args: bool | None = None) -> None:
        check_instance("base", base, Distribution, "a distribution")
        if validate_args is not None:
            check_flag("validate_args", validate_args, also="None")
        orbit = action if isinstance(action, Orbit) else orbit_of(action)
        if len(base.event_shape) != orbit.event_dim or base.event_shape[0] != orbit.size:
            spatial = " *spatial" if orbit.event_dim > 1 else ""
            raise ValueError(
                f"base: expected events of shape ({orbit.size},{spatial}), found {tuple(base.event_shape)}"
            )
        self.base = base
        self.orbit = orbit
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def field_type(self) -> FieldType | None:
        """How the group acts that leaves the mixture unchanged; ``None`` of matrices."""
        return self.orbit.field_type

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry gradients: the base's."""
        return bool(self.base.has_rsample)

    @property
    def support(self) -> constraints.Constraint:
        """Real events."""
        return real_events(len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> OrbitMixture:
        """The mixture over the expanded base."""
        return OrbitMixture(self.base.expand(batch_shape), self.orbit, validate_args=False)

    @full_precision
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """A draw of the base, moved by a uniformly drawn group element."""
        with torch.no_grad():
            return self._turned(self.base.sample(torch.Size(sample_shape)))

    @full_precision
    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """As :meth:`sample`, with gradients to the base."""
        return self._turned(self.base.rsample(torch.Size(sample_shape)))

    def _turned(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.dim() - len(self.event_shape)]
        return self.orbit.turn(x, torch.randint(len(self.orbit), batch, device=x.device))

    @full_precision
    def log_prob(self, value: Tensor) -> Tensor:
        """The exact log-density, by one evaluation of the base on the whole orbit."""
        if self._validate_args:
            self._validate_sample(value)
        # The orbit's dimension has to stand before all of the base's batch dimensions.
        missing = len(self.batch_shape) - (value.dim() - len(self.event_shape))
        orbit = self.orbit.preimages(value[max(0, missing) * (None,)])
        with held_back(PrecisionWarning) as steep:
            found = torch.logsumexp(self.base.log_prob(orbit), 0)
            change = self._rounding(orbit, found) if steep else None
        if change is not None:
            self._judge(change, orbit.dtype)
        return found - math.log(len(orbit))

    def _rounding(self, orbit: Tensor, found: Tensor) -> Tensor:
        """How far the log-density changes where the last bits of a float32 orbit do."""
        with torch.no_grad():
            near = neighbours(orbit, len(self.event_shape))
            changes = [(torch.logsumexp(self.base.log_prob(x), 0) - found).abs() for x in near]
            return torch.maximum(*changes)

    @staticmethod
    def _judge(change: Tensor, dtype: torch.dtype) -> None:
        """Warns where rounding decides more than hundredths of a nat.

        A flow that is steep warns of itself; far from its own draws, where most of an orbit lies, that is no matter.
        """
        wrong = ~(change <= _CHANGE)
        if bool(wrong.any()):
            warn_caller(
                f"OrbitMixture: {dtype} determines the log-density of {int(wrong.sum())} of {wrong.numel()} events no "
                f"better than to {float(change.nan_to_num(nan=math.inf).max()):.1g} nats: the base is so steep there. "
                "Take base and values to float64, or keep its flow gentler: fewer steps, a lower learning rate",
                PrecisionWarning,
            )
