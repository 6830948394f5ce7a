# SPDX-License-Identifier: Apache-2.0
"""How far single precision determines the image of an event under a map."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_equiflow.ops.arguments import check_instance, check_integer

__all__ = ["neighbours", "rounding_error"]


def neighbours(x: Tensor, event_dim: int) -> tuple[Tensor, Tensor]:
    """Every number moved to a neighbour in float32, as its last bit says; and with every second one the other way.

    In one direction alone a steep map may be flat.
    """
    first = (x.contiguous().view(torch.int32) ^ 1).view(torch.float32)
    shape = x.shape[x.dim() - event_dim :]
    every_second = torch.arange(shape.numel(), device=x.device).reshape(shape) % 2
    return first, torch.where(every_second.bool(), torch.nextafter(x, 2 * x - first), first)


@torch.no_grad()
def rounding_error(
    function: Callable[[Tensor], Tensor], x: Tensor, event_dim: int = 1, *, image: Tensor | None = None
) -> Tensor:
    r"""An estimate of the relative error that float32 leaves in the image of each event.

    However a map is computed, its image is known no better than its argument: a map that is steep at ``x`` spreads
    what lies between two neighbouring float32 numbers. Each number of ``x`` is moved to a neighbour, up or down as its
    last bit says, and then once more with every second number the other way, since in one direction a steep map may
    be flat; the changes of the image, squared and summed, times two, are the estimate's square. It is relative to the
    image's length, but near the origin to a hundredth of that of ``x`` or of the root of the event's size, whichever is
    smaller: a sum that happens to vanish is not lost.

    Example::

        >>> import torch
        >>> from pyro_equiflow.testing import rounding_error
        >>> x = torch.tensor([[1.0, 1.001], [0.1, 0.0]])
        >>> bool((rounding_error(lambda x: 3 * x, x) < 1e-6).all())
        True
        >>> bool((rounding_error(lambda x: torch.exp(1e4 * (x - 1)), x)[0] > 1e-3))
        True

    :param function: a map of events, ``transform.inv`` say.
    :param x: float32, shape ``(*batch, C, *spatial)``.
    :param event_dim: dimensions of an event, ``transform.event_dim``.
    :param image: what the function gives at ``x``, where that is known.
    :return: shape ``batch``.
    :raises TypeError: no function, or another dtype than float32.
    :raises ValueError: more dimensions of an event than ``x`` has.
    """
    check_instance("function", function, Callable, "a map of events")
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a tensor of float32, found {found}; it is float32 that is asked about")
    event_dim = check_integer("event_dim", event_dim, 1, x.dim())
    if image is not None:
        check_instance("image", image, Tensor, "a torch.Tensor or None")
    x = x.detach().contiguous()
    image = function(x) if image is None else image.detach()
    first, second = neighbours(x, event_dim)

    def length(a: Tensor) -> Tensor:
        return a.flatten(a.dim() - event_dim).norm(dim=-1)

    change = torch.hypot(length(function(first) - image), length(function(second) - image))
    size = image.shape[image.dim() - event_dim :].numel()
    return math.sqrt(2) * change / torch.maximum(length(image), 0.01 * length(x).clamp(max=math.sqrt(size)))
