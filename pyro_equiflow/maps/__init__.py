# SPDX-License-Identifier: Apache-2.0
"""What a coupling or an autoregressive flow does to a block of an event, one map a file."""

from pyro_equiflow.maps.affine import Affine
from pyro_equiflow.maps.block_map import BlockMap, FieldScalars, Head
from pyro_equiflow.maps.blocks import Block
from pyro_equiflow.maps.commutant import Commutant
from pyro_equiflow.maps.spline import Spline

__all__ = ["Affine", "Block", "BlockMap", "Commutant", "FieldScalars", "Head", "Spline"]
