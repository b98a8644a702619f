"""Many raw volumes, one after another here or over machines: which files are meant, and where each result goes.

Knows names of files, and that one bad volume must not cost the others; must not know what is done to a volume, nor Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from equipoise.model import Model, Translators, Which, load, translators
from equipoise.predict import Manner, predict
from equipoise.translate import translate
from slicestore.dicom import holds_dicom
from slicestore.errors import InputError
from slicestore.inputs import BRAIN, stem
from slicestore.store import Domain
from slicestore.volume import SUFFIXES, Volume, read, write

Suffix = Literal[".nii.gz", ".nii", ".mha", ".nrrd"]
Device = Literal["auto", "cpu", "cuda"]
Existing = Literal["refuse", "skip", "replace"]
"""What becomes of a result that is there: nothing is done at all; its volume is left out, if all of its results are
there; or it is replaced."""


@dataclass(frozen=True, slots=True)
class Task:
    """One volume to do."""

    image: Path
    stem: Path
    """Where results go, without what their names end in."""
    brain: Path | None
    component: int | None

    def __str__(self) -> str:
        return str(self.image)

    def named(self, kind: str, suffix: Suffix) -> Path:
        """Where a result of a kind goes."""
        return self.stem.with_name(f"{self.stem.name}_{kind}{suffix}")

    def read(self) -> tuple[Volume, Volume | None]:
        """The volume, and its brain mask, if there is one.

        Raises:
            InputError: a file is damaged.
        """
        return read(self.image, self.component), read(self.brain) if self.brain else None

    def write(self, files: Sequence[Path], volumes: Sequence[Volume], warnings: Sequence[str]) -> Done:
        """Write results on the volume's grid.

        Raises:
            InputError: the disk refused.
        """
        for volume, file in zip(volumes, files, strict=True):
            try:
                write(volume, file, like=self.image)
            except (OSError, RuntimeError) as error:  # the latter is how SimpleITK tells of a full disk
                raise InputError(
                    file,
                    found=f"a disk that refuses ({(str(error).splitlines() or [type(error).__name__])[-1].strip()})",
                    rule="a result is written whole or not at all",
                    remedy="make room or mend the right to write, and do what is missing with --existing skip",
                ) from error
        return Done(self, tuple(warnings))


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a volume."""

    task: Task
    warnings: tuple[str, ...] = ()
    error: str = ""
    """Why there are no results; empty where there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmenting:
    """Masks: `STEM_mask`, and with `probability` a file for each structure too."""

    model: Path
    choice: Which
    """Such as `Model.choice`, so that all volumes get the same weights."""
    manner: Manner
    probability: bool = False
    suffix: Suffix = ".nii.gz"
    device: Device = "auto"

    def files(self, task: Task, classes: int) -> list[Path]:
        """Where a volume's results go."""
        several = [""] if classes == 2 else [f"_{k}" for k in range(1, classes)]
        kinds = ["mask", *(f"probability{number}" for number in several if self.probability)]
        return [task.named(kind, self.suffix) for kind in kinds]

    def __call__(self, task: Task) -> Done:
        """Segment one volume; what is wrong with it is told, and never raised."""
        try:
            model = _model(self.model, self.choice, self.device)
            volume, brain = task.read()
            found, odd = predict(model, volume, brain=brain, manner=self.manner, where=task.image)
            files = self.files(task, model.intake.classes)
            return task.write(files, [found.label, *found.probabilities][: len(files)], odd)
        except InputError as error:
            return Done(task, error=str(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class Translating:
    """Images in the other modality: `STEM_translated`."""

    run: Path
    choice: Which
    of: Domain
    batch: int = 8
    suffix: Suffix = ".nii.gz"
    device: Device = "auto"

    def files(self, task: Task) -> list[Path]:
        """Where a volume's results go."""
        return [task.named("translated", self.suffix)]

    def __call__(self, task: Task) -> Done:
        """Translate one volume; what is wrong with it is told, and never raised."""
        try:
            found = _translators(self.run, self.choice, self.device)
            volume, brain = task.read()
            made, odd = translate(
                found.net, found.intake, volume, of=self.of, brain=brain, batch=self.batch, where=task.image
            )
            return task.write(self.files(task), [made], odd)
        except InputError as error:
            return Done(task, error=str(error))


def tasks(
    volumes: Sequence[Path],
    out: Path,
    *,
    brain: str | None = None,
    component: int | None = None,
    tell: Callable[[str], None] = lambda said: None,
) -> list[Task]:
    """Find the volumes that are meant; whether they can be read is found when they are.

    Args:
        volumes: files of images, folders of DICOM files, or folders of either. In a folder what continues another
            file's name by an underscore is taken for a mask of it, and left aside.
        out: folder of the results.
        brain: what a brain mask's file name adds to its image's; "brain_mask" by default.
        component: which of several volumes in a file or folder, from 0.
        tell: is told what was left aside.

    Raises:
        InputError: nothing there, or two volumes of one name.
    """
    if not volumes:
        raise InputError("volumes", found="none", rule="volumes are named behind the model", remedy="name some")
    found: list[Task] = []
    for path in volumes:
        found += _tasks(path.absolute(), out.absolute(), brain or BRAIN, component, tell)
    names = Counter(task.stem for task in found)
    for task in found:
        if names[task.stem] > 1:
            raise InputError(
                task.image,
                found=f"{names[task.stem]} volumes called {task.stem.name!r}",
                rule="results are named like their volumes, in one folder",
                remedy="give them in several calls, each with a folder of its own",
            )
    return found


def wanted(found: Sequence[Task], files: Callable[[Task], list[Path]], existing: Existing) -> list[Task]:
    """The tasks that are to be done, as to what is there already.

    Args:
        found: all that are meant.
        files: where a task's results go.
        existing: see `Existing`.

    Raises:
        InputError: a result would take the place of a file, and may not.
    """
    there = [file for task in found for file in files(task) if file.exists()]
    if there and existing == "refuse":
        raise InputError(
            there[0],
            found="a file that is there" + (f", and {len(there) - 1} more" if len(there) > 1 else ""),
            rule="a result takes no file's place unasked: it might be somebody's own mask",
            remedy="give another folder, or --existing skip, or --existing replace",
        )
    if existing == "skip":
        return [task for task in found if not all(file.exists() for file in files(task))]
    return list(found)


def device_of(name: Device) -> torch.device:
    """The device that is asked for.

    Raises:
        InputError: there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", found="cuda", rule="a CUDA device is here", remedy="leave --device out")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _tasks(path: Path, out: Path, brain: str, component: int | None, tell: Callable[[str], None]) -> Iterator[Task]:
    images = [path]
    if not path.exists():
        raise InputError(path, found="nothing", rule="a volume is a file or a folder", remedy="check the path")
    if path.is_dir() and not holds_dicom(path):
        there = [one for one in sorted(path.iterdir()) if not one.name.startswith(".")]
        named = {one: name for one in there if (name := stem(one)) is not None}
        aside = [one for one, name in named.items() if any(name.startswith(f"{other}_") for other in named.values())]
        images = [one for one in named if one not in aside]
        if aside:
            names = ", ".join(one.name for one in aside[:3])
            tell(f"left aside as masks: {len(aside)} files, such as {names}; name a file to have it done")
        if not images:
            raise InputError(
                path, found="no volume", rule=f"a volume ends in one of {', '.join(SUFFIXES)}", remedy="check the path"
            )
    for image in images:
        name = stem(image) or image.name  # of an unknown format, which reading it tells
        masks = [image.with_name(f"{name}_{brain}{suffix}") for suffix in SUFFIXES]
        yield Task(image, out / name, next((mask for mask in masks if mask.is_file()), None), component)


@lru_cache(maxsize=1)
def _model(path: Path, choice: Which, device: Device) -> Model:
    """Networks stay from volume to volume of a process."""
    torch.set_flush_denormal(True)  # as in training
    return load(path, choice, device_of(device))


@lru_cache(maxsize=1)
def _translators(path: Path, choice: Which, device: Device) -> Translators:
    torch.set_flush_denormal(True)
    return translators(path, choice, device_of(device))
