"""Checkpoints that continue bit for bit (on cards as far as their kernels repeat themselves).

Knows how a run's state lies on disk, whole or not at all; knows nothing of what the state means.

A checkpoint is a folder `step-000100`: `shared.pt` (weights, optimisers, monitor) and one `rank-R.pt` a rank (pools and
random numbers differ between ranks). It counts once its folder has its final name. Files are read with
`weights_only=True`: nothing in them can run.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from equipoise.ranks import Ranks
from slicestore.errors import InputError

KEPT = 2
"""Checkpoints that a run keeps at least: the newest, and the one before it in case the newest turns out damaged."""


class State(NamedTuple):
    """A run's state on one rank: tensors and plain data."""

    shared: dict[str, Any]
    own: dict[str, Any]


def save(folder: Path, step: int, state: State, ranks: Ranks, *, kept: int = KEPT) -> None:
    """Write the state of `step`, then let go of all but the `kept` newest. Every rank of the group must call."""
    final = folder / f"step-{step:06d}"
    partial = folder / f".{final.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        _write(partial / "shared.pt", state.shared)
    _write(partial / f"rank-{ranks.rank}.pt", state.own)
    ranks.wait()
    if ranks.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in _complete(folder)[:-kept]:
            shutil.rmtree(old)
    ranks.wait()


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    return next(reversed(_complete(folder)), None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def drop_after(folder: Path, step: int) -> None:
    """Let go of every checkpoint that was written after `step`, the newest first."""
    for late in reversed([found for found in _complete(folder) if step_of(found) > step]):
        shutil.rmtree(late)


def load(checkpoint: Path, rank: int) -> State:
    """Read one rank's state into main memory: the run copies it to where it trains.

    Raises:
        InputError: a file is missing (another number of workers wrote the checkpoint) or damaged.
    """
    return State(_read(checkpoint / "shared.pt"), _read(checkpoint / f"rank-{rank}.pt"))


def _write(path: Path, state: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            path,
            found="no such file",
            rule="a run resumes with the number of workers it was started with",
            remedy="set workers as in the run's config.json",
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            path,
            found=f"an unreadable checkpoint ({type(error).__name__})",
            rule="a checkpoint loads with weights_only=True",
            remedy=f"remove the folder {path.parent.name}: the run continues from the one before",
        ) from error
    return state


def _complete(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name))  # a million has seven digits
