# SPDX-License-Identifier: Apache-2.0
"""The network inside a transform: an escnn module tree called on plain tensors of any batch shape."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.nn.expand import Expanded, expand
from pyro_equiflow.nn.linear.kernels import cast_buffers
from pyro_equiflow.ops.arguments import check_instance
from pyro_equiflow.ops.events import event_dim, flatten_batch
from pyro_equiflow.ops.representations import validate_field_type

__all__ = ["Conditioner"]


class Conditioner(torch.nn.Module):
    """Holds an equivariant network so that a density made of it is well defined.

    - Its output at one sample hangs on that sample alone: batch statistics and dropout are refused.
    - It stays in escnn's training mode for ever: in evaluation mode escnn's layers keep a filter of their own
      that later parameters do not reach, and that ends up in ``state_dict``.
    - Layers of escnn's own own their bases: ``.double()`` on one leaves every other alone.

    Transforms make one of the network that they are given. By itself it is an equivariant map of plain tensors, an
    encoder say.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.nn import Conditioner, steerable_net
        >>> space = gspaces.no_base_space(group.o2_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1, 1)])
        >>> encoder = Conditioner(steerable_net(vectors, vectors, hidden_dims=(16,)), vectors, vectors)
        >>> encoder(torch.randn(7, 5, 6)).shape
        torch.Size([7, 5, 6])

    :param network: an escnn ``EquivariantModule``.
    :param in_type: the type it has to take.
    :param out_type: the type it has to give.
    :raises TypeError: not an ``EquivariantModule``.
    :raises ValueError: wrong types, or a module that depends on the batch or on chance.
    """

    def __init__(self, network: enn.EquivariantModule, in_type: enn.FieldType, out_type: enn.FieldType) -> None:
        super().__init__()
        remedy = "build one with pyro_equiflow.nn.steerable_net(in_type, out_type)"
        check_instance("conditioner", network, enn.EquivariantModule, "an escnn.nn.EquivariantModule", remedy=remedy)
        for name, field_type in (("in_type", in_type), ("out_type", out_type)):
            validate_field_type(field_type, name)
        for name, expected in (("in_type", in_type), ("out_type", out_type)):
            found = getattr(network, name)
            if found != expected:
                raise ValueError(f"conditioner: expected {name} {expected}, found {found}")
        for module in network.modules():
            if any(word in type(module).__name__ for word in ("BatchNorm", "Dropout")):
                raise ValueError(
                    f"conditioner: found {type(module).__name__}; a density must not depend on chance or on who "
                    "else is in the batch: take the module out"
                )
            if "_basisexpansion" in module._modules:
                module._basisexpansion = copy.deepcopy(module._basisexpansion)
                # A layer of escnn's that was cast somewhere has cast the basis that it shared with this one.
                cast_buffers(module._basisexpansion, module.weights.dtype)
        self.network = network
        self._event_dim = event_dim(in_type)
        network.train(True)

    def train(self, mode: bool = True) -> Conditioner:
        """Sets this module's own flag; the network keeps escnn's training mode."""
        self.training = mode
        return self

    def expanded(self) -> Expanded:
        """The network's map on plain tensors, weights expanded from the present parameters."""
        return expand(self.network)

    def on_events(self) -> Callable[[Tensor], Tensor]:
        """The network's map on events of any batch shape, weights expanded once for all its calls."""
        expanded = self.expanded()

        def fn(x: Tensor) -> Tensor:
            if x.dim() == self._event_dim + 1:
                return expanded(x)
            flat, batch = flatten_batch(x, self._event_dim)
            out = expanded(flat)
            return out.unflatten(0, batch) if batch else out[0]

        return fn

    def forward(self, x: Tensor) -> Tensor:
        """The network's output, ``(*batch, C_in, *spatial)`` to ``(*batch, C_out, *spatial)``."""
        return self.on_events()(x)
