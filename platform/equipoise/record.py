"""A run's folder: the complete record, whatever else watches.

Knows the files of a run and how they survive a kill; knows nothing of Ray, W&B or Optuna, which all read from here.

    config.json        the RunConfig
    environment.json   versions, commit, device: no host names, users or paths
    changes.diff       what the working tree had beyond that commit
    signals.jsonl      one row a block of steps
    returns.json       from which divergences a run with `recovery` went back, where to, and its remedies
    return-1.jsonl     the rows that the first of them took back
    panels/            one picture an evaluation
    checkpoints/       the newest states
    verdict.json       written last: a run with a verdict has ended
    ray/               what Ray Train writes of a run over several workers
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from equipoise import checkpoint, recovery
from equipoise.batches import Cohort
from equipoise.config import RunConfig
from equipoise.monitor import Horizon, Verdict
from equipoise.ranks import Ranks
from equipoise.recovery import Return
from equipoise.train import Progress, fit
from slicestore.errors import InputError

Row = dict[str, float]
CONFIRM = "confirm"
"""How the name of a run that repeats a study's best point begins."""
_PACKAGES = ("equipoise", "torch", "numpy", "ray", "optuna", "wandb", "zarr")


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
            InputError: the folder belongs to a run with other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "config.json").is_file():
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
            return
        environment, changes = _environment(device)
        _write(self.folder / "changes.diff", changes)
        _write(self.folder / "environment.json", json.dumps(environment, indent=2))
        _write(self.folder / "config.json", json.dumps(config.to_dict(), indent=2))

    def rewind(self, step: int) -> None:
        """Drop what was recorded after `step`: the run continues from there and will say it again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        _write(self.folder / "signals.jsonl", "".join(map(_line, kept)))

    def add(self, progress: Progress) -> None:
        """Append one block; flushed, so that a kill costs nothing that was written."""
        if progress.panels is not None:
            progress.panels.save(self.picture(progress.step))
        row = {
            "step": progress.step,
            **progress.signals,
            "divergence/stability": progress.stability,
            "time/block": progress.seconds,
        }
        with open(self.folder / "signals.jsonl", "a") as file:
            file.write(_line(row))

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
        checkpoint.drop_after(checkpoints, verdict.onset or 0)
        found = checkpoint.latest(checkpoints)
        step = checkpoint.step_of(found) if found else 0
        taken = [row for row in self.rows() if row["step"] > step]
        _write(self.folder / f"return-{number}.jsonl", "".join(map(_line, taken)))
        returns.append(Return(verdict, step, recovery.words(config, number)))
        data = [{"verdict": r.verdict.to_dict(), "step": r.step, "remedy": r.remedy} for r in returns]
        _write(self.folder / "returns.json", json.dumps(data, indent=2))

    def close(self, verdict: Verdict) -> None:
        """Write the verdict: the run has ended."""
        horizon = Horizon.of(
            self.config.monitor, self.config.steps
        )  # short runs are judged by shorter rules: say which
        data = verdict.to_dict() | {"horizon": dataclasses.asdict(horizon)}
        _write(self.folder / "verdict.json", json.dumps(data, indent=2))

    @contextmanager
    def locked(self, patience: float = 60.0) -> Iterator[None]:
        """Hold the folder against a second writer, such as a worker that outlives its killed driver for a moment.

        Raises:
            InputError: another process still writes after `patience` seconds.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as file:
            deadline = time.monotonic() + patience
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise InputError(
                            self.folder,
                            found="another process that writes this run",
                            rule="a run has one writer",
                            remedy="wait for it or end it, then resume",
                        ) from None
                    time.sleep(0.2)
            yield


def recorded(folder: Path, config: RunConfig, cohort: Cohort, *, ranks: Ranks | None = None) -> Iterator[Progress]:
    """`fit`, written down: every `Progress` is on disk before it is handed on. Continues where the folder left off.

    Nothing is yielded when the run has ended already; only the verdict, without signals, when it was killed between its
    last checkpoint and that. Rank 0 writes; every rank saves its part of a checkpoint.
    """
    ranks = ranks or Ranks()
    record = Record(folder)
    if ranks.rank == 0:
        with record.locked():
            record.open(config, cohort.device)
            yield from _recorded(record, config, cohort, ranks)
    else:
        yield from _recorded(record, config, cohort, ranks)


def _recorded(record: Record, config: RunConfig, cohort: Cohort, ranks: Ranks) -> Iterator[Progress]:
    ranks.wait()
    ended = record.verdict is not None
    ranks.wait()
    while not ended:
        ended = yield from _attempt(record, config, cohort, ranks)


def _attempt(record: Record, config: RunConfig, cohort: Cohort, ranks: Ranks) -> Generator[Progress, None, bool]:
    """Train on from the newest checkpoint; whether that ended the run, or a divergence that it went back from."""
    returns = record.returns
    found = checkpoint.latest(record.folder / "checkpoints")
    ranks.wait()
    state = checkpoint.load(found, ranks.rank) if found else None
    if ranks.rank == 0:
        record.rewind(state.shared["step"] if state else 0)
    now, past = recovery.remedied(config, len(returns)), [r.divergence for r in returns]
    for progress in fit(now, cohort, ranks=ranks, resume=state, past=past):
        if ranks.rank == 0 and progress.signals:
            record.add(progress)
        verdict = progress.verdict
        if verdict is not None and verdict.kind in recovery.KINDS and len(returns) < config.recovery.times:
            ranks.wait()
            if ranks.rank == 0:
                record.go_back(verdict, config)
            ranks.wait()
            yield dataclasses.replace(progress, verdict=None)
            return False
        if progress.looked:
            kept = recovery.kept(config)
            checkpoint.save(record.folder / "checkpoints", progress.step, progress.state(), ranks, kept=kept)
        if verdict is not None and ranks.rank == 0:
            record.close(verdict)
        yield progress
    return True


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
        "commit": _git("rev-parse", "HEAD").strip() or None,
    }
    if not _git("ls-files", "--error-unmatch", Path(__file__).name):  # installed in a repository of the user's own
        return environment | {"commit": None}, ""
    return environment, _git("diff", "HEAD")


def _git(*words: str) -> str:
    """What git says of the source tree; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=Path(__file__).parent,
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
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [{k: float(v) for k, v in json.loads(line).items()} for line in lines[start:]]


def _line(row: Row) -> str:
    """One line of strict JSON, which has no NaN: non-finite values are written by their names."""
    return json.dumps({k: v if math.isfinite(v) else str(v) for k, v in row.items()}) + "\n"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
