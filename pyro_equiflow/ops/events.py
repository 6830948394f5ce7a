# SPDX-License-Identifier: Apache-2.0
r"""Events ``(*batch, C, *spatial)``: checks of shape and dtype, and the group's action on them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from escnn.group import O2, O3, SO2, SO3, DirectProductGroup, Group, GroupElement
from escnn.gspaces import GSpace
from escnn.nn import FieldType
from torch import Tensor

from pyro_equiflow._escnn.elements import group_key, kept_by
from pyro_equiflow.ops.arguments import check_instance, check_integers, check_items
from pyro_equiflow.ops.representations import validate_field_type

__all__ = [
    "act",
    "cat_channels",
    "channel_matmul",
    "channel_matrix",
    "check_element",
    "check_elements",
    "check_event",
    "check_sides",
    "event_dim",
    "flatten_batch",
    "grid_elements",
    "on_grid",
    "signed_permutation",
    "split",
]


def event_dim(field_type: FieldType) -> int:
    """Number of dimensions of one event: the channels and the base space's."""
    return 1 + int(field_type.gspace.dimensionality)


def check_event(
    x: Tensor, field_type: FieldType, owner: str, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> None:
    """Raises unless ``x`` is a floating-point tensor of shape ``(*batch, C, *spatial)``.

    :raises TypeError: not a tensor, or not of the floating dtype or device of the parameters.
    :raises ValueError: too few dimensions, wrong number of channels, or a grid that the group does not
        map to itself.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: expected a torch.Tensor, found {type(x).__name__}")
    dimensions = event_dim(field_type)
    if x.dim() < dimensions or x.shape[-dimensions] != field_type.size:
        spatial = "".join(f", spatial_{i}" for i in range(1, dimensions))
        raise ValueError(
            f"{owner}: expected an input of shape (*batch, {field_type.size}{spatial}) for the field type "
            f"{field_type}, found {tuple(x.shape)}; reshape the input or change field_type"
        )
    if dimensions > 2:
        _check_grid(x.shape[1 - dimensions :], field_type, owner)
    if not x.is_floating_point():
        raise TypeError(f"{owner}: expected a floating-point input, found {x.dtype}; convert it with .to()")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(
            f"{owner}: expected the parameters' dtype {dtype}, found an input of {x.dtype}; convert the "
            "input with .to(), or the transform with .float() or .double()"
        )
    if device is not None and x.device != device:
        raise TypeError(
            f"{owner}: expected the parameters' device {device}, found an input on {x.device}; move one of "
            "them with .to()"
        )


def _check_grid(spatial: torch.Size, field_type: FieldType, owner: str) -> None:
    if 0 in spatial:
        raise ValueError(f"{owner}: expected a grid of at least one point a side, found {tuple(spatial)}")
    if len(set(spatial)) == 1:
        return
    for element in grid_elements(field_type):
        axes, _ = signed_permutation(field_type, element)
        if tuple(spatial[a] for a in axes) != tuple(spatial):
            raise ValueError(
                f"{owner}: expected a grid that {field_type.gspace} maps to itself, found {tuple(spatial)}; "
                "use equal side lengths, or a group without 90-degree rotations"
            )


def check_sides(spatial_shape: Sequence[int], dimensions: int, name: str = "spatial_shape") -> tuple[int, ...]:
    """The side lengths of a grid of so many dimensions.

    :raises TypeError: no sequence of integers.
    :raises ValueError: another number of them, or one that is not positive.
    """
    sides = check_integers(name, spatial_shape, 1)
    if len(sides) != dimensions:
        raise ValueError(
            f"{name}: expected {dimensions} side lengths, found {sides}; the grid of the field type has {dimensions} "
            "dimensions, and channels are not among them"
        )
    return sides


def flatten_batch(x: Tensor, dimensions: int) -> tuple[Tensor, torch.Size]:
    """``x`` with all batch dimensions made one, and the batch shape to restore it."""
    batch = x.shape[: x.dim() - dimensions]
    return x.reshape(-1, *x.shape[x.dim() - dimensions :]), batch


def cat_channels(parts: Sequence[Tensor], spatial_dims: int) -> Tensor:
    """Joins tensors along their channels; on points with channels outermost in memory.

    Runs of channels are then runs of memory, so what works field by field is not slowed by short rows.
    """
    if spatial_dims == 0 and parts[0].dim() > 1:
        return torch.cat([part.mT for part in parts], -2).mT
    return torch.cat(list(parts), -1 - spatial_dims)


def split(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    """``x.split(sizes, dim)``; a single part is ``x`` itself, with no node in the graph."""
    return [x] if len(sizes) == 1 else list(x.split(list(sizes), dim))


def channel_matmul(matrix: Tensor, x: Tensor, spatial_dims: int) -> Tensor:
    """Applies ``matrix`` to the channels of ``(*batch, C, *spatial)`` at every position."""
    if spatial_dims == 0:
        # Channels outermost in memory, the layout that suits what follows (see cat_channels).
        return (matrix @ x.mT).mT if x.dim() > 1 else matrix @ x
    spatial = x.shape[x.dim() - spatial_dims :]
    return (matrix @ x.flatten(-spatial_dims)).unflatten(-1, spatial)


@functools.lru_cache(maxsize=1024)
def _space_matrix(gspace: GSpace, element: GroupElement) -> np.ndarray:
    """The action of ``element`` on array axes: escnn's points are (x, y, z), its arrays (-z, -y, x)."""
    matrix = np.asarray(gspace.basespace_action(element))[::-1, ::-1].copy()
    matrix[:-1, :] *= -1
    matrix[:, :-1] *= -1
    matrix.setflags(write=False)
    return matrix


def signed_permutation(field_type: FieldType, element: GroupElement) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each output axis: the input axis it is read from, and the sign of the reading direction."""
    matrix = np.round(_space_matrix(field_type.gspace, element)).astype(int)
    axes = np.abs(matrix).argmax(axis=1)
    signs = matrix[np.arange(len(axes)), axes]
    return tuple(int(a) for a in axes), tuple(int(s) for s in signs)


def on_grid(field_type: FieldType, element: GroupElement) -> bool:
    """Whether ``element`` permutes the points of a grid (always true where there is no base space)."""
    if field_type.gspace.dimensionality == 0:
        return True
    matrix = _space_matrix(field_type.gspace, element)
    return bool(np.abs(matrix - np.round(matrix)).max() < 1e-9)


def grid_elements(field_type: FieldType) -> list[GroupElement]:
    """The elements that permute the grid, the subgroup under which discretised maps are exact.

    Without a base space: escnn's testing elements.
    """
    group = field_type.fibergroup
    if field_type.gspace.dimensionality == 0:
        return list(_testing_elements(group))
    elements = group.elements if group.order() > 0 else _grid_subgroup(field_type.gspace)
    return [g for g in elements if on_grid(field_type, g)]


@kept_by(group_key)
def _testing_elements(group: Group) -> tuple[GroupElement, ...]:
    return tuple(group.testing_elements())


@functools.lru_cache(maxsize=64)
def _grid_subgroup(gspace: GSpace) -> tuple[GroupElement, ...]:
    """The grid-permuting elements of a continuous group: what quarter turns and reflections generate."""
    point = FieldType(gspace, [gspace.trivial_repr])
    generators = [g for g in _quarter_turns(gspace.fibergroup) if on_grid(point, g)]
    found = [gspace.fibergroup.identity]
    for g in found:  # grows as new products are met
        for product in (h @ g for h in generators):
            if not any(product == h for h in found):
                found.append(product)
    return tuple(found)


def _quarter_turns(group: Group) -> list[GroupElement]:
    """Quarter turns and reflections about coordinate axes, for every continuous group escnn has."""
    half, quarter = np.sqrt(0.5), np.pi / 2
    rotations = [np.array([half * (i == 0), half * (i == 1), half * (i == 2), half]) for i in range(3)]
    if isinstance(group, SO2):
        return [group.element(quarter, "radians")]
    if isinstance(group, O2):
        return [group.element((0, quarter), "radians"), group.element((1, 0.0), "radians")]
    if isinstance(group, SO3):
        return [group.element(q, "Q") for q in rotations]
    if isinstance(group, O3):
        identity = np.array([0.0, 0.0, 0.0, 1.0])
        return [group.element((0, q), "Q") for q in rotations] + [group.element((1, identity), "Q")]
    if isinstance(group, DirectProductGroup):
        first = [group.inclusion1(g) for g in _quarter_turns(group.G1)]
        return first + [group.inclusion2(g) for g in _quarter_turns(group.G2)]
    if group.order() > 0:
        return list(group.elements)
    raise ValueError(f"expected one of escnn's groups, found {group}")


@functools.lru_cache(maxsize=512)
def channel_matrix(field_type: FieldType, element: GroupElement) -> np.ndarray:
    r""":math:`\rho(g)` of the whole field type, float64, shape ``(C, C)``; not to be written to."""
    matrices = {rep: np.asarray(rep(element)) for rep in dict.fromkeys(field_type.representations)}
    matrix, start = np.zeros((field_type.size, field_type.size)), 0
    for rep in field_type.representations:
        matrix[start : start + rep.size, start : start + rep.size] = matrices[rep]
        start += rep.size
    matrix.setflags(write=False)
    return matrix


def _check_acting(field_type: FieldType, element: GroupElement, x: Tensor) -> None:
    """Raises unless ``element`` is one of the type's group, and ``x`` a tensor of its events."""
    validate_field_type(field_type)
    check_element(field_type, element, "element")
    check_instance("x", x, Tensor, "a torch.Tensor")
    dimensions = event_dim(field_type)
    if x.dim() < dimensions or x.shape[-dimensions] != field_type.size:
        raise ValueError(f"x: expected shape (*batch, {field_type.size}, *spatial), found {tuple(x.shape)}")


def check_elements(
    field_type: FieldType, elements: Iterable[GroupElement], name: str = "elements"
) -> list[GroupElement]:
    """Elements of the type's group.

    :raises TypeError: not an iterable of group elements.
    :raises ValueError: one of another group.
    """
    chosen = check_items(name, elements, GroupElement, "group elements")
    for element in chosen:
        check_element(field_type, element, name)
    return chosen


def check_element(field_type: FieldType, element: GroupElement, name: str) -> None:
    """Raises unless ``element`` is one of the type's group."""
    check_instance(name, element, GroupElement, "an element of field_type.fibergroup")
    if element.group != field_type.fibergroup:
        raise ValueError(f"{name}: expected an element of {field_type.fibergroup}, found one of {element.group}")


def act(field_type: FieldType, element: GroupElement, x: Tensor) -> Tensor:
    r"""The group's action :math:`(g \cdot x)(p) = \rho(g)\, x(g^{-1} p)` on events, in the dtype of ``x``.

    Example::

        >>> import torch
        >>> from escnn import gspaces, nn as enn
        >>> from pyro_equiflow.testing import act
        >>> space = gspaces.rot2dOnR2(4)
        >>> image = enn.FieldType(space, [space.trivial_repr])
        >>> act(image, space.fibergroup.element(1), torch.tensor([[[1, 2], [3, 4]]]))
        tensor([[[2, 4],
                 [1, 3]]])

    :param field_type: how the group acts.
    :param element: an element of ``field_type.fibergroup`` that permutes the grid, if there is one.
    :param x: shape ``(*batch, C, *spatial)``.
    :raises TypeError: an argument of another kind.
    :raises ValueError: ``element`` does not permute the grid: interpolation would hide errors; or another group's.
    """
    _check_acting(field_type, element, x)
    spatial_dims = event_dim(field_type) - 1
    if not on_grid(field_type, element):
        raise ValueError(f"element: expected an element that permutes the grid, found {element}")
    matrix = torch.tensor(channel_matrix(field_type, element), dtype=x.dtype, device=x.device)
    if spatial_dims:
        axes, signs = signed_permutation(field_type, element)
        batch = x.dim() - spatial_dims
        # Point p of the result is read at g^-1 p. A flip about the grid's centre keeps odd and even grids.
        x = x.permute(*range(batch), *(batch + a for a in axes))
        x = x.flip([batch + i for i, sign in enumerate(signs) if sign < 0])
    return channel_matmul(matrix, x, spatial_dims)
