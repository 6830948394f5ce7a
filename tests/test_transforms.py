# SPDX-License-Identifier: Apache-2.0
"""Each transform by itself: closed forms, splits, contexts, and the contract with Pyro."""

import copy
import math
from collections import Counter
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.linalg
import torch
from escnn import group
from escnn import nn as enn
from pyro.distributions import ConditionalTransformedDistribution, TransformedDistribution
from pyro.distributions.transforms import iterated
from pyro.nn import PyroModule

import pyro_equiflow as pe
from pyro_equiflow import testing
from pyro_equiflow.maps.blocks import Block, BlockLayout, block_layout
from pyro_equiflow.nn import SteerableLinear, expand
from pyro_equiflow.ops.events import act, event_dim, grid_elements
from pyro_equiflow.transforms.linear import _cosine_and_sine
from tests.cases import (
    BATCH_SHAPES,
    CASES,
    KINDS,
    ON_EVEN_GRIDS,
    ONE_OF_EACH,
    events,
    field_type,
    make,
    point,
    randomize,
)

every_kind = pytest.mark.parametrize("case", ONE_OF_EACH)
SMALL = {"hidden_dims": (12,), "identity_init": False, "log_scale_bound": 1.0}


def normal(case):
    shape = events(case).shape
    return dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))


# ---- coupling ---------------------------------------------------------------------------------------------


def test_coupling_keeps_one_half():
    kind = field_type("O2")  # vector, scalar | vector of frequency 2, sign, vector
    x = torch.randn(5, kind.size)
    changed = (make("coupling", "O2")(x) - x).abs().amax(0) > 1e-6
    assert changed.tolist() == 3 * [False] + 5 * [True]
    both = pe.equivariant_coupling(kind, split=[1, 4], **SMALL)
    changed = (randomize(both)(x) - x).abs().amax(0) > 1e-6
    assert changed.tolist() == [True, True, False, True, True, True, False, False]


def test_scales_on_irreps_are_one_an_irrep():
    """The Jacobian of the moved half is a multiple of the identity on each irrep, bounded on both sides."""
    kind = field_type("O2")
    transform = make("coupling", "O2").double()
    for p in transform.parameters():
        p.data.mul_(20.0)  # far into the bound
    x = torch.randn(kind.size, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(transform._call, x)[3:, 3:]
    for start, size in ((0, 2), (2, 1), (3, 2)):
        block = jacobian[start : start + size, start : start + size]
        torch.testing.assert_close(block, block[0, 0] * torch.eye(size).double())
        assert -1.0 <= block[0, 0].log() <= 1.0
    off = jacobian - torch.block_diag(jacobian[:2, :2], jacobian[2:3, 2:3], jacobian[3:, 3:])
    assert not off.any()


@pytest.mark.parametrize(
    "field",
    [
        group.cyclic_group(4).regular_representation,
        group.cyclic_group(4).quotient_representation(2),
        group.dihedral_group(4).quotient_representation((0, 1)),
    ],
    ids=["C4-regular", "C4-quotient", "D4-quotient"],
)
def test_scales_on_permutation_fields_are_one_a_channel(field):
    """Such a field is kept whole, as it stands: in the basis of its irreps it would have fewer scales."""
    kind = point(field.group, field, field)
    layout = block_layout(kind, "fields", "here")
    assert layout.basis is None and [block.fields for block in layout.blocks] == [(field,), (field,)]
    transform = randomize(pe.equivariant_coupling(kind, split_by="fields", **SMALL)).double()
    x = torch.randn(kind.size, dtype=torch.float64)
    testing.assert_equivariant(transform, x, elements=field.group.elements)
    jacobian = torch.autograd.functional.jacobian(transform._call, x)
    scales = jacobian.diagonal()[field.size :]
    assert len(scales.unique()) == field.size
    assert not (jacobian[field.size :, field.size :] - scales.diag()).any()
    by_irreps = block_layout(kind, "irreps", "here")
    assert [block.fields for block in by_irreps.blocks] == 2 * [(field.group.irrep(*i),) for i in field.irreps]


def test_identity_init():
    for name in ("O2", "C4-plane"):
        transform = pe.equivariant_coupling(field_type(name), hidden_dims=(8,))
        x = events(f"coupling-{name}", (2,))
        y, ladj = transform.call_and_ladj(x)
        torch.testing.assert_close(y, x, rtol=0, atol=0)
        assert not ladj.any()


@pytest.mark.parametrize("name", ["C4", "D3", "octahedral-regular", "C4-plane"])
def test_split_by_irreps_cuts_inside_regular_fields(name):
    kind = field_type(name)
    count = len(kind.irreps)
    for split in ([0], [count - 1], list(range(0, count, 2))):
        transform = randomize(pe.equivariant_coupling(kind, split_by="irreps", split=split, **SMALL))
        x = events(f"coupling-{name}", (3,))
        testing.assert_equivariant(transform, x)
        testing.assert_inverse(transform, x)
        testing.assert_log_det(transform, x[:1])


def test_one_regular_field_splits_by_irreps():
    """One field is enough where it holds several irreps."""
    d4 = group.dihedral_group(4)
    transform = randomize(pe.equivariant_coupling(point(d4, d4.regular_representation), **SMALL)).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    testing.assert_equivariant(transform, x)
    testing.assert_log_det(transform, x)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 1, 4, 0, 2], [4, 3, 2, 1, 0]])
