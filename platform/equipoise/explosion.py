"""When a loss leaves its plateau for good.

Knows one loss, block by block, and nothing of runs or of other signals. With L the mean of a block, all in log L:

    short, long   medians of the last 500 and 1000 steps, `long` of those after the warm-up, in which losses may rise
    plateau       the lowest `long` of the last 4000 steps (see `Horizon.memory`); not of all time, since a loss that
                  doubles over a third of a run has not blown up
    noise         how much `short` moves in 1000 steps: 1.4826 / sqrt 2 times the median distance of short(t) -
                  short(t - 1000) from its own median over the last 4000 steps. It grows with noise that drifts, where
                  the spread of single blocks does not, and not with a steady trend. While few of them are known it is
                  taken as larger; it is never less than what blocks as noisy as these would do were they independent
    limit         plateau + log growth + 3 noise, but no higher than the best `long` of all + 3 log growth + 3 noise:
                  what rises too slowly for the first ends at the second

A loss explodes when `short` stays above the limit for the hold of 500 steps, without a gap; what `short` moves
meanwhile is no noise. Its onset is the last block of the plateau, whose level is the median of the blocks from its
lowest `long` on. With m the larger of log 1.1 + sigma / 2, sigma the spread of single blocks, and an eighth of the
rise, it is where the sum of (log L - level - m) is lowest, each term cut at +-2 m, so that neither a spike before it
nor a dip after it moves it. All is measured on logarithms: in other units a loss is judged alike.

Losses may not be negative. A margin that may, E D(real) - E D(fake), is judged as 1 + max(0, margin) / scale, where
scale is the median of |margin| in the warm-up: stretching a critic's output changes nothing. `studies/alarms.py`
measures how often the rule cries wolf and how late it is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from equipoise.horizon import Horizon
from equipoise.windows import Window, middle

_TINY, _HUGE = 1e-12, 1e300
"""What a block's mean is taken for at least and at most, so that it has a logarithm."""
_NORMAL = 1.4826
"""Standard deviation of a normal variable over its median absolute deviation."""
_NOISES = 3.0
_FAR = 3.0
"""Times growth, in logarithms, above the best of all time."""
_WINDOWS = ("short", "long", "spread", "moves")
_QUEUES = ("logs", "shorts", "longs")
_NUMBERS = ("scale", "seen", "held", "best", "limit", "plateau", "start")


class Blast(NamedTuple):
    """An explosion that is certain, in the units of the signal."""

    onset: int
    """Blocks ago that the plateau's last block ended; 0 is the present one."""
    before: float
    """The plateau."""
    value: float
    limit: float
    rise: float
    """Of log L above the plateau."""


