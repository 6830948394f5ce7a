# SPDX-License-Identifier: Apache-2.0
"""Log-det estimators against autograd's dense Jacobian."""

import math
from dataclasses import FrozenInstanceError

import pyro
import pytest
import torch
from torch.func import jacrev, vmap

from pyro_equiflow.logdet import ByMode, Exact, LogDet, PowerSeries, RussianRoulette, default_estimator
from pyro_equiflow.logdet.probes import probe_vectors

ESTIMATORS = {
    "exact": Exact(),
    "traces": PowerSeries(terms=8, probes=None),
    "series": PowerSeries(terms=8, probes=2),
    "gaussian": PowerSeries(terms=8, probes=1, distribution="gaussian"),
    "roulette": RussianRoulette(exact_terms=2, probes=2),
    "default": default_estimator(6),
    "default_large": default_estimator(5000),
}
RANDOM = ["series", "gaussian", "roulette", "default_large"]
C = 0.6


def net(x, *tensors):
    """A sine network; weights may carry a leading dimension of samples."""
    for i in range(0, len(tensors), 2):
        x = torch.einsum("...oi,...i->...o", tensors[i], x) + tensors[i + 1]
        x = torch.sin(x) if i + 2 < len(tensors) else x
    return x


def weights(sizes, c=C, dtype=torch.float64):
    """Weights of a network whose Lipschitz constant is at most ``c``: the product of the layers' norms."""
    tensors = []
    for inside, outside in zip(sizes, sizes[1:]):
        matrix = torch.randn(outside, inside, dtype=torch.float64)
        matrix *= c ** (1 / (len(sizes) - 1)) / torch.linalg.matrix_norm(matrix, 2)
        tensors += [matrix.to(dtype), torch.randn(outside, dtype=torch.float64).to(dtype)]
    return [t.requires_grad_() for t in tensors]


def reference(fn, x, tensors):
    jacobian = vmap(jacrev(lambda z: fn(z[None], *tensors)[0]))(x)
    size = x[0].numel()
    return torch.linalg.slogdet(jacobian.reshape(-1, size, size) + torch.eye(size, dtype=x.dtype)).logabsdet


def gradients(value, *inputs, **options):
    return torch.autograd.grad(value, inputs, **options)


