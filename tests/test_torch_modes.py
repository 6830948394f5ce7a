# SPDX-License-Identifier: Apache-2.0
"""Under torch's modes: default dtype and device, anomaly detection, autocast, and batches that hold nothing."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import group, gspaces
from escnn import nn as enn
from pyro import infer
from pyro.infer import SVI
from torch.distributions import biject_to
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_equiflow as pe
from pyro_equiflow import logdet
from tests.cases import CASES, ONE_OF_EACH, events, field_type, point, spatial_shape

every_kind = pytest.mark.parametrize("case", ONE_OF_EACH)
O2 = gspaces.no_base_space(group.o2_group())
VECTORS = enn.FieldType(O2, 3 * [O2.irrep(1, 1)])
FAMILIES = ["coupling", "iaf", "residual", "implicit"]


# ---- default dtype --------------------------------------------------------------------------------------------------


@pytest.fixture
def default_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@every_kind
def test_factories_follow_the_default_dtype(case, default_float64):
    """Every kind is built in float64, and is what the float64 copy of a float32 one is: nothing was rounded."""
    transform = CASES[case]()
    assert {p.dtype for p in transform.parameters()} == {torch.float64}
    x = torch.randn_like(events(case, (3,), torch.float64))
    y, ladj = transform.call_and_ladj(x)
    assert y.dtype == ladj.dtype == torch.float64
    torch.testing.assert_close(transform.inv(y.clone()), x, rtol=1e-9, atol=1e-9)
    torch.set_default_dtype(torch.float32)
    twin = CASES[case]()
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    twin.double().load_state_dict(transform.state_dict())
    for found, expected in zip(twin.call_and_ladj(x), (y, ladj)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", FAMILIES)
def test_conditional_factories_follow_the_default_dtype(kind, default_float64):
    context = enn.FieldType(O2, [O2.irrep(1, 1), O2.trivial_repr])
    family = getattr(pe, f"conditional_equivariant_{kind}")(VECTORS, context, hidden_dims=(8,))
    y = family.condition(torch.randn(5, 3))(torch.randn(5, 6))
    assert y.dtype == torch.float64


# ---- anomaly detection ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")  # torch's own
@pytest.mark.parametrize("case", [case for case in ONE_OF_EACH if "spline" not in case and "by" not in case])
def test_anomaly_mode(case):
    """Gradients with torch looking at every value: the same numbers."""
    transform = CASES[case]().double()
    found = []
    for on in (False, True):
        x = events(case, (2,), torch.float64).requires_grad_()
        with torch.autograd.set_detect_anomaly(on, check_nan=True):
            y, ladj = transform.call_and_ladj(x)
            back, less = transform.inverse_and_ladj(x + y)
            loss = sum(t.square().sum() for t in (y, ladj, back, less))
            found.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


# ---- autocast -------------------------------------------------------------------------------------------------------


@every_kind
def test_autocast_leaves_transforms_alone(case):
    """Values, log-dets and gradients to the last bit, float32 back; inputs that autocast has shortened are taken."""
    transform = CASES[case]().eval()
    x = events(case, (3,)).bfloat16().float()
    found = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            given = x.bfloat16() if on else x
            y, ladj = transform.call_and_ladj(given.requires_grad_())
            back, less = transform.inverse_and_ladj(y.detach().clone())
        (slope,) = torch.autograd.grad(y.square().sum() + ladj.sum() + back.sum() + less.sum(), given)
        assert {t.dtype for t in (y, ladj, back, less)} == {torch.float32}
        found.append((y, ladj, back, less, slope.float().bfloat16()))
    for plain, cast in zip(*found):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("kind", FAMILIES)
def test_autocast_densities_with_contexts(kind):
    """A context from an autocast encoder, a base in another basis, a mixture over an orbit: as without autocast."""
    space = gspaces.no_base_space(group.cyclic_group(3))
    event = enn.FieldType(space, [space.regular_repr, space.irrep(1), space.irrep(1)])
    context_type = enn.FieldType(space, [space.irrep(1)])
    family = getattr(pe, f"conditional_equivariant_{kind}")(event, context_type, identity_init=False, hidden_dims=(8,))
    base = pe.OrbitMixture(pe.InvariantNormal(event, scale=torch.tensor([0.5, 2.0, 1.0, 3.0])), event)
    context, x = torch.randn(4, 2).bfloat16(), torch.randn(4, event.size)
    scores = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            flow = dist.TransformedDistribution(base, [family.condition(context if on else context.float())])
            scores.append(flow.log_prob(x))
    assert torch.equal(*scores)
    assert scores[0].dtype == torch.float32


def test_autocast_does_not_reach_bounds_and_estimators():
    """A Lipschitz bound of eight bits is none; the same for a user's own calls of estimators and solvers."""
    transform = CASES["residual-C4-plane"]()
    y = events("residual-C4-plane", (3,))
    weight = torch.randn(8, 8)

    def fn(x, w):
        return 0.1 * x @ w

    found = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            options = {"lipschitz": 0.9, "training": False}
            numbers = [transform.lipschitz_bound(), pe.nn.lipschitz.operator_norm.spectral_norm(weight)]
            for estimator in (logdet.Exact(), logdet.PowerSeries(probes=None), logdet.PowerSeries(probes=3)):
                numbers.append(estimator(fn, y.flatten(1)[:, :8], (weight / weight.norm(),), **options).value)
            root = pe.solvers.fixed_point(lambda x, w: 1 - fn(x, w), y.flatten(1)[:, :8], (weight,), lipschitz=0.9)[0]
        found.append([*map(torch.as_tensor, numbers), root, transform.inverse_solution(y).error])
    for plain, cast in zip(*found):
        assert torch.equal(plain, cast)


