"""A run's folder: the complete record, whatever else watches.

Knows the files of a run and how they survive a kill; knows nothing of Ray, W&B or Optuna, which all read from here.

    config.json        the RunConfig
    environment.json   versions, commit, device: no host names, users or paths
    changes.diff       what the working tree had beyond that commit
    signals.jsonl      one row a block of steps
    returns.json       from which divergences a run with `recovery` went back, where to, and its remedies
    return-1.jsonl     the rows that the first of them took back
    panels/            one picture an evaluation
    attempts.jsonl     one row each time a process took up the run: from where, and what had to be done again
    copies.json        how far the copies elsewhere are, if there are any
    checkpoints/       the newest states
    verdict.json       written last: a run with a verdict has ended
    ray/               what Ray Train writes of a run over several workers
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from equipoise import checkpoint, recovery
from equipoise.batches import Cohort
from equipoise.config import RunConfig
from equipoise.copies import Copies, NoCopies
from equipoise.keeping import Keeping
from equipoise.monitor import Horizon, Verdict
from equipoise.ranks import Ranks
from equipoise.recovery import Return
from equipoise.train import Progress, evaluations, fit
from equipoise.writing import append, sync, told, write
from slicestore.errors import InputError

Row = dict[str, float]
CONFIRM = "confirm"
"""How the name of a run that repeats a study's best point begins."""
log = logging.getLogger(__name__)
_PACKAGES = ("equipoise", "torch", "numpy", "ray", "optuna", "wandb", "zarr")


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
    def verdict(self) -> Verdict | None:
        """How the run ended; None while it has not."""
        path = self.folder / "verdict.json"
        return Verdict.from_dict(json.loads(path.read_text())) if path.is_file() else None

    def rows(self, start: int = 0) -> list[Row]:
        """Signals from row number `start` on; a last line that a kill cut off is left out."""
        return _rows(self.folder / "signals.jsonl", start)

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
        environment, changes = _environment(device)
        write(self.folder / "changes.diff", changes)
        write(self.folder / "environment.json", json.dumps(environment, indent=2))
        write(self.folder / "config.json", json.dumps(config.to_dict(), indent=2))

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
        """Drop, and give back, what was recorded after `step`: the run continues from there and will say it again."""
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


def recorded(
    folder: Path,
    config: RunConfig,
    cohort: Cohort,
    *,
    ranks: Ranks | None = None,
    keeping: Keeping | None = None,
    elastic: bool = False,
) -> Iterator[Progress]:
    """`fit`, written down: every `Progress` is on disk before it is handed on. Continues where the folder left off.

    Nothing is yielded when the run has ended already; only the verdict, without signals, when it was killed between its
    last checkpoint and that. Rank 0 writes; every rank saves its part of a checkpoint.

    Args:
        folder: of the run.
        config: the run.
        cohort: its slices.
        ranks: the data-parallel group; alone by default.
        keeping: how states are kept.
        elastic: whether the group may be of another size than `config.workers`. The batch is then shared out over the
            ranks there are; what is a rank's own in a checkpoint of another number of ranks begins afresh.

    Raises:
        InputError: another process writes the run, its settings are others, its number of workers is another and it is
            not elastic, or the disk refuses. Nothing that was written is lost: a later call continues.
    """
    ranks, keeping = ranks or Ranks(), keeping or Keeping()
    if ranks.world != config.workers and not elastic:
        raise InputError(
            "workers",
            found=f"{ranks.world} where {folder.name} has {config.workers}",
            rule="a run trains with the number of workers it was started with, unless it is elastic",
            remedy="start as many, or set workers when the run is declared",
        )
    record = Record(folder)
    if ranks.rank == 0:
        with record.locked():
            copies = Copies.of(folder, keeping.copies)
            record.is_of(config)  # before anything is fetched into it
            copies.begin(config)
            record.open(config, cohort.device)
            yield from _Sitting(record, config, cohort, ranks, keeping, elastic, copies).all()
    else:
        yield from _Sitting(record, config, cohort, ranks, keeping, elastic, NoCopies()).all()