@pytest.mark.parametrize("name", ["C4", "SO2", "C4-plane"])
def test_fields_in_any_order(name, order):
    kind = field_type(name)
    kind = enn.FieldType(kind.gspace, [kind.representations[i % len(kind.representations)] for i in order])
    side = kind.gspace.dimensionality * (4,)
    x = torch.randn(2, kind.size, *side, dtype=torch.float64)
    for name_of_kind, build in KINDS.items():
        if name_of_kind in ON_EVEN_GRIDS and not side:
            continue
        transform = randomize(build(kind)).double()
        testing.assert_equivariant(transform, x)
        testing.assert_inverse(transform, x)


@pytest.mark.parametrize("slight", [False, True], ids=["far", "slight"])
def test_direct_sums_with_a_change_of_basis(slight):
    """A field that is neither a permutation nor in the basis of its irreps, however close to it."""
    c4 = group.cyclic_group(4)
    skew = np.random.default_rng(0).normal(size=(4, 4))
    rotation = scipy.linalg.expm(0.1 * (skew - skew.T)) if slight else np.linalg.qr(skew)[0]
    mixed = group.Representation(c4, "turned slightly" if slight else "turned", [(1,), (0,), (2,)], rotation, [])
    kind = point(c4, mixed, c4.irrep(1), c4.regular_representation)
    x = torch.randn(4, kind.size, dtype=torch.float64)
    for split in ([0], [1], [1, 2]):
        transform = randomize(pe.equivariant_coupling(kind, split=split, **SMALL)).double()
        testing.assert_equivariant(transform, x)
        testing.assert_log_det(transform, x[:1])
        testing.assert_inverse(transform, x)


# ---- faults in couplings that have to be seen ---------------------------------------------------------------


class _ChannelScales(pe.EquivariantCoupling):
    """Planted fault: the first channel's value as a scale for all, instead of an invariant."""

    def _map_parameters(self, x_a):
        scale, shift = super()._map_parameters(x_a)
        return scale + 0.1 * x_a.narrow(-self.event_dim, 0, 1), shift


class _SpreadScales(pe.EquivariantCoupling):
    """Planted fault: an invariant of the whole image, spread over positions by a map that is not steerable."""

    def _map_parameters(self, x_a):
        scale, shift = super()._map_parameters(x_a)
        side = x_a.shape[-1]
        total = x_a.square().sum((-3, -2, -1), keepdim=True)
        return scale + 0.01 * total * torch.arange(side * side).view(side, side).to(x_a), shift


@pytest.mark.parametrize("name, fault", [("O2", _ChannelScales), ("C4-plane", _ChannelScales),
                                         ("C4-plane", _SpreadScales), ("octahedral", _ChannelScales)])  # fmt: skip
def test_a_scale_that_is_not_steerable_is_caught(name, fault):
    """Inverse and log-det stay right, so only equivariance can tell."""
    transform = make("coupling", name)
    x = events(f"coupling-{name}", (3,))
    testing.assert_equivariant(transform, x)
    transform.__class__ = fault
    testing.assert_inverse(transform, x)
    testing.assert_log_det(transform, x[:1])
    with pytest.raises(AssertionError, match="equivariance error"):
        testing.assert_equivariant(transform, x)


def test_a_conditioner_that_is_not_equivariant_is_caught():
    kind = field_type("O2")
    in_type, out_type = pe.EquivariantCoupling.conditioner_types(kind)

    class Broken(SteerableLinear):
        def filter(self):
            return super().filter() + 0.01

    transform = pe.EquivariantCoupling(kind, Broken(in_type, out_type))
    with pytest.raises(AssertionError, match="equivariance error"):
        testing.assert_equivariant(transform, torch.randn(3, kind.size))


