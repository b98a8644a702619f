"""A run's folder: the complete record, whatever else watches.

Knows the files of a run and how they survive a kill; knows nothing of Ray, W&B or Optuna, which all read from here.

    config.json        the RunConfig
    intake.json        how a raw volume becomes what its networks take: preprocessing, limits, ranges of the cohort
    environment.json   versions, commit, device: no host names, users or paths
    changes.diff       what the working tree had beyond that commit
    signals.jsonl      one row a block of steps
    returns.json       from which divergences a run with `recovery` went back, where to, and its remedies
    return-1.jsonl     the rows that the first of them took back
    panels/            one picture an evaluation
    attempts.jsonl     one row each time a process took up the run: from where, and what had to be done again
    copies.json        how far the copies elsewhere are, if there are any
    checkpoints/       the newest states
    weights/           E and C1 of the newest evaluation, and of those that a protocol of `selection` would choose
    verdict.json       written last: a run with a verdict has ended
    ray/               what Ray Train writes of a run over several workers
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from equipoise import checkpoint, recovery
from equipoise.checkpoint import State
from equipoise.columns import Columns
from equipoise.columns import Row as Row
from equipoise.config import RunConfig
from equipoise.environment import environment
from equipoise.intake import Intake
from equipoise.monitor import Horizon, Verdict
from equipoise.recovery import Return
from equipoise.selection import PROTOCOLS, best_step
from equipoise.train import Progress, evaluations
from equipoise.weights import Kept, of
from equipoise.writing import append, told, write
from slicestore.errors import InputError

_loads: Callable[[bytes], Any] = json.loads
with suppress(ImportError):  # where there is little beside torch
    from orjson import loads as _loads  # a study's rows are hundreds of megabytes
CONFIRM = "confirm"
"""How the name of a run that repeats a study's best point begins."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One time that a process took up a run."""

    session: str
    """Id of the study's session that asked for it; empty outside studies."""
    step: int
    """It went on from there; 0 is the beginning."""
    lost_steps: int
    """Steps done before it that no checkpoint held, and that had to be done again."""
    lost_seconds: float
    """What these had taken, in seconds of training; wall time, whatever the number of workers."""
    workers: int
    """Data-parallel processes of this attempt."""


