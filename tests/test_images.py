# SPDX-License-Identifier: Apache-2.0
"""Multi-scale flows of images, and images as data: exact symmetry, exact bits."""

import copy
import itertools
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from escnn import gspaces
from escnn import nn as enn
from torch.distributions import AffineTransform, SigmoidTransform, Transform, constraints

import pyro_equiflow as pe
from pyro_equiflow import testing
from tests.cases import randomize

C4, D4 = gspaces.rot2dOnR2(4), gspaces.flipRot2dOnR2(4)
KINDS = {
    "coupling": {"log_scale_bound": 1.0},
    "iaf": {"log_scale_bound": 1.0},
    "residual": {"lipschitz": 0.7, "log_det": pe.logdet.Exact()},
    "implicit": {"lipschitz": 0.7, "log_det": pe.logdet.Exact()},
}
every_step = pytest.mark.parametrize("kind", KINDS)


def gray(space):
    return enn.FieldType(space, [space.trivial_repr])


def image_flow(field_type, shape, kind="coupling", **options):
    """A small one far from the identity, in float64, its actnorms set."""
    options = {"num_transforms": 2, "hidden_dims": (8,), **KINDS[kind], **options}
    flow = pe.image_flow(field_type, shape, kind=kind, **options)
    flow.inv(0.5 + 2.0 * torch.randn(20, field_type.size, *shape))
    return randomize(flow).double()


def noise(field_type, shape):
    return dist.Normal(torch.zeros(field_type.size, *shape, dtype=torch.float64), 1.0).to_event(1 + len(shape))


# ---- one level ------------------------------------------------------------------------------------------------


def level(space, field, **options):
    """A level with a second one below it."""
    kind = enn.FieldType(space, [field])
    squeezed, deeper = pe.MultiScale.types(kind, **options)
    make = {"num_transforms": 1, "hidden_dims": (8,), "log_scale_bound": 1.0, "actnorm": False}
    second = pe.equivariant_flow(deeper, **make)
    return randomize(pe.MultiScale(kind, pe.equivariant_flow(squeezed, **make), second, **options)).double()


LEVELS = {
    "C4-regular": lambda: level(C4, C4.regular_repr),
    "C4-irrep-haar": lambda: level(C4, C4.irrep(1), haar=True),
    "D4-gray-haar": lambda: level(D4, D4.trivial_repr, haar=True, kept=[0, 2]),
    "D4-quotient": lambda: level(D4, D4.quotient_repr((0, 1)), kept=[1]),
    "mirror-space": lambda: level(gspaces.mirOnR3(), gspaces.mirOnR3().trivial_repr, haar=True),
}


@pytest.mark.parametrize("name", LEVELS)
def test_the_laws_of_a_level(name):
    transform = LEVELS[name]()
    x = torch.randn(2, transform.field_type.size, *(transform.event_dim - 1) * (4,), dtype=torch.float64)
    y, ladj = transform.call_and_ladj(x)
    assert y.shape == x.shape and ladj.shape == (2,) and transform.out_type == transform.field_type
    assert (y - x).abs().max() > 0.1
    testing.assert_equivariant(transform, x)
    testing.assert_inverse(transform, x)
    testing.assert_log_det(transform, x[:1])
    with torch.no_grad():  # drawn without a log-det, which is made when asked for
        drawn = transform(x.clone())
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, drawn), ladj.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(drawn, y.detach(), rtol=1e-12, atol=1e-12)
    twins = copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))
    assert all(torch.equal(twin(x), y) for twin in twins)


def test_what_stops_does_not_see_the_deeper_part():
    """Changed weights below change what goes on, and nothing else."""
    transform = level(C4, C4.regular_repr)
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    squeeze = pe.EquivariantSqueeze(transform.field_type)
    before = squeeze(transform(x.clone()))
    randomize(transform[2])
    with torch.no_grad():
        for parameter in transform[2].parameters():
            parameter.add_(0.3)
    after = squeeze(transform(x.clone()))
    deeper = transform[2].transform.field_type
    # The first two of four regular fields have half of the channels: these go on.
    assert deeper.representations == 2 * (C4.regular_repr,)
    assert torch.equal(before[:, 8:], after[:, 8:])
    assert ((before[:, :8] - after[:, :8]).abs().amax((0, 2, 3)) > 1e-3).all()


