"""From raw images to a store: check everything, prepare what is new, commit volume by volume.

Knows files, tables, who a subject is and in what order things are written; knows nothing of voxels or codecs.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicestore import store as files
from slicestore.errors import InputError
from slicestore.preprocess import Preprocessing, check_grids, prepare
from slicestore.splits import Part, split
from slicestore.store import DOMAINS, SCHEMA, Domain, Store, write_json
from slicestore.volume import SUFFIXES, inspect, read

LABEL_ENDINGS = ("label", "seg", "mask")
"""What a label's file name adds to its image's, after an underscore."""

Progress = Callable[[int, int, str], None]
"""Called with volumes done, volumes in all, and what happened to the last one."""


@dataclass(frozen=True, slots=True)
class Input:
    """One raw volume."""

    domain: Domain
    subject: str
    """The user's own name of the subject; it stays out of the store."""
    image: Path
    label: Path | None = None


@dataclass(frozen=True, slots=True)
class _Planned:
    """An input with its pseudonym and the key that names its content."""

    input: Input
    pseudonym: str
    key: str

    @property
    def group(self) -> str:
        return files.group_name(self.input.domain, self.pseudonym, self.key)


def ingest(
    inputs: Sequence[Input],
    store: str | Path,
    config: Preprocessing,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Store:
    """Make or update a store from raw volumes.

    All inputs are checked by their headers, and new ones read to the end, before anything is written. A volume whose
    bytes and preprocessing are unchanged is kept, so that a second call does nothing and one after a crash goes on
    where the first stopped. The map from pseudonym to subject and files goes to `<store>.key.json` beside the store,
    readable by its owner alone.

    Raises:
        InputError: an input breaks a rule, the path holds something else, or another ingest is at work on it.
    """
    store = Path(store).resolve()
    check(inputs)
    keys = _keys(inputs, config)
    store.parent.mkdir(parents=True, exist_ok=True)
    with _alone(store):
        known = files.committed_keys(store)
        for raw in (raw for raw, key in zip(inputs, keys, strict=True) if key[:12] not in known):
            _examine(raw)
        files.create(store)
        names = _pseudonyms(store.with_name(f"{store.name}.key.json"), inputs)
        plan = sorted(map(_Planned, inputs, names, keys), key=lambda item: item.group)
        files.sweep(store, lambda group: True)
        commits = {}
        for done, item in enumerate(plan, start=1):
            kept = files.committed(store, item.group)
            commits[item] = kept or _make(store, item, config)
            if progress:
                progress(done, len(plan), f"{item.pseudonym} {'kept' if kept else 'made'}")
        classes = _classes({item: commit["classes"] for item, commit in commits.items()})
        files.finish(store, _splits(plan, seed), config, classes=classes, seed=seed)
    return Store.open(store)


def check(inputs: Sequence[Input]) -> None:
    """Find what is wrong with a cohort without reading a voxel.

    Raises:
        InputError: an unknown domain, a subject twice, a domain without volumes, a source volume without a label, a
            file that is missing or not 3D, a label on another grid than its image.
    """
    seen: set[tuple[str, str]] = set()
    for item in inputs:
        if item.domain not in DOMAINS:
            raise InputError(
                item.image,
                found=f"domain {item.domain!r}",
                rule="a domain is 'source' or 'target'",
                remedy="'source' is the labelled modality, 'target' the one to be segmented",
            )
        if (item.domain, item.subject) in seen:
            raise InputError(
                item.image,
                found=f"a second {item.domain} volume of subject {item.subject!r}",
                rule="a subject has one volume in a domain",
                remedy="keep one of them, or name them apart",
            )
        seen.add((item.domain, item.subject))
    for domain in DOMAINS:
        if not any(item.domain == domain for item in inputs):
            raise InputError(
                "cohort",
                found=f"no {domain} volume among {len(inputs)}",
                rule="a cohort has at least one volume in each domain",
                remedy=f"add {domain} images",
            )
    bare = [item.image for item in inputs if item.domain == "source" and item.label is None]
    if bare:
        sources = sum(item.domain == "source" for item in inputs)
        raise InputError(
            bare[0],
            found=f"no label for {len(bare)} of {sources} source volumes",
            rule="every source volume has a label, because the segmenter learns from nothing else",
            remedy="name its label in the table or by its ending (IMAGE_label.nii.gz), or leave it out",
        )
    for item in inputs:
        grid = inspect(item.image)
        if item.label is not None:
            check_grids(grid, inspect(item.label), item.label)


def inputs_from_table(path: str | Path, mask: str | None = None) -> list[Input]:
    """Read a CSV (comma or semicolon) or TSV with columns subject, domain, image and one of label paths.

    Args:
        path: the table; paths in it are relative to its folder.
        mask: the column of the labels, such as "brain" or "vessel"; "label" by default. A cell may be empty.

    Raises:
        InputError: no such file, a missing column, an empty cell, an unknown domain, a subject twice in a domain, no
        rows.
    """
    path, column = Path(path), mask or "label"
    rows = _rows(path, ("subject", "domain", "image", column))
    inputs: dict[tuple[str, str], Input] = {}
    for line, row in rows:
        where, subject, domain = f"{path}, line {line}", row["subject"], row["domain"].lower()
        empty = [name for name in ("subject", "domain", "image") if not row[name]]
        if empty:
            raise InputError(
                where,
                found=f"an empty {empty[0]}",
                rule="every row names subject, domain and image",
                remedy="fill the cell or delete the row",
            )
        if domain not in DOMAINS:
            raise InputError(
                where,
                found=f"domain {row['domain']!r}",
                rule="a domain is 'source' or 'target'",
                remedy="'source' is the labelled modality, 'target' the one to be segmented",
            )
        if (domain, subject) in inputs:
            raise InputError(
                where,
                found=f"subject {subject!r} a second time in domain {domain}",
                rule="a subject has one volume in a domain",
                remedy="keep one row, or name them apart",
            )
        label = path.parent / row[column] if row[column] else None
        inputs[domain, subject] = Input(domain, subject, path.parent / row["image"], label)
    return list(inputs.values())


def inputs_from_folder(folder: str | Path, domain: Domain, *, mask: str | None = None) -> list[Input]:
    """Take every image in a folder as a subject named like the file.

    A file is the label of the image whose name it continues by `_label`, `_seg` or `_mask`; with `mask`, by `_` and
    `mask` alone, and files that end in the other three are left aside.

    Raises:
        InputError: no such folder, no images in it, two of one name, a label without an image, or two labels for one.
    """
    folder = Path(folder)
    named = _images(folder)
    endings = (mask,) if mask else LABEL_ENDINGS
    labels = {stem: stem[: -len(end) - 1] for stem in named for end in endings if stem.endswith(f"_{end}")}
    others = {stem for stem in named for end in LABEL_ENDINGS if stem.endswith(f"_{end}")}
    images = {stem: file for stem, file in named.items() if stem not in labels and stem not in others}
    for label, stem in labels.items():
        if stem not in images:
            raise InputError(
                named[label],
                found=f"no image {stem!r} beside it",
                rule="a label is named like its image, with an ending",
                remedy="rename it, or use a table",
            )
    inputs = []
    for stem, image in images.items():
        own = [named[label] for label, of in labels.items() if of == stem]
        if len(own) > 1:
            raise InputError(
                image,
                found=f"the labels {', '.join(file.name for file in own)}",
                rule="an image has one label",
                remedy="name the ending to use (`mask`), or use a table",
            )
        inputs.append(Input(domain, stem, image, own[0] if own else None))
    return inputs


def _images(folder: Path) -> dict[str, Path]:
    """Image files of a folder by name without suffix."""
    if not folder.is_dir():
        raise InputError(folder, found="no such folder", rule="images lie in a folder", remedy="check the path")
    named: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), None)
        if suffix is None or file.name.startswith(".") or not file.is_file():
            continue
        stem = file.name[: -len(suffix)]
        if stem in named:
            raise InputError(
                file,
                found=f"also {named[stem].name}",
                rule="a name stands for one image",
                remedy="remove one of the two, or use a table",
            )
        named[stem] = file
    if not named:
        raise InputError(
            folder,
            found="no image",
            rule=f"images end in one of {', '.join(SUFFIXES)}",
            remedy="check the path, or convert the images",
        )
    return named


