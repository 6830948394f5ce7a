# SPDX-License-Identifier: Apache-2.0
"""Checks of symmetry, inverses and log-dets, for transforms and distributions of ours or a user's.

Each ``…_error`` gives a number, each ``assert_…`` raises ``AssertionError`` with that number, the tolerance and the
element where it is largest. Tolerances by default are those the package holds itself to, :data:`TOLERANCES`.
"""

from pyro_equiflow.ops.events import act
from pyro_equiflow.ops.rounding import rounding_error
from pyro_equiflow.testing import tolerances as _tolerances
from pyro_equiflow.testing.bijections import assert_inverse, assert_log_det, inverse_error, log_det_error
from pyro_equiflow.testing.symmetry import (
    assert_equivariant,
    assert_invariant,
    equivariance_error,
    equivariance_errors,
    invariance_error,
)

__all__ = [
    "TOLERANCES",
    "act",
    "assert_equivariant",
    "assert_invariant",
    "assert_inverse",
    "assert_log_det",
    "equivariance_error",
    "equivariance_errors",
    "invariance_error",
    "inverse_error",
    "log_det_error",
    "rounding_error",
]

#: Largest error by property and dtype; ``"equivariance"`` on grids in float64 allows for escnn's sampling.
TOLERANCES = _tolerances.TOLERANCES
