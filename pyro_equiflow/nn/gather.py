# SPDX-License-Identifier: Apache-2.0
"""A linear map as one gather of its weights, where no two basis elements share an entry."""

from __future__ import annotations

import numpy as np

__all__ = ["block_gather", "is_disjoint"]


def is_disjoint(basis: np.ndarray) -> bool:
    """Whether every entry is non-zero in one basis element at most; ``basis`` is ``(number, out, in, *kernel)``."""
    return bool(((basis != 0).sum(axis=0) <= 1).all())


def block_gather(basis: np.ndarray, fields_out: int, fields_in: int) -> tuple[np.ndarray, np.ndarray]:
    """Which weight stands at each entry of a block between equal fields, and by what factor.

    :param basis: disjoint, shape ``(number, size out, size in, *kernel)``.
    :return: indices into flat weights ``(fields out, fields in, number)``, and factors, both of shape
        ``(channels out, channels in, *kernel)``.
    """
    weights = np.arange(fields_out * fields_in * len(basis)).reshape(fields_out, fields_in, -1)
    index = weights[:, :, (basis != 0).argmax(axis=0)]
    factor = np.broadcast_to(basis.sum(axis=0), index.shape)
    channels = (fields_out * basis.shape[1], fields_in * basis.shape[2], *basis.shape[3:])
    return np.swapaxes(index, 1, 2).reshape(channels), np.swapaxes(factor, 1, 2).reshape(channels)
