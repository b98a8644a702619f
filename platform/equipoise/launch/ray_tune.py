"""A study over the cluster, by Ray Tune.

Knows how points become Tune trials and how their states travel; Tune executes, `Ledger` remembers. Tune's own snapshots
are not used to resume: Optuna's storage and run folders are, so a stale snapshot can neither repeat nor lose a run.

A run with one worker trains inside its trial, whose process is kept warm for the next; a run with more starts a Ray
Train worker group from a trial that takes no CPU itself, so that trials and their groups cannot lock each other out.

Why not Tune's own `OptunaSearch`: the same contract is put to both in `tests/equipoise/launch/test_contract.py`, and
there it is seen which clauses that one breaks. A run that ends with NaN stays RUNNING for ever, one that a scheduler
stops is told COMPLETE with the value it had so far, and divergence cannot be told as a violated constraint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from optuna.exceptions import StorageInternalError
from ray import tune
from ray.train import WorkerGroupError
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search import Searcher

from equipoise import checkpoint
from equipoise.config import RunConfig
from equipoise.copies import Copies
from equipoise.keeping import Keeping
from equipoise.launch.cluster import Share
from equipoise.launch.ledger import PATIENCE, Assignment, Ledger
from equipoise.launch.local import launch
from equipoise.launch.ray_train import report, train
from equipoise.record import Record
from equipoise.study import Study, StudyFolder
from equipoise.train import Progress
from slicestore.errors import InputError, StorageError

RETRIES = 2
"""Times that a session retries a run without its getting any further: what costs a machine now and then is retried as
often as it takes, what kills its own process is not."""
LIMIT = 50
"""Times that a session retries a run in any case, such as one whose process never comes to life."""
Work = Callable[..., Iterator[Progress]]
"""Does a run of one worker: `local.launch`, or what stands in for it where nothing is to be trained."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """How a study's runs are done, beyond what they are."""

    share: Share
    """What each worker gets."""
    slots: int
    """Runs at once."""
    least: int | None = None
    """Workers that a run goes on with when machines are lost; None: with all or not at all."""
    keeping: Keeping = dataclasses.field(default_factory=Keeping)
    """How states are kept."""
    work: Work = launch
    """What a run of one worker does."""
    warm: bool = True
    """Whether a run's process is kept for the next one."""
    url: str | None = None
    """Database of the points; None: the folder's journal."""
    chapter: int = 1000
    """Runs after which Tune is started anew: it keeps every trial that it ever had, and looks through them all."""


def _placeless(why: str, job: Mapping[str, Any]) -> str:
    """Words on a mistake without the user's folders: they are kept with the point, which others may look at."""
    places = {job["store"]: "STORE", str(Path(job["runs"]).parent): "STUDY", job["keeping"].copies: "COPIES"}
    for place in sorted(filter(None, places), key=len, reverse=True):
        why = why.replace(place, places[place])
    return re.sub(r"(?<![\w.])/[^\s:;,'\"()]*/", ".../", why)


