# SPDX-License-Identifier: Apache-2.0
"""The training step that the timings share: maximum likelihood under a standard normal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def likelihood_step(
    module: torch.nn.Module, score: Callable[[], tuple[Tensor, Tensor]], lr: float = 1e-4
) -> Callable[[], None]:
    """A step of Adam on a module's parameters; ``score`` gives the latents and the log-dets of its data."""
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)

    def step() -> None:
        optimizer.zero_grad()
        z, ladj = score()
        loss = (0.5 * z.square().flatten(1).sum(1) - ladj).mean()
        loss.backward()
        optimizer.step()

    return step