def test_which_fields_go_on():
    squeezed, deeper = pe.MultiScale.types(gray(D4), haar=True)
    # The average and both first differences, which are one field; the diagonal difference stops.
    assert [field.size for field in squeezed.representations] == [1, 2, 1]
    assert deeper.representations == squeezed.representations[:2]
    assert pe.MultiScale.types(gray(D4), haar=True, kept=[1])[1].representations == squeezed.representations[1:2]
    colours = enn.FieldType(C4, 3 * [C4.trivial_repr])
    assert pe.MultiScale.types(colours)[1].representations == 2 * (C4.regular_repr,)
    # Never all go on, where the last field has more than half.
    unequal = pe.MultiScale.types(enn.FieldType(C4, [C4.trivial_repr, C4.irrep(1)]))
    assert [field.size for field in unequal[0].representations] == [4, 8]
    assert unequal[1].representations == (C4.regular_repr,)
    plain = pe.MultiScale.types(gray(gspaces.trivialOnR2()))[1]
    assert plain.size == 2


@pytest.mark.parametrize("build, error, message", [
    (lambda: pe.MultiScale.types(gray(C4)), ValueError, "at least two fields, found .*take haar=True"),
    (lambda: pe.MultiScale.types(gray(C4), haar=True, kept=[]), ValueError, "kept: expected distinct .* 3 fields"),
    (lambda: pe.MultiScale.types(gray(C4), haar=True, kept=[0, 1, 2]), ValueError, "kept: expected .*found"),
    (lambda: pe.MultiScale.types(gray(C4), haar=True, kept=[0, 0]), ValueError, "kept: expected .*found"),
    (lambda: pe.MultiScale.types(gray(C4), haar=True, kept=[3]), ValueError, "kept: expected .*found"),
    (lambda: pe.MultiScale(gray(C4), torch.nn.Identity()), TypeError, "transform: expected an Equivariant"),
    (lambda: pe.MultiScale(gray(C4), pe.equivariant_linear(gray(C4))), ValueError,
     "transform: expected a transform of the type .*found .*see MultiScale.types"),
    (lambda: pe.MultiScale(gray(C4), pe.equivariant_linear(pe.MultiScale.types(gray(C4), haar=True)[0]),
                           pe.equivariant_linear(gray(D4)), haar=True), ValueError, "deeper: expected a transform of"),
    (lambda: pe.MultiScale(gray(C4), pe.equivariant_linear(pe.MultiScale.types(gray(C4), haar=True)[0]), haar=True,
                           kept=[0]), ValueError, "kept: expected None where no transform goes deeper"),
    (lambda: pe.MultiScale.types(gray(gspaces.rot2dOnR2(8))), ValueError, "expected a group of quarter turns"),
])  # fmt: skip
def test_wrong_levels(build, error, message):
    with pytest.raises(error, match=message):
        build()


# ---- whole flows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, space", [*((kind, D4) for kind in KINDS), ("coupling", C4), ("iaf", C4)], ids=str)
def test_image_flows(kind, space):
    """One gray channel: laws of the transform, and the density's invariance under all eight turns and flips."""
    flow = image_flow(gray(space), (8, 8), kind, padding_mode="circular")
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert (flow(x.clone()) - x).abs().max() > 0.1
        testing.assert_inverse(flow, x, tolerance=1e-10)
    testing.assert_equivariant(flow, x)
    density = dist.TransformedDistribution(noise(gray(space), (8, 8)), [flow])
    testing.assert_invariant(density, x, gray(space))
    drawn = density.rsample((2,))
    assert drawn.shape == (2, 1, 8, 8) and density.log_prob(drawn).shape == (2,)


@every_step
def test_log_dets_of_image_flows(kind):
    """Against the dense Jacobian."""
    flow = image_flow(gray(D4), (4, 4), kind)
    testing.assert_log_det(flow, torch.randn(1, 1, 4, 4, dtype=torch.float64))


