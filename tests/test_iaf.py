# SPDX-License-Identifier: Apache-2.0
"""Inverse autoregressive flows: what each block sees, how often the network runs, and the laws under a context."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from escnn import group
from escnn import nn as enn
from torch.autograd.functional import jacobian

import pyro_equiflow as pe
from pyro_equiflow import testing
from pyro_equiflow.maps.blocks import block_layout
from pyro_equiflow.nn import Expanded, MaskedSteerableNet, SteerableConv, SteerableLinear, expand, steerable_net
from pyro_equiflow.nn.networks import hidden_layer
from pyro_equiflow.ops.events import act, grid_elements
from tests.cases import field_type, point, randomize, spatial_shape

NAMES = ["trivial", "C4", "D4", "O2", "SO3", "C4-plane", "D4-plane", "SO2-plane"]
HIDDEN = {"none": (), "narrow": (1,), "wide": (64,), "two": (24, 9), "three": (48, 3, 80)}
#: The greatest relative error of a float64 inverse: a scale of exp(1) a block, dozens of roundings of 1e-16.
INVERSE = 1e-10


def make(name, *, seed=3, split_by=None, order=None, context=None, **options):
    torch.manual_seed(seed)
    options = {"hidden_dims": (24,), "identity_init": False, "log_scale_bound": 1.0, **options}
    args = (field_type(name),) if context is None else (field_type(name), context)
    factory = pe.equivariant_iaf if context is None else pe.conditional_equivariant_iaf
    return randomize(factory(*args, split_by=split_by, order=order, **options)).double()


def some_events(name, *batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, field_type(name).size, *spatial_shape(name), dtype=torch.float64, generator=generator)


def blocks_of(name, split_by=None):
    return block_layout(field_type(name), split_by, "test")


def dense_by_blocks(transform, name, x, split_by=None):
    """The Jacobian between blocks in the transform's order: Frobenius norms ``(block of y, block of x)``."""
    layout = blocks_of(name, split_by)
    full = jacobian(lambda z: layout.coordinates(transform._call(layout.event(z))), layout.coordinates(x))
    size, spatial = x.shape[0], x[0].numel()
    full = full.reshape(size, spatial, size, spatial)
    channels = [layout.channels([i]) for i in transform.order]
    return torch.stack([torch.stack([full[a][:, :, b].norm() for b in channels]) for a in channels])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_the_jacobian_is_block_triangular(name, hidden):
    """Exactly zero above the diagonal, for networks wider and narrower than the event, in an order of one's own."""
    count = len(blocks_of(name).blocks)
    order = np.random.default_rng(5).permutation(count).tolist()
    transform = make(name, order=order, hidden_dims=HIDDEN[hidden])
    assert transform.order == tuple(order)
    x = some_events(name)
    norms = dense_by_blocks(transform, name, x)
    assert (norms.triu(1) == 0).all()
    assert (norms.diagonal() > 0).all()
    if hidden in ("wide", "none"):
        assert norms.tril(-1).any()
    testing.assert_log_det(transform, x[None])
    testing.assert_inverse(transform, x[None], tolerance=INVERSE)
    testing.assert_equivariant(transform, x[None])


@pytest.mark.parametrize("name", [*NAMES, "SO2", "O3", "octahedral-regular"])
def test_every_earlier_block_is_seen(name):
    """A wide network connects all that the order allows: by regular fields, which hold every irrep, or by lengths."""
    for depth in (1, 2, 3):
        transform = make(name, hidden_dims=depth * (128,))
        norms = dense_by_blocks(transform, name, some_events(name))
        connected = norms > 1e-12
        assert torch.equal(connected, torch.ones_like(norms).tril().bool())


@pytest.mark.parametrize("name", ["C4", "D3", "octahedral-regular", "C4-plane"])
def test_blocks_of_irreps(name):
    transform = make(name, split_by="irreps", order=None)
    x = some_events(name)
    norms = dense_by_blocks(transform, name, x, "irreps")
    assert len(norms) > len(field_type(name).representations)
    assert norms.triu(1).max() < 1e-14  # the change of basis there and back rounds
    testing.assert_equivariant(transform, x[None])
    testing.assert_inverse(transform, x[None], tolerance=INVERSE)


@pytest.mark.parametrize("name", ["C4", "O2", "C4-plane"])
def test_a_mask_with_equality_is_caught(name):
    """Planted: outputs see hidden fields of their own degree, as if ``<=`` stood for ``<``."""
    kind = field_type(name)
    in_degrees, out_degrees = pe.EquivariantIAF.conditioner_degrees(kind)
    types = pe.EquivariantIAF.conditioner_types(kind)
    torch.manual_seed(3)
    net = MaskedSteerableNet(*types, in_degrees, [degree + 1 for degree in out_degrees], hidden_dims=(24, 24))
    net.out_degrees = out_degrees
    transform = randomize(pe.EquivariantIAF(kind, net, log_scale_bound=1.0)).double()
    x = some_events(name)[None]
    with pytest.raises(AssertionError, match="log-det error"):
        testing.assert_log_det(transform, x)
    with pytest.raises(AssertionError, match="inverse error"):
        testing.assert_inverse(transform, x)


