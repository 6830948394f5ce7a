# SPDX-License-Identifier: Apache-2.0
"""Networks held below a constant: dense Jacobians never exceed the bound, whatever becomes of the weights."""

import copy
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from escnn import group, gspaces
from escnn import nn as enn

from pyro_equiflow import (
    ConditionalEquivariantResidual,
    EquivariantResidual,
    conditional_equivariant_residual,
    equivariant_residual,
)
from pyro_equiflow.nn import (
    Expanded,
    GatedNonLinearity,
    LipschitzConditioner,
    LipschitzGate,
    PointwiseNonLinearity,
    SteerableConv,
    SteerableLinear,
    SteerableModule,
    expand,
    lipschitz_bound,
    lipschitz_net,
    weight_norm,
)
from pyro_equiflow.nn.lipschitz.conditioner import Normalized
from tests.cases import DTYPES, field_type, point, spatial_shape
from tests.test_lipschitz_nets import jacobian_norms, worst_norm
from tests.test_operator_norm import all_angles, dense, lanczos, linear_part, symbol_norms, top

# Of a Jacobian in float64 and of its singular values.
ROUNDING = 1e-12

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own

DATA = Path(__file__).parent / "data"


@functools.cache
def digits():
    """Handwritten digits ``(128, 1, 8, 8)``, about standard."""
    lines = [line for line in (DATA / "digits.txt").read_text().splitlines() if not line.startswith("#")]
    pixels = torch.tensor([[int(c, 17) for c in line] for line in lines], dtype=torch.float32)
    return (pixels.reshape(-1, 1, 8, 8) - 5) / 6


@functools.cache
def flowers():
    """Iris: sepal and petal as two vectors ``(150, 4)``, standardised."""
    values = torch.tensor(np.loadtxt(DATA / "iris.txt"), dtype=torch.float32)
    return (values - values.mean(0)) / values.std(0)


def _scalars(space):
    return enn.FieldType(space, [space.trivial_repr])


def _vectors(g, irrep):
    return point(g, *2 * [g.irrep(*irrep)])


def _swap_type():
    c4 = group.cyclic_group(4)
    return point(c4, c4.regular_representation)


#: A type with data of its size: grids of 8x8 under zero and circular padding, flowers as fields on a point.
FLOWS = {
    "C1-plane": (lambda: _scalars(gspaces.trivialOnR2()), digits, {}),
    "C4-plane": (lambda: _scalars(gspaces.rot2dOnR2(4)), digits, {"padding_mode": "circular"}),
    "D4-plane": (lambda: _scalars(gspaces.flipRot2dOnR2(4)), digits, {"kernel_size": 5}),
    "O2-plane": (lambda: _scalars(gspaces.flipRot2dOnR2(-1, 2)), digits, {"nonlinearity": "gated"}),
    "C4": (_swap_type, flowers, {"hidden_dims": (16, 16), "function": "sin2pi"}),
    "SO2": (lambda: _vectors(group.so2_group(), (1,)), flowers, {"hidden_dims": (16, 16)}),
    "O2": (lambda: _vectors(group.o2_group(), (1, 1)), flowers, {"hidden_dims": (16, 16), "function": "elu"}),
}


