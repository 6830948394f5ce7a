# SPDX-License-Identifier: Apache-2.0
"""A second runner: what Pyro asks of each of its own transforms, over the table, the twins, images and factories.

Beside ``test_properties`` it shares none of its means: differences in place of autograd, hooks in place of the cached
calls, plain normals whose event dimensions the transform itself has to claim.
"""

import copy
from functools import partial

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from escnn import nn as enn

import pyro_equiflow as pe
from tests.cases import CASES, events, field_type, randomize, spatial_shape

SMALL = {"hidden_dims": (8,), "identity_init": False}
SOLVED = {**SMALL, "lipschitz": 0.7, "log_det": pe.logdet.Exact()}
AFFINE = {**SMALL, "log_scale_bound": 1.0}
STEPS = {"coupling": AFFINE, "iaf": AFFINE, "residual": SOLVED, "implicit": SOLVED}


def normal(shape):
    """Without an event: which dimensions become one is the transform's to say."""
    return dist.Normal(torch.zeros(shape, dtype=torch.float64), 1.0)


def draw(shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the contract ---------------------------------------------------------------------------------------------


@torch.no_grad()
def check_inverse(transform, event_shape):
    """The hooks undo each other, past every cache, and the log-det is the same at the preimage that was found."""
    x = draw((4, *event_shape))
    y = transform._call(x)
    found = transform._inverse(y)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-8)
    ladj = transform.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(transform.log_abs_det_jacobian(found, y), ladj, rtol=0, atol=1e-7)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(y, x), -ladj, rtol=0, atol=1e-7)


def check_shapes(transform, event_shape):
    """Shapes of draws, densities and log-dets follow ``event_dim``; shapes are told for events and for batches."""
    x_dim, y_dim = transform.domain.event_dim, transform.codomain.event_dim
    assert x_dim == y_dim == len(event_shape)
    image_shape = transform.forward_shape(torch.Size(event_shape))
    assert transform.inverse_shape(image_shape) == event_shape
    for batch in [(3,), (3, 4), (2, 1, 2)]:
        assert transform.forward_shape(torch.Size((*batch, *event_shape))) == (*batch, *image_shape)
        assert transform.inverse_shape(torch.Size((*batch, *image_shape))) == (*batch, *event_shape)
        flow = dist.TransformedDistribution(normal((*batch, *event_shape)), [transform])
        assert flow.batch_shape == batch and flow.event_shape == image_shape
    y = flow.sample()
    assert y.shape == (*batch, *image_shape)
    assert flow.log_prob(y).shape == batch


def check_constraints(transform, event_shape):
    """Events lie in the domain and images in the codomain, judged one by one; the inverse exchanges the two."""
    x = draw((3, *event_shape))
    y = transform(x).detach()
    assert transform.bijective
    assert transform.domain.check(x).tolist() == 3 * [True] and transform.codomain.check(y).tolist() == 3 * [True]
    y.view(3, -1)[1, -1] = torch.nan
    assert transform.codomain.check(y).tolist() == [True, False, True]
    inverse = transform.inv
    assert inverse.domain.event_dim == transform.codomain.event_dim
    assert inverse.codomain.event_dim == transform.domain.event_dim
    assert inverse.inv is transform


@torch.no_grad()
def jacobian_by_differences(transform, event_shape, step=1e-5):
    x = draw(event_shape, seed=1)
    steps = step * torch.eye(x.numel(), dtype=x.dtype).view(-1, *event_shape)
    moved = transform._call(torch.cat([x + steps, x - steps])).flatten(1)
    return x, (moved[: x.numel()] - moved[x.numel() :]).mT / (2 * step)


@torch.no_grad()
def check_jacobian(transform, event_shape):
    """Differences give the log-det; of an autoregressive flow they are triangular in the order of its blocks."""
    x, jacobian = jacobian_by_differences(transform, event_shape)
    ladj = transform.log_abs_det_jacobian(x, transform(x))
    assert ladj.shape == ()
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], ladj, rtol=1e-6, atol=1e-6)
    if not isinstance(transform, pe.EquivariantIAF):
        return
    fields = transform.field_type.representations
    points = x[0].numel()
    blocks = dict(enumerate(jacobian.split([points * field.size for field in fields])))
    rows = torch.cat([blocks[i] for i in transform.order])
    columns = dict(enumerate(rows.split([points * field.size for field in fields], 1)))
    start, ladj_of_blocks = 0, 0.0
    for i in transform.order:
        stop = start + columns[i].shape[1]
        assert not (columns[i][:start].abs() > 1e-9).any()
        ladj_of_blocks = ladj_of_blocks + torch.linalg.slogdet(columns[i][start:stop])[1]
        start = stop
    torch.testing.assert_close(ladj_of_blocks, ladj, rtol=1e-6, atol=1e-6)


