# SPDX-License-Identifier: Apache-2.0
"""Every transform under torch.func, in both directions, against torch.autograd on one event after another."""

from __future__ import annotations

import copy

import pytest
import torch
from escnn import group, gspaces
from escnn import nn as enn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import pyro_equiflow as pe
from pyro_equiflow import logdet
from pyro_equiflow.solvers import FixedPoint, ImplicitAdjoint, UnrolledAdjoint, fixed_point
from tests.cases import CASES, ONE_OF_EACH, events, field_type, make, randomize

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own

SOLVED = ["residual", "implicit"]
directions = pytest.mark.parametrize("inverted", [False, True], ids=["forwards", "backwards"])


def scored(transform, inverted):
    """A number of an event, which takes the image and the log-det."""
    function = transform.inv if inverted else transform

    def score(x):
        y = function(x)
        return y.square().sum() + function.log_abs_det_jacobian(x, y).sum()

    return function, score


def _close(found, expected, tolerance=1e-8):
    torch.testing.assert_close(found, expected.detach(), rtol=tolerance, atol=tolerance)


# ---- every kind -----------------------------------------------------------------------------------------------------


@directions
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_every_kind(case, inverted):
    """Batches, Jacobians' products, gradients and products with Hessians, the three ways torch.func takes them."""
    transform = CASES[case]().double()
    function, score = scored(transform, inverted)
    x, tangent = (events(case, (2,), torch.float64, seed) for seed in (0, 5))
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    (pulled,) = torch.autograd.grad(y, leaf, tangent)
    (slope,) = torch.autograd.grad(score(leaf), leaf, create_graph=True)
    (curved,) = torch.autograd.grad(slope, leaf, tangent)
    _close(vmap(function)(x), y)
    _close(vjp(function, x)[1](tangent)[0], pulled)
    _close(vmap(grad(score))(x), slope)
    # Forward mode: <J t, t> = <t, J^T t>.
    moved = jvp(function, (x,), (tangent,))[1]
    _close((moved * tangent).sum(), (tangent * pulled).sum())
    if case.endswith("plane") and "residual" not in case:
        return  # one grid says it, and takes its time
    products = {
        "forward over reverse": lambda x, t: jvp(grad(score), (x,), (t,))[1],
        "reverse over reverse": lambda x, t: grad(lambda x: (grad(score)(x) * t).sum())(x),
        "reverse over forward": lambda x, t: grad(lambda x: jvp(score, (x,), (t,))[1])(x),
    }
    for product in products.values():
        _close(vmap(product)(x, tangent), curved)
    twice = vmap(lambda x, t: jvp(lambda x: jvp(score, (x,), (t,))[1], (x,), (t,))[1])(x, tangent)
    _close(twice, (curved * tangent).flatten(1).sum(1))


@directions
@pytest.mark.parametrize("kind", SOLVED)
def test_jacobians_and_hessians_of_batches(kind, inverted):
    function, score = scored(make(kind, "SO2").double(), inverted)
    x = events(f"{kind}-SO2", (3,), torch.float64)
    expected = torch.stack([torch.autograd.functional.jacobian(function, event) for event in x])
    for jacobian in (jacrev, jacfwd):
        _close(vmap(jacobian(function))(x), expected)
    expected = torch.stack([torch.autograd.functional.hessian(score, event) for event in x])
    for second in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacfwd(f))):
        _close(vmap(second(score))(x), expected)


# ---- weights --------------------------------------------------------------------------------------------------------


class Score(torch.nn.Module):
    def __init__(self, transform, inverted):
        super().__init__()
        self.transform, self.inverted = transform, inverted

    def forward(self, x):
        return scored(self.transform, self.inverted)[1](x)