@functools.cache
def trained(name):
    """A residual transform after 120 steps of maximum likelihood on data, and that data."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        make, data, options = FLOWS[name]
        kind = make()
        if "nonlinearity" in options:  # gates need something that moves
            space = kind.gspace
            gate = LipschitzGate(space, 3, 2 * [space.irrep(1, 1)])
            net = enn.SequentialModule(
                SteerableConv(kind, gate.in_type, 3), gate, SteerableConv(gate.out_type, kind, 3)
            )
            transform = EquivariantResidual(kind, net, lipschitz=0.9)
        else:
            transform = equivariant_residual(kind, **{"hidden_dims": (8,), **options})
        optimizer = torch.optim.Adam(transform.parameters(), lr=1e-2)
        for step in range(120):
            batch = data()[4 * step % 120 :][:4]
            optimizer.zero_grad()
            y, ladj = transform.call_and_ladj(batch)
            loss = (0.5 * y.square().flatten(1).sum(1) - ladj).mean()
            loss.backward()
            optimizer.step()
    return transform


def layers_of(conditioner):
    return [layer for layer in conditioner.network if isinstance(layer, (SteerableLinear, SteerableConv))]


def check(conditioner, points, spatial=(), ascent=40, worst_wanted=0.0):
    """Dense norms of layers and of the network against their bounds; returns the ratios of the layers."""
    ratios = []
    for layer in layers_of(conditioner):
        with torch.no_grad():
            weight = layer.filter()
            bound = float(weight_norm(layer, weight, spatial))
        truth = top(dense(linear_part(layer), layer.in_type.size, spatial)) if spatial else top(weight)
        assert truth <= bound * (1 + ROUNDING)
        ratios.append(bound / truth)
    # Weights as they are in the present dtype, the Jacobian in float64.
    (fn, tensors), bound = conditioner.normalized(spatial)
    tensors = [t.detach().double() for t in tensors]
    assert bound <= conditioner.lipschitz
    channels = conditioner.network.in_type.size
    assert points.shape[1] == channels

    def function(x):
        return fn(x.reshape(len(x), channels, *spatial), *tensors).flatten(1)

    worst = worst_norm(function, points.flatten(1).double(), steps=ascent)
    assert worst_wanted < worst <= bound * (1 + ROUNDING)
    return ratios


@pytest.mark.parametrize("name", FLOWS)
def test_trained_networks_stay_below(name):
    transform = trained(name)
    conditioner, data = transform.conditioner, FLOWS[name][1]()
    spatial = tuple(data.shape[2:])
    before = {key: value.clone() for key, value in conditioner.state_dict().items()}
    assert any(p.grad.abs().max() > 0 for p in conditioner.parameters())
    fresh = copy.deepcopy(conditioner)
    for parameter in fresh.parameters():
        torch.nn.init.normal_(parameter)
    few = 20 if spatial else 100
    points = torch.cat([data[:few], 3 * torch.randn(few, *data.shape[1:])])
    ratios = check(conditioner, points, spatial, ascent=5 if spatial else 60, worst_wanted=0.05)
    assert max(ratios) <= (1.1 if spatial else 1.05)
    fresh.load_state_dict(conditioner.state_dict())
    check(fresh, points[:20], spatial, ascent=0)
    check(fresh.double(), points[:20], spatial, ascent=0)
    assert all(torch.equal(value, before[key]) for key, value in conditioner.state_dict().items())
    assert transform.lipschitz_bound(spatial) <= 0.9
    assert transform.lipschitz_bound() <= 0.9


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_trained_layers_on_large_grids(padding_mode):
    """28x28, weights from training: at most a tenth above the operator's norm."""
    for layer in layers_of(copy.deepcopy(trained("C1-plane").conditioner).double()):
        layer.padding_mode = padding_mode
        truth = lanczos(linear_part(layer), layer.in_type.size, (28, 28))
        bound = float(weight_norm(layer, layer.filter(), (28, 28)).detach())
        assert truth <= bound <= 1.10 * truth


@pytest.mark.parametrize("name", ["C4", "O2", "SO3", "octahedral-space"])
def test_the_bound_follows_the_weights(name):
    kind, spatial = field_type(name), spatial_shape(name)
    options = {"nonlinearity": "gated"} if spatial else {}
    conditioner = LipschitzConditioner(lipschitz_net(kind, kind, hidden_dims=(8,), **options), kind, kind, 0.8)
    x = torch.randn(24, kind.size, *spatial)

    def holds():
        check(conditioner, x[:20], spatial, ascent=3)

    holds()
    for parameter in conditioner.parameters():  # fused Adam and clipped Adam: no version counts this
        parameter.data.mul_(30).add_(torch.randn_like(parameter))
    holds()
    optimizer = torch.optim.SGD(conditioner.parameters(), lr=10.0)
    fn, tensors = conditioner.normalized(spatial).expanded
    fn(x, *tensors).square().sum().backward()
    optimizer.step()
    holds()
    state = {key: 5 * torch.randn_like(value) for key, value in conditioner.state_dict().items()}
    conditioner.load_state_dict(state)
    holds()
    conditioner.double()
    holds()
    conditioner.to(torch.float32).eval()
    holds()
    assert all(torch.equal(value, state[key]) for key, value in conditioner.state_dict().items())
    for parameter in conditioner.parameters():
        parameter.data.mul_(1e-3)
    small = conditioner.normalized(spatial).bound
    assert small < 1e-2
    holds()