class Record:
    """The folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def confirms(self) -> bool:
        """Whether this run repeats a study's best point."""
        return self.name.startswith(CONFIRM)

    @property
    def config(self) -> RunConfig:
        """The run's settings.

        Raises:
            InputError: the folder holds no readable config.json.
        """
        path = self.folder / "config.json"
        try:
            return RunConfig.from_dict(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                path,
                found=f"no readable settings ({error})",
                rule="a run's folder holds its config.json",
                remedy="give the folder of a run that this version of Equipoise started",
            ) from error

    @property
    def intake(self) -> Intake:
        """How a raw volume becomes what the run's networks take.

        Raises:
            InputError: the folder does not say: it is of an earlier version, and was not continued since.
        """
        return Intake.read(self.folder / "intake.json")

    @property
    def weights(self) -> Kept:
        """E and C1 after some of the run's evaluations."""
        return Kept(self.folder)

    @property
    def verdict(self) -> Verdict | None:
        """How the run ended; None while it has not.

        Raises:
            InputError: what is there is no verdict.
        """
        path = self.folder / "verdict.json"
        if not path.is_file():
            return None
        try:
            return Verdict.from_dict(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                path,
                found=f"no readable verdict ({type(error).__name__})",
                rule="a verdict is written whole, when a run has ended",
                remedy="delete the file: the run's command, or its study with --resume, writes it anew",
            ) from error

    def rows(self, start: int = 0) -> list[Row]:
        """Signals from row number `start` on; a last line that a kill cut off is left out."""
        return _rows(self.folder / "signals.jsonl", start)

    def columns(self) -> Columns:
        """All signals, for reading many runs at once."""
        return Columns(_read_lines(self.folder / "signals.jsonl"))

    @property
    def attempts(self) -> list[Attempt]:
        """Each time that a process took up the run, the first one first."""
        return [Attempt(**row) for row in _read_lines(self.folder / "attempts.jsonl")]

    def taken_back(self) -> list[Row]:
        """The rows that returns took back, return by return."""
        return [row for n in range(len(self.returns)) for row in _rows(self.folder / f"return-{n + 1}.jsonl")]

    def picture(self, step: int) -> Path:
        """Where the panels drawn at `step` lie, if any were."""
        return self.folder / "panels" / f"step-{step:06d}.png"

    def pictures(self) -> list[Path]:
        """Panels in the order of their steps."""
        return sorted((self.folder / "panels").glob("step-*.png"))

    def open(self, config: RunConfig, device: torch.device) -> None:
        """Start the record, or find that it is this very run's.

        Raises:
            InputError: the folder belongs to a run with other settings, or cannot be written.
        """
        if self.is_of(config):
            return
        with told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        found, changes = environment(device)
        write(self.folder / "changes.diff", changes)
        write(self.folder / "environment.json", json.dumps(found, indent=2))
        write(self.folder / "config.json", json.dumps(config.to_dict(), indent=2))

    def note(self, intake: Intake) -> None:
        """Write how a raw volume becomes what the run's networks take, unless it is there."""
        path, said = self.folder / "intake.json", json.dumps(intake.to_dict(), indent=2)
        if not path.is_file() or path.read_text() != said:
            write(path, said)

    def keep(self, step: int, state: State) -> None:
        """Keep E and C1 of an evaluation whose row has been added; let go of others that no protocol would choose now.

        Raises:
            InputError: the disk refused.
        """
        rows = self.rows()
        held = {best for protocol in PROTOCOLS if (best := best_step(rows, protocol)) is not None}
        self.weights.keep(step, of(state.shared["net"], state.shared["average"]), held)

    def is_of(self, config: RunConfig) -> bool:
        """Whether there is a record of this run; nothing is written.

        Raises:
            InputError: it is of a run with other settings.
        """
        there = (self.folder / "config.json").is_file()
        if there:
            changed = {
                k: (v, self.config.flat().get(k)) for k, v in config.flat().items() if v != self.config.flat().get(k)
            }
            if changed:
                raise InputError(
                    self.folder,
                    found="a run with other settings: "
                    + ", ".join(f"{k} was {old}, is {new}" for k, (new, old) in changed.items()),
                    rule="a folder holds one run",
                    remedy="give another folder, or the settings it was started with",
                )
        return there

    def take_up(self, step: int, session: str, workers: int) -> None:
        """Go on from `step`: drop what was recorded after it, and note that."""
        lost = self.rewind(step)
        steps = int(lost[-1]["step"]) - step if lost else 0
        attempt = Attempt(session, step, steps, sum((row["time/block"] for row in lost), 0.0), workers)
        append(self.folder / "attempts.jsonl", json.dumps(dataclasses.asdict(attempt)) + "\n")

    def rewind(self, step: int) -> list[Row]:
        """Drop, and give back, what was recorded after `step`: the run continues from there and will say it again.

        Weights that were kept after it are let go of, too.
        """
        self.weights.drop_after(step)
        path = self.folder / "signals.jsonl"
        with told(path):
            rows = self.rows()
            kept = [row for row in rows if row["step"] <= step]
            whole = not path.is_file() or path.read_bytes().endswith(b"\n")  # a kill may have torn the last line
        if len(kept) < len(rows) or not whole:
            write(path, "".join(map(_line, kept)))
        return rows[len(kept) :]

    def add(self, progress: Progress, workers: int | None = None) -> None:
        """Append one block; flushed, so that a kill costs nothing that was written.

        Args:
            progress: the block.
            workers: that trained it, where the run is elastic and these are not the number that it asks for.

        Raises:
            InputError: the disk refused; rows before are as they were.
        """
        if progress.panels is not None:
            with told(self.picture(progress.step)):
                progress.panels.save(self.picture(progress.step))
        row = {
            "step": progress.step,
            **progress.signals,
            "divergence/stability": progress.stability,
            "time/block": progress.seconds,
            **({"time/workers": workers} if workers is not None else {}),
        }
        append(self.folder / "signals.jsonl", _line(row))

    @property
    def returns(self) -> list[Return]:
        """From what the run went back so far, the first one first."""
        path = self.folder / "returns.json"
        found = json.loads(path.read_text()) if path.is_file() else []
        return [Return(Verdict.from_dict(r["verdict"]), r["step"], r["remedy"]) for r in found]

    def go_back(self, verdict: Verdict, config: RunConfig) -> None:
        """Let go of what came after the last checkpoint before a divergence, but for its rows, and remember why.

        A kill in between costs nothing: without the memory the run goes on from the older checkpoint, diverges in the
        same way and comes here again.
        """
        returns, checkpoints = self.returns, self.folder / "checkpoints"
        number = len(returns) + 1
        with told(checkpoints):
            there = {checkpoint.step_of(found) for found in checkpoint.complete(checkpoints)}
            checkpoint.drop_after(checkpoints, recovery.goal(verdict.onset or 0, there & evaluations(config)))
        found = checkpoint.latest(checkpoints)
        step = checkpoint.step_of(found) if found else 0
        taken = [row for row in self.rows() if row["step"] > step]
        write(self.folder / f"return-{number}.jsonl", "".join(map(_line, taken)))
        returns.append(Return(verdict, step, recovery.words(config, number)))
        data = [{"verdict": r.verdict.to_dict(), "step": r.step, "remedy": r.remedy} for r in returns]
        write(self.folder / "returns.json", json.dumps(data, indent=2))
        self.rewind(step)

    def close(self, verdict: Verdict) -> None:
        """Write the verdict: the run has ended."""
        horizon = Horizon.of(
            self.config.monitor, self.config.steps
        )  # short runs are judged by shorter rules: say which
        data = verdict.to_dict() | {"horizon": dataclasses.asdict(horizon)}
        write(self.folder / "verdict.json", json.dumps(data, indent=2))

    @contextmanager
    def locked(self, patience: float = 180.0) -> Iterator[None]:
        """Hold the folder against a second writer, such as a worker that outlives its killed driver for a moment.

        A machine that was cut off from the others writes on until Ray notices there, which takes it about a minute.

        Raises:
            InputError: another process still writes after `patience` seconds, or the folder cannot be written.
        """
        path = self.folder / ".lock"
        with told(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")  # noqa: SIM115 - closed below, with the lock
        with file:
            deadline, waits = time.monotonic() + patience, False
            while True:
                try:
                    with told(path):
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except InputError as error:
                    if not isinstance(error.__cause__, BlockingIOError):
                        raise
                    if time.monotonic() > deadline:
                        raise InputError(
                            self.folder,
                            found="another process that writes this run",
                            rule="a run has one writer",
                            remedy="wait for it or end it, then resume",
                        ) from None
                    if not waits:
                        waits = True
                        log.info("%s: another process still writes it; waiting", self.name)
                    time.sleep(0.2)
            yield


def _rows(path: Path, start: int = 0) -> list[Row]:
    return [{k: float(v) for k, v in row.items()} for row in _read_lines(path, start)]


def _read_lines(path: Path, start: int = 0) -> list[dict[str, Any]]:
    """Whole lines from number `start` on: the last one may have been torn by a kill."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [_parsed(path, line, number) for number, line in enumerate(lines[start:], start=start + 1)]


def _parsed(path: Path, line: bytes, number: int) -> dict[str, Any]:
    try:
        row: dict[str, Any] = _loads(line)
    except ValueError as error:
        raise InputError(
            path,
            found=f"line {number} that is no JSON ({error})",
            rule="a line is written whole; only the last may be cut off",
            remedy="cut the file before that line: the run goes on from its last checkpoint before it",
        ) from error
    return row


def _line(row: Row) -> str:
    """One line of strict JSON, which has no NaN: non-finite values are written by their names."""
    return json.dumps({k: v if math.isfinite(v) else str(v) for k, v in row.items()}) + "\n"
