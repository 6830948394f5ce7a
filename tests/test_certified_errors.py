# SPDX-License-Identifier: Apache-2.0
"""Certified errors of solved maps under large data, contexts and biases, against roots found in longer numbers."""

import itertools
import math

import numpy as np
import pytest
import torch
from escnn import nn as enn

import pyro_equiflow as pe
from pyro_equiflow.ops.events import event_dim
from tests.cases import field_type
from tests.test_contraction import INVERTED, stretched
from tests.test_lipschitz_nets import worst_norm

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own

LONG = np.longdouble
SIZES = (1.0, 1e3, 1e6)
#: Long where float64 says less than is claimed; on the platforms without longer numbers there is nothing to test by.
needs_long = pytest.mark.skipif(np.finfo(LONG).eps > 1e-18, reason="longdouble is float64 here")


def pointwise(tensors, function):
    """A network of linear layers with a function of numbers between them, in numpy's longest numbers."""
    arrays = [t.numpy().astype(LONG) for t in tensors]

    def fn(x):
        for i, (weight, bias) in enumerate(zip(arrays[::2], arrays[1::2])):
            x = (x if i == 0 else function(x)) @ weight.T + bias
        return x

    return fn


FUNCTIONS = {"lipswish": lambda x: x / (1 + np.exp(-np.maximum(x, -10000))), "sin": np.sin}


def root(fn, wide, y, context, start):
    """Where ``x + fn(x) = y``, by Newton steps whose Jacobians, those of ``wide``, are found in float64."""
    size = math.prod(y.shape[1:])
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x, c: wide(torch.cat([x, c])[None])[0]))
    x = start
    for _ in range(5):
        found = jacobian(torch.from_numpy(x.astype(np.float64)), context).reshape(len(x), size, size)
        off = (x + fn(x) - y).astype(np.float64).reshape(len(x), size, 1)
        x = x - np.linalg.solve((torch.eye(size) + found).numpy(), off).reshape(x.shape)
    return x


@torch.no_grad()
def true_over_certified(transform, direction, y, context=None, function=None):
    """The true error of a solved map over the certified one, and that relative to the root; the largest.

    :param function: of a network that is :func:`pointwise`; its reference is long, another's float64.
    """
    solution = getattr(transform, f"{direction}_solution")(y)
    assert solution.converged.all()
    context = (y[:, :0] if context is None else context).double()
    x, found, given = (t.double().numpy().astype(LONG if function else float) for t in (y, solution.value, context))
    for conditioner, forwards in transform._backwards() if direction == "inverse" else transform._steps():
        net, tensors = conditioner.normalized(y.shape[2:]).expanded
        tensors = [t.double() for t in tensors]
        exact = pointwise(tensors, FUNCTIONS[function]) if function else None

        def wide(joined, net=net, tensors=tensors):
            return net(joined, *tensors)

        def fn(x, wide=wide, exact=exact):
            joined = np.concatenate([x, given], 1)
            return wide(torch.from_numpy(joined)).numpy() if exact is None else exact(joined)

        x = x + fn(x) if forwards else root(fn, wide, x, context, found)
    true, length = (np.sqrt((a**2).reshape(len(x), -1).sum(1)).astype(float) for a in (x - found, x))
    return (true / solution.error.numpy()).max(), (solution.error.numpy() / np.maximum(1, length)).max()


def directions(kind):
    return ("inverse",) if kind == "residual" else ("inverse", "forward")


@needs_long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("c", [0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("kind", ["residual", "implicit"])
def test_large_data_contexts_and_biases(kind, c, dtype):
    type_ = field_type("C4")
    context_type = enn.FieldType(type_.gspace, 2 * [type_.gspace.trivial_repr])
    make = getattr(pe, f"conditional_equivariant_{kind}")
    for i, (contexts, biases) in enumerate(itertools.product(SIZES, repeat=2)):
        data = SIZES[(i + i // 3) % 3]
        torch.manual_seed(i)
        function = list(FUNCTIONS)[(i + 1) % 2]  # saturated where contexts alone are long
        family = make(
            type_,
            context_type,
            hidden_dims=(16, 64)[:: 1 - 2 * (i % 2)],
            identity_init=False,
            lipschitz=c,
            function=function,
        )
        with torch.no_grad():
            for name, parameter in family.named_parameters():
                parameter.mul_(2) if "weight" in name else parameter.copy_(biases * torch.randn_like(parameter))
        context = (contexts * torch.randn(4, 2)).to(dtype)
        given = family.to(dtype).condition(context)
        y = (data + torch.randn(4, type_.size)).to(dtype)
        for direction in directions(kind):
            ratio, relative = true_over_certified(given, direction, y, context, function)
            assert ratio <= 1, (data, contexts, biases)
            # Four times what float64 leaves of a sum of about ten lengths; else as far as the default gives way.
            best = 5e-6 if dtype == torch.float32 else max(1e-12, 2e-14 / (1 - c))
            assert relative <= (best if contexts == biases == 1 else 4e-4)


@pytest.mark.parametrize("c", [0.9, 0.99])
@pytest.mark.parametrize("name", INVERTED)
@pytest.mark.parametrize("kind", ["residual", "implicit"])
def test_trained_networks_with_offsets_in_float32(kind, name, c):
    """Gated, pointwise and convolutional; steep up and down. In float64, which is long for float32."""
    type_ = INVERTED[name]()
    grid = event_dim(type_) // 2 * (4, 4)
    transform = getattr(pe, f"equivariant_{kind}")(type_, hidden_dims=(12,), identity_init=False, lipschitz=c)
    stretched(transform, (type_.size, *grid), steps=15)
    for size in (0.0, *SIZES):
        y = size + torch.randn(4, type_.size, *grid)
        for direction in directions(kind):
            ratio, relative = true_over_certified(transform, direction, y)
            assert ratio <= 1 and relative <= 5e-6
        with torch.no_grad():
            # First the biases that were trained, then longer ones.
            for name_, parameter in transform.named_parameters():
                if "bias" in name_:
                    parameter.copy_(10 * max(size, 1.0) * torch.randn_like(parameter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["SO2", "C4"])
def test_no_jacobian_is_longer_than_the_bound_near_one(name, dtype):
    """Gradient ascent on the norm of the Jacobian of trained networks, from near and far."""
    type_ = INVERTED[name]()
    transform = pe.equivariant_residual(type_, hidden_dims=(12,), identity_init=False, lipschitz=0.9999)
    stretched(transform, (type_.size,), steps=30).to(dtype)
    (fn, tensors), bound = transform.conditioner.normalized()
    tensors = [t.detach().double() for t in tensors]
    starts = torch.randn(60, type_.size, dtype=torch.float64) * torch.logspace(-1, 6, 60)[:, None]
    assert 0.5 < worst_norm(lambda x: fn(x, *tensors), starts, steps=40) <= bound <= 0.9999
