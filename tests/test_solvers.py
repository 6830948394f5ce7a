# SPDX-License-Identifier: Apache-2.0
"""Solvers and adjoints: certified errors, samples that leave each other alone, gradients of every order."""

import warnings
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from pyro_equiflow.errors import ConvergenceError
from pyro_equiflow.ops.dense import solve_definite
from pyro_equiflow.solvers import (
    Adjoint,
    Anderson,
    DenseAdjoint,
    FixedPoint,
    ImplicitAdjoint,
    Solution,
    Solver,
    UnrolledAdjoint,
    fixed_point,
)

SOLVERS = {"fixed point": FixedPoint(), "anderson": Anderson(), "anderson, memory 1": Anderson(memory=1)}
LIPSCHITZ = (0.5, 0.9, 0.99)
DTYPES = (torch.float64, torch.float32)
ADJOINTS = {"implicit": ImplicitAdjoint(), "dense": DenseAdjoint()}


@pytest.fixture(params=SOLVERS.values(), ids=SOLVERS.keys())
def solver(request):
    return request.param


def _unit(matrix):
    return matrix / torch.linalg.matrix_norm(matrix, 2, keepdim=True)


def _tanh_weights(dtype=torch.float64, size=6, hidden=16, seed=0):
    """A tanh net of Lipschitz constant at most 1, close to it at 0: layers of orthonormal rows or columns."""
    generator = torch.Generator().manual_seed(seed)
    frame, _ = torch.linalg.qr(torch.randn(hidden, size, dtype=torch.float64, generator=generator))
    bias = 0.1 * torch.randn(hidden, dtype=torch.float64, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return frame.to(dtype), bias.to(dtype), (turn @ frame.T).to(dtype)


def _tanh_net(x, first, bias, second):
    return torch.tanh(x @ first.T + bias) @ second.T


def _residual_inverse(c):
    """The map whose fixed point inverts ``y = x + c net(x)``."""
    return lambda x, y, *weights: y - c * _tanh_net(x, *weights)


def _rows(y, index):
    return y if index is None else y[index]


# Tables of solver x problem


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", LIPSCHITZ)
def test_linear_maps_meet_their_closed_form(solver, c, dtype):
    a = c * _unit(torch.randn(5, 5, dtype=torch.float64)).to(dtype)
    b = 3 * torch.randn(20, 5, dtype=dtype)
    # float32 weights are the problem's; its exact solution is taken in float64.
    exact = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - a.double(), b.double().T).T
    solution = solver.solve(lambda x, index: x @ a.T + _rows(b, index), torch.zeros_like(b), lipschitz=c)
    assert solution.converged.all()
    assert solution.value.dtype == dtype and solution.error.dtype == solution.residual.dtype == torch.float64
    assert ((solution.value.double() - exact).norm(dim=1) <= solution.error).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", LIPSCHITZ)
def test_round_trips_meet_their_certified_error(solver, c, dtype):
    weights = _tanh_weights(dtype)
    x = torch.randn(60, 6, dtype=dtype)
    exact_weights = [w.double() for w in weights]
    y = x.double() + c * _tanh_net(x.double(), *exact_weights)
    # The datum is what float32 holds of it; its root, solved in float64, is the reference.
    y = y.to(dtype)
    root = FixedPoint().solve(
        lambda z, i: _rows(y.double(), i) - c * _tanh_net(z, *exact_weights), y.double(), lipschitz=c, tolerance=1e-12
    )
    solution = solver.solve(lambda z, i: _rows(y, i) - c * _tanh_net(z, *weights), y, lipschitz=c)
    error = (solution.value.double() - root.value).norm(dim=1)
    scale = root.value.norm(dim=1).clamp(min=1)
    assert (error <= solution.error + root.error).all()
    if dtype == torch.float64:
        assert (solution.error <= 1e-9).all()
        assert ((solution.value - x).norm(dim=1) <= solution.error + 1e-13).all()
    else:
        # Rounding alone leaves a certified 2 eps / (1 - c), 2.4e-5 for c = .99: there only the true error of the
        # default solver is below 1e-5 (plain steps and a short memory leave all of theirs on slow modes).
        assert c == 0.99 or (solution.error <= 1.001e-5 * scale).all()
        assert (error <= (1e-5 if c < 0.99 or solver == Anderson() else 1e-4) * scale).all()


