"""Looks for damage in a store, finished or not, and changes nothing.

Knows every promise that a store makes; knows nothing of raw images or of how damage is mended.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slicestore import shards
from slicestore.errors import InputError
from slicestore.layout import DOMAINS, MANIFEST, ROOT, UNLABELLED, commit_name, group_of
from slicestore.manifest import Entry, Manifest, check_schema, read_manifest
from slicestore.place import PARTIAL, Place


@dataclass(frozen=True, slots=True)
class Report:
    """What a store holds and what is wrong with it."""

    where: str
    finished: bool
    """Whether it has a manifest; without one its ingest was interrupted, or is at work."""
    volumes: int
    """In the manifest, or committed so far."""
    slices: int
    objects: int
    bytes: int
    """Of everything that lies there."""
    deep: bool
    """Whether every byte was read, or names and sizes only."""
    problems: tuple[str, ...]
    """Broken promises, each with subject and slice where it has any."""
    leftovers: tuple[str, ...]
    """What an interrupted ingest left, or one at work has not promised yet: no damage, and swept by the next one."""

    @property
    def intact(self) -> bool:
        """Whether no promise is broken."""
        return not self.problems


def verify(url: str | Path, *, deep: bool = True) -> Report:
    """Check everything that a store promises, and collect all that is wrong.

    Names and sizes; with `deep` also every object's sha256, every chunk's crc32c, every array's shape, type and values,
    and that groups, commit records and manifest say the same.

    Raises:
        InputError: there is no store, or one of another schema, or it cannot be read at all.
    """
    place = Place.at(url)
    check_schema(place)
    sizes = place.sizes()
    problems: list[str] = []
    manifest = None
    if MANIFEST in sizes:
        try:
            manifest = read_manifest(place)
        except InputError as error:
            problems.append(f"{MANIFEST}: {error.found}; {error.rule}")
    entries = {entry.group: entry for entry in manifest.entries} if manifest else {}
    commits, damaged = _commits(place, sizes)
    problems += damaged
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checks = pool.map(
            lambda group: list(_volume(place, group, commits.get(group), entries.get(group), sizes, deep)),
            sorted(commits.keys() | entries.keys()),
        )
        problems += [problem for found in checks for problem in found]
    unknown, leftovers = _others(sizes, commits, entries, manifest)
    counted = entries.values() or commits.values()
    return Report(
        where=str(place),
        finished=MANIFEST in sizes,
        volumes=len(counted),
        slices=sum(item.slices if isinstance(item, Entry) else item["slices"] for item in counted),
        objects=len(sizes),
        bytes=sum(sizes.values()),
        deep=deep,
        problems=(*problems, *unknown),
        leftovers=tuple(leftovers),
    )


def _commits(place: Place, sizes: Mapping[str, int]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Commit records by group, and what is wrong with those that cannot be read."""
    found, problems = {}, []
    for name in sizes:
        if name.startswith("commits/") and name.endswith(".json"):
            try:
                commit = json.loads(bytes(place.get(name)))
                if commit["group"] != group_of(name):
                    raise ValueError(f"it is that of {commit['group']}")
                found[commit["group"]] = commit
            except FileNotFoundError:
                continue  # an ingest at work has just removed it
            except (ValueError, KeyError, TypeError) as error:
                problems.append(f"{name}: damaged ({error})")
    return found, problems


def _volume(
    place: Place,
    group: str,
    commit: Mapping[str, Any] | None,
    entry: Entry | None,
    sizes: Mapping[str, int],
    deep: bool,
) -> Iterator[str]:
    """What is wrong with one volume."""
    subject = entry.subject if entry else group.partition("/")[2].partition("-")[0]
    who = f"{group.partition('/')[0]} subject {subject}"
    promised = entry.objects if entry else {}
    if commit is None:
        yield f"{who}: the manifest names it, and its commit record is missing or damaged"
    else:
        if entry and (differing := _differing(commit, entry)):
            yield f"{who}: commit record and manifest differ in {', '.join(differing)}"
        promised = {name: facts["bytes"] for name, facts in commit["objects"].items()}
    for name, size in promised.items():
        if name not in sizes:
            yield f"{who}: {name} is missing"
        elif sizes[name] != size:
            yield f"{who}: {name} has {sizes[name]} bytes instead of {size}"
    if deep and commit is not None:
        yield from (f"{who}: {problem}" for problem in _content(place, commit, sizes))


