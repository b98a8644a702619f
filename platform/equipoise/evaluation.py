"""How well the masks of many subjects agree with their references, and what is told of it.

Knows how files of masks are paired, what a mean over subjects is worth, and the three files that tell it; must not know
how two masks are compared (`agreement`), nor networks, stores or commands.

A measure that is not defined for a subject is NaN there and left out of the mean; of how many subjects it is the mean
stands beside it.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from equipoise import writing
from equipoise.agreement import EMPTY_RULE, MEASURES, SURFACE_RULE, Agreement, agreement
from equipoise.evaluation_picture import draw
from slicestore.errors import InputError
from slicestore.geometry import check_grids
from slicestore.inputs import LABEL_ENDINGS, stem
from slicestore.labels import class_indices
from slicestore.settings import MAX_CLASSES
from slicestore.volume import SUFFIXES, Volume, inspect, read

LEVEL, RESAMPLES, SEED = 0.95, 10_000, 0
"""The interval of a mean: percentiles of the means of so many draws of subjects, with replacement."""
SHARES = "_probability"
"""In names of what `predict` writes beside masks."""
TOLD = 5
"""Subjects that an error names before it counts the rest."""
Progress = Callable[[int, int, str], None]
"""Is told how many of how many subjects are done, and which comes next."""


# --- which masks belong together --------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """The two masks of a subject."""

    subject: str
    predicted: Path
    reference: Path


def pairs(predicted: Path, reference: Path, mask: str | None = None) -> list[Pair]:
    """Pair two files, or the files of two folders that are called after the same subject.

    A subject is a file's name without suffix and without `_mask`, `_seg` or `_label`. Where one folder holds both
    `NAME.nii.gz` and `NAME_mask.nii.gz`, the first is an image and left aside; so are `predict`'s probabilities.

    Args:
        predicted: a file of `slicestore.volume.SUFFIXES`, or a folder of such.
        reference: the same kind of place.
        mask: another ending, such as "vessel"; in a folder that has files `NAME_vessel`, these alone count.

    Raises:
        InputError: nothing there, a file and a folder, no masks, two masks of one subject, a subject without its
            counterpart, or an ending that no file has.
    """
    for place in (predicted, reference):
        if not place.exists():
            raise InputError(place, found="nothing", rule="masks lie in a file or a folder", remedy="check the path")
    if predicted.is_dir() != reference.is_dir():
        raise InputError(
            predicted,
            found=f"a {_kind(predicted)}, and {reference} is a {_kind(reference)}",
            rule="predictions and references are two files or two folders",
            remedy="give both alike",
        )
    if mask and not any(_named(file, mask)[1] == mask for place in (predicted, reference) for file in _files(place)):
        raise InputError(
            "mask",
            found=repr(mask),
            rule=f"some file's name ends in _{mask}, in {predicted} or {reference}",
            remedy="correct the ending, or leave it out",
        )
    if predicted.is_file():
        return [Pair(_named(reference, mask)[0], predicted, reference)]
    own, other = _masks(predicted, mask), _masks(reference, mask)
    _check_lonely(predicted, reference.name, sorted(own.keys() - other.keys()), "reference")
    _check_lonely(reference, predicted.name, sorted(other.keys() - own.keys()), "prediction")
    return [Pair(subject, own[subject], other[subject]) for subject in sorted(own)]


def _kind(place: Path) -> str:
    return "folder" if place.is_dir() else "file"


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    shown = (file for file in sorted(place.iterdir()) if not (file.name.startswith(".") or SHARES in file.name))
    return [file for file in shown if file.is_file() and file.name.lower().endswith(SUFFIXES)]


def _named(file: Path, mask: str | None) -> tuple[str, str]:
    """Subject and ending of a mask's file."""
    name = stem(file) or file.stem
    for ending in (mask, *LABEL_ENDINGS):
        if ending and name.endswith(f"_{ending}") and name != f"_{ending}":
            return name.removesuffix(f"_{ending}"), ending
    return name, ""


def _masks(folder: Path, mask: str | None) -> dict[str, Path]:
    """A folder's masks by subject."""
    named = [(*_named(file, mask), file) for file in _files(folder)]
    if mask and any(ending == mask for _, ending, _ in named):
        named = [one for one in named if one[1] == mask]
    masks = {subject for subject, ending, _ in named if ending}
    found: dict[str, Path] = {}
    for subject, ending, file in named:
        if not ending and subject in masks:
            continue
        if subject in found:
            raise InputError(
                file,
                found=f"also {found[subject].name}",
                rule="a subject has one mask in a folder",
                remedy="name the ending of the masks that are meant (`mask`), or remove one",
            )
        found[subject] = file
    if not found:
        raise InputError(
            folder, found="no mask", rule=f"masks end in one of {', '.join(SUFFIXES)}", remedy="check the path"
        )
    return found