# ---- rules ------------------------------------------------------------------------------------------------


def c4_regular(fields=2):
    c4 = group.cyclic_group(4)
    return point(c4, *fields * [c4.regular_representation])


def test_rules_of_linear_layers():
    kind = c4_regular()
    for layer in (SteerableLinear(kind, kind), enn.Linear(kind, kind)):
        truth = top(expand(layer).tensors[0])
        assert truth <= float(lipschitz_bound(layer).detach()) <= 1.05 * truth
    plane, volume = field_type("C4-plane"), field_type("octahedral-space")
    for mode in ("zeros", "circular"):
        for layer, shape in (
            (SteerableConv(plane, plane, 3, padding_mode=mode), (4, 4)),
            (enn.R2Conv(plane, plane, 3, padding=1, padding_mode=mode), (4, 4)),
            (enn.R2Conv(plane, plane, 5, padding=2, padding_mode=mode), (5, 5)),
            (enn.R2Conv(plane, plane, 1), (3, 3)),
            (enn.R3Conv(volume, volume, 3, padding=1, padding_mode=mode), (3, 3, 3)),
        ):
            truth = top(dense(linear_part(layer), layer.in_type.size, shape, torch.float32))
            bound = float(lipschitz_bound(layer, shape).detach())
            assert truth * (1 - 1e-6) <= bound <= 1.5 * truth  # the dense matrix is made in float32
            assert truth * (1 - 1e-6) <= float(lipschitz_bound(layer).detach())
    assert lipschitz_bound(layer).requires_grad


def test_rules_of_functions_and_sequences():
    kind = c4_regular()
    a, b = SteerableLinear(kind, kind), enn.Linear(kind, kind)
    assert lipschitz_bound(enn.ReLU(kind)) == lipschitz_bound(enn.IdentityModule(kind)) == 1
    assert lipschitz_bound(enn.ELU(kind)) == lipschitz_bound(enn.ELU(kind, alpha=0.5)) == 1
    assert lipschitz_bound(enn.ELU(kind, alpha=2.0)) == 2
    assert lipschitz_bound(PointwiseNonLinearity(kind, "silu")) == 1.1
    assert lipschitz_bound(PointwiseNonLinearity(kind, "lipswish")) == 1
    nested = enn.SequentialModule(
        enn.SequentialModule(a, PointwiseNonLinearity(kind, "silu")), enn.SequentialModule(enn.SequentialModule(b, a))
    )
    expected = 1.1 * float(lipschitz_bound(a).detach()) ** 2 * float(lipschitz_bound(b).detach())
    assert float(lipschitz_bound(nested).detach()) == pytest.approx(expected, rel=1e-6)
    x = torch.randn(200, kind.size)
    for function in ("silu", "sin2pi", "lipswish", "tanh"):
        net = enn.SequentialModule(
            enn.SequentialModule(a, PointwiseNonLinearity(kind, function)), enn.ELU(kind, 1.5), a
        )
        conditioner = LipschitzConditioner(net, kind, kind, 0.9)
        with torch.no_grad():
            for parameter in a.parameters():
                parameter.mul_(4)
        (fn, tensors), bound = conditioner.normalized()
        tensors = [t.detach().double() for t in tensors]
        worst = worst_norm(lambda x: fn(x, *tensors), x.double(), steps=100)  # noqa: B023
        assert 0.1 < worst <= bound <= 0.9


