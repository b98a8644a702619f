"""What runs cost, and what stopping early saved.

Knows records, sessions and how their time is counted; knows nothing of Ray or Optuna, nor of how costs are laid out.

Time is counted in device-seconds: seconds of a device that a worker has to itself, a GPU, a share of one, or a CPU's
cores. Training is the wall time of steps, times the workers that did them; all else that a session's devices were held
for is overhead.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from equipoise.record import Record
from equipoise.sessions import SessionInfo
from equipoise.verdict import Verdict

UNFINISHED = "unfinished"
"""Kind of a run without a verdict: at work, cut off, or given up."""
_SECONDS = re.compile(rb'"time/block": ([^,}]+)')
_POINT = re.compile(r"(\d+)-")


class Unit(NamedTuple):
    """In what device-seconds are told."""

    name: str
    """Such as `GPU-hours` or `CPU worker minutes`."""
    seconds: float
    """Device-seconds that are one of it."""

    @property
    def short(self) -> str:
        """`hours`, `minutes` or `seconds`."""
        return re.split("[ -]", self.name)[-1]

    def of(self, seconds: float) -> float:
        """Device-seconds in this unit."""
        return seconds / self.seconds

    def said(self, seconds: float) -> str:
        """Device-seconds in this unit, in figures alone."""
        value = self.of(seconds)
        return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """What some runs cost so far; one that is at work counts with what it has recorded."""

    verdicts: Mapping[str, int]
    """Runs by verdict; `unfinished` for those without one."""
    points: int = 0
    """Points of the search that have a run. Seeds of a point are runs of one point; a confirmation is of none."""
    steps: int = 0
    """Steps done, also those that returns from a divergence took back."""
    steps_saved_alarm: int = 0
    """Steps spared by ending runs that failed at the alarm."""
    steps_saved_pruner: int = 0
    """Steps spared by stopping runs whose Dice fell behind."""
    seconds: float = 0.0
    """Device-seconds of training: wall time of the `steps`, times workers. Evaluations are none of it."""
    seconds_saved_alarm: float = 0.0
    """Device-seconds spared at the alarm, at each run's own pace."""
    seconds_saved_pruner: float = 0.0
    """Device-seconds spared by the pruner, at each run's own pace."""
    restarts: int = 0
    """Times that runs were taken up again, after a failure or in a later session."""
    steps_lost: int = 0
    """Steps that were done again because no checkpoint held them; not among `steps`."""
    seconds_lost: float = 0.0
    """Device-seconds that these had taken; not among `seconds`."""
    seconds_had: float | None = None
    """Device-seconds that sessions held: their slots x workers of a run x seconds; None where no session is known."""
    gpus: float | None = None
    """GPUs of a device, of sessions that differ their mean, weighed by `seconds_had`; None as above."""

    @property
    def runs(self) -> int:
        """All of them, confirmations too."""
        return sum(self.verdicts.values())

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

    @property
    def overhead(self) -> float | None:
        """Share of the sessions' device-seconds in which no step was done that counts: 1 - seconds / had, in [0, 1].

        That is all that devices were held for beside `steps`: starts of Ray, of workers and of runs, loading,
        evaluations, panels, checkpoints, the search's thinking, slots without a run, as at a study's end, and work that
        was lost. A confirmation counts on both sides; where it takes more devices than the session's slots have, the
        share looks smaller than it is. None without sessions, or of ones that have only begun.
        """
        if not self.seconds_had:
            return None
        return min(1.0, max(0.0, 1 - self.seconds / self.seconds_had))

    @property
    def hours(self) -> Unit:
        """GPU-hours where devices hold GPUs, else hours of CPU workers, or of devices of which nothing is known."""
        if self.gpus:
            return Unit("GPU-hours", 3600 / self.gpus)
        return Unit("device-hours" if self.gpus is None else "CPU worker hours", 3600.0)

    @property
    def unit(self) -> Unit:
        """`hours`, or minutes or seconds where hours of training would be a small fraction."""
        name, seconds = self.hours
        spent = self.hours.of(max(self.seconds, self.seconds_had or 0.0))
        finer, parts = ("hours", 1) if spent >= 2 else ("minutes", 60) if spent >= 1 / 6 else ("seconds", 3600)
        return Unit(name.replace("hours", finer), seconds / parts)

    @classmethod
    def of(cls, records: Iterable[Record], sessions: Iterable[SessionInfo] = ()) -> Account:
        """Add up some runs, and the sessions in which they ran, if known.

        A folder without settings yet is passed over: its run has not begun.

        Raises:
            InputError: a run's settings cannot be read.
        """
        return accounts(records, sessions).all


