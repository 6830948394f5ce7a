# SPDX-License-Identifier: Apache-2.0
"""Fair timing of one callable against another in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def seconds(step: Callable[[], object]) -> float:
    """The wall-clock seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median over rounds of the ratio of neighbouring calls.

    Calls take turns, so a drift of the machine's speed cancels in the ratio.
    """
    for step in (ours, theirs):
        for _ in range(3):
            step()
    pairs = []
    for index in range(rounds):
        first, second = (ours, theirs) if index % 2 == 0 else (theirs, ours)
        a, b = seconds(first), seconds(second)
        pairs.append((a, b) if index % 2 == 0 else (b, a))
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )
