# SPDX-License-Identifier: Apache-2.0
"""Transforms that commute with a symmetry group, one a file."""

from pyro_equiflow.transforms.actnorm import EquivariantActNorm, equivariant_actnorm
from pyro_equiflow.transforms.base import EquivariantTransform, Inverse
from pyro_equiflow.transforms.compose import Compose
from pyro_equiflow.transforms.conditional import ConditionalEquivariantTransform
from pyro_equiflow.transforms.coupling import (
    ConditionalEquivariantCoupling,
    EquivariantCoupling,
    conditional_equivariant_coupling,
    equivariant_coupling,
)
from pyro_equiflow.transforms.iaf import (
    ConditionalEquivariantIAF,
    EquivariantIAF,
    conditional_equivariant_iaf,
    equivariant_iaf,
)
from pyro_equiflow.transforms.implicit import (
    ConditionalEquivariantImplicit,
    EquivariantImplicit,
    conditional_equivariant_implicit,
    equivariant_implicit,
)
from pyro_equiflow.transforms.linear import EquivariantLinear, equivariant_linear
from pyro_equiflow.transforms.logit import LogitTransform
from pyro_equiflow.transforms.mean_free import MeanFreePositions
from pyro_equiflow.transforms.multiscale import MultiScale
from pyro_equiflow.transforms.residual import (
    ConditionalEquivariantResidual,
    EquivariantResidual,
    conditional_equivariant_residual,
    equivariant_residual,
)
from pyro_equiflow.transforms.squeeze import EquivariantSqueeze, equivariant_squeeze

__all__ = [
    "Compose",
    "ConditionalEquivariantCoupling",
    "ConditionalEquivariantIAF",
    "ConditionalEquivariantImplicit",
    "ConditionalEquivariantResidual",
    "ConditionalEquivariantTransform",
    "EquivariantActNorm",
    "EquivariantCoupling",
    "EquivariantIAF",
    "EquivariantImplicit",
    "EquivariantLinear",
    "EquivariantResidual",
    "EquivariantSqueeze",
    "EquivariantTransform",
    "Inverse",
    "LogitTransform",
    "MeanFreePositions",
    "MultiScale",
    "conditional_equivariant_coupling",
    "conditional_equivariant_iaf",
    "conditional_equivariant_implicit",
    "conditional_equivariant_residual",
    "equivariant_actnorm",
    "equivariant_coupling",
    "equivariant_iaf",
    "equivariant_implicit",
    "equivariant_linear",
    "equivariant_residual",
    "equivariant_squeeze",
]
