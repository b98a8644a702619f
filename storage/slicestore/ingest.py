"""From raw images to a store: check everything, prepare what is new, commit volume by volume.

Knows who a subject is and in what order things are written; knows nothing of tables, voxels or codecs. Work on volumes
is spread by whoever calls; one volume at a time and process is in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from slicestore import volume, writer
from slicestore.errors import InputError
from slicestore.inputs import Input, check
from slicestore.labels import class_indices
from slicestore.layout import DOMAINS, SCHEMA, Domain, group_name
from slicestore.place import Folder, Place
from slicestore.preprocess import prepare, without_brain
from slicestore.settings import Prepared, Preprocessing
from slicestore.splits import Part, split
from slicestore.spread import Spread, here
from slicestore.store import Store

Progress = Callable[[int, int, str], None]
"""Called with volumes done, volumes in all, and what happened to the last one."""
OBLIQUE_DEGREES = 15.0
"""Axes further than this from the patient's are worth a word: slices are then not what a reader takes them for."""


class Raw(Protocol):
    """What every kind of raw volume says of itself."""

    @property
    def domain(self) -> Domain:
        """Source or target."""
        ...

    @property
    def subject(self) -> str:
        """The user's own name; it stays out of the store."""
        ...


R = TypeVar("R", bound=Raw)


@dataclass(frozen=True, slots=True)
class Kind(Generic[R]):
    """How one kind of raw volume is read. Functions of a module, so that they can be pickled."""

    files: Callable[[R], Mapping[str, str | None]]
    """Its files by role, for messages and the key file: "image" at least."""
    digests: Callable[[R, Preprocessing], Mapping[str, str | None]]
    """Hashes of the bytes that decide what comes of it, by role: "image" at least."""
    examine: Callable[[R, Preprocessing], None]
    """Read it to the end for its errors alone."""
    prepare: Callable[[R, Preprocessing], Prepared]
    """Make its slices."""


@dataclass(frozen=True, slots=True)
class _Task(Generic[R]):
    """One raw volume on its way into the store; plain data that another process can take."""

    raw: R
    kind: Kind[R]
    config: Preprocessing
    place: Place
    pseudonym: str = ""
    key: str = ""

    def __str__(self) -> str:
        return self.kind.files(self.raw)["image"] or "volume"

    @property
    def group(self) -> str:
        return group_name(self.raw.domain, self.pseudonym, self.key)


def ingest(
    inputs: Sequence[Input],
    store: str | Path,
    config: Preprocessing,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    key_file: Path | None = None,
    spread: Spread = here,
) -> Store:
    """Make or update a store from raw images.

    All inputs are checked by their headers, and new ones read to the end, before anything is written. A volume whose
    bytes and preprocessing are unchanged is kept, so that a second call does nothing and one after a crash goes on
    where the first stopped. The map from pseudonym to subject and files goes to `key_file`, readable by its owner
    alone: by default `<store>.key.json` beside a folder, and `<bucket>--<prefix>.key.json` in the working folder for a
    store in S3. Of a subject that left only its number stays in it, so that nobody else is given it.

    Args:
        inputs: the whole cohort; what the store has beyond it is dropped.
        store: folder or `s3://bucket/prefix`.
        config: what preprocessing is told.
        seed: of the split.
        progress: told of every volume as it is done.
        key_file: see above.
        spread: how the work on volumes is spread, see `slicestore.spread`.

    Raises:
        InputError: an input breaks a rule, the place holds something else or cannot be written to, or another ingest
            is at work on it.
    """
    check(inputs)
    return assemble(inputs, IMAGES, store, config, seed=seed, progress=progress, key_file=key_file, spread=spread)


def assemble(
    raws: Sequence[R],
    kind: Kind[R],
    store: str | Path,
    config: Preprocessing,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    key_file: Path | None = None,
    spread: Spread = here,
) -> Store:
    """Make or update a store from raw volumes of any kind; as `ingest`, which checks images first."""
    place = Place.at(store)
    path = _key_file(place, key_file)
    tasks = [_Task(raw, kind, config, place) for raw in raws]
    keys = _keys(tasks, spread)
    with place.lock():
        known = {group.rpartition("-")[2] for group in writer.committed_groups(place)}
        new = [task for task, key in zip(tasks, keys, strict=True) if key[:12] not in known]
        for _ in _each(spread, _examine, new):
            pass
        before = _known(path)
        writer.create(place)
        named = _pseudonyms(before, tasks)
        _write_key(path, {**before, **named})  # while the old manifest stands, its subjects keep their names
        plan = [_Task(raw, kind, config, place, name, key) for raw, name, key in zip(raws, named, keys, strict=True)]
        writer.sweep(place, lambda group: True)
        commits = _committed(place, sorted(plan, key=lambda task: task.group), progress, spread)
        _hold_classes(plan, commits)
        writer.finish(place, commits, _splits(plan, seed), config, seed)
        _write_key(path, {name: {"domain": facts["domain"]} for name, facts in before.items()} | named)
    return Store.open(store)


