# SPDX-License-Identifier: Apache-2.0
"""Volumes under octahedral groups: every kind of transform on grids of 8x8x8 points. Errors are shown with ``-s``."""

import functools

import pytest
import torch
from escnn import gspaces
from escnn import nn as enn

import pyro_equiflow as pe
from pyro_equiflow import testing
from pyro_equiflow.testing import TOLERANCES
from tests.cases import randomize

SPACES = {"octahedral": gspaces.octaOnR3, "full-octahedral": gspaces.fullOctaOnR3}
TYPES = [("octahedral", "scalars"), ("octahedral", "vectors"), ("octahedral", "mixed"), ("full-octahedral", "mixed")]
SOLVED = {"lipschitz": 0.7, "log_det": pe.logdet.Exact()}
KINDS = {
    "coupling": (pe.equivariant_coupling, {}),
    "iaf": (pe.equivariant_iaf, {}),
    "residual": (pe.equivariant_residual, SOLVED),
    "implicit": (pe.equivariant_implicit, SOLVED),
}


@functools.cache
def volumes(space, fields):
    """Two scalars, two vectors, or one of each."""
    space = SPACES[space]()
    vector = space.irrep(*space.basespace_action.irreps[0])
    assert vector.size == 3
    scalar = space.trivial_repr
    chosen = {"scalars": [scalar, scalar], "vectors": [vector, vector], "mixed": [scalar, vector]}
    return enn.FieldType(space, chosen[fields])


def make(kind, field_type, **options):
    """A transform in float64, far from the identity."""
    factory, own = KINDS[kind]
    options = {"hidden_dims": (8,), "nonlinearity": "gated", "identity_init": False, **own, **options}
    return randomize(factory(field_type, **options)).double()


def events(field_type, side, count=1):
    return torch.randn(count, field_type.size, side, side, side, dtype=torch.float64)


@torch.no_grad()
def distance(transform, x):
    """How far a transform is from the identity, relative."""
    return float((transform(x) - x).norm() / x.norm())


def jacobian(function, x):
    """The dense Jacobian at one event, 64 rows of it at a time."""
    x = x.clone().requires_grad_()
    y = function(x)
    rows = torch.eye(y.numel(), dtype=x.dtype).view(-1, *y.shape).split(64)
    parts = [torch.autograd.grad(y, x, part, retain_graph=True, is_grads_batched=True)[0] for part in rows]
    return torch.cat(parts).reshape(y.numel(), -1)


def log_det(matrix):
    return torch.linalg.slogdet(matrix).logabsdet


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space, fields", TYPES)
def test_equivariance_and_inverse(space, fields, kind):
    """By all 24 or 48 elements, each of which permutes the grid."""
    field_type = volumes(space, fields)
    transform, x = make(kind, field_type), events(field_type, 8)
    with torch.no_grad():
        moved = distance(transform, x)
    symmetry, inverse = testing.equivariance_error(transform, x), testing.inverse_error(transform, x)
    print(f"\n{space} {fields} {kind}: moved {moved:.2f}, equivariance {symmetry:.1e}, inverse {inverse:.1e}")
    assert moved > 0.02
    assert symmetry <= TOLERANCES["equivariance on grids", torch.float64]
    assert inverse <= TOLERANCES["inverse", torch.float64]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", ["vectors", "mixed"])
def test_log_det(fields, kind):
    """Both directions against autograd's dense Jacobian; where a column of it is a linear solve, on fewer points."""
    field_type = volumes("full-octahedral", fields)
    side = 2 if kind in ("residual", "implicit") else 4
    error = testing.log_det_error(make(kind, field_type), events(field_type, side))
    print(f"\n{fields} {kind}, {side}x{side}x{side}: log-det {error:.1e}")
    assert error <= TOLERANCES["log_det", torch.float64]


