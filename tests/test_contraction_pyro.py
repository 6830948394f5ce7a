# SPDX-License-Identifier: Apache-2.0
"""Residual and implicit transforms in use: contexts, draws, densities, models, and what is said where solving fails."""

import copy
import pickle
import warnings

import cloudpickle
import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import nn as enn
from pyro.distributions import ConditionalTransformedDistribution, TransformedDistribution

import pyro_equiflow as pe
from pyro_equiflow import testing
from pyro_equiflow.logdet import Exact, RussianRoulette
from pyro_equiflow.ops.events import act, grid_elements
from pyro_equiflow.solvers import FixedPoint, ImplicitAdjoint
from pyro_equiflow.transforms import contraction
from tests.cases import events, field_type, randomize
from tests.test_contraction import FACTORIES, every_kind, solved

TWINS = {"residual": pe.conditional_equivariant_residual, "implicit": pe.conditional_equivariant_implicit}


def conditional(kind, name, *fields, **options):
    """A twin with random weights, the type of its contexts, and events of its own."""
    type_ = field_type(name)
    context_type = enn.FieldType(type_.gspace, list(fields or type_.representations[:2]))
    options = {"hidden_dims": (12,), "identity_init": False, "log_det": Exact(), "lipschitz": 0.7, **options}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return randomize(TWINS[kind](type_, context_type, **options)), context_type


def normal(type_, spatial=(), dtype=torch.float32):
    zeros = torch.zeros(type_.size, *spatial, dtype=dtype)
    return dist.Normal(zeros, 1.0).to_event(zeros.dim())


# ---- contexts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("invariant", [False, True], ids=["transforming", "invariant"])
@pytest.mark.parametrize("name", ["C4", "O2", "SO3", "C4-plane"])
@every_kind
def test_the_law_of_conditional_twins(kind, name, invariant):
    """T(g x | g c) = g T(x | c), forwards, backwards, and for log-dets."""
    fields = 2 * [field_type(name).gspace.trivial_repr] if invariant else ()
    transform, context_type = conditional(kind, name, *fields)
    transform.double()
    type_ = transform.field_type
    x = events(f"{kind}-{name}", (3,), torch.float64)
    context = torch.randn(3, context_type.size, *x.shape[2:], dtype=torch.float64)
    plane = bool(x.shape[2:])
    # A context without a grid is spread evenly over it, and turns with the group all the same.
    vector = torch.randn(3, context_type.size, dtype=torch.float64)
    vector_type = enn.FieldType(type_.gspace, context_type.representations)
    for c in [context, *([vector] if plane else [])]:
        given = transform.condition(c)
        outcomes = [given.call_and_ladj(x), given.inverse_and_ladj(x)]
        moved = 0.0
        for g in list(grid_elements(type_))[:8]:
            if c is context:
                turned = act(context_type, g, c)
            else:
                matrix = torch.as_tensor(vector_type.representation(g), dtype=torch.float64)
                turned = c @ matrix.T
            other = transform.condition(turned)
            for (y, ladj), ask in zip(outcomes, (other.call_and_ladj, other.inverse_and_ladj)):
                found, found_ladj = ask(act(type_, g, x))
                torch.testing.assert_close(found, act(type_, g, y), rtol=1e-8, atol=1e-8)
                torch.testing.assert_close(found_ladj, ladj, rtol=1e-8, atol=1e-8)
            moved = max(moved, float((other(x) - outcomes[0][0]).detach().abs().max()))
        assert invariant or moved > 1e-4  # the context matters
        testing.assert_inverse(given, x, tolerance=1e-9)
    testing.assert_log_det(transform.condition(context[0]), x[:1], tolerance=1e-9)
    elsewhere = transform.condition(context + 1)(x)
    assert (elsewhere - transform.condition(context)(x)).abs().max() > 1e-3


@every_kind
def test_a_context_leaves_the_bound_alone(kind):
    """The constant is that in the event: a context's weights are free, and far contexts solve as near ones do."""
    transform, context_type = conditional(kind, "O2", lipschitz=0.9)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.mul_(30)
    assert transform.transform.lipschitz_bound() <= 0.9
    x = events(f"{kind}-O2", (20,))
    given = transform.condition(100 * torch.randn(20, context_type.size))
    if kind == "residual":
        jacobian = torch.autograd.functional.jacobian(lambda e: given(e.clone()).sum(0), x).movedim(1, 0)
        slopes = torch.linalg.matrix_norm(jacobian - torch.eye(8), 2)
        assert 0.1 < slopes.max() <= 0.9 + 1e-5
    solution = given.inverse_solution(given(x).detach())
    assert solution.converged.all()


