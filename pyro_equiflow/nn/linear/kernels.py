# SPDX-License-Identifier: Apache-2.0
"""Bases of steerable kernels on grids, in float64, exact under the elements that permute the grid."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from escnn.group import GroupElement, IrreducibleRepresentation, Representation
from escnn.gspaces import GSpace
from escnn.kernels import EmptyBasisException
from escnn.nn import FieldType
from escnn.nn.modules.conv import r2convolution, r3convolution
from escnn.nn.modules.conv.rd_convolution import get_grid_coords

from pyro_equiflow._escnn.intertwiners import canonical_basis
from pyro_equiflow.ops.events import grid_elements, signed_permutation
from pyro_equiflow.ops.representations import irreps_of, is_permutation

__all__ = ["cast_buffers", "kernel_basis"]

_LOG = logging.getLogger("pyro_equiflow")

_LARGE = 50_000
"""Numbers a kernel from which on building the basis takes some 5 seconds or more, so that it is said."""


@functools.lru_cache(maxsize=4096)
def kernel_basis(gspace: GSpace, kernel_size: int, in_rep: Representation, out_rep: Representation) -> np.ndarray:
    """An orthonormal basis of the steerable kernels between two representations on a grid.

    Between two irreps escnn's band-limited basis is sampled in float64 and averaged over the elements that permute the
    grid, which takes its sampling error, near 5e-7, to rounding. Other representations hold irreps, and kernels between
    them are sums of kernels between those. The basis is orthonormalised in a canonical way, so that it does not depend
    on signs and rotations that a numerical solver happened to choose.

    :return: shape ``(number, out_rep.size, in_rep.size, *kernel)``, float64; ``number`` may be 0.
    """
    images = _images(gspace, out_rep)
    rows = np.array(sorted(images))
    if isinstance(in_rep, IrreducibleRepresentation) and isinstance(out_rep, IrreducibleRepresentation):
        kernels = _irrep_kernels(gspace, kernel_size, in_rep, out_rep)
        spanning = _orthonormal(kernels)[:, rows]
    else:
        entries = out_rep.size * in_rep.size * kernel_size ** int(gspace.dimensionality)
        if entries > _LARGE:
            _LOG.warning(
                "pyro_equiflow: kernels of %d numbers each, between %s and %s of %s, take a while to build, and "
                'memory; nonlinearity="gated" takes irreps for hidden fields, whose kernels are small',
                *(entries, in_rep, out_rep, gspace.fibergroup),
            )
        spanning = _sums_of_irreps(gspace, kernel_size, in_rep, out_rep, rows)
    flat = spanning.reshape(len(spanning), math.prod(spanning.shape[1:]))
    chosen = canonical_basis(flat, len(flat)).reshape(spanning.shape)
    result = np.empty((len(chosen), out_rep.size, *spanning.shape[2:]))
    for number, row in enumerate(rows):
        for image, g in images[row].items():
            # A steerable kernel is its own image under g.
            result[:, image] = chosen[:, number] if image == row else _moved(gspace, g, in_rep, chosen[:, number])
    result.setflags(write=False)
    return result


@functools.lru_cache(maxsize=64)
def _grid_action(gspace: GSpace) -> list[tuple[GroupElement, tuple[int, ...], tuple[int, ...]]]:
    """The elements that permute the grid, with the axes and directions in which their images are read."""
    field_type = FieldType(gspace, [gspace.trivial_repr])
    return [(g, *signed_permutation(field_type, g)) for g in grid_elements(field_type)]


@functools.lru_cache(maxsize=1024)
def _matrices(gspace: GSpace, representation: Representation) -> list[np.ndarray]:
    """A representation at those elements."""
    return [np.asarray(representation(g)) for g, _, _ in _grid_action(gspace)]


def _images(gspace: GSpace, out_rep: Representation) -> dict[int, dict[int, int]]:
    """The first of each orbit of output channels, and to each channel of the orbit the number of an element to it.

    Where the elements that permute the grid permute output channels as well, a steerable kernel is known from one row
    of each orbit: its other rows are moved copies.
    """
    if not is_permutation(out_rep):
        return {row: {row: 0} for row in range(out_rep.size)}
    targets = [np.argmax(matrix, axis=0) for matrix in _matrices(gspace, out_rep)]
    found: dict[int, dict[int, int]] = {}
    left = set(range(out_rep.size))
    while left:
        row = min(left)
        found[row] = {int(to[row]): number for number, to in enumerate(targets)}
        left -= set(found[row])
    return found


def _sums_of_irreps(
    gspace: GSpace, kernel_size: int, in_rep: Representation, out_rep: Representation, rows: np.ndarray
) -> np.ndarray:
    """Some rows of an orthonormal basis made of those between irreps, ``(number, rows, in, *kernel)``."""
    points = int(gspace.dimensionality) * (kernel_size,)
    parts = [np.zeros((0, len(rows), in_rep.size, *points))]
    q_in, q_out = np.asarray(in_rep.change_of_basis), np.asarray(out_rep.change_of_basis)[rows]
    for out_irrep, o in irreps_of(out_rep):
        for in_irrep, i in irreps_of(in_rep):
            kernels = kernel_basis(gspace, kernel_size, in_irrep, out_irrep)
            left, right = q_out[:, o : o + out_irrep.size], q_in[:, i : i + in_irrep.size]
            parts.append(np.einsum("ra,nab...,cb->nrc...", left, kernels, right, optimize=True))
    return np.concatenate(parts)


def _orthonormal(kernels: np.ndarray, tolerance: float = 1e-7) -> np.ndarray:
    """An orthonormal basis of the span of kernels ``(number, ...)``."""
    if not len(kernels):
        return kernels
    _, singular, rows = np.linalg.svd(kernels.reshape(len(kernels), -1), full_matrices=False)
    found: np.ndarray = rows[singular > tolerance * max(singular[0], 1.0)]
    return found.reshape(-1, *kernels.shape[1:])


def _irrep_kernels(gspace: GSpace, kernel_size: int, in_irrep: Representation, out_irrep: Representation) -> np.ndarray:
    """escnn's kernels between two irreps, sampled and averaged, ``(number, out, in, *kernel)``."""
    dimensions = int(gspace.dimensionality)
    parameters = (r2convolution if dimensions == 2 else r3convolution).compute_basis_params
    with _plain_defaults():
        keep, rings, sigma, maximum_frequency = parameters(kernel_size)
    shape = (out_irrep.size, in_irrep.size, *dimensions * (kernel_size,))
    try:
        with _plain_defaults():
            basis = gspace.build_kernel_basis(
                in_irrep, out_irrep, rings=rings, sigma=sigma, maximum_frequency=maximum_frequency
            )
    except EmptyBasisException:
        return np.zeros((0, *shape))
    mask = np.array([keep(attributes) for attributes in basis])
    points = torch.tensor(get_grid_coords(dimensions, kernel_size), device="cpu")
    with torch.no_grad(), _plain_defaults(), _in_double(basis):
        sampled = basis.sample(points).numpy()  # (points, number, out, in)
    kernels = np.moveaxis(sampled[:, mask], 0, -1).reshape(-1, *shape)
    total = np.zeros_like(kernels)
    for g, matrix in enumerate(_matrices(gspace, out_irrep)):
        total += np.moveaxis(np.tensordot(matrix, _moved(gspace, g, in_irrep, kernels), (1, 1)), 0, 1)
    return total / len(_grid_action(gspace))


def _moved(gspace: GSpace, number: int, in_rep: Representation, kernels: np.ndarray) -> np.ndarray:
    """Kernels ``(..., in, *kernel)`` of fields moved by ``g``: read at ``g^-1 p``, input channels turned."""
    _, axes, signs = _grid_action(gspace)[number]
    channel = kernels.ndim - len(axes) - 1
    moved = np.transpose(kernels, (*range(channel + 1), *(channel + 1 + a for a in axes)))
    moved = np.flip(moved, tuple(channel + 1 + i for i, sign in enumerate(signs) if sign < 0))
    return np.moveaxis(np.tensordot(_matrices(gspace, in_rep)[number], moved, (1, channel)), 0, channel)


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
