"""What runs cost, and what stopping early saved.

Knows records and how their time is counted; knows nothing of Ray or Optuna, of money, or of how costs are told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from equipoise.record import Record


@dataclass(frozen=True, slots=True)
class Account:
    """What runs cost and what stopping early saved."""

    verdicts: Mapping[str, int]
    """Runs by verdict; `running` for those without one."""
    steps: int
    """Steps done, also those that returns from a divergence took back."""
    steps_saved_alarm: int
    """Steps spared by ending runs that failed at the alarm."""
    steps_saved_pruner: int
    """Steps spared by stopping runs whose Dice fell behind."""
    seconds: float
    """Device-seconds of training: wall time of steps times workers."""
    seconds_saved_alarm: float
    """Device-seconds spared at the alarm, at each run's own pace."""
    seconds_saved_pruner: float
    """Device-seconds spared by the pruner, at each run's own pace."""

    @property
    def steps_saved(self) -> int:
        """Steps that ended runs were spared."""
        return self.steps_saved_alarm + self.steps_saved_pruner

    @property
    def seconds_saved(self) -> float:
        """Device-seconds that ended runs were spared."""
        return self.seconds_saved_alarm + self.seconds_saved_pruner

    @property
    def share_saved_alarm(self) -> float:
        """Share of all steps, done or spared, that the alarm spared; in [0, 1], 0 of no steps."""
        return self.steps_saved_alarm / max(1, self.steps + self.steps_saved)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Account:
        """Add up some runs."""
        verdicts: Counter[str] = Counter()
        steps, seconds = 0, 0.0
        saved = {"alarm": (0, 0.0), "pruner": (0, 0.0)}
        for record in records:
            rows, verdict, workers = record.rows(), record.verdict, record.config.workers
            done = int(rows[-1]["step"]) if rows else 0
            spent = sum(row["time/block"] for row in rows) * workers
            verdicts[verdict.kind if verdict else "running"] += 1
            taken_back = sum(r.verdict.step - r.step for r in record.returns)
            steps, seconds = steps + done + taken_back, seconds + spent
            seconds += sum(row["time/block"] for row in record.taken_back()) * workers
            if verdict and done:
                spared, by = record.config.steps - done, "pruner" if verdict.kind == "censored" else "alarm"
                saved[by] = (saved[by][0] + spared, saved[by][1] + spared * spent / done)
        (alarm, alarm_seconds), (pruner, pruner_seconds) = saved["alarm"], saved["pruner"]
        return cls(dict(verdicts), steps, alarm, pruner, seconds, alarm_seconds, pruner_seconds)
