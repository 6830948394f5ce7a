# SPDX-License-Identifier: Apache-2.0
"""Bases of steerable kernels on grids, in float64, exact under the elements that permute the grid."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from escnn.group import Representation
from escnn.gspaces import GSpace
from escnn.kernels import EmptyBasisException
from escnn.nn import FieldType
from escnn.nn.modules.conv import r2convolution, r3convolution
from escnn.nn.modules.conv.rd_convolution import get_grid_coords

from pyro_equiflow.ops.events import grid_elements, signed_permutation

__all__ = ["cast_buffers", "kernel_basis"]


@functools.lru_cache(maxsize=4096)
def kernel_basis(gspace: GSpace, kernel_size: int, in_rep: Representation, out_rep: Representation) -> np.ndarray:
    """An orthonormal basis of the steerable kernels between two representations on a grid.

    escnn's band-limited basis is sampled in float64, averaged over the elements that permute the grid (this
    takes its sampling error, near 5e-7, to rounding) and orthonormalised in a canonical way, so that it does not
    depend on signs and rotations that a numerical solver happened to choose.

    :return: shape ``(number, out_rep.size, in_rep.size, *kernel)``, float64; ``number`` may be 0.
    """
    dimensions = gspace.dimensionality
    parameters = (r2convolution if dimensions == 2 else r3convolution).compute_basis_params
    with _plain_defaults():
        keep, rings, sigma, maximum_frequency = parameters(kernel_size)
    shape = (out_rep.size, in_rep.size, *dimensions * (kernel_size,))
    try:
        with _plain_defaults():
            basis = gspace.build_kernel_basis(
                in_rep, out_rep, rings=rings, sigma=sigma, maximum_frequency=maximum_frequency
            )
    except EmptyBasisException:
        return np.zeros((0, *shape))
    mask = np.array([keep(attributes) for attributes in basis])
    points = torch.tensor(get_grid_coords(dimensions, kernel_size), device="cpu")
    with torch.no_grad(), _plain_defaults(), _in_double(basis):
        sampled = basis.sample(points).numpy()  # (points, number, out, in)
    sampled = np.moveaxis(sampled[:, mask], 0, -1).reshape(-1, *shape)
    averaged = _average(gspace, in_rep, out_rep, sampled)
    result = _canonical_basis(averaged.reshape(len(averaged), -1)).reshape(-1, *shape)
    result.setflags(write=False)
    return result


@contextmanager
def _plain_defaults() -> Iterator[None]:
    """float32 on the CPU by default, which escnn's constructors take for granted."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def cast_buffers(
    module: torch.nn.Module, dtype: torch.dtype
) -> list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]:
    """Casts the floating buffers of a basis, in place.

    ``module.to(dtype)`` would not do: torch walks over modules by equality, escnn's compare by value, so that equal
    ones are left out, or compared half converted, which fails.

    :return: dictionary, name and former value of each buffer.
    """
    original = []
    pending, seen = [module], set()
    while pending:
        module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                original.append((module._buffers, name, buffer))
                module._buffers[name] = buffer.to(dtype)
        pending += [child for child in module._modules.values() if child is not None]
    return original


@contextmanager
def _in_double(basis: torch.nn.Module) -> Iterator[None]:
    """A basis in float64 for a while; escnn shares basis modules between layers, so every buffer comes back."""
    original = cast_buffers(basis, torch.float64)
    try:
        yield
    finally:
        for buffers, name, buffer in original:
            buffers[name] = buffer


def _average(gspace: GSpace, in_rep: Representation, out_rep: Representation, kernels: np.ndarray) -> np.ndarray:
    """The mean over grid-permuting ``g`` of ``rho_out(g) k(g^-1 p) rho_in(g)^T``."""
    field_type = FieldType(gspace, [in_rep])
    elements = grid_elements(field_type)
    total = np.zeros_like(kernels)
    for g in elements:
        axes, signs = signed_permutation(field_type, g)
        moved = np.transpose(kernels, (0, 1, 2, *(3 + a for a in axes)))
        moved = np.flip(moved, tuple(3 + i for i, sign in enumerate(signs) if sign < 0))
        total += np.einsum("ab,nbc...,dc->nad...", out_rep(g), moved, in_rep(g), optimize=True)
    return total / len(elements)


def _canonical_basis(vectors: np.ndarray, tolerance: float = 1e-7) -> np.ndarray:
    """Orthonormal rows that depend on the span of ``vectors`` only: pivoted Gram-Schmidt on its projector."""
    if not len(vectors):
        return vectors
    _, singular, rows = np.linalg.svd(vectors, full_matrices=False)
    rows = rows[singular > tolerance * max(singular[0], 1.0)]
    chosen = np.empty_like(rows)
    remaining = np.einsum("ij,ij->j", rows, rows)  # the diagonal of the projector rows^T rows, deflated as we go
    for k in range(len(rows)):
        # The first of the (nearly) largest: a tie broken by rounding would differ between machines.
        pivot = int(np.argmax(remaining > remaining.max() * (1 - 1e-6)))
        vector = rows[:, pivot] @ rows - chosen[:k, pivot] @ chosen[:k]
        chosen[k] = vector / np.linalg.norm(vector)
        remaining -= chosen[k] ** 2
    return chosen
