"""A step as a CUDA graph: recorded once, replayed without the launches in between.

Knows what recording asks of a function (fixed addresses, nothing made in passing, no trace of rehearsals); must not
know what a step does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from equipoise.step import Batch, Signals

REHEARSALS = 3
"""Calls before the recording, in which libraries choose kernels and buffers get their place."""


class Recording:
    """A function of a batch that gives signals, recorded at the first call's shapes."""

    def __init__(self, work: Callable[[Batch], Signals], undo: Callable[[], Callable[[], None]], batch: Batch) -> None:
        """Rehearse, take back what the rehearsals did, and record; recording itself does nothing.

        Args:
            work: reads and writes tensors at addresses that do not change, and never waits for the device.
            undo: remembers all that `work` changes, and returns what restores it in place.
            batch: any of the shapes to come.
        """
        self._batch = Batch(*(x.clone() for x in batch))
        restore = undo()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(REHEARSALS):
                work(self._batch)
        torch.cuda.current_stream().wait_stream(side)
        restore()
        del restore  # and its copy of all weights, before the recording takes memory of its own
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of this process may fetch the next batch meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            signals = work(self._batch)
            self._names = list(signals)
            self._row = torch.stack([signals[name].float() for name in self._names])

    def replay(self, batch: Batch) -> Signals:
        """Do the work on a batch."""
        for mine, given in zip(self._batch, batch, strict=True):
            mine.copy_(given, non_blocking=True)
        self._graph.replay()
        return dict(zip(self._names, self._row.clone().unbind(), strict=True))
