# SPDX-License-Identifier: Apache-2.0
"""Closed inverses in float32: right to 1e-4, or said not to be."""

import copy
import warnings

import pytest
import torch
from escnn import group

import pyro_equiflow as pe
from pyro_equiflow.testing import rounding_error
from pyro_equiflow.transforms import precision
from tests.cases import field_type, point

SO3 = group.so3_group()


def several() -> pe.EquivariantTransform:
    """Irreps of three kinds."""
    return point(SO3, *3 * [SO3.irrep(1)], *2 * [SO3.irrep(0)], SO3.irrep(2))


def relative(found, expected):
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def caught(function):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = function()
    assert all(issubclass(w.category, pe.PrecisionWarning) for w in found)
    return result, [str(w.message) for w in found]


def iaf(seed, transformer, gain=1.0):
    torch.manual_seed(seed)
    transform = pe.equivariant_iaf(several(), transformer=transformer, identity_init=False)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.mul_(gain)
    return transform


def couplings(seed, transformer, name, depth=6):
    torch.manual_seed(seed)
    kind = field_type(name)
    blocks = len(kind.representations)
    halves = [[(k + i) % blocks for i in range(blocks // 2)] for k in range(depth)]
    options = {"transformer": transformer, "identity_init": False, "hidden_dims": (32,)}
    return pe.Compose([pe.equivariant_coupling(kind, split=half, **options) for half in halves])


STEEP = {
    **{f"iaf-spline-{seed}": (lambda seed=seed: iaf(seed, "spline")) for seed in range(6)},
    **{f"iaf-affine-{seed}": (lambda seed=seed: iaf(seed, "affine", 3.0)) for seed in (0, 3, 6)},
    **{
        f"couplings-{t}-{name}": (lambda t=t, name=name: couplings(0, t, name))
        for t, name in [("affine", "O2"), ("commutant", "SO2"), ("spline", "C4"), ("spline", "SO3"), ("spline", "D3"),
                        ("affine", "trivial"), ("spline", "O3")]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STEEP)
def test_an_inverse_is_right_or_says_that_it_is_not(name):
    """Round trips of normal events and scores of events from elsewhere, held against float64; both directions."""
    transform = STEEP[name]()
    double = copy.deepcopy(transform).double()
    x = torch.randn(500, transform.field_type.size)
    for there in (copy.deepcopy(transform), pe.Inverse(copy.deepcopy(transform))):
        with torch.no_grad():
            y, said_there = caught(lambda there=there: there(x.clone()).clone())
        assert y.isfinite().all() or said_there
        if not y.isfinite().all():
            continue  # Pyro's validation refuses it on the way back
        back, said = caught(lambda there=there, y=y: there.inv(y.clone()))
        wrong = relative(back, x) > 1e-4
        assert said or not wrong.any()
        if said:
            assert "of 500 events" in said[0] and ".double()" in said[0]
    score, said = caught(lambda: transform.inv(x.clone()))
    with torch.no_grad():
        expected = double.inv(x.double())
    assert said or (relative(score.double(), expected) < 1e-4).all()


def test_the_estimate_is_that_of_a_condition_number():
    """Of a linear map with singular values s and 1/s, on its strong direction: s^2 times the rounding, closed form."""
    for s in (1.0, 10.0, 100.0):
        q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
        matrix = q @ torch.diag(torch.tensor([s, s, 1 / s, 1 / s], dtype=torch.float64)) @ q.T
        x = torch.randn(2000, 2, dtype=torch.float64) @ q[:, 2:].T  # what the map makes small
        error = rounding_error(lambda x, m=matrix: (x.double() @ m).float(), x.float())
        expected = 2 * s**2 * 2.0**-24
        assert expected / 3 < error.quantile(0.5) < 3 * expected
        assert error.max() < 10 * expected
    # Equal numbers have equal last bits: their common neighbours show nothing of a map that is steep across them.
    across = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], dtype=torch.float64)
    assert rounding_error(lambda x: (x.double() @ across).float() + 1, torch.ones(1, 2)) > 1e-4
    assert rounding_error(lambda x: x - x, torch.randn(3, 4)).max() < 1e-4  # an image that vanishes is not lost
    # Near the origin: to a hundredth of the root of the event's size, here of 9 entries.
    x = torch.full((5, 1, 3, 3), 1e3)
    error = rounding_error(lambda x: x - 1e3, x, 3)
    torch.testing.assert_close(error, torch.full((5,), 2 * 3 * 2.0**-14 / (0.01 * 3)), rtol=0.3, atol=0)
    with pytest.raises(TypeError, match="image: expected a torch.Tensor or None, found"):
        rounding_error(lambda x: x, torch.zeros(2), image=[1.0, 2.0])
    with pytest.raises(TypeError, match="expected a tensor of float32, found torch.float64"):
        rounding_error(lambda x: x, torch.zeros(2, dtype=torch.float64))


@pytest.fixture
def looks(monkeypatch):
    """What was found, once a look."""
    found = []

    def spy(*args, **kwargs):
        found.append(rounding_error(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(precision, "rounding_error", spy)
    return found


def test_when_inverses_are_looked_at(looks):
    transform, y = pe.equivariant_coupling(field_type("O2")), torch.rand(8, 8)

    def inverses(count, size=8, reach=1.0):
        before = len(looks)
        for _ in range(count):
            transform.inv(reach * torch.ones(size, 8))
        return len(looks) - before

    assert inverses(1) == 1 and inverses(31) == 0 and inverses(33) == 2  # with gradients
    assert inverses(1, 15) == 0 and inverses(1, 16) == 1 and inverses(1, 16) == 0
    assert inverses(1, reach=1.4) == 0 and inverses(1, reach=1.6) == 1 and inverses(1, reach=1.6) == 0
    with torch.no_grad():
        assert inverses(1) == 1 and inverses(1) == 0
        next(transform.parameters()).mul_(1.0)
        assert inverses(1) == 1 and inverses(1) == 0
        assert transform.inv(y[:0]).shape == (0, 8)
    optimizer = torch.optim.Adam(transform.parameters())
    transform.inv(y).sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert inverses(1) == 1 and inverses(1) == 0
    # Copies share their looks, so that a family conditioned at every step is not looked at at every step.
    before = len(looks)
    transform.with_cache(0).inv(y)
    assert len(looks) == before
    x = transform(y.clone())
    assert len(looks) == before + 1  # the other direction, for the first time
    transform.inv(x)  # from the cache
    assert len(looks) == before + 1


def test_nobody_looks_where_nobody_can(looks):
    """Under torch.func, in float64, and at what is solved; and a look draws no random numbers and keeps gradients."""
    steep = iaf(6, "affine", 3.0)
    with torch.no_grad():
        x = steep._call(torch.randn(4, 16))
    jacobian = torch.func.jacrev(lambda y: steep.inv(y))(x[0])
    assert jacobian.isfinite().all() and not looks
    copy.deepcopy(steep).double().inv(x.double())
    pe.equivariant_residual(several()).inv(x)
    pe.Compose([pe.equivariant_linear(several()), pe.equivariant_residual(several())]).inv(x)
    assert not looks
    state = torch.random.get_rng_state()
    x.requires_grad_()
    found, said = caught(lambda: steep.inv(x))
    assert looks and said and torch.equal(torch.random.get_rng_state(), state)
    gradient = torch.autograd.grad(found.sum(), x)[0]
    expected = torch.autograd.grad(steep._inverse(x).sum(), x)[0]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_contexts_and_batches():
    """The batch of contexts counts: one event under many contexts is as many inverses."""
    kind = several()
    context_type = point(SO3, SO3.irrep(1))
    torch.manual_seed(6)
    family = pe.conditional_equivariant_iaf(kind, context_type, identity_init=False)
    transform = family.condition(torch.randn(7, 3))
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.mul_(3.0)
    with torch.no_grad():
        y = transform._call(torch.randn(5, 7, 16))
    _, said = caught(lambda: transform.inv(y[0, 0]))
    assert said and "of 7 events" in said[0]
    _, said = caught(lambda: transform.inv(y))
    assert said and "of 35 events" in said[0]


def test_an_inverse_in_float64_is_what_the_message_promises():
    transform, x = iaf(5, "spline"), torch.randn(300, 16)
    with torch.no_grad():
        y = transform(x).clone()
        with pytest.warns(pe.PrecisionWarning, match="of 300 events") as said:
            back = transform.inv(y)
        assert said[0].filename == __file__  # the user's line
        assert relative(back, x).max() > 0.1
        transform.double()
        assert relative(transform.inv(transform(x.double()).clone()), x.double()).max() < 1e-6
