# SPDX-License-Identifier: Apache-2.0
"""A linear map as one gather of its weights, where no two basis elements share an entry."""

from __future__ import annotations

import numpy as np

__all__ = ["block_gather", "is_disjoint"]


def is_disjoint(basis: np.ndarray) -> bool:
    """Whether every entry is non-zero in one basis element at most; ``basis`` is ``(number, out, in, *kernel)``."""
    return bool(((basis != 0).sum(axis=0) <= 1).all())


def block_gather(basis: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which weight stands at each entry of a block between equal fields, and by what factor.

    :param basis: disjoint, shape ``(number, size out, size in, *kernel)``.
    :param seen: which output field sees which input field, booleans ``(fields out, fields in)``.
    :return: indices into flat weights ``(pairs of fields seen, number)``, and factors, both of shape
        ``(channels out, channels in, *kernel)``; the factor is 0 where a field is not seen.
    """
    fields_out, fields_in = seen.shape
    weights = np.zeros((*seen.shape, len(basis)), dtype=np.int64)
    weights[seen] = np.arange(seen.sum() * len(basis)).reshape(-1, len(basis))
    index = weights[:, :, (basis != 0).argmax(axis=0)]
    factor = np.where(seen.reshape(*seen.shape, *(basis.ndim - 1) * (1,)), basis.sum(axis=0), 0.0)
    channels = (fields_out * basis.shape[1], fields_in * basis.shape[2], *basis.shape[3:])
    return np.swapaxes(index, 1, 2).reshape(channels), np.swapaxes(factor, 1, 2).reshape(channels)
