# SPDX-License-Identifier: Apache-2.0
"""Images as data: from integers to a continuous density and back to bits, every Jacobian counted."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_equiflow.ops.arguments import check_dtype, check_instance, check_integer

__all__ = ["bits_per_dim", "dequantize"]


def dequantize(images: Tensor, *, num_levels: int = 256, dtype: torch.dtype | None = None) -> Tensor:
    r"""Uniform noise added to integers, :math:`x = (k + u) / L` with :math:`u \sim U(0, 1)`.

    A density fitted to integers as they are grows without bound at them. Pixels come out inside (0, 1), each inside its
    own bin even where rounding would carry it out; noise is drawn from torch's generator.

    Example::

        >>> import torch
        >>> from pyro_equiflow import dequantize
        >>> images = torch.randint(256, (5, 1, 8, 8))
        >>> bool((dequantize(images).mul(256).floor() == images).all())
        True

    :param images: integers from 0 to ``num_levels - 1``, of any shape.
    :param num_levels: :math:`L`: 256 for bytes.
    :param dtype: of the result, by default torch's.
    :raises TypeError: images that are not of an integer type.
    :raises ValueError: values outside the levels.

    References: Uria, Murray and Larochelle, *RNADE* (arXiv 1306.0186); Theis, van den Oord and Bethge, *A note on the
    evaluation of generative models* (arXiv 1511.01844), section 3.1.
    """
    _check_images(images, num_levels)
    return _dequantize(images, num_levels, dtype)


def bits_per_dim(
    density: Distribution,
    images: Tensor,
    *,
    num_levels: int = 256,
    num_samples: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Bits per dimension that a density of pixels needs for images of integers.

    A density :math:`p` on :math:`[0, 1]^D` gives an image :math:`k` of :math:`L` levels the probability

    .. math:: P(k) = \int_{[0, 1)^D} p\Big(\frac{k + u}{L}\Big) L^{-D}\, du, \qquad
        \text{bits} = -\frac{1}{D} \log_2 P(k).

    The integral is estimated by the mean over ``num_samples`` draws of :func:`dequantize`. The mean is unbiased, so
    its logarithm is too small on average: the expected result is an upper bound of the bits, and falls to them with
    more draws. Where the density is constant on each bin it is exact with one draw. Nothing else enters: no resized
    image, no channel added, no base distribution other than the one trained.

    Example::

        >>> import torch, pyro.distributions as dist
        >>> from pyro_equiflow import bits_per_dim
        >>> density = dist.Uniform(torch.zeros(1, 8, 8), 1.0).to_event(3)
        >>> bits_per_dim(density, torch.randint(256, (3, 1, 8, 8)))
        tensor([8., 8., 8.])

    :param density: a distribution of events of pixels scaled to [0, 1], all Jacobians included: a
        ``TransformedDistribution`` that ends with ``LogitTransform(...).inv``.
    :param images: integers from 0 to ``num_levels - 1``, shape ``(*batch, *density.event_shape)``.
    :param num_levels: :math:`L`.
    :param num_samples: draws per image, all scored at once.
    :param dtype: that of the density, by default torch's.
    :return: bits of shape ``batch``, differentiable in the density's parameters.
    :raises TypeError: images that are not of an integer type.
    :raises ValueError: another event shape, values outside the levels, no draw.

    References: Theis, van den Oord and Bethge, *A note on the evaluation of generative models* (arXiv 1511.01844),
    section 3.1; Burda, Grosse and Salakhutdinov, *Importance Weighted Autoencoders* (arXiv 1509.00519), theorem 1.
    """
    _check_images(images, num_levels)
    check_instance("density", density, Distribution, "a distribution")
    num_samples = check_integer("num_samples", num_samples, 1)
    event = density.event_shape
    size = event.numel()
    if images.dim() < len(event) or images.shape[images.dim() - len(event) :] != event:
        raise ValueError(f"images: expected shape (*batch, *{tuple(event)}), found {tuple(images.shape)}")
    pixels = _dequantize(images.expand(num_samples, *images.shape), num_levels, dtype)
    log_prob = torch.logsumexp(density.log_prob(pixels), 0) - math.log(num_samples)
    return (size * math.log(num_levels) - log_prob) / (size * math.log(2))


def _check_images(images: Tensor, num_levels: int) -> None:
    num_levels = check_integer("num_levels", num_levels, 2)
    stored = images.dtype if isinstance(images, Tensor) else None
    if stored is None or stored.is_floating_point or stored.is_complex or stored == torch.bool:
        raise TypeError(
            f"images: expected a tensor of integers, found {stored or type(images).__name__}; pass levels as they were "
            "stored, not scaled ones"
        )
    # As numbers of Python: 256 compared as a byte would be 0.
    lowest, highest = (int(images.min()), int(images.max())) if images.numel() else (0, 0)
    if lowest < 0 or highest >= num_levels:
        raise ValueError(
            f"images: expected integers from 0 to {num_levels - 1}, found {lowest} to {highest}; set num_levels to the "
            "number of gray levels"
        )


def _dequantize(images: Tensor, num_levels: int, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None:
        check_dtype("dtype", dtype, also="None")
    levels = images.to(torch.get_default_dtype() if dtype is None else dtype)
    # k + u may round to k + 1, the next bin; in the last bin that is pixel 1, whose logit is infinite, as it is at the
    # pixel 0 that u = 0 gives in the first.
    noisy = torch.minimum(levels + torch.rand_like(levels), torch.nextafter(levels + 1, levels))
    return noisy.clamp_min(torch.finfo(levels.dtype).eps) / num_levels
