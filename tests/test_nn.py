# SPDX-License-Identifier: Apache-2.0
"""Steerable layers and networks, against escnn's own layers and dense solves."""

import copy
import pickle

import numpy as np
import pyro
import pytest
import torch
from escnn import group, gspaces
from escnn import nn as enn

from pyro_equiflow import testing
from pyro_equiflow.nn import (
    GatedNonLinearity,
    LipschitzConditioner,
    PointwiseNonLinearity,
    SteerableConv,
    SteerableLinear,
    expand,
    lipschitz_net,
    steerable_net,
)
from pyro_equiflow.nn.nonlinearities import FUNCTIONS
from pyro_equiflow.ops.events import act, grid_elements
from tests.cases import TYPES, field_type, point, randomize, spatial_shape

POINTS = [name for name in TYPES if not spatial_shape(name)]
GRIDS = [name for name in TYPES if spatial_shape(name)]


def dense(layer):
    """The linear part of a layer, one row a weight: shape ``(weights, entries of the filter)``."""
    eye = torch.eye(layer.weight.numel(), dtype=layer.weight.dtype)
    rows = []
    for row in eye:
        with torch.no_grad():
            layer.weight.copy_(row)
            rows.append(layer.filter().flatten().clone())
    return torch.stack(rows)


def outside(span, vectors):
    """The relative part of ``vectors`` outside the row space of ``span``."""
    q, _ = torch.linalg.qr(span.mT)
    rest = vectors - (vectors @ q) @ q.mT
    return float(rest.norm() / vectors.norm())


@pytest.mark.parametrize("name", POINTS)
def test_linear_spans_what_escnns_does(name):
    kind = field_type(name)
    out = enn.FieldType(kind.gspace, list(reversed(kind.representations)))
    ours, theirs = SteerableLinear(kind, out).double(), enn.Linear(kind, out, initialize=False)
    assert ours.weight.numel() == theirs.weights.numel()
    assert (0 if ours.bias is None else ours.bias.numel()) == (0 if theirs.bias is None else theirs.bias.numel())
    span = dense(ours)
    assert torch.linalg.matrix_rank(span) == len(span)
    with torch.no_grad():
        theirs.weights.normal_()
    matrix, _ = theirs.expand_parameters()
    assert outside(span, matrix.detach().double().flatten()[None]) < 1e-5


@pytest.mark.parametrize("build", [steerable_net, lipschitz_net])
@pytest.mark.parametrize("space", ["C4", "SO2"])
def test_scalar_fields_on_a_grid_see_directions(space, build):
    """Kernels between scalar fields are isotropic, and would commute with reflections, which are not in the group."""
    gspace = {"C4": lambda: gspaces.rot2dOnR2(4), "SO2": lambda: gspaces.rot2dOnR2(-1, 2)}[space]()
    scalars = enn.FieldType(gspace, 2 * [gspace.trivial_repr])
    torch.manual_seed(0)
    net = expand(build(scalars, scalars, hidden_dims=(16, 16)).double())
    x = torch.randn(3, 2, 7, 7, dtype=torch.float64)
    error = (net(x.rot90(1, (-2, -1))) - net(x).rot90(1, (-2, -1))).abs().max()
    assert error < 1e-12
    assert (net(x.flip(-1)) - net(x).flip(-1)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["C4-plane", "C8-plane", "D4-plane", "SO2-plane", "O2-plane", "octahedral-space"])