def test_a_split_inside_an_irrep_is_caught(monkeypatch):
    """Planted: a layout that says a 2-vector is two scalars. The check of equivariance sees it."""
    so2 = group.so2_group()
    kind = point(so2, so2.irrep(1), so2.irrep(1))
    trivial = kind.gspace.trivial_repr

    def wrong_layout(field_type, *args, **kwargs):
        return BlockLayout(4 * [Block((trivial,))], None, 0)

    monkeypatch.setattr("pyro_equiflow.transforms.coupling.block_layout", wrong_layout)
    transform = randomize(pe.equivariant_coupling(kind, split=[0], **SMALL))
    x = torch.randn(3, 4)
    testing.assert_inverse(transform, x)
    testing.assert_log_det(transform, x)
    with pytest.raises(AssertionError, match="equivariance error"):
        testing.assert_equivariant(transform, x)


def test_layouts_are_invariant_subspaces():
    for name in ("C4", "D4", "SO3", "octahedral-regular"):
        kind = field_type(name)
        for split_by in ("fields", "irreps"):
            layout = block_layout(kind, split_by, "")
            basis = np.eye(kind.size) if layout.basis is None else layout.basis
            for g in list(kind.testing_elements)[:10]:
                turned = basis.T @ kind.representation(g) @ basis
                for i, block in enumerate(layout.blocks):
                    inside = np.ix_(layout.channels([i]), layout.channels([i]))
                    expected = scipy.linalg.block_diag(*[field(g) for field in block.fields])
                    np.testing.assert_allclose(turned[inside], expected, atol=1e-8)
                    turned[inside] = 0
                np.testing.assert_allclose(turned, 0, atol=1e-8)


# ---- user-supplied conditioners ------------------------------------------------------------------------------


def _users_network(name, in_type, out_type):
    gspace = in_type.gspace
    regular = enn.FieldType(gspace, 2 * [gspace.regular_repr]) if gspace.fibergroup.order() > 0 else None
    if name == "norm":
        o2 = in_type.gspace
        hidden = enn.FieldType(o2, 3 * [o2.irrep(1, 1)] + [o2.irrep(0, 0)])
        return [enn.Linear(in_type, hidden), enn.NormNonLinearity(hidden), enn.Linear(hidden, out_type)]
    if name == "conv":
        return [
            enn.R2Conv(in_type, regular, 3, padding=1),
            enn.ELU(regular),
            enn.R2Conv(regular, out_type, 3, padding=1),
        ]
    return [enn.Linear(in_type, regular), enn.ReLU(regular), enn.Linear(regular, out_type)]


USERS = {"relu": "C4", "conv": "C4-plane", "norm": "O2"}


def users_transform(name):
    kind = field_type(USERS[name])
    in_type, out_type = pe.EquivariantCoupling.conditioner_types(kind)
    net = enn.SequentialModule(*_users_network(name, in_type, out_type))
    return pe.EquivariantCoupling(kind, net, log_scale_bound=1.0), events("coupling-" + USERS[name], (3,))


@pytest.mark.parametrize("name", USERS)
def test_users_escnn_conditioner(name):
    transform, x = users_transform(name)
    testing.assert_equivariant(transform, x)
    testing.assert_inverse(transform, x)
    testing.assert_log_det(transform, x[:1])
    y = transform(x.clone())
    transform.eval()
    torch.testing.assert_close(transform(x.clone()), y, rtol=0, atol=0)
    optimizer = torch.optim.SGD(transform.parameters(), 0.1)
    for _ in range(2):  # escnn's own eval mode keeps a filter that a second backward trips over
        optimizer.zero_grad()
        transform(x.clone()).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(transform(x.clone()), y)
    assert not any(word in key for key in transform.state_dict() for word in ("filter", "matrix", "expanded_bias"))


@pytest.mark.parametrize("name", USERS)
def test_users_conditioner_state_crosses_modes(name):
    source, x = users_transform(name)
    target, _ = users_transform(name)
    assert not torch.allclose(source(x), target(x))
    target.eval()
    target(x.clone())
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(x.clone()), source(x.clone()), rtol=0, atol=0)
    target.train()
    torch.testing.assert_close(target(x.clone()), source(x.clone()), rtol=0, atol=0)


@pytest.mark.parametrize("name", USERS)
def test_users_conditioner_in_double_leaves_others_alone(name):
    first, x = users_transform(name)
    second, _ = users_transform(name)
    expected = first(x)
    second.double()
    # escnn samples its basis in float32: 5e-7 is what remains of equivariance on grids.
    testing.assert_equivariant(second, x.double(), tolerance=1e-6)
    testing.assert_inverse(second, x.double())
    torch.testing.assert_close(first(x.clone()), expected, rtol=0, atol=0)
    third, _ = users_transform(name)
    assert third(x.clone()).dtype == torch.float32