@directions
@pytest.mark.parametrize("kind", ["coupling", *SOLVED])
def test_gradients_a_sample_and_ensembles(kind, inverted):
    """By vmap over events, over members, over both, against one backward pass each."""
    one = Score(make(kind, "SO2").double(), inverted)
    other = copy.deepcopy(one)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    members, x = [one, other], events(f"{kind}-SO2", (3,), torch.float64)

    def loss(parameters, buffers, x):
        return functional_call(one, (parameters, buffers), (x,))

    parameters, buffers = stack_module_state(members)
    names = list(parameters)

    def expected(member, x):
        return dict(zip(names, torch.autograd.grad(member(x), list(member.parameters()))))

    own = dict(one.named_parameters()), dict(one.named_buffers())
    found = vmap(grad(loss), in_dims=(None, None, 0))(*own, x)
    for i, event in enumerate(x):
        for name, gradient in expected(one, event).items():
            _close(found[name][i], gradient)
    _close(vmap(loss, in_dims=(0, 0, None))(parameters, buffers, x), torch.stack([m(x) for m in members]))
    found = vmap(grad(loss), in_dims=(0, 0, None))(parameters, buffers, x)
    by_event = vmap(vmap(grad(loss), in_dims=(None, None, 0)), in_dims=(0, 0, None))(parameters, buffers, x)
    by_member = vmap(vmap(grad(loss), in_dims=(0, 0, None)), in_dims=(None, None, 0))(parameters, buffers, x)
    for i, member in enumerate(members):
        for name, gradient in expected(member, x).items():
            _close(found[name][i], gradient)
        for j, event in enumerate(x):
            for name, gradient in expected(member, event).items():
                _close(by_event[name][i, j], gradient)
                _close(by_member[name][j, i], gradient)


@directions
@pytest.mark.parametrize("kind", SOLVED)
def test_contexts(kind, inverted):
    """One context a row, and derivatives with respect to it."""
    space = gspaces.no_base_space(group.so2_group())
    event, context_type = (enn.FieldType(space, fields * [space.irrep(1)]) for fields in (2, 1))
    family = getattr(pe, f"conditional_equivariant_{kind}")(
        event, context_type, hidden_dims=(8,), identity_init=False
    ).double()
    x, context = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)

    def score(x, context):
        return scored(family.condition(context), inverted)[1](x)

    found = vmap(grad(score, argnums=(0, 1)))(x, context)
    for i in range(3):
        leaves = [t[i].clone().requires_grad_() for t in (x, context)]
        for slope, expected in zip(found, torch.autograd.grad(score(*leaves), leaves)):
            _close(slope[i], expected)
    step, tangent = 1e-5, torch.randn_like(context)
    numeric = (score(x, context + step * tangent) - score(x, context - step * tangent)) / (2 * step)
    _close(jvp(lambda c: score(x, c), (context,), (tangent,))[1], numeric, 1e-6)


# ---- settings -------------------------------------------------------------------------------------------------------


@directions
@pytest.mark.parametrize("kind", SOLVED)
def test_single_precision(kind, inverted):
    transform = make(kind, "SO2")
    function, score = scored(transform, inverted)
    x = events(f"{kind}-SO2", (4,))
    wide, wide_score = scored(copy.deepcopy(transform).double(), inverted)
    leaf = x.double().requires_grad_()
    _close(vmap(function)(x).double(), wide(leaf), 1e-5)
    _close(vmap(grad(score))(x).double(), torch.autograd.grad(wide_score(leaf), leaf)[0], 1e-4)


@pytest.mark.parametrize(
    "adjoint", [ImplicitAdjoint(solver=FixedPoint()), UnrolledAdjoint()], ids=["plain", "unrolled"]
)
def test_adjoints(adjoint):
    transform = make("implicit", "SO2").double()
    x = events("implicit-SO2", (2,), torch.float64)
    expected = vmap(jacrev(transform.inv))(x)
    transform.adjoint = adjoint
    for jacobian in (jacrev, jacfwd):
        _close(vmap(jacobian(transform.inv))(x), expected)


@pytest.mark.parametrize(
    "estimator", [logdet.Exact(rows=3), logdet.PowerSeries(terms=6, probes=None), logdet.PowerSeries(probes=2)], ids=str
)
def test_fixed_estimators(estimator):
    """Values as without torch.func, gradients those of the values."""
    transform = make("residual", "SO2").double().eval()
    transform.log_det = estimator
    x = events("residual-SO2", (3,), torch.float64)

    def ladj(x):
        return transform.log_abs_det_jacobian(x, transform(x))

    _close(vmap(ladj)(x), ladj(x))
    step, tangent = 1e-5, torch.randn_like(x)
    numeric = (ladj(x + step * tangent) - ladj(x - step * tangent)) / (2 * step)
    _close((vmap(grad(ladj))(x) * tangent).sum(1), numeric, 1e-7)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_roulette(randomness):
    """Unbiased in value, gradient and second derivatives: means over draws against Exact, within 5 standard errors."""
    kind = field_type("flips")
    transform = randomize(pe.equivariant_residual(kind, hidden_dims=(8,), lipschitz=0.5)).double()
    x, tangent = (events("residual-flips", (), torch.float64, seed) for seed in (0, 5))

    def found(x):
        def ladj(x):
            return transform.log_abs_det_jacobian(x, transform(x))

        return ladj(x), (grad(ladj)(x) * tangent).sum(), (jvp(grad(ladj), (x,), (tangent,))[1] * tangent).sum()

    expected = found(x)
    transform.log_det = logdet.RussianRoulette(exact_terms=1)
    # Under torch.func all of a batch draw the same number of terms, so batches are drawn as well.
    draws = [vmap(found, randomness=randomness)(x.expand(20, -1)) for _ in range(60)]
    for draw, exact in zip(zip(*draws), expected):
        means = torch.stack(draw).mean(1)
        assert means.std() > 0
        assert (means.mean() - exact).abs() < 5 * means.std() / len(draws) ** 0.5
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(found)(x.expand(2, -1))


