# SPDX-License-Identifier: Apache-2.0
"""Channels in another order and in groups, and back."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

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

    :param groups: for each group, two or more, its channels in the order wanted.
    :param spatial_dims: dimensions of the grid.
    """

    def __init__(self, groups: Sequence[np.ndarray], spatial_dims: int) -> None:
        self._spatial_dims = spatial_dims
        # Groups that are runs of channels are taken as they stand, with no index.
        runs = all((np.diff(group) == 1).all() for group in groups)
        self._order = None if runs else ChannelOrder(np.concatenate(groups), spatial_dims)
        starts = [int(group[0]) if runs and len(group) else i for i, group in enumerate(groups)]
        standing = [int(i) for i in np.argsort(starts, kind="stable")]
        self._sizes = [len(groups[i]) for i in standing]
        self._as_they_stand = itemgetter(*standing)
        self._as_given = itemgetter(*map(standing.index, range(len(groups))))

    def take_apart(self, x: Tensor) -> tuple[Tensor, ...]:
        """The groups of an event."""
        if self._order is not None:
            x = self._order.apply(x)
        return self._as_given(x.split(self._sizes, -1 - self._spatial_dims))

    def put_together(self, *groups: Tensor) -> Tensor:
        """The event of some groups, of one batch shape, unless the last one's is larger."""
        dim = -1 - self._spatial_dims
        batch = groups[-1].shape[:dim]
        if groups[0].shape[:dim] != batch:  # a batch of contexts on one event
            groups = tuple(g.expand(*batch, *g.shape[dim:]) for g in groups)
        x = cat_channels(self._as_they_stand(groups), self._spatial_dims)
        return x if self._order is None else self._order.undo(x)