def test_users_conditioner_after_a_bare_layer_was_cast():
    """escnn shares bases between layers of one type: casting one casts, and spoils, every later one of its own."""
    kind = field_type("C4-plane")
    in_type, out_type = pe.EquivariantCoupling.conditioner_types(kind)
    before, x = users_transform("conv")
    bare = enn.R2Conv(in_type, out_type, 3, padding=1).double()
    try:
        after, _ = users_transform("conv")
        for transform in (before, after):
            testing.assert_equivariant(transform, x)
            assert transform(x).dtype == torch.float32
            testing.assert_equivariant(transform.double(), x.double(), tolerance=1e-6)
    finally:
        bare.float()


@pytest.mark.parametrize("name", USERS)
def test_users_conditioner_deepcopy(name):
    transform, x = users_transform(name)
    y = transform(x)
    twin = copy.deepcopy(transform)
    torch.testing.assert_close(twin(x.clone()), y, rtol=0, atol=0)


def test_users_eval_mode_network():
    """A network that its user had set to evaluation mode."""
    kind = field_type("C4-plane")
    net = enn.SequentialModule(*_users_network("conv", *pe.EquivariantCoupling.conditioner_types(kind))).eval()
    transform = pe.EquivariantCoupling(kind, net)
    x = events("coupling-C4-plane", (2,))
    y = transform(x)
    _ = [p.data.mul_(2.0) for p in transform.parameters()]
    assert not torch.allclose(transform(x.clone()), y)
    assert set(transform.state_dict()) >= {n for n, _ in transform.named_parameters()}


@pytest.mark.parametrize("norm", [enn.InnerBatchNorm, enn.PointwiseDropout], ids=lambda c: c.__name__)
def test_batch_statistics_and_chance_are_refused(norm):
    kind = field_type("C4-plane")
    in_type, out_type = pe.EquivariantCoupling.conditioner_types(kind)
    layers = _users_network("conv", in_type, out_type)
    layers.insert(1, norm(layers[0].out_type))
    with pytest.raises(ValueError, match=f"{norm.__name__}; a density must not depend on chance or on who else"):
        pe.EquivariantCoupling(kind, enn.SequentialModule(*layers))