@every_step
def test_translations_are_exact_on_periodic_images(kind):
    """Circular padding: by multiples of 2^levels pixels, and by no others."""
    flow = image_flow(gray(C4), (8, 8), kind, padding_mode="circular", actnorm=False, num_transforms=1)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)

    def error(function, *step):
        with torch.no_grad():
            y = function(x)
            return float((function(x.roll(step, (2, 3))) - y.roll(step, (2, 3))).abs().max() / y.abs().max())

    for direction in (flow, flow.inv):
        for step in [(4, 0), (0, 4), (4, 4)]:
            assert error(direction, *step) < 1e-11
        for step in [(1, 0), (0, 2), (2, 2)]:
            assert error(direction, *step) > 1e-3
    zeros = image_flow(gray(C4), (8, 8), kind, actnorm=False, num_transforms=1)
    assert error(zeros.inv, 4, 0) > 1e-3
    # A level less, and half of the distance is enough.
    one = image_flow(gray(C4), (8, 8), kind, levels=1, padding_mode="circular", actnorm=False, num_transforms=1)
    assert error(one.inv, 2, 0) < 1e-11


@pytest.mark.parametrize("space, channels, shape, levels, haar", [
    (C4, 1, (28, 28), 2, True),
    (gspaces.flipRot2dOnR2(2), 1, (4, 8), 2, True),
    (gspaces.flip2dOnR2(), 1, (4, 8), 1, False),
    (gspaces.trivialOnR2(), 1, (4, 6), 1, False),
    (D4, 3, (4, 4), 2, False),
    (gspaces.rot2dOnR2(2), 2, (8, 8), 3, False),
], ids=str)  # fmt: skip
def test_shapes_levels_and_colours(space, channels, shape, levels, haar):
    kind = enn.FieldType(space, channels * [space.trivial_repr])
    flow = image_flow(kind, shape, levels=levels, haar=haar)
    assert isinstance(flow.inv, pe.MultiScale)  # images are scored forwards
    x = torch.randn(2, channels, *shape, dtype=torch.float64)
    testing.assert_equivariant(flow, x)
    testing.assert_inverse(flow, x)
    depth, present = 0, flow.transform
    while present is not None:
        depth += 1
        present = present[2].transform if len(present) == 4 else None
    assert depth == levels


@pytest.mark.parametrize("space", [C4, D4, gspaces.trivialOnR2()], ids=str)
def test_each_field_conditions_each_other(space):
    """In some of four couplings: no linear map would bring together unlike fields that never meet."""
    flow = randomize(pe.image_flow(gray(space), (8, 8), hidden_dims=(8,), actnorm=False, linear=False)).double()
    steps, fields = flow.transform[1], flow.transform[1].field_type.representations
    x = torch.randn(4, 1, 1, dtype=torch.float64)
    slopes = torch.stack([torch.autograd.functional.jacobian(step, x).reshape(4, 4).abs() for step in steps])
    field = torch.repeat_interleave(torch.arange(len(fields)), torch.tensor([f.size for f in fields]))
    others = field[:, None] != field
    assert len(steps) == 4 and (slopes.amax(0)[others] > 1e-6).all()
    assert ((slopes > 1e-12) & others).any((1, 2)).all()  # the measure sees every step's split


def test_which_fields_of_an_image_go_on():
    """Three channels of the first cells in place of two."""
    plain = gray(gspaces.trivialOnR2())
    deeper = [pe.image_flow(plain, (8, 8), num_transforms=1, hidden_dims=(8,), kept=kept).transform[2].transform
              for kept in (None, [0, 1, 2])]  # fmt: skip
    assert [part.field_type.size for part in deeper] == [2, 3]
    with pytest.raises(ValueError, match="kept: expected None where no transform goes deeper"):
        pe.image_flow(plain, (8, 8), levels=1, num_transforms=1, hidden_dims=(8,), kept=[0])


@every_step
def test_image_flows_start_as_the_identity(kind):
    flow = pe.image_flow(gray(D4), (8, 8), kind=kind, num_transforms=1, hidden_dims=(8,), actnorm=False).eval()
    x = torch.randn(2, 1, 8, 8)
    y, ladj = flow.call_and_ladj(x)
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ladj, torch.zeros(2), rtol=0, atol=1e-4)


def test_volumes():
    """Where the group permutes the grid."""
    space = gspaces.mirOnR3()
    flow = image_flow(gray(space), (4, 4, 4), num_transforms=1, nonlinearity="gated")
    x = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64)
    testing.assert_equivariant(flow, x)
    testing.assert_inverse(flow, x)


