# SPDX-License-Identifier: Apache-2.0
"""The maps of blocks: splines against Pyro's, radial maps at the origin and the bound, rotations in the commutant."""

import math
import pickle

import numpy as np
import pytest
import torch
from escnn import group
from escnn import nn as enn
from pyro.distributions.transforms.spline import _monotonic_rational_spline
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian

import pyro_equiflow as pe
from pyro_equiflow import testing
from pyro_equiflow.maps import Affine, Block, BlockMap, Commutant, Head, Spline
from pyro_equiflow.maps.blocks import block_layout
from pyro_equiflow.ops.events import act, grid_elements
from pyro_equiflow.ops.representations import probe_elements
from pyro_equiflow.ops.splines import MIN_BIN, UnitSpline, num_spline_parameters
from tests.cases import field_type, point, randomize, spatial_shape

BINS = 5
FACTORIES = {"coupling": pe.equivariant_coupling, "iaf": pe.equivariant_iaf}
CONDITIONAL = {"coupling": pe.conditional_equivariant_coupling, "iaf": pe.conditional_equivariant_iaf}


def raw_knots(*shape, std=1.5, bins=BINS):
    return std * torch.randn(*shape, num_spline_parameters(bins), dtype=torch.float64)


def normalized(raw, bins=BINS):
    """Widths, heights and inner slopes, written down once more."""
    widths, heights, slopes = raw.split([bins, bins, bins - 1], -1)
    shares = [part.exp() / part.exp().sum(-1, keepdim=True) for part in (widths, heights)]
    lengths = [MIN_BIN + (1 - bins * MIN_BIN) * share for share in shares]
    return *lengths, MIN_BIN + (1 - MIN_BIN) * (1 + (math.e - 1) * slopes.exp()).log()


def pyros(x, widths, heights, slopes, inverse=False):
    """Pyro's spline of [-1, 1] with its least lengths and slopes, which do not add up, turned off."""
    least = {"min_bin_width": 0.0, "min_bin_height": 0.0, "min_derivative": 0.0, "eps": 0.0}
    return _monotonic_rational_spline(x, widths, heights, slopes, inverse=inverse, bound=1.0, **least)