@pytest.mark.parametrize("c", LIPSCHITZ)
def test_what_is_reported_is_measured_at_the_value(solver, c):
    weights, y = _tanh_weights(), torch.randn(30, 2, 3, dtype=torch.float64)

    def phi(x, index):
        return _rows(y, index) - c * _tanh_net(x.flatten(1), *weights).reshape(x.shape)

    for tolerance in (1e-3, 1e-8):
        solution = solver.solve(phi, y, lipschitz=c, tolerance=tolerance)
        assert isinstance(solution, Solution) and solution.value.shape == y.shape
        residual = (phi(solution.value, None) - solution.value).flatten(1).norm(dim=1)
        torch.testing.assert_close(solution.residual, residual, rtol=1e-6, atol=1e-14)
        scale = solution.value.flatten(1).norm(dim=1).clamp(min=1)
        assert (solution.error >= residual / (1 - c) - 1e-13).all()
        assert (solution.error <= tolerance * scale * (1 + 1e-12)).all()


def test_a_residual_of_zero_claims_no_exact_root(solver):
    solution = solver.solve(lambda x, index: torch.full_like(x, 1 / 3), torch.zeros(4, 3), lipschitz=0.5)
    assert (solution.residual == 0).all() and (solution.error > 0).all()


def test_tolerance_is_relative_above_one_and_absolute_below(solver):
    size = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6], dtype=torch.float64)[:, None]
    solution = solver.solve(lambda x, i: 0.9 * x + 0.1 * _rows(size, i), torch.zeros_like(size), lipschitz=0.9)
    assert ((solution.value - size).abs() <= 1e-10 * size.clamp(min=1)).all()


# Samples leave each other alone


