# SPDX-License-Identifier: Apache-2.0
"""Maps by name."""

from __future__ import annotations

from pyro_equiflow.maps.affine import Affine
from pyro_equiflow.maps.block_map import BlockMap
from pyro_equiflow.maps.commutant import Commutant
from pyro_equiflow.maps.spline import Spline
from pyro_equiflow.ops.arguments import check_choice

__all__ = ["block_map"]

_BY_NAME: dict[str, type[Affine | Commutant | Spline]] = {"affine": Affine, "commutant": Commutant, "spline": Spline}


def block_map(transformer: str | BlockMap, log_scale_bound: float | None = None) -> BlockMap:
    """A map, or the one of that name with its default settings.

    :param log_scale_bound: of a map by name, in place of its default.
    :raises TypeError: neither a name nor a map.
    :raises ValueError: an unknown name, or a bound beside a map, which has its own.
    """
    if isinstance(transformer, BlockMap):
        if log_scale_bound is not None:
            raise ValueError(
                f"log_scale_bound: expected None beside the map {transformer!r}, found {log_scale_bound!r}: it is a "
                f"setting of the map, {type(transformer).__name__}(log_scale_bound=...) where it has one"
            )
        return transformer
    kind = _BY_NAME[check_choice("transformer", transformer, _BY_NAME, also="a map of pyro_equiflow.maps")]
    return kind() if log_scale_bound is None else kind(log_scale_bound=log_scale_bound)
