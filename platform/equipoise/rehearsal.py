"""A run that is played from a script: everything of a run but its training.

Knows how a script becomes the record and the progress of a run; knows nothing of networks, stores or Ray.

By it a study's searcher, scheduler and accounts are put through thousands of runs, whose curves were recorded once or
are made up: see `studies/search_quality.py` and `tests/benchmarks/engine_bench.py`. A rehearsed run is killed and
resumed as any other: it goes on behind the last row that its record holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from equipoise.checkpoint import State
from equipoise.config import RunConfig
from equipoise.keeping import Keeping
from equipoise.record import Record
from equipoise.search import ObjectiveName
from equipoise.train import Progress
from equipoise.verdict import Verdict


class Look(NamedTuple):
    """What an evaluation finds."""

    step: int
    dice: float
    """In [0, 1], whatever the study's objective; NaN where it could not be measured."""
    stability: float
    """S so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """What a run does."""

    looks: tuple[Look, ...]
    """In the order of their steps; the last one at the run's end."""
    verdict: Verdict
    """How it ends."""
    step_seconds: float = 0.0
    """Device-seconds of a step, as its record will tell them."""
    pause: float = 0.0
    """Seconds that really pass before each look."""


Book = Callable[[RunConfig], Script]
"""The script of each run."""


def rehearse(folder: Path, config: RunConfig, _store: object, *, keeping: Keeping, book: Book) -> Iterator[Progress]:
    """Play a run into its folder, or the rest of it; a `Progress` is on disk when it comes.

    Args:
        folder: of the run.
        config: the run.
        keeping: whose session is noted; there are no states to keep.
        book: where its script is.
    """
    script, record = book(config), Record(folder)
    with record.locked():
        if record.verdict is not None:
            return
        record.open(config, torch.device("cpu"))
        rows = record.rows()
        before = int(rows[-1]["step"]) if rows else 0
        record.take_up(before, keeping.session, config.workers)
        for look in (look for look in script.looks if look.step > before):
            time.sleep(script.pause)
            ends = look is script.looks[-1]
            progress = Progress(
                look.step,
                {f"quality/{objective}": look.dice for objective in get_args(ObjectiveName)},
                (look.step - before) * script.step_seconds,
                True,
                None,
                look.stability,
                script.verdict if ends else None,
                _nothing,
            )
            record.add(progress)
            before = look.step
            if ends:
                record.close(script.verdict)
            yield progress
        if record.verdict is None and before == script.looks[-1].step:  # killed between its last row and its verdict
            record.close(script.verdict)


def _nothing() -> State:
    return State({}, {})
