"""What a study is doing: who works on it, which points are done, how its runs go on.

Knows the study's folder and reads it, while others write it; knows nothing of Ray or Optuna, nor of how a person is
told. A run that has ended is read once, and then only by the last of its rows.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from equipoise.figures import LOOKS, Run
from equipoise.progress import Pace
from equipoise.record import Record, Row
from equipoise.report import best_point, by_point, ended, judgement
from equipoise.sessions import SessionInfo, sessions
from equipoise.study import Study, StudyFolder

_TAIL = 1 << 16
"""Bytes at a file's end that hold its last row, as a rule."""


@dataclass(frozen=True, slots=True, eq=False)
class Going:
    """A run without a verdict."""

    run: Run
    """With all its rows."""
    session: str
    """Id of the session that took it up last; empty where none is known."""
    restarts: int
    """Times that it was taken up again."""
    steps_per_second: float | None
    """Of training, by its last blocks; None before two."""
    seconds_left: float | None
    """Training to its last step at that speed; evaluations come on top. None as above."""


class Best(NamedTuple):
    """A point and its judgement."""

    run: Run
    """Of the point's first seed; of its rows the last alone."""
    dice: float
    """Mean over seeds; NaN where it could not be measured."""
    stability: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """A study at one moment."""

    study: Study
    sessions: Sequence[SessionInfo]
    """All that there were, the oldest first."""
    at_work: Sequence[SessionInfo]
    """Those of them that are alive."""
    begun: int
    """Points that have a run."""
    done: int
    """Points of which every run has ended that will be."""
    verdicts: Mapping[str, int]
    """Runs by verdict, in the order in which these are told, confirmations too; `unfinished` for those without."""
    going: Sequence[Going]
    """Runs without a verdict: at work if their session is, else cut off; or given up, which Optuna alone knows."""
    best: Best | None
    """The point that would be confirmed if the study ended now."""

    @property
    def planned(self) -> int:
        """Points to judge."""
        return max(self.study.points, self.begun)


class Reader:
    """Reads a study's status, again and again; what has ended is not read twice."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder
        self._ended: dict[str, Run] = {}

    def read(self) -> Status:
        """The status now.

        Raises:
            InputError: the study or a run's settings cannot be read.
        """
        study, all_sessions = self._folder.study, sessions(self._folder.folder)
        at_work = [session for session in all_sessions if session.alive]
        going = [one for record in self._folder.records() if (one := self._read(record)) is not None]
        runs = [*self._ended.values(), *(one.run for one in going)]
        points, counts = by_point(runs), Counter(run.kind for run in runs)
        return Status(
            study=study,
            sessions=all_sessions,
            at_work=at_work,
            begun=len(points),
            done=sum(ended(point, study) for point in points),
            verdicts={kind: counts[kind] for kind in LOOKS if counts[kind]},
            going=going,
            best=_best(points, study),
        )

    def _read(self, record: Record) -> Going | None:
        """A run that has not ended; what is told of one that has is kept."""
        if record.name in self._ended:
            return None
        verdict = record.verdict
        if verdict is None:
            return _going(record)
        self._ended[record.name] = Run(record.name, record.config, verdict, _last(record), None)
        return None


def _best(points: Sequence[Sequence[Run]], study: Study) -> Best | None:
    run = best_point(itertools.chain.from_iterable(points), study)
    told = judgement(next(point for point in points if run in point), study) if run is not None else None
    if run is None or told is None:
        return None
    verdict, dice = told
    return Best(run, dice, verdict.stability or 0.0)


def _going(record: Record) -> Going:
    rows = record.rows()
    trained = 0.0
    pace = Pace(clock=lambda: trained)  # of a record only the time of training is known
    for row in rows:
        trained += row["time/block"]
        pace.block(int(row["step"]), row["time/block"])
    config, attempts = record.config, record.attempts
    left = pace.left(config.steps)
    return Going(
        run=Run(record.name, config, None, rows, None),
        session=attempts[-1].session if attempts else "",
        restarts=max(0, len(attempts) - 1),
        steps_per_second=pace.steps_per_second,
        seconds_left=None if left is None else left.total_seconds(),
    )


def _last(record: Record) -> list[Row]:
    """The last row of a run that has ended, if it has any."""
    path = record.folder / "signals.jsonl"
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().split(b"\n")
    if len(lines) < 3:  # the one before the last line end may not be whole
        return record.rows()[-1:]
    return [{name: float(value) for name, value in json.loads(lines[-2]).items()}]
