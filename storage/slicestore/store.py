"""A cohort of prepared volumes on disk: layout, codecs, the commit protocol and the reading of it.

Knows Zarr and JSON files; knows nothing of raw images, of who a subject is, or of networks.

    cohort.zarr/
      zarr.json                             root group; its attribute says that this is a store, and of which schema
      source/s000-3fa9c1d2e4b5/             one group per volume, named by pseudonym and content; never overwritten
        zarr.json                           domain, subject, preprocessing, the record that leads back to the raw grid
        image/ label/ fraction/             (slice, y, x): chunk = slice, shard = volume; blosc-zstd, then crc32c
      commits/source-s000-3fa9c1d2e4b5.json what was written, sizes and sha256; made when all of it is on the disk
      manifest.json                         volumes and their splits; written last of all, and all that readers trust

Shard = volume makes few files, whole-shard reads and one writer per shard (two would lose updates). Blosc alone lets
19 of 20 flipped bits pass, so each chunk ends in a crc32c. A lost shard reads as the fill value without an error, so
the fill values are ones that no chunk holds (NaN, 255), and empty chunks are written. Writing is temporary file,
fsync, rename; because a volume's group is named by its content, an old manifest stays true until the new one replaces
it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from slicestore.errors import InputError
from slicestore.preprocess import Prepared, Preprocessing
from slicestore.splits import Part

SCHEMA = 1
"""Version of the layout; a reader refuses every other."""
UNLABELLED = 255
"""Class index of pixels that nobody labelled; also the fill value of labels and fractions."""
REMEDY = "run `equipoise prepare` again with the same inputs: it mends what is missing and keeps the rest"

Domain = Literal["source", "target"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)
Limits = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One volume in the manifest."""

    domain: Domain
    subject: str
    """Pseudonym: s000, s001, ... in the source domain, t000, ... in the target domain."""
    split: Part
    slices: int
    labelled: bool
    evaluation_only: bool
    """The label may judge and never teach: true of every label in the target domain."""
    classes: int
    """Largest class index plus one; 0 without a label."""
    minimum: float
    """Of the prepared image without its frame, standardised units."""
    maximum: float
    mean: float
    """Of the resampled image in raw units, as is `std`."""
    std: float
    key: str
    """sha256 of what the volume was made from: raw bytes and preprocessing."""
    group: str
    """Path of its Zarr group in the store."""
    objects: Mapping[str, int]
    """Every file of the group, relative to the store, and its size in bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """All slices of one split of one domain, in memory."""

    image: np.ndarray
    """float16 (N, size, size), standardised per volume; finite. `normalise(image, limits)` makes it ready for a
    network."""
    label: np.ndarray | None
    """uint8 (N, size, size) class indices; None where no label may be seen. Slices of an unlabelled volume among
    labelled ones are `UNLABELLED` throughout."""
    subject: np.ndarray
    """int32 (N,), index into `entries`."""
    position: np.ndarray
    """int32 (N,), the slice's number in its volume's canonical grid, from the feet up."""
    entries: tuple[Entry, ...]
    limits: Limits
    """What `normalise` takes: smallest and largest standardised value among the training subjects."""


@dataclass(frozen=True, slots=True, eq=False)
class Store:
    """A finished store, opened for reading; everything in it was promised by its manifest."""

    path: Path
    entries: tuple[Entry, ...]
    """Sorted by domain and subject."""
    preprocessing: Preprocessing
    classes: int
    """Number of classes of the source labels, background included."""
    seed: int
    """Of the split."""
    fingerprint: str
    """sha256 over every volume's key, its split and the preprocessing: names the content on any machine."""

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Read the manifest and check that every object it promises is there with its size.

        Raises:
            InputError: no store, an unfinished one, one of another schema, or objects missing or cut short.
        """
        path = Path(path)
        data = _read_manifest(path)
        names = {field.name for field in fields(Entry)}
        entries = tuple(Entry(**{name: volume[name] for name in names}) for volume in data["volumes"])
        for entry in entries:
            _check_objects(path, entry)
        config = Preprocessing(**data["preprocessing"])
        return cls(path, entries, config, data["classes"], data["seed"], data["fingerprint"])

    @property
    def size(self) -> int:
        """Width and height of a slice in pixels."""
        return self.preprocessing.size

    def select(self, domain: Domain, split: Part | None = None) -> list[Entry]:
        """List the volumes of a domain, of one split or of all."""
        return [entry for entry in self.entries if entry.domain == domain and split in (None, entry.split)]

    def limits(self, domain: Domain, *, pooled: bool = False) -> Limits:
        """Give the smallest and largest standardised value among training subjects, of both domains when `pooled`."""
        train = [entry for name in (DOMAINS if pooled else (domain,)) for entry in self.select(name, "train")]
        return min(entry.minimum for entry in train), max(entry.maximum for entry in train)

    def stage(self, domain: Domain, split: Part, *, pooled: bool = False) -> Staged:
        """Read every slice of a split into memory, shard by shard, with all checksums verified.

        Labels of the target domain are for evaluation: the training split never hands them out. Without subjects in the
        split the arrays are empty. `pooled` chooses the limits, see `limits`.

        Raises:
            InputError: a damaged or missing chunk, naming the subject and, where it can be found, the slice.
        """
        entries, limits = self.select(domain, split), self.limits(domain, pooled=pooled)
        total = sum(entry.slices for entry in entries)
        labelled = any(entry.labelled for entry in entries) and not (domain == "target" and split == "train")
        image = np.empty((total, self.size, self.size), dtype=np.float16)
        label = np.full(image.shape, UNLABELLED, dtype=np.uint8) if labelled else None
        subject, position = np.empty(total, dtype=np.int32), np.empty(total, dtype=np.int32)
        start = 0
        for index, entry in enumerate(entries):
            rows = slice(start, start := start + entry.slices)
            record = self.record(entry)
            image[rows], subject[rows], position[rows] = self.read(entry, "image"), index, record["slices"]
            if self.preprocessing.pad == "zero":
                _fill_frame(image[rows], record, (limits[0] + limits[1]) / 2)
            if label is not None and entry.labelled:
                label[rows] = self.read(entry, "label")
        return Staged(image, label, subject, position, tuple(entries), limits)

    def read(self, entry: Entry, name: Literal["image", "label", "fraction"]) -> np.ndarray:
        """Read one whole array of one volume, verified.

        Raises:
            InputError: as `stage`.
        """
        where = f"{self.path}: {name} of {entry.domain} subject {entry.subject}"
        try:
            array = zarr.open_array(self.path / entry.group / name, mode="r")
            voxels = np.asarray(array[:])
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise InputError(
                where,
                found=f"damaged data ({_damaged(self.path / entry.group / name, entry.slices)})",
                rule="every chunk matches its checksum",
                remedy=REMEDY,
            ) from error
        if name == "fraction":  # 255 is a fraction too; a chunk lacks only where the index does, and that is checked
            return voxels
        corner = voxels[:, 0, 0]  # a missing chunk reads as the fill value throughout
        missing = np.flatnonzero(np.isnan(corner) if name == "image" else corner == UNLABELLED)
        if missing.size:
            raise InputError(
                where, found=f"no data for {_numbers(missing)}", rule="every slice has a chunk", remedy=REMEDY
            )
        return voxels

    def record(self, entry: Entry) -> dict[str, Any]:
        """Read what `preprocess.restore` needs to take slices of a volume back to its raw grid."""
        attributes = json.loads((self.path / entry.group / "zarr.json").read_text())["attributes"]
        record: dict[str, Any] = attributes["record"]
        return record


def normalise(image: np.ndarray, limits: Limits) -> np.ndarray:
    """Map standardised values linearly, the lower limit to -1 and the upper to 1, as float32.

    Nothing is clipped: the limits are those of the training subjects, and a value of another subject beyond them
    stays beyond.
    """
    low, high = limits
    scale = np.float32(2 / (high - low))
    return image.astype(np.float32) * scale - np.float32(1 + low * 2 / (high - low))


# --- writing ----------------------------------------------------------------------------------------------------------


def create(path: Path) -> None:
    """Make the empty store appear whole, or leave the one that is there.

    Raises:
        InputError: the path holds something else, or a store of another schema.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        _check_schema(path)
        return
    fresh = path.with_name(f".{path.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    root = zarr.create_group(store=fresh, attributes={"slicestore": SCHEMA})
    for domain in DOMAINS:
        root.create_group(domain)
    (fresh / "commits").mkdir()
    os.replace(fresh, path)
    _sync(path.parent)


def group_name(domain: Domain, subject: str, key: str) -> str:
    """Name a volume's group: its path in the store."""
    return f"{domain}/{subject}-{key[:12]}"


def write_volume(
    path: Path, prepared: Prepared, *, domain: Domain, subject: str, key: str, preprocessing: str
) -> dict[str, Any]:
    """Write one volume and then its commit record, which it returns; killed at any moment it leaves nothing visible."""
    name = group_name(domain, subject, key)
    shutil.rmtree(path / name, ignore_errors=True)
    group = zarr.create_group(
        store=path / name,
        attributes={
            "slicestore": SCHEMA,
            "domain": domain,
            "subject": subject,
            "key": key,
            "preprocessing": preprocessing,
            "record": prepared.record,
        },
    )
    for part, array, fill in (
        ("image", prepared.image, np.nan),
        ("label", prepared.label, UNLABELLED),
        ("fraction", prepared.fraction, UNLABELLED),
    ):
        if array is not None:
            _write_array(group, part, array, fill)
    files = sorted(file for file in (path / name).rglob("*") if file.is_file())
    for item in [*files, *(path / name).rglob("*/"), path / name, path / domain]:
        _sync(item)
    record, label = prepared.record, prepared.record["label"]
    commit = {
        "domain": domain,
        "subject": subject,
        "key": key,
        "group": name,
        "slices": len(prepared.image),
        "labelled": label is not None,
        "evaluation_only": label is not None and domain == "target",
        "classes": label["classes"] if label else 0,
        **{number: record[number] for number in ("minimum", "maximum", "mean", "std")},
        "objects": {
            file.relative_to(path).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files
        },
    }
    write_json(_commit_file(path, name), commit)
    return commit


def _write_array(group: zarr.Group, name: str, array: np.ndarray, fill: float) -> None:
    shuffle: Literal["shuffle", "noshuffle"] = "shuffle" if array.dtype.itemsize > 1 else "noshuffle"
    target = group.create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(1, *array.shape[1:]),
        shards=array.shape,
        fill_value=fill,
        compressors=[BloscCodec(cname="zstd", clevel=3, shuffle=shuffle), Crc32cCodec()],
        config={"write_empty_chunks": True},
        dimension_names=("slice", "y", "x"),
    )
    target[:] = array


