# SPDX-License-Identifier: Apache-2.0
"""The upper tail of importance weights: how heavy it is, and how far it leaves their mean unknown."""

from __future__ import annotations

import math
from typing import NamedTuple

from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

__all__ = ["ParetoTail", "largest_trusted_shape", "pareto_tail"]

_FEWEST = 5  # weights that a tail is fitted to; below it Vehtari et al. give up as well
_ROUNDING = 1e-5  # relative differences of weights that say nothing: of float32 log-densities, say


class ParetoTail(NamedTuple):
    r"""A generalised Pareto distribution fitted to the largest weights.

    :ivar shape: :math:`\hat k`: weights have moments below :math:`1 / k`, so no variance above one half and no mean
        above one. ``-inf`` where the largest weights are equal, NaN where there are too few to tell.
    :ivar mean_stderr: standard error that the fit leaves to the mean of all weights, at a shape two standard errors
        above the fitted one; infinite where that is above one.
    """

    shape: float
    mean_stderr: float


def pareto_tail(weights: Tensor) -> ParetoTail:
    r"""The tail of importance weights.

    With :math:`m` of :math:`n` weights in the tail, exceeding :math:`u`, their excess has mean
    :math:`\sigma / (1 - k)`; its variance follows from that of the maximum-likelihood estimates
    (Fisher information of the generalised Pareto distribution, Smith 1987) by the delta method:

    .. math:: \mathrm{Var}(\hat k) = \frac{(1 + k)^2}{m},\quad \mathrm{Var}(\hat\sigma) = \frac{2 \sigma^2 (1 + k)}{m},
              \quad \mathrm{Cov} = -\frac{\sigma (1 + k)}{m}.

    The sample's own standard deviation is smallest where it matters most: where the largest weights were not drawn,
    mean, deviation and :math:`\hat k` are all too small together. Taken two standard errors of :math:`\hat k` above,
    the error allows for that: ``benchmarks/evidence_coverage.py``.

    :param weights: shape ``(n,)``, in float64.

    References: Vehtari et al., *Pareto smoothed importance sampling* (JMLR 2024, arXiv 1507.02646); Zhang and Stephens,
    *A new and efficient estimation method for the generalized Pareto distribution* (Technometrics 2009); Smith,
    *Estimating tails of probability distributions* (Annals of Statistics 1987).
    """
    count = len(weights)
    size = math.ceil(min(0.2 * count, 3 * math.sqrt(count)))
    if size < _FEWEST:
        return ParetoTail(math.nan, 0.0)
    largest = weights.sort().values[-size - 1 :]
    threshold, tail = largest[0], largest[largest > largest[0]] - largest[0]
    if float(largest[-1] - threshold) <= _ROUNDING * float(largest[-1]):
        return ParetoTail(-math.inf, 0.0)
    size = len(tail)
    if size < _FEWEST:
        return ParetoTail(math.nan, 0.0)
    shape, scale = map(float, fit_generalized_pareto(tail.cpu()))  # its grid is the CPU's
    k = shape + 2 * (1 + max(shape, 0.0)) / math.sqrt(size)
    if k >= 1:
        return ParetoTail(shape, math.inf)
    if k <= -0.5:  # no Fisher information: weights are bounded, and their own deviation will do
        return ParetoTail(shape, 0.0)
    relative = (1 + k) / (1 - k) ** 4 + 2 / (1 - k) ** 2 - 2 / (1 - k) ** 3
    return ParetoTail(shape, scale * math.sqrt((1 + k) / size * relative) * size / count)


def largest_trusted_shape(count: int) -> float:
    r"""The :math:`\hat k` up to which a mean of so many weights says something, :math:`\min(1 - 1/\log_{10} n, 0.7)`.

    Above it ever more draws are wanted for the same error (Vehtari et al., section 3.2.4).
    """
    return min(1 - 1 / math.log10(max(count, 2)), 0.7)
