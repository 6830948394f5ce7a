# SPDX-License-Identifier: Apache-2.0
"""A linear map as one look-up of its weights, where no two basis elements share an entry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pyro_equiflow.ops.constants import Constants

__all__ = ["EntrywiseExpansion", "block_entries", "is_disjoint"]


class EntrywiseExpansion:
    """Entries of matrices, each one weight times a factor.

    :param index: which weight stands at each entry.
    :param factor: the factors; a weight that stands nowhere with a factor other than 0 has no effect.
    """

    def __init__(self, index: np.ndarray, factor: np.ndarray) -> None:
        self.index, self.factor = index, factor
        in_order = bool((index == np.arange(len(index))).all())
        self._constants = Constants(
            index=None if in_order else index, factor=None if bool((factor == 1).all()) else factor
        )

    def __call__(self, weight: Tensor) -> Tensor:
        """The entries, differentiable in the flat vector ``weight``."""
        if not len(weight):
            return weight.new_zeros(len(self))
        constants = self._constants.like(weight)
        entries = weight if constants["index"] is None else weight.index_select(0, constants["index"])
        return entries if constants["factor"] is None else entries * constants["factor"]

    def __len__(self) -> int:
        return len(self.index)

    @staticmethod
    def joined(expansions: Sequence[EntrywiseExpansion], sizes: Sequence[int]) -> EntrywiseExpansion:
        """Several in one, from their weights one after the other, ``sizes`` of each."""
        starts = np.cumsum([0, *sizes[:-1]])
        index = np.concatenate([one.index + start for one, start in zip(expansions, starts)])
        # What has no weights reads some other's, times zero.
        index = np.minimum(index, max(sum(sizes) - 1, 0))
        return EntrywiseExpansion(index, np.concatenate([one.factor for one in expansions]))


def is_disjoint(basis: np.ndarray) -> bool:
    """Whether every entry is non-zero in one basis element at most; ``basis`` is ``(number, out, in, *kernel)``."""
    return bool(((basis != 0).sum(axis=0) <= 1).all())


def block_entries(basis: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
