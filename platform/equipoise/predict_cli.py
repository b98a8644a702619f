"""The commands that apply networks: predict, translate, export.

Knows what a user types and reads; knows nothing that `applying`, `model` and `package` do not offer to a script too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.conf import Positional

from equipoise import package
from equipoise.applying import Device, Done, Segmenting, Suffix, Task, Translating, device_of, free, tasks
from equipoise.model import LAST, Choice, load, translators
from equipoise.predict import PLAIN, Manner
from equipoise.store_cli import shown
from slicestore.errors import InputError
from slicestore.spread import Spread, here
from slicestore.store import Domain

Unprefixed = tyro.conf.arg(name="")
Out = Annotated[Path, tyro.conf.arg(aliases=["-o"])]


def predict(
    model: Positional[Path],
    volumes: Positional[tuple[Path, ...]],
    /,
    out: Out,
    choice: Annotated[Choice, Unprefixed] = LAST,
    manner: Annotated[Manner, Unprefixed] = PLAIN,
    probability: bool = False,
    suffix: Suffix = ".nii.gz",
    brain: str | None = None,
    component: int | None = None,
    device: Device = "auto",
    address: str | None = None,
    gpus_per_volume: float | None = None,
    overwrite: bool = False,
) -> None:
    """Segment raw volumes of the target modality, each in its own grid: OUT/NAME_mask.nii.gz.

    Args:
        model: a folder that `equipoise export` wrote, or a run's, or a study's (its best point).
        volumes: images, folders of DICOM files, or folders of either.
        out: folder of the masks.
        choice: which of a run's weights.
        manner: how networks are applied.
        probability: write each structure's probability too, float32: NAME_probability.nii.gz.
        suffix: format of the results. NIfTI has 32 bits for a number of the grid: what comes from another format is
            rounded to that; .mha and .nrrd keep 64.
        brain: what a brain mask's file name adds to its image's ("brain_mask"), for preprocessing that needs masks.
        component: which volume, from 0, of files and series that hold several.
        device: cpu, cuda, or whichever there is.
        address: a Ray cluster ("auto" or HOST:PORT) that shares out the volumes; every node must see all paths.
        gpus_per_volume: with --address; without it, 1 where the cluster has GPUs, else 0.
        overwrite: replace results that are there.
    """
    work = Segmenting(
        model=model.absolute(), choice=choice, manner=manner, probability=probability, suffix=suffix, device=device
    )
    console = Console()
    todo = tasks(volumes, out, brain=brain, component=component, tell=partial(_print, console))
    ready = load(model, choice, device_of(device))  # what is wrong with it is told before any volume is read
    free([file for task in todo for file in work.files(task, ready.intake.classes)], overwrite=overwrite)
    for said in ready.warnings():
        _warn(console, said)
    del ready
    _apply(console, work, todo, address, gpus_per_volume)


def translate(
    run: Positional[Path],
    volumes: Positional[tuple[Path, ...]],
    /,
    out: Out,
    of: Domain,
    choice: Annotated[Choice, Unprefixed] = LAST,
    batch: int = 8,
    suffix: Suffix = ".nii.gz",
    brain: str | None = None,
    component: int | None = None,
    device: Device = "auto",
    address: str | None = None,
    gpus_per_volume: float | None = None,
    overwrite: bool = False,
) -> None:
    """Show raw volumes as the other modality would, each in its own grid: OUT/NAME_translated.nii.gz.

    Values are standard deviations from the mean of an image of the other modality.

    Args:
        run: a run's folder, or a study's (its best point), with a checkpoint in it.
        volumes: images, folders of DICOM files, or folders of either.
        out: folder of the images.
        of: their modality: source gives x_st, target gives x_ts.
        choice: which of the run's checkpoints; the newest, or that of --step.
        batch: slices at a time.
        suffix: format of the results.
        brain: as for `predict`.
        component: which volume, from 0, of files and series that hold several.
        device: cpu, cuda, or whichever there is.
        address: as for `predict`.
        gpus_per_volume: as for `predict`.
        overwrite: replace results that are there.
    """
    if choice.choose != "last":
        raise InputError(
            "--choose",
            found=choice.choose,
            rule="translating takes G and U, which only checkpoints hold",
            remedy="name a checkpoint with --step, or take the newest",
        )
    work = Translating(run=run.absolute(), choice=choice, of=of, batch=batch, suffix=suffix, device=device)
    console = Console()
    todo = tasks(volumes, out, brain=brain, component=component, tell=partial(_print, console))
    translators(run, choice, device_of(device))
    free([file for task in todo for file in work.files(task, 0)], overwrite=overwrite)
    _apply(console, work, todo, address, gpus_per_volume)


def export(
    run: Positional[Path],
    folder: Positional[Path],
    /,
    choice: Annotated[Choice, Unprefixed] = LAST,
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
        _warn(console, said)
    console.print(f"{folder}: now `equipoise predict {folder} VOLUME... -o OUT`", soft_wrap=True, highlight=False)


def _apply(console: Console, work: Any, todo: Sequence[Task], address: str | None, gpus: float | None) -> None:
    """Do all tasks under a bar; tell warnings as they come, and what failed at the end.

    Raises:
        SystemExit: 1 where a volume failed.
    """
    failed: list[Done] = []
    with _spread(address, gpus) as spread, shown(console, "reading") as told:
        for number, done in enumerate(spread(work, todo), start=1):
            for said in done.warnings:
                _warn(console, f"{done.task.image.name}: {said}")
            failed += [done] if done.error else []
            told(number, len(todo), done.task.image.name)
    for done in failed:
        _print(console, f"error: {done.error}", style="red")
    _print(console, f"{todo[0].stem.parent}: {len(todo) - len(failed)} of {len(todo)} volumes done")
    if failed:
        sys.exit(1)


def _warn(console: Console, said: str) -> None:
    _print(console, f"warning: {said}", style="yellow")


def _print(console: Console, said: str, style: str | None = None) -> None:
    console.print(said, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _spread(address: str | None, gpus: float | None) -> Iterator[Spread]:
    if address is None:
        yield here
        return
    from equipoise.launch.cluster import Share, connect
    from equipoise.launch.spread import ray_tasks

    with connect(address):
        yield partial(ray_tasks, gpus=Share.here(1, gpus).gpus)
