"""A study or a run told to a program: an object a line, as it happens.

Knows records and what a program wants to be told of them; knows nothing of terminals. Numbers are as recorded; one that
is not finite is named, since JSON has no such numbers.

    {"event": "block", "run": ..., "step": ..., "steps": ..., "signals": {...}}
    {"event": "ended", "run": ..., "verdict": ..., "onset": ..., "stability": ..., "steps": ..., "sentence": ...}
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TextIO

from equipoise.monitor import Verdict
from equipoise.record import Record, Row


def plain(value: Any) -> Any:
    """Data as JSON can hold it: numbers that are not finite by their names."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class JsonTracker:
    """A `Tracker` that writes lines."""

    def __init__(self, file: TextIO) -> None:
        """Args: where lines go; each is flushed."""
        self._file = file

    def say(self, event: str, **told: Any) -> None:
        """Write one line."""
        print(json.dumps({"event": event, **plain(told)}, allow_nan=False), file=self._file, flush=True)

    def rows(self, record: Record, rows: Sequence[Row]) -> None:
        """A line a block."""
        steps = record.config.steps
        for row in rows:
            signals = {name: value for name, value in row.items() if name != "step"}
            self.say("block", run=record.name, step=int(row["step"]), steps=steps, signals=signals)

    def ended(self, record: Record, verdict: Verdict) -> None:
        """A line a run."""
        self.say(
            "ended",
            run=record.name,
            verdict=verdict.kind,
            onset=verdict.onset,
            stability=verdict.stability,
            steps=verdict.step,
            sentence=verdict.sentence(),
        )

    def close(self) -> None:
        """Nothing more."""