def committed(path: Path, group: str) -> dict[str, Any] | None:
    """Read the commit record of a volume if all of it is there, byte for byte; otherwise None."""
    try:
        commit: dict[str, Any] = json.loads(_commit_file(path, group).read_text())
        intact = all(sha256(path / name) == facts["sha256"] for name, facts in commit["objects"].items())
    except (OSError, ValueError, KeyError):
        return None
    return commit if intact else None


def committed_keys(path: Path) -> set[str]:
    """Give the beginnings of the keys, as in `group_name`, of all volumes with a commit record."""
    return {record.stem.rpartition("-")[2] for record in (path / "commits").glob("*.json")}


def finish(path: Path, groups: Mapping[str, Part], preprocessing: Preprocessing, *, classes: int, seed: int) -> None:
    """Write the manifest over committed groups and their splits, then drop every volume that it does not name."""
    volumes = []
    for name, part in sorted(groups.items()):
        commit = json.loads(_commit_file(path, name).read_text())
        sizes = {file: facts["bytes"] for file, facts in commit["objects"].items()}
        volumes.append(commit | {"split": part, "objects": sizes})
    told = {
        "preprocessing": preprocessing.fingerprint,
        "schema": SCHEMA,
        "volumes": [[volume[field] for field in ("domain", "subject", "key", "split")] for volume in volumes],
    }
    fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    write_json(
        path / "manifest.json",
        {
            "format": "slicestore",
            "schema": SCHEMA,
            "fingerprint": fingerprint,
            "preprocessing": asdict(preprocessing),
            "classes": classes,
            "seed": seed,
            "volumes": volumes,
        },
    )
    sweep(path, lambda name: name in groups)