def test_conv_spans_what_escnns_does(name):
    kind = field_type(name)
    dimensions = kind.gspace.dimensionality
    conv = enn.R2Conv if dimensions == 2 else enn.R3Conv
    out = enn.FieldType(kind.gspace, list(reversed(kind.representations)))
    ours, theirs = SteerableConv(kind, out, 3).double(), conv(kind, out, 3, initialize=False)
    assert ours.weight.numel() == theirs.weights.numel()
    span = dense(ours)
    assert torch.linalg.matrix_rank(span) == len(span)
    with torch.no_grad():
        theirs.weights.normal_()
    kernel, _ = theirs.expand_parameters()
    assert outside(span, kernel.detach().double().flatten()[None]) < 1e-5


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_conv_is_equivariant_and_torchs(name, padding_mode):
    kind = field_type(name)
    layer = randomize(SteerableConv(kind, kind, 3, padding_mode=padding_mode)).double()
    x = torch.randn(2, kind.size, *spatial_shape(name), dtype=torch.float64)
    function = expand(layer)
    testing.assert_equivariant(function, x, kind, tolerance=1e-13)
    pads = 2 * kind.gspace.dimensionality * (1,)
    padded = torch.nn.functional.pad(x, pads, mode="constant" if padding_mode == "zeros" else "circular")
    convolve = torch.nn.functional.conv2d if kind.gspace.dimensionality == 2 else torch.nn.functional.conv3d
    expected = convolve(padded, layer.filter(), layer.expanded_bias())
    torch.testing.assert_close(function(x), expected, rtol=1e-12, atol=1e-12)
    if padding_mode == "circular":  # translations are exact too
        shift = (1,) * kind.gspace.dimensionality
        dims = tuple(range(2, x.dim()))
        torch.testing.assert_close(function(x.roll(shift, dims)), function(x).roll(shift, dims), rtol=1e-12, atol=1e-12)


def test_kernels_of_five_points():
    kind = field_type("SO2-plane")
    layer = SteerableConv(kind, kind, 5).double()
    theirs = enn.R2Conv(kind, kind, 5, initialize=False)
    assert layer.weight.numel() == theirs.weights.numel()
    testing.assert_equivariant(expand(layer), torch.randn(2, kind.size, 6, 6).double(), kind, tolerance=1e-13)


@pytest.mark.parametrize("name", POINTS + ["C4-plane", "O2-plane", "octahedral-space"])
def test_initialisation_keeps_the_variance(name):
    """Ten layers without activation: the mean square a channel stays of order one."""
    kind = field_type(name)
    dimensions = kind.gspace.dimensionality
    wide = enn.FieldType(kind.gspace, 6 * list(kind.representations))
    ratios = []
    for _ in range(6):
        layer = SteerableConv(wide, wide, 3, padding_mode="circular") if dimensions else SteerableLinear(wide, wide)
        x = torch.randn(64 if not dimensions else 4, wide.size, *dimensions * (4,))
        with torch.no_grad():
            ratios.append(float(expand(layer)(x).square().mean()))
    # Six draws; the spread of one is about sqrt(2 / weights).
    assert 0.7 < np.mean(ratios) < 1.4


@pytest.mark.parametrize("name", TYPES)
def test_networks_are_equivariant(name):
    kind = field_type(name)
    dimensions = kind.gspace.dimensionality
    out = enn.FieldType(kind.gspace, [kind.gspace.trivial_repr, *reversed(kind.representations)])
    options = {"nonlinearity": "gated"} if dimensions == 3 else {}
    net = randomize(steerable_net(kind, out, hidden_dims=(12, 8), **options))
    x = torch.randn(2, kind.size, *spatial_shape(name))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        function = expand(net.to(dtype))
        testing.assert_equivariant(function, x.to(dtype), kind, out_type=out, tolerance=tolerance)
        assert function(x.to(dtype)).std() > 1e-3
        through = net(enn.GeometricTensor(x.to(dtype), kind))
        assert through.type == out
        torch.testing.assert_close(through.tensor, function(x.to(dtype)))


def test_regular_hidden_fields_on_octahedral_points_and_planes():
    for name, options in [("octahedral", {}), ("C8-plane", {}), ("D4-plane", {"function": "tanh"})]:
        kind = field_type(name)
        net = randomize(steerable_net(kind, kind, hidden_dims=(8,), nonlinearity="pointwise", **options)).double()
        x = torch.randn(2, kind.size, *spatial_shape(name), dtype=torch.float64)
        testing.assert_equivariant(expand(net), x, kind, tolerance=1e-12)


