# SPDX-License-Identifier: Apache-2.0
"""Upper bounds of operator norms: never below the dense value, and close above it."""

import math

import numpy as np
import pytest
import torch
from escnn import nn as enn

from pyro_equiflow.nn import SteerableConv, SteerableLinear, expand, weight_norm
from pyro_equiflow.nn.lipschitz import operator_norm as on
from pyro_equiflow.nn.lipschitz.operator_norm import convolution_norm, frequencies, spectral_norm
from tests.cases import DTYPES, TYPES, field_type, spatial_shape

# Of numpy's own largest singular value in float64.
ROUNDING = 1e-13
# Schatten norm; times a coarse grid of frequencies.
MATRIX, GRID = 1.0301, 1.0301 * 1.05


def top(matrix):
    """The largest singular value of matrices, in double precision."""
    wide = matrix.detach().to(torch.complex128 if matrix.is_complex() else torch.float64).numpy()
    return np.linalg.svd(wide, compute_uv=False)[..., 0]


# ---- matrices ---------------------------------------------------------------------------------------------


def never_below(bound, count=3000, decades=25):
    """Draws float32 matrices of many shapes, spectra and scales; returns the ratios of the bound to the norm."""
    generator = np.random.default_rng(0)
    ratios = []
    for i in range(count):
        m, n = generator.integers(1, 25, 2)
        dtype = torch.complex64 if i % 4 == 0 else torch.float32
        matrix = torch.randn(m, n, dtype=dtype)
        if i % 3 == 1:  # few directions
            matrix = matrix[:, :1] @ matrix[:1] + 10.0 ** generator.uniform(-8, 0) * matrix
        elif i % 3 == 2:  # equal singular values: the Schatten norm is furthest off
            matrix = torch.linalg.svd(matrix, full_matrices=False)[0]
        matrix = matrix * 10.0 ** generator.uniform(-decades, decades)
        ratios.append(float(bound(matrix)) / top(matrix))
    return np.array(ratios)


def test_never_below_and_close():
    ratios = never_below(spectral_norm)
    assert ratios.min() >= 1
    assert ratios.max() <= MATRIX


def test_rounding_of_large_matrices_is_covered():
    for shape in ((300, 300), (700, 700), (1000, 20), (20, 1000), (1, 3000)):
        for _ in range(2):
            matrix = torch.randn(shape)
            for one in (matrix, torch.linalg.svd(matrix, full_matrices=False)[0]):  # and all singular values equal
                assert 1 <= float(spectral_norm(one)) / top(one) <= 1.05


def power_iteration(matrix, steps=30):
    x = torch.randn(matrix.shape[1], dtype=matrix.dtype)
    for _ in range(steps):
        x = matrix.mH @ (matrix @ x)
        x = x / x.norm()
    return (matrix @ x).norm()


def test_a_bound_from_below_is_caught(monkeypatch):
    assert never_below(power_iteration, count=300, decades=2).min() < 1 - 1e-4
    # And the Schatten norm without what rounding takes off.
    monkeypatch.setattr(on, "_allowance", lambda matrix: 1.0)
    assert never_below(spectral_norm, count=300).min() < 1


@pytest.mark.parametrize("shape", [(512, 512), (512, 3), (64, 64), (1, 1), (32, 16, 3, 3), (5, 4, 3, 3, 3)])
def test_bounds_in_both_precisions_differ_by_rounding(shape):
    """So that ``.double()`` leaves a map that is scaled by them the same."""
    weight = torch.randn(shape, dtype=torch.float32)
    angles = all_angles(len(shape[2:]) * (6,)) if len(shape) > 2 else None
    found = [
        float(spectral_norm(w) if angles is None else convolution_norm(w, angles, 1.0))
        for w in (weight, weight.double())
    ]
    assert abs(found[0] / found[1] - 1) <= 1e-6


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-19, 1e19, 1e30, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_extreme_scales(scale, dtype):
    matrix = torch.randn(4, 6, dtype=dtype)
    scaled = (matrix * scale).requires_grad_()
    bound = spectral_norm(scaled)
    assert 1 <= float(bound.detach()) / top(scaled) <= MATRIX
    (gradient,) = torch.autograd.grad(bound, scaled)
    expected = torch.func.grad(spectral_norm)(matrix) if not matrix.is_complex() else gradient
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(torch.view_as_real(gradient.to(torch.complex64))).all()
    filters = (torch.randn(3, 2, 3, 3) * scale).requires_grad_()
    norm = convolution_norm(filters, *frequencies(field_type("trivial-plane"), 1, "zeros", None))
    reference = symbol_norms(filters, fine(3, 2)).max()
    assert reference <= float(norm.detach()) <= GRID * reference
    norm.backward()
    assert torch.isfinite(filters.grad).all() and filters.grad.any()


