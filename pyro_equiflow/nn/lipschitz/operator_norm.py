# SPDX-License-Identifier: Apache-2.0
"""Upper bounds on operator norms: of matrices, and of convolutions by the matrices at their frequencies."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from escnn import nn as enn
from torch import Tensor

from pyro_equiflow.ops.arguments import check_instance
from pyro_equiflow.ops.events import check_sides, grid_elements, signed_permutation
from pyro_equiflow.ops.tracing import full_precision, is_traced

__all__ = ["convolution_norm", "frequencies", "spectral_norm"]

# How far above the largest singular value Gram iteration and a coarse grid of frequencies may end, each.
_SLACK = 1.03
_GRID_SLACK = 1.05

# One for both precisions, float32's, so that the weights a bound scales, and the map they make, are the same in both.
_EPSILON = torch.finfo(torch.float32).eps

# Squarings between two normalisations: eighth powers stay far from the smallest numbers, and few calls are made.
_STAGE = 3


@full_precision
def spectral_norm(matrix: Tensor) -> Tensor:
    r"""An upper bound of the largest singular value, at most 1.03 times it, by Gram iteration.

    .. math:: \|A\|_2 \le \|A\|_{S_p} = \bigl\|(A^H A)^{p/4}\bigr\|_F^{2/p}, \qquad p = 2^{t+2}

    The Schatten norm exceeds :math:`\|A\|_2` by a factor of at most :math:`m^{1/p}` for rank :math:`m`, which sets the
    number :math:`t` of squarings. Power iteration would approach :math:`\|A\|_2` from below. What rounding in float32
    could take off is added, entries below the smallest normal number aside, in float64 too: then both precisions give
    one bound, to rounding. Differentiable twice.

    :param matrix: shape ``(m, n)``, real or complex.
    :return: a real scalar tensor.

    References: Delattre et al., *Efficient bound of Lipschitz constant for convolutional layers by Gram iteration*
    (arXiv 2305.16173).
    """
    check_instance("weight", matrix, Tensor, "a torch.Tensor")
    if matrix.numel() == 0:
        return matrix.new_zeros((), dtype=matrix.real.dtype)
    # Squares of large entries overflow. The scale is a constant for gradients: the bound is homogeneous.
    scale = _scale(matrix)
    matrix = _divided(matrix.resolve_conj(), scale)
    # torch.func takes functions of another form only, which cost more than the bound of a small matrix.
    return scale * (_gram_iteration(matrix)[0] if is_traced() else _Schatten.apply(matrix))


def _scale(tensor: Tensor) -> Tensor:
    """The largest entry's size, or the smallest normal number where that is larger."""
    return torch.linalg.vector_norm(tensor.detach(), ord=math.inf).clamp(min=torch.finfo(tensor.dtype).tiny)


def _squarings(matrix: Tensor) -> int:
    rank = min(matrix.shape[-2:])
    wanted = math.ceil(math.log2(math.log(rank) / math.log(_SLACK))) - 2 if rank > 1 else 0
    return _STAGE * math.ceil(max(0, wanted) / _STAGE)


def _allowance(matrix: Tensor) -> float:
    """What rounding in products of matrices may take off the result, as a factor.

    An entry of a product over ``k`` terms is off by at most ``k`` epsilons of its terms' absolute sum, hence the
    product in the Frobenius norm by ``k eps`` of the factors' norms, at most the root of the rank above its own norm.
    Later squarings enter with half the weight of the one before.
    """
    small, large = sorted(matrix.shape[-2:])
    return 1 + _EPSILON * (small + large) * math.sqrt(small)


def _gram(matrix: Tensor) -> Tensor:
    """The smaller of the two Gram matrices."""
    return matrix.mH @ matrix if matrix.shape[-1] <= matrix.shape[-2] else matrix @ matrix.mH


def _divided(matrix: Tensor, scale: Tensor) -> Tensor:
    """Matrices over real numbers, one each."""
    if scale.dim():
        scale = scale[..., None, None]
    if not matrix.is_complex():
        return matrix / scale
    # torch divides complex numbers by complex ones only, several times slower.
    return torch.view_as_complex(torch.view_as_real(matrix) / (scale[..., None] if scale.dim() else scale))


def _frobenius(matrix: Tensor) -> Tensor:
    # Squares of numbers near the smallest ones vanish: such a matrix is taken for one of that size.
    tiny = torch.finfo(matrix.dtype).tiny
    # torch takes the norm of complex numbers a hundred times slower.
    real = torch.view_as_real(matrix).flatten(-2) if matrix.is_complex() else matrix
    return torch.linalg.vector_norm(real.flatten(-2), dim=-1).clamp(min=math.sqrt(tiny))


