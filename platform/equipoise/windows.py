"""The last values of a signal, and their median at hand.

Knows numbers alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable


class Window:
    """The last `size` values, in their order and sorted, so that a median costs no sorting."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self.values = deque(values, maxlen=size)
        self._sorted = sorted(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def add(self, value: float) -> None:
        """Take a value in; the oldest leaves a full window."""
        if len(self.values) == self.values.maxlen:
            del self._sorted[bisect_left(self._sorted, self.values[0])]
        self.values.append(value)
        insort(self._sorted, value)

    @property
    def median(self) -> float:
        """Of the values; there must be one."""
        return middle(self._sorted)

    @property
    def deviation(self) -> float:
        """Median distance of the values from their median."""
        centre = self.median
        return middle(sorted([abs(value - centre) for value in self._sorted]))  # falls, then rises: sorted in one pass


def middle(ordered: list[float]) -> float:
    """Median of sorted values."""
    half, odd = divmod(len(ordered), 2)
    return ordered[half] if odd else (ordered[half - 1] + ordered[half]) / 2
