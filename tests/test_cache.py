# SPDX-License-Identifier: Apache-2.0
"""The cache of own samples: what it answers, and all the times when it must not."""

import copy
import gc
import pickle
import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import nn as enn
from torch.distributions import TransformedDistribution

import pyro_equiflow as pe
from pyro_equiflow.transforms.precision import PrecisionWatch
from tests.cases import CASES, ONE_OF_EACH, events, field_type, make

every_kind = pytest.mark.parametrize("case", ONE_OF_EACH)
# An Inverse leaves its passes to the transform that it owns.
every_own_kind = pytest.mark.parametrize("case", [case for case in ONE_OF_EACH if not case.startswith("inverse")])


class Counter:
    """Counts the passes of transforms of one class, in each direction."""

    def __init__(self, monkeypatch, cls):
        self.forward = self.inverse = 0
        call, invert = cls._call_and_ladj, cls._inverse_and_ladj

        def counted_call(transform, x):
            self.forward += 1
            return call(transform, x)

        def counted_inverse(transform, y):
            self.inverse += 1
            return invert(transform, y)

        # A look at what rounding may have done is a pass of its own, see tests/test_precision.py.
        monkeypatch.setattr(PrecisionWatch, "_due", lambda *_: False)
        monkeypatch.setattr(cls, "_call_and_ladj", counted_call)
        monkeypatch.setattr(cls, "_inverse_and_ladj", counted_inverse)


def flow_of(transform, case):
    shape = events(case).shape
    return TransformedDistribution(dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)), [transform])


@every_own_kind
def test_sampling_then_scoring_is_one_pass(case, monkeypatch):
    transform = CASES[case]()
    flow = flow_of(transform, case)
    counter = Counter(monkeypatch, type(transform))
    y = flow.rsample((3,))
    log_prob = flow.log_prob(y)
    assert (counter.forward, counter.inverse) == (1, 0)
    torch.testing.assert_close(log_prob, flow.log_prob(y.clone()), rtol=1e-4, atol=1e-4)
    assert (counter.forward, counter.inverse) == (1, 1)


@every_own_kind
def test_scoring_a_draw_of_the_inverse_is_one_pass(case, monkeypatch):
    transform = CASES[case]()
    flow = flow_of(transform.inv, case)
    counter = Counter(monkeypatch, type(transform))
    flow.log_prob(flow.rsample((3,)))
    assert (counter.forward, counter.inverse) == (0, 1)


def test_without_a_cache_every_question_is_a_pass(monkeypatch):
    transform = make("coupling", "O2").with_cache(0)
    flow = flow_of(transform, "coupling-O2")
    counter = Counter(monkeypatch, pe.EquivariantCoupling)
    flow.log_prob(flow.rsample((3,)))
    assert (counter.forward, counter.inverse) == (2, 1)


@every_own_kind
def test_data_are_never_looked_up(case, monkeypatch):
    """Scoring the same tensor again is a new pass, whatever happened in between."""
    transform = CASES[case]()
    flow = flow_of(transform, case)
    data = events(case, (3,))
    counter = Counter(monkeypatch, type(transform))
    for count in range(1, 4):
        flow.log_prob(data)
        assert (counter.forward, counter.inverse) == (0, count)
    transform(data)
    transform(data)
    assert counter.forward == 2


OPTIMIZERS = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05, fused=True),
    "ClippedAdam": lambda parameters: pyro.optim.clipped_adam.ClippedAdam(parameters, lr=0.05),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
}


def check_second_step(transform, fresh, case, optimizer):
    """Losses and gradients of two steps on one batch are those of an object that never saw the batch."""
    data = events(case, (4,))
    steps = OPTIMIZERS[optimizer](transform.parameters())
    for _ in range(2):
        before = copy.deepcopy(transform.state_dict())
        fresh.load_state_dict(before, strict=type(fresh) is type(transform))
        loss = -flow_of(transform, case).log_prob(data).mean()
        expected = -flow_of(fresh, case).log_prob(data.clone()).mean()
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
        steps.zero_grad()
        fresh.zero_grad()
        loss.backward()
        expected.backward()
        for p, q in zip(transform.parameters(), fresh.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)
        steps.step()
    assert any(not torch.equal(a, b) for a, b in zip(before.values(), transform.state_dict().values()))


