# SPDX-License-Identifier: Apache-2.0
"""Grids continued periodically: torch's circular padding, bit for bit, and beyond what that allows."""

import pytest
import torch
import torch.nn.functional as F
from escnn import gspaces
from escnn import nn as enn

from pyro_equiflow import testing
from pyro_equiflow.nn import SteerableConv, expand
from pyro_equiflow.nn.linear.periodic import pad_periodic
from tests.cases import randomize


def torchs(x, widths):
    return F.pad(x, tuple(w for width in reversed(widths) for w in (width, width)), mode="circular")


@pytest.mark.parametrize("shape, widths", [
    ((2, 3, 4, 4), (1, 1)),
    ((2, 3, 3, 6), (1, 2)),
    ((2, 3, 1, 2), (1, 2)),
    ((2, 3, 5, 4), (0, 3)),
    ((2, 3, 4, 3, 2), (1, 1, 1)),
    ((1, 2, 2, 3, 5), (2, 3, 2)),
], ids=str)  # fmt: skip
def test_equal_to_torchs_to_the_last_bit(shape, widths):
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        ours, theirs = pad_periodic(x, widths), torchs(x, widths)
        assert ours.equal(theirs)
        # Whole numbers: sums of gradients are exact in any order.
        upstream = torch.randint(-9, 10, ours.shape).to(dtype)
        assert torch.autograd.grad(ours, x, upstream)[0].equal(torch.autograd.grad(theirs, x, upstream)[0])
    assert torch.autograd.gradgradcheck(lambda x: pad_periodic(x.square(), widths), x)


@pytest.mark.parametrize("shape, widths", [((3, 4, 4), (1, 1)), ((2, 3, 2, 3), (1, 2, 1))], ids=str)
def test_batches_of_inputs_and_of_gradients(shape, widths):
    x = torch.randn(5, *shape, requires_grad=True)
    y = pad_periodic(x, widths)
    assert torch.vmap(lambda x: pad_periodic(x, widths), in_dims=1)(x.movedim(0, 1)).equal(y)
    upstream = torch.randint(-9, 10, (3, *y.shape)).to(y.dtype)
    (together,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, x, p, retain_graph=True)[0] for p in upstream]
    assert together.equal(torch.stack(one_by_one))
    compiled = torch.compile(lambda x: pad_periodic(x, widths), backend="eager", fullgraph=True)
    assert compiled(x).equal(y)


@pytest.mark.parametrize("side, width", [(1, 3), (2, 3), (2, 5), (3, 7)])
def test_more_than_one_period(side, width):
    """torch's padding stops at one."""
    x = torch.randn(2, 1, side, side)
    points = torch.arange(-width, side + width) % side
    assert pad_periodic(x, (width, width)).equal(x[..., points[:, None], points])
    with pytest.raises(RuntimeError, match="wrapping around more than once"):
        torchs(x, (width, width))


def test_kernels_wider_than_the_grid():
    """What a deep level of a multi-scale flow meets: a kernel of 7 points on a grid of 2."""
    space = gspaces.rot2dOnR2(4)
    kind = enn.FieldType(space, [space.regular_repr])
    layer = randomize(SteerableConv(kind, kind, 7, padding_mode="circular")).double()
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    testing.assert_equivariant(expand(layer), x, kind, tolerance=1e-13)
    # The same periodic image on a grid of two periods a side.
    tiled = expand(layer)(x.tile(4, 4))
    torch.testing.assert_close(expand(layer)(x), tiled[..., :2, :2], rtol=1e-12, atol=1e-12)


def test_escnns_own_layers():
    space = gspaces.rot2dOnR2(4)
    kind = enn.FieldType(space, [space.regular_repr])
    layer = enn.R2Conv(kind, kind, 5, padding=2, padding_mode="circular", initialize=False)
    torch.nn.init.normal_(layer.weights)
    x = torch.randn(2, 4, 6, 6)
    expected = layer(enn.GeometricTensor(x, kind)).tensor
    torch.testing.assert_close(expand(layer)(x), expected, rtol=0, atol=0)
