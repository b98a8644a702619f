"""When a critic tells all real from all fake patches for long.

Knows one critic's evidence, block by block; must not know of runs or of losses that explode.

The evidence is its patch AUC, P(D(real patch) > D(fake patch)), which means the same in every game. Where a record has
none, as other people's have not, it is the least-squares loss, with targets 0 and 1 and the factor 1/2: .25 of an
undecided critic, .23 of the 2022 study's D_t as long as it was healthy, under .004 after. It counts as a win from
`LOSS` down: normal logits with that spread round their targets have an AUC above .999.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from equipoise.horizon import Horizon

LOSS = 0.05
"""Least-squares loss at which a critic wins, where no AUC is known."""


class Win(NamedTuple):
    """A win that has held."""

    since: int
    """Blocks ago that the last one ended in which the critic had not won."""
    value: float
    """Mean of the evidence over the short window."""


class Critic:
    """One critic's evidence."""

    def __init__(self, horizon: Horizon, limit: float, *, falling: bool = False) -> None:
        """Start with nothing seen.

        Args:
            horizon: the lengths of the rule.
            limit: of the evidence.
            falling: whether low evidence wins, as of a loss.
        """
        self._hold, self._limit, self._sign = horizon.hold, limit, -1 if falling else 1
        self._values: deque[float] = deque(maxlen=horizon.short)
        self._streak = self._since = 0

    def add(self, value: float, warm: bool) -> Win | None:
        """Take a block's mean in; the win, once the mean over the short window has stayed at the limit for the hold."""
        self._values.append(value)
        mean = sum(self._values) / len(self._values)
        if not warm or self._sign * mean < self._sign * self._limit:
            self._streak = 0
            return None
        if not self._streak:  # the mean lags behind: the win began after the last block that was none
            since = (i for i, v in enumerate(reversed(self._values)) if self._sign * v < self._sign * self._limit)
            self._since = next(since, len(self._values))
        else:
            self._since += 1
        self._streak += 1
        return Win(self._since, mean) if self._streak >= self._hold else None

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which `load_state_dict` continues exactly."""
        return {"values": list(self._values), "streak": self._streak, "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._values.clear()
        self._values.extend(state["values"])
        self._streak, self._since = state["streak"], state["since"]