def _check_lonely(folder: Path, other: str, lonely: Sequence[str], lacking: str) -> None:
    if lonely:
        more = f" and {len(lonely) - TOLD} more" if len(lonely) > TOLD else ""
        raise InputError(
            folder,
            found=f"{', '.join(map(repr, lonely[:TOLD]))}{more} without a {lacking} in {other}",
            rule="every prediction has a reference of the same name, and every reference a prediction",
            remedy="add or remove files, or name the ending that is to be left out of names (`mask`)",
        )


# --- what is found ----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One class of one subject."""

    subject: str
    structure: int
    agreement: Agreement


class Mean(NamedTuple):
    """A measure over subjects."""

    mean: float
    """NaN where it is defined for no subject."""
    interval: tuple[float, float] | None
    """Bootstrap interval at `LEVEL`; None with fewer than two subjects."""
    defined: int
    """Subjects for which the measure is defined."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Rows of any number of subjects, as `judge` makes them."""

    rows: tuple[Row, ...]

    @property
    def subjects(self) -> tuple[str, ...]:
        """In the order in which they were judged."""
        return tuple(dict.fromkeys(row.subject for row in self.rows))

    @property
    def counted(self) -> str:
        """How many they are, in words."""
        return f"{len(self.subjects)} subject{'s' if len(self.subjects) > 1 else ''}"

    @property
    def structures(self) -> tuple[int, ...]:
        """The classes, ascending."""
        return tuple(sorted({row.structure for row in self.rows}))

    def values(self, structure: int, measure: str) -> np.ndarray:
        """One measure of `MEASURES`, float64, a subject each in the order of rows; NaN where it is undefined."""
        found = [getattr(row.agreement, measure) for row in self.rows if row.structure == structure]
        return np.array(found, dtype=np.float64)

    def empties(self, structure: int) -> dict[str, int]:
        """How many subjects have no voxel of a class in the prediction alone, in the reference alone, in both."""
        count = Counter(row.agreement.empty for row in self.rows if row.structure == structure)
        return {"prediction": count["prediction"], "reference": count["reference"], "both": count["both"]}

    def summary(self) -> dict[int, dict[str, Mean]]:
        """Per class and measure of `MEASURES`: mean over subjects and its interval."""
        return {k: {name: average(self.values(k, name)) for name in MEASURES} for k in self.structures}

    def write(self, folder: Path) -> None:
        """Write `subjects.csv`, `summary.json` and `agreement.png`, each whole or not at all.

        Raises:
            StorageError: the disk refused.
        """
        with writing.told(folder):
            folder.mkdir(parents=True, exist_ok=True)
        writing.write(folder / "subjects.csv", self._csv())
        writing.write(folder / "summary.json", json.dumps(self._json(), indent=2, allow_nan=False) + "\n")
        picture = io.BytesIO()
        draw(self).savefig(picture, format="png", dpi=130)
        writing.write_bytes(folder / "agreement.png", picture.getvalue())

    def _csv(self) -> str:
        lines = io.StringIO()
        table = csv.writer(lines, lineterminator="\n")
        table.writerow(("subject", "structure", *Agreement.__dataclass_fields__))
        for row in self.rows:
            table.writerow((row.subject, row.structure, *map(_plain, asdict(row.agreement).values())))
        return lines.getvalue()

    def _json(self) -> dict[str, Any]:
        return {
            "subjects": len(self.subjects),
            "interval": {
                "of": "the mean over subjects for which the measure is defined",
                "method": "bootstrap over subjects, percentiles",
                "level": LEVEL,
                "resamples": RESAMPLES,
                "seed": SEED,
            },
            "rules": {"empty_masks": EMPTY_RULE, "surfaces": SURFACE_RULE},
            "structures": {
                str(structure): {
                    "empty": self.empties(structure),
                    "measures": {
                        name: {"mean": _plain(one.mean), "interval": one.interval, "defined": one.defined}
                        for name, one in means.items()
                    },
                }
                for structure, means in self.summary().items()
            },
        }