# ---- the fixed point by itself --------------------------------------------------------------------------------------


def test_derivatives_of_a_closed_form():
    """x = a x + b: to the third order in a, forward and reverse mode in every order; a batch over a, and over both."""
    a, b = torch.tensor([0.5, 0.2, -0.3], dtype=torch.float64), torch.tensor([[2.0], [3.0]], dtype=torch.float64)

    def root(a):
        return fixed_point(lambda x, a, b: a * x + b, b, (a, b), lipschitz=0.5, batched=(False, True))[0].sum()

    derivative, expected = root, 5 / (1 - a)
    for order in range(4):
        _close(vmap(derivative)(a), expected)
        derivative = (jacfwd, grad, jacfwd)[order % 3](derivative)
        expected = (order + 1) * expected / (1 - a)

    def of_both(a, b):
        return fixed_point(lambda x, a, b: a * x + b, b, (a, b), lipschitz=0.5, batched=(False, True))[0]

    found = vmap(vmap(of_both, in_dims=(None, 0)), in_dims=(0, None))(a, b[:, None])
    _close(found[..., 0, 0], b.T / (1 - a[:, None]))
    # The certificate is one of each row.
    solution = vmap(
        lambda a: fixed_point(lambda x, a: a * x + b, b, (a,), lipschitz=0.5)[1],
    )(a)
    assert solution.converged.shape == solution.steps.shape == (3, 2) and solution.converged.all()
    assert ((solution.value - b / (1 - a[:, None, None]))[..., 0].abs() <= solution.error).all()


def test_small_upstreams_keep_their_digits():
    """Linear systems are solved relative to their right-hand side."""
    a, b = torch.tensor(0.9, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)

    def root(a):
        return fixed_point(lambda x, a, b: a * x.sin() + b, b, (a, b), lipschitz=0.9, batched=(False, True))[0].sum()

    for scale in (1e-200, 1e-20, 1e20):
        found = grad(lambda a, scale=scale: scale * root(a))(a)
        torch.testing.assert_close(found / scale, grad(root)(a), rtol=1e-10, atol=0)


def test_hidden_tensors_are_refused():
    """What a map closes over would lose its derivatives, or fail inside torch: a tensor, a module's parameter."""
    b, a = torch.ones(3, 2), torch.tensor(0.5)

    def root(a):
        return fixed_point(lambda x: a * x + b, b, (), lipschitz=0.5)[0].sum()

    for derivative in (grad(root), jacfwd(root), lambda a: vmap(root)(a.expand(2))):
        with pytest.raises(RuntimeError, match="phi: expected a map of x and tensors alone under torch.func"):
            derivative(a)
    layer = torch.nn.Linear(2, 2)

    def of_module(parameters):
        def phi(x):
            return 0.1 * functional_call(layer, parameters, (x,))

        return fixed_point(phi, b, (), lipschitz=0.5)[0].sum()

    with pytest.raises(RuntimeError, match="pass it among tensors"):
        grad(of_module)(dict(layer.named_parameters()))


@pytest.mark.parametrize("kind", SOLVED)
def test_failures_are_said(kind):
    transform = make(kind, "SO2")
    transform.max_steps = 1
    with pytest.raises(pe.ConvergenceError, match="3 of 3 samples .* did not converge"):
        vmap(transform.inv)(events(f"{kind}-SO2", (3,)))


@pytest.mark.parametrize("kind", SOLVED)
def test_dual_numbers_are_refused(kind):
    """By themselves they would lose the tangents of log-dets and roots; in torch.func they do not."""
    transform, x = make(kind, "SO2"), events(f"{kind}-SO2", (2,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        for function in (transform.call_and_ladj, transform.inverse_and_ladj):
            with pytest.raises(NotImplementedError, match=r"expected forward mode by torch\.func\.jvp or jacfwd"):
                function(dual)
        value = forward_ad.unpack_dual(make("coupling", "SO2")(dual)).tangent
    assert value is not None