@pytest.mark.parametrize("rows", [1, 2, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_exact(size, rows):
    tensors = weights([size, 8, 8, size], 0.9)
    x = torch.randn(5, size, dtype=torch.float64, requires_grad=True)
    found = Exact(rows=rows)(net, x, tensors, lipschitz=0.9, training=True)
    expected = reference(net, x, tensors)
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.output, net(x, *tensors), rtol=0, atol=0)
    jacobian = vmap(jacrev(lambda z: net(z[None], *tensors)[0]))(x)
    torch.testing.assert_close(found.jacobian, jacobian.detach(), rtol=0, atol=1e-12)
    assert not found.jacobian.requires_grad
    upstream = torch.arange(1.0, 6.0, dtype=torch.float64)
    # The last bias moves no Jacobian.
    inputs = (x, *tensors[:-1])
    for ours, theirs in zip(
        gradients((found.value * upstream).sum(), *inputs), gradients((expected * upstream).sum(), *inputs)
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_exact_gradcheck():
    tensors = weights([3, 4, 3])
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def value(x, *tensors):
        found = Exact()(net, x, tensors, lipschitz=C, training=True)
        return found.value, found.output

    assert torch.autograd.gradcheck(value, (x, *tensors))
    assert torch.autograd.gradgradcheck(value, (x, *tensors))


def test_events_of_any_shape():
    """Convolutions on small images; a volume of one channel."""
    for kernel, event in ((torch.randn(2, 2, 3, 3), (2, 3, 3)), (torch.randn(1, 1, 3, 3, 3), (1, 2, 2, 2))):
        kernel = 0.5 * kernel.double() / kernel.abs().sum()
        convolve = torch.nn.functional.conv2d if kernel.dim() == 4 else torch.nn.functional.conv3d

        def fn(x, kernel, convolve=convolve):
            return torch.sin(convolve(x, kernel, padding=1))

        x = torch.randn(3, *event, dtype=torch.float64)
        expected = reference(fn, x, (kernel,))
        for estimator in (Exact(), Exact(rows=5), PowerSeries(terms=60, probes=None)):
            found = estimator(fn, x, (kernel,), lipschitz=0.5, training=False)
            torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-10)
            assert found.output.shape == x.shape
        for estimator in (PowerSeries(terms=5), RussianRoulette()):
            found = estimator(fn, x, (kernel,), lipschitz=0.5, training=True)
            assert ((found.value - expected).abs() <= found.error).all()


@pytest.mark.parametrize("c", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 16])
def test_error_bounds_hold(size, c):
    """50 random maps a case, 1000 trials in all, some of them where the remainder's bound is nearly met."""
    matrices = torch.randn(50, size, size, dtype=torch.float64)
    matrices *= c / torch.linalg.matrix_norm(matrices, 2)[:, None, None]
    matrices[:5] = -c * torch.eye(size)
    matrices[5:10] = c * torch.eye(size)
    matrices[10:20] = c * torch.linalg.qr(matrices[10:20]).Q
    x = torch.randn(50, size, dtype=torch.float64)

    def fn(x, matrices):
        return torch.einsum("bij,bj->bi", matrices, x.sin())

    jacobians = matrices * x.cos()[:, None]
    expected = torch.linalg.slogdet(jacobians + torch.eye(size)).logabsdet
    for terms in (1, 2, 5, 20, None):
        estimator = PowerSeries(terms=terms, probes=None)
        found = estimator(fn, x, (matrices,), lipschitz=c, training=False)
        assert ((found.value - expected).abs() <= found.error).all()
        n = estimator.terms_for(c)
        # No wider than stated, but for the allowance for rounding.
        torch.testing.assert_close(
            found.error, torch.full_like(expected, size * c ** (n + 1) / ((n + 1) * (1 - c))), rtol=1e-9, atol=1e-10
        )
        if terms is None:
            assert (found.error <= 1.0001e-3 * size).all()
    for estimator in (Exact(), default_estimator(size), PowerSeries(terms=5), RussianRoulette()):
        for dtype in (torch.float64, torch.float32):
            found = estimator(fn, x.to(dtype), (matrices.to(dtype),), lipschitz=c, training=False)
            assert found.value.dtype == found.error.dtype == dtype
            assert ((found.value.double() - expected).abs() <= found.error.double()).all()


def nearly_singular(size, c, count):
    """Matrices of norm just below ``c``, in float32, with ``-c`` in one direction, less in others, and turned a bit."""
    frame = torch.linalg.qr(torch.randn(count, size, size, dtype=torch.float64)).Q
    shrunk = 1 - 10 ** (-5 * torch.rand(count, size, dtype=torch.float64))
    shrunk[:, 0] = 1
    skew = torch.randn(count, size, size, dtype=torch.float64) * 10 ** (-4 * torch.rand(count, 1, 1)).double()
    return (-c * (1 - 2e-7) * torch.matrix_exp(skew - skew.mT) @ (frame * shrunk[:, None]) @ frame.mT).float()


@pytest.mark.parametrize("c", [0.9, 0.99, 0.9999])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_exact_near_a_singular_jacobian(size, c):
    """In float32: sums of products cancel there, in values and in gradients, which are inverses."""
    count = 4000 if size == 3 else 500
    matrices = nearly_singular(size, c, count).requires_grad_()
    wide = matrices.detach().double() + torch.eye(size)
    expected, inverse = torch.linalg.slogdet(wide).logabsdet, torch.linalg.inv(wide).mT
    x = torch.zeros(count, size)

    def fn(x, matrices):
        return torch.einsum("bij,bj->bi", matrices, x)

    found = PowerSeries(probes=None, terms=100)(fn, x, (matrices,), lipschitz=c, training=True)
    assert ((found.value.detach() - expected).abs() <= found.error).all()
    found = Exact()(fn, x, (matrices,), lipschitz=c, training=True)
    # The allowance is for Jacobians that are off as well; these are known to the last digit.
    assert ((found.value.detach() - expected).abs() <= 0.1 * found.error).all()
    (gradient,) = gradients(found.value.sum(), matrices)
    # Changes of some ulp of the matrix change its inverse by as many over the least singular value.
    off = torch.linalg.matrix_norm(gradient - inverse) / torch.linalg.matrix_norm(inverse)
    assert off.max() <= 4 * torch.finfo(torch.float32).eps / (1 - c)


