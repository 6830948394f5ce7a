# SPDX-License-Identifier: Apache-2.0
"""Nonlinearities of Lipschitz constant 1, and networks of them."""

import copy
import math
import pickle

import pytest
import torch
from escnn import group
from escnn import nn as enn

from pyro_equiflow import testing
from pyro_equiflow.nn import (
    GatedNonLinearity,
    LipschitzGate,
    PointwiseNonLinearity,
    SteerableConv,
    SteerableLinear,
    expand,
    lipschitz_net,
    steerable_net,
)
from pyro_equiflow.nn.nonlinearities import FUNCTIONS
from pyro_equiflow.ops.representations import IrrepDecomposition
from tests.cases import TYPES, field_type, point, randomize, spatial_shape

# Rounding of a Jacobian of order 1 and of its singular values.
ROUNDING = 1e-12

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own


def jacobian_norms(function, x):
    """The spectral norm of the Jacobian at each row of ``x``, differentiable."""
    jacobians = torch.func.vmap(torch.func.jacfwd(lambda e: function(e[None])[0]))(x)
    return torch.linalg.matrix_norm(jacobians, 2)


def worst_norm(function, x, steps=150):
    """The largest norm of the Jacobian met from ``x`` on: at the points, and on gradient ascent from the best."""
    norms = jacobian_norms(function, x)
    worst = norms.max()
    points = x[norms.topk(20).indices].clone().requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.02, maximize=True)
    for _ in range(steps):
        norms = jacobian_norms(function, points)
        worst = torch.maximum(worst, norms.max()).detach()
        optimizer.zero_grad()
        norms.sum().backward()
        optimizer.step()
    return float(worst)


def irreps_of(kind):
    found = [i for i, _ in IrrepDecomposition(kind).isotypic() if not i.is_trivial()]
    return [irrep for irrep in found for _ in range(2)]


def gate_on(name, gate=LipschitzGate, **options):
    kind = field_type(name)
    return gate(kind.gspace, 2, irreps_of(kind), **options)