def sweep(path: Path, wanted: Callable[[str], bool]) -> None:
    """Remove what a killed ingest left (temporary files, groups without a commit record) and the groups not wanted."""
    for file in [*path.rglob("*.partial*"), *path.rglob("*.tmp")]:
        file.unlink(missing_ok=True)
    for domain in DOMAINS:
        for group in (path / domain).iterdir():
            name = f"{domain}/{group.name}"
            if group.is_dir() and not (wanted(name) and _commit_file(path, name).exists()):
                _commit_file(path, name).unlink(missing_ok=True)
                shutil.rmtree(group)
    for commit in (path / "commits").iterdir():
        if not (path / commit.stem.replace("-", "/", 1)).is_dir():
            commit.unlink()


def write_json(path: Path, data: object, *, mode: int = 0o644) -> None:
    """Replace a JSON file in one step that survives a power cut; a file that already says the same is left alone."""
    text = json.dumps(data, indent=1, sort_keys=True) + "\n"
    if path.exists() and path.read_text() == text:
        return
    partial = path.with_name(f"{path.name}.tmp")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _commit_file(path: Path, group: str) -> Path:
    return path / "commits" / f"{group.replace('/', '-')}.json"


# --- checks -----------------------------------------------------------------------------------------------------------


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise InputError(
            path,
            found="a file" if path.exists() else "nothing there",
            rule="a store is a folder",
            remedy="check the path, or make the store with `equipoise prepare`",
        )
    _check_schema(path)
    try:
        data: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError:
        raise InputError(
            path,
            found="no manifest.json",
            remedy=REMEDY,
            rule="a finished store has one; this one's making was interrupted",
        ) from None
    except ValueError as error:
        raise InputError(
            path / "manifest.json", found=f"damaged JSON ({error})", rule="the manifest is written whole", remedy=REMEDY
        ) from None
    _hold_schema(path, data.get("schema"))
    return data