@every_kind
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_second_step_on_the_same_batch(case, optimizer):
    """Pyro's own transforms go stale here (pyro #2564, #2292)."""
    check_second_step(CASES[case](), CASES[case](), case, optimizer)


CHANGES = {
    "optimizer": lambda t: _step(torch.optim.Adam(t.parameters(), lr=0.1)),
    "fused optimizer": lambda t: _step(torch.optim.Adam(t.parameters(), lr=0.1, fused=True)),
    "ClippedAdam": lambda t: _step(pyro.optim.clipped_adam.ClippedAdam(t.parameters(), lr=0.1)),
    "in place": lambda t: [p.add_(0.1) for p in t.parameters()],
    "load": lambda t: t.load_state_dict({k: v + 0.1 for k, v in _floats(t)}, strict=False),
    "load, assigned": lambda t: t.load_state_dict({k: v + 0.1 for k, v in _floats(t)}, strict=False, assign=True),
    ".data exchanged": lambda t: [setattr(p, "data", p.data + 0.1) for p in t.parameters()],
    "vector_to_parameters": lambda t: torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(t.parameters()) + 0.1, t.parameters()
    ),
}


def _floats(transform):
    return [(name, value) for name, value in transform.state_dict().items() if value.is_floating_point()]


def _step(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@every_kind
@pytest.mark.parametrize("change", CHANGES)
def test_a_draw_scored_after_a_change_of_the_parameters(case, change):
    transform = CASES[case]()
    with torch.no_grad():
        y = transform(events(case, (3,)))
        stale = transform.inv(y)
        CHANGES[change](transform)
        found = transform.inv(y)
        torch.testing.assert_close(found, transform.inv(y.clone()), rtol=0, atol=0)
        assert not torch.allclose(found, stale)


def test_functional_call_uses_its_own_parameters():
    transform = make("coupling", "O2")
    y = transform(events("coupling-O2", (3,)))
    other = {name: value + 0.2 for name, value in transform.inv.state_dict().items()}
    found = torch.func.functional_call(transform.inv, other, (y,))
    torch.testing.assert_close(found, torch.func.functional_call(transform.inv, other, (y.clone(),)), rtol=0, atol=0)
    torch.testing.assert_close(transform.inv(y), events("coupling-O2", (3,)))


@every_kind
def test_a_draw_edited_in_place_is_a_new_event(case):
    transform = CASES[case]()
    with torch.no_grad():
        x = events(case, (3,))
        y = transform(x)
        y[0] = 0.5
        torch.testing.assert_close(transform.inv(y), transform.inv(y.clone()), rtol=0, atol=0)
        y = transform(x)
        expected = transform.inv(y.clone())
        y = transform(x)
        x[0] = 0.5
        torch.testing.assert_close(transform.inv(y), expected, rtol=0, atol=0)
        y = transform(x)
        x.mul_(2.0)
        torch.testing.assert_close(
            transform.log_abs_det_jacobian(x, y), transform.log_abs_det_jacobian(x.clone(), y.clone()), rtol=0, atol=0
        )


@every_kind
def test_a_draw_without_a_graph_scored_with_one(case):
    transform = CASES[case]()
    flow = flow_of(transform, case)
    with torch.no_grad():
        y = flow.sample((3,))
    flow.log_prob(y).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in transform.parameters())


@every_kind
def test_inference_mode(case):
    transform = CASES[case]()
    flow = flow_of(transform, case)
    with torch.inference_mode():
        y = flow.sample((3,))
        log_prob = flow.log_prob(y)
        y[0] = 0.5
        assert not torch.equal(flow.log_prob(y)[0], log_prob[0])
    transform(events(case)).sum().backward()


@every_kind
def test_the_cache_is_left_out_of_copies(case):
    transform = CASES[case]()
    y = transform(events(case, (3,)))
    twin = copy.deepcopy(transform)
    assert twin._memory.last is None
    assert copy.copy(transform)._memory.last is None
    assert not any("entry" in name for name in transform.state_dict())
    assert transform.inv(y) is not None
    transform.double()
    assert transform._memory.last is None


