"""A finished store, opened for reading.

Knows the manifest, splits and limits, and turns damage into errors that name the subject; knows nothing of raw images,
of who a subject is, or of networks. The layout is explained in `layout`; only NumPy and codecs are needed to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slicestore import shards
from slicestore.errors import InputError
from slicestore.layout import DOMAINS, REMEDY, SCHEMA, UNLABELLED, ArrayName, Domain
from slicestore.manifest import Entry, read_manifest
from slicestore.place import Folder, Place
from slicestore.settings import Preprocessing
from slicestore.splits import Part
from slicestore.verify import Report, verify

__all__ = ["DOMAINS", "SCHEMA", "UNLABELLED", "Domain", "Entry", "Limits", "Store", "VolumeReader", "normalise"]

Limits = tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Store:
    """A finished store, opened for reading; everything in it was promised by its manifest."""

    path: Path | str
    """The folder, or `s3://bucket/prefix`."""
    entries: tuple[Entry, ...]
    """Sorted by domain and subject."""
    preprocessing: Preprocessing
    classes: int
    """Number of classes of the source labels, background included."""
    seed: int
    """Of the split."""
    fingerprint: str
    """sha256 over every volume's key, its split and the preprocessing: names the content on any machine."""
    place: Place = field(init=False)
    """Where its objects lie."""

    def __post_init__(self) -> None:
        """Find the place."""
        object.__setattr__(self, "place", Place.at(self.path))

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Read the manifest and check that every object it promises is there with its size: two requests in S3.

        Raises:
            InputError: no store, an unfinished one, one of another schema, or objects missing or cut short.
        """
        place = Place.at(path)
        found = read_manifest(place)
        sizes = place.sizes()
        for entry in found.entries:
            for name, size in entry.objects.items():
                if sizes.get(name) != size:
                    if read_manifest(place).fingerprint != found.fingerprint:
                        return cls.open(path)  # an ingest has finished between the two requests
                    has = f"with {sizes[name]} bytes" if name in sizes else "missing"
                    raise InputError(
                        place,
                        found=f"{name} of subject {entry.subject} {has}",
                        rule=f"the manifest promises {size} bytes",
                        remedy=REMEDY,
                    )
        where = place.path if isinstance(place, Folder) else place.url
        return cls(where, found.entries, found.preprocessing, found.classes, found.seed, found.fingerprint)

    @property
    def size(self) -> int:
        """Width and height of a slice in pixels."""
        return self.preprocessing.size

    def select(self, domain: Domain, split: Part | None = None) -> list[Entry]:
        """List the volumes of a domain, of one split or of all."""
        return [entry for entry in self.entries if entry.domain == domain and split in (None, entry.split)]

    def limits(self, domain: Domain, *, pooled: bool = False, percentile: float = 0.0) -> Limits:
        """Give the range of standardised values among training subjects, of both domains when `pooled`.

        With a `percentile` p it goes from the lowest p-th to the highest (100 - p)-th percentile of any of them; with 0
        from the smallest to the largest value.

        Raises:
            InputError: a percentile that was not recorded.
        """
        train = [entry for name in (DOMAINS if pooled else (domain,)) for entry in self.select(name, "train")]
        if percentile == 0:
            return min(entry.minimum for entry in train), max(entry.maximum for entry in train)
        tails = [_tail(entry, percentile) for entry in train]
        if any(tail is None for tail in tails):
            levels = ", ".join(sorted(train[0].percentiles, key=float))
            raise InputError(
                self.path,
                found=f"no percentile {percentile:g}",
                rule=f"each volume's are recorded at 0 (minimum and maximum), {levels}",
                remedy="take one of these",
            )
        return min(tail[0] for tail in tails if tail), max(tail[1] for tail in tails if tail)

    def record(self, entry: Entry) -> dict[str, Any]:
        """Give what `preprocess.restore` needs to take slices of a volume back to its raw grid."""
        return dict(entry.record)

    def read(self, entry: Entry, name: ArrayName, out: np.ndarray | None = None) -> np.ndarray:
        """Read one whole array of one volume, every checksum verified; many threads may do so at once.

        Args:
            entry: the volume.
            name: its image, label or fraction.
            out: (slices, size, size), C-contiguous, float16 for images and uint8 otherwise, to decode into.

        Raises:
            KeyError: the volume has no such array.
            InputError: a damaged or missing shard or chunk, naming the subject and the slices.
        """
        form, shard = self._format(entry, name), _shard(entry, name)
        if out is None:
            out = np.empty(form.shape, dtype=form.dtype)
        try:
            shards.read(self.place.whole(shard), entry.objects[shard], form, Place.block, out)
        except (shards.Damaged, FileNotFoundError) as error:
            raise self._damage(entry, name, error) from error
        return out

    def reader(self, entry: Entry, name: ArrayName) -> VolumeReader:
        """Open one array of one volume for single slices; reads its index. Raises as `read`."""
        form, shard = self._format(entry, name), _shard(entry, name)

        def fetch(start: int, length: int) -> memoryview:
            return self.place.get_range(shard, start, length)

        try:
            slices = shards.SliceReader(fetch, entry.objects[shard], form, self.place.block)
        except (shards.Damaged, FileNotFoundError) as error:
            raise self._damage(entry, name, error) from error
        return VolumeReader(slices, lambda error: self._damage(entry, name, error))

    def verify(self, *, deep: bool = True) -> Report:
        """Look for damage; see `verify.verify`, which takes unfinished stores too."""
        return verify(self.path, deep=deep)

    def _format(self, entry: Entry, name: ArrayName) -> shards.Format:
        try:
            return shards.Format.of(entry.arrays[name])
        except ValueError as error:
            raise InputError(
                f"{self.path}: {name} of {entry.domain} subject {entry.subject}",
                found=error,
                rule="a store is read by the version that understands it",
                remedy="use the version that made this store, or prepare the raw volumes anew with this one",
            ) from None

    def _damage(self, entry: Entry, name: ArrayName, error: shards.Damaged | FileNotFoundError) -> InputError:
        """Say which subject and slices an error is about."""
        found = f"damaged data ({error})"
        if isinstance(error, FileNotFoundError):
            if read_manifest(self.place).fingerprint != self.fingerprint:
                return InputError(
                    self.path,
                    found="a store that was updated while it was read",
                    rule="an update removes what it replaces",
                    remedy="start again; prepare into a folder of its own while a store is in use",
                )
            found = f"no object {_shard(entry, name)}"
        elif error.slices:
            found = f"damaged data ({shards.tell(error.slices, entry.record['slices'])})"
        return InputError(
            f"{self.path}: {name} of {entry.domain} subject {entry.subject}",
            found=found,
            rule="every slice has a chunk, and every chunk matches its checksum",
            remedy=REMEDY,
        )


class VolumeReader:
    """Single slices of one array of one volume; many threads may use one."""

    def __init__(
        self, slices: shards.SliceReader, damage: Callable[[shards.Damaged | FileNotFoundError], InputError]
    ) -> None:
        self._slices, self._damage = slices, damage

    def slice(self, number: int, out: np.ndarray) -> None:
        """Decode one slice into `out` (size, size).

        Raises:
            InputError: it is damaged or missing, naming the subject and the slice.
        """
        self.slices((number,), out[None])

    def slices(self, numbers: shards.Numbers, out: np.ndarray) -> None:
        """Decode some slices into `out` (len(numbers), size, size), in the order given; raises as `slice`.

        What lies together in the store is fetched together.
        """
        try:
            self._slices.slices(numbers, out)
        except (shards.Damaged, FileNotFoundError) as error:
            raise self._damage(error) from error


def normalise(image: np.ndarray, limits: Limits) -> np.ndarray:
    """Map standardised values linearly, the lower limit to -1 and the upper to 1, as float32.

    Nothing is clipped: the limits are those of the training subjects, and a value of another subject beyond them
    stays beyond.
    """
    low, high = limits
    scale = np.float32(2 / (high - low))
    return image.astype(np.float32) * scale - np.float32(1 + low * 2 / (high - low))


def _shard(entry: Entry, name: ArrayName) -> str:
    return f"{entry.group}/{name}/c/0/0/0"


def _tail(entry: Entry, percentile: float) -> Sequence[float] | None:
    return next((tail for level, tail in entry.percentiles.items() if float(level) == percentile), None)