def test_order_matters():
    x = some_events("O2", 4)
    first, second = make("O2"), make("O2", order=[4, 3, 2, 1, 0])
    assert first.order == (0, 1, 2, 3, 4)
    y = second(x)
    assert not torch.allclose(first(x), y)
    # What comes first in the order moves by constants alone.
    other = x.clone()
    other[:, :-2] += 1.0
    torch.testing.assert_close(second(other)[:, -2:], y[:, -2:], rtol=0, atol=0)


# ---- passes of the network ---------------------------------------------------------------------------------------


def count_calls(transform, monkeypatch):
    calls = {"expanded": 0, "passes": 0}
    conditioner, expanded = transform.conditioner, transform.conditioner.expanded

    def counting():
        calls["expanded"] += 1
        fn, tensors = expanded()

        def count(x, *tensors):
            calls["passes"] += 1
            return fn(x, *tensors)

        return Expanded(count, tensors)

    monkeypatch.setattr(conditioner, "expanded", counting)
    return calls


@pytest.mark.parametrize("name", ["C4", "O2", "C4-plane"])
def test_passes(name, monkeypatch):
    transform = make(name)
    blocks = len(blocks_of(name).blocks)
    calls = count_calls(transform, monkeypatch)
    x = some_events(name, 5)
    y = transform(x)
    transform.log_abs_det_jacobian(x, y)
    assert calls == {"expanded": 1, "passes": 1}
    transform.inv(y)  # its own draw
    assert calls == {"expanded": 1, "passes": 1}
    transform.inverse_and_ladj(y.detach().clone())
    assert calls == {"expanded": 2, "passes": 1 + blocks}


def test_the_inverse_scores_data_in_one_pass(monkeypatch):
    transform = make("O2")
    x = some_events("O2", 5)
    base = dist.Normal(torch.zeros(8).double(), 1.0).to_event(1)
    flow = dist.TransformedDistribution(base, [pe.Inverse(transform)])
    calls = count_calls(transform, monkeypatch)
    assert flow.log_prob(x).shape == (5,)
    assert calls == {"expanded": 1, "passes": 1}


@pytest.mark.parametrize("name", ["C4", "O2", "C4-plane"])
def test_gradients_through_the_inverse(name):
    transform = make(name, hidden_dims=(8,))
    y = some_events(name, 2).requires_grad_()
    assert torch.autograd.gradcheck(transform._inverse_and_ladj, (y,))
    torch.testing.assert_close(torch.func.vmap(transform._inverse)(y), transform._inverse(y), rtol=1e-12, atol=1e-12)
    # The parameters' gradients are minus those of the way there, by implicit differentiation of T(x) = y.
    x = transform._inverse(y.detach())
    cotangent = some_events(name, 2, seed=8)
    parameters = list(transform.parameters())
    found = torch.autograd.grad((transform._inverse(y.detach()) * cotangent).sum(), parameters)
    _, pull = torch.func.vjp(transform._inverse, y.detach())
    (adjoint,) = pull(cotangent)
    expected = torch.autograd.grad(-(transform._call(x.detach()) * adjoint.detach()).sum(), parameters)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# ---- contexts ----------------------------------------------------------------------------------------------------


def contexts(name):
    kind = field_type(name)
    moving = [r for r in kind.representations if not r.is_trivial()][:1]
    return {
        "invariant": enn.FieldType(kind.gspace, 2 * [kind.gspace.trivial_repr]),
        "transforming": enn.FieldType(kind.gspace, [kind.gspace.trivial_repr, *moving]),
    }