def check_cache(transform, event_shape):
    """Draws score as the same values do by a pass of their own, whichever was drawn last, with a cache or without."""
    base = normal((2, *event_shape))
    for size in (1, 0):
        flow = dist.TransformedDistribution(base, [transform.with_cache(size)])
        first, last = flow.rsample(), flow.rsample()
        for y in (last, first):
            x, minus_ladj = transform.inverse_and_ladj(y.clone())
            expected = base.log_prob(x).flatten(1).sum(1) + minus_ladj
            torch.testing.assert_close(flow.log_prob(y), expected, rtol=1e-7, atol=1e-7)


def check_learning(transform, event_shape, parameters):
    """Steps of maximum likelihood on one batch: every loss is that of a copy, so nothing of the step before stays."""
    parameters = list(parameters)
    if not parameters:
        return
    optimizer = torch.optim.Adam(parameters, 1e-2)
    y = draw((2, *transform.forward_shape(torch.Size(event_shape))), seed=2)

    def loss(transform, y):
        return -dist.TransformedDistribution(normal(event_shape), [transform]).log_prob(y).mean()

    before = loss(transform, y)
    before.backward()
    optimizer.step()
    after = loss(transform, y)
    assert all(p.isfinite().all() for p in parameters)
    assert after != before
    torch.testing.assert_close(after, loss(copy.deepcopy(transform), y.clone()), rtol=1e-8, atol=1e-8)


CHECKS = [check_inverse, check_shapes, check_constraints, check_jacobian, check_cache]


def keeps_the_contract(transform, event_shape, parameters=None):
    for check in CHECKS:
        check(transform, event_shape)
    check_learning(transform, event_shape, transform.parameters() if parameters is None else parameters)


# ---- who has to keep it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_case(case):
    keeps_the_contract(CASES[case]().double(), events(case).shape)


POINTS_AND_GRIDS = [
    "trivial",
    "flips",
    "C4",
    "D3",
    "D8",
    "O2",
    "SO3",
    "cylinder",
    "C4-plane",
    "O2-plane",
    "flips-space",
]


@pytest.mark.parametrize("name", POINTS_AND_GRIDS)
@pytest.mark.parametrize("kind", STEPS)
def test_twins(kind, name):
    """Given a context; and given one each, every row is what its own context makes of it."""
    event_type = field_type(name)
    context_type = enn.FieldType(event_type.gspace, list(event_type.representations[:2]))
    options = {**STEPS[kind], **({"nonlinearity": "gated"} if event_type.gspace.dimensionality == 3 else {})}
    family = randomize(getattr(T, f"conditional_equivariant_{kind}")(event_type, context_type, **options)).double()
    event_shape = (event_type.size, *spatial_shape(name))
    contexts = draw((3, context_type.size, *spatial_shape(name)), seed=4)
    keeps_the_contract(family.condition(contexts[0]), event_shape, family.parameters())
    given = dist.ConditionalTransformedDistribution(normal(event_shape), [family]).condition(contexts)
    assert (given.batch_shape, given.event_shape) == ((3,), event_shape)
    y = given.rsample()
    assert y.shape == (3, *event_shape)
    each = [
        dist.TransformedDistribution(normal(event_shape), [family.condition(context)]).log_prob(row)
        for context, row in zip(contexts, y.clone())
    ]
    torch.testing.assert_close(given.log_prob(y), torch.stack(each), rtol=1e-7, atol=1e-7)
    assert not torch.allclose(family.condition(contexts[0])(y[0].clone()), family.condition(contexts[1])(y[0].clone()))


