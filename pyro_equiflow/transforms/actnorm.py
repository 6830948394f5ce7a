# SPDX-License-Identifier: Apache-2.0
"""Equivariant actnorm: scale and shift set by a first batch, before training or never."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.ops.arguments import check_flag
from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.data_parallel import refuse_within_data_parallel
from pyro_equiflow.ops.events import channel_matmul
from pyro_equiflow.ops.fingerprint import optimizer_steps
from pyro_equiflow.ops.representations import IrrepDecomposition
from pyro_equiflow.ops.tracing import is_traced
from pyro_equiflow.transforms.base import EquivariantTransform

__all__ = ["EquivariantActNorm", "awaits_data", "equivariant_actnorm"]


_MIN_ROWS = 16  # fewer say too little of a scale


@dataclass
class _Waiting:
    """Whether a layer waits for the batch that sets it: one object for all copies that share its parameters.

    :ivar steps: the optimizers' count of steps at the first batch, which was too small.
    """

    waits: bool
    steps: int | None = None


class EquivariantActNorm(EquivariantTransform):
    r"""A scale for each irrep and a shift in the invariant subspace, the same at every position.

    .. math:: y = Q\, e^{s}\, Q^T (x - b), \qquad \rho(g)\, b = b,

    with :math:`Q` the change of basis to irreps and one :math:`s` per irrep. In training mode the first batch of at
    least 16 rows (samples times positions), in whichever direction it comes, sets both: invariant coordinates leave
    with mean 0, every irrep with mean square 1 per channel. Until then, or with ``data_init=False``, it is the
    identity. Under ``DistributedDataParallel`` that batch has to come before wrapping.

    What training has touched no batch sets: a layer whose parameters have received a gradient or hold anything but
    their first values, or that an optimizer's step found waiting, waits no longer. So trained on smaller batches it
    starts as the identity, and draws, test sets or larger batches later leave it alone.

    Log-det exact, inverse closed.

    Example::

        >>> import torch
        >>> from escnn import gspaces, nn as enn
        >>> from pyro_equiflow import equivariant_actnorm
        >>> space = gspaces.rot2dOnR2(4)
        >>> transform = equivariant_actnorm(enn.FieldType(space, 2 * [space.regular_repr]))
        >>> y = transform(3.0 + torch.randn(16, 8, 6, 6))
        >>> bool(y.mean().abs() < 1e-4)
        True

    :param field_type: how the group acts on the event.
    :param data_init: whether the first batch, if it comes before training, sets the parameters.
    :param cache_size: 0 or 1, see :class:`EquivariantTransform`.
    :raises ValueError: a first batch inside ``DistributedDataParallel``, where each rank would set its own parameters.

    Reference: Kingma and Dhariwal, *Glow* (arXiv 1807.03039), section 3.1, which scales each channel.
    """

    initialized: Tensor

    def __init__(self, field_type: enn.FieldType, *, data_init: bool = True, cache_size: int = 1) -> None:
        super().__init__(field_type, cache_size=cache_size)
        data_init = check_flag("data_init", data_init)
        decomposition = IrrepDecomposition(field_type)
        sizes = decomposition.sizes
        basis = decomposition.change_of_basis
        channels = decomposition.block_of_channel
        self._constants = Constants(
            basis=basis,
            basis_or_none=None if decomposition.is_identity else basis,
            invariants=basis[:, decomposition.trivial],
            channel_of=channels,
            sizes=sizes.astype(float),
            trivial_scales=np.array([i for i, b in enumerate(decomposition.blocks) if b.irrep.is_trivial()], int),
            # Averages squares over the channels of each irrep.
            pool=(channels == np.arange(len(sizes))[:, None]) / sizes[:, None],
        )
        self._spatial_dims = self.event_dim - 1
        self.log_scale = torch.nn.Parameter(torch.zeros(len(sizes)))
        self.loc = torch.nn.Parameter(torch.zeros(len(decomposition.trivial)))
        self.register_buffer("initialized", torch.tensor(not data_init))
        self._waiting = _Waiting(data_init)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # Parameters that come without the flag are somebody's choice, whatever their values.
        chosen = f"{prefix}initialized" not in state_dict and f"{prefix}log_scale" in state_dict
        self._waiting.waits, self._waiting.steps = not (chosen or bool(self.initialized)), None

    def _stop_waiting(self) -> None:
        self._waiting.waits = False
        self.initialized.fill_(True)

    def _is_touched(self) -> bool:
        """Whether training has begun."""
        if self._waiting.steps is None:
            self._waiting.steps = optimizer_steps()
        return bool(
            self.initialized  # by a rank of DistributedDataParallel that saw a batch, say
            or self.log_scale.any()
            or self.loc.any()
            or self._waiting.steps != optimizer_steps()
        )

    def _see(self, data: Tensor, inverse: bool) -> None:
        """Sets a layer that waits by a batch, or ends its waiting."""
        if self._is_touched():
            self._stop_waiting()
        else:
            self._initialize(data, inverse)

    @torch.no_grad()
    def _initialize(self, data: Tensor, inverse: bool) -> None:
        """Sets the parameters so that ``data``, run through the map in one direction, comes out normalised."""
        constants = self._constants.like(self.log_scale)
        rows = data.movedim(-1 - self._spatial_dims, -1).reshape(-1, self.field_type.size)
        loc = (rows @ constants["invariants"]).mean(0)
        if len(rows) < _MIN_ROWS:
            return
        refuse_within_data_parallel(type(self).__name__)
        centred = (rows - loc @ constants["invariants"].T) @ constants["basis"]
        scale = (centred.square().mean(0) @ constants["pool"].T).sqrt()
        # A field that does not vary (a border of zeros, say) has no scale to correct.
        log_scale = torch.where(scale > 1e-6, scale, 1.0).log()
        # y = e^s (x - b). Backwards x = e^-s y + b, which has mean 0 where b = -e^-s times the mean of y.
        self.log_scale.copy_(log_scale if inverse else -log_scale)
        trivial = log_scale.index_select(0, constants["trivial_scales"])
        self.loc.copy_(-loc * (-trivial).exp() if inverse else loc)
        self._stop_waiting()

    @staticmethod
    def _per_channel(values: Tensor, constants: dict[str, Tensor]) -> Tensor:
        return values.index_select(0, constants["channel_of"])

    def _affine(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        waits = self._waiting.waits and not is_traced()
        if waits and self.training and x.numel():
            self._see(x, inverse)
        constants = self._constants.like(self.log_scale)
        spatial = (...,) + self._spatial_dims * (None,)
        sign = -1.0 if inverse else 1.0
        scale = self._per_channel(sign * self.log_scale, constants).exp()
        if waits and scale.requires_grad:
            scale.register_hook(lambda _: self._stop_waiting())  # a gradient: training begins
        shift = (constants["invariants"] @ self.loc)[spatial]
        x = x if inverse else x - shift
        basis = constants["basis_or_none"]
        if basis is None:
            x = x * scale[spatial]
        else:
            x = channel_matmul((basis * scale) @ basis.T, x, self._spatial_dims)
        x = x + shift if inverse else x
        positions = x.shape[x.dim() - self._spatial_dims :].numel()
        ladj = sign * positions * (constants["sizes"] @ self.log_scale)
        return x, ladj.expand(x.shape[: x.dim() - self.event_dim])

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._affine(x, inverse=False)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._affine(y, inverse=True)


def awaits_data(module: torch.nn.Module) -> bool:
    """Whether the next large batch would set a layer of a module."""
    layers = [part for part in module.modules() if isinstance(part, EquivariantActNorm)]
    return any(layer.training and layer._waiting.waits for layer in layers)


def equivariant_actnorm(field_type: enn.FieldType, *, data_init: bool = True) -> EquivariantActNorm:
    """An :class:`EquivariantActNorm`.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_actnorm
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> equivariant_actnorm(vectors)(torch.randn(50, 6)).shape
        torch.Size([50, 6])

    :param field_type: how the group acts on the event.
    :param data_init: whether the first batch sets the parameters.
    """
    return EquivariantActNorm(field_type, data_init=data_init)