def test_error_bound_is_nearly_met():
    """At ``J = -c I`` every term of the remainder has the same sign: the bound is no idle one."""
    x = torch.zeros(1, 4, dtype=torch.float64)
    found = PowerSeries(terms=20, probes=None)(lambda x: -0.5 * x, x, (), lipschitz=0.5, training=False)
    assert 0.9 < (found.value.item() - 4 * math.log(0.5)) / found.error.item() <= 1


def test_trace_gradient_is_the_truncated_sums():
    """With the unit probes' matrix powers spelled out."""
    tensors = weights([3, 5, 3])
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    found = PowerSeries(terms=3, probes=None)(net, x, tensors, lipschitz=C, training=True)
    jacobian = vmap(jacrev(lambda z: net(z[None], *tensors)[0]))(x)
    powers = [jacobian, jacobian @ jacobian, jacobian @ jacobian @ jacobian]
    traces = [power.diagonal(dim1=-2, dim2=-1).sum(-1) for power in powers]
    expected = traces[0] - traces[1] / 2 + traces[2] / 3
    inputs = (x, *tensors[:-1])
    for ours, theirs in zip(gradients(found.value.sum(), *inputs), gradients(expected.sum(), *inputs)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def within_standard_errors(draws, expected, count=4.0):
    """Means over the first dimension; entries without any spread have to agree."""
    mean, stderr = draws.mean(0), draws.std(0) / len(draws) ** 0.5
    assert ((mean - expected).abs() <= count * stderr + 1e-12).all(), ((mean - expected) / stderr).abs().max()
    return stderr


@pytest.mark.parametrize(
    "estimator",
    [
        RussianRoulette(exact_terms=1, probability=0.4),
        RussianRoulette(exact_terms=3, distribution="gaussian"),
        RussianRoulette(exact_terms=1, probability=0.3, probes=2),
    ],
    ids=["rademacher", "gaussian", "two_probes"],
)
def test_roulette_is_unbiased(estimator):
    """20,000 draws at once: a sample a draw, weights a sample, so every draw has its own gradient.

    ``1 - probability > c^2``, so variances are finite.
    """
    draws = 20_000
    tensors = weights([2, 4, 2])
    x = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    exact = reference(net, x, tensors)
    expected = gradients(exact.sum(), x, *tensors[:-1])
    copies = [t.detach().expand(draws, *t.shape).clone().requires_grad_() for t in tensors]
    many = x.detach().expand(draws, 2).clone().requires_grad_()
    found = estimator(net, many, copies, lipschitz=C, training=True)
    stderr = within_standard_errors(found.value.detach(), exact.detach())
    assert 0 < stderr < 0.02
    for draw, mean in zip(gradients(found.value.sum(), many, *copies[:-1]), expected):
        spread = within_standard_errors(draw, mean.reshape(draw.shape[1:]))
        assert (spread < 0.05).all()


def series_variance(terms, exact, probability):
    """The variance of a roulette over its stopping time, of a series of ``terms`` ``(V, K)``: its closed form.

    ``E S^2 = sum_kl a_k a_l w_min(k, l)``, since the larger weight is one over the chance that both terms are there.
    """
    beyond = (torch.arange(1, terms.shape[1] + 1) - exact).clamp(min=0)
    weights = (1 - probability) ** -beyond.double()
    following = terms.flip(1).cumsum(1).flip(1) - terms
    return ((weights - 1) * terms * (terms + 2 * following)).sum(1)


@pytest.mark.parametrize("turn", ["down", "up", "orthogonal"])
@pytest.mark.parametrize("c, exact, most", [(0.5, 4, 0.09), (0.9, 10, 0.37), (0.99, 100, 0.37)])
def test_roulette_has_the_variance_of_its_closed_form(c, exact, most, turn):
    """Of values and gradients, over stopping times and all 64 probes, for ``J = c Q``; ``Q = -1`` is the worst."""
    size, draws = 6, 5000
    matrix = {"down": -torch.eye(size), "up": torch.eye(size)}.get(turn, torch.linalg.qr(torch.randn(size, size)).Q)
    matrix = matrix.double()
    probes = 1 - 2 * (torch.arange(2**size)[:, None] >> torch.arange(size) & 1).double()
    powers, products = probes, []
    for k in range(int(60 / (1 - c))):
        powers = powers @ matrix
        products.append((-1) ** k * (powers * probes).sum(1))
    orders = torch.arange(1, len(products) + 1).double()
    slopes = torch.stack(products, 1) * c ** (orders - 1)  # of the derivative by c
    estimator = RussianRoulette()
    assert estimator.terms_for(c) == (exact, pytest.approx(1 - c))
    scales = torch.full((draws,), c, dtype=torch.float64, requires_grad=True)
    value = estimator(
        lambda x, scales: scales[:, None] * (x @ matrix.T),
        torch.zeros(draws, size, dtype=torch.float64),
        (scales,),
        lipschitz=c,
        training=True,
    ).value
    (gradient,) = gradients(value.sum(), scales)
    whole = torch.eye(size) + c * matrix
    wanted = torch.linalg.slogdet(whole).logabsdet, torch.linalg.solve(whole, matrix).trace()
    for found, mean, terms in ((value.detach(), wanted[0], c * slopes / orders), (gradient, wanted[1], slopes)):
        within_standard_errors(found, mean)
        over_terms = series_variance(terms, exact, 1 - c)
        variance = over_terms.mean() + terms.sum(1).var(correction=0)
        # Tails are those of an exponential distribution, of kurtosis 9: four standard errors of a variance.
        assert abs(found.var() / variance - 1) <= 4 * math.sqrt(8 / draws)
    if turn == "down":
        relative = (over_terms / wanted[1] ** 2).sqrt()
        torch.testing.assert_close(relative, torch.full_like(relative, c ** (exact - 0.5)), rtol=1e-6, atol=0)
        assert (relative <= most).all()


def test_an_infinite_variance_is_said():
    x = torch.zeros(3, 2)
    with pytest.warns(RuntimeWarning, match=r"probability: expected below 1 - lipschitz\^2 = 0.19 .*, found 0.5"):
        RussianRoulette(probability=0.5)(lambda x: 0.1 * x, x, (), lipschitz=0.9, training=True)
    RussianRoulette(probability=0.18)(lambda x: 0.1 * x, x, (), lipschitz=0.9, training=True)


@pytest.mark.parametrize("estimator", [Exact(), PowerSeries(), PowerSeries(probes=None), RussianRoulette()], ids=str)
def test_a_map_that_is_constant(estimator):
    """As many zeros as samples, whatever the size of an event."""
    found = estimator(lambda x: torch.ones_like(x), torch.randn(3, 2), (), lipschitz=0.9, training=True)
    assert torch.equal(found.value, torch.zeros(3)) and torch.equal(found.output, torch.ones(3, 2))


@pytest.mark.parametrize("c", [1e-9, 0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("size", [20, 40, 200])
def test_the_default_in_training_is_never_far_off(size, c):
    """At the worst Jacobian; in training with more than 16 entries, float32."""
    x = torch.zeros(300, size)
    found = default_estimator(size)(lambda x, a: a * x, x, (torch.tensor(-c),), lipschitz=c, training=True)
    exact = size * math.log1p(-c)
    assert (found.value - exact).abs().max() <= abs(exact)
    assert (found.stderr == 0).all() == (size <= 1 / (2 - 2 * c) + 1e-6)


class Counting:
    """A map with a context a sample, which can be linearized for some samples; counts what it is asked for."""

    per_sample = 1

    def __init__(self):
        self.rows = []

    def __call__(self, x, context, *tensors):
        self.rows.append(len(x))
        return net(x + context, *tensors)


def test_what_has_ended_is_left_out():
    """With the same numbers as where it is not, values and gradients, and far fewer rows."""
    tensors = weights([12, 16, 12], 0.97)
    x, context = torch.randn(2, 64, 12, dtype=torch.float64)
    context.requires_grad_()
    fn, found = Counting(), []
    for function in (fn, lambda *a: net(a[0] + a[1], *a[2:])):
        torch.manual_seed(5)
        value = RussianRoulette()(function, x, (context, *tensors), lipschitz=0.97, training=True).value
        found.append((value, *gradients(value @ torch.arange(64.0).double(), context, *tensors[:-1])))
    # The whole batch, half of it, and what is left as often as an event has entries, for dense Jacobians.
    whole, half, dense = fn.rows
    assert whole == 64 and 21 < half <= 32 and dense <= 256 and dense % 12 == 0
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "estimator", [RussianRoulette(exact_terms=2), PowerSeries(terms=25)], ids=["roulette", "series"]
)
def test_each_sample_is_weighed_by_its_own_gradient(estimator):
    """Upstream weights 1 to 5; the draws are copies of the batch of five."""
    draws, batch = 4000, 5
    tensors = weights([2, 4, 2])
    x = torch.randn(batch, 2, dtype=torch.float64)
    upstream = torch.arange(1.0, 6.0, dtype=torch.float64)
    exact = reference(net, x, tensors)
    expected = gradients((upstream * exact).sum(), *tensors[:-1], retain_graph=True)
    first_only = gradients((upstream[0] * exact).sum(), *tensors[:-1])
    copies = [t.detach().expand(draws, *t.shape).clone().requires_grad_() for t in tensors]

    def fn(x, *tensors):
        return net(x, *(t.repeat_interleave(batch, 0) for t in tensors))

    value = estimator(fn, x.repeat(draws, 1), copies, lipschitz=C, training=True).value
    worst = 0.0
    for draw, right, wrong in zip(
        gradients((upstream.repeat(draws) * value).sum(), *copies[:-1]), expected, first_only
    ):
        stderr = within_standard_errors(draw, right)
        worst = max(worst, ((wrong - right).abs() / stderr).max().item())
    assert worst > 20  # So the test tells them apart.


def test_upstream_weights_act_sample_by_sample():
    """With the same draws, gradients are linear in the upstream weights, each sample's its own."""
    tensors = weights([3, 4, 3])
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def gradient(upstream):
        torch.manual_seed(3)
        value = RussianRoulette()(net, x, tensors, lipschitz=C, training=True).value
        return gradients(value @ upstream, x, tensors[0])

    one_by_one = [gradient(row) for row in torch.eye(5, dtype=torch.float64)]
    together = gradient(torch.arange(1.0, 6.0, dtype=torch.float64))
    for i, whole in enumerate(together):
        torch.testing.assert_close(whole, sum((k + 1) * g[i] for k, g in enumerate(one_by_one)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "few, many",
    [(PowerSeries(terms=2), PowerSeries(terms=40)), (RussianRoulette(), RussianRoulette(probability=0.05))],
    ids=["series", "roulette"],
)
def test_memory_does_not_grow_with_terms(few, many):
    tensors = weights([6, 8, 6])
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def saved(estimator):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            estimator(net, x, tensors, lipschitz=C, training=True)
        return count

    assert saved(few) == saved(many) > 0


def test_stderr_is_the_spread_over_probes():
    tensors = [t.detach() for t in weights([4, 6, 4])]
    x = torch.randn(1, 4, dtype=torch.float64).expand(2000, 4)
    found = PowerSeries(terms=20, probes=8)(net, x, tensors, lipschitz=C, training=True)
    exact = reference(net, x[:1], tensors)
    assert abs(found.stderr.square().mean().sqrt() / (found.value - exact).square().mean().sqrt() - 1) < 0.1
    assert PowerSeries(terms=2)(net, x, tensors, lipschitz=C, training=True).stderr.isnan().all()
    assert (Exact()(net, x, tensors, lipschitz=C, training=True).stderr == 0).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_evaluation_is_deterministic(name):
    estimator = ESTIMATORS[name]
    tensors = weights([6, 8, 6], dtype=torch.float32)
    x = torch.randn(4, 6, requires_grad=True)
    state = torch.get_rng_state()
    first = estimator(net, x, tensors, lipschitz=C, training=False)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    second = estimator(net, x, tensors, lipschitz=C, training=False)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first[:4], second[:4]))
    for a, b in zip(gradients(first.value.sum(), x, *tensors[:-1]), gradients(second.value.sum(), x, *tensors[:-1])):
        assert torch.equal(a, b)
    # A sample's value does not hang on the batch that it comes in, but for the order of sums.
    alone = estimator(net, x[2:3], tensors, lipschitz=C, training=False)
    torch.testing.assert_close(alone.value, first.value[2:3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RANDOM)
def test_training_draws_follow_the_seed(name):
    estimator = ESTIMATORS[name]
    tensors = weights([6, 8, 6])
    x = torch.randn(4, 6, dtype=torch.float64)

    def draw(seed):
        pyro.set_rng_seed(seed)
        return estimator(net, x, tensors, lipschitz=C, training=True).value

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradient_modes(name):
    """Values are the same with gradients on and off; a graph is there where the caller's is, and only there."""
    estimator = ESTIMATORS[name]
    tensors = weights([6, 8, 6])
    x = torch.randn(4, 6, dtype=torch.float64)
    found = estimator(net, x, tensors, lipschitz=C, training=False)
    assert isinstance(found, LogDet)
    assert found.value.requires_grad and found.output.requires_grad
    assert not found.error.requires_grad and not found.stderr.requires_grad
    assert not x.requires_grad and x.grad is None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            silent = estimator(net, x + 0, tensors, lipschitz=C, training=False)
        assert not silent.value.requires_grad and not silent.output.requires_grad
        torch.testing.assert_close(silent.value, found.value.detach(), rtol=0, atol=1e-12)
    plain = estimator(net, x, [t.detach() for t in tensors], lipschitz=C, training=False)
    assert not plain.value.requires_grad and not plain.output.requires_grad
    # Parameters that the function closes over, as a module that is not expanded does.
    closed = estimator(lambda z: net(z, *tensors), x, (), lipschitz=C, training=False)
    for a, b in zip(gradients(closed.value.sum(), *tensors[:-1]), gradients(found.value.sum(), *tensors[:-1])):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_maps_that_ignore_their_input(name):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for fn in (lambda x, t: t.expand_as(x), lambda x, t: torch.zeros_like(x), lambda x, t: 0 * x + t):
        found = ESTIMATORS[name](fn, x, (shift,), lipschitz=C, training=True)
        assert (found.value == 0).all()
        (found.value.sum() + found.output.sum() + x.sum()).backward()
        assert torch.equal(x.grad, torch.ones_like(x))
        x.grad = None


@pytest.mark.parametrize("closed", [False, True], ids=["given", "closed_over"])
@pytest.mark.parametrize("name", RANDOM)
def test_second_derivatives_of_estimates_are_refused(name, closed):
    tensors = weights([6, 8, 6])
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    fn, given = (lambda z: net(z, *tensors), ()) if closed else (net, tensors)
    found = ESTIMATORS[name](fn, x, given, lipschitz=C, training=True)
    for by in (x, tensors[0]):
        (gradient,) = gradients((found.value + found.output.sum(-1)).sum(), by, create_graph=True)
        for again in (x, tensors[0], tensors[3]):
            with pytest.raises(RuntimeError, match="second derivatives"):
                gradients(gradient.square().sum(), again, retain_graph=True, allow_unused=True)
    # The output's own second derivatives are right, and stay.
    (gradient,) = gradients(found.output.sum(), x, create_graph=True)
    gradients(gradient.square().sum(), x)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_single_precision(name):
    tensors = weights([6, 8, 6])
    x = torch.randn(50, 6, dtype=torch.float64)
    exact = ESTIMATORS[name](net, x, tensors, lipschitz=C, training=False)
    single = ESTIMATORS[name](net, x.float(), [t.float() for t in tensors], lipschitz=C, training=False)
    assert all(t.dtype == torch.float32 for t in single if t is not None)
    torch.testing.assert_close(single.value.double(), exact.value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_probes_are_what_they_are_called(training):
    """Signs, or normal numbers by their fourth moment; of mean zero and unit covariance either way."""
    x = torch.zeros(3, 20_000, dtype=torch.float64)
    for distribution, fourth in (("rademacher", 1.0), ("gaussian", 3.0)):
        probes = probe_vectors(2, x, distribution, training)
        assert probes.shape == (2, *x.shape)
        assert bool((probes.abs() == 1).all()) == (distribution == "rademacher")
        assert torch.equal(probes[:, 0], probes[:, 1]) != training  # one for all samples, outside training
        # Five standard errors of the mean of 20,000: moments of order 8 are 105.
        for power, moment, deviation in ((1, 0.0, 1.0), (2, 1.0, 2**0.5), (4, fourth, 96**0.5)):
            means = probes.pow(power).mean(-1)
            assert (means - moment).abs().max() < 5 * deviation / 20_000**0.5
        assert (probes[0] * probes[1]).mean(-1).abs().max() < 5 / 20_000**0.5


def test_estimators_do_not_change():
    """Caches and the forks of a flow share them."""
    fixed = {"rows": Exact(), "probes": PowerSeries(), "exact_terms": RussianRoulette()}
    for name, estimator in {**fixed, "training": ByMode(training=Exact(), evaluation=Exact())}.items():
        with pytest.raises(FrozenInstanceError):
            setattr(estimator, name, 3)


def test_defaults():
    """Exact up to 16 entries, and outside training up to 1024; beyond, 16 fixed probes. To 128 constants decide."""
    assert default_estimator(2) == default_estimator(16) == Exact()
    for size in (17, 128):
        by_mode = default_estimator(size)
        assert by_mode.evaluation == Exact() and by_mode.training not in (Exact(), RussianRoulette())
    for size in (129, 1024):
        assert default_estimator(size) == ByMode(training=RussianRoulette(), evaluation=Exact())
    for size in (1025, 3000):
        large = default_estimator(size)
        assert isinstance(large.training, RussianRoulette) and large.evaluation == PowerSeries(probes=16)
    with pytest.raises(ValueError, match="event_size"):
        default_estimator(0)


def test_errors():
    x = torch.randn(3, 2)
    for estimator in ESTIMATORS.values():
        for lipschitz in (0.0, 1.0, -0.5, 1.5, math.nan):
            with pytest.raises(ValueError, match="lipschitz"):
                estimator(net, x, (), lipschitz=lipschitz, training=True)
        with pytest.raises(TypeError, match="floating-point"):
            estimator(net, x.long(), (), lipschitz=0.5, training=True)
        with pytest.raises(ValueError, match=r"\(B, \*event\)"):
            estimator(net, x[0], (), lipschitz=0.5, training=True)
        with pytest.raises(ValueError, match="output of shape"):
            estimator(lambda x: x[:, :1], x, (), lipschitz=0.5, training=True)
    for make in (
        lambda: Exact(rows=0),
        lambda: PowerSeries(terms=0),
        lambda: PowerSeries(terms=-1),
        lambda: PowerSeries(probes=0),
        lambda: PowerSeries(tolerance=0.0),
        lambda: PowerSeries(distribution="uniform"),
        lambda: RussianRoulette(exact_terms=0),
        lambda: RussianRoulette(probability=1.0),
        lambda: RussianRoulette(probability=0.0),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()
