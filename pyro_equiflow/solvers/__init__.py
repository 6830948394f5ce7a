# SPDX-License-Identifier: Apache-2.0
"""Fixed points of contractions, batched and certified, and their gradients: tensors and callables only."""

from pyro_equiflow.solvers.adjoint import Adjoint, DenseAdjoint, ImplicitAdjoint, UnrolledAdjoint
from pyro_equiflow.solvers.iteration import Solution, Solver
from pyro_equiflow.solvers.methods import Anderson, FixedPoint
from pyro_equiflow.solvers.root import fixed_point

__all__ = [
    "Adjoint",
    "Anderson",
    "DenseAdjoint",
    "FixedPoint",
    "ImplicitAdjoint",
    "Solution",
    "Solver",
    "UnrolledAdjoint",
    "fixed_point",
]