def _check_schema(path: Path) -> None:
    try:
        found = json.loads((path / "zarr.json").read_text())["attributes"]["slicestore"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            path,
            found="a file" if path.is_file() else "a folder that is no store",
            rule="a store's zarr.json carries the attribute `slicestore`",
            remedy="check the path; to make a store, name a folder that does not exist yet",
        ) from None
    _hold_schema(path, found)


def _hold_schema(path: Path, found: object) -> None:
    if found != SCHEMA:
        raise InputError(
            path,
            found=f"a store of schema {found}",
            rule=f"this version uses schema {SCHEMA}",
            remedy="prepare the raw volumes into a new folder, or use the version that made this one",
        )


def _check_objects(path: Path, entry: Entry) -> None:
    for name, size in entry.objects.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise InputError(
                path,
                found=f"{name} of subject {entry.subject} " + ("missing" if found is None else f"with {found} bytes"),
                rule=f"the manifest promises {size} bytes",
                remedy=REMEDY,
            )


def _damaged(path: Path, slices: int) -> str:
    """Which slices of a damaged array fail on their own; only asked when reading the whole has failed."""
    broken = []
    for index in range(slices):
        try:
            zarr.open_array(path, mode="r")[index]
        except (ValueError, RuntimeError, OSError, KeyError):
            broken.append(index)
    return _numbers(broken) if len(broken) < slices else "the whole shard or its index"


def _numbers(slices: Sequence[int] | np.ndarray) -> str:
    some = ", ".join(str(index) for index in slices[:5])
    return f"slice{'s' if len(slices) > 1 else ''} {some}{', ...' if len(slices) > 5 else ''}"


def _fill_frame(image: np.ndarray, record: Mapping[str, Any], value: float) -> None:
    """Overwrite what surrounds the image in its slices."""
    outside = np.full(image.shape[1:], True)
    spans = zip(record["shift_yx"], record["resampled"]["size"][1::-1], strict=True)
    outside[tuple(slice(max(0, shift), max(0, shift) + length) for shift, length in spans)] = False
    image[:, outside] = value
