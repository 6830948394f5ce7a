# SPDX-License-Identifier: Apache-2.0
"""Channels in another order and in groups, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pyro_equiflow.ops.constants import Constants
from pyro_equiflow.ops.events import cat_channels

__all__ = ["ChannelGroups", "ChannelOrder"]


class ChannelOrder:
    """An order of the channels of events ``(*batch, C, *spatial)``.

    :param order: which channel comes first, second, and so on.
    :param spatial_dims: dimensions of the grid.
    """

    def __init__(self, order: np.ndarray, spatial_dims: int) -> None:
        self._dim = -1 - spatial_dims
        self._constants = Constants(order=order, inverse_order=np.argsort(order))

    def apply(self, x: Tensor) -> Tensor:
        """The channels in this order."""
        return x.index_select(self._dim, self._constants.like(x)["order"])

    def undo(self, x: Tensor) -> Tensor:
        """The channels as they stood."""
        return x.index_select(self._dim, self._constants.like(x)["inverse_order"])


class ChannelGroups:
    """Groups that the channels of events ``(*batch, C, *spatial)`` fall into.

    :param groups: for each group its channels, in the order wanted.
    :param spatial_dims: dimensions of the grid.
    """

    def __init__(self, groups: Sequence[np.ndarray], spatial_dims: int) -> None:
        self._spatial_dims = spatial_dims
        # Groups that are runs of channels are taken as they stand, with no index.
        runs = all((np.diff(group) == 1).all() for group in groups)
        self._order = None if runs else ChannelOrder(np.concatenate(groups), spatial_dims)
        starts = [int(group[0]) if runs and len(group) else i for i, group in enumerate(groups)]
        self._standing = [int(i) for i in np.argsort(starts, kind="stable")]
        self._sizes = [len(groups[i]) for i in self._standing]
        self._places = [self._standing.index(i) for i in range(len(groups))]

    def take_apart(self, x: Tensor) -> list[Tensor]:
        """The groups of an event."""
        if self._order is not None:
            x = self._order.apply(x)
        parts = x.split(self._sizes, -1 - self._spatial_dims)
        return [parts[i] for i in self._places]

    def put_together(self, *groups: Tensor) -> Tensor:
        """The event of some groups, all of the batch shape of the last one or such that broadcast to it."""
        dim = -1 - self._spatial_dims
        batch = groups[-1].shape[:dim]
        parts = [g if g.shape[:dim] == batch else g.expand(*batch, *g.shape[dim:]) for g in groups]
        x = cat_channels([parts[i] for i in self._standing], self._spatial_dims)
        return x if self._order is None else self._order.undo(x)