class Explosion:
    """One watched loss."""

    def __init__(self, horizon: Horizon, growth: float, *, signed: bool = False) -> None:
        """Start with nothing seen.

        Args:
            horizon: the lengths of the rule.
            growth: factor above the plateau that counts.
            signed: whether this is a margin, which may be negative.
        """
        self._growth = math.log(growth)
        self._warm_up, self._size, self._reach = horizon.warm_up, horizon.short, horizon.long
        self._signed, self._scale = signed, None if signed else 1.0
        self._waiting: list[float] = []
        self._seen = self._held = 0
        self._best = self._limit = math.inf
        self._plateau = math.nan
        self._start = 0
        self._short, self._long = Window(horizon.short), Window(horizon.long)
        self._spread, self._moves = Window(horizon.memory), Window(horizon.memory)
        self._logs: deque[float] = deque(maxlen=horizon.memory + horizon.long + 2 * horizon.hold)
        self._shorts: deque[float] = deque(maxlen=horizon.long + 1)
        self._longs: deque[float] = deque(maxlen=horizon.memory)

    def add(self, value: float) -> None:
        """Take a block's mean in and judge it."""
        if self._scale is None:
            self._waiting.append(value)
            if len(self._waiting) < self._warm_up:
                return
            self._scale = max(middle(sorted(map(abs, self._waiting))), _TINY)
            waiting, self._waiting = self._waiting, []
            for early in waiting:
                self._add(early)
        else:
            self._add(value)

    @property
    def held(self) -> int:
        """Blocks for which it has been above its limit."""
        return self._held

    @property
    def limit(self) -> float:
        """Of the present block, in the signal's units; infinite before anything is judged."""
        return self._shown(self._limit)

    @property
    def excess(self) -> float:
        """By how much log L is above its limit; 0 below."""
        return max(0.0, self._shorts[-1] - self._limit) if self._shorts else 0.0

    def blast(self) -> Blast:
        """What there is to say of an explosion; only while it is above its limit."""
        now = self._shorts[-1]
        before, value, limit = map(self._shown, (self._plateau, now, self._limit))
        return Blast(self._onset(), before, value, limit, now - self._plateau)

    def _add(self, value: float) -> None:
        self._seen += 1
        if self._signed:
            assert self._scale is not None
            value = 1 + max(0.0, value) / self._scale
        log = math.log(min(max(value, _TINY), _HUGE))
        self._logs.append(log)
        self._short.add(log)
        self._shorts.append(self._short.median)
        self._judge()
        self._spread.add(abs(log - self._shorts[-1]))
        if not self._held and self._seen > self._reach + self._size:
            self._moves.add(self._shorts[-1] - self._shorts[0])
        if self._seen > self._warm_up:
            self._long.add(log)
        if len(self._long) >= self._size:
            self._longs.append(self._long.median)
            self._best = min(self._best, self._longs[-1])

    def _judge(self) -> None:
        """Compare the present block with what was before it."""
        if not self._longs:
            return
        limit = min(min(self._longs) + self._growth, self._best + _FAR * self._growth)
        self._limit = limit + _NOISES * self._noise()
        if self._shorts[-1] <= self._limit:
            self._held = 0
            return
        if not self._held:
            self._leave()
        self._held += 1

    def _noise(self) -> float:
        """Standard deviation of `short` over a long window."""
        alone = 1.2 * _NORMAL * self._spread.median * 1.25 / math.sqrt(self._size)
        if not len(self._moves):
            return alone
        moved = _NORMAL / math.sqrt(2) * self._moves.deviation
        return max(alone, moved * (1 + 0.5 * self._reach / (len(self._moves) + 1)))

    def _leave(self) -> None:
        """Remember the plateau as the limit is passed, and the block from which on to look for its end."""
        lowest = min(self._longs)
        since = next(i for i, level in enumerate(reversed(self._longs)) if level == lowest)
        self._start = max(self._warm_up, self._seen - 1 - since - self._reach)
        known = list(self._logs)[self._start - self._seen :]
        self._plateau = middle(sorted(known))

    def _onset(self) -> int:
        rise = self._shorts[-1] - self._plateau
        margin = max(math.log(1.1) + _NORMAL / 2 * self._spread.median, rise / 8)
        logs = np.array(list(self._logs)[self._start - self._seen :])
        sums = np.cumsum(np.clip(logs - self._plateau - margin, -2 * margin, 2 * margin))
        return int(np.argmin(sums[::-1]))

    def _shown(self, log: float) -> float:
        """In the signal's units."""
        if self._scale is None:
            return math.inf
        value = math.exp(log) if log < 700 else math.inf
        return self._scale * (value - 1) if self._signed else value

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which `load_state_dict` continues exactly."""
        windows = {name: list(getattr(self, f"_{name}").values) for name in _WINDOWS}
        queues = {name: list(getattr(self, f"_{name}")) for name in _QUEUES}
        numbers = {name: getattr(self, f"_{name}") for name in _NUMBERS}
        return windows | queues | numbers | {"waiting": list(self._waiting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        for name in _WINDOWS:
            size = getattr(self, f"_{name}").values.maxlen
            setattr(self, f"_{name}", Window(size, state[name]))
        for name in _QUEUES:
            setattr(self, f"_{name}", deque(state[name], maxlen=getattr(self, f"_{name}").maxlen))
        for name in _NUMBERS:
            setattr(self, f"_{name}", state[name])
        self._waiting = list(state["waiting"])
