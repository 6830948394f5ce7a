# SPDX-License-Identifier: Apache-2.0
"""The Metropolis correction of independent draws."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_equiflow.infer.evidence import checked_log_weights

__all__ = ["MetropolisChain", "metropolis"]


class MetropolisChain(NamedTuple):
    """A Markov chain over draws, by their indices.

    Example::

        >>> import torch
        >>> from pyro_equiflow.infer import metropolis
        >>> metropolis(torch.zeros(5)).acceptance_rate
        1.0

    :ivar indices: which draw is the chain's state at each time, shape ``(n,)``; starts with draw 0.
    :ivar acceptance_rate: share of the draws after the first that were accepted.
    """

    indices: Tensor
    acceptance_rate: float


@torch.no_grad()
def metropolis(log_weights: Tensor) -> MetropolisChain:
    r"""Independence Metropolis: independent draws become a chain whose law tends to the target.

    Draw :math:`j` is accepted in state :math:`i` with probability :math:`\min(1, w_j / w_i)`, else the state stays.
    Consecutive states are correlated; :func:`pyro.ops.stats.effective_sample_size` of an observable along the chain
    tells how much. The uniform numbers come from torch's generator.

    Example::

        >>> import torch
        >>> from pyro_equiflow.infer import metropolis
        >>> metropolis(torch.tensor([0.0, 0.0, -1000.0, 0.0]))  # proposals of equal weight are accepted
        MetropolisChain(indices=tensor([0, 1, 1, 3]), acceptance_rate=0.666...)

    :param log_weights: of independent draws, shape ``(n,)``, as of :func:`weighted_draws` or
        :func:`importance_weights`; two at least.
    :raises ValueError: fewer than two weights, or some that are NaN or infinite.

    References: Tierney, *Markov chains for exploring posterior distributions* (1994), section 2.3.3; Albergo, Kanwar
    and Shanahan, *Flow-based generative models for Markov chain Monte Carlo in lattice field theory* (arXiv
    1904.12072).
    """
    log_weights = checked_log_weights(log_weights)
    count, device = len(log_weights), log_weights.device
    # In state i draw j is accepted where log w_j - log u_j > log w_i.
    levels = log_weights.tolist()
    reached = (log_weights - (1 - torch.rand(count, dtype=torch.float64, device=device)).log()).tolist()
    indices, state = [0], 0
    for draw in range(1, count):
        if reached[draw] > levels[state]:
            state = draw
        indices.append(state)
    accepted = sum(index == draw for draw, index in enumerate(indices)) - 1
    return MetropolisChain(torch.tensor(indices, device=device), accepted / (count - 1))
