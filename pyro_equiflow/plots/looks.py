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


def with_looks(values: Any) -> list[Series]:
    """One series, or the labelled ones of a mapping, each with its look."""
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
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def array(values: Any) -> np.ndarray:
    """Tensors, arrays, and sequences of numbers or of tensors as float64 numpy."""
    if isinstance(values, Sequence) and any(isinstance(value, Tensor) for value in values):
        return np.stack([array(value) for value in values])
    return torch.as_tensor(values).detach().cpu().double().numpy()
