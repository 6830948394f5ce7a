# SPDX-License-Identifier: Apache-2.0
"""The choice of the map of blocks, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from pyro_equiflow.ops.arguments import check_choice, check_integer, check_number, set_fields
from pyro_equiflow.ops.splines import MIN_BIN
from pyro_equiflow.transforms.affine import BlockAffine, BlockCommutant
from pyro_equiflow.transforms.block_map import BlockMap
from pyro_equiflow.transforms.blocks import Block
from pyro_equiflow.transforms.spline import BlockSpline

__all__ = ["Transformer", "WithTransformer"]

_KINDS = ("affine", "commutant", "spline")


@dataclass(frozen=True)
class Transformer:
    r"""A kind of :class:`~pyro_equiflow.transforms.block_map.BlockMap` with its settings.

    :param kind: ``"affine"``, ``"commutant"`` or ``"spline"``.
    :param log_scale_bound: the largest :math:`|s|`; positive.
    :param spline_bound: splines are the identity beyond it; positive.
    :param num_bins: bins of each spline, from 2.
    :raises TypeError: a setting of another type.
    :raises ValueError: an unknown kind, or a setting out of its range.
    """

    kind: str = "affine"
    log_scale_bound: float = 3.0
    spline_bound: float = 5.0
    num_bins: int = 8

    def __post_init__(self) -> None:
        check_choice("transformer", self.kind, _KINDS)
        most = int(0.5 / MIN_BIN)  # so that least lengths leave half of the interval to choose
        set_fields(
            self,
            log_scale_bound=check_number("log_scale_bound", self.log_scale_bound, "(0, inf)"),
            spline_bound=check_number("spline_bound", self.spline_bound, "(0, inf)"),
            num_bins=check_integer("num_bins", self.num_bins, 2, most),
        )

    def keywords(self) -> dict[str, Any]:
        """The settings by the keywords that transforms take them by."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"transformer": settings.pop("kind"), **settings}

    def of(self, blocks: Sequence[Block], spatial_dims: int) -> BlockMap:
        """The map of some blocks."""
        if self.kind == "affine":
            return BlockAffine(blocks, spatial_dims, self.log_scale_bound)
        if self.kind == "commutant":
            return BlockCommutant(blocks, spatial_dims, self.log_scale_bound)
        return BlockSpline(blocks, spatial_dims, self.log_scale_bound, self.spline_bound, self.num_bins)


class WithTransformer:
    """What transforms that map blocks by a :class:`Transformer` tell of it; it is chosen when they are built."""

    _transformer: Transformer

    @property
    def transformer(self) -> str:
        """The map of the blocks: ``"affine"``, ``"commutant"`` or ``"spline"``."""
        return self._transformer.kind

    @property
    def log_scale_bound(self) -> float:
        """The largest :math:`|s|`."""
        return self._transformer.log_scale_bound