@every_kind
def test_contexts_and_events_broadcast(kind):
    transform, context_type = conditional(kind, "O2")
    transform.double()
    x = events(f"{kind}-O2", (2, 3), torch.float64)
    for shape in [(), (3,), (2, 3), (2, 1)]:
        context = torch.randn(*shape, context_type.size, dtype=torch.float64)
        given, whole = transform.condition(context), context.expand(2, 3, -1)
        for ask in ("call_and_ladj", "inverse_and_ladj"):
            y, ladj = getattr(given, ask)(x)
            one, one_ladj = getattr(transform.condition(whole[1, 2]), ask)(x[1, 2])
            torch.testing.assert_close(y[1, 2], one, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(ladj[1, 2], one_ladj, rtol=1e-9, atol=1e-9)
    many = transform.condition(torch.randn(4, 5, context_type.size, dtype=torch.float64))
    y, ladj = many.inverse_and_ladj(x[0, 0])
    assert y.shape == (4, 5, 8) and ladj.shape == (4, 5)
    assert many.inverse_solution(x[0, 0]).error.shape == (4, 5)


@pytest.mark.parametrize("wrap", [torch.Tensor.clone, torch.nn.Parameter], ids=["tensor", "Parameter"])
@every_kind
def test_two_contexts_do_not_mix(kind, wrap):
    transform, context_type = conditional(kind, "O2")
    transform.double()
    x = events(f"{kind}-O2", (3,), torch.float64)
    names = [name for name, _ in transform.named_parameters()]
    contexts = [wrap(torch.randn(3, context_type.size, dtype=torch.float64)) for _ in range(2)]
    first = transform.condition(contexts[0])
    y = first(x)
    second = transform.condition(contexts[1])
    z = second(x)
    assert not torch.allclose(y, z)
    assert first.inv(y) is x and second.inv(z) is x
    for given, image in ((first, y), (second, z)):
        torch.testing.assert_close(given.inv(image.clone()), x, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(first.inv(z.clone()), x)
    assert [name for name, _ in transform.named_parameters()] == names


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@every_kind
def test_a_context_changed_in_place_is_another_context(kind, grad):
    """The pass kept from before answers no more."""
    transform, context_type = conditional(kind, "O2")
    context = torch.randn(3, context_type.size)
    given = transform.condition(context)
    with torch.set_grad_enabled(grad):
        y = given(events(f"{kind}-O2", (3,)))
        context.add_(1.0)
        found, ladj = given.inverse_and_ladj(y)
        wanted, wanted_ladj = given.inverse_and_ladj(y.clone())
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ladj, wanted_ladj)


@pytest.mark.parametrize("name", ["C4", "SO2"])
@every_kind
def test_gradients_of_a_context(kind, name):
    """Both directions and the log-det, with respect to a context and an event; one context for two events too."""
    transform, context_type = conditional(kind, name, hidden_dims=(6,), tolerance=1e-13)
    transform.double()
    x = events(f"{kind}-{name}", (2,), torch.float64).requires_grad_()
    for shape in [(2,), (), (3, 1)]:
        context = torch.randn(*shape, context_type.size, dtype=torch.float64, requires_grad=True)
        for ask in ("call_and_ladj", "inverse_and_ladj"):
            assert torch.autograd.gradcheck(
                lambda c, x, ask=ask: getattr(transform.condition(c), ask)(x.clone()), (context, x), fast_mode=True
            )


@every_kind
def test_conditional_distributions(kind):
    transform, context_type = conditional(kind, "O2")
    transform.double()
    type_ = transform.field_type
    flow = ConditionalTransformedDistribution(normal(type_, dtype=torch.float64), [transform])
    context = torch.randn(4, context_type.size, dtype=torch.float64, requires_grad=True)
    x = flow.condition(context).rsample()
    log_prob = flow.condition(context).log_prob(x)
    assert log_prob.shape == (4,)
    for g in list(grid_elements(type_))[:6]:
        moved = flow.condition(act(context_type, g, context)).log_prob(act(type_, g, x))
        torch.testing.assert_close(moved, log_prob, rtol=1e-9, atol=1e-9)
    # A context learnt by gradient descent on the density of data.
    data = x.detach()
    learnt = torch.nn.Parameter(torch.zeros_like(context))
    optimizer = torch.optim.Adam([learnt], lr=0.1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = -flow.condition(learnt).log_prob(data).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.grad is not None for p in transform.parameters())


@every_kind
def test_copies_of_conditional_twins(kind):
    transform, context_type = conditional(kind, "O2")
    context, x = torch.randn(3, context_type.size), events(f"{kind}-O2", (3,))
    given = transform.condition(context)
    expected = given(x).detach()
    twins = [
        copy.deepcopy(transform),
        pickle.loads(pickle.dumps(transform)),
        pickle.loads(cloudpickle.dumps(transform)),
    ]
    for twin in twins:
        torch.testing.assert_close(twin.condition(context)(x), expected, rtol=0, atol=0)
        testing.assert_inverse(twin.condition(context), x)
    for twin in (copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    names = {name for name, _ in transform.named_parameters()}
    for mode in (True, False):
        transform.train(mode)
        assert set(transform.state_dict()) == {*names, "transform._extra_state"}
    fresh, _ = conditional(kind, "O2", identity_init=True)
    fresh.eval().load_state_dict(transform.state_dict())
    torch.testing.assert_close(fresh.condition(context)(x), expected, rtol=0, atol=0)


# ---- draws and densities --------------------------------------------------------------------------------------


class Counted:
    """An exact estimator that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return Exact()(*args, **kwargs)


def draws_from(kind, conditioned, estimator):
    if conditioned:
        transform, context_type = conditional(kind, "O2", log_det=estimator)
        transform.double()
        return transform.condition(torch.randn(3, context_type.size, dtype=torch.float64))
    return solved(kind, field_type("O2"), lipschitz=0.7, log_det=estimator).double()


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("conditioned", [False, True], ids=["plain", "conditioned"])
@every_kind
def test_draws_nobody_scores_ask_for_no_log_det(kind, conditioned, backwards):
    estimator = Counted()
    transform = draws_from(kind, conditioned, estimator)
    flow = TransformedDistribution(
        normal(transform.field_type, dtype=torch.float64), [transform.inv if backwards else transform]
    )
    with torch.no_grad():
        draw = flow.rsample((3,))
        assert estimator.calls == 0
        scored = flow.log_prob(draw)
        asked = estimator.calls
        assert asked == (1 if kind == "residual" else 2)
        torch.testing.assert_close(flow.log_prob(draw), scored, rtol=0, atol=0)
        assert estimator.calls == asked
        torch.testing.assert_close(flow.log_prob(draw.clone()), scored, rtol=1e-9, atol=1e-9)
    # With gradients wanted the pass is made anew.
    flow.log_prob(draw).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in transform.parameters())
    assert flow.sample((3,)).shape == (3, *flow.batch_shape, 8)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_draw_made_in_training_is_scored_by_the_mode_of_the_day(grad):
    transform = solved("residual", field_type("O2"), lipschitz=0.7, log_det=RussianRoulette())
    flow = TransformedDistribution(normal(transform.field_type), [transform])
    with torch.set_grad_enabled(grad):
        draw = flow.rsample((3,))
        flow.log_prob(draw)
        transform.eval()
        torch.testing.assert_close(flow.log_prob(draw), flow.log_prob(draw.clone()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrap", [lambda t: t.inv, pe.Inverse], ids=["inv", "Inverse"])
def test_densities_under_the_inverse_of_a_residual_need_no_solver(wrap, monkeypatch):
    """Maximum likelihood on data: forward passes alone, 20 steps of it."""
    transform = solved("residual", field_type("O2"), lipschitz=0.9, hidden_dims=(16,))
    flow = TransformedDistribution(normal(transform.field_type), [wrap(transform)])

    def unwanted(*args, **kwargs):
        raise AssertionError("a solver was called")

    monkeypatch.setattr(contraction, "fixed_point", unwanted)
    data = 0.4 * events("residual-O2", (64,))
    optimizer = torch.optim.Adam(transform.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = -flow.log_prob(data).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(AssertionError, match="a solver was called"):
        flow.sample((2,))
    monkeypatch.undo()
    assert flow.sample((2,)).shape == (2, 8)


@every_kind
def test_as_a_prior_in_a_model(kind):
    """A flow of draws inside a model, learnt with a guide beside it."""
    prior = solved(kind, field_type("O2"), identity_init=True)
    base = normal(prior.field_type)

    def model(data):
        pyro.module("prior", prior)
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", TransformedDistribution(base, [prior]))
            pyro.sample("x", dist.Normal(z, 0.3).to_event(1), obs=data)

    def guide(data):
        loc = pyro.param("loc", torch.zeros_like(data))
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(loc, 0.3).to_event(1))

    data = 2.0 * events(f"{kind}-O2", (20,))
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), pyro.infer.Trace_ELBO())
    losses = [svi.step(data) for _ in range(25)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(p.grad is None or p.grad.isfinite().all() for p in prior.parameters())
    assert pyro.infer.Predictive(model, guide=guide, num_samples=3)(data)["z"].shape == (3, 20, 8)


# ---- where solving fails ------------------------------------------------------------------------------------


@every_kind
def test_not_converged(kind):
    """The message says steps, worst residual, how many samples, and what to change."""
    transform = solved(kind, field_type("O2"), lipschitz=0.95, max_steps=1).double()
    x = events(f"{kind}-O2", (5,), torch.float64)
    message = (
        r"5 of 5 samples \(first: 0\) did not converge in 1 steps: worst residual \d\.\d+e[-+]\d+, "
        r"certified error .* Raise max_steps or tolerance, use float64, a smaller Lipschitz coefficient"
    )
    flow = TransformedDistribution(normal(transform.field_type, dtype=torch.float64), [transform])
    asks = [transform.inv, transform.inverse_solution, flow.log_prob]
    if kind == "implicit":
        asks += [transform, transform.forward_solution]
    for ask in asks:
        with pytest.raises(pe.ConvergenceError, match=message):
            ask(x)
    transform.on_failure = "warn"
    with pytest.warns(RuntimeWarning, match=message):
        assert transform.inv(x).shape == x.shape
    transform.on_failure = "ignore"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert transform.inv(x.clone()).isfinite().all()
        solution = transform.inverse_solution(x)
    assert not solution.converged.any() and (solution.steps == 1).all()
    transform.max_steps = None
    assert (norms_of(solution.value - transform.inv(x.clone())) <= solution.error).all()


def norms_of(x):
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.float64)


@every_kind
def test_a_backward_that_does_not_converge(kind):
    transform = solved(kind, field_type("O2"), lipschitz=0.95, adjoint=ImplicitAdjoint(max_steps=1))
    x = transform.inv(events(f"{kind}-O2", (5,)))
    with pytest.raises(pe.ConvergenceError, match="5 of 5 samples .* did not converge in 1 steps"):
        x.sum().backward()


@every_kind
def test_an_error_leaves_no_half_answer(kind):
    transform = solved(kind, field_type("O2"), lipschitz=0.9)
    y = transform(events(f"{kind}-O2", (5,)))
    expected = transform.inv(y.clone()).detach()
    transform.max_steps = 1
    with pytest.raises(pe.ConvergenceError):
        transform.inv(y.clone())
    transform.max_steps = None
    torch.testing.assert_close(transform.inv(y.clone()), expected, rtol=0, atol=0)


@every_kind
def test_solvers_and_tolerances_reach_the_solution(kind):
    x = events(f"{kind}-O2", (5,), torch.float64)
    steps = {}
    for solver in (None, FixedPoint()):
        for tolerance in (1e-3, 1e-9):
            transform = solved(kind, field_type("O2"), lipschitz=0.9, solver=solver, tolerance=tolerance).double()
            solution = transform.inverse_solution(x)
            assert (solution.error <= tolerance * norms_of(solution.value).clamp(min=1)).all()
            steps[solver, tolerance] = int(solution.steps.max())
    assert steps[None, 1e-3] < steps[None, 1e-9] < steps[FixedPoint(), 1e-9]


@every_kind
def test_a_tolerance_below_rounding(kind):
    transform = solved(kind, field_type("O2"), lipschitz=0.9, tolerance=1e-12)
    with pytest.raises(ValueError, match="tolerance: expected above .* raise it or use float64"):
        transform.inv(events(f"{kind}-O2", (2,)))
    assert FACTORIES[kind] in (pe.equivariant_residual, pe.equivariant_implicit)