# ---- linear and actnorm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flips", "C4", "C5", "D3", "SO2", "O2", "SO3", "octahedral-regular", "C4-plane"])
def test_linear_is_made_of_the_factors_of_a_dense_intertwiner(name):
    """(1 + L) e^D (1 + U) of the intertwiner A = L + D + U that the map starts out with, and the log-det of that."""
    transform = make("linear", name).double()
    kind = transform.field_type
    x = torch.eye(kind.size, dtype=torch.float64)
    on_grid = bool(kind.gspace.dimensionality)
    if on_grid:
        x = x[..., None, None].expand(-1, -1, 3, 3)

    def matrix():
        y = transform(x).detach()
        return (y[..., 0, 0] if on_grid else y).mT

    found, weight, steps = matrix(), transform.weight.detach().clone(), 2**20
    ladj = transform.log_abs_det_jacobian(x, transform(x))[0]
    with torch.no_grad():
        transform.weight.copy_(weight / steps)
    a = (matrix() - torch.eye(kind.size)) * steps  # to first order in 1 / steps
    for g in list(kind.testing_elements)[:8]:
        rho = torch.as_tensor(kind.representation(g))
        torch.testing.assert_close(found @ rho, rho @ found, rtol=1e-10, atol=1e-10)
    # Which copy of its irrep a channel belongs to, in the basis of irreps.
    basis = torch.as_tensor(kind.representation.change_of_basis)
    seen, irreps, copies = Counter(), [], []
    for irrep in kind.irreps:
        size = kind.fibergroup.irrep(*irrep).size
        irreps += size * [irrep]
        copies += size * [seen[irrep]]
        seen[irrep] += 1
    same = torch.tensor([[one == other for other in irreps] for one in irreps])
    order = torch.tensor(copies)[:, None] - torch.tensor(copies)
    a = basis.T @ a @ basis
    assert a[~same].abs().max() < 1e-8 if (~same).any() else True
    lower, diagonal, upper = (torch.where(same & part, a, 0.0) for part in (order > 0, order == 0, order < 0))
    one = torch.eye(len(a), dtype=torch.float64)
    expected = (one + lower) @ torch.matrix_exp(diagonal) @ (one + upper)
    torch.testing.assert_close(basis.T @ found @ basis, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ladj, x[0, 0].numel() * torch.linalg.slogdet(found)[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["C4", "SO2", "O2", "octahedral-regular", "D4-plane"])
def test_linear_is_one_map_however_it_is_computed(name, monkeypatch):
    """Of all irreps' matrices at once or one by one, formed for many events or applied in factors to few."""
    from pyro_equiflow.transforms import linear

    x = events(f"linear-{name}", (50,), torch.float64)
    for inverse in (False, True):
        found = []
        for most, batch in ((32, 50), (0, 50), (0, 1)):
            monkeypatch.setattr(linear, "_JOINT", most)
            transform = make("linear", name).double()
            pairs = [(transform.inverse_and_ladj if inverse else transform.call_and_ladj)(p) for p in x.split(batch)]
            y, ladj = (torch.cat(values) for values in zip(*pairs))
            (gradient,) = torch.autograd.grad(y.square().sum() + ladj.sum(), transform.weight)
            found.append((y, ladj, gradient))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def _derivative(q, order, odd):
    """Of the sum of (-q)^k / (2 k + odd)!, by its terms."""
    coefficients = [(-1) ** order * math.perm(k, order) / math.factorial(2 * k + odd) for k in range(order, 60)]
    return sum(c * (-q) ** k for k, c in enumerate(coefficients))


def test_turns_of_linear_maps_to_any_order():
    """The cosine and sine in squares of angles, and their derivatives, about zero and across where the series ends."""
    q = torch.tensor([0.0, 1e-12, 9.9e-5, 1.01e-4, 0.3, 20.0], dtype=torch.float64, requires_grad=True)
    series = [[_derivative(q.detach(), order, odd) for order in range(3)] for odd in (0, 1)]
    for value, expected in zip(_cosine_and_sine(q), series):
        for order in range(3):
            # A derivative of the short series lacks a little more.
            torch.testing.assert_close(value, expected[order], rtol=1e-12 * 1e3**order, atol=1e-13 * 1e4**order)
            if order < 2:
                (value,) = torch.autograd.grad(value.sum(), q, create_graph=True)


@pytest.mark.parametrize("name", ["C4", "C5", "D3", "SO2", "O2", "SO3", "icosahedral"])
def test_linear_has_all_intertwiners(name):
    """As many weights as escnn's own linear layer between the type and itself."""
    kind = field_type(name)
    theirs = enn.Linear(kind, kind, initialize=False, bias=False)
    assert pe.equivariant_linear(kind).weight.numel() == theirs.weights.numel()


def test_linear_in_float32_is_as_exact_as_float32():
    """A map of the size of training, against its copy in float64."""
    worst = 0.0
    for seed in range(40):
        torch.manual_seed(seed)
        transform = pe.equivariant_linear(field_type("trivial"))
        transform.reset_parameters(std=0.15)
        exact = copy.deepcopy(transform).double()
        x = torch.randn(5, 4)
        worst = max(worst, float((transform(x) - exact(x.double())).detach().norm() / x.norm()))
    assert worst < 5e-7


def test_linear_starts_as_the_identity_or_not():
    x = events("linear-O2", (2,))
    torch.testing.assert_close(pe.equivariant_linear(field_type("O2"))(x), x, rtol=0, atol=0)
    assert not torch.allclose(pe.equivariant_linear(field_type("O2"), identity_init=False)(x), x, atol=1e-2)


@pytest.mark.parametrize("name", ["trivial", "C4", "O2", "octahedral-regular", "C4-plane", "octahedral-space"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_actnorm_normalises_its_first_batch(name, inverse):
    """Invariant coordinates to mean 0, each irrep to mean square 1 a channel, by escnn's own change of basis."""
    kind = field_type(name)
    transform = pe.equivariant_actnorm(kind).double()
    rest = (3,) * kind.gspace.dimensionality
    scale = torch.rand(kind.size, *len(rest) * (1,)).double() + 0.5
    data = 1.5 + scale * torch.randn(200, kind.size, *rest).double()
    out = transform.inv(data) if inverse else transform(data)
    out = out.movedim(1, -1).reshape(-1, kind.size)
    coordinates = out @ torch.as_tensor(kind.representation.change_of_basis)
    start = 0
    for irrep in kind.representation.irreps:
        irrep = kind.fibergroup.irrep(*irrep)
        block = coordinates[:, start : start + irrep.size]
        if irrep.is_trivial():
            assert block.mean().abs() < 1e-9
        assert abs(block.square().mean() - 1) < 1e-9
        start += irrep.size
    assert bool(transform.initialized)
    # A second batch changes nothing, nor does the state after a load.
    before = {k: v.clone() for k, v in transform.state_dict().items()}
    transform(5.0 * data)
    assert all(torch.equal(v, before[k]) for k, v in transform.state_dict().items())
    fresh = pe.equivariant_actnorm(kind).double()
    fresh.load_state_dict(before)
    torch.testing.assert_close(fresh(data), transform(data.clone()), rtol=0, atol=0)
    testing.assert_equivariant(transform, data[:3])
    testing.assert_inverse(transform, data[:3])


def test_actnorm_waits_for_a_batch_that_says_something():
    transform = pe.equivariant_actnorm(field_type("O2"))
    x = 3.0 * events("actnorm-O2", (20,))
    torch.testing.assert_close(transform(x[:3]), x[:3], rtol=0, atol=0)
    assert not transform.initialized
    torch.testing.assert_close(transform.eval()(x), x, rtol=0, atol=0)
    assert not transform.initialized
    transform.train()(x)
    assert transform.initialized


def test_actnorm_is_not_set_by_a_traced_batch():
    transform = pe.equivariant_actnorm(field_type("O2"))
    x = 3.0 * torch.randn(4, 20, 8)
    torch.testing.assert_close(torch.func.vmap(transform)(x), x)
    assert torch.func.jacrev(transform)(x[0]).shape == (20, 8, 20, 8)
    assert not transform.initialized and not any(p.any() for p in transform.parameters())


def test_actnorm_with_a_field_that_does_not_vary():
    kind = field_type("O2")
    x = torch.randn(30, kind.size)
    x[:, :2] = 0.0
    transform = pe.equivariant_actnorm(kind)
    assert transform(x).isfinite().all()
    assert all(p.isfinite().all() for p in transform.parameters())


def test_actnorm_without_data_init():
    transform = pe.equivariant_actnorm(field_type("O2"), data_init=False)
    x = 3.0 * events("actnorm-O2", (40,))
    torch.testing.assert_close(transform(x), x, rtol=0, atol=0)


# ---- conditional twin ----------------------------------------------------------------------------------------


def conditional(name, *context_fields):
    kind = field_type(name)
    fields = context_fields or tuple(kind.representations[:2])
    context_type = enn.FieldType(kind.gspace, list(fields))
    return randomize(pe.conditional_equivariant_coupling(kind, context_type, **SMALL)), context_type


@pytest.mark.parametrize("name", ["flips", "C4", "O2", "SO3", "octahedral", "C4-plane", "O2-plane"])
def test_conditional_equivariance(name):
    """T(g x | g c) = g T(x | c), with a context that the group moves, a vector or an image."""
    transform, context_type = conditional(name)
    transform.double()
    x = events(f"coupling-{name}", (3,), torch.float64)
    context = torch.randn(3, context_type.size, *x.shape[2:], dtype=torch.float64)
    y = transform.condition(context)(x)
    moved = 0.0
    for g in list(grid_elements(x_type := transform.field_type))[:12]:
        turned = act(context_type, g, context)
        found = transform.condition(turned)(act(x_type, g, x))
        torch.testing.assert_close(found, act(x_type, g, y), rtol=1e-9, atol=1e-9)
        moved = max(moved, float((transform.condition(turned)(x) - y).detach().abs().max()))
    assert moved > 1e-4  # the context matters
    given = transform.condition(context)
    testing.assert_inverse(given, x)
    given = transform.condition(context[0])
    testing.assert_log_det(given, x[:1])


def test_invariant_context_vector_on_a_grid():
    transform, context_type = conditional("C4-plane", field_type("C4-plane").gspace.trivial_repr)
    assert context_type.size == 1
    x = events("coupling-C4-plane", (2,))
    vector = torch.randn(2, 1)
    image = vector[..., None, None].expand(2, 1, *x.shape[2:])
    torch.testing.assert_close(transform.condition(vector)(x), transform.condition(image)(x))
    testing.assert_equivariant(transform.condition(vector[0]), x)


def test_contexts_broadcast():
    transform, context_type = conditional("O2")
    x = events("coupling-O2", (2, 3))
    for shape in [(), (3,), (2, 3), (2, 1), (1, 3)]:
        context = torch.randn(*shape, context_type.size)
        y, ladj = transform.condition(context).call_and_ladj(x)
        assert y.shape == x.shape and ladj.shape == (2, 3)
        whole = context.expand(2, 3, -1)
        one = transform.condition(whole[1, 2])(x[1, 2])
        torch.testing.assert_close(y[1, 2], one, rtol=1e-5, atol=1e-6)
    many = transform.condition(torch.randn(4, context_type.size))
    y, ladj = many.call_and_ladj(x[0, 0])
    assert y.shape == (4, x.shape[-1]) and ladj.shape == (4,)


@pytest.mark.parametrize("wrap", [torch.Tensor.clone, torch.nn.Parameter], ids=["tensor", "Parameter"])
def test_contexts_of_two_calls_do_not_mix(wrap):
    transform, context_type = conditional("O2")
    x = events("coupling-O2", (3,))
    contexts = [wrap(torch.randn(3, context_type.size)) for _ in range(2)]
    names = [name for name, _ in transform.named_parameters()]
    first = transform.condition(contexts[0])
    expected = first(x)
    second = transform.condition(contexts[1])
    other = second(x)
    assert not torch.allclose(other, expected)
    torch.testing.assert_close(first(x.clone()), expected, rtol=0, atol=0)
    torch.testing.assert_close(first.inv(other.clone()), transform.condition(contexts[0]).inv(other.clone()))
    torch.testing.assert_close(first.inv(expected), x, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in transform.named_parameters()] == names
    assert {id(p) for p in first.parameters()} == {id(p) for p in transform.parameters()}


def test_a_context_gets_gradients():
    transform, context_type = conditional("O2")
    transform.double()
    x = events("coupling-O2", (2,), torch.float64)
    context = torch.randn(2, context_type.size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: transform.condition(c).call_and_ladj(x), (context,))


def test_conditional_transformed_distribution():
    transform, context_type = conditional("O2")
    base = pe.InvariantNormal(transform.field_type)
    flow = ConditionalTransformedDistribution(base, [transform])
    context = torch.randn(4, context_type.size)
    given = flow.condition(context)
    x = given.sample()
    log_prob = given.log_prob(x)
    assert log_prob.shape == (4,)
    torch.testing.assert_close(log_prob, flow.condition(context).log_prob(x.clone()), rtol=1e-4, atol=1e-4)
    for g in list(grid_elements(transform.field_type))[:6]:
        moved = flow.condition(act(context_type, g, context)).log_prob(act(transform.field_type, g, x))
        torch.testing.assert_close(moved, log_prob, rtol=1e-4, atol=1e-4)


def test_conditional_in_a_model():
    transform, context_type = conditional("O2")
    data, context = events("coupling-O2", (30,)), torch.randn(30, context_type.size)
    flow = ConditionalTransformedDistribution(pe.InvariantNormal(transform.field_type), [transform])

    def model():
        pyro.module("flow", transform)
        with pyro.plate("data", 30):
            pyro.sample("x", flow.condition(context), obs=data)

    svi = pyro.infer.SVI(model, lambda: None, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO())
    losses = [_quiet_step(svi) for _ in range(30)]
    assert losses[-1] < losses[0]


def _quiet_step(svi, *args):
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found vars in model but not guide", category=UserWarning)
        return svi.step(*args)


# ---- the contract with Pyro ------------------------------------------------------------------------------------


@every_kind
def test_shapes_as_pyro_has_them(case):
    transform = CASES[case]()
    for batch in BATCH_SHAPES:
        flow = TransformedDistribution(normal(case).expand(batch), [transform])
        x = events(case)
        assert flow.batch_shape == batch and flow.event_shape == x.shape
        y = flow.rsample((5,))
        assert y.shape == (5, *batch, *x.shape)
        assert flow.log_prob(y).shape == (5, *batch)
        assert flow.expand((4, *batch)).rsample().shape == (4, *batch, *x.shape)


@every_kind
def test_density_by_change_of_variables(case):
    transform = CASES[case]().double()
    x = events(case, (3,), torch.float64)
    base = dist.Normal(torch.zeros(x.shape[1:]).double(), 1.0).to_event(x.dim() - 1)
    y, ladj = transform.call_and_ladj(x)
    flow = TransformedDistribution(base, [transform])
    torch.testing.assert_close(flow.log_prob(y.clone()), base.log_prob(x) - ladj, rtol=1e-9, atol=1e-9)
    back = TransformedDistribution(base, [transform.inv])
    torch.testing.assert_close(back.log_prob(x), base.log_prob(y) + ladj, rtol=1e-9, atol=1e-9)


def test_density_integrates_to_one():
    """Quadrature over the plane of a flow of two scalars."""
    g = group.trivial_group()
    kind = point(g, g.trivial_representation, g.trivial_representation)
    flow = pe.equivariant_flow(kind, num_transforms=2, hidden_dims=(8,), actnorm=False, log_scale_bound=0.5)
    transform = randomize(flow).double()
    density = TransformedDistribution(dist.Normal(torch.zeros(2).double(), 1.0).to_event(1), [transform])
    grid = torch.linspace(-25, 25, 800, dtype=torch.float64)
    with torch.no_grad():
        total = density.log_prob(torch.cartesian_prod(grid, grid)).exp().sum() * (grid[1] - grid[0]) ** 2
    assert abs(total - 1) < 1e-6


@every_kind
def test_pyro_module_and_param_store(case, tmp_path):
    transform = CASES[case]()

    def model():
        pyro.module("flow", transform)
        return pyro.sample("x", TransformedDistribution(normal(case), [transform]))

    model()
    store = pyro.get_param_store()
    names = {n for n, _ in transform.named_parameters()}
    assert {n.removeprefix("flow$$$") for n in store.keys()} == names != set()  # noqa: SIM118
    store.save(tmp_path / "params")
    x = events(case, (3,))
    y = transform(x)
    pyro.clear_param_store()
    with torch.no_grad():
        for p in transform.parameters():
            p.mul_(0.5)
    store.load(tmp_path / "params")
    pyro.module("flow", transform, update_module_params=True)
    torch.testing.assert_close(transform(x.clone()), y, rtol=0, atol=0)


@every_kind
def test_pyro_module_attribute_in_svi(case):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.transform = CASES[case]()

        def forward(self, data):
            with pyro.plate("data", len(data)):
                return pyro.sample("x", TransformedDistribution(normal(case), [self.transform]), obs=data)

    model, data = Model(), 0.5 * events(case, (20,)) + 0.3
    svi = pyro.infer.SVI(model, lambda data: None, pyro.optim.ClippedAdam({"lr": 5e-3}), pyro.infer.Trace_ELBO())
    losses = [_quiet_step(svi, data) for _ in range(25)]
    assert all(np.isfinite(losses)) and losses[-1] < losses[0]


def test_as_a_guide_with_vectorised_particles():
    transform = pe.equivariant_flow(field_type("O2"), num_transforms=2, hidden_dims=(8,))
    base = pe.InvariantNormal(field_type("O2"))

    def model():
        with pyro.plate("data", 3):
            pyro.sample("z", pe.InvariantNormal(field_type("O2"), scale=torch.full((5,), 2.0)))

    def guide():
        pyro.module("flow", transform)
        with pyro.plate("data", 3):
            pyro.sample("z", TransformedDistribution(base, [transform]))

    elbo = pyro.infer.Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    losses = [svi.step() for _ in range(150)]
    assert np.mean(losses[-10:]) < 0.7 * losses[0]
    samples = pyro.infer.Predictive(model, guide=guide, num_samples=6, parallel=True)()["z"]
    assert samples.shape == (6, 3, 8)


def test_iterated():
    kind = field_type("O2")
    transforms = iterated(3, partial(pe.equivariant_coupling, kind, hidden_dims=(8,), identity_init=False))
    assert len(transforms.parts) == 3 and len({id(t) for t in transforms.parts}) == 3
    x = torch.randn(4, kind.size)
    testing.assert_equivariant(transforms, x, kind)
    flow = TransformedDistribution(dist.Normal(torch.zeros(kind.size), 1.0).to_event(1), list(transforms.parts))
    flow.log_prob(flow.rsample((4,)))


def test_in_torchs_compose_and_independent():
    kind = field_type("O2")
    parts = [make("coupling", "O2"), make("linear", "O2")]
    composed = torch.distributions.ComposeTransform(parts)
    assert composed.domain.event_dim == composed.codomain.event_dim == 1
    x = torch.randn(4, kind.size)
    y = composed(x)
    ladj = composed.log_abs_det_jacobian(x, y)
    ours = pe.Compose(parts)
    torch.testing.assert_close(ours(x), y)
    torch.testing.assert_close(ours.log_abs_det_jacobian(x, y), ladj)
    torch.testing.assert_close(composed.inv(y), x, rtol=1e-5, atol=1e-5)
    reinterpreted = torch.distributions.IndependentTransform(parts[0], 1)
    assert reinterpreted.log_abs_det_jacobian(x, parts[0](x)).shape == ()


def test_compose():
    parts = [make("coupling", "O2"), make("actnorm", "O2"), make("linear", "O2")]
    stack = pe.Compose(parts)
    assert len(stack) == 3 and list(stack) == parts and stack[1] is parts[1]
    assert len(list(stack.parameters())) == sum(len(list(p.parameters())) for p in parts)
    x = events("coupling-O2", (3,))
    expected = x
    for part in parts:
        expected = part(expected)
    torch.testing.assert_close(stack(x), expected)


def test_equality_is_identity():
    first, second = make("linear", "O2"), make("linear", "O2")
    assert first == first and first != second and len({first, second}) == 2


@every_kind
def test_training_fits_invariant_data(case):
    """Maximum likelihood moves towards data; the learnt density stays invariant."""
    transform = CASES[case]()
    kind = transform.field_type
    data = 2.0 * events(case, (64,))
    base = pe.InvariantNormal(kind, tuple(data.shape[2:]))
    optimizer = torch.optim.Adam(transform.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = -TransformedDistribution(base, [transform]).log_prob(data).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    testing.assert_equivariant(transform, data[:3])


def test_expand_and_event_dim_agree():
    for case in ONE_OF_EACH:
        transform = CASES[case]()
        assert transform.event_dim == event_dim(transform.field_type) == transform.domain.event_dim


def test_expanded_conditioner_is_the_conditioner():
    transform = make("coupling", "O2")
    network = transform.conditioner
    x = torch.randn(2, 4, network.network.in_type.size)
    torch.testing.assert_close(network(x), expand(network.network)(x.flatten(0, 1)).unflatten(0, (2, 4)))