# --- images -----------------------------------------------------------------------------------------------------------


def _image_files(raw: Input) -> dict[str, str | None]:
    paths = {"image": raw.image, "label": raw.label, "brain": raw.brain}
    told = {role: str(path.resolve()) if path else None for role, path in paths.items()}
    return told if raw.component is None else told | {"component": str(raw.component)}


def _image_digests(raw: Input, config: Preprocessing) -> dict[str, str | None]:
    return {
        "image": volume.digest(raw.image, raw.component),
        "label": volume.digest(raw.label) if raw.label else None,
        "brain": volume.digest(raw.brain) if raw.brain and _needs_brain(raw, config) else None,
    }


def _examine_image(raw: Input, config: Preprocessing) -> None:
    """Better a second's reading twice than half a cohort."""
    volume.read(raw.image, raw.component)
    if raw.label is not None:
        class_indices(volume.read(raw.label).voxels, raw.label, config.brain_class)
    if _needs_brain(raw, config):
        if raw.brain is None:
            raise without_brain(config, raw.image)
        volume.read(raw.brain)


def _prepare_image(raw: Input, config: Preprocessing) -> Prepared:
    label = volume.read(raw.label) if raw.label else None
    if raw.domain == "target" and config.slices == "foreground":  # a target's label may judge, and never teach
        config = replace(config, slices="tissue")
    brain = volume.read(raw.brain) if raw.brain and _needs_brain(raw, config) else None
    return prepare(volume.read(raw.image, raw.component), label, config, brain=brain, where=raw.image)


def _needs_brain(raw: Input, config: Preprocessing) -> bool:
    return config.needs_brain(labelled=raw.label is not None)


IMAGES: Kind[Input] = Kind(_image_files, _image_digests, _examine_image, _prepare_image)
"""Image files and DICOM folders."""


# --- work that is spread ----------------------------------------------------------------------------------------------


def _each(
    spread: Spread, work: Callable[[_Task[R]], Any], tasks: Sequence[_Task[R]]
) -> Generator[tuple[int, Any], None, None]:
    """Do the work on every task; number and result of each, as they finish. Closing it ends the work."""
    yield from spread(_work, [_Numbered(work, number, task) for number, task in enumerate(tasks)])


@dataclass(frozen=True, slots=True)
class _Numbered:
    """A task that finds its way back: results come in any order."""

    work: Callable[[Any], Any]
    number: int
    task: _Task[Any]

    def __str__(self) -> str:
        return str(self.task)


def _work(item: _Numbered) -> tuple[int, Any]:
    return item.number, item.work(item.task)


def _digest(task: _Task[R]) -> Mapping[str, str | None]:
    return task.kind.digests(task.raw, task.config)


def _examine(task: _Task[R]) -> None:
    task.kind.examine(task.raw, task.config)


def _make(task: _Task[R]) -> dict[str, Any]:
    prepared = task.kind.prepare(task.raw, task.config)
    return writer.write_volume(
        task.place, prepared, domain=task.raw.domain, subject=task.pseudonym, key=task.key, settings=task.config
    )


# --- steps of an ingest -----------------------------------------------------------------------------------------------


def _keys(tasks: Sequence[_Task[R]], spread: Spread) -> list[str]:
    """Name each volume's content: raw bytes and preprocessing, on any machine.

    Raises:
        InputError: one image given for two subjects of a domain, which would leak between splits.
    """
    digests = dict(_each(spread, _digest, tasks))
    keys: list[str] = []
    seen: dict[tuple[str, str | None], _Task[R]] = {}
    for number, task in enumerate(tasks):
        found = digests[number]
        twin = seen.setdefault((task.raw.domain, found["image"]), task)
        if twin is not task:
            raise InputError(
                task,
                found=f"the same bytes as {twin}, for subjects {twin.raw.subject!r} and {task.raw.subject!r}",
                rule="an image belongs to one subject, or it could be trained on and tested on",
                remedy="leave one of them out",
            )
        told = {"schema": SCHEMA, "preprocessing": task.config.fingerprint, **found}
        keys.append(hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest())
    return keys


def _key_file(place: Place, given: Path | None) -> Path:
    """Where the pseudonyms' key lies; each store has its own, and none in the store.

    Raises:
        InputError: it was asked for inside the store.
    """
    if not isinstance(place, Folder):
        return given or Path.cwd() / f"{place.url.removeprefix('s3://').replace('/', '--')}.key.json"
    path = given or place.path.with_name(f"{place.name}.key.json")
    if path.resolve().is_relative_to(place.path.resolve()):
        raise InputError(
            path,
            found="a key file inside the store",
            rule="names never lie with slices",
            remedy="put it elsewhere, or let it lie beside the store",
        )
    return path


Facts = dict[str, Any]


