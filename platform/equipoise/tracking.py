"""Watching runs while they train: their records, mirrored to whoever shows them.

Knows how to follow run folders and how a record becomes a W&B run; knows nothing of Ray. Trackers live in the process
that started the work, not in the workers: they outlive any worker, and a slow or dead tracker costs no training step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from equipoise.config import RunConfig
from equipoise.monitor import Verdict
from equipoise.record import Record, Row
from equipoise.search import FAILED
from equipoise.uploading import Uploader, parts
from equipoise.wandb_file import history, summary

if TYPE_CHECKING:
    import wandb

WandbMode = Literal["online", "offline", "disabled"]
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
            _tell(tracker.close)

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
                    _tell(tracker.rows, record, rows)
                if verdict is not None:
                    _tell(tracker.ended, record, verdict)
            if verdict is not None:
                self._ended.add(record.folder)

    def _follow(self) -> None:
        while not self._stop.wait(self._every):
            try:
                self.look()
            except Exception:  # a record half-way through a rewind, a storage that blinks: the next look tells
                log.debug("a look at the records failed", exc_info=True)


def _tell(hear: Callable[..., None], *what: object) -> None:
    """A tracker that fails costs its own display and nothing else."""
    try:
        hear(*what)
    except Exception:
        log.warning("a tracker failed; the local record is complete all the same", exc_info=True)


def wandb_mode(wanted: WandbMode | None) -> tuple[WandbMode, str]:
    """The W&B mode that can be had, and a sentence that says so.

    Without a wish it is online with a key and offline without; online without a key falls back to offline.
    """
    if wanted in ("offline", "disabled"):
        return wanted, f"W&B {wanted}, as asked"
    import wandb

    if wandb.login(prompt=False, verify=False):
        return "online", "W&B online"
    if wanted == "online":
        return (
            "offline",
            "W&B offline: online was asked for but there is no API key; run `wandb login`, or set WANDB_API_KEY",
        )
    return "offline", "W&B offline: there is no API key; `equipoise sync` uploads the runs later"


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
        project: str = "equipoise",
        names: Mapping[RunConfig, str] | None = None,
    ) -> None:
        """Start no run yet.

        Args:
            folder: where W&B keeps its files.
            group: of all runs.
            prefix: of their ids.
            mode: online or offline.
            images: whether panels are logged.
            project: W&B's.
            names: what runs are called beside the names of their folders, by their settings; a run's notes.
        """
        self._names = names or {}
        self._folder, self._group, self._prefix, self._images = folder, group, prefix, images
        self._uploader = Uploader(folder) if mode == "online" else None
        self._project = project
        self._runs: dict[str, wandb.Run] = {}
        self._last: dict[str, int] = {}
        self._logged = logged(folder)

    def rows(self, record: Record, rows: Sequence[Row]) -> None:
        """Log blocks, each with the panels drawn at it. Rows that an earlier process logged are not repeated."""
        import wandb

        if self._before(record).ended:
            return
        run = self._run(record)
        for row in rows:
            step = int(row["step"])
            if step <= self._last[record.name]:
                continue
            data: dict[str, Any] = dict(row)
            picture = record.picture(step)
            if self._images and picture.is_file():
                data["panels"] = wandb.Image(str(picture), caption=f"step {step}")
            run.log(data, step=step, commit=True)
            self._last[record.name] = step

    def ended(self, record: Record, verdict: Verdict) -> None:
        """Summarise, alert where the run failed, and finish."""
        if self._before(record).ended:
            return
        run = self._run(record)
        run.summary.update(
            {
                "verdict": verdict.kind,
                "onset": verdict.onset,
                "stability": verdict.stability,
                "steps": verdict.step,
                "sentence": verdict.sentence(),
            }
        )
        run.tags = (*(run.tags or ()), verdict.kind)
        if verdict.kind in FAILED:
            run.alert(verdict.kind, f"{record.name}: {verdict.sentence()}", level="ERROR")
        run.finish()
        del self._runs[record.name]

    def close(self) -> None:
        """Close runs that have not ended; a resumed study continues them."""
        for run in self._runs.values():
            run.finish(exit_code=1)
        self._runs.clear()
        if self._uploader is not None and (left := self._uploader.close()):
            log.warning("%d runs are not at W&B in full yet: `equipoise sync` uploads the rest", left)

    def _before(self, record: Record) -> Logged:
        """What an earlier process, since killed or interrupted, logged of a run."""
        return self._logged.get(self._id(record), Logged())

    def _id(self, record: Record) -> str:
        return f"{self._prefix}-{record.name}"

    def _run(self, record: Record) -> wandb.Run:
        if record.name not in self._runs:
            self._runs[record.name] = self._start(record)
        return self._runs[record.name]

    def _start(self, record: Record) -> wandb.Run:
        import wandb

        self._folder.mkdir(parents=True, exist_ok=True)
        config = record.config
        # Nothing that names the user, the machine or its folders is collected; records are flushed as they come.
        settings = wandb.Settings(
            silent=True,
            host="",
            console="off",
            x_disable_stats=True,
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=1.0,
        )
        run = wandb.init(
            project=self._project,
            group=self._group,
            id=self._id(record),
            name=record.name,
            mode="offline",
            job_type="confirmation" if record.confirms else "point",
            dir=str(self._folder),
            config=config.flat(),
            tags=[config.loss.adversarial],
            notes=self._names.get(config),
            resume="allow",
            reinit="create_new",
            settings=settings,
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._last[record.name] = self._before(record).step
        if self._uploader is not None:
            self._uploader.follow(self._id(record))
        return run


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
