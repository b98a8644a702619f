"""The store against other ways to keep the same slices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measure import Result, paired

from equipoise.launch.conduct import synthetic_store
from slicestore.store import Store


def storage(scratch: Path) -> Iterator[Result]:
    """Staging a cohort, checksums verified, against reading the same arrays from .npy files."""
    path = synthetic_store(scratch)
    arrays = [Store.open(path).stage(domain, "train") for domain in ("source", "target")]
    files = []
    for number, staged in enumerate(arrays):
        for name, array in (("image", staged.image), ("label", staged.label)):
            if array is not None:
                files.append(scratch / f"{number}-{name}.npy")
                np.save(files[-1], array)
    store = Store.open(path)
    ours, theirs = paired(
        lambda: [store.stage(d, "train") for d in ("source", "target")], lambda: [np.load(f) for f in files]
    )
    size = sum(f.stat().st_size for f in files) / 1e6
    yield Result("storage.load_vs_npy", ours / theirs, "times the time", "numpy.load", f"{size:.1f} MB, warm")
