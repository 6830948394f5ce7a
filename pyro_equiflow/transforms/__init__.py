# SPDX-License-Identifier: Apache-2.0
"""Transforms that commute with a symmetry group, one a file."""

from pyro_equiflow.transforms.actnorm import EquivariantActNorm, equivariant_actnorm
from pyro_equiflow.transforms.base import (
    ConditionalEquivariantTransform,
    EquivariantTransform,
    Inverse,
)
from pyro_equiflow.transforms.compose import Compose
from pyro_equiflow.transforms.coupling import (
    ConditionalEquivariantCoupling,
    EquivariantCoupling,
    conditional_equivariant_coupling,
    equivariant_coupling,
)
from pyro_equiflow.transforms.linear import EquivariantLinear, equivariant_linear

__all__ = [
    "Compose",
    "ConditionalEquivariantCoupling",
    "ConditionalEquivariantTransform",
    "EquivariantActNorm",
    "EquivariantCoupling",
    "EquivariantLinear",
    "EquivariantTransform",
    "Inverse",
    "conditional_equivariant_coupling",
    "equivariant_actnorm",
    "equivariant_coupling",
    "equivariant_linear",
]
