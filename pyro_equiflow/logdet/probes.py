# SPDX-License-Identifier: Apache-2.0
"""Random probes and stopping times: from torch's generator in training, the same at every call otherwise."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from pyro_equiflow.ops.tracing import in_torch_func, outside_torch_func

__all__ = ["DISTRIBUTIONS", "geometric", "probe_vectors"]

DISTRIBUTIONS = ("rademacher", "gaussian")


def _private_generator(purpose: str, shape: tuple[int, ...]) -> torch.Generator:
    # On the CPU whatever the device, so that a density is the same on every one.
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose}{tuple(shape)}".encode()))


def probe_vectors(count: int, x: Tensor, distribution: str, training: bool) -> Tensor:
    """Probes ``(count, B, *event)`` of mean zero and unit covariance.

    Outside training all samples share the probes, which depend on the event's shape only: the estimate of a sample
    is then a function of the sample, whatever batch it comes in.
    """
    if training:
        shape = (count, *x.shape)
        if distribution == "gaussian":
            return torch.randn(shape, dtype=x.dtype, device=x.device)
        return (torch.rand(shape, dtype=x.dtype, device=x.device) < 0.5).to(x.dtype) * 2 - 1
    shape = (count, 1, *x.shape[1:])
    with outside_torch_func():
        generator = _private_generator("probes", shape)
        if distribution == "gaussian":
            probes = torch.randn(shape, generator=generator, dtype=torch.float64)
        else:
            probes = torch.empty(shape, dtype=torch.float64).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    return probes.to(x).expand(count, *x.shape)


def geometric(count: int, x: Tensor, probability: float, training: bool) -> Tensor:
    """Draws ``(count, B)`` of ``N >= 0`` with ``P(N >= j) = (1 - probability)^j``.

    Outside training all samples share them, as they do the probes; so they do under ``torch.func``, where the loop over
    terms cannot hang on a sample.
    """
    rows, private = (x.shape[0] if training and not in_torch_func() else 1), None
    with outside_torch_func():
        if not training:
            private = _private_generator("terms", (count, *x.shape[1:]))
        device = x.device if training else None
        uniform = torch.rand(count, rows, generator=private, dtype=torch.float64, device=device)
        uniform = uniform.to(x.device).expand(-1, x.shape[0])
        # uniform < 1, so the logarithm is finite.
        return (torch.log1p(-uniform) / math.log1p(-probability)).floor().long()
