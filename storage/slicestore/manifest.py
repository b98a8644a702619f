"""What a finished store promises: its volumes, their splits and every object of theirs.

Knows the manifest and what is refused of it; knows nothing of voxels or of how they are written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from slicestore.errors import InputError
from slicestore.layout import MANIFEST, REMEDY, ROOT, SCHEMA, Domain
from slicestore.place import Place
from slicestore.settings import Preprocessing
from slicestore.splits import Part


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
    percentiles: Mapping[str, Sequence[float]]
    """Both tails of the same values, by percentage: "0.1" has the .1th and the 99.9th percentile."""
    mean: float
    """Of the resampled image in raw units, as is `std`."""
    std: float
    key: str
    """sha256 of what the volume was made from: raw bytes and preprocessing."""
    group: str
    """Path of its Zarr group in the store."""
    objects: Mapping[str, int] = field(repr=False)
    """Every object of the group, relative to the store, and its size in bytes."""
    arrays: Mapping[str, Mapping[str, Any]] = field(repr=False)
    """The `zarr.json` of each array, without its attributes."""
    record: Mapping[str, Any] = field(repr=False)
    """What `preprocess.restore` needs; see `preprocess.prepare`."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that readers trust."""

    entries: tuple[Entry, ...]
    """Sorted by domain and subject."""
    preprocessing: Preprocessing
    classes: int
    seed: int
    fingerprint: str

    def to_bytes(self) -> bytes:
        """The file's content."""
        told = {
            "format": "slicestore",
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "preprocessing": asdict(self.preprocessing),
            "classes": self.classes,
            "seed": self.seed,
            "volumes": [asdict(entry) for entry in self.entries],
        }
        return to_json(told)


def name_content(entries: Sequence[Entry], preprocessing: Preprocessing, seed: int) -> str:
    """Fingerprint of a cohort: the same on every machine with the same content, split by the same seed."""
    told = {
        "preprocessing": preprocessing.fingerprint,
        "schema": SCHEMA,
        "seed": seed,
        "volumes": [[entry.domain, entry.subject, entry.key, entry.split] for entry in entries],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def to_json(data: object) -> bytes:
    """JSON in one line, the same bytes for the same content."""
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def read_manifest(place: Place) -> Manifest:
    """Read what a finished store promises.

    Raises:
        InputError: no store, an unfinished one, one of another schema, or a damaged manifest.
    """
    try:
        data = json.loads(bytes(place.get(MANIFEST)))
        hold_schema(place, data.get("schema"))
        names = {item.name for item in fields(Entry)}
        entries = tuple(Entry(**{name: volume[name] for name in names}) for volume in data["volumes"])
        config = _settings(f"{place}/{MANIFEST}", data["preprocessing"])
        return Manifest(entries, config, data["classes"], data["seed"], data["fingerprint"])
    except FileNotFoundError:
        check_schema(place)
        raise InputError(
            place,
            found="no manifest.json",
            rule="a finished store has one; this one's making was interrupted",
            remedy=REMEDY,
        ) from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{place}/{MANIFEST}",
            found=f"damaged JSON ({error})",
            rule="the manifest is written whole",
            remedy=REMEDY,
        ) from None


def _settings(where: str, told: Mapping[str, Any]) -> Preprocessing:
    """What preprocessing was told; a store made elsewhere may say what this version refuses."""
    try:
        return Preprocessing(**told)
    except InputError as error:
        raise InputError(
            where,
            found=f"{error.where.replace('Preprocessing', 'preprocessing')} {error.found}",
            rule=error.rule,
            remedy="prepare the raw volumes into a new folder",
        ) from None


def check_schema(place: Place) -> None:
    """Hold that a place is a store, of this schema.

    Raises:
        InputError: there is nothing, or something else.
    """
    try:
        found = json.loads(bytes(place.get(ROOT)))["attributes"]["slicestore"]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):  # no right to read it, no network
            raise
        kind = place.kind()
        nothing = kind in ("nothing there", "an empty folder")
        raise InputError(
            place,
            found=kind if nothing or kind == "a file" else f"{kind} that is no store",
            rule="a store's zarr.json carries the attribute `slicestore`",
            remedy="check the path, or make the store with `equipoise prepare`"
            if nothing
            else "check the path; to make a store, name a folder that does not exist yet",
        ) from None
    hold_schema(place, found)


def hold_schema(place: Place, found: object) -> None:
    """Refuse every schema but this version's.

    Raises:
        InputError: it is another one, naming both.
    """
    if found != SCHEMA:
        raise InputError(
            place,
            found=f"a store of schema {found}",
            rule=f"this version uses schema {SCHEMA}",
            remedy="prepare the raw volumes into a new folder, or use the version that made this one",
        )
