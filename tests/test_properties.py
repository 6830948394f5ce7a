# SPDX-License-Identifier: Apache-2.0
"""What holds for every transform: the table of cases times the properties."""

import copy
import gc
import io
import pickle
import weakref

import cloudpickle
import pytest
import torch

from pyro_equiflow import InvariantNormal, Inverse, testing
from pyro_equiflow._escnn.elements import probe_elements
from pyro_equiflow.ops.events import act, event_dim, grid_elements
from tests.cases import BATCH_SHAPES, CASES, DTYPES, ONE_OF_EACH, events

every_case = pytest.mark.parametrize("case", CASES)
every_kind = pytest.mark.parametrize("case", ONE_OF_EACH)


def parameters_and_state(transform):
    return {name: value.clone() for name, value in transform.state_dict().items()}


@every_case
def test_equivariance_inverse_and_shapes(case):
    transform = CASES[case]()
    for dtype in DTYPES:
        transform = transform.to(dtype)
        for batch in BATCH_SHAPES:
            x = events(case, batch, dtype)
            y, ladj = transform.call_and_ladj(x)
            assert y.shape == x.shape and ladj.shape == batch
            assert y.dtype == ladj.dtype == dtype
            # Random weights: an identity would pass everything.
            assert not torch.allclose(y, x, atol=1e-2)
            testing.assert_inverse(transform, x)
        testing.assert_equivariant(transform, x)
        testing.assert_equivariant(transform.inv, x)


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, torch.float64) for case in CASES] + [(case, torch.float32) for case in ONE_OF_EACH]
)
def test_log_det_is_the_dense_jacobians(case, dtype):
    transform = CASES[case]().to(dtype)
    x = events(case, (2,), dtype, seed=1)
    testing.assert_log_det(transform, x[:1] if x[0].numel() > 60 else x)


@every_case
def test_log_det_is_invariant(case):
    """Follows from equivariance, and is computed another way."""
    transform = CASES[case]().double()
    x, kind = events(case, (3,), torch.float64), transform.field_type
    # On points as many elements as decide.
    elements = None if kind.gspace.dimensionality else probe_elements(kind.fibergroup)
    testing.assert_invariant(lambda x: transform.call_and_ladj(x)[1], x, kind, elements=elements)


@every_kind
def test_batches_are_events_one_by_one(case):
    transform = CASES[case]().double()
    x = events(case, (2, 3), torch.float64)
    y, ladj = transform.call_and_ladj(x)
    for i in range(2):
        for j in range(3):
            y_one, ladj_one = transform.call_and_ladj(x[i, j])
            torch.testing.assert_close(y_one, y[i, j], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(ladj_one, ladj[i, j], rtol=1e-12, atol=1e-12)
    empty = transform(x[:0])
    assert empty.shape == x[:0].shape
    strided = transform(x.movedim(-1, 0).contiguous().movedim(0, -1))
    torch.testing.assert_close(strided, y, rtol=1e-12, atol=1e-12)


@every_kind
def test_call_pieces_agree(case):
    """Pyro's checks of a transform: hooks undo each other, log-dets of both directions are opposite."""
    transform = CASES[case]().double()
    x = events(case, (3,), torch.float64)
    y, ladj = transform.call_and_ladj(x)
    torch.testing.assert_close(transform._inverse(transform._call(x)), x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(transform._call(transform._inverse(x)), x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(transform._call(x), y, rtol=0, atol=0)
    torch.testing.assert_close(transform(x.clone()), y, rtol=0, atol=0)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x.clone(), y.clone()), ladj, rtol=0, atol=0)
    back, ladj_back = transform.inverse_and_ladj(y.clone())
    torch.testing.assert_close(back, x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ladj_back, -ladj, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(y, x), -ladj, rtol=1e-11, atol=1e-11)
    assert transform.bijective
    assert transform.domain.event_dim == transform.codomain.event_dim == event_dim(transform.field_type)
    assert transform.domain.check(x).all() and transform.domain.check(x).shape == (3,)
    assert transform.forward_shape(x.shape) == transform.inverse_shape(x.shape) == x.shape


@every_kind
def test_log_det_by_finite_differences(case):
    """Pyro's own numerical check, without autograd."""
    transform = CASES[case]().double()
    x = events(case, (), torch.float64, seed=2)
    size, step = x.numel(), 1e-5
    steps = step * torch.eye(size, dtype=x.dtype).view(size, *x.shape)
    with torch.no_grad():
        jacobian = (transform(x + steps) - transform(x - steps)).reshape(size, size).mT / (2 * step)
        _, ladj = transform.call_and_ladj(x)
    assert abs(torch.linalg.slogdet(jacobian)[1] - ladj) < 1e-6


@every_kind
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradients_by_finite_differences(case, direction):
    """Values and log-dets, with respect to the event and to all parameters at once."""
    transform = CASES[case]().double()
    x = events(case, (2,), torch.float64, seed=3).requires_grad_()
    module = _BothOutputs(transform if direction == "forward" else transform.inv)
    names = [name for name, _ in module.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values)), (x.clone(),))

    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


class _BothOutputs(torch.nn.Module):
    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, x):
        return self.transform.call_and_ladj(x)


@every_kind
def test_every_parameter_has_a_gradient(case):
    transform = CASES[case]()
    x = events(case, (4,))
    for direction in (transform, transform.inv):
        transform.zero_grad()
        y, ladj = direction.call_and_ladj(x)
        (y.square().sum() + ladj.sum()).backward()
        for name, parameter in transform.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert any(p.grad.any() for p in transform.parameters())