# ---- nothing, and what is not finite --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@every_kind
def test_batches_of_none(case, mode):
    """Every direction, with and without a graph, with warnings as errors: shapes right, gradients zero."""
    transform = CASES[case]().train(mode == "train")
    parameters = list(transform.parameters())
    for batch in ((0,), (2, 0), (0, 3)):
        x = events(case, batch).requires_grad_()
        for y, ladj in (transform.call_and_ladj(x), transform.inverse_and_ladj(x)):
            assert y.shape == x.shape
            assert ladj.shape == batch
            loss = y.sum() + ladj.sum()
            for gradient in torch.autograd.grad(loss, [x, *parameters], allow_unused=True):
                assert gradient is None or not gradient.any()
        with torch.no_grad():
            y = transform(x)
            assert transform.log_abs_det_jacobian(x, y).shape == transform.inv(y.clone()).shape[: len(batch)] == batch
        base = pe.InvariantNormal(transform.field_type, tuple(x.shape[len(batch) + 1 :]))
        flow = dist.TransformedDistribution(base, [transform])
        assert flow.log_prob(x).shape == flow.log_prob(flow.rsample(batch)).shape == batch


@pytest.mark.parametrize(
    "estimator",
    [logdet.Exact(), logdet.PowerSeries(), logdet.PowerSeries(probes=5), logdet.PowerSeries(probes=None)]
    + [logdet.RussianRoulette(), logdet.RussianRoulette(probes=5)],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_estimators_of_none(estimator, training):
    x, w = torch.randn(0, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    found = estimator(lambda x, w: 0.1 * x @ w, x, (w,), lipschitz=0.9, training=training)
    assert found.value.shape == found.error.shape == found.stderr.shape == (0,)
    assert not torch.autograd.grad(found.value.sum() + found.output.sum(), w)[0].any()


def test_distributions_of_none():
    """Draws and scores of batches of none; the support is torch's own in all else."""
    cyclic = point(group.cyclic_group(4), group.cyclic_group(4).regular_representation)
    vectors = point(group.so2_group(), group.so2_group().irrep(1))
    both = pe.augment(vectors, 2)
    joint = dist.TransformedDistribution(pe.InvariantNormal(both), [pe.equivariant_coupling(both)])
    augmented = pe.AugmentedDistribution(joint, vectors)
    mixture = pe.OrbitMixture(pe.InvariantNormal(cyclic), cyclic)
    image = pe.InvariantNormal(field_type("C4-plane"), spatial_shape("C4-plane"))
    for density in (mixture, image, image.expand((0,)), pe.InvariantNormal(vectors).expand((2, 0))):
        batch = (3, *density.batch_shape) if density.batch_shape else (0,)
        x = density.sample(batch[: len(batch) - len(density.batch_shape)])
        assert density.log_prob(x).shape == batch
    assert augmented.log_prob_bound(augmented.sample((0,)), 3).shape == (0,)
    assert pe.MeanFreePositions(3, 2).inv(torch.randn(0, 3, 2)).shape == (0, 4)
    support = image.support
    assert support.event_dim == 3
    assert support.check(torch.ones(2, *image.event_shape)).tolist() == [True, True]
    assert support.check(torch.full((1, *image.event_shape), torch.nan)).tolist() == [False]
    with pytest.raises(ValueError, match="reinterpreted_batch_ndims|Expected value.dim"):
        support.check(torch.ones(()))
    x = torch.randn(2, *image.event_shape)
    assert torch.equal(biject_to(support)(x), x)


@pytest.mark.parametrize("kind", FAMILIES)
def test_contexts_of_none(kind):
    context = enn.FieldType(O2, [O2.trivial_repr])
    family = getattr(pe, f"conditional_equivariant_{kind}")(VECTORS, context, identity_init=False, hidden_dims=(8,))
    transform = family.condition(torch.randn(0, 1))
    for y, ladj in (transform.call_and_ladj(torch.randn(0, 6)), transform.inverse_and_ladj(torch.randn(0, 6))):
        assert (y.shape, ladj.shape) == ((0, 6), (0,))


def test_rows_that_are_not_finite_are_named():
    transform = pe.equivariant_coupling(VECTORS)
    x = torch.randn(20, 6)
    x[3, 2], x[17, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"in 2 of 20 samples \(at 3, 17\); an earlier step"):
        transform(x)
    x[5:12] = torch.nan
    with pytest.raises(ValueError, match=r"in 9 of 20 samples \(at 3, 5, 6, 7, 8, \.\.\.\)"):
        transform.inv(x)
    with pytest.raises(ValueError, match=r"in 9 of 20 samples \(at \(0, 3\), \(0, 5\), \(0, 6\), \(0, 7\), \(0, 8\), "):
        transform(x.view(2, 10, 6))
    with pytest.raises(ValueError, match="in 1 of 1 samples; an earlier step"):
        transform(x[3])
    family = pe.conditional_equivariant_coupling(VECTORS, enn.FieldType(O2, [O2.trivial_repr]))
    with pytest.raises(ValueError, match=r"condition: .* in 1 of 4 samples \(at 2\)"):
        family.condition(torch.tensor([[0.0], [1.0], [torch.nan], [2.0]]))


# ---- torch.jit ------------------------------------------------------------------------------------------------------


def test_sign_says_what_it_is():
    transform = pe.equivariant_residual(VECTORS)
    for one in (transform, transform.inv, pe.Compose([transform])):
        with pytest.raises(NotImplementedError, match="sign: expected a monotone map of the line, found a map"):
            _ = one.sign
        assert "sign" not in dir(one)
        assert "log_abs_det_jacobian" in dir(one)


def _step(kind, elbo):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(6), 0.5).to_event(1))

    pyro.clear_param_store()
    guide = pe.AutoEquivariantFlow(
        model, {"x": VECTORS}, lambda t: pe.equivariant_flow(t, kind=kind, num_transforms=1, hidden_dims=(8,))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit
        SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo).step()