@pytest.mark.parametrize("shape, options, message", [
    ((7, 7), {}, r"shape: expected side lengths that are multiples of 4 for 2 levels, found \(7, 7\); pad or crop"),
    ((28, 28), {"levels": 3}, "multiples of 8 for 3 levels"),
    ((8, 4), {}, r"expected a grid that .* maps to itself, found \(8, 4\)"),
    ((8,), {}, r"shape: expected 2 side lengths, found \(8,\)"),
    ((1, 8, 8), {}, r"shape: expected 2 side lengths, found \(1, 8, 8\); .* channels are not among them"),
    ((0, 0), {}, r"shape: expected positive integers, found \(0, 0\)"),
    ((8, 8), {"levels": 0}, "levels: expected a positive integer, found 0"),
    ((8, 8), {"haar": False}, "take haar=True"),
    ((8, 8), {"kind": "spline"}, "kind: expected one of"),
    ((8, 8), {"padding_mode": "reflect"}, "padding_mode: expected"),
])  # fmt: skip
def test_wrong_image_flows(shape, options, message):
    with pytest.raises(ValueError, match=message):
        pe.image_flow(gray(C4), shape, **options)


def test_groups_without_a_squeeze():
    with pytest.raises(ValueError, match="field_type: expected a group of quarter turns and flips, .* found C8"):
        pe.image_flow(gray(gspaces.rot2dOnR2(8)), (8, 8))
    with pytest.raises(
        ValueError, match="field_type: expected a type over a 2-D or 3-D grid, .* which has no base space"
    ):
        pe.image_flow(gray(gspaces.no_base_space(C4.fibergroup)), (8, 8))
    with pytest.raises(TypeError, match="field_type: expected an escnn.nn.FieldType"):
        pe.image_flow(1, (8, 8))


def test_training_on_a_symmetric_source():
    """Stripes, upright or lying, and their negatives: bits fall, and never below the entropy."""
    stripe = torch.tensor([60, 200]).repeat(4).expand(8, 8)
    patterns = torch.stack([stripe, 260 - stripe, stripe.mT, 260 - stripe.mT])
    images = (patterns[torch.randint(4, (256,))] + torch.randint(-8, 9, (256, 8, 8)))[:, None]
    entropy = math.log2(17) + math.log2(4) / 64
    flow = pe.image_flow(gray(D4), (8, 8), num_transforms=2, hidden_dims=(16,))
    base = dist.Normal(torch.zeros(1, 8, 8), 1.0).to_event(3)
    density = dist.TransformedDistribution(base, [flow, pe.LogitTransform().inv])
    before = pe.bits_per_dim(density, images).mean().item()  # sets the actnorms
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for step in range(60):
        optimizer.zero_grad()
        loss = pe.bits_per_dim(density, images[step % 4 :: 4]).mean()
        loss.backward()
        optimizer.step()
    assert entropy < loss.item() < before - 0.05 < 5
    # The same pixels turned: fresh noise would be another sample of the bound.
    pixels = pe.dequantize(images[:8])
    turned = density.log_prob(pixels.rot90(1, (2, 3)))
    torch.testing.assert_close(density.log_prob(pixels), turned, rtol=1e-4, atol=1e-2)


# ---- images as data -------------------------------------------------------------------------------------------


class Logistic(dist.TransformedDistribution):
    """Whose distribution function is the sigmoid: the logit of a uniform pixel."""

    def __init__(self, *shape):
        uniform = dist.Uniform(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))
        super().__init__(uniform.to_event(len(shape)), [SigmoidTransform().inv])


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_uniform_source_scores_its_entropy(levels):
    """A density that is uniform on the unit cube: log2(levels) bits a dimension, for every image and every draw."""
    flow = dist.TransformedDistribution(Logistic(1, 4, 4), [pe.LogitTransform(0.0).inv])
    images = torch.randint(levels, (20, 1, 4, 4))
    bits = pe.bits_per_dim(flow, images, num_levels=levels, dtype=torch.float64)
    torch.testing.assert_close(bits, torch.full((20,), math.log2(levels), dtype=torch.float64), rtol=0, atol=1e-12)


