"""Which slices of a store make up a split, and what their arrays hold.

Knows entries, splits and how whole volumes are read into place; must not know where the arrays lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from slicestore.splits import Part, split
from slicestore.store import UNLABELLED, Domain, Entry, Limits, Store

By = Literal["subject", "slice"]
Name = Literal["image", "label"]
Box = tuple[slice, slice]

LAYOUT = 1
"""Version of what `fill` writes."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The chosen slices of one volume, and their place among all that were chosen."""

    entry: Entry
    place: slice
    number: np.ndarray
    """Their numbers in the volume's arrays, ascending."""
    position: np.ndarray
    """Their numbers in the volume's canonical grid, from the feet up."""
    inside: Box | None
    """Where the image lies in its frame, if the frame is to be overwritten."""

    def __len__(self) -> int:
        return len(self.number)


@dataclass(frozen=True)
class Selection:
    """Slices of one split of one domain."""

    store: Store
    domain: Domain
    part: Part
    by: By
    limits: Limits

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The volumes that are asked; each of them gives all of its slices, or by slice its share."""
        return tuple(self.store.select(self.domain, self.part if self.by == "subject" else None))

    @property
    def labelled(self) -> bool:
        """Whether labels may be seen: never those of the target domain in training."""
        return any(e.labelled for e in self.entries) and not (self.domain == "target" and self.part == "train")

    @property
    def frame(self) -> float | None:
        """What overwrites the frame of the images: the middle of the limits, where the store was padded with zero."""
        return sum(self.limits) / 2 if self.store.preprocessing.pad == "zero" else None

    @property
    def name(self) -> str:
        """Names the content of the arrays on any machine: a volume's group is named by what it was made from."""
        groups = [entry.group for entry in self.entries]
        told = [LAYOUT, self.store.fingerprint, groups, self.part, self.by, self.labelled, self.frame]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]

    @cached_property
    def rows(self) -> list[Rows]:
        """The chosen slices, volume by volume; reads each volume's record."""
        records = [self.store.record(entry) for entry in self.entries]
        positions = [np.asarray(record["slices"], dtype=np.int32) for record in records]
        chosen = [np.arange(len(some)) for some in positions]
        if self.by == "slice":
            names = [[f"{e.subject}:{p}" for p in some] for e, some in zip(self.entries, positions, strict=True)]
            parts = split([name for some in names for name in some], seed=self.store.seed)
            chosen = [np.flatnonzero([parts[name] == self.part for name in some]) for some in names]
        rows, end = [], 0
        for entry, number, position, record in zip(self.entries, chosen, positions, records, strict=True):
            start, end = end, end + len(number)
            inside = None if self.frame is None else shown_box(record)
            rows.append(Rows(entry, slice(start, end), number, position[number], inside))
        return rows

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    @property
    def facts(self) -> dict[str, Any]:
        """What `views` needs to find the arrays in the bytes."""
        return {"slices": len(self), "size": self.store.size, "labelled": self.labelled}

    def fill(self, threads: int, content: np.ndarray) -> None:
        """Read everything into the bytes of `views`.

        Raises:
            InputError: damaged data.
        """
        arrays = views(self.facts, content)
        self.number(arrays["subject"], arrays["position"])
        with ThreadPoolExecutor(threads) as pool:
            work = [pool.submit(self.read_image, rows, arrays["image"][rows.place]) for rows in self.rows]
            if self.labelled:
                label, area = arrays["label"], arrays["area"]
                work += [pool.submit(self.read_label, r, label[r.place], area[r.place]) for r in self.rows]
            for done in work:
                done.result()

    def number(self, subject: np.ndarray, position: np.ndarray) -> None:
        """Say of each slice which volume it is of, and where in that."""
        for index, rows in enumerate(self.rows):
            subject[rows.place], position[rows.place] = index, rows.position

    def read_image(self, rows: Rows, out: np.ndarray) -> None:
        """Read the chosen slices of one volume."""
        self._read(rows, "image", out)
        self.overwrite_frame(rows, out)

    def read_label(self, rows: Rows, out: np.ndarray, area: np.ndarray) -> None:
        """Read their labels, and count the pixels of the label's own classes."""
        if rows.entry.labelled:
            self._read(rows, "label", out)
            area[:] = [np.count_nonzero(self.store.preprocessing.foreground(one)) for one in out]
        else:
            out[:], area[:] = UNLABELLED, 0

    def overwrite_frame(self, rows: Rows, image: np.ndarray) -> None:
        """Fill what surrounds the image in `(..., size, size)` slices of a volume, where that is asked for."""
        if rows.inside is not None:
            outside = np.full(image.shape[-2:], True)
            outside[rows.inside] = False
            image[..., outside] = self.frame

    def _read(self, rows: Rows, name: Name, out: np.ndarray) -> None:
        if len(rows) == rows.entry.slices:
            self.store.read(rows.entry, name, out)
        elif len(rows):
            np.take(self.store.read(rows.entry, name), rows.number, axis=0, out=out, mode="clip")


def select(
    store: Store,
    domain: Domain,
    part: Part,
    *,
    by: By = "subject",
    pooled: bool = False,
    percentile: float = 0.0,
    fixed: Limits | None = None,
) -> Selection:
    """Choose a split's slices and the limits to normalise them with; arguments as in `staging.stage`."""
    if by == "slice":  # every subject has slices that train, so that all of them tell the limits
        told = replace(store, entries=tuple(replace(entry, split="train") for entry in store.entries))
    else:
        told = store
    return Selection(store, domain, part, by, fixed or told.limits(domain, pooled=pooled, percentile=percentile))


def views(facts: Mapping[str, Any], content: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a selection as views of one uint8 array, see `Staged` for what they are."""
    return {
        name: content[start:end].view(kind).reshape(shape)
        for name, kind, shape, start, end in _layout(facts["slices"], facts["size"], facts["labelled"])
    }


def bytes_of(facts: Mapping[str, Any]) -> int:
    """Length of the uint8 array of `views`."""
    return max(end for *_, end in _layout(facts["slices"], facts["size"], facts["labelled"]))


def _layout(slices: int, size: int, labelled: bool) -> Iterator[tuple[str, type, tuple[int, ...], int, int]]:
    """One array behind the other, whole numbers before the bytes so that all are aligned."""
    end = 0
    for name, kind, shape in (
        ("image", np.float16, (slices, size, size)),
        ("subject", np.int32, (slices,)),
        ("position", np.int32, (slices,)),
        ("area", np.int32, (slices,)),
        ("label", np.uint8, (slices, size, size)),
    ):
        if labelled or name not in ("area", "label"):
            start, end = end, end + np.dtype(kind).itemsize * int(np.prod(shape))
            yield name, kind, shape, start, end


def shown_box(record: Mapping[str, Any]) -> Box:
    """Where an image lies in its slices, by the record of its preparation: the rest is frame."""
    y, x = (
        slice(max(0, shift), shift + length)
        for shift, length in zip(record["shift_yx"], record["resampled"]["size"][1::-1], strict=True)
    )
    return y, x