def test_with_cache_shares_parameters():
    transform = make("coupling", "O2")
    assert transform.with_cache(1) is transform
    bare = transform.with_cache(0)
    assert bare._cache_size == 0 and transform._cache_size == 1
    assert [id(p) for p in bare.parameters()] == [id(p) for p in transform.parameters()]
    x = events("coupling-O2", (3,))
    torch.testing.assert_close(bare(x), transform(x), rtol=0, atol=0)
    assert bare._memory.last is None
    cached = bare.inv.with_cache(1)
    assert isinstance(cached, pe.Inverse) and cached.inv._cache_size == 1
    with pytest.raises(ValueError, match="cache_size: expected an integer from 0 to 1, found 2"):
        transform.with_cache(2)


def test_actnorm_with_cache_is_set_once():
    """The first batch sets the parameters for all copies that share them."""
    transform = pe.equivariant_actnorm(field_type("O2"))
    twin = transform.with_cache(0)
    twin(1.0 + 3.0 * events("actnorm-O2", (50,)))
    expected = transform.log_scale.detach().clone()
    assert expected.any()
    transform(10.0 * events("actnorm-O2", (50,), seed=1))
    torch.testing.assert_close(transform.log_scale.detach(), expected, rtol=0, atol=0)


def test_training_through_svi_twice_on_one_batch():
    """Two identical runs, one of which scores clones: a cache keyed on data would make them differ."""

    def run(clone):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        transform = make("coupling", "O2")
        data = events("coupling-O2", (20,))

        def model(data):
            pyro.module("flow", transform)
            with pyro.plate("data", len(data)):
                pyro.sample("x", flow_of(transform, "coupling-O2"), obs=data)

        svi = pyro.infer.SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return [svi.step(data.clone() if clone else data) for _ in range(6)]

    kept, cloned = run(False), run(True)
    assert kept == cloned
    assert kept[-1] < kept[0]


class KeyedOnData(pe.EquivariantCoupling):
    """Planted fault: answers by the identity of what it was given, as Pyro's own transforms do."""

    def _pass(self, given, **options):
        if getattr(self, "_kept", None) is not None and self._kept[0] is given:
            return self._kept[1]
        result = super()._pass(given, **options)
        self._kept = (given, result)
        return result


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_cache_keyed_on_data_is_caught(optimizer):
    transform = make("coupling", "O2")
    transform.__class__ = KeyedOnData
    with pytest.raises(AssertionError):
        check_second_step(transform, make("coupling", "O2"), "coupling-O2", optimizer)


@pytest.mark.parametrize("kind", ["residual", "implicit"])
def test_without_a_cache_a_call_finds_no_log_det(kind):
    """As a layer of another network, gradients and all; asked for, the log-det is there."""
    type_ = field_type("O2")

    def refuse(*args, **kwargs):
        raise AssertionError("a log-det was estimated")

    factory = {"residual": pe.equivariant_residual, "implicit": pe.equivariant_implicit}[kind]
    transform = factory(type_, hidden_dims=(8,), identity_init=False, cache_size=0).double()
    layer, x = pe.Compose([transform], cache_size=0), torch.randn(4, type_.size, dtype=torch.float64)
    expected, ladj = transform.call_and_ladj(x)
    wanted = torch.autograd.grad(expected.square().sum(), list(transform.parameters()))
    estimator, transform.log_det = transform.log_det, refuse
    for caller in (transform, layer):
        y = caller(x)
        torch.testing.assert_close(y, expected)
        found = torch.autograd.grad(y.square().sum(), list(transform.parameters()))
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(caller.inv(y), x)
    transform.log_det = estimator
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), ladj)


# ---- all that a pass is made of ---------------------------------------------------------------------------------

SOLVED = {"residual": pe.equivariant_residual, "implicit": pe.equivariant_implicit}