@pytest.mark.parametrize("function", ["elu", "relu", "silu", "tanh", "sin"])
def test_pointwise_functions(function):
    c4 = group.cyclic_group(4)
    kind = point(c4, c4.regular_representation, c4.trivial_representation)
    x = torch.randn(5, 5, dtype=torch.float64)
    found = expand(PointwiseNonLinearity(kind, function))(x)
    expected = {"elu": torch.nn.ELU(), "relu": torch.relu, "silu": torch.nn.SiLU(), "tanh": torch.tanh,
                "sin": torch.sin}[function](x)  # fmt: skip
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["O2", "SO3", "O2-plane", "octahedral-space"])
def test_gates_by_their_formula(name):
    kind = field_type(name)
    irreps = [r for r in kind.representations if not r.is_trivial()]
    irreps.sort(key=lambda r: r.name)
    gate = GatedNonLinearity(kind.gspace, 2, irreps)
    x = torch.randn(3, gate.in_type.size, *spatial_shape(name), dtype=torch.float64)
    scalars, gates, *fields = x.split([2, len(irreps), *(r.size for r in irreps)], 1)
    lengths = torch.stack([(1 + v.square().sum(1)).sqrt() for v in fields], 1)
    gated = [torch.sigmoid(gates[:, i : i + 1]) * v for i, v in enumerate(fields)]
    expected = torch.cat([torch.nn.functional.silu(scalars), lengths, *gated], 1)
    torch.testing.assert_close(expand(gate)(x), expected)


def test_gates_carry_lengths_across_fields():
    """An irrep's gate hears of the other irreps' lengths after one linear layer: the networks are not blind."""
    kind = field_type("SO2")
    net = steerable_net(kind, kind, hidden_dims=(24, 24)).double()
    x = torch.randn(kind.size, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: expand(net)(x[None])[0], x)
    first, third = slice(0, 2), slice(3, 5)  # frequency 1 and frequency 2
    assert jacobian[first, third].norm() > 1e-4


NETWORKS = {
    "points": lambda: steerable_net(field_type("O2"), field_type("O2"), hidden_dims=(16,)),
    "regular": lambda: steerable_net(field_type("C4"), field_type("C4"), hidden_dims=(16,)),
    "plane": lambda: steerable_net(field_type("C4-plane"), field_type("C4-plane"), hidden_dims=(8,)),
    "plane, gated": lambda: steerable_net(field_type("O2-plane"), field_type("O2-plane"), hidden_dims=(8,)),
    "space": lambda: steerable_net(
        field_type("octahedral-space"), field_type("octahedral-space"), hidden_dims=(8,), nonlinearity="gated"
    ),
}


def network_and_input(name):
    net = randomize(NETWORKS[name]()).double()
    side = {"points": 0, "regular": 0, "space": 3}.get(name, 4)
    x = torch.randn(3, net.in_type.size, *net.in_type.gspace.dimensionality * (side,), dtype=torch.float64)
    return net, x


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, in jvp
@pytest.mark.parametrize("name", NETWORKS)
def test_expanded_functions_go_through_torch_func(name):
    net, x = network_and_input(name)
    fn, tensors = expand(net)
    y = fn(x, *tensors)
    one_by_one = torch.func.vmap(lambda e: fn(e[None], *tensors)[0])(x)
    torch.testing.assert_close(one_by_one, y, rtol=1e-11, atol=1e-11)

    tangent = torch.randn_like(x)
    _, jvp = torch.func.jvp(lambda x: fn(x, *tensors), (x,), (tangent,))
    step = 1e-6
    numeric = (fn(x + step * tangent, *tensors) - fn(x - step * tangent, *tensors)) / (2 * step)
    torch.testing.assert_close(jvp, numeric, rtol=1e-5, atol=1e-6)

    def loss(*tensors):
        return fn(x, *tensors).square().sum()

    functional = torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*tensors)
    classic = torch.autograd.grad(loss(*tensors), tensors)
    for a, b in zip(functional, classic):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# torch 2.13 says so of Python 3.13.0 alone.
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python:RuntimeWarning")
@pytest.mark.parametrize("name", ["points", "regular", "plane"])
def test_expanded_functions_compile(name):
    net, x = network_and_input(name)
    fn, tensors = expand(net)
    tensors = [t.detach().requires_grad_() for t in tensors]  # torch.compile asks for the gradient of what it is given
    with pyro.validation_enabled(True):  # torch.compile turns the validation of distributions off, for good
        compiled = torch.compile(fn, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, *tensors), fn(x, *tensors))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_the_parameters(name):
    net, x = network_and_input(name)
    names = [n for n, _ in net.named_parameters()]

    def function(x, *values):
        class Call(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, x):
                return expand(self.net)(x)

        return torch.func.functional_call(Call(), {"net." + n: v for n, v in zip(names, values)}, (x,))

    parameters = [p.detach().clone().requires_grad_() for p in net.parameters()]
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *parameters), fast_mode=True)


