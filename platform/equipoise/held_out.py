"""Subjects that a store holds back from training: a network's masks and theirs, both in the scans' own grids.

Knows how stored slices become masks in a scan's grid, and how often a study looked at its test subjects; must not know
how masks are compared.

Whoever looks at test subjects and then chooses anything has no test subjects any more. So every look is counted, in
`test.json` of what was tested (of a study, where a run belongs to one), and a second one has to be asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from equipoise.intake import Intake
from equipoise.nets import Inference
from equipoise.predict import PLAIN, Manner, back, probabilities
from equipoise.study import TESTED
from equipoise.writing import write
from slicestore.errors import InputError
from slicestore.preprocess import restore, restore_mask
from slicestore.settings import Prepared
from slicestore.store import Entry, Store
from slicestore.volume import Volume

Held = Literal["val", "test"]


class Masks(NamedTuple):
    """What is predicted and what is known of one subject, uint8 class indices on the scan's grid."""

    subject: str
    """Pseudonym."""
    predicted: Volume
    reference: Volume


def labelled(store: Store, part: Held) -> list[Entry]:
    """Target volumes of a part that have a mask.

    Raises:
        InputError: there are none.
    """
    found = [entry for entry in store.select("target", part) if entry.labelled]
    if not found:
        raise InputError(
            store.path,
            found=f"no target mask in {part}",
            rule="predicted masks are compared with masks of target subjects",
            remedy="prepare a store with masks of target subjects too, or compare files of masks",
        )
    return found


def masks(net: Inference, intake: Intake, store: Store, part: Held, manner: Manner = PLAIN) -> Iterator[Masks]:
    """Segment the labelled target subjects of a part.

    A reference is the store's mask, taken back to the scan's grid: the label itself may differ from it by parts of a
    pixel of the store.

    Raises:
        InputError: there are none, the store is not the network's, or is damaged.
    """
    check(intake, store)
    for entry in labelled(store, part):
        record = store.record(entry)
        prepared = Prepared(store.read(entry, "image"), None, None, record)
        found = back(probabilities(net, intake, prepared, manner=manner, where=entry.subject), prepared)
        yield Masks(entry.subject, found.label, reference(store, entry))


def reference(store: Store, entry: Entry) -> Volume:
    """A stored mask on its scan's grid: from shares of pixels where there is one structure, else from classes."""
    record = store.record(entry)
    if store.classes - bool(store.preprocessing.brain_class) == 2:
        own = restore_mask(store.read(entry, "fraction"), record)
        if not store.preprocessing.brain_class:
            return own
        both = restore(store.read(entry, "label"), record)
        return Volume(np.where(own.voxels > 0, own.voxels, both.voxels * (both.voxels > 1)), own.geometry)
    return restore(store.read(entry, "label"), record)


def check(intake: Intake, store: Store) -> None:
    """Refuse a store other than the network's: whom it holds back, the network may have been trained on.

    Raises:
        InputError: it is another cohort, or the same split otherwise.
    """
    if store.fingerprint != intake.cohort:
        raise InputError(
            store.path,
            found=f"cohort {store.fingerprint[:12]}",
            rule=f"the network was trained on cohort {intake.cohort[:12]}, and knows only its subjects to be held back",
            remedy="name that store; of other subjects predict the raw volumes, and compare files of masks",
        )


def touches(folder: Path) -> int:
    """How often what lies in a folder was tested."""
    return int(_read(folder).get("touches", 0))


def touch(folder: Path, *, again: bool) -> None:
    """Count one more look at test subjects, before it is taken.

    Raises:
        InputError: there was one already, and another is not asked for.
    """
    before = touches(folder)
    if before and not again:
        raise InputError(
            folder / TESTED,
            found=f"{before} {'look' if before == 1 else 'looks'} at the test subjects already",
            rule="test subjects are looked at once: whoever looks again and chooses has none",
            remedy="read what it found there (a look that broke off left nothing), or say --again, which is counted",
        )
    write(folder / TESTED, json.dumps({**_read(folder), "touches": before + 1}, indent=2))


def tell(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write what was found, beside the count: of a run's step, judged in the same manner, the newest look counts."""
    found = _read(folder)
    seen = {(row["run"], row["step"], row["manner"]): dict(row) for row in [*found.get("rows", []), *rows]}
    write(folder / TESTED, json.dumps({**found, "rows": list(seen.values())}, indent=2))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / TESTED
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
