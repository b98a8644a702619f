"""A store's slices where training can draw from them: shared memory, private memory, or the shards themselves.

Knows where slices are kept and how some of them are handed out; must not know batches, networks or devices.

A split is loaded once per machine: its arrays lie in shared memory that all processes map read-only (`segment`). Where
there is none (containers give /dev/shm 64 MB) each process loads its own; where memory does not suffice either, slices
are read from the shards as they are asked for. What is handed out is the same, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np

from slicestore import segment
from slicestore.memory import available
from slicestore.selection import By, Name, Rows, Selection, bytes_of, select, views
from slicestore.splits import Part
from slicestore.store import UNLABELLED, Domain, Entry, Limits, Store

Where = Literal["shared", "memory", "stream"]

SHARED = Path("/dev/shm")
SPARED = 0.8
"""Share of the available memory that slices may take."""
TYPES: Mapping[Name, type[np.generic]] = {"image": np.float16, "label": np.uint8}


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """All slices of one split of one domain, ready to be drawn from."""

    where: Where
    subject: np.ndarray
    """int32 (N,), index into `entries`; volumes follow each other, their slices from the feet up."""
    position: np.ndarray
    """int32 (N,), the slice's number in its volume's canonical grid, from the feet up."""
    area: np.ndarray | None
    """int32 (N,), pixels of the label's own classes: neither background nor the brain that `brain_class` adds; None
    where no label may be seen."""
    entries: tuple[Entry, ...]
    limits: Limits
    """What `store.normalise` takes."""
    size: int
    """Width and height of a slice in pixels."""
    _voxels: Mapping[Name, np.ndarray | _Stream]

    def __len__(self) -> int:
        return len(self.subject)

    @property
    def image(self) -> np.ndarray:
        """float16 (N, size, size), standardised per volume, finite; read-only where shared.

        Where slices are streamed every call reads them all.
        """
        return self._all("image")

    @property
    def label(self) -> np.ndarray | None:
        """uint8 (N, size, size) class indices, as `image`; None where no label may be seen.

        Slices of an unlabelled volume among labelled ones are `UNLABELLED` throughout.
        """
        return self._all("label") if "label" in self._voxels else None

    def take(
        self, name: Name, index: np.ndarray | Sequence[int], out: np.ndarray | None = None, pool: Executor | None = None
    ) -> np.ndarray:
        """Copy some slices, in the order of `index`.

        Args:
            name: which array.
            index: (B,) of whole numbers in [0, N).
            out: (B, size, size) of the array's type, C-contiguous, to write into.
            pool: threads among which slices that are streamed are spread; they change the time, nothing else.

        Raises:
            IndexError: a number is beyond the slices.
            KeyError: there are no labels.
            InputError: damaged data in a store that is streamed.
        """
        index = np.asarray(index, dtype=np.intp)
        if index.size and not (index.min() >= 0 and index.max() < len(self)):
            raise IndexError(f"slices {index.min()} to {index.max()} of {len(self)}")
        voxels = self._voxels[name]
        if out is None:
            out = np.empty((len(index), self.size, self.size), dtype=TYPES[name])
        if isinstance(voxels, _Stream):
            voxels.read(index, out, pool)
        else:
            np.take(voxels, index, axis=0, out=out, mode="clip")  # "raise" would go through a copy of all of `out`
        return out

    def _all(self, name: Name) -> np.ndarray:
        voxels = self._voxels[name]
        return self.take(name, np.arange(len(self))) if isinstance(voxels, _Stream) else voxels


def stage(
    store: Store,
    domain: Domain,
    part: Part,
    *,
    by: By = "subject",
    pooled: bool = False,
    percentile: float = 0.0,
    fixed: Limits | None = None,
    share: bool = True,
    memory: int | None = None,
    threads: int | None = None,
    folder: Path = SHARED,
) -> Staged:
    """Bring every slice of a split to where it can be drawn from, all checksums verified.

    Labels of the target domain are for evaluation: the training split never hands them out. Without slices in the split
    the arrays are empty.

    Args:
        store: an opened one.
        domain: source or target.
        part: train, val or test.
        by: "subject": the store's own split, in which a subject is in one part (default). "slice": the slices of all
            subjects are dealt to the parts, so that neighbouring slices of one subject train and test, and the limits
            are those of all subjects. The 2022 study did that; it is a leak, kept here to show how large a one.
        pooled: see `Store.limits`.
        percentile: see `Store.limits`.
        fixed: limits given by hand, such as those of a published data set, in place of measured ones.
        share: whether processes of this machine and user are to share one copy.
        memory: bytes that a new copy may take; by default 80 % of what is available.
        threads: that read; by default one a core.
        folder: of the memory file system.

    Raises:
        InputError: a damaged or missing chunk, naming the subject and, where it can be found, the slice.
    """
    chosen = select(store, domain, part, by=by, pooled=pooled, percentile=percentile, fixed=fixed)
    threads = threads or os.cpu_count() or 1
    room = int(available() * SPARED) if memory is None else memory

    def content() -> segment.Content:
        return segment.Content(chosen.facts, bytes_of(chosen.facts), partial(chosen.fill, threads))

    if share and (found := segment.share(folder, chosen.name, content, room=room)):
        return _held("shared", chosen, *found)
    own = content()
    if own.size <= room:
        held = np.empty(own.size, dtype=np.uint8)
        own.fill(held)
        return _held("memory", chosen, own.facts, held)
    return _streamed(chosen, threads)


def _held(where: Where, chosen: Selection, facts: Mapping[str, Any], content: np.ndarray) -> Staged:
    arrays = views(facts, content)
    voxels: dict[Name, np.ndarray | _Stream] = {name: arrays[name] for name in TYPES if name in arrays}
    return Staged(
        where,
        arrays["subject"],
        arrays["position"],
        arrays.get("area"),
        chosen.entries,
        chosen.limits,
        chosen.store.size,
        voxels,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Stream:
    """One array of all chosen slices, read from the shards slice by slice."""

    chosen: Selection
    name: Name
    subject: np.ndarray
    number: np.ndarray
    readers: dict[int, Any] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def read(self, index: np.ndarray, out: np.ndarray, pool: Executor | None) -> None:
        """As `Staged.take`."""
        for _ in (pool.map if pool else map)(self._slice, index, out):
            pass

    def _slice(self, index: int, out: np.ndarray) -> None:
        volume = int(self.subject[index])
        rows = self.chosen.rows[volume]
        if self.name == "label" and not rows.entry.labelled:
            out[:] = UNLABELLED
            return
        self._reader(volume, rows.entry).slice(int(self.number[index]), out)
        if self.name == "image":
            self.chosen.overwrite_frame(rows, out)

    def _reader(self, volume: int, entry: Entry) -> Any:
        with self.lock:
            if volume not in self.readers:
                self.readers[volume] = self.chosen.store.reader(entry, self.name)
            return self.readers[volume]


def _streamed(chosen: Selection, threads: int) -> Staged:
    subject, position = np.empty((2, len(chosen)), dtype=np.int32)
    chosen.number(subject, position)
    number = np.concatenate([np.empty(0, dtype=np.intp), *(rows.number for rows in chosen.rows)])
    streams: dict[Name, np.ndarray | _Stream] = {"image": _Stream(chosen, "image", subject, number)}
    area = None
    if chosen.labelled:
        streams["label"] = _Stream(chosen, "label", subject, number)
        area = np.concatenate(list(_areas(chosen, threads)))
    return Staged("stream", subject, position, area, chosen.entries, chosen.limits, chosen.store.size, streams)


def _areas(chosen: Selection, threads: int) -> Iterator[np.ndarray]:
    """Of every volume's chosen slices; one volume's labels at a time and thread are in memory."""

    def of(rows: Rows) -> np.ndarray:
        area = np.empty(len(rows), dtype=np.int32)
        chosen.read_label(rows, np.empty((len(rows), chosen.store.size, chosen.store.size), dtype=np.uint8), area)
        return area

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(of, chosen.rows)