def test_zero_init_is_the_zero_map():
    net = steerable_net(field_type("O2"), field_type("O2"), zero_init=True)
    assert not expand(net)(torch.randn(3, 8)).any()


@pytest.mark.parametrize("name", ["regular", "plane", "plane, gated"])
def test_parameters_in_two_tensors(name):
    """The map of the layers one by one, each with its own part of the weights and biases."""
    net, x = network_and_input(name)
    assert [n for n, _ in net.named_parameters()] == ["weight", "bias"]
    twins = [
        SteerableConv(layer.in_type, layer.out_type) if x.dim() > 2 else SteerableLinear(layer.in_type, layer.out_type)
        for layer in net.layers.linears
    ]
    weights = net.weight.split([twin.weight.numel() for twin in twins])
    biases = net.bias.split([twin.bias.numel() for twin in twins])
    parts = []
    for twin, weight, bias, between in zip(twins, weights, biases, [*net.layers.between, None]):
        twin.weight, twin.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())
        parts += [twin] if between is None else [twin, between]
    torch.testing.assert_close(expand(net)(x), expand(enn.SequentialModule(*parts))(x), rtol=1e-12, atol=1e-12)


# ---- user-made networks -----------------------------------------------------------------------------------


def escnn_networks():
    c4 = field_type("C4")
    plane = field_type("C4-plane")
    o2 = point(group.o2_group(), *3 * [group.o2_group().irrep(1, 1)])
    regular = point(c4.fibergroup, *3 * [c4.fibergroup.regular_representation])
    hidden = enn.FieldType(plane.gspace, 3 * [plane.gspace.regular_repr])
    volume = field_type("octahedral-space")
    return {
        "Linear, ReLU": enn.SequentialModule(enn.Linear(c4, regular), enn.ReLU(regular), enn.Linear(regular, c4)),
        "Linear, ELU": enn.SequentialModule(
            enn.Linear(c4, regular), enn.ELU(regular, alpha=0.5), enn.Linear(regular, c4)
        ),
        "Linear, norm": enn.SequentialModule(enn.Linear(o2, o2), enn.NormNonLinearity(o2), enn.Linear(o2, o2)),
        "R2Conv, ReLU": enn.SequentialModule(
            enn.R2Conv(plane, hidden, 3, padding=1), enn.ReLU(hidden), enn.R2Conv(hidden, plane, 3, padding=1)
        ),
        "R2Conv, circular, dilated": enn.SequentialModule(
            enn.R2Conv(plane, hidden, 3, padding=1, padding_mode="circular"),
            enn.ELU(hidden),
            enn.R2Conv(hidden, plane, 3, padding=2, dilation=2, bias=False),
        ),
        "nested": enn.SequentialModule(
            enn.SequentialModule(enn.Linear(c4, regular), enn.ReLU(regular)),
            enn.IdentityModule(regular),
            enn.Linear(regular, c4),
        ),
        "R3Conv": enn.SequentialModule(enn.R3Conv(volume, volume, 3, padding=1), enn.IdentityModule(volume)),
    }


@pytest.mark.parametrize("name", list(escnn_networks()))
def test_escnns_networks_expand_to_themselves(name):
    net = escnn_networks()[name]
    side = {0: 0, 2: 5, 3: 3}[net.in_type.gspace.dimensionality]
    x = torch.randn(2, net.in_type.size, *net.in_type.gspace.dimensionality * (side,))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = net(enn.GeometricTensor(x, net.in_type)).tensor
    torch.testing.assert_close(expand(net)(x), expected, rtol=1e-5, atol=1e-5)


