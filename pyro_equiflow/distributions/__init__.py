# SPDX-License-Identifier: Apache-2.0
"""Distributions that a symmetry group leaves unchanged, one a file."""

from pyro_equiflow.distributions.augmented import AugmentedDistribution, augment
from pyro_equiflow.distributions.invariant_normal import InvariantNormal
from pyro_equiflow.distributions.orbit import matrix_group
from pyro_equiflow.distributions.orbit_mixture import OrbitMixture

__all__ = ["AugmentedDistribution", "InvariantNormal", "OrbitMixture", "augment", "matrix_group"]