class Unknown(enn.EquivariantModule):
    def __init__(self, kind):
        super().__init__()
        self.in_type = self.out_type = kind

    def forward(self, x):
        return x

    def evaluate_output_shape(self, input_shape):
        return input_shape


def doubled(base):
    """A subclass that computes something else."""

    class Doubled(base):
        def forward(self, x):
            y = super().forward(x)
            return y + y

    return Doubled


class DoubledLinear(SteerableLinear):
    def expanded(self):
        fn, tensors = super().expanded()
        return Expanded(lambda x, *t: 2 * fn(x, *t), tensors)


class ReexpandedReLU(enn.ReLU):
    """Has a rule of ``expand`` and none of ``lipschitz_bound``."""


class RenamedReLU(enn.ReLU):
    """Rules hold for exact classes: nothing here says that this one computes what its parent does."""


class RenamedLinear(SteerableLinear):
    """Likewise."""


@expand.register(ReexpandedReLU)
def _(module):
    return Expanded(lambda x: 2 * x, ())


def _refused():
    kind, plane = c4_regular(), field_type("C4-plane")
    gated = GatedNonLinearity(field_type("SO2").gspace, 1, [field_type("SO2").gspace.irrep(1)])
    hidden = enn.FieldType(plane.gspace, [plane.gspace.regular_repr])

    def conv(size=3, padding=1, **options):
        return enn.R2Conv(hidden, hidden, size, padding=padding, initialize=False, **options)

    return [
        (Unknown(kind), TypeError, "found Unknown; build the network with"),
        (gated, TypeError, "found GatedNonLinearity"),
        (enn.NormNonLinearity(field_type("O2")), TypeError, "found NormNonLinearity"),
        (enn.SequentialModule(enn.ReLU(kind), Unknown(kind)), TypeError, "found Unknown"),
        (doubled(enn.ReLU)(kind), TypeError, "found Doubled"),
        (doubled(enn.ELU)(kind), TypeError, "found Doubled"),
        (doubled(enn.Linear)(kind, kind), TypeError, "found Doubled"),
        (doubled(enn.SequentialModule)(enn.ReLU(kind)), TypeError, "found Doubled"),
        (DoubledLinear(kind, kind), TypeError, "found DoubledLinear"),
        (ReexpandedReLU(kind), TypeError, "found ReexpandedReLU"),
        (RenamedReLU(kind), TypeError, "found RenamedReLU"),
        (RenamedLinear(kind, kind), TypeError, "found RenamedLinear"),
        (conv(stride=2), ValueError, "'stride': 1.*found.*'stride': 2"),
        (conv(dilation=2, padding=2), ValueError, "'dilation': 2"),
        (conv(padding=0), ValueError, "'padding': 1.*'padding': 0"),
        (conv(padding=2), ValueError, "'padding': 2"),
        (conv(size=4, padding=2), ValueError, "odd kernel_size.*found kernel_size 4"),
        (conv(padding_mode="reflect"), ValueError, "'padding_mode': 'reflect'"),
    ]


def test_refusals():
    for module, error, message in _refused():
        with pytest.raises(error, match=message):
            lipschitz_bound(module)
        with pytest.raises(error, match=message):
            LipschitzConditioner(enn.SequentialModule(module), module.in_type, module.out_type, 0.9)


def test_errors_of_the_conditioner():
    kind = c4_regular()
    net = lipschitz_net(kind, kind, hidden_dims=(8,))
    for bad in (0, 1, 1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"lipschitz: expected a number inside \(0, 1\), found"):
            LipschitzConditioner(net, kind, kind, bad)
    with pytest.raises(ValueError, match="at least one linear layer"):
        LipschitzConditioner(enn.SequentialModule(enn.ReLU(kind)), kind, kind, 0.9)
    with pytest.raises(ValueError, match="expected in_type"):
        LipschitzConditioner(net, c4_regular(1), kind, 0.9)
    with pytest.raises(TypeError, match=r"expected an escnn\.nn\.EquivariantModule"):
        LipschitzConditioner(torch.nn.Linear(3, 3), kind, kind, 0.9)
    plane = enn.FieldType(gspaces.rot2dOnR2(4), [gspaces.rot2dOnR2(4).regular_repr])
    normed = enn.SequentialModule(SteerableConv(plane, plane, 3), enn.InnerBatchNorm(plane))
    with pytest.raises(ValueError, match="found InnerBatchNorm"):
        LipschitzConditioner(normed, plane, plane, 0.9)


