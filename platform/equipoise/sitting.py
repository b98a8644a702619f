"""Training, written down: from a run's folder as it was left to its verdict, or to the next kill.

Knows when checkpoints are due, when a run goes back and what rank 0 does; must not know Ray, or how a step is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from equipoise import checkpoint, recovery
from equipoise.batches import Cohort
from equipoise.config import RunConfig
from equipoise.copies import Copies, NoCopies
from equipoise.keeping import Keeping
from equipoise.monitor import Verdict
from equipoise.ranks import Ranks
from equipoise.record import Record
from equipoise.train import Progress, evaluations, fit
from equipoise.writing import sync, told
from slicestore.errors import InputError


def recorded(
    folder: Path,
    config: RunConfig,
    cohort: Cohort,
    *,
    ranks: Ranks | None = None,
    keeping: Keeping | None = None,
    elastic: bool = False,
) -> Iterator[Progress]:
    """`fit`, written down: every `Progress` is on disk before it is handed on. Continues where the folder left off.

    Nothing is yielded when the run has ended already; only the verdict, without signals, when it was killed between its
    last checkpoint and that. Rank 0 writes; every rank saves its part of a checkpoint.

    Args:
        folder: of the run.
        config: the run.
        cohort: its slices.
        ranks: the data-parallel group; alone by default.
        keeping: how states are kept.
        elastic: whether the group may be of another size than `config.workers`. The batch is then shared out over the
            ranks there are; what is a rank's own in a checkpoint of another number of ranks begins afresh.

    Raises:
        InputError: another process writes the run, its settings are others, its number of workers is another and it is
            not elastic, or the disk refuses. Nothing that was written is lost: a later call continues.
    """
    ranks, keeping = ranks or Ranks(), keeping or Keeping()
    if ranks.world != config.workers and not elastic:
        raise InputError(
            "workers",
            found=f"{ranks.world} where {folder.name} has {config.workers}",
            rule="a run trains with the number of workers it was started with, unless it is elastic",
            remedy="start as many, or set workers when the run is declared",
        )
    record = Record(folder)
    if ranks.rank == 0:
        with record.locked():
            copies = Copies.of(folder, keeping.copies)
            record.is_of(config)  # before anything is fetched into it
            copies.begin(config)
            record.open(config, cohort.device)
            record.note(cohort.intake)
            yield from _Sitting(record, config, cohort, ranks, keeping, elastic, copies).all()
    else:
        yield from _Sitting(record, config, cohort, ranks, keeping, elastic, NoCopies()).all()


@dataclass(slots=True)
class _Sitting:
    """What one process, or one group, does of a run until the run ends or the process is killed."""

    record: Record
    config: RunConfig
    cohort: Cohort
    ranks: Ranks
    keeping: Keeping
    elastic: bool
    copies: NoCopies

    @property
    def checkpoints(self) -> Path:
        return self.record.folder / "checkpoints"

    def all(self) -> Iterator[Progress]:
        self.ranks.wait()
        ended, first = self.record.verdict is not None, True
        self.ranks.wait()
        try:
            if ended:
                self.copies.end()  # which may not have been possible at the time
            while not ended:
                ended, first = (yield from self.stretch(first)), False
        finally:
            self.copies.wait()

    def stretch(self, first: bool) -> Generator[Progress, None, bool]:
        """Train on from the newest checkpoint; whether that ended the run, or a divergence that it went back from."""
        record, ranks, returns = self.record, self.ranks, self.record.returns
        state = self.state()
        before = state.shared["step"] if state else 0
        if ranks.rank == 0 and first:
            record.take_up(before, self.keeping.session, ranks.world)
        now = recovery.remedied(self.config, len(returns)).at("workers", ranks.world)
        for progress in fit(now, self.cohort, ranks=ranks, resume=state, past=[r.divergence for r in returns]):
            if ranks.rank == 0 and progress.signals:
                record.add(progress, ranks.world if ranks.world != self.config.workers else None)
            verdict = progress.verdict
            if verdict is not None and verdict.kind in recovery.KINDS and len(returns) < self.config.recovery.times:
                self.go_back(verdict)
                yield dataclasses.replace(progress, verdict=None)
                return False
            if progress.looked or self.keeping.due(before, progress.step):
                self.save(progress)
            before = progress.step
            if verdict is not None and ranks.rank == 0:
                record.close(verdict)
                self.copies.end()
            yield progress
        return True

    def state(self) -> checkpoint.State | None:
        """What the newest checkpoint holds for this rank."""
        found = checkpoint.latest(self.checkpoints)
        step = checkpoint.step_of(found) if found else 0
        newest = self.ranks.tell({"step": step})["step"]
        if step != newest:
            raise InputError(
                self.checkpoints,
                found=f"step {step} as the newest checkpoint, where rank 0 found step {newest:.0f}",
                rule="all workers of a run see its folder",
                remedy="keep runs of several workers on storage that all machines share",
            )
        if found is None:
            return None
        if self.elastic and checkpoint.workers_of(found) != self.ranks.world:
            return checkpoint.load_shared(found)
        return checkpoint.load(found, self.ranks.rank)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, after an evaluation weights too; the rows up to it survive a power cut before it does."""
        if self.ranks.rank == 0:
            path = self.record.folder / "signals.jsonl"
            with told(path):
                sync(path)
        held = recovery.held(self.config, progress.step, evaluations(self.config))
        state, kept = progress.state(), self.keeping.kept
        if self.ranks.rank == 0 and progress.looked:
            self.record.keep(progress.step, state)
        checkpoint.save(self.checkpoints, progress.step, state, self.ranks, kept=kept, held=held)
        if progress.verdict is None:  # else the verdict goes with it
            self.copies.update()

    def go_back(self, verdict: Verdict) -> None:
        self.ranks.wait()
        if self.ranks.rank == 0:
            self.record.go_back(verdict, self.config)
            self.copies.update()
        self.ranks.wait()
