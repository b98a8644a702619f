"""The writing side of a store: volumes one by one, each committed when all of it is there, and the manifest at the end.

Knows Zarr, codecs and the order of writing; knows nothing of raw images or of who a subject is. zarr-python encodes a
volume in memory and its objects are put one by one, so that what a crash leaves depends on `Place` alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from slicestore.layout import (
    ARRAYS,
    AXES,
    DOMAINS,
    MANIFEST,
    NAMES,
    ROOT,
    UNLABELLED,
    ArrayName,
    Domain,
    commit_name,
    group_name,
    group_of,
    root_attributes,
    volume_attributes,
)
from slicestore.manifest import Entry, Manifest, check_schema, name_content, to_json
from slicestore.place import Place
from slicestore.settings import Prepared, Preprocessing
from slicestore.splits import Part


def create(place: Place) -> None:
    """Make an empty store where there is nothing, or complete and keep the one that is there.

    Raises:
        InputError: the place holds something else, or a store of another schema.
    """
    if place.kind() in ("nothing there", "an empty folder"):
        place.put(ROOT, _group(root_attributes()))
    check_schema(place)
    for domain in DOMAINS:
        _put_changed(place, f"{domain}/{ROOT}", _group({}))


def write_volume(
    place: Place, prepared: Prepared, *, domain: Domain, subject: str, key: str, settings: Preprocessing
) -> dict[str, Any]:
    """Write one volume and then its commit record, which it returns; killed midway it leaves nothing that counts."""
    group, record, label = group_name(domain, subject, key), prepared.record, prepared.record["label"]
    encoded = {f"{group}/{ROOT}": _group(volume_attributes(domain, subject, key, settings, record))}
    arrays = {}
    for name, voxels in zip(NAMES, (prepared.image, prepared.label, prepared.fraction), strict=True):
        if voxels is not None:
            objects = _encode(name, voxels)
            metadata = json.loads(objects[ROOT])
            arrays[name] = {part: value for part, value in metadata.items() if part != "attributes"}
            encoded |= {f"{group}/{name}/{part}": data for part, data in objects.items()}
    for path, data in encoded.items():
        place.put(path, data)
    commit = {
        "domain": domain,
        "subject": subject,
        "key": key,
        "group": group,
        "slices": len(prepared.image),
        "labelled": label is not None,
        "evaluation_only": label is not None and domain == "target",
        "classes": label["classes"] if label else 0,
        **{number: record[number] for number in ("minimum", "maximum", "percentiles", "mean", "std")},
        "arrays": arrays,
        "record": record,
        "objects": {
            path: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in encoded.items()
        },
    }
    place.put(commit_name(group), to_json(commit))
    return commit


def committed(place: Place, group: str) -> dict[str, Any] | None:
    """Read the commit record of a volume if all of it is there, byte for byte; otherwise None."""
    try:
        commit: dict[str, Any] = json.loads(bytes(place.get(commit_name(group))))
        intact = all(
            hashlib.sha256(place.get(name)).hexdigest() == facts["sha256"] for name, facts in commit["objects"].items()
        )
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return None
    return commit if intact else None


def committed_groups(place: Place) -> set[str]:
    """Name the groups of all volumes with a commit record."""
    return {group_of(name) for name in place.sizes("commits") if name.endswith(".json")}


def finish(
    place: Place,
    commits: Mapping[str, Mapping[str, Any]],
    splits: Mapping[str, Part],
    settings: Preprocessing,
    seed: int,
) -> Manifest:
    """Write the manifest over committed volumes, given by group, then drop every volume that it does not name."""
    names = {item.name for item in fields(Entry)} - {"split", "objects"}
    entries = tuple(
        Entry(
            split=splits[group],
            objects={name: facts["bytes"] for name, facts in commit["objects"].items()},
            **{name: commit[name] for name in names},
        )
        for group, commit in sorted(commits.items())
    )
    classes = max(entry.classes for entry in entries if entry.domain == "source")
    manifest = Manifest(entries, settings, classes, seed, name_content(entries, settings, seed))
    _put_changed(place, MANIFEST, manifest.to_bytes())
    sweep(place, lambda group: group in commits)
    return manifest


def sweep(place: Place, wanted: Callable[[str], bool]) -> None:
    """Remove what a killed ingest left (torn writes, groups without a commit record) and the groups not wanted."""
    groups = {name.rpartition("/")[0] for domain in DOMAINS for name in _below(place, domain)}
    done = committed_groups(place)
    kept = {group for group in done & groups if wanted(group)}
    place.delete(commit_name(group) for group in done - kept)  # first the promise, then what it promised
    place.delete([name for group in groups - kept for name in place.sizes(group)])
    place.tidy()


def _below(place: Place, domain: Domain) -> set[str]:
    """Name the folders in a domain, each with a `/x` after it."""
    parts = (name.split("/") for name in place.sizes(domain))
    return {f"{domain}/{part[1]}/x" for part in parts if len(part) > 2}


# --- encoding ---------------------------------------------------------------------------------------------------------


def _group(attributes: Mapping[str, Any]) -> bytes:
    """The `zarr.json` of a group."""
    objects: dict[str, Buffer] = {}
    zarr.create_group(store=MemoryStore(objects), attributes=dict(attributes))
    return objects[ROOT].to_bytes()


def _encode(name: ArrayName, voxels: np.ndarray) -> dict[str, bytes]:
    """An array's objects: metadata and one shard.

    lz4 without shuffle takes out the frame and the air and passes noise through. Against zstd-3 with shuffle, real
    images take a tenth more room, and are decoded some ten times and written twenty times as fast.
    """
    objects: dict[str, Buffer] = {}
    array = zarr.create_array(
        MemoryStore(objects),
        shape=voxels.shape,
        dtype=voxels.dtype,
        chunks=(1, *voxels.shape[1:]),
        shards=voxels.shape,
        fill_value=np.nan if name == "image" else UNLABELLED,
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle"), Crc32cCodec()],
        config={"write_empty_chunks": True},
        dimension_names=AXES,
        attributes=dict(ARRAYS[name]),
    )
    array[:] = voxels
    return {part: buffer.to_bytes() for part, buffer in sorted(objects.items())}


def _put_changed(place: Place, name: str, data: bytes) -> None:
    """Put an object unless it already says the same."""
    try:
        if bytes(place.get(name)) == data:
            return
    except FileNotFoundError:
        pass
    place.put(name, data)