class Blend(Unknown):
    """A user's linear layer: a multiple of the identity and an offset that no rule of ours knows."""

    def __init__(self, kind):
        super().__init__(kind)
        self.weights = torch.nn.Parameter(torch.tensor(3.0))


class Triple(Unknown):
    """A user's function of constant 3."""


@expand.register(Blend)
def _(module):
    return Expanded(lambda x, weight: x @ weight.T, (module.weights * torch.eye(module.in_type.size),))


@weight_norm.register(Blend)
def _(module, weight, spatial_shape=None):
    return torch.linalg.matrix_norm(weight, 2)


@expand.register(Triple)
def _(module):
    return Expanded(lambda x: torch.sin(3 * x), ())


@lipschitz_bound.register(Triple)
def _(module, spatial_shape=None):
    return 3.0


class Half(Unknown):
    """A user's linear layer with a rule of ``weight_norm`` alone."""

    def __init__(self, kind):
        super().__init__(kind)
        self.weights = torch.nn.Parameter(torch.tensor(3.0))


@weight_norm.register(Half)
def _(module, weight, spatial_shape=None):
    return module.weights.abs()


def test_a_weight_norm_wants_a_rule_of_expand():
    kind = c4_regular()
    for raiser in (lipschitz_bound, lambda layer: EquivariantResidual(kind, enn.SequentialModule(layer))):
        with pytest.raises(TypeError, match=r"expected Half, .* found none; register it with .*expand\.register"):
            raiser(Half(kind))


def test_a_users_classes_work_in_a_transform():
    kind = c4_regular()
    net = enn.SequentialModule(SteerableLinear(kind, kind), Triple(kind), Blend(kind), Triple(kind), Blend(kind))
    transform = EquivariantResidual(kind, net, lipschitz=0.6)
    (fn, tensors), bound = transform.conditioner.normalized()
    worst = worst_norm(
        lambda x: fn(x, *(t.detach().double() for t in tensors)), torch.randn(200, 8, dtype=torch.float64), steps=60
    )
    assert 0.2 < worst <= bound <= 0.6
    x = torch.randn(5, 8)
    torch.testing.assert_close(transform._inverse(transform(x)), x, rtol=1e-4, atol=1e-4)
    transform.log_abs_det_jacobian(x, transform(x)).sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.dim() or p.numel())


# ---- context ----------------------------------------------------------------------------------------------


def test_the_contexts_part_is_free():
    kind, context = field_type("O2"), _scalars(field_type("O2").gspace)
    in_type, out_type = EquivariantResidual.conditioner_types(kind, context_type=context)
    conditioner = LipschitzConditioner(lipschitz_net(in_type, out_type, hidden_dims=(16,)), in_type, out_type, 0.8)
    first = conditioner.network[0]
    with torch.no_grad():
        first.weight.mul_(50)
    fn, tensors = conditioner.normalized().expanded
    size = kind.size
    # Left as it was, up to the scales that the next function hands over.
    torch.testing.assert_close(tensors[0][:, size:], first.filter()[:, size:])
    assert top(tensors[0][:, :size]) <= 1 < 5 < top(tensors[0][:, size:])
    tensors = [t.detach().double() for t in tensors]
    c = torch.linspace(-3, 3, 12, dtype=torch.float64)[:, None]
    x = torch.randn(200, size, dtype=torch.float64)
    bound = conditioner.normalized().bound
    for row in c:
        worst = worst_norm(lambda x: fn(torch.cat([x, row.expand(len(x), 1)], 1), *tensors), x, steps=5)  # noqa: B023
        assert worst <= bound <= 0.8
    whole = jacobian_norms(lambda z: fn(z, *tensors), torch.cat([x, c[:1].expand(200, 1)], 1)).max()
    assert whole > 1  # jointly with the context it is no contraction