class Accounts(NamedTuple):
    """The account of some runs, and its parts."""

    all: Account
    by_verdict: Mapping[str, Account]
    """Of every verdict that there is, in no particular order; what sessions had is known of all together only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one run cost so far; fields as of `Account`. Of a run that has ended it does not change any more."""

    kind: str
    point: str | None
    """The number of its point; None of a confirmation."""
    steps: int
    steps_saved: int
    """By the pruner where `kind` is censored, else by the alarm."""
    steps_lost: int
    seconds: float
    seconds_saved: float
    seconds_lost: float
    restarts: int

    @classmethod
    def of(cls, record: Record) -> Cost | None:
        """Read it; None of a run that has not begun.

        Raises:
            InputError: its settings cannot be read.
        """
        if not (record.folder / "config.json").is_file():
            return None
        config, verdict = record.config, record.verdict  # the verdict before the rows, which then are complete
        done, spent = _trained(record, config.workers)
        taken_back = sum(r.verdict.step - r.step for r in record.returns)
        back_seconds = sum(r["time/block"] * r.get("time/workers", config.workers) for r in record.taken_back())
        spared = config.steps - done if verdict and done else 0
        attempts = record.attempts
        before = [attempt.workers for attempt in attempts[:1] + attempts[:-1]]  # what an attempt lost, the last one did
        number = None if record.confirms else _POINT.match(record.name)
        return cls(
            kind=_kind(verdict),
            point=number[1] if number else None,
            steps=done + taken_back,
            steps_saved=spared,
            steps_lost=sum(attempt.lost_steps for attempt in attempts),
            seconds=spent + back_seconds,
            seconds_saved=spared * spent / done if spared else 0.0,
            seconds_lost=sum(a.lost_seconds * workers for a, workers in zip(attempts, before, strict=True)),
            restarts=max(0, len(attempts) - 1),
        )


def _kind(verdict: Verdict | None) -> str:
    return verdict.kind if verdict else UNFINISHED


def _trained(record: Record, workers: int) -> tuple[int, float]:
    """The last step of a run, and device-seconds of all steps that its rows tell of.

    Of thousands of runs the rows are hundreds of megabytes: only what is asked for is taken out of them.
    """
    path = record.folder / "signals.jsonl"
    data = path.read_bytes() if path.is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]  # a kill, or a write that goes on, leaves half a row
    if not whole:
        return 0, 0.0
    if b'"time/workers"' in whole:
        rows = record.rows()
        return int(rows[-1]["step"]), sum(r["time/block"] * r.get("time/workers", workers) for r in rows)
    last = json.loads(whole[whole.rfind(b"\n", 0, -1) + 1 :])
    return int(last["step"]), workers * sum(map(float, _SECONDS.findall(whole)))


def accounts(records: Iterable[Record], sessions: Iterable[SessionInfo] = ()) -> Accounts:
    """Add up some runs as `Account.of`, in all and by verdict; every run is read once."""
    return summed((cost for record in records if (cost := Cost.of(record)) is not None), sessions)


def summed(costs: Iterable[Cost], sessions: Iterable[SessionInfo] = ()) -> Accounts:
    """Add up what runs cost, in all and by verdict."""
    each, (had, gpus) = list(costs), _held(list(sessions))
    groups: dict[str, list[Cost]] = {}
    for cost in each:
        groups.setdefault(cost.kind, []).append(cost)
    return Accounts(_account(each, had, gpus), {kind: _account(group, None, gpus) for kind, group in groups.items()})


def _account(costs: Sequence[Cost], had: float | None, gpus: float | None) -> Account:
    pruned = [cost for cost in costs if cost.kind == "censored"]
    others = [cost for cost in costs if cost.kind != "censored"]
    return Account(
        verdicts=dict(Counter(cost.kind for cost in costs)),
        points=len({cost.point for cost in costs} - {None}),
        steps=sum(cost.steps for cost in costs),
        steps_saved_alarm=sum(cost.steps_saved for cost in others),
        steps_saved_pruner=sum(cost.steps_saved for cost in pruned),
        seconds=math.fsum(cost.seconds for cost in costs),
        seconds_saved_alarm=math.fsum(cost.seconds_saved for cost in others),
        seconds_saved_pruner=math.fsum(cost.seconds_saved for cost in pruned),
        restarts=sum(cost.restarts for cost in costs),
        steps_lost=sum(cost.steps_lost for cost in costs),
        seconds_lost=math.fsum(cost.seconds_lost for cost in costs),
        seconds_had=had,
        gpus=gpus,
    )


def _held(sessions: Sequence[SessionInfo]) -> tuple[float | None, float | None]:
    """Device-seconds that sessions had, and GPUs of a device."""
    if not sessions:
        return None, None
    each = [session.slots * session.workers * session.seconds for session in sessions]
    had = sum(each)
    if not had:
        return had, sessions[-1].gpus
    return had, sum(session.gpus * seconds for session, seconds in zip(sessions, each, strict=True)) / had
