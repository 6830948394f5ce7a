# SPDX-License-Identifier: Apache-2.0
"""Equivariant actnorm: scale and shift set by a first batch, before training or never."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.ops.arguments import check_flag
from pyro_equiflow.ops.coordinates import IrrepCoordinates
from pyro_equiflow.ops.data_parallel import refuse_within_data_parallel
from pyro_equiflow.ops.fingerprint import optimizer_steps
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
        self._coordinates = IrrepCoordinates(field_type)
        self.log_scale = torch.nn.Parameter(torch.zeros(self._coordinates.irreps.number))
        self.loc = torch.nn.Parameter(torch.zeros(len(self._coordinates.trivial)))
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
        coordinates, irreps, trivial = self._coordinates, self._coordinates.irreps, self._coordinates.trivial

        def mean(values: Tensor) -> Tensor:
            channels_first = values.movedim(-1 - coordinates.spatial_dims, 0)
            return channels_first.reshape(len(channels_first), -1).mean(1)

        z = coordinates.coordinates(data)
        if z.numel() < _MIN_ROWS * self.field_type.size:
            return
        refuse_within_data_parallel(type(self).__name__)
        loc = mean(z)[trivial]
        centre = z.new_zeros(self.field_type.size)
        centre[trivial] = loc
        squares = mean(irreps.squares(z - coordinates.everywhere(centre)))
        scale = (squares / torch.as_tensor(irreps.repeats).to(squares)).sqrt()
        # A field that does not vary (a border of zeros, say) has no scale to correct.
        log_scale = torch.where(scale > 1e-6, scale, 1.0).log()
        # y = e^s (x - b). Backwards x = e^-s y + b, which has mean 0 where b = -e^-s times the mean of y.
        self.log_scale.copy_(log_scale if inverse else -log_scale)
        trivial_scale = log_scale[coordinates.trivial_irreps].exp()
        self.loc.copy_(-loc / trivial_scale if inverse else loc)
        self._stop_waiting()

    def _affine(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        waits = self._waiting.waits and not is_traced()
        if waits and self.training and x.numel():
            self._see(x, inverse)
        coordinates, log_scale = self._coordinates, -self.log_scale if inverse else self.log_scale
        scale = coordinates.everywhere(log_scale.exp())
        if waits and scale.requires_grad:
            scale.register_hook(lambda _: self._stop_waiting())  # a gradient: training begins
        shift = coordinates.invariant(self.loc)
        z = coordinates.coordinates(x if inverse else x - shift)
        y = coordinates.event(coordinates.irreps.times(z, scale))
        positions = x.shape[x.dim() - coordinates.spatial_dims :].numel()
        ladj = positions * coordinates.irreps.total(coordinates.everywhere(log_scale))
        return y + shift if inverse else y, ladj.expand(x.shape[: x.dim() - self.event_dim])

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
