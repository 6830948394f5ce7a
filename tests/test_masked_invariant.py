# SPDX-License-Identifier: Apache-2.0
"""Masked networks of invariants: what sees what, exactly; the same as without masks where nothing is masked."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from escnn import group
from torch.autograd.functional import jacobian

import pyro_equiflow as pe
from pyro_equiflow import testing
from pyro_equiflow.nn import InvariantGateNet, MaskedSteerableNet, expand
from pyro_equiflow.nn.masked.invariant_gate import MaskedInvariantGate
from tests.cases import field_type, point, randomize


def _types():
    so2, o2, so3, o3 = group.so2_group(), group.o2_group(), group.so3_group(), group.o3_group()
    return {
        "SO2": point(so2, *[so2.irrep(k) for k in (1, 0, 2, 1, 0, 1, 2)]),
        "SO2-vectors": point(so2, *6 * [so2.irrep(1)]),
        "O2": point(o2, *[o2.irrep(*k) for k in ((1, 1), (0, 0), (1, 2), (1, 0), (1, 1), (1, 2), (1, 0))]),
        "SO3": point(so3, *[so3.irrep(k) for k in (1, 0, 2, 1, 1, 2, 0)]),
        "O3": point(o3, *[o3.irrep(*k) for k in ((1, 1), (0, 0), (0, 1), (1, 1), (1, 0), (0, 1), (1, 1))]),
    }


NAMES = ["SO2", "SO2-vectors", "O2", "SO3", "O3"]
HIDDEN = [(1,), (24, 9), (3, 80, 40), (128, 128)]


def degrees_of(kind):
    """Degrees in no order, some of them shared, one field a context."""
    count = len(kind.representations)
    return [0, *np.random.default_rng(1).permutation(count - 1).clip(0, count - 3) + 1]


def make(kind, in_degrees, out_degrees, hidden_dims=(32, 32), **options):
    torch.manual_seed(2)
    net = MaskedSteerableNet(kind, kind, in_degrees, out_degrees, hidden_dims=hidden_dims, **options)
    assert isinstance(net._map, MaskedInvariantGate)
    return net if options else randomize(net).double()


def events(kind, *batch):
    return torch.randn(*batch, kind.size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def by_fields(net, x):
    """Norms of the dense Jacobian's blocks, ``(field out, field in)``."""
    full = jacobian(lambda z: expand(net)(z[None])[0], x)
    sizes = [field.size for field in net.in_type.representations]
    return torch.stack([torch.stack([b.norm() for b in a.split(sizes, 1)]) for a in full.split(sizes, 0)])


