"""The commands that apply networks: predict, translate, export.

Knows what a user types and reads; knows nothing that `applying`, `model` and `package` do not offer to a script too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from tyro.conf import Positional

from equipoise import package
from equipoise.applying import Device, Done, Existing, Segmenting, Suffix, Task, Translating, device_of, tasks, wanted
from equipoise.model import LAST, Which, load, told_of, translators
from equipoise.predict import PLAIN, Manner
from equipoise.store_cli import Unprefixed, say, shown, warn
from slicestore.errors import InputError
from slicestore.spread import here
from slicestore.store import Domain

Doing = Callable[[Callable[[Task], Done], Sequence[Task]], Iterator[Done]]
"""A `slicestore.spread.Spread` of volumes, of which a lost process is one that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """Which volumes are meant, where their results go, and where the work is done."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the results."""
    suffix: Suffix = ".nii.gz"
    """Format of the results. NIfTI has 32 bits for a number of the grid: what comes from another format is rounded to
    that; .mha keeps 64."""
    brain: str | None = None
    """What a brain mask's file name adds to its image's ("brain_mask"), for preprocessing that needs masks."""
    component: int | None = None
    """Which volume, from 0, of files and series that hold several."""
    device: Device = "auto"
    """cpu, cuda, or whichever there is."""
    address: str | None = None
    """A Ray cluster ("auto" or HOST:PORT) that shares out the volumes; every node must see all paths."""
    gpus_per_volume: float | None = None
    """With --address; without it, 1 where the cluster has GPUs, else 0."""
    existing: Existing = "refuse"
    """Of results that are there: do nothing at all, skip volumes that have all of theirs, or replace them."""

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            InputError: a card for each volume without a cluster, or results that would go into a file.
        """
        if self.gpus_per_volume is not None and self.address is None:
            raise InputError(
                "--gpus-per-volume",
                found=self.gpus_per_volume,
                rule="it is a share of a cluster's cards",
                remedy="name the cluster with --address, or leave it out",
            )
        if self.out.exists() and not self.out.is_dir():
            raise InputError(self.out, found="a file", rule="results go into a folder", remedy="name another place")

    @property
    def here(self) -> torch.device:
        """Where networks are looked at before any volume is; a cluster's workers have cards of their own."""
        return device_of(self.device if self.address is None else "cpu")


def predict(
    model: Positional[Path],
    volumes: Positional[tuple[Path, ...]],
    /,
    handling: Annotated[Handling, Unprefixed],
    choice: Annotated[Which, Unprefixed] = LAST,
    manner: Annotated[Manner, Unprefixed] = PLAIN,
    probability: bool = False,
) -> None:
    """Segment raw volumes of the target modality, each in its own grid: OUT/NAME_mask.nii.gz.

    Args:
        model: a folder that `equipoise export` wrote, or a run's, or a study's (its best point).
        volumes: images, folders of DICOM files, or folders of either.
        handling: which volumes, and where results go.
        choice: which of a run's weights.
        manner: how networks are applied.
        probability: write each structure's probability too, float32: NAME_probability.nii.gz.
    """
    console = Console()
    ready = load(model, choice, handling.here)  # what is wrong with it is told before a volume is read
    work = Segmenting(
        model=ready.place,
        choice=ready.choice,  # these weights for all volumes, though the run may train on
        manner=manner,
        probability=probability,
        suffix=handling.suffix,
        device=handling.device,
    )
    todo = _todo(console, volumes, handling, partial(work.files, classes=ready.intake.classes))
    for said in ready.warnings():
        warn(console, said)
    del ready
    _apply(console, work, todo, handling)


def translate(
    run: Positional[Path],
    volumes: Positional[tuple[Path, ...]],
    /,
    handling: Annotated[Handling, Unprefixed],
    of: Domain,
    choice: Annotated[Which, Unprefixed] = LAST,
    batch: int = 8,
) -> None:
    """Show raw volumes as the other modality would, each in its own grid: OUT/NAME_translated.nii.gz.

    Values are standard deviations from the mean of an image of the other modality.

    Args:
        run: a run's folder, or a study's (its best point), with a checkpoint in it.
        volumes: images, folders of DICOM files, or folders of either.
        handling: which volumes, and where results go.
        of: their modality: source gives x_st, target gives x_ts.
        choice: which of the run's checkpoints; the newest, or that of --step.
        batch: slices at a time.
    """
    if choice.choose != "last":
        raise InputError(
            "--choose",
            found=choice.choose,
            rule="translating takes G and U, which only checkpoints hold",
            remedy="name a checkpoint with --step, or take the newest",
        )
    console = Console()
    ready = translators(run, choice, handling.here)
    work = Translating(
        run=ready.place, choice=ready.choice, of=of, batch=batch, suffix=handling.suffix, device=handling.device
    )
    todo = _todo(console, volumes, handling, work.files)
    for said in told_of(ready.about):
        warn(console, said)
    del ready
    _apply(console, work, todo, handling)


def export(
    run: Positional[Path],
    folder: Positional[Path],
    /,
    choice: Annotated[Which, Unprefixed] = LAST,
    licence: str = "",
) -> None:
    """Write a model's folder: weights (safetensors), preprocessing, settings, card, and a program for torch alone.

    Args:
        run: a run's folder, or a study's (its best point).
        folder: a new or empty folder.
        choice: which of the run's weights.
        licence: under what terms the model is handed on, for its card.
    """
    model = load(run, choice, device_of("cpu"))
    package.write(folder, model.net, model.config, model.intake, model.about, licence)
    console = Console()
    for said in model.warnings():
        warn(console, said)
    console.print(f"{folder}: now `equipoise predict {folder} VOLUME... -o OUT`", soft_wrap=True, highlight=False)


def _todo(
    console: Console, volumes: Sequence[Path], handling: Handling, files: Callable[[Task], list[Path]]
) -> list[Task]:
    """The volumes that are meant, once it is known that their results take nobody's place."""
    found = tasks(volumes, handling.out, brain=handling.brain, component=handling.component, tell=partial(say, console))
    return wanted(found, files, handling.existing)


def _apply(console: Console, work: Segmenting | Translating, todo: Sequence[Task], handling: Handling) -> None:
    """Do all tasks under a bar; tell warnings as they come, and what failed at the end.

    Raises:
        SystemExit: 1 where a volume failed.
    """
    failed: list[Done] = []
    with _doing(handling) as do, shown(console, "the first volume") as told:
        for number, done in enumerate(do(work, todo), start=1):
            for said in done.warnings:
                warn(console, f"{done.task.image.name}: {said}")
            failed += [done] if done.error else []
            told(number, len(todo), done.task.image.name)
    for done in failed:
        say(console, f"error: {done.error}", style="red")
    say(console, f"{handling.out}: {len(todo) - len(failed)} of {len(todo)} volumes done")
    if failed:
        sys.exit(1)


@contextmanager
def _doing(handling: Handling) -> Iterator[Doing]:
    if handling.address is None:
        yield here
        return
    from equipoise.launch.cluster import Share, connect
    from equipoise.launch.spread import ray_tasks

    with connect(handling.address):
        gpus = 0.0 if handling.device == "cpu" else Share.here(1, handling.gpus_per_volume).gpus
        yield partial(ray_tasks, gpus=gpus, lost=lambda task, error: Done(task, error=str(error)))
