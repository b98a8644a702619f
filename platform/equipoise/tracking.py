"""Watching runs while they train: their records, mirrored to whoever shows them.

Knows how to follow run folders; knows nothing of Ray or of who watches. Trackers live in the process that started the
work, not in the workers: they outlive any worker, and a slow or dead tracker costs no training step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from equipoise.monitor import Verdict
from equipoise.record import Record, Row

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Someone who is told what records say, in the order in which they say it."""

    def rows(self, record: Record, rows: Sequence[Row]) -> None:
        """New blocks of one run."""

    def ended(self, record: Record, verdict: Verdict) -> None:
        """The verdict of one run; its rows and pictures are complete."""

    def close(self) -> None:
        """Nothing more will come."""


class Watcher:
    """Follows run folders in a thread and tells trackers what is new. A context: leaving it takes a last look."""

    def __init__(self, records: Callable[[], list[Record]], trackers: Sequence[Tracker], every: float = 1.0) -> None:
        self._records, self._trackers, self._every = records, trackers, every
        self._seen: dict[Path, int] = {}
        self._ended: set[Path] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watcher", daemon=True)

    def __enter__(self) -> Self:
        """Start following."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the rest and let the trackers go."""
        self._stop.set()
        self._thread.join()
        self.look()
        for tracker in self._trackers:
            tell(tracker.close)

    def look(self) -> None:
        """Tell every tracker what has been written since the last look."""
        for record in self._records():
            if record.folder in self._ended:
                continue
            verdict = record.verdict  # before the rows: whoever sees a verdict has then seen every row
            seen = self._seen.get(record.folder, 0)
            rows = record.rows(seen)
            # A run that went back from a divergence has fewer rows than before: it is followed from there.
            self._seen[record.folder] = seen + len(rows) if rows else min(seen, len(record.rows()))
            for tracker in self._trackers:
                if rows:
                    tell(tracker.rows, record, rows)
                if verdict is not None:
                    tell(tracker.ended, record, verdict)
            if verdict is not None:
                self._ended.add(record.folder)

    def _follow(self) -> None:
        while not self._stop.wait(self._every):
            try:
                self.look()
            except Exception:  # a record half-way through a rewind, a storage that blinks: the next look tells
                log.debug("a look at the records failed", exc_info=True)


def tell(hear: Callable[..., None], *what: object) -> None:
    """A tracker that fails costs its own display and nothing else."""
    try:
        hear(*what)
    except Exception:
        log.warning("a tracker failed; the local record is complete all the same", exc_info=True)
