"""Checkpoints that continue bit for bit (on cards as far as their kernels repeat themselves).

Knows how a run's state lies on disk, whole or not at all; knows nothing of what the state means.

A checkpoint is a folder `step-000100`: `shared.pt` (weights, optimisers, monitor) and one `rank-R.pt` a rank (pools and
random numbers differ between ranks). It counts once its folder has its final name, and once it has, it survives a power
cut. Files are read with `weights_only=True`: nothing in them can run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from equipoise.ranks import Ranks
from equipoise.writing import refusal, sync, told, write_bytes
from slicestore.errors import InputError

KEPT = 2
"""Checkpoints that a run keeps at least: the newest, and the one before it in case the newest turns out damaged."""


class State(NamedTuple):
    """A run's state on one rank: tensors and plain data."""

    shared: dict[str, Any]
    own: dict[str, Any]
    """What is this rank's alone; empty lets it begin afresh."""


def save(folder: Path, step: int, state: State, ranks: Ranks, *, kept: int = KEPT, held: Collection[int] = ()) -> None:
    """Write the state of `step`, then let go of older ones. Every rank of the group must call.

    Args:
        folder: where checkpoints lie.
        step: after which the state was taken.
        state: this rank's.
        ranks: the group.
        kept: newest checkpoints that stay.
        held: steps whose checkpoints stay, however old.

    Raises:
        InputError: the disk refused; what is not complete does not count, and older checkpoints are as they were.
    """
    final = folder / f"step-{step:06d}"
    partial = folder / f".{final.name}.partial"
    with told(partial):
        partial.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        _write(partial / "shared.pt", state.shared)
    _write(partial / f"rank-{ranks.rank}.pt", state.own)
    ranks.wait()
    if ranks.rank == 0:
        with told(final):
            _finish(partial, final, ranks.world)
            for old in complete(folder)[:-kept]:
                if step_of(old) not in held:
                    shutil.rmtree(old)
    ranks.wait()


def _finish(partial: Path, final: Path, world: int) -> None:
    """Give a checkpoint of `world` ranks its name, without what larger, killed groups left in its folder."""
    for file in partial.glob("rank-*.pt"):
        if int(file.stem.removeprefix("rank-")) >= world:
            file.unlink()
    sync(partial)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync(final.parent)


def restore(folder: Path, name: str, files: Iterable[tuple[str, bytes | memoryview]]) -> None:
    """Put back a whole checkpoint from elsewhere, as names and contents of all its files.

    Raises:
        InputError: the disk refused; the checkpoint then does not count.
    """
    partial = folder / f".{name}.partial"
    with told(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world = 0
    for file, data in files:
        write_bytes(partial / file, data)
        world += file.startswith("rank-")
    with told(folder / name):
        _finish(partial, folder / name, world)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one.

    Raises:
        InputError: the disk refuses to tell.
    """
    with told(folder):
        return next(reversed(complete(folder)), None)


def complete(folder: Path) -> list[Path]:
    """All complete checkpoints, the oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name))  # a million has seven digits


def workers_of(checkpoint: Path) -> int:
    """Of how many ranks a checkpoint is."""
    return len(list(checkpoint.glob("rank-*.pt")))


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def drop_after(folder: Path, step: int) -> None:
    """Let go of every checkpoint that was written after `step`, the newest first."""
    for late in reversed([found for found in complete(folder) if step_of(found) > step]):
        shutil.rmtree(late)


def load(checkpoint: Path, rank: int) -> State:
    """Read one rank's state into main memory: the run copies it to where it trains.

    Raises:
        InputError: a file is missing (another number of workers wrote the checkpoint) or damaged.
    """
    return State(_read(checkpoint / "shared.pt"), _read(checkpoint / f"rank-{rank}.pt"))


def load_shared(checkpoint: Path) -> State:
    """Read what all ranks share; what is a rank's own begins afresh, because another number of ranks wrote it.

    Raises:
        InputError: the file is missing or damaged.
    """
    return State(_read(checkpoint / "shared.pt"), {})


def _write(path: Path, state: dict[str, Any]) -> None:
    try:
        with told(path), open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (InputError, RuntimeError) as error:
        with suppress(OSError):
            path.unlink()  # what fills the disk helps nobody
        if isinstance(error.__context__, OSError) and not isinstance(error, InputError):  # how torch.save passes it on
            raise refusal(path, error.__context__) from error
        raise


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
    except OSError as error:
        raise refusal(path, error) from error
    except Exception as error:
        raise InputError(
            path,
            found=f"an unreadable checkpoint ({type(error).__name__})",
            rule="a checkpoint loads with weights_only=True",
            remedy=f"remove the folder {path.parent.name}: the run continues from the one before",
        ) from error
    return state