def _known(path: Path) -> dict[str, Facts]:
    """Read what a key file says of each pseudonym; nothing where there is none.

    Raises:
        InputError: it is damaged.
    """
    try:
        known: dict[str, Facts] = json.loads(bytes(Folder(path.resolve().parent).get(path.name)))
        if all(facts["domain"] in DOMAINS for facts in known.values()):
            return known
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError, KeyError):
        pass
    raise InputError(
        path,
        found="a damaged key file",
        rule="it maps pseudonyms to subjects",
        remedy="restore it from a backup, or delete it to have the subjects numbered anew",
    )


def _pseudonyms(known: Mapping[str, Facts], tasks: Sequence[_Task[R]]) -> dict[str, Facts]:
    """Name each input, in the order of the tasks: as the key file does, and what is new by the lowest free number.

    A number is never given to a second subject: pictures and reports of the first may still be about.
    """
    names = {(facts["domain"], facts["subject"]): name for name, facts in known.items() if "subject" in facts}
    taken = set(known)
    for who in sorted((task.raw.domain, task.raw.subject) for task in tasks):
        free = (f"{who[0][0]}{number:03d}" for number in itertools.count())
        names.setdefault(who, next(name for name in free if name not in taken))
        taken.add(names[who])
    return {
        names[task.raw.domain, task.raw.subject]: {
            "domain": task.raw.domain,
            "subject": task.raw.subject,
            **task.kind.files(task.raw),
        }
        for task in tasks
    }


def _write_key(path: Path, table: Mapping[str, Facts]) -> None:
    """Put the key file, for its owner alone; one that says the same already is left as it is."""
    beside, data = Folder(path.resolve().parent), (json.dumps(table, indent=1, sort_keys=True) + "\n").encode()
    with suppress(FileNotFoundError):
        if bytes(beside.get(path.name)) == data:
            return
    beside.put(path.name, data, private=True)


def _committed(
    place: Place, plan: Sequence[_Task[R]], progress: Progress | None, spread: Spread
) -> dict[str, Mapping[str, Any]]:
    """Keep what is there and make what is not; commit records by group."""
    commits: dict[str, Mapping[str, Any]] = {}

    def done(task: _Task[R], commit: Mapping[str, Any], what: str) -> None:
        commits[task.group] = commit
        if progress:
            degrees = commit["record"].get("oblique_degrees") or 0.0
            note = f"; its axes are {degrees:.0f} degrees off the patient's" if degrees > OBLIQUE_DEGREES else ""
            progress(len(commits), len(plan), f"{task.pseudonym} {what}{note}")

    missing = []
    for task in plan:
        if commit := writer.committed(place, task.group):
            done(task, commit, "kept")
        else:
            missing.append(task)
    with closing(_each(spread, _make, missing)) as results:  # or processes would work on when `progress` raises
        for number, commit in results:
            done(missing[number], commit, "made")
    return commits


def _hold_classes(plan: Sequence[_Task[R]], commits: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold that labels have classes to learn, and the same in both domains.

    Raises:
        InputError: source labels have no foreground or leave out a class, or a target label has a class that they lack.
    """
    found = [(task, commits[task.group]["classes"]) for task in plan]
    brain_class = plan[0].config.brain_class
    classes = max(number for task, number in found if task.raw.domain == "source")
    if classes < 2:
        raise InputError(
            next(_label(task) for task in plan if task.raw.domain == "source"),
            found="nothing but background in any source label",
            rule="the segmenter needs a foreground to learn",
            remedy="check that these are the masks",
        )
    shown = np.zeros(classes - 1)
    for task, number in found:
        if task.raw.domain == "source":
            shown[: number - 1] += commits[task.group]["record"]["label"]["volume_mm3"]["before"]
    if empty := (np.flatnonzero(shown == 0) + 1).tolist():
        raise InputError(
            next(_label(task) for task, number in found if task.raw.domain == "source" and number == classes),
            found=f"class {classes - 1}, but no voxel of class {', '.join(map(str, empty))} in any source label",
            rule="classes are numbered 0, 1, ... without a gap, because each takes a channel of the networks",
            remedy="renumber the classes" + (f", or take a brain_class below {brain_class}" if brain_class > 2 else ""),
        )
    for task, number in found:
        if number > classes:
            raise InputError(
                _label(task),
                found=f"class {number - 1}",
                rule=f"a target label has the source's classes, 0 to {classes - 1}",
                remedy="renumber its classes",
            )


def _label(task: _Task[R]) -> str:
    return task.kind.files(task.raw).get("label") or str(task)


def _splits(plan: Sequence[_Task[R]], seed: int) -> dict[str, Part]:
    """Split each domain by its users' subject names, so that a patient named alike in both lands alike."""
    parts: dict[str, Part] = {}
    for domain in DOMAINS:
        groups = {task.raw.subject: task.group for task in plan if task.raw.domain == domain}
        parts |= {groups[subject]: part for subject, part in split(groups, seed=seed).items()}
    return parts
