# SPDX-License-Identifier: Apache-2.0
"""Densities and draws of the plane, over the orbit of a point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from escnn.nn import FieldType
from matplotlib import patheffects
from matplotlib.axes import Axes
from torch import Tensor
from torch.distributions import Distribution

from pyro_equiflow.ops.arguments import check_instance, check_integer, found
from pyro_equiflow.ops.events import act, check_event, grid_elements
from pyro_equiflow.ops.representations import validate_field_type
from pyro_equiflow.plots.looks import array, new_axes, with_looks

__all__ = ["plot_density", "plot_samples"]

_ROWS = 10_000  # points scored at once
_DENSE = 12  # more points than this, under a continuous group, stand for a circle


def _orbit(field_type: FieldType | None, point: Any) -> Tensor | None:
    """The distinct points of an orbit, shape ``(n, 2)``, the given one first; None where none is asked for."""
    if (field_type is None) != (point is None):
        given, missing = ("point", "field_type") if field_type is None else ("field_type", "point")
        raise ValueError(f"{missing}: expected one beside {given}, found None; an orbit takes both")
    if field_type is None:
        return None
    validate_field_type(field_type)
    if field_type.gspace.dimensionality or field_type.size != 2:
        raise ValueError(
            f"field_type: expected one of size 2 without a base space, found {field_type}; draw a plane of the events"
        )
    point = torch.as_tensor(array("point", point))
    check_event(point, field_type, "point")
    if point.dim() > 1:
        raise ValueError(f"point: expected shape (2,), found {tuple(point.shape)}")
    elements = [field_type.fibergroup.identity, *grid_elements(field_type)]
    points = torch.stack([act(field_type, g, point) for g in elements])
    apart = torch.cdist(points, points) > 1e-6 * point.norm()
    return points[[index for index in range(len(points)) if bool(apart[index, :index].all())]]


def _draw_orbit(ax: Axes, field_type: FieldType | None, orbit: Tensor | None) -> None:
    if field_type is None or orbit is None:
        return
    outline = [patheffects.withStroke(linewidth=3.5, foreground="white")]
    if field_type.fibergroup.order() < 1 and len(orbit) > _DENSE:
        # Representations are orthogonal: an orbit in the plane is a whole circle or finitely many points.
        angles = np.linspace(0, 2 * math.pi, 361)
        x, y = float(orbit[0].norm()) * np.stack([np.cos(angles), np.sin(angles)])
        ax.plot(x, y, color="black", linewidth=1.5, linestyle="--", path_effects=outline, label="orbit", zorder=3)
    elif len(orbit) > 1:
        x, y = orbit[1:].T.numpy()
        ax.scatter(x, y, s=46, marker="o", facecolor="white", edgecolor="black", linewidth=1.4, label="orbit", zorder=3)
    x, y = orbit[0].tolist()
    ax.scatter(x, y, s=150, marker="*", facecolor="white", edgecolor="black", linewidth=1.2, label="point", zorder=4)


def _square(limits: Sequence[Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    try:
        pairs = np.broadcast_to(np.asarray(limits, dtype=float), (2, 2))
    except (TypeError, ValueError):
        pairs = np.full((2, 2), math.nan)
    if np.shape(limits)[-1:] != (2,) or not (np.isfinite(pairs).all() and (pairs[:, 0] < pairs[:, 1]).all()):
        raise ValueError(
            f"limits: expected (low, high), or ((left, right), (bottom, top)), finite and rising, found {found(limits)}"
        )
    (left, right), (bottom, top) = pairs.tolist()
    return (left, right), (bottom, top)


@torch.no_grad()
def plot_density(
    log_prob: Distribution | Callable[[Tensor], Tensor],
    *,
    limits: Sequence[Any],
    field_type: FieldType | None = None,
    point: Any = None,
    resolution: int = 200,
    ax: Axes | None = None,
) -> Axes:
    r"""A density of the plane as filled contours, and the orbit :math:`\{g \cdot x\}` of a point over it.

    An invariant density has one value on each orbit. Contours are of :math:`q / \max q` in steps of a tenth, so
    :math:`\log q` is needed up to a constant only; under a continuous group the orbit is drawn as a line.

    Example::

        >>> import pyro.distributions as dist, torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import OrbitMixture
        >>> from pyro_equiflow.plots import plot_density
        >>> space = gspaces.no_base_space(group.cyclic_group(3))
        >>> vector = enn.FieldType(space, [space.irrep(1)])
        >>> density = OrbitMixture(dist.Normal(torch.tensor([1.0, 0.5]), 0.4).to_event(1), vector)
        >>> axes = plot_density(density, limits=(-2, 2), field_type=vector, point=(1.0, 0.5), resolution=50)

    :param log_prob: a distribution, or a function from ``(n, 2)`` to log-densities ``(n,)``.
    :param limits: ``(low, high)`` of both coordinates, or one pair for each.
    :param field_type: how the group acts on the plane; of size 2.
    :param point: the point whose orbit is marked, shape ``(2,)``. The density is scored in its dtype if it is a tensor,
        else in torch's default.
    :param resolution: points a side at which the density is found.
    :param ax: where to draw; a new figure by default.
    :raises ValueError: a point without a field type or the reverse, limits that do not rise, a density of another shape
        or nowhere finite.
    """
    orbit = _orbit(field_type, point)
    horizontal, vertical = _square(limits)
    resolution = check_integer("resolution", resolution, 2)
    dtype = point.dtype if isinstance(point, Tensor) else torch.get_default_dtype()
    x = torch.linspace(*horizontal, resolution, dtype=dtype)
    y = torch.linspace(*vertical, resolution, dtype=dtype)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
    score: Any = getattr(log_prob, "log_prob", log_prob)
    check_instance("log_prob", score, Callable, "a distribution or a function that gives log-densities")
    values = torch.cat([torch.as_tensor(score(rows)) for rows in grid.split(_ROWS)])
    if values.shape != (len(grid),):
        raise ValueError(f"log_prob: expected shape (n,) for points (n, 2), found {tuple(values.shape)}")
    values = values.double().cpu().nan_to_num(-math.inf, math.inf, -math.inf)
    if not bool(values.max().isfinite()):
        raise ValueError("log_prob: expected finite values, found none within limits, or one of +infinity")
    ax = new_axes(ax)
    relative = (values - values.max()).exp().reshape(resolution, resolution)
    ax.contourf(x.numpy(), y.numpy(), relative.numpy(), levels=np.linspace(0, 1, 11), cmap="cividis")
    _draw_orbit(ax, field_type, orbit)
    ax.set(xlim=horizontal, ylim=vertical, aspect="equal")
    return ax


def plot_samples(
    samples: Any, *, field_type: FieldType | None = None, point: Any = None, ax: Axes | None = None
) -> Axes:
    r"""Draws in the plane, over the orbit :math:`\{g \cdot x\}` of a point.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow.plots import plot_samples
        >>> space = gspaces.no_base_space(group.so2_group())
        >>> vector = enn.FieldType(space, [space.irrep(1)])
        >>> axes = plot_samples(torch.randn(100, 2), field_type=vector, point=(1.0, 0.0))

    :param samples: shape ``(*batch, 2)``, or a mapping of labels to such.
    :param field_type: how the group acts on the plane; of size 2.
    :param point: the point whose orbit is drawn, shape ``(2,)``.
    :param ax: where to draw; a new figure by default.
    :raises ValueError: draws of another shape, a point without a field type or the reverse.
    """
    orbit = _orbit(field_type, point)
    sets = with_looks("samples", samples)
    points = [array("samples", one.value) for one in sets]
    for values in points:
        if values.shape[-1:] != (2,):
            raise ValueError(f"samples: expected shape (*batch, 2), found {values.shape}; choose two coordinates")
    ax = new_axes(ax)
    for one, values in zip(sets, points):
        x, y = values.reshape(-1, 2).T
        alpha = min(0.8, max(0.25, 300 / max(len(x), 1)))
        # The legend's marker is opaque: drawn by itself, without points.
        ax.scatter(x, y, s=9, color=one.colour, marker=one.marker, alpha=alpha, linewidth=0, rasterized=True)
        if one.label is not None:
            ax.scatter([], [], s=25, color=one.colour, marker=one.marker, label=one.label)
    _draw_orbit(ax, field_type, orbit)
    if any(one.label is not None for one in sets):
        # Beside the axes, where it hides neither draws nor title.
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, handletextpad=0.5)
    ax.set_aspect("equal")
    return ax