class LedgerSearcher(Searcher):
    """Hands the ledger's runs to Tune, and says how Tune's trials ended."""

    def __init__(self, ledger: Ledger, job: Mapping[str, Any], most: int) -> None:
        """Args: what remembers, what every trial is told, and how many runs to give out."""
        super().__init__(metric="step", mode="max")
        self._ledger, self._job, self._left = ledger, job, most
        self._given: dict[str, Assignment] = {}
        self._stopping: set[str] = set()
        self.trouble: InputError | None = None
        """Why the study cannot go on, such as a full disk; its points are left as they are."""
        self.finished = False
        """Whether there is nothing left to give out."""

    @property
    def through(self) -> bool:
        """Whether all runs that it was to give out have ended, and there may be more: Ctrl-C leaves some open."""
        return not (self.finished or self.trouble or self._left or self._given)

    def suggest(self, trial_id: str) -> Any:
        """The next run, as the trial's config; `FINISHED` when all are given out, None when there may be more later."""
        if self.trouble or not self._left:
            return Searcher.FINISHED
        run = None
        with self._troubles():
            run = self._ledger.ask()
        if run is None:
            self.finished = self.trouble is None and not self._ledger.waiting
            return Searcher.FINISHED if self.finished or self.trouble else None
        self._given[trial_id], self._left = run, self._left - 1
        return {**self._job, "name": run.name, "run": run.config.to_dict()}

    def worse(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Note Dice and stability so far; whether the ledger wants the trial stopped."""
        with self._troubles():
            quality = result.get(f"quality/{self._ledger.study.objective}")
            if self._ledger.hear(self._given[trial_id], int(result["step"]), quality, result["stability"]):
                self._stopping.add(trial_id)
                return True
        return False

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tell how the run ended: by itself, stopped, lost, or as it is because the study cannot go on."""
        run, told = self._given.pop(trial_id), result or {}
        if told.get("trouble"):
            self.trouble = self.trouble or StorageError(**json.loads(told["trouble"]))
        if self.trouble:
            return
        with self._troubles():
            if error or told.get("spent") or not (told.get("ended") or trial_id in self._stopping):
                self._ledger.fail(run, _placeless(str(told.get("spent") or ""), self._job))
            else:
                self._ledger.close(run)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger's storage holds it all."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles searchers into a snapshot that is never read back: a ledger has no place in it."""
        return {}

    @contextmanager
    def _troubles(self) -> Iterator[None]:
        """Remember why the study's own storage failed: Tune would go on, or end in a traceback of its own."""
        try:
            yield
        except InputError as error:
            self.trouble = self.trouble or error
        except (OSError, StorageInternalError) as error:
            cause = error.__cause__ or error
            self.trouble = self.trouble or InputError(
                self._ledger.folder.folder,
                found=f"no way to keep the study's points ({str(cause).splitlines()[0]})",
                rule="every point's state is written as it changes",
                remedy="make room, or bring the storage back, and resume: nothing written is lost",
            )


class LedgerStopper(tune.Stopper):
    """Stops a trial at the very report by which the ledger's pruner finds it worse than most."""

    def __init__(self, searcher: LedgerSearcher) -> None:
        """Args: what hears the reports."""
        self._searcher = searcher

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Whether to stop the trial; one that has ended by itself is left to end."""
        over = any(result.get(word) for word in ("ended", "spent", "trouble", "done"))
        return not over and self._searcher.worse(trial_id, result)

    def stop_all(self) -> bool:
        """Whether the study cannot go on; when it is finished the searcher says."""
        return self._searcher.trouble is not None

    def __getstate__(self) -> dict[str, Any]:
        """As for the searcher."""
        return {}


def search_points(folder: StudyFolder, study: Study, store: str | Path, terms: Terms) -> Ledger:
    """Run every point of a study that has not ended yet, `terms.slots` at a time.

    Raises:
        InputError: the study's storage failed; what was written is kept, and a resume goes on from there.
    """
    ledger = Ledger(folder, study, session=terms.keeping.session, url=terms.url)
    alone = study.run.workers == 1
    job = {
        "runs": str(folder.runs),
        "store": str(store),
        "share": terms.share,
        "least": terms.least,
        "keeping": terms.keeping,
        "work": terms.work,
    }
    while True:
        searcher = LedgerSearcher(ledger, job, terms.chapter)
        _tuner(folder, searcher, terms, alone).fit()
        if searcher.trouble:
            raise searcher.trouble
        if not searcher.through:
            break
    # After Ctrl-C workers hold their records until Ray has gone: a resume settles those.
    ledger.settle(0 if ledger.unfinished else PATIENCE)
    for record in folder.records() if terms.keeping.copies else ():
        if record.verdict is not None and record.verdict.kind == "censored":  # given by the ledger, and so not copied
            Copies.of(record.folder, terms.keeping.copies).end()
    return ledger


def _tuner(folder: StudyFolder, searcher: LedgerSearcher, terms: Terms, alone: bool) -> tune.Tuner:
    # A trial that leads a worker group takes no CPU itself; Tune wants some resource all the same.
    needs = {k.lower(): v for k, v in terms.share.resources().items()} if alone else {"cpu": 0, "memory": 1e6}
    return tune.Tuner(
        tune.with_resources(_point if alone else _distributed_point, needs),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            max_concurrent_trials=terms.slots,
            reuse_actors=alone and terms.warm,
            trial_dirname_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{time.time_ns()}",
            storage_path=str(folder.folder / "ray"),
            verbose=0,
            stop=LedgerStopper(searcher),
            failure_config=tune.FailureConfig(max_failures=LIMIT),
        ),
    )


def _point(trial: dict[str, Any]) -> None:
    """A one-worker run, inside its Tune trial."""
    torch.set_num_threads(max(1, int(trial["share"].cpus)))
    record = Record(Path(trial["runs"]) / trial["name"])

    def work() -> None:
        config = RunConfig.from_dict(trial["run"])
        for progress in trial["work"](record.folder, config, trial["store"], keeping=trial["keeping"]):
            if progress.looked and progress.verdict is None:
                tune.report(report(progress.step, progress.signals, progress.stability))

    _lead(record, trial["keeping"].session, work)


def _distributed_point(trial: dict[str, Any]) -> None:
    """A run of several workers, led by its Tune trial."""
    record = Record(Path(trial["runs"]) / trial["name"])

    def work() -> None:
        train(
            record.folder,
            RunConfig.from_dict(trial["run"]),
            trial["store"],
            trial["share"],
            least=trial["least"],
            keeping=trial["keeping"],
            callbacks=[TuneReportCallback()],
        )

    _lead(record, trial["keeping"].session, work)


def _lead(record: Record, session: str, work: Callable[[], None]) -> None:
    """Do a run and report its end: what it came to, or why trying again would help nobody."""
    if spent(record, session):
        tune.report({"step": 0, "stability": 0.0, "spent": f"it ended its process {RETRIES + 1} times at one step"})
        return
    try:
        work()
    except (InputError, WorkerGroupError) as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        tune.report({"step": 0, "stability": 0.0, **_told(mistake)})
        return
    row = record.rows()[-1]
    tune.report({**report(int(row["step"]), row, row["divergence/stability"]), "ended": True})


def _told(error: InputError) -> dict[str, Any]:
    """A mistake as a report: a disk that refuses stops the study, anything else is the run's own."""
    if isinstance(error, StorageError):
        parts = {"where": error.where, "found": error.found, "rule": error.rule, "remedy": error.remedy}
        return {"trouble": json.dumps(parts)}  # Tune takes what is nested apart
    return {"spent": str(error)}


def _mistake(error: Exception) -> InputError | None:
    """What somebody can mend, if that is what ended a run or one of its workers."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else (error,)
    causes = (getattr(failure, "_base_exc", failure) for failure in failures)  # Ray Train wraps what a worker raised
    return next((cause for cause in causes if isinstance(cause, InputError)), None)


def spent(record: Record, session: str) -> bool:
    """Whether a session has taken a run up `RETRIES` + 1 times from one step without its getting any further."""
    found = checkpoint.latest(record.folder / "checkpoints")
    last = [attempt.step for attempt in record.attempts if attempt.session == session][-RETRIES - 1 :]
    stuck = len(last) > RETRIES and len(set(last)) == 1
    return stuck and record.verdict is None and (found is None or checkpoint.step_of(found) <= last[0])


def _trial_id(trial: Any) -> str:
    return str(trial.trial_id)


os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # every run keeps its own record
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # a study prints its own table
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # machines are lost now and then: Tune keeps error.txt