@pytest.mark.parametrize("which", ["invariant", "transforming"])
@pytest.mark.parametrize("name", ["C4", "O2", "SO3", "C4-plane"])
def test_the_law_under_a_context(name, which):
    kind, context_type = field_type(name), contexts(name)[which]
    transform = make(name, context=context_type)
    x = some_events(name, 3)
    context = torch.randn(3, context_type.size, *spatial_shape(name), dtype=torch.float64)
    y, ladj = transform.condition(context).call_and_ladj(x)
    for g in grid_elements(kind):
        turned = transform.condition(act(context_type, g, context))
        y_turned, ladj_turned = turned.call_and_ladj(act(kind, g, x))
        torch.testing.assert_close(y_turned, act(kind, g, y), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ladj_turned, ladj, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(turned.inv(y_turned.clone()), act(kind, g, x), rtol=INVERSE, atol=INVERSE)
    testing.assert_log_det(transform.condition(context[0]), x[:1])
    # Two contexts do not mix, and a batch of contexts on one event is a batch of events.
    one, other = transform.condition(context[0]), transform.condition(context[1])
    y_one, y_other = one(x[0]), other(x[0])
    assert not torch.allclose(y_one, y_other)
    torch.testing.assert_close(transform.condition(context)(x[0])[:2], torch.stack([y_one, y_other]))
    torch.testing.assert_close(one.inv(y_one.clone()), x[0])


@pytest.mark.parametrize("name", ["C4", "SO3", "C4-plane"])
def test_every_block_sees_the_context(name):
    context_type = contexts(name)["transforming"]
    transform = make(name, context=context_type, hidden_dims=(64, 64))
    x, layout = some_events(name), blocks_of(name)
    context = torch.randn(context_type.size, *spatial_shape(name), dtype=torch.float64)
    full = jacobian(lambda c: layout.coordinates(transform.condition(c)._call(x)), context)
    assert all(full[layout.channels([i])].norm() > 1e-9 for i in range(len(layout.blocks)))
    first = transform.transform.order[0]
    assert full[layout.channels([first])].norm() > 1e-9


def test_batches_of_contexts_in_a_distribution():
    """Sampling and scoring of ``ConditionalTransformedDistribution``, invariant where base and context are."""
    kind, context_type = field_type("O2"), contexts("O2")["invariant"]
    transform = make("O2", context=context_type)
    base = dist.Normal(torch.zeros(8).double(), 1.0).to_event(1)
    family = dist.ConditionalTransformedDistribution(base, [transform])
    context = torch.randn(5, context_type.size, dtype=torch.float64)
    x = family.condition(context).rsample((4,))
    scores = family.condition(context).log_prob(x)
    assert x.shape == (4, 5, 8) and scores.shape == (4, 5)
    for i in range(5):
        torch.testing.assert_close(family.condition(context[i]).log_prob(x[:, i]), scores[:, i])
    testing.assert_invariant(family.condition(context[0]), x[:, 0], kind, tolerance=1e-9)


# ---- masked networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["C4", "O2", "C4-plane", "SO2-plane"])
def test_masked_layers(name):
    """A masked pair of fields has no weight; the others have the variance that He's rule gives what they see."""
    kind = field_type(name)
    fields = kind.representations
    mask = np.tril(np.ones((len(fields), len(fields)), dtype=bool))
    layer = SteerableLinear if kind.gspace.dimensionality == 0 else SteerableConv
    whole, masked = layer(kind, kind), layer(kind, kind, mask=mask)
    assert 0 < masked.weight.numel() < whole.weight.numel()
    with torch.no_grad():
        masked.weight.normal_()
    starts = np.cumsum([0, *(field.size for field in fields)])
    kernel = masked.filter()
    for i in range(len(fields)):
        for j in range(len(fields)):
            block = kernel[starts[i] : starts[i + 1], starts[j] : starts[j + 1]]
            linked = whole.filter()[starts[i] : starts[i + 1], starts[j] : starts[j + 1]].any()
            assert bool(block.any()) == bool(mask[i, j] and linked)
    testing.assert_equivariant(expand(masked), torch.randn(2, kind.size, *spatial_shape(name)), kind)
    # All seen: the weights and the filter of a layer without a mask.
    same = layer(kind, kind, mask=np.ones_like(mask))
    same.load_state_dict(whole.state_dict())
    assert torch.equal(same.filter(), whole.filter())


def test_variance_counts_what_is_seen():
    c4 = group.cyclic_group(4)
    kind = point(c4, *64 * [c4.regular_representation])
    mask = np.zeros((64, 64), dtype=bool)
    mask[:, 0] = mask[32:] = True  # half of the outputs see one field, half all
    torch.manual_seed(0)
    layer = SteerableLinear(kind, kind, mask=mask)
    out = expand(layer)(torch.randn(2000, kind.size)).detach().view(2000, 64, 4)
    # Independent rows of variance 1: 32 fields of 4 (alike) weights each, so the mean square is good to 0.2.
    torch.testing.assert_close(out[:, :32].square().mean(), torch.tensor(1.0), rtol=0, atol=0.5)
    torch.testing.assert_close(out[:, 32:].square().mean(), torch.tensor(1.0), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", ["trivial", "C4", "O2", "SO3", "C4-plane", "SO2-plane"])
def test_hidden_degrees(name):
    """All useful degrees where there is room; else spread, the same in all layers, so that nothing is a dead end."""
    count = len(blocks_of(name).blocks)
    wide = make(name, hidden_dims=(200, 300)).conditioner.network.hidden_degrees
    assert all(set(degrees) == set(range(1, count)) for degrees in wide)
    for hidden_dims in [(1,), (1, 200), (200, 1), (200, 1, 200)]:
        degrees = make(name, hidden_dims=hidden_dims).conditioner.network.hidden_degrees
        assert len({frozenset(d) for d in degrees}) == 1
        assert all(1 <= d < count for layer in degrees for d in layer)
    with_context = make(name, hidden_dims=(300,), context=contexts(name)["invariant"])
    assert set(with_context.transform.conditioner.network.hidden_degrees[0]) == set(range(count))


@pytest.mark.parametrize("hidden_dims", [(24,), (48, 8), (8, 48), (48, 4, 80)])
@pytest.mark.parametrize("name", ["C4", "C4-plane"])
def test_no_weight_is_idle(name, hidden_dims):
    """However narrow a layer: what no output could use, or what sees nothing, has no weights to begin with."""
    transform = make(name, hidden_dims=hidden_dims)
    y, ladj = transform.call_and_ladj(some_events(name, 20))
    (y.square().sum() + ladj.sum()).backward()
    for parameter in transform.parameters():
        assert (parameter.grad != 0).all()


def test_few_hidden_fields_spread_evenly():
    kind = point(group.trivial_group(), *9 * [group.trivial_group().trivial_representation])
    for width, expected in {1: [5], 2: [3, 7], 4: [2, 4, 6, 8], 8: list(range(1, 9))}.items():
        net = MaskedSteerableNet(kind, kind, range(1, 10), range(1, 10), hidden_dims=(width,))
        assert net.hidden_degrees == [expected]


def test_a_gate_its_length_and_its_field_share_a_degree():
    net = make("SO2-plane", hidden_dims=(60,)).conditioner.network
    (degrees,), gates = net.hidden_degrees, hidden_layer(net.in_type, net.out_type, 60)
    moving = sum(count for count, _ in gates.runs)
    assert len(degrees) == gates.scalars + 2 * moving == len(gates.in_type.representations)
    assert degrees[gates.scalars : gates.scalars + moving] == degrees[gates.scalars + moving :]


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 1, 2, 3, 3], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], []])
def test_an_order_that_is_no_permutation(order):
    with pytest.raises(ValueError, match="order: expected a permutation of 0 to 4, found"):
        pe.equivariant_iaf(field_type("O2"), order=order)


