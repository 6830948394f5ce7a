# SPDX-License-Identifier: Apache-2.0
"""Pictures of symmetric densities, draws, images, errors and training runs.

Needs matplotlib, the extra ``plots``. Every function draws into the axes it is given, or into a new figure, and returns
them; none shows the figure or changes matplotlib's settings. Series differ by line style or marker as well as by
colour, maps of values by lightness, so that pictures can be read in grey and by the colour-blind.
"""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        "pyro_equiflow.plots: expected matplotlib, found none; install the extra, pip install 'pyro_equiflow[plots]'"
    ) from error

from pyro_equiflow.plots.plane import plot_density, plot_samples
from pyro_equiflow.plots.symmetry import plot_equivariance_error, plot_rotations
from pyro_equiflow.plots.training import plot_training

__all__ = ["plot_density", "plot_equivariance_error", "plot_rotations", "plot_samples", "plot_training"]
