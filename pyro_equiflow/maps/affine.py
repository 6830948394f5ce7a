# SPDX-License-Identifier: Apache-2.0
"""Scales and shifts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_equiflow.maps.block_map import BlockMap, Head
from pyro_equiflow.maps.blocks import Block
from pyro_equiflow.ops.arguments import check_number

__all__ = ["Affine"]


class Affine(BlockMap):
    r"""The map :math:`y = \exp(s) \cdot x + t` of some blocks of an event, :math:`|s| \le b`.

    For a field whose channels the group permutes :math:`s` is a field of the same type that acts pointwise, for any
    other one invariant number per irrep. A raw scale :math:`u` counts as :math:`s = b \tanh(u / b)`.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_coupling
        >>> from pyro_equiflow.maps import Affine
        >>> space = gspaces.no_base_space(group.so3_group())
        >>> vectors = enn.FieldType(space, 3 * [space.irrep(1)])
        >>> equivariant_coupling(vectors, transformer=Affine(log_scale_bound=1.0))(torch.randn(5, 9)).shape
        torch.Size([5, 9])

    :param log_scale_bound: the bound :math:`b`, positive. By default a factor of :math:`e^3 = 20` either way: data of
        order one need no more in one step, and 29 such steps in a row stay within the range of float32.
    :raises TypeError: a bound that is no number.
    :raises ValueError: one that is not positive.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP* (arXiv 1605.08803), eq. 7 and 8.
    """

    def __init__(self, *, log_scale_bound: float = 3.0) -> None:
        self.log_scale_bound = check_number("log_scale_bound", log_scale_bound, "(0, inf)")

    def heads(self, blocks: Sequence[Block]) -> Sequence[Head]:
        """Scales and shifts."""
        return [Head([block.scales for block in blocks]), Head([block.fields for block in blocks])]

    def forward(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The image of ``x`` and the log-det."""
        raw, shift = parameters
        scale = self._bounded(raw)
        return self.scalars.times(x, scale.exp()) + shift, self.scalars.total(scale)

    def inverse(self, y: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The preimage of ``y`` and the log-det of the inverse."""
        raw, shift = parameters
        scale = self._bounded(raw)
        return self.scalars.times(y - shift, (-scale).exp()), -self.scalars.total(scale)

    def _bounded(self, raw: Tensor) -> Tensor:
        bound = self.log_scale_bound
        return bound * torch.tanh(raw / bound)
