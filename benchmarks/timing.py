# SPDX-License-Identifier: Apache-2.0
"""Fair timing of one callable against another in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def seconds(step: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """The seconds of one call, wall-clock or by another clock."""
    start = clock()
    step()
    return clock() - start


def ratio(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
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