@pytest.mark.parametrize("kind", KINDS)
def test_log_det_of_1024_dimensions(kind):
    field_type = volumes("octahedral", "scalars")
    transform, x = make(kind, field_type), events(field_type, 8)
    with torch.no_grad():
        y, found = transform.call_and_ladj(x)
    if kind == "implicit":
        # (I + J_H(y))^-1 (I + J_F(x)), from the dense Jacobians of both networks.
        nets = [(transform.conditioner_x, x), (transform.conditioner_y, y)]
        above, below = (log_det(torch.eye(1024) + jacobian(net.normalized((8, 8, 8)).expanded, at)) for net, at in nets)
        expected = above - below
    else:
        expected = log_det(jacobian(transform, x))
    error = float((found - expected).abs() / expected.abs().clamp(min=1))
    print(f"\n{kind}, 8x8x8, 1024 dimensions: log-det {float(found):.3f}, error {error:.1e}")
    assert error <= TOLERANCES["log_det", torch.float64]


def test_regular_hidden_fields():
    """Pointwise functions of the 24 channels of a regular field, in place of gates."""
    field_type = volumes("octahedral", "mixed")
    transform = make("coupling", field_type, hidden_dims=(24,), nonlinearity="pointwise")
    testing.assert_equivariant(transform, events(field_type, 8))
    testing.assert_inverse(transform, events(field_type, 8))
    testing.assert_log_det(transform, events(field_type, 2))


def test_a_users_own_r3conv():
    """A conditioner of escnn's own layers; isotropic hidden fields, so that its kernels are symmetric to rounding."""
    field_type = volumes("octahedral", "mixed")
    in_type, out_type = pe.EquivariantCoupling.conditioner_types(field_type)
    hidden = enn.FieldType(field_type.gspace, 8 * [field_type.gspace.trivial_repr])
    layers = [enn.R3Conv(a, b, 3, padding=1, initialize=False) for a, b in ((in_type, hidden), (hidden, out_type))]
    for layer in layers:
        torch.nn.init.normal_(layer.weights)
    net = enn.SequentialModule(layers[0], enn.ELU(hidden), layers[1])
    transform, x = pe.EquivariantCoupling(field_type, net).double(), events(field_type, 8)
    moved = distance(transform, x)
    symmetry, inverse = testing.equivariance_error(transform, x), testing.inverse_error(transform, x)
    print(f"\nescnn's R3Conv: moved {moved:.2f}, equivariance {symmetry:.1e}, inverse {inverse:.1e}")
    assert moved > 0.02
    assert symmetry <= TOLERANCES["equivariance on grids", torch.float64]
    assert inverse <= TOLERANCES["inverse", torch.float64]
    testing.assert_log_det(transform, events(field_type, 2))


@pytest.mark.parametrize("haar", [False, True], ids=["sites", "haar"])
@pytest.mark.parametrize("space, fields", TYPES)
def test_squeeze(space, fields, haar):
    """2x2x2 cells to channels, an orthogonal map between the types that really result."""
    field_type = volumes(space, fields)
    squeeze, x = pe.EquivariantSqueeze(field_type, haar=haar), events(field_type, 8)
    y = squeeze(x)
    assert y.shape == (1, 8 * field_type.size, 4, 4, 4) == (1, squeeze.out_type.size, 4, 4, 4)
    symmetry = max(testing.equivariance_error(squeeze, x), testing.equivariance_error(squeeze.inv, y))
    print(f"\n{space} {fields} {'haar' if haar else 'sites'}: equivariance {symmetry:.1e}")
    assert symmetry < 1e-13
    testing.assert_inverse(squeeze, x)
    testing.assert_log_det(squeeze, events(field_type, 2))


def test_a_multiscale_flow_of_volumes():
    """An invariant density of one scalar on 8x8x8 points: two levels of couplings on averages and differences."""
    space = gspaces.octaOnR3()
    gray = enn.FieldType(space, [space.trivial_repr])
    flow = pe.image_flow(gray, (8, 8, 8), num_transforms=1, hidden_dims=(16,), nonlinearity="gated")
    flow(torch.randn(32, 1, 8, 8, 8))  # sets the actnorms
    flow = randomize(flow).double()
    x = events(gray, 8)
    testing.assert_equivariant(flow, x)
    testing.assert_inverse(flow, x)
    noise = pe.InvariantNormal(gray, (8, 8, 8), scale=torch.ones(1, dtype=torch.float64))
    density = torch.distributions.TransformedDistribution(noise, [flow])
    testing.assert_invariant(density, x, gray)
    found = flow.inv.call_and_ladj(x)[1].detach()
    torch.testing.assert_close(found[0], log_det(jacobian(flow.inv, x)), rtol=1e-10, atol=1e-10)
