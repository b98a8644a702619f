"""A store's volumes as files for other programs: NIfTI, or TFRecords in SIFA's layout.

Knows what such a folder holds and how it is named, by pseudonym; knows nothing of how stores or files are coded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slicestore import sifa_layout, tfrecord
from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.preprocess import restore
from slicestore.store import DOMAINS, Entry, Store
from slicestore.volume import Volume, write

Format = Literal["nifti", "tfrecord"]
Grid = Literal["prepared", "raw"]
Progress = Callable[[int, int, str], None]
"""Called with volumes done, volumes in all, and the last one's pseudonym."""


def export(
    store: Store,
    folder: str | Path,
    *,
    format: Format = "nifti",
    grid: Grid = "prepared",
    progress: Progress | None = None,
) -> int:
    """Write a store's volumes into a new or empty folder; give the number of files that hold voxels.

    NIfTI: `DOMAIN/SUBJECT.nii.gz` (float32, standardised per volume) and `DOMAIN/SUBJECT_label.nii.gz`, names that
    `inputs_from_folder` takes. In the prepared grid slices that preprocessing left out show background. In the raw
    grid, that of the scan, there are labels alone: the scan is there already.

    TFRecords: `DOMAIN_SPLIT/SUBJECT_NUMBER.tfrecords`, a slice each, and `DOMAIN_SPLIT.txt`, which lists them relative
    to the folder. Images stay standardised per volume; `export.json` has the training subjects' limits, which a
    reader that maps to [-1, 1] by fixed numbers must be given. `sifa_layout.records_from` finds the subjects with
    `^([st][0-9]+)_`, and a store made of the files has the same values to the bit.

    Files appear whole or not at all. Subjects are pseudonyms.

    Raises:
        InputError: a folder with something in it; TFRecords in the raw grid; damaged data.
    """
    folder = Path(folder)
    if format == "tfrecord" and grid == "raw":
        raise InputError("export", found="TFRecords in the raw grid", rule="they hold slices", remedy="take 'prepared'")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            folder,
            found="something there",
            rule="an export goes into a new or empty folder",
            remedy="name another, or empty it",
        )
    count = 0
    for done, entry in enumerate(store.entries, start=1):
        files = _tfrecords(store, entry, folder) if format == "tfrecord" else _nifti(store, entry, folder, grid)
        count += sum(1 for _ in files)
        if progress:
            progress(done, len(store.entries), entry.subject)
    if format == "tfrecord":
        _lists(store, folder)
    return count


def prepared_volume(slices: np.ndarray, record: Mapping[str, Any], missing: float) -> Volume:
    """Put kept slices (n, y, x) into the prepared grid; those that preprocessing left out are `missing` throughout."""
    geometry = Geometry.from_dict(record["prepared"])
    voxels = np.full(geometry.size[::-1], missing, dtype=slices.dtype)
    voxels[record["slices"]] = slices
    return Volume(voxels, geometry)


def _nifti(store: Store, entry: Entry, folder: Path, grid: Grid) -> Iterator[Path]:
    record, stem = store.record(entry), folder / entry.domain / entry.subject
    stem.parent.mkdir(parents=True, exist_ok=True)
    if grid == "prepared":
        image = store.read(entry, "image").astype(np.float32)
        yield _whole(prepared_volume(image, record, record["background"]), stem.with_name(f"{stem.name}.nii.gz"))
    if entry.labelled:
        label = store.read(entry, "label")
        back = restore(label, record) if grid == "raw" else prepared_volume(label, record, 0)
        yield _whole(back, stem.with_name(f"{stem.name}_label.nii.gz"))


def _tfrecords(store: Store, entry: Entry, folder: Path) -> Iterator[Path]:
    image = store.read(entry, "image")
    label = store.read(entry, "label") if entry.labelled else None
    part = folder / f"{entry.domain}_{entry.split}"
    part.mkdir(parents=True, exist_ok=True)
    for number in range(entry.slices):
        file = part / f"{entry.subject}_{number:04d}.tfrecords"
        tfrecord.write(file, [sifa_layout.encode(image, label, number)])
        yield file


def _lists(store: Store, folder: Path) -> None:
    """Write the lists of files, and what a reader must know."""
    for part in sorted(folder.iterdir()):
        names = sorted(f"{part.name}/{file.name}\n" for file in part.iterdir())
        _text(folder / f"{part.name}.txt", "".join(names))
    facts = {
        "classes": store.classes,
        "fingerprint": store.fingerprint,
        "limits": {domain: list(store.limits(domain)) for domain in DOMAINS},
        "values": "standardised per volume; the limits are the training subjects' smallest and largest",
    }
    _text(folder / "export.json", json.dumps(facts, indent=1) + "\n")


def _whole(volume: Volume, path: Path) -> Path:
    partial = path.with_name(f".partial-{path.name}")  # the ending tells the format
    write(volume, partial)
    os.replace(partial, path)
    return path


def _text(path: Path, text: str) -> None:
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