@dataclass(slots=True)
class _Sitting:
    """What one process, or one group, does of a run until the run ends or the process is killed."""

    record: Record
    config: RunConfig
    cohort: Cohort
    ranks: Ranks
    keeping: Keeping
    elastic: bool
    copies: NoCopies

    @property
    def checkpoints(self) -> Path:
        return self.record.folder / "checkpoints"

    def all(self) -> Iterator[Progress]:
        self.ranks.wait()
        ended, first = self.record.verdict is not None, True
        self.ranks.wait()
        try:
            if ended:
                self.copies.end()  # which may not have been possible at the time
            while not ended:
                ended, first = (yield from self.stretch(first)), False
        finally:
            self.copies.wait()

    def stretch(self, first: bool) -> Generator[Progress, None, bool]:
        """Train on from the newest checkpoint; whether that ended the run, or a divergence that it went back from."""
        record, ranks, returns = self.record, self.ranks, self.record.returns
        state = self.state()
        before = state.shared["step"] if state else 0
        if ranks.rank == 0 and first:
            record.take_up(before, self.keeping.session, ranks.world)
        now = recovery.remedied(self.config, len(returns)).at("workers", ranks.world)
        for progress in fit(now, self.cohort, ranks=ranks, resume=state, past=[r.divergence for r in returns]):
            if ranks.rank == 0 and progress.signals:
                record.add(progress, ranks.world if ranks.world != self.config.workers else None)
            verdict = progress.verdict
            if verdict is not None and verdict.kind in recovery.KINDS and len(returns) < self.config.recovery.times:
                self.go_back(verdict)
                yield dataclasses.replace(progress, verdict=None)
                return False
            if progress.looked or self.keeping.due(before, progress.step):
                self.save(progress)
            before = progress.step
            if verdict is not None and ranks.rank == 0:
                record.close(verdict)
                self.copies.end()
            yield progress
        return True

    def state(self) -> checkpoint.State | None:
        """What the newest checkpoint holds for this rank."""
        found = checkpoint.latest(self.checkpoints)
        step = checkpoint.step_of(found) if found else 0
        newest = self.ranks.tell({"step": step})["step"]
        if step != newest:
            raise InputError(
                self.checkpoints,
                found=f"step {step} as the newest checkpoint, where rank 0 found step {newest:.0f}",
                rule="all workers of a run see its folder",
                remedy="keep runs of several workers on storage that all machines share",
            )
        if found is None:
            return None
        if self.elastic and checkpoint.workers_of(found) != self.ranks.world:
            return checkpoint.load_shared(found)
        return checkpoint.load(found, self.ranks.rank)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; the rows up to it survive a power cut before it does."""
        if self.ranks.rank == 0:
            path = self.record.folder / "signals.jsonl"
            with told(path):
                sync(path)
        held = recovery.held(self.config, progress.step, evaluations(self.config))
        state, kept = progress.state(), self.keeping.kept
        checkpoint.save(self.checkpoints, progress.step, state, self.ranks, kept=kept, held=held)
        if progress.verdict is None:  # else the verdict goes with it
            self.copies.update()

    def go_back(self, verdict: Verdict) -> None:
        self.ranks.wait()
        if self.ranks.rank == 0:
            self.record.go_back(verdict, self.config)
            self.copies.update()
        self.ranks.wait()


def _environment(device: torch.device) -> tuple[dict[str, Any], str]:
    """What a result depends on besides settings and data, and the working tree's changes."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    environment = {
        "python": sys.version.split()[0],
        "packages": versions,
        "device": name,
        "threads": torch.get_num_threads(),
    }
    commit, changes = _source(Path(__file__))
    return environment | {"commit": commit}, changes


@cache
def _source(file: Path) -> tuple[str | None, str]:
    """The commit of the code that runs, and what the working tree had beyond it; asked once, when it was imported."""
    if not _git(file, "ls-files", "--error-unmatch", file.name):  # installed in a repository of the user's own
        return None, ""
    return _git(file, "rev-parse", "HEAD").strip() or None, _git(file, "diff", "HEAD")


def _git(file: Path, *words: str) -> str:
    """What git says of a source file's tree; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=file.parent,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # a diff may hold files in other encodings
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _rows(path: Path, start: int = 0) -> list[Row]:
    return [{k: float(v) for k, v in row.items()} for row in _read_lines(path, start)]


def _read_lines(path: Path, start: int = 0) -> list[dict[str, Any]]:
    """Whole lines from number `start` on: the last one may have been torn by a kill."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines[start:]]


def _line(row: Row) -> str:
    """One line of strict JSON, which has no NaN: non-finite values are written by their names."""
    return json.dumps({k: v if math.isfinite(v) else str(v) for k, v in row.items()}) + "\n"