@every_kind
def test_copies_and_pickles_after_a_pass(case):
    transform = CASES[case]()
    x = events(case, (3,))
    y = transform(x)
    y.sum().backward()
    expected = y.detach()

    saved = io.BytesIO()
    torch.save(transform, saved)
    saved.seek(0)
    twins = {
        "deepcopy": copy.deepcopy(transform),
        "pickle": pickle.loads(pickle.dumps(transform)),
        "cloudpickle": pickle.loads(cloudpickle.dumps(transform)),
        "torch.save": torch.load(saved, weights_only=False),
    }
    for name, twin in twins.items():
        assert twin.field_type == transform.field_type, name
        torch.testing.assert_close(twin(x).detach(), expected, rtol=0, atol=0)
        testing.assert_equivariant(twin, x)
        # A copy is on its own.
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(0.1)
        assert not torch.allclose(twin(x), expected)
        torch.testing.assert_close(transform(x.clone()).detach(), expected, rtol=0, atol=0)


@every_kind
def test_state_dict_crosses_modes(case):
    source, target = CASES[case](), CASES[case]()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    x = events(case, (3,))
    source.train()
    y = source(x)
    names = dict(source.named_parameters()) | dict(source.named_buffers())
    state = parameters_and_state(source)
    numbers = {name: value for name, value in state.items() if not name.endswith("_extra_state")}  # says what it is of
    assert set(numbers) == set(names)
    assert sum(v.numel() for v in numbers.values()) <= sum(p.numel() for p in source.parameters()) + 8
    target.eval()
    target(x)
    assert not target.load_state_dict(state).missing_keys
    torch.testing.assert_close(target(x.clone()), y, rtol=0, atol=0)
    assert set(target.state_dict()) == set(state)
    source.eval()
    torch.testing.assert_close(source(x.clone()), y, rtol=0, atol=0)
    assert list(source.state_dict()) == list(state)


@every_kind
def test_a_step_in_eval_mode_counts(case):
    transform = CASES[case]().eval()
    x = events(case, (3,))
    optimizer = torch.optim.SGD(transform.parameters(), 0.1)
    before = transform(x)
    (before.square().sum() + transform.log_abs_det_jacobian(x, before).sum()).backward()
    optimizer.step()
    assert not torch.allclose(transform(x), before)


@every_kind
def test_double_leaves_others_alone(case):
    first, second = CASES[case](), CASES[case]()
    x = events(case, (3,))
    expected = first(x)
    second.double()
    second(x.double())
    assert all(p.dtype == torch.float32 for p in first.parameters())
    torch.testing.assert_close(first(x.clone()), expected, rtol=0, atol=0)
    second.float()
    torch.testing.assert_close(second(x), expected, rtol=0, atol=0)


@every_kind
def test_the_inverse_is_a_module(case):
    transform = CASES[case]()
    inverse = transform.inv
    assert isinstance(inverse, torch.nn.Module)
    assert inverse.inv is transform
    assert transform.inv is inverse
    assert {id(p) for p in inverse.parameters()} == {id(p) for p in transform.parameters()} != set()
    assert inverse.domain.event_dim == transform.domain.event_dim


@pytest.mark.parametrize("case", ["coupling-O2", "residual-C4-plane"])
def test_one_inverse_while_it_lives(case):
    transform = CASES[case]()
    inverse = transform.inv
    another = Inverse(transform)
    assert transform.inv is inverse and another.inv is transform
    gone = weakref.ref(inverse)
    del inverse
    gc.collect()
    assert gone() is None
    again = transform.inv
    assert transform.inv is again is not another


@every_kind
def test_the_flow_is_invariant(case):
    """The point of it all: an invariant base through an equivariant transform."""
    transform = CASES[case]().double()
    x = events(case, (3,), torch.float64)
    kind = transform.field_type
    base = InvariantNormal(
        kind,
        tuple(x.shape[2:]),
        scale=torch.linspace(0.5, 2.0, InvariantNormal(kind, tuple(x.shape[2:])).num_scales).double(),
    )
    flow = torch.distributions.TransformedDistribution(base, [transform])
    for g in grid_elements(kind):
        torch.testing.assert_close(
            flow.log_prob(act(kind, g, x)), flow.log_prob(x), rtol=1e-9, atol=1e-9, msg=f"at {g}"
        )


@every_kind
def test_a_transform_that_is_not_equivariant_is_caught(case):
    """Planted: one channel shifted, a wrong log-det, a forward map that is not the inverse's inverse."""
    transform = CASES[case]()
    x = events(case, (3,))
    spoilt = torch.zeros(x.shape[1:])
    spoilt[(0,) * spoilt.dim()] = 1e-3
    with pytest.raises(AssertionError, match="equivariance error .* at the group element"):
        testing.assert_equivariant(lambda x: transform(x) + spoilt, x, transform.field_type)

    class Wrong(type(transform)):
        def log_abs_det_jacobian(self, x, y):
            return super().log_abs_det_jacobian(x, y) + 1e-2

    wrong = copy.copy(transform)
    wrong.__class__ = Wrong
    with pytest.raises(AssertionError, match="log-det error"):
        testing.assert_log_det(wrong, x[:1])

    class WrongInverse(type(transform)):
        def __call__(self, x):
            return super().__call__(x) * 1.001

    wrong.__class__ = WrongInverse
    with pytest.raises(AssertionError, match="inverse error"):
        testing.assert_inverse(wrong, x)
