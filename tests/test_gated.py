# SPDX-License-Identifier: Apache-2.0
"""Fused gates against their formula, and the joint expansion of several layers against each layer's own."""

import numpy as np
import pytest
import torch
from escnn import group
from escnn import nn as enn
from torch.autograd import gradcheck, gradgradcheck

from pyro_equiflow import testing
from pyro_equiflow.nn import MaskedSteerableNet, SteerableConv, SteerableLinear, expand
from pyro_equiflow.nn.gated import Gates
from pyro_equiflow.nn.linear.expansion_plan import JointExpansion
from tests.cases import field_type, point

#: Scalars, runs of irreps, the shape without channels, and the dimension of channels.
LAYOUTS = {
    "points": (3, [(2, 2), (2, 3)], (5,), 0),
    "one run": (2, [(3, 2)], (4,), 0),
    "no scalars": (0, [(2, 3)], (4,), 0),
    "grids": (3, [(2, 2), (1, 5)], (2, 2, 3), 1),
}


def gates_and_input(name):
    scalars, runs, shape, dim = LAYOUTS[name]
    channels = scalars + sum(count * (1 + size) for count, size in runs)
    x = torch.randn(*shape[:dim], channels, *shape[dim:], dtype=torch.float64, generator=torch.manual_seed(1))
    return Gates(scalars, runs, dim), x.requires_grad_()


@pytest.mark.parametrize("name", LAYOUTS)
def test_gates_by_their_formula(name):
    gates, x = gates_and_input(name)
    scalars, runs, _, dim = LAYOUTS[name]
    rows = x.detach().movedim(dim, 0).numpy()
    sigmoid = 1 / (1 + np.exp(-rows))
    count = sum(n for n, _ in runs)
    start, lengths, gated = scalars + count, [], []
    for i, size in enumerate(size for n, size in runs for _ in range(n)):
        v = rows[start : start + size]
        lengths.append(np.sqrt(1 + (v**2).sum(0)))
        gated.append(v * sigmoid[scalars + i])
        start += size
    expected = np.concatenate([rows[:scalars] * sigmoid[:scalars], np.stack(lengths), *gated])
    for value in (gates(x), gates(x.detach()), gates.plain(x)):
        torch.testing.assert_close(value.movedim(dim, 0), torch.tensor(expected), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_gates(name):
    """By finite differences, twice, and for a batch of upstream gradients; under torch.func as well."""
    gates, x = gates_and_input(name)
    assert gradcheck(gates, (x,), check_batched_grad=True)
    assert gradgradcheck(gates, (x,))
    upstream = torch.randn_like(x)
    (found,) = torch.autograd.grad(gates(x), x, upstream)
    (expected,) = torch.autograd.grad(gates.plain(x), x, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.func.vjp(gates, x.detach())[1](upstream)[0], expected, rtol=1e-13, atol=1e-13)
    stacked = torch.stack([x.detach(), 2 * x.detach()])
    torch.testing.assert_close(torch.func.vmap(gates)(stacked)[1], gates(2 * x.detach()), rtol=1e-13, atol=1e-13)


def test_gates_without_samples_and_shut():
    gates, x = gates_and_input("points")
    assert gates(x[:, :0]).shape == (len(x), 0)
    far = torch.full_like(x, -1000.0).requires_grad_()  # sigmoids that are zero, squares that are not
    (grad,) = torch.autograd.grad(gates(far).sum(), far)
    assert grad.isfinite().all()


def layers_of(kind):
    torch.manual_seed(2)
    linear = SteerableLinear if kind.gspace.dimensionality == 0 else SteerableConv
    hidden = enn.FieldType(kind.gspace, 3 * [kind.representations[0]] + 2 * [kind.gspace.trivial_repr])
    count = len(kind.representations)
    mask = np.tril(np.ones((count, 5), dtype=bool))
    return [linear(kind, hidden), linear(hidden, kind, mask=mask), linear(kind, kind, bias=False)]


@pytest.mark.parametrize("name", ["trivial", "C4", "D4", "O2", "SO3", "C4-plane"])
def test_joint_expansion(name):
    """Filters, biases and their gradients are those of each layer by itself."""
    layers = [layer.double() for layer in layers_of(field_type(name))]
    with torch.no_grad():
        for layer in layers:
            if layer.bias is not None:
                layer.bias.normal_()
    has_bias = [layer.bias is not None for layer in layers]
    filters = [layer.filter() for layer in layers]
    biases = [layer.expanded_bias() for layer in layers]
    (sum(f.sin().sum() for f in filters) + sum(b.sin().sum() for b in biases if b is not None)).backward()
    gradients = [layer.weight.grad for layer in layers], [layer.bias.grad for layer in layers if layer.bias is not None]
    joint = JointExpansion(
        [layer.plan for layer in layers],
        [layer.invariants[:, : layer.invariants.shape[1] * has] for layer, has in zip(layers, has_bias)],
    )
    weight, bias = (torch.cat(parts).requires_grad_() for parts in zip(*(layer.give_parameters() for layer in layers)))
    found, found_biases = joint.filters(weight), joint.biases(bias)
    for ours, alone in zip(found, filters):
        torch.testing.assert_close(ours, alone, rtol=1e-15, atol=1e-15)
    for ours, alone in zip(found_biases, biases):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if alone is None else alone, rtol=1e-15, atol=1e-15)
    (sum(f.sin().sum() for f in found) + sum(b.sin().sum() for b in found_biases)).backward()
    torch.testing.assert_close(weight.grad, torch.cat(gradients[0]), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(bias.grad, torch.cat(gradients[1]), rtol=1e-13, atol=1e-13)


def test_layers_without_weights():
    """Nothing that the output may see: a constant, and zero where no invariant is."""
    so2 = group.so2_group()
    vectors, scalars = point(so2, *3 * [so2.irrep(1)]), point(so2, so2.irrep(0))
    net = MaskedSteerableNet(vectors, vectors, [1, 2, 3], [1, 1, 1], hidden_dims=())
    assert net.weight.numel() == 0
    assert (expand(net)(torch.randn(4, 6)) == 0).all()
    net = MaskedSteerableNet(vectors, scalars, [1, 2, 3], [4], hidden_dims=(8,))
    assert expand(net)(torch.randn(4, 6)).shape == (4, 1)


def test_a_sparse_basis_stays_sparse():
    """cos(pi / 2) is 6e-17 in floating point, and would cost a product of matrices in place of a gather."""
    c4 = group.cyclic_group(4)
    kinds = point(c4, *2 * [c4.irrep(1)]), point(c4, *2 * [c4.regular_representation])
    for a, b in (kinds, kinds[::-1]):
        layer = SteerableLinear(a, b).double()
        assert layer.plan.disjoint
        testing.assert_equivariant(expand(layer), torch.randn(5, a.size, dtype=torch.float64), a, out_type=b)
