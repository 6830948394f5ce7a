# SPDX-License-Identifier: Apache-2.0
"""Training curves."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pyro_equiflow.ops.arguments import check_instance, check_integer
from pyro_equiflow.plots.looks import array, new_axes, with_looks

__all__ = ["plot_training"]


def plot_training(curves: Any, *, smooth: int = 1, ylabel: str = "loss", ax: Axes | None = None) -> Axes:
    r"""Losses over steps; of several runs the mean, in a band from the smallest to the largest.

    With ``smooth`` :math:`= w` the curve at step :math:`t` is the mean of the steps :math:`t - w + 1, \dots, t`, so it
    begins at step :math:`w` and shows nothing before it happened; runs are smoothed one by one.

    Example::

        >>> import torch
        >>> from pyro_equiflow.plots import plot_training
        >>> axes = plot_training({"one run": [3.0, 2.0, 1.5], "five": torch.rand(5, 3)}, smooth=2)

    :param curves: losses ``(steps,)``, or of several runs ``(runs, steps)``, or a mapping of labels to such.
    :param smooth: length of the window, in steps.
    :param ylabel: what the curves are.
    :param ax: where to draw; a new figure by default.
    :raises ValueError: losses of another shape, a window that is not positive or longer than a curve.
    """
    smooth = check_integer("smooth", smooth, 1)
    check_instance("ylabel", ylabel, str, "a string")
    sets = with_looks("curves", curves)
    losses = [array("curves", one.value) for one in sets]
    for values in losses:
        if values.ndim not in (1, 2) or values.shape[0] == 0 or values.shape[-1] < smooth:
            raise ValueError(
                f"curves: expected shape (steps,) or (runs, steps) with {smooth} steps at least, as many as smooth, "
                f"found {values.shape}"
            )
    ax = new_axes(ax)
    for one, values in zip(sets, losses):
        runs = np.lib.stride_tricks.sliding_window_view(np.atleast_2d(values), smooth, axis=-1).mean(-1)
        steps = np.arange(smooth, smooth + runs.shape[-1])
        ax.plot(steps, runs.mean(0), color=one.colour, linestyle=one.line, linewidth=1.5, label=one.label)
        if len(runs) > 1:
            ax.fill_between(steps, runs.min(0), runs.max(0), color=one.colour, alpha=0.2, linewidth=0)
    ax.set(xlabel="step", ylabel=ylabel)
    if ax.get_legend_handles_labels()[1]:
        ax.legend()
    return ax