def test_a_module_used_twice_runs_twice():
    regular = point(group.cyclic_group(4), *3 * [group.cyclic_group(4).regular_representation])
    shared = enn.ReLU(regular)
    net = enn.SequentialModule(
        enn.Linear(regular, regular), shared, enn.Linear(regular, regular), shared, enn.Linear(regular, regular)
    )
    x = torch.randn(5, 12)
    torch.testing.assert_close(expand(net)(x), net(enn.GeometricTensor(x, regular)).tensor)


@pytest.mark.parametrize("base", [enn.SequentialModule, enn.ReLU, enn.Linear], ids=lambda c: c.__name__)
def test_a_subclass_with_a_forward_of_its_own_keeps_it(base):
    """A rule for a class says nothing of what a user's subclass computes."""
    regular = point(group.cyclic_group(4), *3 * [group.cyclic_group(4).regular_representation])

    class Doubled(base):
        def forward(self, x):
            y = super().forward(x)
            return y + y

    arguments = {
        enn.SequentialModule: (enn.Linear(regular, regular), enn.ReLU(regular)),
        enn.ReLU: (regular,),
        enn.Linear: (regular, regular),
    }
    module = Doubled(*arguments[base])
    x = torch.randn(5, 12)
    torch.testing.assert_close(expand(module)(x), module(enn.GeometricTensor(x, regular)).tensor)


def test_a_rule_for_a_users_class():
    regular = point(group.cyclic_group(4), group.cyclic_group(4).regular_representation)

    class Halved(enn.IdentityModule):
        pass

    @expand.register(Halved)
    def _(module):
        from pyro_equiflow.nn import Expanded

        return Expanded(lambda x: x / 2, ())

    x = torch.randn(2, 4)
    torch.testing.assert_close(expand(enn.SequentialModule(Halved(regular)))(x), x / 2)


# ---- dtype, state, copies ---------------------------------------------------------------------------------


def test_double_leaves_escnns_own_layers_alone():
    """Building our layers and casting them touches no basis that escnn shares."""
    plane = field_type("C4-plane")
    bare = enn.R2Conv(plane, plane, 3, padding=1)
    x = torch.randn(2, plane.size, 5, 5)
    expected = bare(enn.GeometricTensor(x, plane)).tensor
    ours = SteerableConv(plane, plane, 3).double()
    expand(ours)(x.double())
    torch.testing.assert_close(bare(enn.GeometricTensor(x, plane)).tensor, expected, rtol=0, atol=0)
    twice = enn.R2Conv(plane, plane, 3, padding=1)
    twice(enn.GeometricTensor(x, plane))


@pytest.mark.parametrize("name", NETWORKS)
def test_state_is_parameters_only(name):
    net, x = network_and_input(name)
    assert set(net.state_dict()) == {n for n, _ in net.named_parameters()}
    assert not list(net.buffers())
    twin = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(expand(twin)(x), expand(net)(x), rtol=0, atol=0)
    twin = copy.deepcopy(net)
    torch.testing.assert_close(expand(twin)(x), expand(net)(x), rtol=0, atol=0)


def test_casting_there_and_back_is_exact_again():
    """float32 in between leaves the parameters rounded, never the basis."""
    kind = field_type("C4-plane")
    layer = randomize(SteerableConv(kind, kind, 3)).double().float().double()
    x = torch.randn(2, kind.size, 4, 4, dtype=torch.float64)
    testing.assert_equivariant(expand(layer), x, kind, tolerance=1e-13)


# ---- faults that the checks see ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["O2", "C4", "C4-plane", "octahedral-space"])
def test_a_filter_outside_the_span_is_caught(name):
    kind = field_type(name)
    layer = (SteerableConv if spatial_shape(name) else SteerableLinear)(kind, kind)
    x = torch.randn(2, kind.size, *spatial_shape(name))
    fn, (weight, *rest) = expand(layer)
    testing.assert_equivariant(lambda x: fn(x, weight, *rest), x, kind)
    spoilt = weight.clone()
    spoilt[(0,) * weight.dim()] += 1e-2
    with pytest.raises(AssertionError, match="equivariance error"):
        testing.assert_equivariant(lambda x: fn(x, spoilt, *rest), x, kind)