def test_zeros_and_nothing():
    for shape in ((3, 4), (1, 1)):
        matrix = torch.zeros(shape, requires_grad=True)
        bound = spectral_norm(matrix)
        (gradient,) = torch.autograd.grad(bound, matrix, create_graph=True)
        assert 0 <= float(bound.detach()) < 1e-30 and not gradient.any()
    assert spectral_norm(torch.zeros(0, 3)) == 0
    angles, factor = frequencies(field_type("C4-plane"), 1, "zeros", None)
    weight = torch.zeros(2, 3, 3, 3, requires_grad=True)
    norm = convolution_norm(weight, angles, factor)
    norm.backward()
    assert 0 <= float(norm.detach()) < 1e-30 and not weight.grad.any()
    assert convolution_norm(torch.zeros(0, 2, 3, 3), angles, factor) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_bounded(bad):
    matrix = torch.randn(3, 3)
    matrix[0, 0] = bad
    assert not spectral_norm(matrix) < math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("kind", ["square", "wide", "tall", "rank one", "orthogonal", "row", "conjugate"])
def test_gradients(dtype, kind):
    m, n = {"wide": (2, 4), "tall": (4, 2), "row": (1, 3)}.get(kind, (3, 3))
    matrix = torch.randn(m, n, dtype=dtype)
    if kind == "rank one":
        matrix = matrix[:, :1] @ matrix[:1]
    elif kind == "orthogonal":
        matrix = torch.linalg.qr(matrix)[0]
    matrix.requires_grad_()
    function = (lambda a: spectral_norm(a.mH)) if kind == "conjugate" else spectral_norm
    assert torch.autograd.gradcheck(function, matrix)
    assert torch.autograd.gradgradcheck(function, matrix)
    # Euler: homogeneous of degree 1.
    bound = function(matrix)
    (gradient,) = torch.autograd.grad(bound, matrix)
    torch.testing.assert_close((gradient.conj() * matrix).sum().real, bound)


def test_gradients_of_convolutions():
    kind = field_type("C4-plane")
    layer = SteerableConv(kind, kind, 3).double()
    angles, factor = frequencies(kind, 1, "zeros", None)

    def function(weight):
        return convolution_norm(torch.func.functional_call(Filter(layer), {"layer.weight": weight}, ()), angles, factor)

    weight = layer.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, weight)
    assert torch.autograd.gradgradcheck(function, weight)
    torch.testing.assert_close(function(weight), function(weight.detach()), rtol=1e-12, atol=0)


