# SPDX-License-Identifier: Apache-2.0
"""Grids continued periodically beyond their borders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pad_periodic"]


def pad_periodic(x: Tensor, widths: Sequence[int]) -> Tensor:
    """``x`` with its last dimensions continued periodically, as ``torch.nn.functional.pad(mode="circular")`` does.

    torch's own writes slices into a new tensor, which costs several passes over memory a slice going back, and under
    :func:`torch.vmap`, as batched Jacobians run it, many times that. Joined slices cost the same in every direction.

    :param x: shape ``(*batch, *spatial)``.
    :param widths: points added at either side of each spatial dimension; more than a period is allowed.
    :return: shape ``(*batch, *(side + 2 * width))``.
    """
    # The last dimension first, while the tensor is smallest: its rows are the slowest to join.
    for dim, width in zip(range(-1, -1 - len(widths), -1), reversed(widths)):
        side = x.shape[dim]
        if side >= 2 * width > 0:
            # One split, not two slices: both ends have their gradients from one tensor.
            first, _, last = x.split([width, side - 2 * width, width], dim)
            x = torch.cat([last, x, first], dim)
        elif width:
            x = x.index_select(dim, torch.arange(-width, side + width, device=x.device) % side)
    return x