def _gram_iteration(matrix: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The bound, and the powers of the Gram matrix that it was made from, each up to its scale.

    Of a matrix with entries of 1 at most.
    """
    gram = _gram(matrix)
    # Of norm 1 its largest eigenvalue is at least 1 / sqrt(rank): eighth powers of large matrices do not vanish.
    norm = _frobenius(gram)
    powers = [_divided(gram, norm)]
    bound = norm.sqrt()
    for k in range(_STAGE, _squarings(matrix) + 1, _STAGE):
        power = torch.linalg.matrix_power(powers[-1], 2**_STAGE)
        norm = _frobenius(power)
        bound = bound * norm.pow(0.5 ** (k + 1))
        powers.append(_divided(power, norm))
    return bound * _allowance(matrix), powers


class _Schatten(torch.autograd.Function):
    r"""The bound with the gradient :math:`\|A\|_{S_p}^{1-p} A (A^H A)^{p/2-1}`, in fewer products than autograd's."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        bound, powers = _gram_iteration(matrix)
        ctx.save_for_backward(matrix, bound, *powers)
        return bound

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Tensor:
        (upstream,) = upstreams
        matrix, bound, *powers = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = _gram_iteration(matrix)[0]
            return torch.autograd.grad(again, matrix, upstream, create_graph=True)[0]
        # p/2 - 1 = 7 + 7 * 8 + ... + 2^t: seventh powers of all but the last.
        gradient = matrix
        for power in (*(torch.linalg.matrix_power(power, 2**_STAGE - 1) for power in powers[:-1]), powers[-1]):
            gradient = gradient @ power if matrix.shape[-1] <= matrix.shape[-2] else power @ gradient
        # Its scale follows from Euler's identity: the bound is homogeneous of degree 1.
        inner = (gradient.conj() * matrix).sum().real
        return upstream * (bound / inner.clamp(min=torch.finfo(matrix.dtype).tiny) * gradient)


@torch.no_grad()
def _largest(stack: Tensor) -> tuple[int, Tensor]:
    """The member of a stack ``(F, m, n)`` whose Schatten norm is largest, and that bound.

    A member whose bound falls below what some other's norm is at least cannot be the largest: it is left out.
    """
    rank = min(stack.shape[-2:])
    scale = _frobenius(stack)
    gram, log_bound = _gram(_divided(stack, scale)), scale.log()
    index = torch.arange(len(stack), device=stack.device)
    for k in range(_squarings(stack) + 1):
        if k:
            gram = gram @ gram
        norm = _frobenius(gram)
        log_bound = log_bound + norm.log() / 2 ** (k + 1)
        gram = _divided(gram, norm)
        possible = log_bound >= log_bound.max() - math.log(rank) / 2 ** (k + 2) - 1e-3
        if not possible.all():
            gram, log_bound, index = gram[possible], log_bound[possible], index[possible]
    best = log_bound.argmax()
    return int(index[best]), log_bound[best].exp() * _allowance(stack)


@full_precision
def convolution_norm(weight: Tensor, angles: np.ndarray, factor: float) -> Tensor:
    r"""An upper bound of the operator norm of a convolution with stride 1.

    .. math:: \|K\| \le \text{factor} \cdot
              \max_\theta \Bigl\| \sum_\delta \kappa(\delta) e^{i \theta \cdot \delta} \Bigr\|_2

    Only the frequency where the maximum is attained enters the gradient.

    :param weight: the filter ``(out, in, *kernel_shape)``.
    :param angles: the frequencies ``(F, spatial dimensions)``, see :func:`frequencies`.
    :param factor: see :func:`frequencies`.
    :return: a real scalar tensor.
    """
    check_instance("weight", weight, Tensor, "a torch.Tensor")
    if weight.numel() == 0:
        return weight.new_zeros(())
    scale = _scale(weight)
    weight = weight / scale
    waves = _waves(weight, angles)
    with torch.no_grad():
        worst, bound = _largest(_symbol(weight, waves))
    if torch.is_grad_enabled() and weight.requires_grad:
        # Of the same value to the last bit: what is scaled by it is one map with and without gradients.
        traced = spectral_norm(_symbol(weight, waves[:, worst : worst + 1])[0])
        bound = bound + (traced - traced.detach())
    return factor * _symbol_allowance(weight) * scale * bound


def _symbol(weight: Tensor, waves: Tensor) -> Tensor:
    """The matrices ``(F, out, in)`` of a filter at waves ``(2, F, points of the kernel)``."""
    flat = weight.flatten(2)
    if flat.shape[2] == 1:
        return flat[:, :, 0].expand(waves.shape[1], -1, -1)
    real, imaginary = (torch.einsum("oik,fk->foi", flat, wave) for wave in waves)
    return torch.complex(real, imaginary)


def _symbol_allowance(weight: Tensor) -> float:
    """What rounding in sums over the kernel's points may take off the largest symbol's norm, as a factor.

    A sum of ``k`` terms is off by at most ``k`` epsilons of their absolute sum, at most ``sqrt(k)`` times the filter's
    Frobenius norm, whose square is the mean over all frequencies of the symbol's: at most the rank times the largest.
    """
    points = weight[0, 0].numel()
    if points == 1:
        return 1.0
    return 1 + _EPSILON * (points + 2) * math.sqrt(points * min(weight.shape[:2]))


def _waves(weight: Tensor, angles: np.ndarray) -> Tensor:
    """Cosines and sines ``(2, F, points of the kernel)`` of ``angle . offset``, rounded once."""
    offsets = np.stack(np.meshgrid(*(np.arange(size) - size // 2 for size in weight.shape[2:]), indexing="ij"), -1)
    phase = angles @ offsets.reshape(-1, offsets.shape[-1]).T
    return torch.as_tensor(np.stack([np.cos(phase), np.sin(phase)])).to(weight)


def frequencies(
    field_type: enn.FieldType,
    half_width: int,
    padding_mode: str,
    spatial_shape: Sequence[int] | None,
    *,
    use_symmetry: bool = True,
) -> tuple[np.ndarray, float]:
    r"""Frequencies that decide the norm of a convolution, and the factor by which their maximum may fall short.

    Circular padding on :math:`H` points per side: the :math:`H` frequencies per side are exact. Zero padding: the
    operator is a compression of the circular one on :math:`H + d` points per side. Where those are many, or for every
    size at once, a coarse grid of :math:`n > 2d` points per side and the factor :math:`1 / \cos(\pi d / n)` per
    dimension: entries are trigonometric polynomials of degree :math:`d` (M. Riesz; Ehlich and Zeller, *Schwankung von
    Polynomen zwischen Gitterpunkten*, Math. Z. 86, 1964). Filters are real and, with ``use_symmetry``, steerable by the
    elements that permute the grid: norms are equal on each orbit of frequencies, and one of each is enough.

    :param field_type: a type over the base space.
    :param half_width: :math:`d`.
    :param padding_mode: ``"zeros"`` or ``"circular"``.
    :param spatial_shape: the grid, or ``None`` for a bound that holds on every grid.
    :return: angles ``(F, spatial dimensions)`` and the factor.
    :raises TypeError: a grid that is no sequence of integers.
    :raises ValueError: a grid of another number of dimensions.
    """
    dims = int(field_type.gspace.dimensionality)
    if spatial_shape is not None:
        check_sides(spatial_shape, dims)
    if half_width == 0:
        return np.zeros((1, dims)), 1.0
    coarse = 2 * half_width + 1
    while math.cos(math.pi * half_width / coarse) ** -dims > _GRID_SLACK:
        coarse += 1
    sizes, factor = [], 1.0
    for axis in range(dims):
        exact = math.inf if spatial_shape is None else spatial_shape[axis] + (padding_mode == "zeros") * half_width
        if exact <= coarse:
            sizes.append(int(exact))
        else:
            sizes.append(coarse)
            factor /= math.cos(math.pi * half_width / coarse)
    return _orbits(field_type.gspace if use_symmetry else None, tuple(sizes)), factor


@functools.lru_cache(maxsize=256)
def _orbits(gspace: Any, sizes: tuple[int, ...]) -> np.ndarray:
    """One angle of each orbit of the grid of ``sizes`` frequencies under negation and the grid's symmetries."""
    points = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(-1, len(sizes))
    images = [points, -points]
    if gspace is not None:
        field_type = enn.FieldType(gspace, [gspace.trivial_repr])
        for element in grid_elements(field_type):
            axes, signs = signed_permutation(field_type, element)
            if all(sizes[a] == size for a, size in zip(axes, sizes)):
                moved = points[:, list(axes)] * np.array(signs)
                images += [moved, -moved]
    labels = np.min([np.ravel_multi_index(tuple((image % sizes).T), sizes) for image in images], axis=0)
    chosen = points[np.unique(labels)]
    angles: np.ndarray = 2 * math.pi * chosen / np.array(sizes)
    return angles
