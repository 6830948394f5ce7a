# SPDX-License-Identifier: Apache-2.0
"""Bases of steerable kernels: the span of escnn's own, orthonormal, and said where they take long."""

import numpy as np
import pytest
import torch
from escnn import gspaces
from escnn.nn.modules.conv import r2convolution, r3convolution
from escnn.nn.modules.conv.rd_convolution import get_grid_coords

from pyro_equiflow.nn.linear import kernels
from pyro_equiflow.nn.linear.kernels import kernel_basis

SPACES = {
    "C4": gspaces.rot2dOnR2(4),
    "D4": gspaces.flipRot2dOnR2(4),
    "C3": gspaces.rot2dOnR2(3),  # no turn of which permutes the grid
    "D6": gspaces.flipRot2dOnR2(6),
    "O2": gspaces.flipRot2dOnR2(-1, 2),
    "mirror": gspaces.mirOnR3(),
}


def representations(name):
    space = SPACES[name]
    # A continuous group has more irreps where others were asked for before.
    irreps = [psi for psi in space.fibergroup.irreps() if psi.attributes.get("frequency", 0) <= 3]
    mixed = irreps[-1] + space.trivial_repr
    return [space.trivial_repr, mixed, *([space.regular_repr] if space.fibergroup.order() > 0 else [])]


def escnns(space, kernel_size, in_rep, out_rep):
    """The kernels that escnn builds between whole representations, sampled in float32."""
    dimensions = space.dimensionality
    keep, rings, sigma, highest = (r2convolution if dimensions == 2 else r3convolution).compute_basis_params(
        kernel_size
    )
    basis = space.build_kernel_basis(in_rep, out_rep, rings=rings, sigma=sigma, maximum_frequency=highest)
    sampled = basis.sample(torch.tensor(get_grid_coords(dimensions, kernel_size)).float()).numpy()
    sampled = sampled[:, np.array([keep(attributes) for attributes in basis])]
    return np.moveaxis(sampled, 0, -1).reshape(sampled.shape[1], -1)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("name", SPACES)
def test_the_span_is_escnns(name, kernel_size):
    for in_rep in representations(name):
        for out_rep in representations(name):
            found = kernel_basis(SPACES[name], kernel_size, in_rep, out_rep)
            flat = found.reshape(len(found), -1)
            np.testing.assert_allclose(flat @ flat.T, np.eye(len(flat)), atol=1e-12)
            expected = escnns(SPACES[name], kernel_size, in_rep, out_rep)
            size = np.linalg.norm(expected, axis=1).max()
            # Sampling in float32 is right to about 5e-7 a number.
            np.testing.assert_allclose(expected @ flat.T @ flat, expected, atol=1e-5 * size)
            assert np.linalg.matrix_rank(expected, tol=1e-4 * size) == len(flat)


def test_large_kernels_are_announced(caplog, monkeypatch):
    monkeypatch.setattr(kernels, "_LARGE", 143)
    space = gspaces.rot2dOnR2(5)
    kernel_basis(space, 3, space.trivial_repr, space.regular_repr)
    assert not caplog.messages
    kernel_basis(space, 3, space.regular_repr, space.regular_repr)
    (message,) = caplog.messages
    assert "kernels of 225 numbers each" in message and "take a while" in message and "\n" not in message
