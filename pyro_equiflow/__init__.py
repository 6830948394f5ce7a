# SPDX-License-Identifier: Apache-2.0
"""Equivariant normalizing flows for Pyro: transforms that commute with a symmetry group."""

from pyro_equiflow import (
    _escnn,  # noqa: F401  (escnn is made fit before anything imports it)
    infer,
    logdet,
    maps,
    nn,
    solvers,
    testing,
)
from pyro_equiflow import transforms as _transforms
from pyro_equiflow.distributions import AugmentedDistribution, InvariantNormal, OrbitMixture, augment, matrix_group
from pyro_equiflow.errors import ConvergenceError, EquivarianceError, EvidenceWarning, PrecisionWarning
from pyro_equiflow.field_types import field_type
from pyro_equiflow.flows import equivariant_flow, image_flow
from pyro_equiflow.images import bits_per_dim, dequantize
from pyro_equiflow.infer import *  # noqa: F403
from pyro_equiflow.ops.serialization import register_reducers
from pyro_equiflow.particles import particle_permutation, particle_type
from pyro_equiflow.registration import register
from pyro_equiflow.transforms import *  # noqa: F403
from pyro_equiflow.version import __version__

__all__ = [
    "AugmentedDistribution",
    "ConvergenceError",
    "EquivarianceError",
    "EvidenceWarning",
    "InvariantNormal",
    "OrbitMixture",
    "PrecisionWarning",
    "__version__",
    "augment",
    "bits_per_dim",
    "dequantize",
    "equivariant_flow",
    "field_type",
    "image_flow",
    "infer",
    "logdet",
    "maps",
    "matrix_group",
    "nn",
    "particle_permutation",
    "particle_type",
    "solvers",
    "testing",
    *infer.__all__,
    *_transforms.__all__,
]

register()
register_reducers()
