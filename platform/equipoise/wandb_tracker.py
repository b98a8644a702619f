"""Records as W&B's runs.

Knows how a run's record becomes a run at W&B, and a study a run of its own beside them; knows nothing of Ray, nor of
how runs get from W&B's files to its server.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise import wandb_row, wandb_run, wandb_study
from equipoise.config import RunConfig, nearest_preset
from equipoise.monitor import Verdict
from equipoise.record import Record, Row
from equipoise.search import FAILED
from equipoise.study import StudyFolder
from equipoise.uploading import Uploader, parts, tidy
from equipoise.wandb_file import history, summary
from equipoise.wandb_run import WandbMode

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)


class WandbTracker:
    """One W&B run per run, named and grouped as in the study, continued under the same id after a restart.

    Runs are written to files, and online they are uploaded from there meanwhile: W&B out of reach costs nothing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        group: str,
        prefix: str,
        mode: WandbMode,
        images: bool,
        objective: str = "translated_dice",
        gpus: float = 0.0,
        names: Mapping[RunConfig, str] | None = None,
        model: bool = True,
    ) -> None:
        """Start no run yet.

        Args:
            folder: where W&B keeps its files.
            group: of all runs.
            prefix: of their ids.
            mode: online or offline.
            images: whether panels are logged.
            objective: which Dice, or the composite, a run is summarised by.
            gpus: of a worker; hours of GPUs are those of devices times this.
            names: what runs are called beside the names of their folders, by their settings; a run's notes.
            model: whether a study's best checkpoint is given too.
        """
        self._names = names or {}
        self._folder, self._group, self._prefix, self._images = folder, group, prefix, images
        self._objective, self._gpus, self._model = objective, gpus, model
        self._uploader = Uploader(folder) if mode == "online" else None
        self._runs: dict[str, wandb.Run] = {}
        self._last: dict[str, int] = {}
        """Of each run, the last step that was logged."""
        self._seen: dict[str, tuple[int, float]] = {}
        """Of each run, the last step that was read, and device-hours up to it."""
        self._logged = logged(folder)

    def rows(self, record: Record, rows: Sequence[Row]) -> None:
        """Log blocks, each with the panels drawn at it. Rows that an earlier process logged are not repeated."""
        if self._before(record).ended:
            return
        run, workers = self._run(record), record.config.workers
        for row in rows:
            step, (before, hours) = int(row["step"]), self._seen.get(record.name, (0, 0.0))
            hours += row.get("time/block", 0.0) * row.get("time/workers", workers) / 3600
            self._seen[record.name] = step, hours
            if step <= self._last[record.name]:
                continue
            data: dict[str, Any] = dict(wandb_row.row(row, before if before < step else 0, hours))
            picture = record.picture(step)
            if self._images and picture.is_file():
                data |= wandb_row.panels(picture, step)
            run.log(data, step=step, commit=True)
            self._last[record.name] = step

    def ended(self, record: Record, verdict: Verdict) -> None:
        """Mark the onset, summarise, alert where the run failed, and finish."""
        if self._before(record).ended:
            return
        run, rows = self._run(record), record.rows()
        if verdict.onset is not None and rows and (mark := wandb_row.onset_row(rows, verdict.onset)):
            run.log(mark, commit=True)
        run.summary.update(wandb_study.judged(record, self._objective) | wandb_study.cost(record, self._gpus))
        run.tags = (*(run.tags or ()), verdict.kind)
        if verdict.kind in FAILED:
            run.alert(verdict.kind, f"{record.name}: {verdict.sentence()}", level="ERROR")
        run.finish()
        del self._runs[record.name]

    def conclude(self, folder: StudyFolder, best: str | None) -> None:
        """Tell of the study as a whole, by a run of its own: what it came to and cost, its best checkpoint, its store.

        Args:
            folder: the study, at its end.
            best: name of the best point's run, if there is one.
        """
        study = folder.study
        about, tags = wandb_study.about(study), [nearest_preset(study.run)]
        run = self._start(f"{self._prefix}-study", study.name, "study", about, tags)
        wandb_study.tell(run, folder, best, self._gpus, model=self._model)
        run.finish()

    def close(self) -> None:
        """Close runs that have not ended; a resumed study continues them."""
        for run in self._runs.values():
            run.finish(exit_code=1)
        self._runs.clear()
        if self._uploader is not None and (left := self._uploader.close()):
            log.warning("%d runs are not at W&B in full yet: `equipoise sync` uploads the rest", left)
        tidy(self._folder)

    def _before(self, record: Record) -> Logged:
        """What an earlier process, since killed or interrupted, logged of a run."""
        return self._logged.get(self._id(record), Logged())

    def _id(self, record: Record) -> str:
        return f"{self._prefix}-{record.name}"

    def _run(self, record: Record) -> wandb.Run:
        if record.name not in self._runs:
            config = record.config
            job = "confirmation" if record.confirms else "point"
            tags = [config.loss.adversarial, nearest_preset(config)]
            notes = self._names.get(config)
            self._runs[record.name] = self._start(self._id(record), record.name, job, config.to_dict(), tags, notes)
            self._last[record.name] = self._before(record).step
        return self._runs[record.name]

    def _start(
        self, id_: str, name: str, job: str, about: Mapping[str, Any], tags: Sequence[str], notes: str | None = None
    ) -> wandb.Run:
        made = wandb_run.begin(
            self._folder, group=self._group, run_id=id_, name=name, job=job, about=about, tags=tags, notes=notes
        )
        if self._uploader is not None:
            self._uploader.follow(id_)
        return made


@dataclass(frozen=True, slots=True)
class Logged:
    """What W&B's offline files hold of a run."""

    step: int = 0
    """The last step."""
    ended: bool = False
    """Whether its verdict is there."""


def logged(folder: Path) -> dict[str, Logged]:
    """What offline files under `folder` hold, by run id; a run that was resumed has several."""
    return {run_id: _logged(paths) for run_id, paths in parts(folder).items()}


def _logged(paths: Sequence[Path]) -> Logged:
    steps = [int(row["step"]) for path in paths for row in history(path) if "step" in row]
    return Logged(max(steps, default=0), any("verdict" in summary(path) for path in paths))