def test_a_type_of_one_block():
    so3 = group.so3_group()
    with pytest.raises(ValueError, match="EquivariantIAF: expected a type of at least two irreps.*Add fields"):
        pe.equivariant_iaf(point(so3, so3.irrep(1)))


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bound_that_is_none(bound):
    with pytest.raises(ValueError, match="log_scale_bound: expected a positive finite number"):
        pe.equivariant_iaf(field_type("O2"), log_scale_bound=bound)


def test_networks_that_are_not_masked_as_they_have_to_be():
    kind = field_type("O2")
    types, degrees = pe.EquivariantIAF.conditioner_types(kind), pe.EquivariantIAF.conditioner_degrees(kind)
    with pytest.raises(TypeError, match="conditioner: expected a pyro_equiflow.nn.MaskedSteerableNet, found Invariant"):
        pe.EquivariantIAF(kind, steerable_net(*types))
    net = MaskedSteerableNet(*types, *degrees)
    assert pe.EquivariantIAF(kind, net).order == (0, 1, 2, 3, 4)
    with pytest.raises(
        ValueError, match=r"conditioner: expected in_degrees \[5, 4, 3, 2, 1\], found \[1, 2, 3, 4, 5\]"
    ):
        pe.EquivariantIAF(kind, net, order=[4, 3, 2, 1, 0])
    with pytest.raises(ValueError, match="conditioner: expected in_type"):
        pe.EquivariantIAF(kind, MaskedSteerableNet(types[1], types[1], 2 * degrees[0], 2 * degrees[0]))
    with pytest.raises(ValueError, match="in_degrees: expected an integer for each of the 5 fields, found"):
        MaskedSteerableNet(*types, degrees[0][:-1], degrees[1])
    with pytest.raises(ValueError, match=r"mask: expected booleans of shape \(fields out, fields in\) = \(5, 5\)"):
        SteerableLinear(kind, kind, mask=np.ones((5, 5)))


def test_a_context_that_is_missing():
    context_type = contexts("O2")["invariant"]
    transform = pe.conditional_equivariant_iaf(field_type("O2"), context_type).transform
    for direction in (transform, transform.inv):
        with pytest.raises(ValueError, match="expected a context of type .* found none"):
            direction(torch.randn(2, 8))