@pytest.mark.parametrize("hidden_dims", HIDDEN)
@pytest.mark.parametrize("name", NAMES)
def test_what_sees_what(name, hidden_dims):
    kind = _types()[name]
    degrees = degrees_of(kind)
    fields = kind.representations
    net = make(kind, degrees, degrees, hidden_dims)
    norms = by_fields(net, events(kind))
    for o, d_out in enumerate(degrees):
        # With no field of its irrep below, an irrep has nothing to turn into.
        turns = fields[o].is_trivial() or any(fields[o] == f and d < d_out for f, d in zip(fields, degrees))
        for j, d_in in enumerate(degrees):
            if d_out <= d_in or not turns:
                assert norms[o, j] == 0
            elif hidden_dims == HIDDEN[-1] or (fields[o] == fields[j] and not fields[o].is_trivial()):
                assert norms[o, j] > 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_few_irreps_among_many_scalars(name):
    """Mixtures of every degree that an output needs, however few irreps there are."""
    moving = next(field for field in _types()[name].representations if not field.is_trivial())
    scalar = moving.group.trivial_representation
    kind = point(moving.group, moving, *10 * [scalar], moving, *5 * [scalar])
    degrees = list(range(1, 18))
    norms = by_fields(make(kind, degrees, degrees, (64,)), events(kind))
    expected = torch.ones(17, 17, dtype=torch.bool).tril(-1)
    assert torch.equal(norms > 1e-9, expected)
    assert (norms[~expected] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_equivariance(name):
    kind = _types()[name]
    degrees = degrees_of(kind)
    testing.assert_equivariant(expand(make(kind, degrees, degrees)), events(kind, 5), kind, tolerance=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_is_masked(name):
    """The unmasked network's values, from its weights, with mixtures shortened."""
    kind = _types()[name]
    count = len(kind.representations)
    plain = randomize(InvariantGateNet(kind, kind, (32, 24), tensor_products=False)).double()
    plain._gate._radius, plain._gate._far_lengths = 1.0, True
    net = make(kind, count * [0], count * [1], (32, 24))
    net.load_state_dict(plain.state_dict())
    x = events(kind, 7)
    torch.testing.assert_close(expand(net)(x), expand(plain)(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("hidden_dims", HIDDEN)
@pytest.mark.parametrize("name", NAMES)
def test_no_weight_is_idle(name, hidden_dims):
    kind = _types()[name]
    count = len(kind.representations)
    net = make(kind, list(range(count)), list(range(1, count + 1)), hidden_dims)
    expand(net)(events(kind, 40)).square().sum().backward()
    assert (net.weight.grad != 0).all()
    if hidden_dims == HIDDEN[-1]:  # the degrees of a flow, where the last mixtures of an irrep turn into nothing
        net = make(kind, list(range(count)), list(range(count)), hidden_dims)
        expand(net)(events(kind, 40)).square().sum().backward()
        assert (net.weight.grad != 0).all()
    # All useful degrees where there is room, else the same in all layers.
    assert len({frozenset(degrees) for degrees in net.hidden_degrees}) == 1
    if hidden_dims == HIDDEN[-1]:
        assert set(net.hidden_degrees[0]) == set(range(count - 1))


def test_outputs_start_at_one_scale():
    """What a field sees little of is drawn larger: no output hangs on its place in the order."""
    so2 = group.so2_group()
    kind = point(so2, *20 * [so2.irrep(1)])
    torch.manual_seed(0)
    squares = 0
    for _ in range(20):
        net = MaskedSteerableNet(kind, kind, range(20), range(1, 21), hidden_dims=(64,))
        squares = squares + expand(net)(torch.randn(200, kind.size)).detach().square().mean(0).view(20, 2).mean(1)
    # A component of a shortened mixture has variance 1/2 at most, times the mean square of a gate: one, and what
    # the MLP adds, about one too. Drawn without regard to masks, the first would be at less than 1/400.
    assert ((squares / 20 > 0.1) & (squares / 20 < 2.0)).all()


@pytest.mark.parametrize("name", NAMES)
def test_growth_is_linear(name):
    """Far out the map is homogeneous of degree one, but for what biases and the ones under the roots add."""
    kind = _types()[name]
    degrees = degrees_of(kind)
    net, x = make(kind, degrees, degrees, function="relu").double(), events(kind, 4)
    far, farther = (expand(net)(scale * x) / scale for scale in (1e6, 1e7))
    assert far.abs().max() > 1e-2
    torch.testing.assert_close(far, farther, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_zero_output(name):
    kind = _types()[name]
    degrees = degrees_of(kind)
    net = make(kind, degrees, degrees, zero_init=True)
    assert (expand(net)(torch.randn(3, kind.size)) == 0).all()
    assert net.weight.count_nonzero() > net.weight.numel() / 3
    transform = pe.equivariant_iaf(kind)
    x = torch.randn(3, kind.size)
    y, ladj = transform.call_and_ladj(x)
    assert torch.equal(y, x) and (ladj == 0).all()


def test_nothing_to_see():
    """Constants, and zero where no invariant is."""
    so2 = group.so2_group()
    vectors, both = point(so2, *3 * [so2.irrep(1)]), point(so2, so2.irrep(1), so2.irrep(0))
    net = MaskedSteerableNet(vectors, both, [1, 2, 3], [1, 1], hidden_dims=(8,))
    with torch.no_grad():
        net.bias.normal_()
    out = expand(net)(torch.randn(4, 6))
    assert (out[:, :2] == 0).all() and (out[:, 2] == out[0, 2]).all() and out[0, 2] != 0


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    kind = _types()[name]
    degrees = degrees_of(kind)
    net = make(kind, degrees, degrees, (6,))
    x = events(kind, 2).requires_grad_()

    def value(x, weight, bias):
        return torch.func.functional_call(net, {"weight": weight, "bias": bias}, (x,))

    net.forward = lambda x: expand(net)(x)
    assert torch.autograd.gradcheck(value, (x, net.weight, net.bias))
    fn, tensors = expand(net)
    assert torch.autograd.gradgradcheck(lambda z: fn(z, *tensors), (x,))
    alone = torch.func.vmap(lambda z: fn(z[None], *tensors)[0])(x)
    torch.testing.assert_close(alone, fn(x, *tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["SO2", "O3"])
def test_copies(name):
    kind = _types()[name]
    degrees = degrees_of(kind)
    net = make(kind, degrees, degrees)
    assert [key for key, _ in net.named_parameters()] == list(net.state_dict()) == ["weight", "bias"]
    x = events(kind, 3)
    expected = expand(net)(x)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    state = torch.get_rng_state()
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)]
    assert torch.equal(torch.get_rng_state(), state)
    other = make(kind, degrees, degrees)
    other.load_state_dict(net.state_dict())
    for found in [*copies, other]:
        assert torch.equal(expand(found)(x), expected)
        assert found.hidden_degrees == net.hidden_degrees
    # In float32 the same numbers, rounded: eps 6e-8 times the few hundred terms of a sum.
    torch.testing.assert_close(expand(copies[0].float())(x.float()).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expand(copies[0].double())(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["SO2", "O2", "SO3", "O3"])
def test_flows(name):
    kind = field_type(name)
    torch.manual_seed(4)
    order = np.random.default_rng(3).permutation(len(kind.representations)).tolist()
    transform = pe.equivariant_iaf(kind, order=order, hidden_dims=(64, 64), identity_init=False, log_scale_bound=1.0)
    randomize(transform).double()
    x = events(kind, 4)
    testing.assert_log_det(transform, x)
    testing.assert_inverse(transform, x, tolerance=1e-10)
    testing.assert_equivariant(transform, x)


def test_an_unknown_function():
    kind = _types()["SO2"]
    degrees = degrees_of(kind)
    with pytest.raises(ValueError, match="function: expected one of .* found 'step'"):
        MaskedSteerableNet(kind, kind, degrees, degrees, function="step")