def scattered(gate, count, seed=0):
    """Inputs with every scalar, gate and irrep of a scale of its own, from 1e-3 to 1e3."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([r.size for r in gate.in_type.representations])
    scales = 10 ** (6 * torch.rand(count, len(sizes), dtype=torch.float64, generator=generator) - 3)
    x = torch.randn(count, gate.in_type.size, dtype=torch.float64, generator=generator)
    return x * scales.repeat_interleave(sizes, 1)


# ---- the constants ----------------------------------------------------------------------------------------


def test_every_function_has_its_constant():
    trivial = point(group.trivial_group(), group.trivial_group().trivial_representation)
    for name, function in FUNCTIONS.items():
        assert PointwiseNonLinearity(trivial, name).lipschitz == function.lipschitz


@pytest.mark.parametrize("name", FUNCTIONS)
def test_slopes_stay_below_the_constant_and_come_close(name):
    scales = torch.logspace(-3, 3, 20001, dtype=torch.float64)
    x = torch.cat([-scales, scales, torch.linspace(-6, 6, 20001, dtype=torch.float64)])[:, None]
    worst = worst_norm(FUNCTIONS[name], x)
    constant = FUNCTIONS[name].lipschitz
    assert constant - 2e-4 < worst <= constant + ROUNDING


@pytest.mark.parametrize("radius", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("name", ["flips", "SO2", "SO3"])
def test_the_gate_has_constant_one(name, radius):
    gate = gate_on(name, radius=radius)
    far_and_near = scattered(gate, 3000)
    # And where length, gate and field compete: gates over several periods, fields about the radius.
    close = radius * torch.randn(3000, gate.in_type.size, dtype=torch.float64)
    close[:, : sum(r.is_trivial() for r in gate.in_type.representations)] *= 3
    for x in (far_and_near, close):
        worst = worst_norm(expand(gate), x)
        assert 1 - 1e-3 < worst <= 1 + ROUNDING


def pair_norms(gate, u, r):
    """The norm on one gate and the first field, of length ``r``, everything else at zero."""
    x = torch.zeros(len(u), gate.in_type.size, dtype=torch.float64)
    x[:, gate.scalars] = u
    count = sum(count for count, _ in gate.runs)
    x[:, gate.scalars + count] = r
    kept = [gate.scalars, *range(gate.scalars + count, gate.scalars + count + gate.runs[0][1])]
    jacobians = torch.func.vmap(torch.func.jacfwd(lambda e: expand(gate)(e[None])[0]))(x)
    return torch.linalg.matrix_norm(jacobians[:, kept][:, :, kept], 2)


def test_the_gates_bound_is_tight():
    """Reached at zero under an open gate; at other lengths open gates keep 0.93 of some tangent and more."""
    gate = LipschitzGate(field_type("SO3").gspace, 0, [group.so3_group().irrep(1)])
    half_turn = torch.full((1,), math.pi / 2, dtype=torch.float64)
    reached = pair_norms(gate, half_turn, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(reached, torch.ones(1, dtype=torch.float64), rtol=0, atol=ROUNDING)
    r = torch.logspace(-3, 3, 4001, dtype=torch.float64)
    open_gates = pair_norms(gate, half_turn.expand_as(r), r)
    assert open_gates.min() > 0.93 and open_gates.max() <= 1 + ROUNDING


def test_no_two_points_move_apart():
    """The constant between far points, from the definition and not from a Jacobian."""
    gate = gate_on("O3")
    x, y = scattered(gate, 20_000), scattered(gate, 20_000, seed=1)
    near = x + 1e-3 * y
    for other in (y, near):
        ratio = (expand(gate)(x) - expand(gate)(other)).norm(dim=1) / (x - other).norm(dim=1)
        assert ratio.max() <= 1 + 1e-9  # differences of numbers up to 1e3, divided by differences down to 1e-4


class SteeperLength(LipschitzGate):
    """A length with 0.3 in place of 1/3."""

    def invariants(self, s, u, squares):
        s, _, factors = super().invariants(s, u, squares)
        return s, (squares + 0.3).sqrt(), factors


class FasterGate(LipschitzGate):
    """A gate that turns a twentieth faster."""

    def invariants(self, s, u, squares):
        return super().invariants(s, 1.05 * u, squares)


class UnprojectedGate(LipschitzGate):
    """The field itself, gated: what a plain gate does."""

    def invariants(self, s, u, squares):
        s, lengths, factors = super().invariants(s, u, squares)
        return s, lengths, factors * (1 + squares).sqrt()


@pytest.mark.parametrize("fault", [SteeperLength, FasterGate, UnprojectedGate, GatedNonLinearity])
def test_a_wrong_constant_is_caught(fault):
    gate = gate_on("SO2", fault)
    x = torch.cat([torch.randn(5000, gate.in_type.size, dtype=torch.float64), scattered(gate, 5000)])
    assert worst_norm(expand(gate), x) > 1 + 1e-4


# ---- the gate as a module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SO2", "O2", "SO3", "O3", "C4-plane", "D4-plane", "SO2-plane", "octahedral-space"])
def test_the_gate_is_equivariant(name):
    gate = gate_on(name)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        x = torch.randn(3, gate.in_type.size, *spatial_shape(name), dtype=dtype)
        testing.assert_equivariant(expand(gate), x, gate.in_type, tolerance=tolerance)
        assert expand(gate)(x).dtype == dtype
    through = gate(enn.GeometricTensor(x, gate.in_type))
    assert through.type == gate.out_type
    torch.testing.assert_close(through.tensor, expand(gate)(x), rtol=0, atol=0)
    assert gate.lipschitz == 1.0
    assert not list(gate.parameters()) and not gate.state_dict()


@pytest.mark.parametrize("name", ["O2", "SO3", "O2-plane", "octahedral-space"])
@pytest.mark.parametrize("radius", [1.0, 2.5])
def test_the_gate_by_its_formula(name, radius):
    gate = gate_on(name, function="tanh", radius=radius)
    sizes = [r.size for r in gate.in_type.representations if not r.is_trivial()]
    x = torch.randn(3, gate.in_type.size, *spatial_shape(name), dtype=torch.float64)
    scalars, gates, *fields = x.split([2, len(sizes), *sizes], 1)
    squares = torch.stack([v.square().sum(1) for v in fields], 1) / radius**2
    lengths = radius * ((1 / 3 + squares).sqrt() - (1 / 3) ** 0.5)
    factors = torch.sin(gates / radius) / (1 + squares).sqrt()
    gated = [factors[:, i : i + 1] * v for i, v in enumerate(fields)]
    torch.testing.assert_close(expand(gate)(x), torch.cat([scalars.tanh(), lengths, *gated], 1))


@pytest.mark.parametrize("function", ["lipswish", "tanh", "sin2pi"])
def test_the_gate_is_smooth_where_fields_vanish(function):
    gate = gate_on("SO2", function=function)
    x = torch.randn(3, gate.in_type.size, dtype=torch.float64)
    x[1, -4:] = 0.0
    x[2] = 0.0
    x.requires_grad_()
    assert torch.autograd.gradcheck(expand(gate), (x,))
    assert torch.autograd.gradgradcheck(expand(gate), (x,))


@pytest.mark.parametrize("name", ["O2", "C4-plane"])
def test_the_gate_goes_through_torch_func(name):
    gate = gate_on(name)
    function = expand(gate)
    x = torch.randn(4, gate.in_type.size, *spatial_shape(name), dtype=torch.float64, requires_grad=True)
    y = function(x)
    torch.testing.assert_close(torch.func.vmap(lambda e: function(e[None])[0])(x), y)
    tangent, cotangents = torch.randn_like(x), torch.randn(3, *y.shape, dtype=torch.float64)
    _, pushed = torch.func.jvp(function, (x.detach(),), (tangent,))
    (batched,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, retain_graph=True)
    for cotangent, row in zip(cotangents, batched):
        (pulled,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
        torch.testing.assert_close(row, pulled)
        torch.testing.assert_close((pulled * tangent).sum(), (cotangent * pushed).sum())


# ---- networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_networks_are_equivariant(name):
    kind = field_type(name)
    out = enn.FieldType(kind.gspace, [kind.gspace.trivial_repr, *reversed(kind.representations)])
    options = {"nonlinearity": "gated"} if kind.gspace.dimensionality == 3 else {}
    net = randomize(lipschitz_net(kind, out, hidden_dims=(12, 8), **options)).double()
    x = torch.randn(2, kind.size, *spatial_shape(name), dtype=torch.float64)
    function = expand(net)
    testing.assert_equivariant(function, x, kind, out_type=out, tolerance=1e-12)
    assert function(x).std() > 1e-3
    assert net(enn.GeometricTensor(x, kind)).type == out
    hidden = [module for module in net if not isinstance(module, (SteerableLinear, SteerableConv))]
    assert [module.lipschitz for module in hidden] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["C4", "D3", "SO2", "O2", "SO3", "cylinder"])
def test_the_norms_of_the_layers_bound_the_network(name):
    kind = field_type(name)
    net = randomize(lipschitz_net(kind, kind, hidden_dims=(16, 16))).double()
    layers = [module for module in net if isinstance(module, SteerableLinear)]
    bound = math.prod(float(torch.linalg.matrix_norm(layer.filter(), 2).detach()) for layer in layers)
    x = 3 * torch.randn(2000, kind.size, dtype=torch.float64)
    assert jacobian_norms(expand(net), x).max() <= bound * (1 + ROUNDING)


@pytest.mark.parametrize("name", ["SO2", "O2-plane"])
def test_vectors_alone_pass_at_the_start(name):
    """Without scalars in the input no weight moves the first gates: their biases have to."""
    space = field_type(name).gspace
    kind = enn.FieldType(space, 3 * [irreps_of(field_type(name))[0]])
    net = lipschitz_net(kind, kind, hidden_dims=(32, 32)).double()
    x = torch.randn(50, kind.size, *spatial_shape(name), dtype=torch.float64)
    assert expand(net)(x).std() > 0.02
    expand(net)(x).square().sum().backward()
    for module in net:
        if not isinstance(module, LipschitzGate):
            assert module.weight.grad.abs().max() > 0


def test_starts_at_zero_when_asked_to():
    for name in ("O2", "C4-plane"):
        kind = field_type(name)
        net = lipschitz_net(kind, kind, hidden_dims=(8,), zero_init=True)
        assert not expand(net)(torch.randn(2, kind.size, *spatial_shape(name))).any()


def test_options_reach_the_layers():
    kind = field_type("C4-plane")
    net = lipschitz_net(
        kind, kind, hidden_dims=(12,), kernel_size=5, padding_mode="circular", nonlinearity="gated", function="sin2pi"
    )
    first, gate, last = net
    assert isinstance(gate, LipschitzGate) and gate.function == "sin2pi"
    assert (first.kernel_size, last.padding_mode) == (5, "circular")
    x = torch.randn(2, kind.size, 6, 6)
    torch.testing.assert_close(expand(net)(x.roll(1, -1)), expand(net)(x).roll(1, -1), rtol=1e-4, atol=1e-5)
    pointwise = lipschitz_net(kind, kind, hidden_dims=(12,), function="sin2pi")[1]
    assert isinstance(pointwise, PointwiseNonLinearity) and pointwise.function == "sin2pi"


def test_plain_networks_keep_their_gates():
    kind = field_type("SO2-plane")
    (gate,) = steerable_net(kind, kind, hidden_dims=(8,)).layers.between
    assert isinstance(gate, GatedNonLinearity)


@pytest.mark.parametrize("name", ["O2", "C4", "C4-plane", "SO2-plane"])
def test_copies_are_the_same_network(name):
    kind = field_type(name)
    net = randomize(lipschitz_net(kind, kind, hidden_dims=(8,))).double()
    assert set(net.state_dict()) == {n for n, _ in net.named_parameters()}
    x = torch.randn(2, kind.size, *spatial_shape(name), dtype=torch.float64)
    for twin in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        torch.testing.assert_close(expand(twin)(x), expand(net)(x), rtol=0, atol=0)


# ---- errors -----------------------------------------------------------------------------------------------

ERRORS = [
    (lambda k, c: lipschitz_net(k, k, function="silu"), r"found 'silu'; only these have .* 1; \"lipswish\" is"),
    (lambda k, c: lipschitz_net(c, c, function="silu"), r"found 'silu'; only these have"),
    (lambda k, c: lipschitz_net(k, k, function="gelu"), "found 'gelu'"),
    (lambda k, c: lipschitz_net(k, c), r"out_type: expected a type over SO\(2\), found one over C4"),
    (lambda k, c: lipschitz_net(k, k, hidden_dims=(0,)), "hidden_dims: expected positive integers"),
    (lambda k, c: lipschitz_net(k, k, nonlinearity="norm"), "nonlinearity: expected"),
    (lambda k, c: lipschitz_net(k, k, nonlinearity="pointwise"), 'nonlinearity: expected "gated"'),
    (lambda k, c: LipschitzGate(k.gspace, 1, [k.gspace.irrep(1)], "silu"), "found 'silu'"),
    (lambda k, c: LipschitzGate(k.gspace, 1, []), "irreps: expected at least one"),
    (
        lambda k, c: LipschitzGate(k.gspace, 1, [k.gspace.irrep(1)], radius=0.0),
        "radius: expected a positive finite number, found 0",
    ),
    (lambda k, c: LipschitzGate(k.gspace, 1, [k.gspace.irrep(1)], radius=math.inf), "radius: expected a positive"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(field_type("SO2"), field_type("C4"))