class Squeezed(Transform):
    """A monotone map of [0, 1] with slope 1 / (L p_k) on the k-th quantile range: uniform in, histogram out."""

    domain = codomain = constraints.unit_interval
    bijective, sign = True, 1

    def __init__(self, p):
        super().__init__()
        self.p, self.ends = p, torch.cat([p.new_zeros(1), p.cumsum(0)])

    def _call(self, u):
        k = torch.searchsorted(self.ends[1:-1], u, right=True)
        return (k + (u - self.ends[k]) / self.p[k]) / len(self.p)

    def _inverse(self, x):
        k = (x * len(self.p)).long().clamp_max(len(self.p) - 1)
        return self.ends[k] + (x * len(self.p) - k) * self.p[k]

    def log_abs_det_jacobian(self, u, x):
        k = (x * len(self.p)).long().clamp_max(len(self.p) - 1)
        return -(len(self.p) * self.p[k]).log()


@pytest.mark.parametrize("levels", [5, 16])
def test_a_source_of_unlike_levels_scores_its_entropy(levels):
    """Constant on each bin: -log2 P(k) for every image, so the mean under the source is its entropy."""
    p = torch.rand(levels, dtype=torch.float64) + 0.05
    p = p / p.sum()
    uniform = dist.Uniform(torch.zeros(1, 1, 2, dtype=torch.float64), 1.0).to_event(3)
    density = dist.TransformedDistribution(uniform, [Squeezed(p)])
    images = torch.tensor(list(itertools.product(range(levels), repeat=2))).view(-1, 1, 1, 2)
    bits = pe.bits_per_dim(density, images, num_levels=levels, dtype=torch.float64)
    weights = p[images].prod(-1)[:, 0, 0]
    torch.testing.assert_close(bits, -weights.log2() / 2, rtol=1e-12, atol=1e-12)
    entropy = -(p * p.log2()).sum()
    torch.testing.assert_close((weights * bits).sum(), entropy, rtol=1e-12, atol=1e-12)


def test_bits_of_a_density_with_a_margin():
    """A normal logit: with one draw the bound, by quadrature; with many the bits, by the distribution function."""
    alpha, levels, draws = 0.05, 4, 40_000
    normal = dist.Normal(torch.tensor(0.3, dtype=torch.float64), 0.8)
    base = dist.Normal(torch.full((1, 1, 1), 0.3, dtype=torch.float64), 0.8).to_event(3)
    density = dist.TransformedDistribution(base, [pe.LogitTransform(alpha).inv])
    edges = torch.logit(alpha + (1 - 2 * alpha) * torch.linspace(0, 1, levels + 1, dtype=torch.float64))
    exact = -normal.cdf(edges).diff().log2()
    # What lies outside [0, 1] is lost, hence probabilities that sum to less than 1.
    assert 0.99 < (2.0**-exact).sum() < 1
    images = torch.arange(levels).view(-1, 1, 1, 1)
    many = pe.bits_per_dim(density, images, num_levels=levels, num_samples=draws, dtype=torch.float64)
    torch.testing.assert_close(many, exact, rtol=0, atol=0.02)
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(40))
    x = (torch.arange(levels)[:, None] + (1 + nodes) / 2) / levels
    s = alpha + (1 - 2 * alpha) * x
    log_density = normal.log_prob(torch.logit(s)) + math.log(1 - 2 * alpha) - torch.log(s * (1 - s))
    bound = 2 - (log_density @ weights / 2) / math.log(2)
    one = pe.bits_per_dim(density, images[:, None].expand(-1, draws, 1, 1, 1), num_levels=levels, dtype=torch.float64)
    assert ((one.mean(1) - bound).abs() < 5 * one.std(1) / draws**0.5).all()
    assert (bound > exact).all()


