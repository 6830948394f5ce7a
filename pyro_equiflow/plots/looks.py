# SPDX-License-Identifier: Apache-2.0
"""What pictures have in common: colours, line styles and markers of series, new axes, arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyro_equiflow.ops.arguments import check_instance, found

__all__ = ["Series", "array", "new_axes", "with_looks"]

# Those of Okabe and Ito, *Color Universal Design* (2008), ordered so that neighbours differ in lightness.
_COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#56B4E9", "#D55E00")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class Series(NamedTuple):
    """One of the things drawn into the same axes, and its look."""

    label: str | None
    value: Any
    colour: str
    line: Any
    marker: str


def with_looks(name: str, values: Any) -> list[Series]:
    """One series, or the labelled ones of a mapping, each with its look.

    :param name: the argument's.
    :raises ValueError: an empty mapping.
    """
    if isinstance(values, Mapping) and not values:
        raise ValueError(f"{name}: expected one labelled series at least, found an empty mapping")
    items = values.items() if isinstance(values, Mapping) else [(None, values)]
    return [
        Series(
            label,
            value,
            _COLOURS[index % len(_COLOURS)],
            _LINES[index % len(_LINES)],
            _MARKERS[index % len(_MARKERS)],
        )
        for index, (label, value) in enumerate(items)
    ]


def new_axes(ax: Axes | None) -> Axes:
    """The axes given, or those of a new figure."""
    if ax is None:
        return plt.subplots(layout="constrained")[1]
    return check_instance("ax", ax, Axes, "matplotlib axes or None")


def array(name: str, values: Any) -> np.ndarray:
    """Tensors, arrays, and sequences of numbers or of tensors as float64 numpy.

    :param name: the argument's.
    :raises TypeError: nothing of the kind.
    """
    try:
        if isinstance(values, Sequence) and any(isinstance(value, Tensor) for value in values):
            return np.stack([array(name, value) for value in values])
        return torch.as_tensor(values).detach().cpu().double().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected an array of numbers, found {found(values)}") from error
