"""A study over the cluster, by Ray Tune.

Knows how points become Tune trials and how their states travel; Tune executes, `Ledger` remembers. Tune's own snapshots
are not used to resume: journal and run folders are, so a stale snapshot can neither repeat nor lose a run.

A run with one worker trains inside its trial, whose process is kept warm for the next; a run with more starts a Ray
Train worker group from a trial that takes no CPU itself, so that trials and their groups cannot lock each other out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search import Searcher

from equipoise.config import RunConfig
from equipoise.launch.cluster import Share, room
from equipoise.launch.ledger import Ledger
from equipoise.launch.local import launch
from equipoise.launch.ray_train import report, train
from equipoise.record import Record
from equipoise.study import Study, StudyFolder

RETRIES = 2
"""Times that a run is retried, from its last checkpoint, when its machine or process is lost."""


class LedgerSearcher(Searcher):
    """Hands the ledger's points to Tune, and says how Tune's trials ended."""

    def __init__(self, ledger: Ledger, job: Mapping[str, Any]) -> None:
        super().__init__(metric="step", mode="max")
        self._ledger, self._job = ledger, job
        self._given: dict[str, tuple[int, str]] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next point, as the trial's config; `FINISHED` when all are given out."""
        point = self._ledger.ask()
        if point is None:
            return Searcher.FINISHED
        self._given[trial_id] = (point.number, point.name)
        return {**self._job, "name": point.name, "run": point.config.to_dict()}

    def worse(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Note Dice and stability so far; whether the ledger wants the trial stopped."""
        number, _ = self._given[trial_id]
        quality = result.get(f"quality/{self._ledger.study.objective}")
        return self._ledger.hear(number, int(result["step"]), quality, result["stability"])

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tell how the run ended."""
        number, name = self._given.pop(trial_id)
        if error:
            self._ledger.fail(number)
        else:
            self._ledger.close(number, name)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the journal holds it all."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles searchers into a snapshot that is never read back: a ledger has no place in it."""
        return {}


class LedgerStopper(tune.Stopper):
    """Stops a trial at the very report by which the ledger's pruner finds it worse than most."""

    def __init__(self, searcher: LedgerSearcher) -> None:
        self._searcher = searcher

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Whether to stop the trial; one that has ended by itself is left to end."""
        return not (result.get("ended") or result.get("done")) and self._searcher.worse(trial_id, result)

    def stop_all(self) -> bool:
        """Never: the searcher says when the study is finished."""
        return False

    def __getstate__(self) -> dict[str, Any]:
        """As for the searcher."""
        return {}


def search_points(folder: StudyFolder, study: Study, store: str | Path, share: Share) -> Ledger:
    """Run every point of a study that has not ended yet, as many at a time as the cluster holds.

    Raises:
        InputError: the cluster cannot hold a single run.
    """
    ledger = Ledger(folder, study)
    job = {"runs": str(folder.runs), "store": str(store), "cpus": share.cpus, "gpus": share.gpus}
    searcher = LedgerSearcher(ledger, job)
    alone = study.run.workers == 1
    # A trial that leads a worker group takes no CPU itself; Tune wants some resource all the same.
    needs = {k.lower(): v for k, v in share.resources().items()} if alone else {"cpu": 0, "memory": 1e6}
    tuner = tune.Tuner(
        tune.with_resources(_point if alone else _distributed_point, needs),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            max_concurrent_trials=room(share, study.run.workers),
            reuse_actors=alone,
            trial_dirname_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{int(time.time())}",
            storage_path=str(folder.folder / "ray"),
            verbose=0,
            stop=LedgerStopper(searcher),
            failure_config=tune.FailureConfig(max_failures=RETRIES),
        ),
    )
    tuner.fit()
    ledger.settle()
    return ledger


def _point(trial: dict[str, Any]) -> None:
    """A one-worker run, inside its Tune trial."""
    torch.set_num_threads(max(1, int(trial["cpus"])))
    folder = Path(trial["runs"]) / trial["name"]
    for progress in launch(folder, RunConfig.from_dict(trial["run"]), trial["store"]):
        if progress.looked and progress.verdict is None:
            tune.report(report(progress.step, progress.signals, progress.stability))
    _report_end(folder)


def _distributed_point(trial: dict[str, Any]) -> None:
    """A run of several workers, led by its Tune trial."""
    folder = Path(trial["runs"]) / trial["name"]
    train(
        folder,
        RunConfig.from_dict(trial["run"]),
        trial["store"],
        Share(trial["cpus"], trial["gpus"]),
        callbacks=[TuneReportCallback()],
    )
    _report_end(folder)


def _report_end(folder: Path) -> None:
    """The last report of a run that ended by itself, now or before its driver was killed."""
    row = Record(folder).rows()[-1]
    tune.report({**report(int(row["step"]), row, row["divergence/stability"]), "ended": True})


def _trial_id(trial: Any) -> str:
    return str(trial.trial_id)


os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # every run keeps its own record
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # a study prints its own table