def test_the_logit_transform():
    for alpha in (0.0, 0.05, 0.3):
        transform = pe.LogitTransform(alpha)
        x = torch.rand(3, 4, dtype=torch.float64)
        y = transform(x)
        torch.testing.assert_close(
            y, torch.log(alpha + (1 - 2 * alpha) * x) - torch.log(1 - alpha - (1 - 2 * alpha) * x)
        )
        torch.testing.assert_close(transform.inv(y), x, rtol=0, atol=1e-14)
        reference = [AffineTransform(alpha, 1 - 2 * alpha), SigmoidTransform().inv]
        expected = torch.distributions.ComposeTransform(reference).log_abs_det_jacobian(x, y)
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), expected, rtol=1e-12, atol=1e-12)
        slope = torch.func.vmap(torch.func.grad(transform))(x.flatten()).view(x.shape)
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), slope.log(), rtol=1e-12, atol=1e-12)
    assert torch.isfinite(pe.LogitTransform()(torch.tensor([0.0, 1.0]))).all()
    assert pe.LogitTransform(0.05) == pe.LogitTransform(0.05) != pe.LogitTransform(0.1)
    assert pe.LogitTransform().with_cache(1).with_cache(1).alpha == 0.05
    density = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [pe.LogitTransform(0.05).inv])
    assert density.support.check(torch.tensor([-0.05, 1.05])) and not density.support.check(torch.tensor([-0.06, 0.5]))


def test_dequantize():
    images = torch.randint(256, (200, 1, 28, 28), dtype=torch.uint8)
    pixels = pe.dequantize(images)
    assert pixels.dtype == torch.float32 and ((pixels > 0) & (pixels < 1)).all()
    assert torch.equal((pixels * 256).floor(), images.float())
    noise = pixels.double() * 256 - images
    # Mean 1/2 and variance 1/12 of 156800 draws, within five standard errors.
    assert abs(noise.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / noise.numel())
    assert abs(noise.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / noise.numel())
    pyro.set_rng_seed(5)
    first = pe.dequantize(images[:2])
    pyro.set_rng_seed(5)
    assert torch.equal(pe.dequantize(images[:2]), first) and not torch.equal(pe.dequantize(images[:2]), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24], ids=["lowest", "highest"])
def test_noise_at_the_ends_of_a_bin(monkeypatch, draw, dtype):
    """255 and the largest draw would round to 256: pixel 1, an infinite logit, in the next bin elsewhere."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, draw))
    images = torch.arange(256)
    pixels = pe.dequantize(images, dtype=dtype)
    assert ((pixels > 0) & (pixels < 1)).all()
    assert torch.equal((pixels * 256).floor().long(), images)
    assert torch.isfinite(pe.LogitTransform(0.0)(pixels)).all()
    assert pe.dequantize(torch.tensor([16]), num_levels=17, dtype=dtype) < 1


@pytest.mark.parametrize("call, error, message", [
    (lambda: pe.dequantize(torch.rand(3)), TypeError, "expected a tensor of integers, found torch.float32; pass"),
    (lambda: pe.dequantize(np.zeros(3, int)), TypeError, "images: expected a tensor of integers, found ndarray"),
    (lambda: pe.dequantize(torch.tensor([True])), TypeError, "found torch.bool"),
    (lambda: pe.dequantize(torch.tensor([3, 16]), num_levels=16), ValueError, "0 to 15, found 3 to 16; set num_levels"),
    (lambda: pe.dequantize(torch.tensor([-1])), ValueError, "from 0 to 255, found -1"),
    (lambda: pe.dequantize(torch.tensor([0]), num_levels=1), ValueError, "num_levels: expected .* at least 2, found 1"),
    (lambda: pe.LogitTransform(0.5), ValueError, r"alpha: expected a number inside \[0, 0.5\), found 0.5"),
    (lambda: pe.LogitTransform(-0.1), ValueError, r"alpha: expected .* found -0.1"),
    (lambda: pe.bits_per_dim(Logistic(1), np.zeros(1, int)), TypeError, "expected a tensor of integers, found ndarray"),
    (lambda: pe.bits_per_dim(Logistic(1, 2, 2), torch.zeros(2, 2, dtype=int)), ValueError, "images: expected shape"),
    (lambda: pe.bits_per_dim(Logistic(1, 2, 2), torch.zeros(3, 1, 2, dtype=int)), ValueError,
     r"images: expected shape \(\*batch, .*found \(3, 1, 2\)"),
    (lambda: pe.bits_per_dim(Logistic(1), torch.zeros(3, 1, dtype=int), num_samples=0), ValueError, "num_samples: "),
])  # fmt: skip
def test_wrong_images(call, error, message):
    with pytest.raises(error, match=message):
        call()