class Shared(SteerableModule):
    """A user's layer whose weight has columns of its own making: one number times the identity, the sum of three."""

    def __init__(self, in_type, out_type):
        super().__init__(in_type, out_type)
        self.w = torch.nn.Parameter(torch.tensor([[0.1, 0.1, 5.0]]))

    def expanded(self):
        size = self.out_type.size
        return Expanded(lambda x, w: w.sum() * x[:, :size], (self.w,))


class Mixed(Shared):
    """The event is multiplied by the last column of a weight that has one a channel."""

    def __init__(self, in_type, out_type):
        super().__init__(in_type, out_type)
        self.w = torch.nn.Parameter(torch.ones(1, in_type.size))

    def expanded(self):
        size = self.out_type.size
        return Expanded(lambda x, w: w[:, -1:] * x[:, :size], (self.w,))


class Squashed(Shared):
    """Not linear in what it calls its weight."""

    def expanded(self):
        return Expanded(lambda x, w: torch.tanh(w.sum()) * x, (self.w,))


@weight_norm.register(Shared)
def _(module, weight, spatial_shape=None):
    return weight.sum().abs()


@weight_norm.register(Mixed)
def _(module, weight, spatial_shape=None):
    return weight.abs().sum()


def test_columns_without_a_context_are_not_taken_for_one():
    kind = _swap_type()
    net = enn.SequentialModule(Shared(kind, kind), enn.IdentityModule(kind))
    for c in (0.3, 0.9):
        (fn, tensors), bound = LipschitzConditioner(net, kind, kind, c).normalized()
        true = top(fn(torch.eye(kind.size), *tensors).detach())
        assert c - 1e-4 <= true <= bound <= c


def test_first_layers_that_hide_the_contexts_part_are_refused():
    kind = field_type("C4")
    types = EquivariantResidual.conditioner_types(kind, context_type=_scalars(kind.gspace))
    for layer, message in ((Shared, r"weight of \(1, 3\)"), (Mixed, "the last 1, the context's, act on it as well")):
        with pytest.raises(ValueError, match=f"conditioner: expected .*{layer.__name__}.* {message}.*SteerableLinear"):
            LipschitzConditioner(enn.SequentialModule(layer(*types)), *types, 0.9)
        # Behind another layer there is no context's part.
        inner = enn.SequentialModule(SteerableLinear(types[0], kind), Shared(kind, kind))
        assert LipschitzConditioner(inner, *types, 0.9).normalized().bound <= 0.9
    with pytest.raises(ValueError, match=r"expected Squashed.*twice the weight does not double"):
        LipschitzConditioner(enn.SequentialModule(Squashed(kind, kind)), kind, kind, 0.9)
    with pytest.raises(ValueError, match=r"in_type: expected the fields of out_type .*, then those of a context"):
        LipschitzConditioner(lipschitz_net(*types[::-1]), *types[::-1], 0.9)


def test_conditional_transforms_are_inverted_under_strong_contexts():
    kind = field_type("C4")
    transform = conditional_equivariant_residual(kind, _scalars(kind.gspace), hidden_dims=(16,), identity_init=False)
    assert isinstance(transform, ConditionalEquivariantResidual)
    for parameter in transform.parameters():
        parameter.data.mul_(20)
    x, c = torch.randn(6, kind.size), 10 * torch.randn(6, 1)
    given = transform.condition(c)
    torch.testing.assert_close(given._inverse(given(x)), x, rtol=1e-3, atol=1e-3)


