# SPDX-License-Identifier: Apache-2.0
"""Errors by group element, and images beside their rotations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from escnn.group import GroupElement
from escnn.nn import FieldType
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import FixedLocator
from torch import Tensor

from pyro_equiflow.ops.arguments import check_instance
from pyro_equiflow.ops.events import act, check_elements, check_event, grid_elements
from pyro_equiflow.ops.representations import validate_field_type
from pyro_equiflow.plots.looks import new_axes, with_looks
from pyro_equiflow.testing import equivariance_errors

__all__ = ["plot_equivariance_error", "plot_rotations"]

_MOST_TICKS = 13


def _name(field_type: FieldType, element: GroupElement) -> str:
    """A rotation of the plane by its angle, a reflection by that of its axis, any other element by its own name."""
    gspace = field_type.gspace
    if gspace.dimensionality == 2:
        matrix = np.asarray(gspace.basespace_action(element))
        flipped, angle = np.linalg.det(matrix) < 0, math.atan2(matrix[1, 0], matrix[0, 0])
    elif gspace.dimensionality == 0 and "radians" in element.group.PARAMETRIZATIONS:
        value = element.to("radians")
        flipped, angle = value if isinstance(value, tuple) else (0, value)
    else:
        return " ".join(str(element).split())
    degrees = round(math.degrees(angle)) % 360
    return f"mirror {degrees / 2:.3g}°" if flipped else f"{degrees}°"


def _chosen(field_type: FieldType, elements: Iterable[GroupElement] | None) -> list[GroupElement]:
    validate_field_type(field_type)
    if elements is None:
        return grid_elements(field_type)
    chosen = check_elements(field_type, elements)
    if not chosen:
        raise ValueError("elements: expected one group element at least, found none; leave it out for all")
    return chosen


def plot_equivariance_error(
    function: Callable[[Tensor], Tensor] | Mapping[str, Callable[[Tensor], Tensor]],
    x: Tensor,
    *,
    field_type: FieldType | None = None,
    out_type: FieldType | None = None,
    elements: Iterable[GroupElement] | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""The error :math:`|f(g \cdot x) - g \cdot f(x)| / |f(x)|` of each group element, on a log scale.

    Stems are as high as :func:`~pyro_equiflow.testing.equivariance_errors` says; an error of exactly 0 (the identity's,
    say) is a hollow marker at the lower edge. The line is the machine epsilon of the dtype of ``x``. Rotations of the
    plane are named by their angles, reflections ("mirror") by the angles of their axes.

    Example::

        >>> import torch
        >>> from escnn import gspaces, group, nn as enn
        >>> from pyro_equiflow import equivariant_flow
        >>> from pyro_equiflow.plots import plot_equivariance_error
        >>> space = gspaces.no_base_space(group.dihedral_group(4))
        >>> vectors = enn.FieldType(space, 2 * [space.irrep(1, 1)])
        >>> axes = plot_equivariance_error(equivariant_flow(vectors, num_transforms=1), torch.randn(100, 4))

    :param function: a transform, or any map of events, or a mapping of labels to such.
    :param x: events ``(*batch, C, *spatial)``.
    :param field_type: how the group acts on ``x``; default the function's own.
    :param out_type: how it acts on the image; default the function's own, else as on ``x``.
    :param elements: group elements; default all that permute the grid, or escnn's testing elements on a point.
    :param ax: where to draw; a new figure by default.
    :raises ValueError: no field type, or errors that are not finite.
    """
    maps = with_looks("function", function)
    for one in maps:
        check_instance(
            "function", one.value, Callable, "a transform, a function of events, or a mapping of labels to such"
        )
    in_type = getattr(maps[0].value, "field_type", None) if field_type is None else field_type
    chosen = None if in_type is None else _chosen(in_type, elements)
    found = [equivariance_errors(one.value, x, field_type, out_type=out_type, elements=chosen) for one in maps]
    bad = [g for errors in found for g, error in errors if not math.isfinite(error)]
    if bad:
        raise ValueError(f"function: expected finite images of x, found NaN or infinity at the group element {bad[0]}")
    epsilon = torch.finfo(x.dtype).eps
    ax = new_axes(ax)
    lowest = min((e for errors in found for _, e in errors if e > 0), default=epsilon)
    floor = min(lowest, epsilon) / 10
    width = 0.8 / len(maps)
    for index, (one, errors) in enumerate(zip(maps, found)):
        heights = np.array([error for _, error in errors])
        places = np.arange(len(errors)) + (index - (len(maps) - 1) / 2) * width / 2
        shown = heights > 0
        ax.vlines(places[shown], floor, heights[shown], color=one.colour, linewidth=1)
        look: dict[str, Any] = {"marker": one.marker, "edgecolor": one.colour, "s": 20, "zorder": 3, "clip_on": False}
        ax.scatter(places[shown], heights[shown], facecolor=one.colour, label=one.label, **look)
        ax.scatter(places[~shown], np.full((~shown).sum(), floor), facecolor="white", **look)
    name = str(x.dtype).removeprefix("torch.")
    ax.axhline(epsilon, color="black", linestyle="--", linewidth=1, label=f"machine epsilon, {name}")
    names = [_name(in_type, g) for g, _ in found[0]]
    every = math.ceil(len(names) / _MOST_TICKS)
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(names) > 4 else {}
    ax.set_xticks(range(0, len(names), every), names[::every], **slanted)
    ax.xaxis.set_minor_locator(FixedLocator(range(len(names))))
    ax.set(yscale="log", xlabel="group element", ylabel="equivariance error")
    highest = max([epsilon, *(e for errors in found for _, e in errors)])
    # A third more decades than the stems need, for the legend.
    ax.set_ylim(floor, highest * (highest / floor) ** (1 / 3))
    ax.legend(loc="upper left", ncol=2, frameon=False, fontsize="small", columnspacing=1.2, labelspacing=0.2)
    return ax


