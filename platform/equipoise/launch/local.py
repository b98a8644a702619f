"""One run in this process.

Knows how a store and a device become a recorded run: the simplest launcher, which the others call in their workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from equipoise.batches import Cohort, needed
from equipoise.config import RunConfig
from equipoise.keeping import Keeping
from equipoise.ranks import Ranks
from equipoise.sitting import recorded
from equipoise.train import Progress
from slicestore.store import Store


def device_here() -> torch.device:
    """The accelerator of this process, or its CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def launch(
    folder: Path,
    config: RunConfig,
    store: str | Path,
    *,
    device: torch.device | None = None,
    ranks: Ranks | None = None,
    keeping: Keeping | None = None,
    elastic: bool = False,
) -> Iterator[Progress]:
    """Train `config` on the store into `folder`, or continue what is there; a `Progress` is on disk when it comes.

    Arguments and errors are those of `sitting.recorded`.
    """
    device = device or device_here()
    # What a run sees of a store depends on these settings only; a warm worker keeps it from run to run.
    cohort = _staged(store, needed(config), device)
    return recorded(folder, config, cohort, ranks=ranks, keeping=keeping, elastic=elastic)


@lru_cache(maxsize=2)
def _staged(store: str | Path, config: RunConfig, device: torch.device) -> Cohort:
    return Cohort(Store.open(store), config, device)
