# SPDX-License-Identifier: Apache-2.0
"""Fair timing of one callable against another in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def clock(device: str) -> Callable[[], float]:
    """Process time on the CPU, of all threads, which leaves other programs out; on CUDA wall-clock time.

    Kernels run on after the call that starts them: a clock of CUDA waits for them before it is read.
    """
    if torch.device(device).type != "cuda":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall


def seconds(step: Callable[[], object], clock: Callable[[], float]) -> float:
    """The seconds of one call."""
    start = clock()
    step()
    return clock() - start


def ratio(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    clock: Callable[[], float],
) -> tuple[float, float, float]:
    """Median seconds of both, and the median over rounds of the ratio of neighbouring calls.

    Calls take turns, so a drift of the machine's speed cancels in the ratio.
    """
    for step in (ours, theirs):
        for _ in range(3):
            step()
    pairs = []
    for index in range(rounds):
        first, second = (ours, theirs) if index % 2 == 0 else (theirs, ours)
        a, b = seconds(first, clock), seconds(second, clock)
        pairs.append((a, b) if index % 2 == 0 else (b, a))
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )
