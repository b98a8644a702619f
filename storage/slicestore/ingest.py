"""From raw images to a store: check everything, prepare what is new, commit volume by volume.

Knows who a subject is and in what order things are written; knows nothing of tables, voxels or codecs.
"""

from __future__ import annotations

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
from slicestore.inputs import Input, check
from slicestore.preprocess import Preprocessing, prepare
from slicestore.splits import Part, split
from slicestore.store import DOMAINS, SCHEMA, Store, write_json
from slicestore.volume import read

Progress = Callable[[int, int, str], None]
"""Called with volumes done, volumes in all, and what happened to the last one."""


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