# ---- zero layers and gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["O2", "C4-plane"])
def test_zero_layers_give_the_identity(name):
    kind, spatial = field_type(name), spatial_shape(name)
    transform = equivariant_residual(kind, hidden_dims=(8,))
    x = torch.randn(3, kind.size, *spatial)
    assert 0 <= transform.lipschitz_bound(spatial) < 1e-6
    y, ladj = transform.call_and_ladj(x)
    torch.testing.assert_close(y, x, rtol=0, atol=0)
    torch.testing.assert_close(ladj, torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(transform._inverse(y), x)
    (0.5 * (y - 1).square().sum() - ladj.sum()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in transform.parameters())
    assert transform.conditioner.network[-1].weight.grad.abs().max() > 0
    for parameter in transform.parameters():  # and every layer zero
        parameter.data.zero_()
    torch.testing.assert_close(transform(x), x, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.05, 5.0], ids=["below", "above"])
@pytest.mark.parametrize("name", ["SO2", "C4-plane"])
def test_gradients_through_the_normalisation(name, scale):
    kind, spatial = field_type(name), spatial_shape(name)
    conditioner = LipschitzConditioner(lipschitz_net(kind, kind, hidden_dims=(4,)), kind, kind, 0.9).double()
    with torch.no_grad():
        for layer in layers_of(conditioner):
            layer.weight.mul_(scale / float(weight_norm(layer, layer.filter(), spatial)))
    names = [n for n, _ in conditioner.named_parameters()]
    x = torch.randn(2, kind.size, *spatial, dtype=torch.float64)

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = conditioner

        def forward(self):
            fn, tensors = self.inner.normalized(spatial).expanded
            return fn(x, *tensors)

    call = Call()

    def function(*values):
        return torch.func.functional_call(call, {"inner." + n: v for n, v in zip(names, values)}, ())

    values = tuple(p.detach().clone().requires_grad_() for p in conditioner.parameters())
    assert torch.autograd.gradcheck(function, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)
    weights = [i for i, n in enumerate(names) if n.endswith("weight")]
    along = torch.autograd.grad(function(*values).square().sum(), [values[i] for i in weights])
    radial = [float((g * values[i]).sum().detach()) for i, g in zip(weights, along)]
    # Above its cap a layer's length no longer counts.
    assert all(abs(r) < 1e-9 for r in radial) if scale > 1 else max(map(abs, radial)) > 1e-9


# ---- faults that the checks see ---------------------------------------------------------------------------


def _norm_from_below(module, weight, spatial_shape=None):
    x = torch.randn(weight.shape[1], dtype=weight.dtype)
    matrix = weight.detach()
    for _ in range(2):
        x = matrix.T @ (matrix @ x)
        x = x / x.norm()
    return (matrix @ x).norm()


def _mean_over_frequencies(module, weight, spatial_shape=None):
    return symbol_norms(weight, all_angles(spatial_shape)).mean()


@pytest.mark.parametrize(("name", "fault"), [("SO2", _norm_from_below), ("C4-plane", _mean_over_frequencies)])
def test_bounds_from_below_are_caught(name, fault, monkeypatch):
    kind, spatial = field_type(name), spatial_shape(name)
    net = lipschitz_net(kind, kind, hidden_dims=(8,), padding_mode="circular")
    conditioner = LipschitzConditioner(net, kind, kind, 0.9)
    x = torch.randn(30, kind.size, *spatial)
    check(conditioner, x, spatial, ascent=0)
    monkeypatch.setitem(globals(), "weight_norm", fault)
    with pytest.raises(AssertionError):
        check(conditioner, x, spatial, ascent=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_scaled_too_little_is_caught(dtype):
    kind = field_type("O2")
    net = SteerableLinear(kind, kind).to(dtype)
    conditioner = LipschitzConditioner(enn.SequentialModule(net), kind, kind, 0.9)
    net.weight.data.mul_(10)
    normalized = conditioner.normalized
    check(conditioner, torch.randn(20, kind.size), ascent=0, worst_wanted=0.85)
    spoilt = normalized().expanded._replace(tensors=tuple(1.03 * t for t in normalized().expanded.tensors))
    conditioner.normalized = lambda spatial: Normalized(spoilt, 0.9)
    with pytest.raises(AssertionError):
        check(conditioner, torch.randn(20, kind.size), ascent=0)