@pytest.mark.parametrize("kind", STEPS)
def test_image_flows(kind):
    """Gray images on two levels, and with the logistic map that ends in pixel values."""
    gray = field_type("D4-plane").gspace
    gray = enn.FieldType(gray, [gray.trivial_repr])
    options = {key: value for key, value in STEPS[kind].items() if key != "identity_init"}
    flow = pe.image_flow(gray, (4, 4), kind=kind, num_transforms=1, **options)
    flow.inv(1.0 + 2.0 * torch.randn(20, 1, 4, 4))
    flow = randomize(flow).double()
    keeps_the_contract(flow, (1, 4, 4))
    pixels = dist.TransformedDistribution(normal((3, 1, 4, 4)), [flow, pe.LogitTransform(0.05).inv])
    assert (pixels.batch_shape, pixels.event_shape) == ((3,), (1, 4, 4))
    x = pixels.sample()
    assert pixels.support.check(x).all() and pixels.log_prob(x).shape == (3,)


FACTORIES = [n for n in T.__all__ if n.startswith("equivariant_")]


@pytest.mark.parametrize("name", FACTORIES)
def test_registered_factories(name):
    """As users of Pyro find them, with their defaults; several by Pyro's own ``iterated``."""
    event_type, event_shape = field_type("O2"), (8,)
    if name == "equivariant_squeeze":
        event_type, event_shape = field_type("D4-plane"), (4, 4, 4)
    options = {"log_det": pe.logdet.Exact()} if name.split("_")[1] in ("residual", "implicit") else {}
    factory = partial(getattr(T, name), event_type, **options)
    transform = factory()
    if name == "equivariant_actnorm":
        transform(1.0 + 2.0 * torch.randn(20, 8))
    keeps_the_contract(randomize(transform).double(), event_shape)
    if transform.out_type != event_type:  # a squeeze does not follow itself
        return
    several = T.iterated(2, factory).double()
    several(draw((20, *event_shape)))
    randomize(several)
    x = draw((3, *event_shape))
    y = several(x)
    between = several.parts[0](x.clone())
    sum_of_parts = sum(t.log_abs_det_jacobian(a, b) for t, a, b in zip(several.parts, (x, between), (between, y)))
    torch.testing.assert_close(several.log_abs_det_jacobian(x, y), sum_of_parts)
    torch.testing.assert_close(several.inv(y.detach().clone()), x, rtol=0, atol=1e-8)
    check_shapes(several, event_shape)
    check_learning(several, event_shape, several.parameters())


def test_all_factories_are_registered():
    assert len(FACTORIES) == 7 and {f"conditional_equivariant_{kind}" for kind in STEPS} <= set(T.__all__)


# ---- the runner against transforms that are wrong -------------------------------------------------------------


def sign_of_the_log_det(transform):
    class Wrong(type(transform)):
        def _log_det(self, x, y):
            return -super()._log_det(x, y)

        def _call_and_ladj(self, x):
            y, ladj = super()._call_and_ladj(x)
            return y, -ladj

    return Wrong


def event_dim_too_large(transform):
    class Wrong(type(transform)):
        event_dim = 2
        field_type = transform.field_type

        @property
        def domain(self):
            return torch.distributions.constraints.independent(torch.distributions.constraints.real, 2)

        codomain = domain

    return Wrong


def inverse_half_way(transform):
    class Wrong(type(transform)):
        def _inverse_and_ladj(self, y):
            x, ladj = super()._inverse_and_ladj(y)
            return 0.5 * (x + y), ladj

    return Wrong


def shape_without_the_batch(transform):
    class Wrong(type(transform)):
        def forward_shape(self, shape):
            return shape[-1:]

    return Wrong


def cache_that_keeps_a_score(transform):
    class Wrong(type(transform)):
        kept = None

        def log_abs_det_jacobian(self, x, y):
            if self.kept is None:
                self.kept = super().log_abs_det_jacobian(x, y)
            return self.kept

    return Wrong


@pytest.mark.parametrize(
    "plant, check",
    [
        (sign_of_the_log_det, check_jacobian),
        (event_dim_too_large, check_shapes),
        (inverse_half_way, check_inverse),
        (shape_without_the_batch, check_shapes),
        (cache_that_keeps_a_score, check_cache),
    ],
)
def test_wrong_transforms_are_caught(plant, check):
    transform = CASES["coupling-O2"]().double()
    check(transform, (8,))
    wrong = copy.copy(transform)
    wrong.__class__ = plant(transform)
    with pytest.raises(AssertionError):
        check(wrong, (8,))
