"""Volumes in TFRecord files of SIFA's layout, and a store made of them.

Knows how files make a subject and what must be said of slices without geometry; knows nothing of framing, of features
or of how stores are written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slicestore import intensity, tfrecord
from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.ingest import Kind, Progress, assemble
from slicestore.labels import label_facts, resample_label
from slicestore.layout import DOMAINS, Domain
from slicestore.settings import MAX_CLASSES, Prepared, Preprocessing
from slicestore.sifa_layout import decode
from slicestore.spread import Spread, here
from slicestore.store import Store
from slicestore.volume import Volume


@dataclass(frozen=True, slots=True)
class Records:
    """One volume: a subject's slices."""

    domain: Domain
    subject: str
    """As the file names have it; it stays out of the store."""
    files: tuple[Path, ...]
    """In the order of the slices."""

    def __str__(self) -> str:
        return f"{self.files[0]}{f' and {len(self.files) - 1} more' if len(self.files) > 1 else ''}"


def import_records(
    items: Sequence[Records],
    store: str | Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    key_file: Path | None = None,
    spread: Spread = here,
) -> Store:
    """Make or update a store from TFRecords; as `ingest.ingest`, with values and labels as they are.

    Raises:
        InputError: as `records_from`, `prepare` and `ingest.ingest`.
    """
    seen: set[tuple[str, str]] = set()
    for item in items:
        if (item.domain, item.subject) in seen:
            raise InputError(
                item,
                found=f"a second {item.domain} volume of subject {item.subject!r}",
                rule="a subject has one volume in a domain",
                remedy="rename a file, or mend the expression that finds the subject",
            )
        seen.add((item.domain, item.subject))
    for domain in DOMAINS:
        if all(item.domain != domain for item in items):
            raise InputError(
                "import", found=f"no {domain} records", rule="a store has both domains", remedy=f"name {domain} files"
            )
    config = settings_for(items)
    return assemble(items, RECORDS, store, config, seed=seed, progress=progress, key_file=key_file, spread=spread)


# --- from files -------------------------------------------------------------------------------------------------------


def records_from(path: str | Path, domain: Domain, *, subject: str | None = None) -> list[Records]:
    r"""Find the volumes in a folder of files, a text list of files, or one file.

    Args:
        path: a folder, whose files with `.tfrecord` in their names are taken; a `.txt` of paths, one a line, relative
            to its own folder or the working one; or a TFRecord file.
        domain: of all of them.
        subject: a regular expression found in each file name, whose first group (or the whole of it) names the
            subject, such as `^(case\d+)_`; slices then follow the numbers in the names. Without it each file is a
            subject, with its records as the slices.

    Raises:
        InputError: no files, a name that the expression is not found in, files of one slice without an expression.
    """
    files = _listed(Path(path))
    if subject is None:
        for file in files:
            if tfrecord.count(file) < 2:
                raise InputError(
                    file,
                    found="a single record",
                    rule="slices that have a file each are grouped by their subject, or one patient could be trained "
                    "on and tested on",
                    remedy="give a regular expression that finds the subject in a file's name (`subject`), such as "
                    r"'^(case\d+)_'",
                )
        return [Records(domain, file.name.partition(".")[0], (file,)) for file in files]
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_subject(file, subject), []).append(file)
    return [Records(domain, name, tuple(group)) for name, group in sorted(groups.items())]


def digest(item: Records) -> str:
    """Hash of the bytes that make a volume, in the slices' order."""
    whole = hashlib.sha256()
    for file in item.files:
        with file.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()


def settings_for(items: Sequence[Records]) -> Preprocessing:
    """Settings that fit the slices as they are: their size, a nominal 1 mm, and nothing done to them."""
    for data in tfrecord.records(items[0].files[0]):
        image, _ = decode(data, f"{items[0].files[0]}, record 1")
        return Preprocessing(size=image.shape[0], spacing_mm=1.0, centre="grid")
    raise _empty(items[0])