def _rows(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Rows of a table with their line numbers, cells stripped, once the columns are known to be there."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            path,
            found=f"no readable text ({type(error).__name__})",
            remedy="check it, or save as CSV",
            rule="a table is a CSV or TSV in UTF-8",
        ) from None
    header = text.partition("\n")[0]
    delimiter = max("\t", ",", ";", key=header.count)
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter, restkey="", restval="")
    found = [name.strip() for name in reader.fieldnames or ()]
    missing = [name for name in columns if name not in found]
    if missing:
        raise InputError(
            path,
            found=f"columns {', '.join(found) or 'none'}",
            rule=f"a table has columns {', '.join(columns)}; {', '.join(missing)} missing",
            remedy="rename a column, or name the column of the labels (`mask`)",
        )
    reader.fieldnames = found
    rows = [(reader.line_num, {name: row[name].strip() for name in columns}) for row in reader]
    if not rows:
        raise InputError(path, found="no row", rule="a table has a row for each volume", remedy="add the volumes")
    return rows


# --- steps of an ingest -----------------------------------------------------------------------------------------------


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """Hold the store's lock, which the system drops with the process; a second ingest is refused, not queued."""
    path = store.with_name(f"{store.name}.lock")
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise InputError(
                store,
                found=f"another ingest at work on it (process {lock.read().strip() or 'unknown'})",
                rule="one ingest writes a store at a time",
                remedy="wait until it has finished",
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _keys(inputs: Sequence[Input], config: Preprocessing) -> list[str]:
    """Name each volume's content: raw bytes and preprocessing, on any machine.

    Raises:
        InputError: one image given for two subjects of a domain, which would leak between splits.
    """
    keys: list[str] = []
    seen: dict[tuple[str, str], Input] = {}
    for item in inputs:
        image = _digest(item.image)
        twin = seen.setdefault((item.domain, image), item)
        if twin is not item:
            raise InputError(
                item.image,
                found=f"the same bytes as {twin.image}",
                rule="an image belongs to one subject, or it could be trained on and tested on",
                remedy="leave one of them out",
            )
        told = {
            "schema": SCHEMA,
            "preprocessing": config.fingerprint,
            "image": image,
            "label": _digest(item.label) if item.label else None,
        }
        keys.append(hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest())
    return keys


def _digest(path: Path) -> str:
    """Hash of a file, or of what it holds where the voxels are in another file."""
    if path.suffix.lower() != ".mhd":
        return files.sha256(path)
    volume = read(path)
    return hashlib.sha256(json.dumps(volume.geometry.to_dict()).encode() + volume.voxels.tobytes()).hexdigest()


def _pseudonyms(path: Path, inputs: Sequence[Input]) -> list[str]:
    """Name each input: as the key file does, and what is new to it by the lowest free number in sorted order."""
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
        names = {(facts["domain"], facts["subject"]): name for name, facts in known.items()}
    except (ValueError, TypeError, AttributeError, KeyError):
        raise InputError(
            path,
            found="a damaged key file",
            rule="it maps pseudonyms to subjects",
            remedy="restore it from a backup, or delete it to have the subjects numbered anew",
        ) from None
    wanted = sorted((item.domain, item.subject) for item in inputs)
    names = {who: name for who, name in names.items() if who in wanted}
    for who in wanted:
        free = (f"{who[0][0]}{number:03d}" for number in itertools.count())
        names.setdefault(who, next(name for name in free if name not in names.values()))
    write_json(
        path,
        {
            names[item.domain, item.subject]: {
                "domain": item.domain,
                "subject": item.subject,
                "image": str(item.image.resolve()),
                "label": str(item.label.resolve()) if item.label else None,
            }
            for item in inputs
        },
        mode=0o600,
    )
    return [names[item.domain, item.subject] for item in inputs]


def _examine(item: Input) -> None:
    """Read a raw volume and its label for their errors alone: better a second's reading twice than half a cohort."""
    for path in (item.image, item.label):
        if path is not None:
            read(path)


def _make(store: Path, item: _Planned, config: Preprocessing) -> dict[str, Any]:
    raw = item.input
    label = read(raw.label) if raw.label else None
    prepared = prepare(read(raw.image), label, config, where=raw.image)
    return files.write_volume(
        store, prepared, domain=raw.domain, subject=item.pseudonym, key=item.key, preprocessing=config.fingerprint
    )


def _classes(found: Mapping[_Planned, int]) -> int:
    """Give the number of classes that the source labels have.

    Raises:
        InputError: they have no foreground, or a target label has a class that they lack.
    """
    classes = max(number for item, number in found.items() if item.input.domain == "source")
    if classes < 2:
        label = next(item.input.label for item in found if item.input.domain == "source")
        raise InputError(
            label,
            found="nothing but background in any source label",
            rule="the segmenter needs a foreground to learn",
            remedy="check that these are the masks",
        )
    for item, number in found.items():
        if number > classes:
            raise InputError(
                item.input.label,
                found=f"class {number - 1}",
                rule=f"a target label has the source's classes, 0 to {classes - 1}",
                remedy="renumber its classes",
            )
    return classes


def _splits(plan: Sequence[_Planned], seed: int) -> dict[str, Part]:
    """Split each domain by its users' subject names, so that a patient named alike in both lands alike."""
    parts: dict[str, Part] = {}
    for domain in DOMAINS:
        groups = {item.input.subject: item.group for item in plan if item.input.domain == domain}
        parts |= {groups[subject]: part for subject, part in split(groups, seed=seed).items()}
    return parts
