# SPDX-License-Identifier: Apache-2.0
"""The average of a density over a finite group."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from escnn.nn import FieldType
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_equiflow.ops.arguments import check_flag, check_instance
from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.events import act, channel_matrix, event_dim, on_grid
from pyro_equiflow.ops.representations import validate_field_type
from pyro_equiflow.ops.support import real_events
from pyro_equiflow.ops.tracing import full_precision

__all__ = ["OrbitMixture"]


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
    :param field_type: how a finite group acts on them; on grids by elements that permute the grid.
    :param validate_args: whether arguments are checked; by default as :func:`pyro.enable_validation` says.
    :raises ValueError: an infinite group, elements that do not permute the grid, or another event shape.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, base: Distribution, field_type: FieldType, *, validate_args: bool | None = None) -> None:
        check_instance("base", base, Distribution, "a distribution")
        if validate_args is not None:
            check_flag("validate_args", validate_args, also="None")
        validate_field_type(field_type)
        group = field_type.fibergroup
        if group.order() < 1:
            raise ValueError(
                f"field_type: expected a finite group to average over, found {group}; take a finite subgroup"
            )
        elements = list(group.elements)
        outside = sum(not on_grid(field_type, g) for g in elements)
        if outside:
            raise ValueError(
                f"field_type: expected a group that permutes the grid, found {group} with {outside} elements that do "
                "not; take the subgroup of quarter turns and flips"
            )
        if len(base.event_shape) != event_dim(field_type) or base.event_shape[0] != field_type.size:
            raise ValueError(
                f"base: expected events of shape ({field_type.size}, *spatial), found {tuple(base.event_shape)}"
            )
        self.base = base
        self.field_type = field_type
        self._elements = elements
        # Without a base space an orbit is one product of matrices, found once.
        points = len(base.event_shape) == 1
        matrices = np.stack([channel_matrix(field_type, ~g) for g in elements]) if points else None
        self._constants = Constants(inverses=matrices)
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

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
        return OrbitMixture(self.base.expand(batch_shape), self.field_type, validate_args=False)

    def _turn(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.dim() - len(self.event_shape)]
        which = torch.randint(len(self._elements), batch, device=x.device)
        turned = x.clone()
        for index in which.unique().tolist():
            mask = which == index
            turned[mask] = act(self.field_type, self._elements[index], x[mask])
        return turned

    @full_precision
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """A draw of the base, moved by a uniformly drawn group element."""
        with torch.no_grad():
            return self._turn(self.base.sample(torch.Size(sample_shape)))

    @full_precision
    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """As :meth:`sample`, with gradients to the base."""
        return self._turn(self.base.rsample(torch.Size(sample_shape)))

    @full_precision
    def log_prob(self, value: Tensor) -> Tensor:
        """The exact log-density, by one evaluation of the base on the whole orbit."""
        if self._validate_args:
            self._validate_sample(value)
        # The orbit's dimension has to stand before all of the base's batch dimensions.
        missing = len(self.batch_shape) - (value.dim() - len(self.event_shape))
        value = value[max(0, missing) * (None,)]
        inverses = self._constants.like(value)["inverses"]
        if inverses is None:
            orbit = torch.stack([act(self.field_type, ~g, value) for g in self._elements])
        else:
            rows = value.reshape(value.shape[:-1].numel(), value.shape[-1])
            orbit = (rows @ inverses.mT).view(len(inverses), *value.shape)
        return torch.logsumexp(self.base.log_prob(orbit), 0) - math.log(len(self._elements))
