# SPDX-License-Identifier: Apache-2.0
"""Which log-det estimator, where nobody chose one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pyro_equiflow.logdet.base import Estimator, LogDet, check_call
from pyro_equiflow.logdet.exact import Exact
from pyro_equiflow.logdet.series import PowerSeries, RussianRoulette
from pyro_equiflow.ops.arguments import check_instance, check_integer

__all__ = ["ByMode", "default_estimator"]

# Forward and backward of a 128-128 sine network on one core, exact against roulette: 0.3 times its cost with 2
# entries, 1.5 with 16, 2.6 with 32, 4 with 64. Up to 16 the missing noise is worth the price.
EXACT_IN_TRAINING = 16
# Near a constant of 1 roulette needs many terms: at 0.99, with 100 always there, exact took a fifth of its time with 20
# entries and as long with 64. Beyond the last number the graph of the Jacobian takes too much memory.
_ENTRIES_PER_TERM, _MOST_EXACT_IN_TRAINING = 0.5, 128
# One reverse pass per entry without a graph; a Jacobian of 1024 takes 4 MB a sample in float32.
EXACT_IN_EVALUATION = 1024


@dataclass(frozen=True, kw_only=True)
class ByMode:
    """One estimator in training, another outside it.

    Example::

        >>> import torch
        >>> from pyro_equiflow.logdet import ByMode, Exact, RussianRoulette
        >>> estimator = ByMode(training=RussianRoulette(), evaluation=Exact())
        >>> found = estimator(lambda x: 0.5 * x, torch.zeros(3, 2), (), lipschitz=0.5, training=False)
        >>> found.value.exp()  # 1.5 ** 2
        tensor([2.2500, 2.2500, 2.2500])

    :param training: called with ``training=True``.
    :param evaluation: called with ``training=False``.
    """

    training: Estimator
    evaluation: Estimator

    def __post_init__(self) -> None:
        for name in ("training", "evaluation"):
            check_instance(name, getattr(self, name), Callable, "an estimator such as Exact()")

    def __call__(
        self, fn: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor], *, lipschitz: float, training: bool
    ) -> LogDet:
        """What the mode's estimator says. See :class:`Estimator`."""
        estimator = self.training if training else self.evaluation
        return estimator(fn, x, tensors, lipschitz=lipschitz, training=training)


@dataclass(frozen=True)
class _ByConstant:
    """Roulette, or exact where that takes less time, which the Lipschitz constant of the time decides."""

    roulette: RussianRoulette = RussianRoulette()
    exact: Exact = Exact()

    def __call__(
        self, fn: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor], *, lipschitz: float, training: bool
    ) -> LogDet:
        check_call(x, lipschitz)
        cheap = x.shape[1:].numel() <= _ENTRIES_PER_TERM * self.roulette.terms_for(lipschitz)[0]
        estimator: Estimator = self.exact if cheap else self.roulette
        return estimator(fn, x, tensors, lipschitz=lipschitz, training=training)


# Made once: what does not change can be shared.
_EXACT, _SERIES, _ROULETTE, _BY_CONSTANT = Exact(), PowerSeries(probes=16), RussianRoulette(), _ByConstant()


def default_estimator(event_size: int) -> Estimator:
    """The estimator for an event of ``event_size`` entries.

    In training exact where that costs little more than Russian roulette: up to 16 entries, and up to
    :math:`1 / 2 (1 - c)` where that is more and at most 128. Beyond, unbiased, :class:`RussianRoulette` with what
    follows from :math:`c`, of finite variance whatever the weights become. Outside training always deterministic: exact
    up to 1024 entries, whose error bound is one of rounding only; beyond, a power series with 16 fixed probes, whose
    bound is the range that the Lipschitz constant allows and whose ``stderr`` tells the likely error. For a tight bound
    there pass ``Exact()`` and pay its cost, one reverse pass per entry.

    Example::

        >>> from pyro_equiflow.logdet import default_estimator
        >>> default_estimator(2)
        Exact(rows=64)
        >>> type(default_estimator(100)).__name__
        'ByMode'

    :param event_size: number of entries of one event.
    :raises ValueError: ``event_size`` is not a positive integer.
    """
    event_size = check_integer("event_size", event_size, 1)
    if event_size <= EXACT_IN_TRAINING:
        return _EXACT
    fixed: Estimator = _EXACT if event_size <= EXACT_IN_EVALUATION else _SERIES
    training: Estimator = _BY_CONSTANT if event_size <= _MOST_EXACT_IN_TRAINING else _ROULETTE
    return ByMode(training=training, evaluation=fixed)