def prepare(item: Records, config: Preprocessing) -> Prepared:
    """Take a volume's slices as they are: values to float16, labels to class indices.

    The record says `"geometry": "unknown"` and holds one grid four times: 1 mm isotropic at the origin.

    Raises:
        InputError: records of another layout, of different sizes or not of `config.size`, values that are not finite
            in float16, labels that are no class indices; a source volume without labels.
    """
    slices = list(_slices(item))
    if not slices:
        raise _empty(item)
    image = np.empty((len(slices), config.size, config.size), dtype=np.float16)
    label = np.zeros(image.shape, dtype=np.uint8)
    for number, (where, pixels, classes) in enumerate(slices):
        if pixels.shape != image.shape[1:]:
            raise InputError(
                where,
                found=f"a slice of {pixels.shape[0]} x {pixels.shape[1]} pixels",
                rule=f"slices of this store are {config.size} x {config.size}",
                remedy="import data of different sizes into stores of their own",
            )
        with np.errstate(over="ignore"):  # found below
            image[number] = pixels
        if not np.isfinite(image[number]).all():
            raise InputError(
                where,
                found="values that are not finite in float16",
                rule="images are standardised, so within a few hundred of 0",
                remedy="make the records anew from finite, standardised images",
            )
        if classes is not None:
            label[number] = _class_indices(classes, where)
    labelled = [classes is not None for _, _, classes in slices]
    if any(labelled) and not all(labelled):
        raise InputError(
            slices[labelled.index(False)][0],
            found="a slice without a label",
            rule="a volume is labelled as a whole or not at all",
            remedy="leave the subject out, or label all of it",
        )
    if item.domain == "source" and not labelled[0]:
        raise InputError(
            item,
            found="no label",
            rule="every source volume has a label, because the segmenter learns from nothing else",
            remedy="leave the subject out, or import the files as target",
        )
    known = label if labelled[0] else None
    fraction = None if known is None else np.where(known > 0, np.uint8(255), np.uint8(0))
    return Prepared(image, known, fraction, _record(image, known))


def _record(image: np.ndarray, label: np.ndarray | None) -> dict[str, Any]:
    """What the store wants to know of a volume, as `slicestore.preprocess.prepare` has it.

    A frame round the image, if there was one, is not told from it: the limits are those of all pixels.
    """
    depth, height, width = image.shape
    grid = Geometry((width, height, depth), (1.0, 1.0, 1.0))
    histogram = intensity.Histogram.of(image)
    facts = None
    if label is not None:
        same = Volume(label, grid)
        facts = label_facts(same, resample_label(same, 1.0), 1.0) | {"lost": 0.0}
    return {
        "geometry": "unknown",
        **dict.fromkeys(("original", "oriented", "resampled", "prepared"), grid.to_dict()),
        "oblique_degrees": 0.0,
        "shift_yx": [0, 0],
        "slices": list(range(depth)),
        "mean": 0.0,
        "std": 1.0,
        "background": histogram.percentile(intensity.BACKGROUND_PERCENT),
        "minimum": float(image.min()),
        "maximum": float(image.max()),
        "percentiles": histogram.tails(),
        "label": facts,
    }


def _listed(path: Path) -> list[Path]:
    """Files of a folder or list in natural order: 2 before 10."""
    files = [path]
    if path.is_dir():
        files = [f for f in path.iterdir() if ".tfrecord" in f.name and f.is_file() and not f.name.startswith(".")]
    elif path.suffix == ".txt":
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                path, found=f"no readable text ({error})", rule="a list is a text file", remedy="check the path"
            ) from None
        files = [near if (near := path.parent / line).exists() else Path(line) for line in lines if line]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise InputError(
            missing[0] if missing else path,
            found="no such file" if missing else "no TFRecord file",
            rule="TFRecords come from a folder, from a list of paths relative to it or to here, or from one file",
            remedy="check the path, and that the files' names have .tfrecord in them",
        )
    return sorted(files, key=_natural)


def _natural(file: Path) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", file.name)]


def _subject(file: Path, pattern: str) -> str:
    try:
        found = re.search(pattern, file.name)
    except re.error as error:
        raise InputError(
            "subject", found=f"{pattern!r} ({error})", rule="it is a regular expression", remedy="mend it"
        ) from None
    if not found or not (name := found.group(1) if found.re.groups else found.group()):
        raise InputError(
            file,
            found=f"no subject in the name by {pattern!r}",
            rule="the expression finds the subject in every file's name",
            remedy="mend the expression, or move other files away",
        )
    return name


def _slices(item: Records) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    for file in item.files:
        for number, data in enumerate(tfrecord.records(file), start=1):
            where = f"{file}, record {number}"
            yield where, *decode(data, where)


def _empty(item: Records) -> InputError:
    return InputError(item, found="no record", rule="a volume has slices", remedy="download or make the file again")


def _class_indices(label: np.ndarray, where: str) -> np.ndarray:
    good = (label == np.rint(label)) & (label >= 0) & (label < MAX_CLASSES)  # NaN is none of it
    if not good.all():
        raise InputError(
            where,
            found=f"the label value {label[~good][0]:g}",
            rule=f"a label holds class indices 0, 1, ... below {MAX_CLASSES}",
            remedy="renumber the classes; these may be an image's values",
        )
    return label.astype(np.uint8)


# --- for ingest -------------------------------------------------------------------------------------------------------


def _files(item: Records) -> dict[str, str | None]:
    return {"image": str(item.files[0].resolve()), "files": str(len(item.files))}


def _digests(item: Records, config: Preprocessing) -> dict[str, str | None]:
    return {"image": digest(item)}


def _examine(item: Records, config: Preprocessing) -> None:
    prepare(item, config)


RECORDS: Kind[Records] = Kind(_files, _digests, _examine, prepare)
"""TFRecord files in SIFA's layout."""
