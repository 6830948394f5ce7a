# SPDX-License-Identifier: Apache-2.0
"""The logit of pixels, kept away from the ends of the interval."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn.functional import softplus

from pyro_equiflow.ops.arguments import check_integer, check_number

__all__ = ["LogitTransform"]


class LogitTransform(Transform):
    r"""Pixels to real numbers, :math:`y = \operatorname{logit}(\alpha + (1 - 2 \alpha) x)`.

    With a margin :math:`\alpha > 0` black and white stay at finite distance. The domain is then a little larger than
    [0, 1], by :math:`\alpha / (1 - 2 \alpha)` on either side: mass that a density puts outside [0, 1] is lost to it,
    and counts against it in :func:`bits_per_dim`.

    Log-det exact, :math:`\log(1 - 2 \alpha) - \log s - \log(1 - s)` with :math:`s = \alpha + (1 - 2 \alpha) x`, inverse
    closed. The last part of a density of images is the inverse, ``LogitTransform().inv``.

    Example::

        >>> import torch
        >>> from pyro_equiflow import LogitTransform
        >>> LogitTransform(0.05)(torch.tensor([0.0, 0.5, 1.0]))
        tensor([-2.9444,  0.0000,  2.9444])

    :param alpha: the margin, in [0, 0.5).
    :param cache_size: 0 or 1.
    :raises ValueError: a margin outside [0, 0.5).

    References: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP* (arXiv 1605.08803), section 4.1,
    with a margin on one side; Papamakarios, Pavlakou and Murray, *Masked Autoregressive Flow for Density Estimation*
    (arXiv 1705.07057), with one on both.
    """

    bijective = True
    sign = 1
    codomain = constraints.real

    def __init__(self, alpha: float = 0.05, *, cache_size: int = 0) -> None:
        alpha = check_number("alpha", alpha, "[0, 0.5)")
        super().__init__(cache_size=check_integer("cache_size", cache_size, 0, 1))
        self.alpha = alpha

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """The pixel values that have an image."""
        margin = self.alpha / (1 - 2 * self.alpha)
        return constraints.interval(-margin, 1 + margin)

    def with_cache(self, cache_size: int = 1) -> LogitTransform:
        """This transform with another cache size."""
        cache_size = check_integer("cache_size", cache_size, 0, 1)
        return self if cache_size == self._cache_size else LogitTransform(self.alpha, cache_size=cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LogitTransform) and other.alpha == self.alpha

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        return torch.logit(self.alpha + (1 - 2 * self.alpha) * x)

    def _inverse(self, y: Tensor) -> Tensor:
        return (torch.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The log of the slope at every pixel, of the shape of ``x``."""
        # -log s and -log(1 - s), without their cancellation near 0 and 1.
        return math.log1p(-2 * self.alpha) + softplus(y) + softplus(-y)