def _varied(seed=0, dtype=torch.float64):
    """A map by elementwise operations (they round a sample alike in any batch), a constant for each sample."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.tensor([0.1, 0.99, 0.3, 0.98, 0.2, 0.0], dtype=dtype)[:, None]
    y = torch.randn(6, 7, generator=generator, dtype=dtype)
    return lambda x, i: _rows(y, i) - _rows(strength, i) * torch.sin(x.roll(1, 1) - 0.3), y, strength


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hard_sample_leaves_easy_ones_bit_identical(solver, dtype):
    phi, y, _ = _varied(dtype=dtype)
    together = solver.solve(phi, y, lipschitz=0.99)
    assert together.steps.max() > 3 * together.steps.min()
    for i in range(len(y)):
        one = torch.tensor([i])
        alone = solver.solve(lambda x, index, one=one: phi(x, one), y[i : i + 1], lipschitz=0.99)
        for field, whole in zip(alone, together):
            assert torch.equal(field, whole[i : i + 1])


def test_only_active_samples_are_evaluated(solver):
    phi, y, _ = _varied()
    seen = torch.zeros(len(y), dtype=torch.long)

    def counted(x, index):
        rows = torch.arange(len(y)) if index is None else index
        assert index is None or index.dtype == torch.long
        assert len(x) == len(rows)
        seen[rows] += 1
        return phi(x, index)

    solution = solver.solve(counted, y, lipschitz=0.99)
    assert torch.equal(seen, solution.steps)


@pytest.mark.parametrize("c", LIPSCHITZ)
def test_anderson_takes_fewer_evaluations(c):
    weights, y = _tanh_weights(), 0.3 * torch.randn(50, 6, dtype=torch.float64)
    steps = [
        s.solve(lambda x, i: _rows(y, i) - c * _tanh_net(x, *weights), y, lipschitz=c).steps.sum()
        for s in (Anderson(), FixedPoint())
    ]
    assert steps[0] < 0.9 * steps[1]


@pytest.mark.parametrize("c", [0.9, 0.98])
@pytest.mark.parametrize("fold", [torch.clone, torch.abs], ids=["rotation", "kinked"])
def test_anderson_never_needs_twice_what_the_contraction_guarantees(c, fold):
    # Five differences are of little use on rotations of many angles, and mislead on kinks.
    turn, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    b = torch.randn(30, 40, dtype=torch.float64)
    start = torch.zeros_like(b)
    solution = Anderson(regularization=0).solve(
        lambda x, i: c * fold(x) @ turn.T + _rows(b, i), start, lipschitz=c, tolerance=1e-9
    )
    first = (b.norm(dim=1) / (1e-9 * (1 - c))).log() / -torch.tensor(c, dtype=torch.float64).log()
    assert solution.converged.all() and (solution.steps <= 2 * first + 2).all()


def test_residuals_stay_below_the_guaranteed_ones():
    # Secants of a sawtooth mislead. Still the residual of step k is at most c^k of the first, two evaluations a step.
    c, target = 0.9, 3 * torch.randn(200, 2, dtype=torch.float64)
    norms = torch.full((400, 200), torch.nan, dtype=torch.float64)
    evaluations = iter(range(400))

    def phi(x, index):
        image = c * torch.asin(torch.sin(3 * x)) / 3 + _rows(target, index)
        norms[next(evaluations), slice(None) if index is None else index] = (image - x).norm(dim=1)
        return image

    Anderson().solve(phi, torch.zeros_like(target), lipschitz=c)
    best = norms.nan_to_num(torch.inf).cummin(0).values
    guaranteed = norms[0] * c ** (torch.arange(400, dtype=torch.float64)[:, None] // 2)
    assert ((best <= guaranteed + 1e-13) | norms.isnan()).all()


def test_a_tolerance_just_above_rounding_gets_the_steps_that_it_takes():
    """What the contraction has to shrink to is the room between the two, here a hundred millionth of either."""
    solver, c = FixedPoint(rounding=1e10), 0.99
    floor = solver.rounding * torch.finfo(torch.float64).eps / (1 - c)
    one = torch.ones(1, 1, dtype=torch.float64)
    solution = solver.solve(lambda x, index: -c * x, one, lipschitz=c, tolerance=floor * (1 + 1e-8))
    assert solution.steps > 3000 and solution.value.abs() < 1e-13


def test_default_tolerances_are_four_times_what_rounding_leaves():
    for c, rounding in ((0.5, 1.0), (0.5, 2.0), (0.9, 8.0), (0.99, 1.0)):
        left = rounding * torch.finfo(torch.float32).eps / (1 - c)
        assert Anderson(rounding=rounding).default_tolerance(torch.float32, c) == pytest.approx(4 * left)
        # Errors of 1 / (1 - c) steps with random signs.
        plain = FixedPoint(rounding=rounding).default_tolerance(torch.float32, c)
        assert plain == pytest.approx(max(4, (1 - c) ** -0.5) * left)
        assert Anderson(rounding=rounding).default_tolerance(torch.float64, c) == 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_added_counts_as_rounding(solver, dtype):
    """``a - a + 0.5 x + 1``: the root is 2, and not to be had nearer than long ``a`` round."""
    eps = torch.finfo(dtype).eps
    added = torch.tensor([[0.3], [18.0], [90.0]], dtype=dtype)

    def phi(x, index):
        return (0.5 * x + 1 + _rows(added, index)) - _rows(added, index)

    def solve(**options):
        return solver.solve(phi, torch.zeros(3, 1, dtype=dtype), lipschitz=0.5, scale=2 * added[:, 0], **options)

    solution = solve()
    assert solution.converged.all()
    assert ((solution.value.double() - 2).abs()[:, 0] <= solution.error).all()
    left = 2 * solver.rounding * eps * (2 + 2 * added[:, 0].double())
    assert (solution.error >= left * (1 - 1e-6)).all() and (solution.error <= 4 * left + 3e-12).all()
    # Asked for more than that, the long ones fail, and at once.
    options = {"tolerance": 40 * eps, "on_failure": "ignore"}
    strict = solve(**options)
    assert strict.converged.tolist() == [True, False, False] and strict.steps.max() < 80
    assert solve(strict=False, **options).converged.all()
    with pytest.raises(ConvergenceError, match="contexts and biases that are not far longer"):
        solve(tolerance=40 * eps)
    # The default gives way where rounding leaves 1e-4 at most, and no further.
    added *= 1e-4 / eps / added[2]
    assert solve(on_failure="ignore").converged.tolist() == [True, True, False]


def test_empty_batches_and_scalar_events(solver):
    empty = solver.solve(lambda x, index: 0.5 * x, torch.zeros(0, 3), lipschitz=0.5)
    assert empty.value.shape == (0, 3) and empty.steps.shape == (0,)
    scalar = solver.solve(lambda x, index: 0.5 * x + 1, torch.zeros(4, dtype=torch.float64), lipschitz=0.5)
    torch.testing.assert_close(scalar.value, torch.full((4,), 2.0, dtype=torch.float64))


def test_solvers_and_adjoints_do_not_change():
    for part, name in ((Anderson(), "memory"), (FixedPoint(), "rounding"), (ImplicitAdjoint(), "tolerance")):
        with pytest.raises(FrozenInstanceError):
            setattr(part, name, 3)


def test_interfaces_are_no_solvers():
    for interface in (Solver, Adjoint):
        with pytest.raises(TypeError, match="abstract"):
            interface()


# Failure


def test_not_converged_raises_warns_or_is_ignored(solver):
    phi, y, _ = _varied()
    with pytest.raises(ConvergenceError) as failure:
        solver.solve(phi, y, lipschitz=0.99, max_steps=4, tolerance=1e-9)
    for part in ("of 6 samples", "4 steps", "worst residual", "certified error", "tolerance=1.00e-09", "max_steps"):
        assert part in str(failure.value)
    with pytest.warns(RuntimeWarning, match="did not converge in 4 steps") as said:
        warned = solver.solve(phi, y, lipschitz=0.99, max_steps=4, tolerance=1e-9, on_failure="warn")
    assert said[0].filename == __file__  # the user's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignored = solver.solve(phi, y, lipschitz=0.99, max_steps=4, tolerance=1e-9, on_failure="ignore")
    for a, b in zip(warned, ignored):
        assert torch.equal(a, b)
    assert ignored.converged[5] and not ignored.converged[1]
    exact = FixedPoint().solve(phi, y, lipschitz=0.99)
    assert ((ignored.value - exact.value).norm(dim=1) <= ignored.error + exact.error).all()


@pytest.mark.parametrize("phi", [lambda x: x + 1, lambda x: x.exp() + 1], ids=["constant", "overflowing"])
def test_a_map_without_a_root_ends_in_an_error(solver, phi):
    with pytest.raises(ConvergenceError, match="check that lipschitz does bound the map"):
        solver.solve(lambda x, index: phi(x), torch.ones(3, 2), lipschitz=0.5)


def test_bad_arguments_say_so(solver):
    def solve(x0=None, phi=lambda x, index: 0.5 * x, lipschitz=0.5, **kwargs):
        return solver.solve(phi, torch.ones(3, 2) if x0 is None else x0, lipschitz=lipschitz, **kwargs)

    bad = torch.ones(3, 2)
    bad[1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"x0: expected finite values, found 1 of 3 samples \(first: 1\)"):
        solve(bad, phi=lambda x, index: pytest.fail("evaluated"))
    with pytest.raises(ValueError, match="phi: expected finite values at x0"):
        solve(phi=lambda x, index: x / 0)
    with pytest.raises(ValueError, match="phi: expected torch.float32 of shape"):
        solve(phi=lambda x, index: x[:, :1])
    with pytest.raises(ValueError, match="x0: expected float32 or float64"):
        solve(torch.ones(3, 2, dtype=torch.long))
    for lipschitz in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="lipschitz: expected"):
            solve(lipschitz=lipschitz)
    with pytest.raises(ValueError, match="tolerance: expected above .* raise it or use float64"):
        solve(tolerance=1e-9)
    with pytest.raises(ValueError, match="max_steps: expected"):
        solve(max_steps=0)
    with pytest.raises(ValueError, match="on_failure: expected"):
        solve(on_failure="print")
    with pytest.raises(ValueError, match="memory: expected"):
        Anderson(memory=0)
    with pytest.raises(ValueError, match="regularization: expected"):
        Anderson(regularization=-1.0)
    with pytest.raises(ValueError, match="rounding: expected"):
        FixedPoint(rounding=-1.0)
    with pytest.raises(ValueError, match=r"tensors\[0\]: expected 3 rows"):
        fixed_point(lambda x, b: x / 2 + b, torch.ones(3, 2), [torch.ones(2)], lipschitz=0.5, batched=[True])
    with pytest.raises(ValueError, match="batched: expected one flag for each of 1 tensors"):
        fixed_point(lambda x, b: x / 2 + b, torch.ones(3, 2), [torch.ones(2)], lipschitz=0.5, batched=[])


# Gradients

BATCHED = (True, False, False, False)
# gradcheck's differences divide the value's error by 2e-6: it takes values good to 1e-13.
TIGHT = {"tolerance": 1e-13}


def _leaves(batch=4, size=3):
    y = torch.randn(batch, size, dtype=torch.float64)
    return [t.clone().requires_grad_() for t in (y, *_tanh_weights(size=size, hidden=4))]


@pytest.mark.parametrize("adjoint", (ImplicitAdjoint(tolerance=1e-12), DenseAdjoint()), ids=ADJOINTS)
@pytest.mark.parametrize("c", LIPSCHITZ)
def test_gradcheck_in_weights_and_data(c, adjoint):
    tensors = _leaves()

    def solved(*tensors):
        x0 = tensors[0].detach()
        options = {"adjoint": adjoint, "tolerance": 1e-13 if c < 0.95 else 5e-13}
        return fixed_point(_residual_inverse(c), x0, tensors, lipschitz=c, batched=BATCHED, **options)[0]

    assert gradcheck(solved, tensors, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("adjoint", (ImplicitAdjoint(tolerance=1e-12), DenseAdjoint()), ids=ADJOINTS)
def test_double_backward_is_right(adjoint):
    tensors = _leaves(batch=2, size=2)

    def solved(*tensors):
        x0 = tensors[0].detach()
        return fixed_point(
            _residual_inverse(0.7), x0, tensors, lipschitz=0.7, batched=BATCHED, adjoint=adjoint, **TIGHT
        )[0]

    assert gradgradcheck(solved, tensors, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checked", ADJOINTS.values(), ids=ADJOINTS)
@pytest.mark.parametrize("c", LIPSCHITZ)
def test_gradients_agree_with_unrolled_ones(c, checked):
    tensors = _leaves(batch=10)
    # Unequal weights, over many magnitudes: each sample's gradient is its own.
    weight = torch.logspace(-6, 3, 10, dtype=torch.float64)[:, None] * torch.randn(10, 3, dtype=torch.float64)
    found = []
    for adjoint in (checked, UnrolledAdjoint()):
        value, solution = fixed_point(
            _residual_inverse(c),
            tensors[0].detach(),
            tensors,
            lipschitz=c,
            batched=BATCHED,
            adjoint=adjoint,
            **(TIGHT if c < 0.95 else {"tolerance": 5e-13}),
        )
        torch.testing.assert_close(value, solution.value, rtol=1e-11, atol=1e-11)
        found.append(grad((weight * value).sum(), tensors))
    scale = weight.norm(dim=1)
    assert ((found[0][0] - found[1][0]).norm(dim=1) <= 1e-8 * scale).all()
    for implicit, unrolled in zip(*found):
        assert (implicit - unrolled).norm() <= 1e-8 * unrolled.norm()


@pytest.mark.parametrize("checked", ADJOINTS.values(), ids=ADJOINTS)
def test_second_derivatives_agree_with_unrolled_ones(checked):
    tensors = _leaves()
    found = []
    for adjoint in (checked, UnrolledAdjoint()):
        value, _ = fixed_point(
            _residual_inverse(0.7), tensors[0].detach(), tensors, lipschitz=0.7, batched=BATCHED, adjoint=adjoint
        )
        first = grad(value.pow(3).sum(), tensors, create_graph=True)
        found.append(grad(sum(g.pow(2).sum() for g in first), tensors))
    for implicit, unrolled in zip(*found):
        assert (implicit - unrolled).norm() <= 1e-7 * unrolled.norm()


@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scaled_loss_scales_the_gradient(dtype, adjoint):
    tensors = [t.detach().to(dtype).requires_grad_() for t in _leaves(batch=8)]
    value, _ = fixed_point(
        _residual_inverse(0.9), tensors[0].detach(), tensors, lipschitz=0.9, batched=BATCHED, adjoint=adjoint
    )
    loss = (value**2).sum()
    plain = grad(loss, tensors, retain_graph=True)
    # By powers of two to the last bit, by others to rounding: a rounded upstream gradient may stop a step apart.
    for factor in (2.0**-40, 2.0**40):
        for a, b in zip(plain, grad(factor * loss, tensors, retain_graph=True)):
            assert torch.equal(factor * a, b)
    for factor in (1e-8, 1e8):
        for a, b in zip(plain, grad(factor * loss, tensors, retain_graph=True)):
            bound = 1e-9 if dtype == torch.float64 else 1e-5
            assert (factor * a - b).norm() <= bound * factor * a.norm()


@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
def test_samples_without_upstream_gradient_get_none(adjoint):
    tensors = _leaves()
    value, _ = fixed_point(
        _residual_inverse(0.9), tensors[0].detach(), tensors, lipschitz=0.9, batched=BATCHED, adjoint=adjoint
    )
    (data,) = grad(value[1].sum(), tensors[:1])
    assert (data[[0, 2, 3]] == 0).all() and (data[1] != 0).all()


@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
def test_frozen_unused_and_integer_tensors(adjoint):
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    which = torch.tensor([0, 1, 1])
    table = torch.randn(2, 4, dtype=torch.float64)
    tensors = (a, unused, which, table)
    value, _ = fixed_point(
        lambda x, a, unused, which, table: a * x + table[which],
        torch.zeros(3, 4, dtype=torch.float64),
        tensors,
        lipschitz=0.5,
        batched=(False, False, True, False),
        adjoint=adjoint,
    )
    found = grad(value.sum(), (a, unused), allow_unused=True)
    torch.testing.assert_close(found[0], 4 * table[which].sum())
    assert found[1] is None
    # A map that x does not enter.
    zeros = torch.zeros(3, dtype=torch.float64)
    value, _ = fixed_point(lambda x, a: a.expand(3), zeros, (a,), lipschitz=0.0, adjoint=adjoint)
    assert grad(value.sum(), a)[0] == 3


def test_failure_in_backward():
    tensors = _leaves()
    adjoint = ImplicitAdjoint(max_steps=2)
    value, _ = fixed_point(
        _residual_inverse(0.9), tensors[0].detach(), tensors, lipschitz=0.9, batched=BATCHED, adjoint=adjoint
    )
    with pytest.raises(ConvergenceError, match="in 2 steps"):
        value.sum().backward(retain_graph=True)
    with pytest.raises(ValueError, match="expected a finite gradient"):
        (value * torch.inf).sum().backward()


def test_memory_does_not_grow_with_steps():
    def saved(adjoint, **options):
        tensors, count = _leaves(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: count.append(t.numel()) or t, lambda t: t):
            _, solution = fixed_point(
                _residual_inverse(0.9),
                50 + tensors[0].detach(),
                tensors,
                lipschitz=0.9,
                batched=BATCHED,
                solver=FixedPoint(),
                adjoint=adjoint,
                **options,
            )
        return sum(count), int(solution.steps.max()), sum(t.numel() for t in tensors) + tensors[0].numel()

    few, few_steps, size = saved(ImplicitAdjoint(), tolerance=1e-1)
    many, many_steps, _ = saved(ImplicitAdjoint(), tolerance=1e-12)
    assert many_steps > 2 * few_steps
    assert few == many == size
    assert saved(UnrolledAdjoint(steps=20))[0] > saved(UnrolledAdjoint(steps=10))[0] > many


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_dense_and_implicit_adjoints_meet_the_direct_solution(size):
    # Events of two dimensions; samples leave the adjoint's iteration one by one, the first ones first.
    strength = torch.linspace(0, 0.9, 12, dtype=torch.float64)
    matrices = strength[:, None, None] * _unit(torch.randn(12, size, size, dtype=torch.float64))
    matrices.requires_grad_()
    b = torch.randn(12, size, 1, dtype=torch.float64, requires_grad=True)
    u = torch.randn(12, size, 1, dtype=torch.float64)
    eye = torch.eye(size, dtype=torch.float64)
    wanted = grad((u * torch.linalg.solve(eye - matrices, b)).sum(), (matrices, b))
    for adjoint in (None, *ADJOINTS.values(), ImplicitAdjoint(solver=FixedPoint())):
        value, _ = fixed_point(
            lambda x, m, b: m @ x + b, b.detach(), (matrices, b), lipschitz=0.9, batched=(True, True), adjoint=adjoint
        )
        for found, exact in zip(grad((u * value).sum(), (matrices, b)), wanted):
            assert (found - exact).norm() <= 1e-8 * exact.norm()


def test_the_dense_adjoint_spends_one_reverse_pass_an_entry():
    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            passes.append(g)
            return g

    passes: list[torch.Tensor] = []
    tensors = _leaves(size=2)
    for adjoint, most in ((None, 3), (ImplicitAdjoint(), 6)):
        value, _ = fixed_point(
            lambda x, y, *w: Counted.apply(y - 0.9 * _tanh_net(x, *w)),
            tensors[0].detach(),
            tensors,
            lipschitz=0.9,
            batched=BATCHED,
            adjoint=adjoint,
        )
        passes.clear()
        grad(value.sum(), tensors)
        assert len(passes) <= most, adjoint


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_definite_systems_are_solved_alike_in_any_batch(size):
    matrix = torch.eye(size, dtype=torch.float64) - 0.999 * _unit(torch.randn(64, size, size, dtype=torch.float64))
    right = torch.randn(64, size, dtype=torch.float64)
    found = solve_definite(matrix, right)
    residual = (matrix @ found[:, :, None])[:, :, 0] - right
    assert (residual.norm(dim=1) <= 1e-14 * (1 + found.norm(dim=1))).all()
    for rows in ([5], [3, 9, 60]):
        assert torch.equal(solve_definite(matrix[rows], right[rows]), found[rows])


def test_anderson_remembers_no_more_than_an_event_has_entries():
    turn = 0.99 * torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0]
    b = torch.randn(40, 2, dtype=torch.float64)
    results = [
        Anderson(memory=m).solve(lambda x, i: x @ turn.T + _rows(b, i), torch.zeros_like(b), lipschitz=0.99)
        for m in (2, 5)
    ]
    for two, five in zip(*results):
        assert torch.equal(two, five)
    # Two secants hold all of a linear map of the plane, but for the shift of the normal equations.
    assert results[0].steps.max() <= 8


# Refinement: float32 certified by float64


def _sine_net(x, *layers):
    for weight, bias in zip(layers[:-2:2], layers[1:-2:2]):
        x = torch.sin(2 * torch.pi * (x @ weight.T + bias)) / (2 * torch.pi)
    return x @ layers[-2].T + layers[-1]


def _sine_weights(c, seed, size=2, hidden=64):
    generator = torch.Generator().manual_seed(seed)
    frame, _ = torch.linalg.qr(torch.randn(hidden, size, generator=generator))
    turn, _ = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))
    # Near the bound where biases are small, far below it where they are not.
    bias = 0.1 * seed * torch.randn(hidden, generator=generator)
    factor = 0.999999 * c ** (1 / 3)
    return [factor * frame, bias, factor * turn, bias.flip(0), -factor * (turn @ frame).T, torch.zeros(size)]


def _sine_map(x, y, *weights):
    return y - _sine_net(x, *weights)


@pytest.mark.parametrize("c", [0.9, 0.99])
@pytest.mark.parametrize("seed", range(4))
def test_refined_float32_is_certified_beyond_its_rounding(c, seed):
    weights = _sine_weights(c, seed)
    x = torch.randn(200, 2)
    y = x + _sine_net(x, *weights)
    tensors = [y, *weights]
    batched = (True,) + 6 * (False,)
    value, solution = fixed_point(_sine_map, y, tensors, lipschitz=c, batched=batched, refine=True)
    _, plain = fixed_point(_sine_map, y, tensors, lipschitz=c, batched=batched)
    wide = [t.double() for t in tensors]
    _, exact = fixed_point(_sine_map, wide[0], wide, lipschitz=c, batched=batched, tolerance=1e-12)
    scale = value.double().norm(dim=1).clamp(min=1)
    assert value.dtype == torch.float32 and solution.error.dtype == torch.float64
    assert solution.converged.all() and (solution.error <= 2.001e-6 * scale).all()
    assert ((value.double() - exact.value).norm(dim=1) <= solution.error + exact.error).all()
    # What rounding to float32 may add is in the certified error.
    assert (solution.error >= 2.0**-24 * value.double().norm(dim=1)).all()
    assert (solution.steps - plain.steps).max() <= 5
    # float32 alone cannot: 2 eps / (1 - c) is more already.
    assert c == 0.9 or (plain.error > 2e-5 * scale).all()


def test_refinement_leaves_certified_samples_to_the_last_bit():
    phi, y, strength = _varied(dtype=torch.float32)
    hard = strength[:, 0] > 0.9
    seen = []

    def mapped(x, y, strength):
        seen.append((x.dtype, len(x)))
        return y - strength * torch.sin(x.roll(1, 1) - 0.3)

    options = {"lipschitz": 0.99, "batched": (True, True), "tolerance": 5e-5}
    _, refined = fixed_point(mapped, y, (y, strength), refine=True, **options)
    plain = Anderson().solve(phi, y, lipschitz=0.99)
    easy = plain.error <= 5e-5 * plain.value.norm(dim=1).clamp(min=1)
    assert easy.any() and not easy.all() and (~easy)[hard].any()
    for field, first in zip((refined.value, refined.error, refined.steps), (plain.value, plain.error, plain.steps)):
        assert torch.equal(field[easy], first[easy])
    assert refined.converged.all()
    assert max(n for dtype, n in seen if dtype == torch.float64) == int((~easy).sum())
    # A refined sample is the same alone.
    for i in range(len(y)):
        alone = fixed_point(mapped, y[i : i + 1], (y[i : i + 1], strength[i : i + 1]), refine=True, **options)[1]
        for field, whole in zip(alone, refined):
            assert torch.equal(field, whole[i : i + 1])


def test_refinement_reports_failure_and_is_nothing_in_float64():
    def phi(x, b):
        return 0.99 * x.flip(1) + b

    b = torch.randn(5, 2)
    options = {"lipschitz": 0.99, "batched": (True,), "solver": FixedPoint(), "refine": True}
    with pytest.raises(ConvergenceError, match="tolerance=2.00e-06 with lipschitz=0.99"):
        fixed_point(phi, b, (b,), max_steps=3, **options)
    solution = fixed_point(phi, b, (b,), max_steps=3, on_failure="ignore", **options)[1]
    assert not solution.converged.any() and (solution.steps == 6).all()
    # What float32 calls converged need not be so any more.
    near = Anderson().solve(lambda x, i: phi(x, _rows(b, i)), b, lipschitz=0.99).value
    assert not fixed_point(phi, near, (b,), max_steps=1, on_failure="ignore", **options)[1].converged.all()
    with pytest.raises(ValueError, match=r"tolerance: expected above 1.2e-07"):
        fixed_point(phi, b, (b,), tolerance=1e-7, **options)
    # A map that closes over float32 cannot be taken to float64.
    with pytest.raises((ValueError, RuntimeError), match="float"):
        fixed_point(lambda x, y: 0.9 * (x @ torch.eye(2)) + y, b, (b,), **options)
    wide = b.double()
    again = [fixed_point(phi, wide, (wide,), **{**options, "refine": refine})[1] for refine in (True, False)]
    for refined, plain in zip(*again):
        assert torch.equal(refined, plain)


@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
def test_gradients_at_a_refined_value(adjoint):
    weights = _sine_weights(0.99, 1)
    tensors = [t.requires_grad_() for t in (torch.randn(20, 2), *weights)]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    u = torch.randn(20, 2)
    found = []
    for leaves in (tensors, wide):
        value, _ = fixed_point(
            _sine_map,
            leaves[0].detach(),
            leaves,
            lipschitz=0.99,
            batched=(True,) + 6 * (False,),
            adjoint=adjoint,
            refine=True,
        )
        found.append(grad((u * value).sum(), leaves))
    for narrow, exact in zip(*found):
        assert (narrow - exact).norm() <= 1e-4 * exact.norm()