class Filter(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return self.layer.filter()


# ---- frequencies ------------------------------------------------------------------------------------------


def symbol_norms(weight, angles):
    """The largest singular value at each frequency, in numpy's double precision."""
    weight = weight.detach().double().numpy()
    offsets = np.stack(np.meshgrid(*(np.arange(k) - k // 2 for k in weight.shape[2:]), indexing="ij"), -1)
    phases = np.exp(1j * angles @ offsets.reshape(-1, offsets.shape[-1]).T)
    symbols = np.einsum("oik,fk->foi", weight.reshape(*weight.shape[:2], -1), phases)
    return np.linalg.svd(symbols, compute_uv=False)[:, 0]


def all_angles(sizes):
    points = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(-1, len(sizes))
    return 2 * np.pi * points / np.array(sizes)


def fine(kernel_size, dims):
    return all_angles(dims * ({2: 48, 3: 14}[dims],))


GRIDS = ["trivial-plane", "flips-plane", "C4-plane", "C8-plane", "D4-plane", "SO2-plane", "O2-plane"]
SPACES = ["flips-space", "octahedral-space", "SO3-space"]


@pytest.mark.parametrize("name", GRIDS + SPACES)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_one_frequency_an_orbit_is_enough(name, padding_mode):
    kind = field_type(name)
    dims = kind.gspace.dimensionality
    layer = SteerableConv(kind, kind, 3, padding_mode=padding_mode).double()
    shapes = [None, dims * (4,), dims * (5,)] + ([(3, 6, 4)[:dims]] if name[:5] in ("trivi", "flips") else [])
    for shape in shapes:
        some, factor = frequencies(kind, 1, padding_mode, shape)
        every, same = frequencies(kind, 1, padding_mode, shape, use_symmetry=False)
        assert factor == same
        assert len(some) <= len(every)
        sizes = [coarse_or(n, padding_mode, dims) for n in (shape or dims * (1000,))]
        whole = symbol_norms(layer.filter(), all_angles(sizes)).max()
        assert symbol_norms(layer.filter(), some).max() == pytest.approx(whole, rel=1e-12)
        assert symbol_norms(layer.filter(), every).max() == pytest.approx(whole, rel=1e-12)


def coarse_or(n, padding_mode, dims):
    """Points a side for a kernel of 3: the torus of the grid, or the coarse one where that is smaller."""
    return min(n + (padding_mode == "zeros"), {2: 15, 3: 18}[dims])


def test_orbits_are_as_few_as_the_group_says():
    count = {name: len(frequencies(field_type(name), 1, "circular", (10, 10))[0]) for name in GRIDS}
    # Negation alone; with one flip; quarter turns; the dihedral group of the square, twice.
    assert count["trivial-plane"] == 52
    assert count["C4-plane"] == count["C8-plane"] == count["SO2-plane"] == 27
    assert count["flips-plane"] == 36
    assert count["D4-plane"] == count["O2-plane"] == 21


@pytest.mark.parametrize(("kernel_size", "dims"), [(3, 2), (5, 2), (3, 3)])
def test_the_factor_of_a_coarse_grid(kernel_size, dims):
    kind = field_type("trivial-plane" if dims == 2 else "flips-space")
    half = kernel_size // 2
    angles, factor = frequencies(kind, half, "zeros", None, use_symmetry=False)
    assert factor < 1.05
    for _ in range(10):
        weight = torch.randn(2, 3, *dims * (kernel_size,), dtype=torch.float64)
        worst = symbol_norms(weight, fine(kernel_size, dims)).max()
        assert worst <= factor * symbol_norms(weight, angles).max() <= GRID * worst
        assert worst <= float(convolution_norm(weight, angles, factor)) <= GRID * worst


def peak_between(half, points, dims):
    """A filter whose symbol has norm 1, reached halfway between neighbours of a grid of frequencies.

    On a line, with ``R`` a rotation by ``a``: ``(R exp(i half t) + R^T exp(-i half t)) / 2``, whose eigenvalues are
    ``cos(half t + a)`` and ``cos(half t - a)``. On a plane and in space, products of those.
    """
    a = half * math.pi / points
    turn = torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]], dtype=torch.float64)
    line = torch.zeros(2, 2, 2 * half + 1, dtype=torch.float64)
    line[:, :, 0], line[:, :, -1] = turn / 2, turn.T / 2
    found = line
    for _ in range(dims - 1):
        found = torch.einsum("oi...k,pjl->opij...kl", found, line).flatten(0, 1).flatten(1, 2)
    return found


@pytest.mark.parametrize(("half", "dims"), [(1, 2), (2, 2), (1, 3)])
def test_the_factor_is_reached_in_the_worst_case(half, dims):
    if dims == 3:  # 18 points a side are what the grid takes
        angles, factor = frequencies(field_type("flips-space"), half, "zeros", None, use_symmetry=False)
        points = 18
    else:
        points = 16 * half
        angles, factor = all_angles((points, points)), math.cos(math.pi * half / points) ** -2
    weight = peak_between(half, points, dims)
    peak = np.full((1, dims), math.pi / points)
    assert symbol_norms(weight, peak).max() == pytest.approx(1, rel=1e-12)
    coarse = symbol_norms(weight, angles).max()
    assert coarse * factor == pytest.approx(1, rel=1e-12)
    assert 1 <= float(convolution_norm(weight, angles, factor)) <= MATRIX
    # A factor that leaves out one dimension is caught.
    assert symbol_norms(weight, angles).max() * factor ** ((dims - 1) / dims) < 0.99


# ---- layers on grids, as dense operators ------------------------------------------------------------------


def dense(function, in_channels, shape, dtype=torch.float64):
    """The matrix of a linear map of images, by applying it to the identity."""
    size = in_channels * math.prod(shape)
    with torch.no_grad():
        return function(torch.eye(size, dtype=dtype).reshape(size, in_channels, *shape)).flatten(1).T


def lanczos(function, in_channels, shape):
    """The largest singular value by Lanczos iteration, from below."""
    from scipy.sparse.linalg import LinearOperator, svds

    size = in_channels * math.prod(shape)

    def apply(v):
        with torch.no_grad():
            return function(torch.as_tensor(v.reshape(1, in_channels, *shape))).flatten().numpy()

    def adjoint(v):
        x = torch.zeros(1, in_channels, *shape, dtype=torch.float64, requires_grad=True)
        y = function(x)
        return torch.autograd.grad(y, x, torch.as_tensor(v).reshape(y.shape))[0].flatten().numpy()

    out = apply(np.zeros(size)).size
    operator = LinearOperator((out, size), matvec=apply, rmatvec=adjoint, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(min(out, size))
    return float(svds(operator, k=1, tol=1e-7, v0=start, return_singular_vectors=False)[0])


def types_on(name, copies=1):
    kind = field_type(name)
    return kind, enn.FieldType(kind.gspace, copies * list(reversed(kind.representations)))


def linear_part(layer):
    fn, (weight, *_) = expand(layer)
    return lambda x: fn(x, weight.to(x))


#: Zero padding on small grids, by points on the shortest side: the bound, of the torus around them, over the norm.
LOOSE = {2: 2.7, 3: 1.45, 4: 1.35, 6: 1.25, 7: 1.12, 8: 1.1}

CASES = [
    (name, size, shape)
    for name in ("C4-plane", "D4-plane", "SO2-plane", "O2-plane")
    for size, shape in ((1, (3, 3)), (3, (4, 4)), (3, (7, 7)), (5, (6, 6)), (5, (2, 2)))
] + [
    ("C4-plane", 3, (8, 8)),
    ("trivial-plane", 3, (3, 8)),
    ("trivial-plane", 5, (2, 5)),
    ("flips-plane", 3, (9, 4)),
    ("octahedral-space", 3, (3, 3, 3)),
    ("octahedral-space", 3, (4, 4, 4)),
    ("flips-space", 3, (2, 4, 3)),
    ("octahedral-space", 1, (2, 2, 2)),
]


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize(("name", "size", "shape"), CASES)
def test_small_grids(name, size, shape, padding_mode):
    kind, out = types_on(name)
    layer = SteerableConv(kind, out, size, padding_mode=padding_mode)
    for dtype in DTYPES:
        layer.to(dtype)
        truth = top(dense(linear_part(layer), kind.size, shape))
        with torch.no_grad():
            bound = float(weight_norm(layer, layer.filter(), shape))
            everywhere = float(weight_norm(layer, layer.filter()))
        assert truth <= bound * (1 + ROUNDING)
        assert truth <= everywhere * (1 + ROUNDING)
        if padding_mode == "circular" or size == 1:
            assert bound <= MATRIX * truth * (1 + 1e-6)  # every frequency of the grid: none is missed
        else:
            assert bound <= LOOSE[min(shape)] * truth


@pytest.mark.parametrize("name", ["C4-plane", "D4-plane", "SO2-plane", "O2-plane"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_large_grids(name, padding_mode):
    """28x28: at most a tenth above the operator's norm, which Lanczos iteration finds from below."""
    kind, out = types_on(name)
    layer = SteerableConv(kind, out, 3, padding_mode=padding_mode).double()
    truth = lanczos(linear_part(layer), kind.size, (28, 28))
    bound = float(weight_norm(layer, layer.filter(), (28, 28)).detach())
    assert truth <= bound <= 1.10 * truth


def test_a_missing_factor_is_caught():
    """The coarse maximum by itself lies below dense norms."""
    kind = field_type("trivial-plane")
    short = 0
    for seed in range(30):
        torch.manual_seed(seed)
        layer = SteerableConv(kind, kind, 3, padding_mode="circular").double()
        angles, _ = frequencies(kind, 1, "circular", (28, 28))
        coarse = symbol_norms(layer.filter(), angles).max()
        short += coarse < symbol_norms(layer.filter(), all_angles((28, 28))).max() * (1 - 1e-9)
    assert short > 15


@pytest.mark.parametrize("name", [name for name in TYPES if not spatial_shape(name)])
def test_layers_on_points(name):
    kind, out = types_on(name, copies=3)
    layer = SteerableLinear(kind, out)
    for dtype in DTYPES:
        layer.to(dtype)
        truth = top(layer.filter())
        assert truth <= float(weight_norm(layer, layer.filter()).detach()) <= 1.05 * truth
