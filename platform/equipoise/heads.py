"""The synthetic heads that a study without a store trains on.

Knows how a cohort of phantoms becomes a store; knows nothing of runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from slicestore.ingest import ingest
from slicestore.inputs import inputs_from_table
from slicestore.phantom import write_cohort
from slicestore.settings import Preprocessing

FIELD_MM = 192.0
"""Side of a synthetic head's slices, which the head fills."""


class Heads(NamedTuple):
    """What a study without a store trains on."""

    size: int = 64
    """Pixels a side of a slice."""
    mask: str = "brain"
    """What is segmented: brain or vessel."""


HEADS = Heads()


def synthetic_store(results: Path, size: int = HEADS.size, mask: str = HEADS.mask) -> Path:
    """Synthetic heads as a store of `size` x `size` slices, made once; one that is there is used as it is.

    Raises:
        InputError: no such mask.
    """
    name = "heads" if (size, mask) == HEADS else f"heads-{mask}-{size}"
    store = results / "phantoms" / f"{name}.zarr"
    if not (store / "manifest.json").is_file():
        raw = store.with_name("raw")
        table = raw / "cohort.csv" if raw.is_dir() else write_cohort(raw, subjects=5)
        ingest(inputs_from_table(table, mask), store, Preprocessing(size=size, spacing_mm=FIELD_MM / size))
    return store