def _picture(field_type: FieldType, events: Tensor) -> np.ndarray:
    """Gray values or colours of events ``(n, C, H, W)``."""
    values = events.detach().cpu().double()
    if values.shape[1] == 1:
        return values[:, 0].numpy()
    if field_type.size == 3 and all(r.is_trivial() for r in field_type.representations):
        return values.clamp(0, 1).movedim(1, -1).numpy()
    return values.norm(dim=1).numpy()


@torch.no_grad()
def plot_rotations(
    images: Tensor,
    field_type: FieldType,
    *,
    function: Callable[[Tensor], Tensor] | None = None,
    out_type: FieldType | None = None,
    elements: Iterable[GroupElement] | None = None,
    figure: FigureBase | None = None,
) -> np.ndarray:
    r"""Images beside their rotations :math:`g \cdot x`, and under each what a function makes of it.

    Columns are group elements. Under an equivariant function the lower picture of a column is that of the first column,
    rotated: :math:`f(g \cdot x) = g \cdot f(x)`.

    Example::

        >>> import torch
        >>> from escnn import gspaces, nn as enn
        >>> from pyro_equiflow.plots import plot_rotations
        >>> space = gspaces.rot2dOnR2(4)
        >>> gray = enn.FieldType(space, [space.trivial_repr])
        >>> plot_rotations(torch.rand(2, 1, 8, 8), gray).shape
        (2, 4)

    :param images: shape ``(n, C, H, W)``. One channel is drawn as it is, three invariant ones as colours with values
        within 0 and 1, any others by the length of the vector at each pixel, which turns with the image too.
    :param field_type: how the group acts on images.
    :param function: a transform, or any map of events; ``None`` shows the images alone.
    :param out_type: how the group acts on its images; default the function's own, else ``field_type``.
    :param elements: group elements that permute the grid; default all of these.
    :param figure: where to draw, a figure or subfigure; a new one by default.
    :return: the axes, shape ``(n, elements)``, or ``(2 n, elements)`` with a function.
    :raises ValueError: images of another shape, elements that do not permute the grid.
    """
    validate_field_type(field_type)
    check_event(images, field_type, "images")
    if field_type.gspace.dimensionality != 2 or images.dim() != 4:
        raise ValueError(
            f"images: expected shape (n, C, H, W) under a field type of images, found {tuple(images.shape)} under "
            f"{field_type}"
        )
    chosen = _chosen(field_type, elements)
    if function is not None:
        check_instance("function", function, Callable, "a transform, a function of events, or None")
    if out_type is not None:
        validate_field_type(out_type, "out_type")
    if figure is not None:
        check_instance("figure", figure, FigureBase, "a matplotlib figure or None")
    columns = [act(field_type, g, images) for g in chosen]
    rows = [(field_type, columns)]
    if function is not None:
        rows.append((out_type or getattr(function, "out_type", field_type), [function(column) for column in columns]))
    names = [_name(field_type, g) for g in chosen]
    if figure is None:
        size = (1.3 * len(chosen) + 0.5, 1.3 * len(rows) * len(images) + 0.3)
        figure = plt.figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows) * len(images), len(chosen), squeeze=False)
    for offset, (kind, pictures) in enumerate(rows):
        drawn = np.stack([_picture(kind, events) for events in pictures])
        for number, panels in enumerate(axes[offset :: len(rows)]):
            row = drawn[:, number]
            for panel, picture in zip(panels, row):
                panel.imshow(picture, cmap="gray", vmin=row.min(), vmax=row.max(), interpolation="nearest")
    for panel in axes.flat:
        panel.set(xticks=(), yticks=())
    for panel, name in zip(axes[0], names):
        panel.set_title(name, fontsize="medium")
    if function is not None:
        for index, panel in enumerate(axes[:, 0]):
            panel.set_ylabel("$f(g\\cdot x)$" if index % 2 else "$g\\cdot x$")
    return axes