def _own(kind):
    """A solved transform of 20 entries: probes in training, exact outside."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        wide = pe.augment(field_type("O2"), 12)
        return SOLVED[kind](wide, hidden_dims=(8,), identity_init=False)


def _network(part):
    return part.conditioner if isinstance(part, pe.EquivariantResidual) else part.conditioner_y


SETTINGS = {
    "constant": lambda t: setattr(_network(t), "lipschitz", 0.1),
    "estimator": lambda t: setattr(t, "log_det", pe.logdet.PowerSeries(terms=1, probes=None)),
    "solver": lambda t: (setattr(t, "tolerance", 0.5), setattr(t, "log_det", pe.logdet.Exact())),
    "mode": lambda t: t.eval(),
    "mode of the parts": lambda t: [part.train(False) for part in t.children()],
    "network": lambda t: setattr(_network(t), "network", copy.deepcopy(_own("residual").conditioner.network)),
}


@pytest.mark.parametrize("kind", SOLVED)
@pytest.mark.parametrize("change", SETTINGS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("ask", ["log_det", "back"])
def test_a_changed_setting_forgets_the_pass(kind, change, nested, ask):
    part = _own(kind)
    transform = pe.Compose([pe.equivariant_linear(part.field_type), part]) if nested else part
    transform(torch.randn(3, 20))
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    y = transform(x)
    assert transform._memory.recall(transform, x, y)
    SETTINGS[change](part)
    assert not transform._memory.recall(transform, x, y)
    if change != "solver" and ask == "log_det":
        torch.manual_seed(1)
        found = transform.log_abs_det_jacobian(x, y)
        torch.manual_seed(1)
        torch.testing.assert_close(found, transform.log_abs_det_jacobian(x.clone(), y.clone()), rtol=0, atol=0)
    if ask == "back":
        torch.testing.assert_close(transform.inv(y), transform.inv(y.clone()), rtol=0, atol=0)


def test_a_changed_buffer_forgets_the_pass():
    """A buffer of a user's layer, in place and exchanged."""
    kind = field_type("flips")

    class Scaled(enn.IdentityModule):
        def __init__(self, in_type):
            super().__init__(in_type)
            self.register_buffer("factor", torch.tensor(1.0))

        def forward(self, x):
            return enn.GeometricTensor(self.factor * x.tensor, x.type)

    in_type, out_type = pe.EquivariantCoupling.conditioner_types(kind)
    scaled = Scaled(in_type)
    net = enn.SequentialModule(scaled, pe.nn.steerable_net(in_type, out_type, hidden_dims=(8,)))
    transform = pe.EquivariantCoupling(kind, net)
    x = torch.randn(3, kind.size)
    for change in (lambda: scaled.factor.fill_(3.0), lambda: setattr(scaled, "factor", torch.tensor(0.1))):
        y = transform(x)
        change()
        fresh = transform.log_abs_det_jacobian(x.clone(), y.clone())
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), fresh, rtol=0, atol=0)
        torch.testing.assert_close(transform.inv(y), transform.inv(y.clone()), rtol=0, atol=0)


def test_a_pass_that_changes_nothing_is_kept():
    """The fingerprint must not see changes where there are none: every kind answers its own draw."""
    for case in ONE_OF_EACH:
        transform = CASES[case]()
        if isinstance(transform, pe.Inverse):
            continue
        x = events(case, (3,))
        assert transform._memory.recall(transform, x, transform(x)), case


def test_a_deleted_transform_leaves_no_cycle():
    """What the cache holds of a pass must not hold the transform: its graph is freed at once."""
    transform = make("coupling", "O2")
    transform(events("coupling-O2", (3,)))
    seen = weakref.ref(transform)
    gc.collect()
    gc.disable()
    try:
        del transform
        assert seen() is None
    finally:
        gc.enable()


# ---- one mode for all copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOLVED)
def test_the_mode_reaches_every_copy(kind):
    """``eval()`` makes what with_cache(), condition() and .inv gave deterministic, before and after, either way."""
    wide = pe.augment(field_type("O2"), 12)
    context_type = enn.FieldType(wide.gspace, [wide.gspace.trivial_repr])
    make_family = getattr(pe, f"conditional_equivariant_{kind}")
    transform, family = _own(kind), make_family(wide, context_type, hidden_dims=(8,), identity_init=False)
    before = [transform.with_cache(0), transform.inv, pe.Compose([transform]), family.condition(torch.ones(1))]
    before += [before[-1].with_cache(0), copy.copy(before[-1])]
    apart = copy.deepcopy(before[-1])
    transform.eval()
    family.eval()
    after = [transform.with_cache(0), family.condition(torch.ones(1))]
    x = torch.randn(20)
    for copied in [*before, *after]:
        assert torch.equal(copied.call_and_ladj(x.clone())[1], copied.call_and_ladj(x.clone())[1])
    assert apart.training and not apart.eval().training and not transform.training
    before[-1].train()
    assert family.transform.training and before[3].training


def test_the_mode_survives_pickling():
    transform = pickle.loads(pickle.dumps(_own("residual").eval()))
    assert not transform.training and transform.train().training