@pytest.mark.parametrize("kind", ["residual", "implicit"])
@pytest.mark.parametrize("elbo", ["JitTrace_ELBO", "JitTraceGraph_ELBO", "JitTraceMeanField_ELBO"])
def test_jit_elbos_are_refused_where_bounds_follow_weights(kind, elbo):
    with pytest.raises(NotImplementedError, match=r"expected a call outside torch\.jit, found one .* take Trace_ELBO"):
        _step(kind, getattr(infer, elbo)())


# ---- records --------------------------------------------------------------------------------------------------------


def _make_fx(function, x):
    return make_fx(function)(x)


def _export(function, x):
    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    with torch.no_grad():
        return torch.export.export(Module(), (x,)).module()


def _both(direction):
    def both(x):
        y = direction(x)
        return y, direction.log_abs_det_jacobian(x, y)

    return both


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, of its exporter
@pytest.mark.parametrize(
    ("case", "record"),
    [(f"{case}-O2", _make_fx) for case in ("coupling", "iaf", "linear", "actnorm", "residual", "implicit")]
    + [("residual-C4-plane", _make_fx)]
    + [(f"{kind}-O2", _export) for kind in ("coupling", "linear", "residual", "implicit")],
)
def test_records_are_right_or_refused(case, record):
    """Of a graph that make_fx or torch.export writes down: right at other events, or refused in words."""
    transform = CASES[case]().eval()
    x, other = events(case, (3,)), events(case, (3,), seed=4)
    for both in map(_both, (transform, transform.inv)):
        if "residual" in case or "implicit" in case:
            with pytest.raises(NotImplementedError, match="expected tensors with values, found some of torch.export"):
                record(both, x)
            continue
        for found, expected in zip(record(both, x)(other), both(other)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every_kind
def test_shapes_without_values(case):
    """On the device meta: shapes right, or refused in words."""
    transform, x = CASES[case]().to("meta"), events(case, (3,)).to("meta")
    for direction in (transform, transform.inv):
        if "residual" in case or "implicit" in case:
            with pytest.raises(NotImplementedError, match="found some on the device meta: .* call it outside"):
                direction(x)
            continue
        y = direction(x)
        ladj = direction.log_abs_det_jacobian(x, y)
        assert (y.shape, ladj.shape, y.device.type) == (x.shape, (3,), "meta")
