# SPDX-License-Identifier: Apache-2.0
"""Gradients of residual and implicit transforms: against finite differences, unrolled steps, and sample by sample."""

import pyro.distributions as dist
import pytest
import torch
from escnn import group
from pyro.distributions import TransformedDistribution
from torch.autograd import grad, gradcheck, gradgradcheck

from pyro_equiflow.logdet import Exact, PowerSeries, RussianRoulette
from pyro_equiflow.solvers import UnrolledAdjoint
from pyro_equiflow.transforms import contraction
from tests.cases import point
from tests.test_contraction import FACTORIES, c4_image, solved

every_kind = pytest.mark.parametrize("kind", FACTORIES)

C4, SO2, O2 = group.cyclic_group(4), group.so2_group(), group.o2_group()
#: Types, the grid, and the width of the one hidden layer: pointwise functions, gates, and an image.
SMALL = {
    "C4": (lambda: point(C4, C4.irrep(1), C4.irrep(0)), (), 4),
    "SO2": (lambda: point(SO2, SO2.irrep(1), SO2.irrep(0)), (), 5),
    "O2": (lambda: point(O2, O2.irrep(1, 1), O2.irrep(0, 0)), (), 5),
    "C4-plane": (c4_image, (2, 2), 4),
}


def small(kind, name, **options):
    """In float64, solved far below the differences that are taken."""
    make, grid, width = SMALL[name]
    options = {"hidden_dims": (width,), "lipschitz": 0.7, "tolerance": 1e-13, **options}
    transform = solved(kind, make(), **options).double()
    return transform, torch.randn(2, transform.field_type.size, *grid, dtype=torch.float64)


class Asked(torch.nn.Module):
    """A question to a transform as a module, so that its parameters can be exchanged."""

    def __init__(self, transform, question):
        super().__init__()
        self.transform = transform
        self.question = question

    def forward(self, x):
        return self.question(self.transform, x)


def density(transform, x):
    return TransformedDistribution(dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(x.dim() - 1), [transform])


def reparametrised(transform, x):
    """Draws of one noise, their density, and that of draws moved by ``x``."""
    torch.manual_seed(3)
    flow = density(transform, x.detach())
    draw = flow.rsample((2,))
    return draw, flow.log_prob(draw), flow.log_prob(draw + 0.1 * x)


QUESTIONS = {
    "forward": lambda transform, x: transform(x.clone()),
    "inverse": lambda transform, x: transform.inv(x.clone()),
    "log_prob": lambda transform, x: density(transform, x).log_prob(x.clone()),
    "rsample": reparametrised,
}


def as_function(module):
    names = [name for name, _ in module.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values)), (x,))

    return function, [p.detach().clone().requires_grad_() for p in module.parameters()]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", ["C4", "SO2", "C4-plane"])