def _plain(value: object) -> object:
    """A value as CSV and strict JSON can hold it."""
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def average(values: np.ndarray) -> Mean:
    """Give the mean over subjects and its interval.

    The percentile bootstrap (Efron 1979) is a little narrow for few subjects: its 95 % hold about 90 of ten.

    Args:
        values: (subjects,); NaN is left out.
    """
    from scipy.stats import bootstrap  # a second that other commands need not wait

    defined = values[~np.isnan(values)]
    if not len(defined):
        return Mean(math.nan, None, 0)
    mean = float(defined.mean())
    if len(defined) < 2:
        return Mean(mean, None, 1)
    if (defined == defined[0]).all():
        return Mean(float(defined[0]), (float(defined[0]), float(defined[0])), len(defined))
    low, high = bootstrap(
        (defined,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        batch=max(1, 1_000_000 // len(defined)),
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Mean(mean, (float(low), float(high)), len(defined))


def judge(subject: str, predicted: Volume, reference: Volume, structures: Sequence[int], where: object) -> list[Row]:
    """Compare the masks of one subject, class by class; `agreement` says how, and what `where` is.

    Rows of several subjects, with the same classes, make an `Evaluation`.

    Raises:
        InputError: as `agreement`.
    """
    return [Row(subject, k, agreement(predicted, reference, k, where)) for k in structures]


def evaluate(
    pairs: Sequence[Pair], structures: Sequence[int] | None = None, progress: Progress | None = None
) -> Evaluation:
    """Compare the masks of many subjects, of which one is in memory at a time.

    Every file is read once before any is judged, so that a bad one is told at once and not after an hour.

    Args:
        pairs: as `pairs` gives them.
        structures: classes above 0; by default all that occur in any mask.
        progress: is told of subjects.

    Raises:
        InputError: a class that cannot be, none that occurs, a file that is no mask, or masks of one subject on
            different grids.
    """
    _check_structures(structures)
    found = {structure for pair in pairs for structure in _check(pair)}
    if not (found or structures):
        raise InputError(
            pairs[0].predicted if pairs else "pairs",
            found=f"no class but background in the masks of {len(pairs)} subjects",
            rule="what is evaluated is a class above 0 of some mask",
            remedy="check the paths, or name the classes (`structures`)",
        )
    if found and (strange := set(structures or ()) - found):
        raise InputError(
            "structures",
            found=f"class {min(strange)}, which is in no mask",
            rule=f"the masks hold the classes {', '.join(map(str, sorted(found)))}",
            remedy="name some of these",
        )
    rows: list[Row] = []
    classes = sorted(set(structures or found))
    for done, pair in enumerate(pairs):
        if progress:
            progress(done, len(pairs), pair.subject)
        masks = read(pair.predicted), read(pair.reference)
        rows += judge(pair.subject, *masks, classes, pair.predicted)
    if progress:
        progress(len(pairs), len(pairs), "done")
    return Evaluation(tuple(rows))


def _check_structures(structures: Sequence[int] | None) -> None:
    for structure in structures or ():
        if not 0 < structure < MAX_CLASSES:
            raise InputError(
                "structures",
                found=structure,
                rule=f"a class is a number from 1 to {MAX_CLASSES - 1}",
                remedy="name classes that are in the masks; 0 is background",
            )


def _check(pair: Pair) -> set[int]:
    """The classes above 0 of a subject's masks, once these are known to be whole and on one grid."""
    check_grids(inspect(pair.reference), inspect(pair.predicted), pair.predicted, kind="prediction")
    found = set()
    for file in (pair.predicted, pair.reference):
        voxels = class_indices(read(file).voxels, file)
        found |= {k for k in range(1, int(voxels.max()) + 1) if (voxels == k).any()}
    return found


# --- what is told -----------------------------------------------------------------------------------------------------


def told(console: Console, evaluation: Evaluation) -> None:
    """Print a table for each class: a row a measure with its mean, its interval and the subjects that it rests on."""
    for structure, means in evaluation.summary().items():
        caption = _empty_words(evaluation.empties(structure)) or None
        title = f"class {structure}, {evaluation.counted}"
        table = Table(box=box.SIMPLE_HEAD, title=title, caption=caption)
        table.add_column("measure")
        for head in ("mean", f"{LEVEL:.0%} interval", "n"):
            table.add_column(head, justify="right")
        for name, words in MEASURES.items():
            one = means[name]
            span = "" if one.interval is None else " to ".join(f"{end:.3f}" for end in one.interval)
            table.add_row(words, "" if math.isnan(one.mean) else f"{one.mean:.3f}", span, str(one.defined))
        console.print(table)


def _empty_words(empties: Mapping[str, int]) -> str:
    names = {"prediction": "prediction alone", "reference": "reference alone", "both": "both"}
    said = [f"{names[which]} {count}" for which, count in empties.items() if count]
    return f"empty masks: {', '.join(said)}" if said else ""
