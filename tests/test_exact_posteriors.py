# SPDX-License-Identifier: Apache-2.0
"""Guides against log evidences known by quadrature, on two-dimensional posteriors with a symmetry.

A single vector cannot be split, so couplings alone do not apply to it. Two ways round that are exact and used here:

- under a finite group, a plain flow (the trivial group's) averaged over the group, the guide's default: the flow learns
  one of the modes, which a continuous map from one normal could not separate;
- auxiliary latent values: a further normal site that nothing observed depends on. It leaves the evidence as it is and
  gives couplings a second block. Invariant ones let lengths be reshaped, vectors (for the dihedral groups) let modes
  be chosen.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import group, gspaces
from escnn.nn import FieldType
from pyro.infer import Trace_ELBO
from scipy.special import logsumexp

from pyro_equiflow.flows import equivariant_flow
from pyro_equiflow.infer import AutoEquivariantFlow, importance_weights
from pyro_equiflow.infer.evidence import estimate
from pyro_equiflow.testing import assert_invariant

CASES = {
    "D2": (lambda z: power(z, 2), 1.0, 0.25, -1.8770917958),
    "D3": (lambda z: power(z, 3), 1.0, 0.25, -2.2056930087),
    "O2": (lambda z: (z.square().sum(-1) + 1e-24).sqrt(), 2.0, 0.1, -1.3019763355),
}


def power(z, order):
    """The real part of the complex number's power."""
    x, y = z[..., 0], z[..., 1]
    return x * x - y * y if order == 2 else x**3 - 3 * x * y * y


def model(case, auxiliary=0):
    function, y, s, _ = CASES[case]
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    if auxiliary:
        pyro.sample("auxiliary", dist.Normal(torch.zeros(auxiliary), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(function(z), s), obs=torch.tensor(y))


@pytest.mark.parametrize("case", CASES)
def test_quadrature(case):
    function, y, s, expected = CASES[case]
    # The trapezium rule converges faster than any power of the step for a smooth integrand that falls off.
    points = np.linspace(-6.5, 6.5, 1601)
    x1, x2 = np.meshgrid(points, points, indexing="ij")
    value = function(torch.from_numpy(np.stack([x1, x2], -1))).numpy()
    log_joint = -(x1**2 + x2**2) / 2 - math.log(2 * math.pi)
    log_joint += -((y - value) ** 2) / (2 * s * s) - math.log(s * math.sqrt(2 * math.pi))
    found = logsumexp(log_joint) + 2 * math.log(points[1] - points[0])
    assert found == pytest.approx(expected, abs=1e-8)


def train(guide, case, auxiliary, steps, learning_rate, particles):
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=0)(model, guide)
    optimizer = torch.optim.Adam(guide.parameters(), lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        elbo(case, auxiliary).backward()
        optimizer.step()
        scheduler.step()


def assess(guide, case, auxiliary, gap):
    """The importance-weighted estimate is the evidence within 4 standard errors, the ELBO within ``gap`` nats."""
    expected = CASES[case][-1]
    weights = importance_weights(model, guide, case, auxiliary, num_samples=20_000, batch_size=5000)
    found = estimate(weights)  # where a flow is steep, rare draws weigh so much that evidence_estimate warns
    assert found.efficiency > 0.1
    relative = (weights.double() - weights.max()).exp()
    assert abs(found.log_evidence - expected) < 4 * float(relative.std() / relative.mean()) / len(weights) ** 0.5
    assert expected - gap < found.elbo < expected + 4 * found.elbo_stderr


def dihedral(order):
    space = gspaces.no_base_space(group.dihedral_group(order))
    # A vector of D_2 is a pair of sign representations.
    return [space.irrep(1, 0), space.irrep(1, 1)] if order == 2 else [space.irrep(1, 1)], space


# Seen 0.02 to 0.05 nats short of the evidence over two seeds; of D_3 the flow learns one branch, with long tails.
# Trained flows are steep at a few draws of thousands, where float32 is said to leave 1e-4 of an event's length.
@pytest.mark.filterwarnings("ignore::pyro_equiflow.errors.PrecisionWarning")
@pytest.mark.parametrize("case", ["D2", "D3"])
def test_default_guide_under_a_dihedral_group(case):
    irreps, space = dihedral(int(case[1]))
    guide = AutoEquivariantFlow(model, {"z": FieldType(space, irreps)})
    guide(case)
    train(guide, case, 0, steps=500, learning_rate=5e-3, particles=64)
    assert_invariant(guide.get_posterior(), guide.get_posterior().sample((50,)), tolerance=1e-2)
    found = estimate(importance_weights(model, guide, case, 0, num_samples=20_000, batch_size=5000))
    expected = CASES[case][-1]
    assert expected - 0.15 < found.elbo < expected + 4 * found.elbo_stderr
    # The tails of a branch are heavier than the flow's: a few hundredths of the evidence lie there, and k-hat tells.
    assert abs(found.log_evidence - expected) < max(0.1, 4 * min(found.log_evidence_stderr, 0.05))


def test_dihedral_flow_with_auxiliary_vectors():
    irreps, space = dihedral(2)
    guide = AutoEquivariantFlow(
        model,
        {"z": FieldType(space, irreps), "auxiliary": FieldType(space, irreps)},
        lambda field_type: equivariant_flow(field_type, num_transforms=6, hidden_dims=(48, 48)),
        init_scale=1.0,
    )
    guide("D2", 2)
    train(guide, "D2", 2, steps=500, learning_rate=5e-3, particles=128)
    # The auxiliary vector has to choose the mode and forget it again: seen 0.14 to 0.18 nats short of the evidence.
    assess(guide, "D2", 2, gap=0.3)


def test_rotation_flow_with_auxiliary_invariants():
    space = gspaces.no_base_space(group.o2_group())
    guide = AutoEquivariantFlow(
        model,
        {"z": FieldType(space, [space.irrep(1, 1)])},
        lambda field_type: equivariant_flow(field_type, num_transforms=6, hidden_dims=(32, 32)),
        init_scale=1.0,
    )
    guide("O2", 2)
    train(guide, "O2", 2, steps=600, learning_rate=5e-3, particles=128)
    assess(guide, "O2", 2, gap=0.1)