# ---- splines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
def test_splines_are_pyros(inverse):
    raw, x = raw_knots(400), 1.2 * torch.rand(400, dtype=torch.float64) - 0.1
    spline = UnitSpline(raw, BINS, -1)
    change, log_slope = spline.inverse(x) if inverse else spline.forward(x)
    y = x + change
    expected, expected_log_slope = pyros(2 * x - 1, *normalized(raw), inverse=inverse)
    # Two roundings in different orders, by slopes of at most 1e2.
    torch.testing.assert_close(y, (expected + 1) / 2, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(log_slope, expected_log_slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inverse", [False, True])
def test_radial_splines_are_pyros_odd_ones(inverse):
    """The odd continuation has twice the bins and, at 0, the slope that solves d^2 + d (e - delta) = delta^2."""
    raw, r = raw_knots(400), 1.1 * torch.rand(400, dtype=torch.float64) ** 2
    widths, heights, slopes = normalized(raw)
    delta, e = heights[:, :1] / widths[:, :1], slopes[:, :1]
    middle = (delta - e + ((delta - e) ** 2 + 4 * delta**2).sqrt()) / 2
    odd = [torch.cat([part.flip(-1), part], -1) / 2 for part in (widths, heights)]
    spline = UnitSpline(raw, BINS, -1)
    factor, log_slope = spline.radial_inverse(r * r) if inverse else spline.radial(r * r)
    expected, expected_log_slope = pyros(r, *odd, torch.cat([slopes.flip(-1), middle, slopes], -1), inverse=inverse)
    torch.testing.assert_close(factor * r, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(log_slope, expected_log_slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("std", [0.0, 1.0, 3.0])
def test_splines_invert(std):
    raw = raw_knots(3000, std=std)
    spline, x = UnitSpline(raw, BINS, -1), torch.rand(3000, dtype=torch.float64)
    change, log_slope = spline.forward(x)
    change_back, log_slope_back = spline.inverse(x + change)
    back = x + change + change_back
    factor, radial_log_slope = spline.radial(x * x)
    back_factor, radial_log_slope_back = spline.radial_inverse((factor * x) ** 2)
    assert ((back - x).abs().max(), (back_factor * factor * x - x).abs().max()) < (1e-10, 1e-10)
    torch.testing.assert_close(log_slope_back, -log_slope, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(radial_log_slope_back, -radial_log_slope, rtol=1e-9, atol=1e-9)
    if std == 0:
        assert torch.equal(change, torch.zeros_like(x)) and torch.equal(change_back, change)
        torch.testing.assert_close(factor, torch.ones_like(x), rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", ["forward", "inverse", "radial", "radial_inverse"])
def test_gradients_of_splines(method):
    """First and second derivatives, by the place and by the knots."""
    raw, x = raw_knots(4), torch.tensor([0.03, 0.4, 0.95, 1.05], dtype=torch.float64)
    raw.requires_grad_(), x.requires_grad_()

    def function(raw, x):
        return getattr(UnitSpline(raw, BINS, -1), method)(x)

    assert gradcheck(function, (raw, x))
    assert gradgradcheck(function, (raw, x), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_splines_with_extreme_knots(dtype):
    raw = (100 * raw_knots(500)).to(dtype).requires_grad_()
    x = torch.linspace(0, 1, 500).to(dtype).requires_grad_()
    for method in ("forward", "inverse", "radial", "radial_inverse"):
        y, log_slope = getattr(UnitSpline(raw, BINS, -1), method)(x)
        for tensor in (y, log_slope, *torch.autograd.grad(y.sum() + log_slope.sum(), (raw, x))):
            assert tensor.isfinite().all()


@pytest.mark.parametrize("std", [0.0, 1e-5, 1e-3, 0.3])
def test_splines_of_small_data(std):
    """Channels of size 1e-6 among knots over [-5, 5], in float32 against float64: what a spline near the identity adds
    is right relative to itself, so the way back finds them but for the rounding of the image."""
    torch.manual_seed(1)
    c4 = group.cyclic_group(4)
    block = Spline(bound=5.0, num_bins=8).bind([Block((c4.regular_representation,)), Block((c4.irrep(1),))], 0)
    single, double = ((std * torch.randn(100, block.num_parameters)).to(t) for t in (torch.float32, torch.float64))
    double = single.double()
    double[:, -11:] = single[:, -11:] = 0  # no affine part
    x = 1e-6 * torch.randn(100, 6)
    y, _ = block.forward(x, block.parameters(single))
    expected, _ = block.forward(x.double(), block.parameters(double))
    back, _ = block.inverse(y, block.parameters(single))
    if std == 0:
        assert torch.equal(y[:, :4], x[:, :4]) and torch.equal(back[:, :4], x[:, :4])
    # A few units in the last place of the image; going back, of steps that a slope of 1e-1 stretches.
    bound = 4e-6 * expected.norm(dim=1)
    assert ((y.double() - expected).norm(dim=1) < bound).all()
    assert ((back - x).norm(dim=1) < 10 * bound.clamp(min=4e-12)).all()


# ---- radial maps -------------------------------------------------------------------------------------------------

SO3 = group.so3_group()
RADIAL = {"sign": group.cyclic_group(2).irrep(1), "plane": group.o2_group().irrep(1, 1), "space": SO3.irrep(1)}


def radial_map(name, seed=0, std=1.0):
    """A map of one irrep with random knots and no affine part."""
    torch.manual_seed(seed)
    field = RADIAL[name]
    block = Spline(bound=2.0, num_bins=BINS).bind([Block((field,))], 0)
    values = torch.cat([raw_knots(std=std), torch.zeros(block.num_parameters - 3 * BINS + 1, dtype=torch.float64)])
    parameters = block.parameters(values)
    direction = torch.nn.functional.normalize(torch.randn(field.size, dtype=torch.float64), dim=0)
    return lambda x: block.forward(x, parameters), lambda y: block.inverse(y, parameters), direction


@pytest.mark.parametrize("r", [0.0, 1e-12, 1e-6, 1e-3, 0.1, 1.0, 2 - 1e-9, 2 + 1e-9, 3.0])
@pytest.mark.parametrize("name", RADIAL)
def test_radial_log_det(name, r):
    for seed in range(4):
        forward, inverse, direction = radial_map(name, seed)
        for function, x in ((forward, r * direction), (inverse, r * direction)):
            y, ladj = function(x)
            expected = torch.linalg.slogdet(jacobian(lambda x, f=function: f(x)[0], x))[1]
            torch.testing.assert_close(ladj, expected, rtol=1e-10, atol=1e-10)
            assert (r <= 2) or torch.equal(y, x)
        y, ladj = forward(r * direction)
        x, back = inverse(y)
        torch.testing.assert_close(x, r * direction, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(back, -ladj, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", RADIAL)
def test_radial_maps_have_two_derivatives_at_the_origin(name, which):
    """Autograd's are the limits of those nearby, where no formula is special."""
    for seed in range(4):
        function, zero = radial_map(name, seed, std=0.5)[which], torch.zeros(RADIAL[name].size, dtype=torch.float64)
        y, _ = function(zero)
        assert torch.equal(y, zero)
        step = 1e-5
        steps = step * torch.eye(len(zero), dtype=torch.float64)

        def slope(x, f=function):
            return jacobian(lambda x: f(x)[1], x)

        numeric = torch.stack([(slope(h) - slope(-h)) / (2 * step) for h in steps])
        found = hessian(lambda x, f=function: f(x)[1], zero)
        # The next term of the expansion is of the order of the step.
        torch.testing.assert_close(found, numeric, rtol=1e-2, atol=1e-2)
        assert found.diagonal().abs().min() > 0.1 or seed > 0
        assert torch.equal(slope(zero), zero)
        twice = jacobian(lambda x, f=function: jacobian(lambda z: f(z)[0], x, create_graph=True), zero)
        assert torch.equal(twice, torch.zeros_like(twice))


def test_splines_are_the_identity_beyond_their_bound():
    c4 = group.cyclic_group(4)
    block = Spline(bound=2.0, num_bins=BINS).bind([Block((c4.regular_representation,)), Block((c4.irrep(1),))], 0)
    torch.manual_seed(0)
    knots = 15 * BINS - 5
    values = torch.cat([torch.randn(knots).double(), torch.zeros(block.num_parameters - knots).double()])
    x = torch.tensor([2.5, -2.01, 3.0, -4.0, 1.5, -1.5], dtype=torch.float64)
    y, ladj = block.forward(x, block.parameters(values))
    torch.testing.assert_close(y, x, rtol=0, atol=1e-15)
    assert ladj == 0
    y, _ = block.forward(x / 3, block.parameters(values))
    assert (y - x / 3).abs().min() > 1e-3


# ---- rotations of the commutant ----------------------------------------------------------------------------------

COMPLEX = {
    "SO2": lambda: point(group.so2_group(), group.so2_group().irrep(1), group.so2_group().irrep(3)),
    "C5": lambda: point(group.cyclic_group(5), group.cyclic_group(5).regular_representation),
    "C4": lambda: point(group.cyclic_group(4), *2 * [group.cyclic_group(4).regular_representation]),
    "cylinder": lambda: point(group.cylinder_group(), *[i for i in group.cylinder_group().irreps() if i.type == "C"]),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_the_generator_is_skew_and_commutes(name):
    """In the block's own basis, so in the event's as well; its square is minus one on irreps of complex type."""
    kind = COMPLEX[name]()
    layout = block_layout(kind, "irreps", "test")
    j = Commutant().bind(layout.blocks, 0)._constants.like(torch.zeros(1).double())["generator"].numpy()
    irreps = [block.fields[0] for block in layout.blocks]
    expected = np.concatenate([irrep.size * [float(irrep.type == "C")] for irrep in irreps])
    assert expected.any()
    np.testing.assert_allclose(j, -j.T, atol=1e-14)
    np.testing.assert_allclose(j @ j, -np.diag(expected), atol=1e-14)
    basis = np.eye(kind.size) if layout.basis is None else layout.basis
    for g in [*probe_elements(kind.fibergroup), kind.fibergroup.sample()]:
        matrix = basis.T @ kind.representation(g) @ basis
        np.testing.assert_allclose(j @ matrix, matrix @ j, atol=1e-12)


def test_no_group_of_escnn_has_quaternionic_irreps():
    groups = [group.cyclic_group(6), group.dihedral_group(6), group.so2_group(), group.o2_group(), group.so3_group(),
              group.o3_group(), group.octa_group(), group.cylinder_group(), group.full_cylinder_group(3)]  # fmt: skip
    types = {irrep.type for g in groups for irrep in g.irreps()}
    assert types == {"R", "C"}


@pytest.mark.parametrize("splines", [False, True])
def test_a_rotation_in_closed_form(splines):
    """Complex, real, trivial and permutation fields side by side: only the first turn."""
    c4 = group.cyclic_group(4)
    fields = [c4.irrep(2), c4.irrep(1), c4.regular_representation, c4.irrep(0), c4.irrep(1)]
    blocks = [Block((field,)) for field in fields]
    block = Spline(bound=4.0, num_bins=BINS).bind(blocks, 0) if splines else Commutant().bind(blocks, 0)
    affine = Affine().bind(blocks, 0)
    linear = torch.randn(block.num_parameters, dtype=torch.float64)
    scales, angles, shifts = linear[-20:].split([8, 2, 10])
    if splines:
        linear[:-20] = 0
    x = torch.randn(10, dtype=torch.float64)
    y, ladj = block.forward(x, block.parameters(linear))
    turned = x.clone()
    for start, angle in ((1, angles[0]), (8, angles[1])):
        cos, sin = angle.cos(), angle.sin()
        rotation = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
        turned[start : start + 2] = rotation @ x[start : start + 2]
    expected = affine.forward(turned, (scales, shifts))
    torch.testing.assert_close(y, expected[0], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(ladj, expected[1], rtol=1e-14, atol=1e-14)
    back, minus = block.inverse(y, block.parameters(linear))
    torch.testing.assert_close(back, x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(minus, -ladj, rtol=1e-13, atol=1e-13)


# ---- a map of one's own ------------------------------------------------------------------------------------------


class Tanh(BlockMap):
    """Scales between exp(-b) and exp(b), by the hyperbolic tangent of what the conditioner gives; no shift."""

    def __init__(self, bound=1.0):
        self.bound = bound

    def heads(self, blocks):
        return [Head([block.scales for block in blocks])]

    def forward(self, x, parameters):
        log_scale = self.bound * parameters[0].tanh()
        return self.scalars.times(x, log_scale.exp()), self.scalars.total(log_scale)

    def inverse(self, y, parameters):
        log_scale = self.bound * parameters[0].tanh()
        return self.scalars.times(y, (-log_scale).exp()), -self.scalars.total(log_scale)


@pytest.mark.parametrize("name", ["C4", "O2", "C4-plane"])
@pytest.mark.parametrize("kind", FACTORIES)
def test_a_map_of_ones_own(kind, name):
    """In couplings and IAF, flat and on a grid: invertible, equivariant, the log-det right, and a part of copies."""
    transform = randomize(FACTORIES[kind](field_type(name), transformer=Tanh(0.5), hidden_dims=(8,))).double()
    x = torch.randn(3, field_type(name).size, *spatial_shape(name), dtype=torch.float64)
    assert not torch.allclose(transform(x), x, atol=1e-2)
    testing.assert_equivariant(transform, x)
    testing.assert_inverse(transform, x)
    testing.assert_log_det(transform, x[:1])
    twin = pickle.loads(pickle.dumps(transform))
    assert torch.equal(twin(x.clone()), transform(x)) and repr(twin.transformer) == "Tanh(bound=0.5)"
    wider = FACTORIES[kind](field_type(name), transformer=Tanh(), hidden_dims=(8,))
    with pytest.raises(ValueError, match=r"transformer\.bound: expected 1\.0, found 0\.5"):
        wider.load_state_dict(transform.state_dict())


def test_a_map_that_says_too_little():
    class Short(Tanh):
        def heads(self, blocks):
            return [Head([blocks[0].scales])]

    class Bare(Tanh):
        def heads(self, blocks):
            return [block.scales for block in blocks]

    kind = field_type("C4")
    with pytest.raises(ValueError, match=r"heads: expected fields for each of 4 blocks.*found 1 in head 0 of Short"):
        pe.equivariant_coupling(kind, transformer=Short(), split=[0, 1])
    with pytest.raises(TypeError, match="heads: expected a sequence of Head"):
        pe.equivariant_coupling(kind, transformer=Bare())


def test_names_stand_for_maps_with_their_defaults():
    kind = field_type("C4")
    for name, one in {"affine": Affine, "commutant": Commutant, "spline": Spline}.items():
        by_name, by_object = (pe.equivariant_coupling(kind, transformer=t).transformer for t in (name, one()))
        assert repr(by_name) == repr(by_object)
        narrower = pe.equivariant_coupling(kind, transformer=name, log_scale_bound=1.0).transformer
        assert repr(narrower) == repr(one(log_scale_bound=1.0))
    with pytest.raises(
        ValueError, match=r"log_scale_bound: expected None beside the map Spline\(bound=5.0, .*found 1.0"
    ):
        pe.equivariant_iaf(kind, transformer=Spline(), log_scale_bound=1.0)
    with pytest.raises(ValueError, match='one of "affine", "commutant", "spline" or a map of pyro_equiflow.maps'):
        pe.equivariant_coupling(kind, transformer="cubic")


# ---- transforms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["C4", "SO2", "SO3", "C4-plane"])
@pytest.mark.parametrize("transformer", ["affine", "commutant", "spline"])
@pytest.mark.parametrize("kind", FACTORIES)
def test_it_starts_as_the_identity(kind, transformer, name):
    transform = FACTORIES[kind](field_type(name), transformer=transformer, hidden_dims=(8,)).double()
    assert type(transform.transformer).__name__.lower() == transformer
    x = 2 * torch.randn(5, field_type(name).size, *spatial_shape(name), dtype=torch.float64)
    y, ladj = transform.call_and_ladj(x)
    torch.testing.assert_close(y, x, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(ladj, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_parameters_are_counted():
    """23 knots a channel of a permutation field or irrep, an angle for the one irrep of complex type."""
    kind = field_type("C4")
    wide, narrow = (pe.EquivariantCoupling.conditioner_types(kind, transformer=t)[1] for t in ("spline", "affine"))
    assert wide.size - narrow.size == 23 * 5 + 1
    flow = pe.equivariant_flow(kind, num_transforms=1, transformer=Spline(num_bins=3), hidden_dims=(8,))
    (coupling,) = [m for m in flow.modules() if isinstance(m, pe.EquivariantCoupling)]
    assert repr(coupling.transformer) == "Spline(bound=5.0, num_bins=3, log_scale_bound=3.0)"


@pytest.mark.parametrize("name", ["C4", "SO2", "C4-plane"])
@pytest.mark.parametrize("transformer", ["commutant", "spline"])
@pytest.mark.parametrize("which", CONDITIONAL)
def test_the_law_under_a_context(which, transformer, name):
    kind = field_type(name)
    moving = [r for r in kind.representations if not r.is_trivial()][:1]
    context_type = enn.FieldType(kind.gspace, [kind.gspace.trivial_repr, *moving])
    torch.manual_seed(3)
    options = {"transformer": transformer, "hidden_dims": (12,), "identity_init": False, "log_scale_bound": 1.0}
    family = randomize(CONDITIONAL[which](kind, context_type, **options)).double()
    x = torch.randn(3, kind.size, *spatial_shape(name), dtype=torch.float64)
    context = torch.randn(3, context_type.size, *spatial_shape(name), dtype=torch.float64)
    y, ladj = family.condition(context).call_and_ladj(x)
    for g in grid_elements(kind):
        y_turned, ladj_turned = family.condition(act(context_type, g, context)).call_and_ladj(act(kind, g, x))
        torch.testing.assert_close(y_turned, act(kind, g, y), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ladj_turned, ladj, rtol=1e-9, atol=1e-9)
    if not spatial_shape(name):
        testing.assert_log_det(family.condition(context[0]), x[:1])
    testing.assert_inverse(family.condition(context), x, tolerance=1e-10)
    # A batch of contexts on one event.
    spread = family.condition(context).call_and_ladj(x[0])
    one = family.condition(context[1]).call_and_ladj(x[0])
    torch.testing.assert_close(spread[0][1], one[0])
    torch.testing.assert_close(spread[1][1], one[1])


class _Shuffled(pe.EquivariantCoupling):
    """Planted fault: knots go to other channels of their field than those they belong to."""

    def _map_parameters(self, x_a):
        pointwise, *others = super()._map_parameters(x_a)
        return [pointwise.flip(-1), *others]


def test_a_knot_that_does_not_follow_its_channel_is_caught():
    c4 = group.cyclic_group(4)
    kind = point(c4, *2 * [c4.regular_representation])
    transform = randomize(pe.equivariant_coupling(kind, transformer=Spline(num_bins=4), identity_init=False)).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    testing.assert_equivariant(transform, x)
    transform.__class__ = _Shuffled
    testing.assert_inverse(transform, x, tolerance=1e-10)
    testing.assert_log_det(transform, x[:1])
    with pytest.raises(AssertionError, match="equivariance error"):
        testing.assert_equivariant(transform, x)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, message", [
    ({"num_bins": 1}, "num_bins: expected an integer from 2 to 50, found 1"),
    ({"num_bins": 51}, "num_bins: expected an integer from 2 to 50, found 51"),
    ({"bound": 0.0}, "bound: expected a positive finite number, found 0.0"),
    ({"bound": float("inf")}, "bound: expected a positive finite number, found inf"),
    ({"log_scale_bound": -1.0}, "log_scale_bound: expected a positive finite number, found -1.0"),
])  # fmt: skip
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Spline(**arguments)


def test_a_conditioner_of_another_transformer():
    kind = field_type("SO2")
    net = pe.equivariant_coupling(kind).conditioner.network
    with pytest.raises(ValueError, match="conditioner: expected out_type"):
        pe.EquivariantCoupling(kind, net, transformer="commutant")
    net = pe.equivariant_iaf(kind, transformer=Spline(num_bins=3)).conditioner.network
    assert pe.EquivariantIAF(kind, net, transformer=Spline(num_bins=3)).order == (0, 1, 2, 3, 4)
    degrees = pe.EquivariantIAF.conditioner_degrees(kind, transformer=Spline(num_bins=3))
    assert degrees == (net.in_degrees, net.out_degrees)
    assert len(degrees[1]) == len(net.out_type.representations) == 8 * 5 + 5 + 4 + 5
