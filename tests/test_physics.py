# SPDX-License-Identifier: Apache-2.0
"""The lattice field of ``benchmarks/phi4.py`` and the particles of ``benchmarks/particles.py``: actions, symmetries."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from escnn import gspaces
from escnn import nn as enn

from pyro_equiflow.nn import SteerableConv, expand, lipschitz_bound
from pyro_equiflow.testing import assert_equivariant, assert_inverse, assert_log_det

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickles look modules up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def phi4():
    yield load("phi4")
    del sys.modules["phi4"]


@pytest.fixture(scope="module")
def particles():
    yield load("particles")
    del sys.modules["particles"]


def test_action(phi4):
    """Site by site; on 3 sites a side, so that no link counts double."""
    field = torch.randn(3, 3, dtype=torch.float64)
    action = 0.0
    for i in range(3):
        for j in range(3):
            here, right, below = field[i, j], field[i, (j + 1) % 3], field[(i + 1) % 3, j]
            action += (-4 + 4) * here**2 + 6.5 * here**4 - 2 * here * (right + below)
    torch.testing.assert_close(phi4.log_density(field[None], 6.5), -action)


@pytest.mark.parametrize("coupling", [8.0, 6.008])
def test_log_normaliser(phi4, coupling):
    """log Z at L = 4 by the transfer matrix between rows, in the five leading modes of a link."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(28))
    phi, weights = 1.6 * nodes, 1.6 * weights
    weights = weights * (-coupling * phi**4).exp()
    link = (2 * phi[:, None] * phi).exp()
    values, modes = torch.linalg.eigh((weights[:, None] * weights).sqrt() * link)
    modes = (modes * values.clamp(min=0).sqrt())[:, -5:]
    pairs = (modes[:, :, None] * modes[:, None, :]).flatten(1)
    row = torch.einsum("ij,jk,kl,li->ijkl", link, link, link, link)
    for _ in range(4):
        row = torch.tensordot(row, pairs, dims=([0], [0]))
    matrix = row.view(8 * (5,)).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(5**4, 5**4)
    found = (matrix @ matrix).square().sum().log()
    assert abs(found - phi4.EXACT[4, coupling]) < 2e-6  # 28 points or more modes: no change beyond 1e-7


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_lattice_convolution_is_the_librarys(phi4, periodic, bias):
    space = gspaces.flipRot2dOnR2(4)
    types = enn.FieldType(space, [space.irrep(1, 1)]), enn.FieldType(space, 2 * [space.regular_repr])
    conv = phi4.LatticeConv(*types, 4, periodic, bias)
    theirs = SteerableConv(*types, padding_mode="circular" if periodic else "zeros", bias=bias)
    theirs.load_state_dict(conv.conv.state_dict())
    x = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(expand(conv)(x), expand(theirs)(x))
    torch.testing.assert_close(lipschitz_bound(conv, (4, 4)), lipschitz_bound(theirs, (4, 4)))


def test_flow_of_the_field(phi4):
    """With everything built in: D_4, translations and the change of sign, at weights far from the start."""
    flow = phi4.build(4, "all", 8, blocks=2).double().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    y = flow(x)
    assert_equivariant(flow, x)
    torch.testing.assert_close(flow(x.roll((1, 2), (-2, -1))), y.roll((1, 2), (-2, -1)), rtol=0, atol=1e-12)
    torch.testing.assert_close(flow(-x), -y, rtol=0, atol=1e-12)
    assert_log_det(flow, x)
    assert_inverse(flow, x)
    for arm in ("translations", "none"):
        assert abs(phi4.count(phi4.matched(4, arm, 8)) / phi4.count(flow) - 1) < 3  # whole channels


def test_energy_and_force(particles):
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    total = 0.0
    for i in range(4):
        for j in range(i):
            d = (x[:, i] - x[:, j]).norm(dim=-1)
            total = total + 0.9 * (d - 4) ** 4 - 4 * (d - 4) ** 2
    torch.testing.assert_close(particles.energy(x), total)
    torch.testing.assert_close(particles.force(x.detach()), -torch.autograd.grad(total.sum(), x)[0])


def test_monte_carlo_has_the_mean_energy(particles):
    x, mean, error = particles.monte_carlo(400, 10, 0, warm_up=300)
    assert x.shape == (4000, 4, 2) and x.mean(-2).abs().max() < 1e-12
    assert abs(mean - particles.MEAN_ENERGY) < 4 * error < 0.4


@pytest.mark.parametrize("arm", ["all", "O(2)", "none"])
def test_flow_of_particles(particles, arm):
    """Its density has what is built in, and no more."""
    torch.manual_seed(0)
    flow, distribution = particles.build(arm, 2, (8,), "spline")
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    density = distribution(flow.double().eval())
    x = density.sample((5,))
    reference = density.log_prob(x)
    mirrored, swapped = x.flip(-1), x[:, [1, 0, 2, 3]]
    assert ((density.log_prob(mirrored) - reference).abs().max() < 1e-9) == (arm != "none")
    assert ((density.log_prob(swapped) - reference).abs().max() < 1e-9) == (arm == "all")
    points = particles.moved(x, arm)
    torch.testing.assert_close(particles.energy(points), particles.energy(x))
