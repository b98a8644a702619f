"""How benchmarks measure: two pieces of work in turns, the median of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

REPEATS = 5


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    ratio: float
    unit: str
    against: str
    detail: str


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def paired(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """Median wall times of two pieces of work, taken in turns."""
    times = [(seconds(ours), seconds(theirs)) for _ in range(REPEATS)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)