def test_a_pointwise_function_on_an_irrep_is_caught():
    kind = field_type("O2")
    x = torch.randn(3, kind.size)
    with pytest.raises(AssertionError, match="equivariance error"):
        testing.assert_equivariant(torch.nn.functional.silu, x, kind)
    with pytest.raises(ValueError, match="expected fields that permute their channels, found"):
        PointwiseNonLinearity(kind)


def test_a_bias_outside_the_invariants_is_caught():
    kind = field_type("C4-plane")
    x = torch.randn(2, kind.size, 4, 4)
    bias = torch.zeros(kind.size)
    bias[0] = 0.1  # a sign representation has no invariant vector
    layer = SteerableConv(kind, kind, 3)
    with pytest.raises(AssertionError, match="equivariance error"):
        testing.assert_equivariant(lambda x: expand(layer)(x) + bias[:, None, None], x, kind)


def test_act_and_expand_agree_with_escnn_on_a_whole_network():
    """No code of ours on the right: escnn's layers, escnn's action."""
    plane = gspaces.flipRot2dOnR2(4)
    kind = enn.FieldType(plane, [plane.regular_repr, plane.irrep(1, 1)])
    net = escnn = enn.SequentialModule(enn.R2Conv(kind, kind, 3, padding=1), enn.IdentityModule(kind))
    x = torch.randn(1, kind.size, 5, 5)
    for g in grid_elements(kind):
        left = expand(net)(act(kind, g, x))
        right = escnn(enn.GeometricTensor(x, kind)).transform(g).tensor
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_pointwise_functions_and_their_slopes(name):
    """To the third order, and one by one as well as all at once."""
    function = FUNCTIONS[name]
    x = torch.tensor([-7.0, -1.3, -0.2, 0.4, 1.1, 6.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(function.slope(x), torch.autograd.grad(function.core(x).sum(), x)[0])
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)

    def second(x):
        (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x, create_graph=True)[0]

    if name not in ("relu", "elu"):  # whose second derivative jumps
        assert torch.autograd.gradcheck(second, x)
    diagonal = torch.autograd.grad(function(x), x, torch.eye(6, dtype=x.dtype), is_grads_batched=True)[0]
    torch.testing.assert_close(diagonal.diagonal(), torch.autograd.grad(function(x).sum(), x)[0])

    def together(x):
        rows = torch.eye(6, dtype=x.dtype)
        return torch.autograd.grad(function(x), x, rows, is_grads_batched=True, create_graph=True)[0]

    assert torch.autograd.gradcheck(together, x)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("name", ["C4", "D3", "C4-plane", "flips-space"])
def test_pullbacks_are_the_vector_jacobian_products(name, padding_mode):
    kind = field_type(name)
    sizes = {"kernel_size": 3, "padding_mode": padding_mode} if kind.gspace.dimensionality else {}
    net = lipschitz_net(kind, kind, hidden_dims=(16, 16), nonlinearity="pointwise", **sizes).double()
    fn, tensors = LipschitzConditioner(randomize(net), kind, kind, 0.9).expanded()
    x = torch.randn(2, kind.size, *kind.gspace.dimensionality * (4,), dtype=torch.float64, requires_grad=True)
    y, pull = fn.linearize(x, *tensors)
    torch.testing.assert_close(y, fn(x, *tensors))
    p = torch.randn_like(y)
    given = p.clone()
    expected = torch.autograd.grad(y, x, p, retain_graph=True)[0]
    with torch.no_grad():
        torch.testing.assert_close(pull(p), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pull(p), expected, rtol=1e-12, atol=1e-12)
    assert p.equal(given)


def test_gates_have_no_pullback():
    kind = field_type("SO2")
    fn, tensors = LipschitzConditioner(lipschitz_net(kind, kind), kind, kind, 0.9).expanded()
    assert fn.linearize(torch.randn(2, kind.size), *tensors) is None