def _differing(commit: Mapping[str, Any], entry: Entry) -> list[str]:
    told = {name: getattr(entry, name) for name in Entry.__slots__ if name not in ("split", "objects")}
    differing = [name for name, value in told.items() if commit.get(name) != value]
    if {name: facts["bytes"] for name, facts in commit["objects"].items()} != entry.objects:
        differing.append("objects")
    return differing


def _content(place: Place, commit: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[str]:
    """What is wrong with the bytes of a volume's objects, one object at a time."""
    group = commit["group"]
    for name, facts in commit["objects"].items():
        if name not in sizes:
            continue  # told already
        try:
            data = place.get(name)
        except (FileNotFoundError, InputError) as error:
            yield f"{name}: {error.found if isinstance(error, InputError) else 'gone while this was at work'}"
            continue
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            yield f"{name} is not what was written (sha256)"
        part = name.removeprefix(f"{group}/")
        try:
            if part == ROOT:
                yield from _attributes(json.loads(bytes(data))["attributes"], commit)
            elif part.endswith(f"/{ROOT}"):
                metadata = json.loads(bytes(data))
                metadata.pop("attributes", None)
                if metadata != commit["arrays"][part.partition("/")[0]]:
                    yield f"{name}: its commit record tells another format"
            else:
                yield from _voxels(data, part.partition("/")[0], commit)
        except shards.Damaged as error:
            yield f"{name}: {error}"
        except (ValueError, KeyError, TypeError) as error:
            yield f"{name}: damaged metadata ({error})"


def _attributes(found: Mapping[str, Any], commit: Mapping[str, Any]) -> Iterator[str]:
    for name in ("domain", "subject", "key", "record"):
        if found.get(name) != commit[name]:
            yield f"its group's attributes and its commit record differ in {name}"


def _voxels(data: memoryview, name: str, commit: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a shard, slice by slice: a slice, not a volume, is in memory."""
    form = shards.Format.of(commit["arrays"][name])
    if form.slices != commit["slices"] or form.dtype != (np.float16 if name == "image" else np.uint8):
        yield f"{name} is {form.dtype} of {form.slices} slices; {commit['slices']} slices were committed"
    reader = shards.SliceReader(lambda start, length: data[start : start + length], len(data), form, Place.block)
    out = np.empty(form.shape[1:], dtype=form.dtype)
    broken: dict[int, str] = {}
    for number in range(form.slices):
        try:
            reader.slice(number, out)
        except shards.Damaged as error:
            broken |= error.slices
            continue
        if name == "image" and not np.isfinite(out).all():
            broken[number] = "has values that are not finite"
        elif name == "label" and int(out.max()) >= max(1, commit["classes"]):
            kind = "is missing" if out.max() == UNLABELLED else f"has class {out.max()}"
            broken[number] = f"{kind}; classes are below {commit['classes']}"
    if broken:
        yield f"{name}: {shards.tell(broken, commit['record']['slices'])}"


def _others(
    sizes: Mapping[str, int],
    commits: Mapping[str, Mapping[str, Any]],
    entries: Mapping[str, Entry],
    manifest: Manifest | None,
) -> tuple[list[str], list[str]]:
    """Objects that nobody promised: problems where no ingest would have made them, leftovers otherwise."""
    known = {ROOT, MANIFEST, *(f"{domain}/{ROOT}" for domain in DOMAINS)}
    known |= {commit_name(group) for group in commits} | {name for entry in entries.values() for name in entry.objects}
    known |= {name for commit in commits.values() for name in commit["objects"]}
    groups = {*commits, *entries}
    problems, leftovers = [], []
    if manifest:
        missing = [f"{domain}/{ROOT}" for domain in DOMAINS if f"{domain}/{ROOT}" not in sizes]
        problems += [f"{name} is missing" for name in missing]
        leftovers += [f"{group} (committed, and not in the manifest)" for group in commits if group not in entries]
    torn: set[str] = set()
    for name in sizes:
        parts = name.split("/")
        group = "/".join(parts[:2])
        if name in known:
            continue
        if PARTIAL.match(name):
            leftovers.append(f"{name} (a write that was broken off)")
        elif parts[0] in DOMAINS and len(parts) > 2 and group not in groups:
            torn.add(group)
        elif not (parts[0] == "commits" and name.endswith(".json")):  # a damaged commit record has been told
            problems.append(f"{name}: no part of a store")
    return problems, leftovers + [f"{group} (not committed)" for group in sorted(torn)]
