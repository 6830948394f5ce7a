# SPDX-License-Identifier: Apache-2.0
"""What is not finite is refused, and what float32 does not determine is not returned in silence."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import torch
from pyro.distributions import TransformModule
from torch import Tensor

from pyro_equiflow.errors import PrecisionWarning
from pyro_equiflow.ops.fingerprint import optimizer_steps
from pyro_equiflow.ops.rounding import rounding_error
from pyro_equiflow.ops.warning import warn_caller

__all__ = ["TOLERANCE", "PrecisionWatch", "Solved", "check_finite"]

#: Relative error of an event beyond which closed transforms say so.
TOLERANCE = 1e-4

# A look costs two passes: one call in so many where nothing else asks for it.
_EVERY = 32

_NAMED = 5  # how many rows that are not finite an error names


def check_finite(x: Tensor, dimensions: int, owner: str) -> None:
    """Raises where Pyro's validation is on and values, which can be seen, are not finite."""
    if not pyro.settings.get("validate_distributions_torch"):
        return
    # The sum is finite only if every term is, and costs a tenth of looking at each.
    if torch.isfinite(x.detach().sum()):
        return
    finite = torch.isfinite(x)
    if not finite.all():
        bad = (~finite).flatten(x.dim() - dimensions).any(-1)
        rows = [tuple(row) if len(row) > 1 else row[0] for row in bad.nonzero().tolist() if row]
        where = f" (at {', '.join(map(str, rows[:_NAMED]))}{', ...' * (len(rows) > _NAMED)})" if rows else ""
        raise ValueError(
            f"{owner}: expected finite values, found NaN or infinity in {int(bad.sum())} of {bad.numel()} samples"
            f"{where}; an earlier step diverged (try a smaller learning rate) or the data are not clean"
        )


class Solved:
    """Mixed into transforms that solve for their inverses, and certify the error."""


class PrecisionWatch:
    """Looks at what a closed transform and its copies give, and warns where float32 does not determine it.

    A look costs two more passes without gradients. Looked at are the first call; a batch at least twice as large as
    those before, or that reaches half as far again; every thirty-second call; and without gradients the first one after
    a change of the parameters, and all calls while results are found wanting. With Pyro's validation off nothing is.

    :param name: what is looked at.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls, self._largest, self._farthest, self._wanting = 0, 0, 0.0, False
        self._made_of: tuple[int, ...] = ()

    def __call__(
        self, transform: TransformModule, function: Callable[[Tensor], Tensor], x: Tensor, image: Tensor
    ) -> None:
        """Warns where what a function gives is not determined to :data:`TOLERANCE`.

        :param transform: the :class:`~pyro_equiflow.transforms.base.EquivariantTransform` whose function it is.
        """
        if not pyro.settings.get("validate_distributions_torch") or x.dtype != torch.float32 or not image.numel():
            return
        if isinstance(transform, Solved):
            return  # which has a certified error of its own
        reach = float(x.detach().abs().amax())
        if not self._due(transform, image.numel(), reach):
            return
        self._calls, self._largest, self._farthest = 0, max(self._largest, image.numel()), max(self._farthest, reach)
        if any(isinstance(part, Solved) for part in transform.modules()):
            return
        error = rounding_error(function, x, transform.event_dim, image=image)
        wrong = ~(error <= TOLERANCE)  # and so is what is not a number
        self._wanting = bool(wrong.any())
        if self._wanting:
            worst = float(error.nan_to_num(nan=math.inf).max())
            warn_caller(
                f"{type(transform).__name__}: float32 does not determine the {self._name} to {TOLERANCE:g} for "
                f"{int(wrong.sum())} of {wrong.numel()} events: the last bits of the input move the worst one by about "
                f"{worst:.1g} of its length, the map is so steep there. Take transform and input to float64 with "
                ".double(), or keep the map gentler: a smaller log_scale_bound, fewer steps, weight decay",
                PrecisionWarning,
            )

    def _due(self, transform: torch.nn.Module, size: int, reach: float) -> bool:
        self._calls += 1
        if not torch.is_grad_enabled():
            made_of = (optimizer_steps(), *[0 if p.is_inference() else p._version for p in transform.parameters()])
            if made_of != self._made_of:
                self._made_of, self._largest, self._farthest = made_of, 0, 0.0
            elif self._wanting:
                return True
        return self._calls >= _EVERY or size >= 2 * self._largest or reach > 1.5 * self._farthest