@every_kind
def test_finite_differences(kind, name, question):
    """With respect to the event and every parameter, one entry after the other."""
    transform, x = small(kind, name)
    function, parameters = as_function(Asked(transform, QUESTIONS[question]))
    # All entries one by one on points; on images along random directions.
    assert gradcheck(function, (x.requires_grad_(), *parameters), fast_mode=name == "C4-plane", rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", ["C4", "SO2", "C4-plane"])
@every_kind
def test_the_unrolled_adjoint_agrees(kind, name, question):
    transform, x = small(kind, name)
    found = {}
    for adjoint in (None, UnrolledAdjoint()):
        transform.adjoint = adjoint
        function, parameters = as_function(Asked(transform, QUESTIONS[question]))
        outputs = function(x.requires_grad_(), *parameters)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((torch.linspace(1, 2, o.numel(), dtype=o.dtype) * o.flatten()).sum() for o in outputs)
        found[adjoint] = grad(total, [x, *parameters])
    for ours, unrolled in zip(*found.values()):
        assert (ours - unrolled).abs().max() <= 1e-8
    assert all(g.abs().max() > 1e-6 for g in found[None])


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@every_kind
def test_a_loss_scaled_scales_the_gradient(kind, scale):
    transform, x = small(kind, "SO2", tolerance=None)
    inputs = [x.requires_grad_(), *transform.parameters()]

    def loss():
        back = transform.inv(x.clone())
        return back.sin().sum() + density(transform, x).log_prob(x.clone()).sum()

    for plain, scaled in zip(grad(loss(), inputs), grad(scale * loss(), inputs)):
        torch.testing.assert_close(scaled / scale, plain, rtol=1e-11, atol=1e-12)


WEIGHTS = torch.tensor([0.0, 1e-6, 1.0, -3.0, 1e6], dtype=torch.float64)


@pytest.mark.parametrize(
    "estimator", [Exact(), PowerSeries(probes=3), RussianRoulette()], ids=lambda e: type(e).__name__
)
@every_kind
def test_unequal_weights_of_samples_one_by_one(kind, estimator):
    """Under ``eval()`` probes are the same for every sample: a batch is its samples, each with its weight."""
    transform, _ = small(kind, "O2", log_det=estimator)
    transform.eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    parameters = list(transform.parameters())

    def weighed(rows, weights):
        leaf = x[rows].clone().requires_grad_()
        value = density(transform, leaf).log_prob(leaf.clone())
        return grad((weights * value).sum(), [leaf, *parameters])

    whole, *whole_parameters = weighed(slice(None), WEIGHTS)
    alone = [weighed(slice(i, i + 1), WEIGHTS[i]) for i in range(5)]
    torch.testing.assert_close(whole, torch.cat([first for first, *_ in alone]), rtol=1e-9, atol=1e-16)
    for together, *parts in zip(whole_parameters, *(rest for _, *rest in alone)):
        torch.testing.assert_close(together, sum(parts), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", [PowerSeries(probes=2), RussianRoulette()], ids=lambda e: type(e).__name__)
@every_kind
def test_unequal_weights_of_random_draws(kind, estimator):
    """In training every sample has probes of its own; the seed brings them back."""
    transform, _ = small(kind, "SO2", log_det=estimator)
    x = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
    inputs = [x, *transform.parameters()]

    def weighed(weights):
        torch.manual_seed(11)
        return grad((weights * density(transform, x).log_prob(x.clone())).sum(), inputs)

    together = weighed(WEIGHTS)
    parts = [weighed(row) for row in torch.diag(WEIGHTS)]
    for whole, *rows in zip(together, *parts):
        torch.testing.assert_close(whole, sum(rows), rtol=1e-9, atol=1e-9)
    # Another sample's weight is no business of a sample's gradient.
    assert not parts[2][0][[0, 1, 3, 4]].any() and parts[2][0][2].all()


@pytest.mark.parametrize("question", ["forward", "inverse", "log_prob"])
@every_kind
def test_second_derivatives(kind, question):
    transform, x = small(kind, "SO2")
    function, parameters = as_function(Asked(transform, QUESTIONS[question]))
    assert gradgradcheck(function, (x.requires_grad_(), *parameters), fast_mode=True, rtol=1e-4, atol=1e-6)


def test_second_derivatives_of_estimates_are_refused():
    for kind in FACTORIES:
        transform, x = small(kind, "SO2", log_det=RussianRoulette())
        x.requires_grad_()
        (first,) = grad(density(transform, x).log_prob(x.clone()).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives of a log-det estimated with random probes"):
            first.sum().backward()


# ---- planted faults -----------------------------------------------------------------------------------------


class OneStep(UnrolledAdjoint):
    """The Jacobian of one step, without the inverse of ``1 - J^T``."""

    def __init__(self):
        super().__init__(steps=1)


@every_kind
def test_an_adjoint_without_its_linear_solve_is_caught(kind):
    transform, x = small(kind, "SO2", adjoint=OneStep())
    function, parameters = as_function(Asked(transform, QUESTIONS["inverse"]))
    assert not gradcheck(function, (x.requires_grad_(), *parameters), fast_mode=True, raise_exception=False)


@every_kind
def test_a_log_det_of_the_wrong_sign_is_caught(kind, monkeypatch):
    pull = contraction.ContractionTransform._pull

    def wrong(self, map_, y, before, deferred):
        x, ladj = pull(self, map_, y, before, deferred)
        return x, lambda: -ladj()

    monkeypatch.setattr(contraction.ContractionTransform, "_pull", wrong)
    transform, y = small(kind, "SO2")
    x, ladj = transform.inverse_and_ladj(y)
    jacobian = torch.autograd.functional.jacobian(lambda y: transform.inv(y.clone()), y[0])
    right = torch.linalg.slogdet(jacobian)[1]
    assert abs(ladj[0] - right) > 1e-3
    monkeypatch.undo()
    torch.testing.assert_close(transform.inverse_and_ladj(y)[1][0], right, rtol=1e-10, atol=1e-10)


@every_kind
def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_solvers_steps(kind):
    """Also where the unrolled adjoint's does."""

    def kept(**options):
        transform, y = small(kind, "SO2", lipschitz=0.9, **options)
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.element_size() * tensor.nelement()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            transform.inverse_and_ladj(y)
        return total, int(transform.inverse_solution(y).steps.max())

    few, many = kept(tolerance=1e-1), kept(tolerance=1e-13)
    assert many[1] >= few[1] + 4
    assert many[0] == few[0]
    assert (
        kept(tolerance=1e-1, adjoint=UnrolledAdjoint(steps=40))[0]
        > 2 * kept(tolerance=1e-1, adjoint=UnrolledAdjoint(steps=10))[0]
    )
