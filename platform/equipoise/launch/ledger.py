"""A study's points in Optuna's journal, each in the state it deserves.

Knows ask, report, prune and tell, and what a verdict is told as; knows nothing of Ray.

The journal is the only memory of a search: sampler and pruner read it, so a killed study loses nothing. A point whose
trial was left RUNNING by a killed driver is adopted before anything new is asked, and its run continues in its folder.

| the run | Optuna is told |
|---|---|
| ended, lived | COMPLETE, its Dice, constraint `search.violation`: met where S reaches `feasible` |
| diverged, saturated or collapsed | COMPLETE, the finite `search.FLOOR`, the constraint violated: FAIL would pull TPE \
towards it |
| recovered | COMPLETE, its Dice, the constraint violated whatever its S |
| stopped by the pruner | PRUNED, with its intermediate values |
| lost to infrastructure, retries spent | FAIL |

Every point keeps all it sets as the user attribute `point`, implied settings included. A control that the space does
not hold has no parameters: a sampler would blame what it searches for what it does not.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from equipoise import search
from equipoise.config import RunConfig
from equipoise.monitor import Horizon, Verdict
from equipoise.record import Record
from equipoise.search import Point
from equipoise.study import Study, StudyFolder
from slicestore.errors import InputError

REDUCTION = 2
"""Of the runs that reach a rung, the better half goes on."""
STARTUP = 16
"""Points drawn at random before TPE has its say; at most half of the study."""


def journal(path: Path) -> JournalStorage:
    """The journal as Optuna's storage. Its lock lapses after 30 s, should a killed process have held it."""
    return JournalStorage(JournalFileBackend(str(path)))


@dataclass(frozen=True, slots=True)
class Assignment:
    """A point to run."""

    number: int
    """Of the point in the study."""
    name: str
    """Of the run's folder."""
    config: RunConfig


class Ledger:
    """Asks for points and tells how they fared."""

    def __init__(self, folder: StudyFolder, study: Study) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.folder, self.study = folder, study
        storage = journal(folder.journal)
        known = study.name in optuna.get_all_study_names(storage)
        self._optuna = optuna.create_study(
            storage=storage,
            study_name=study.name,
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(
                multivariate=True,
                group=True,
                constant_liar=True,
                n_startup_trials=min(STARTUP, study.points // 2),
                seed=study.seed + (len(self._trials(storage)) if known else 0),
            ),
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=_first_rung(study.run), reduction_factor=REDUCTION
            ),
        )
        if not known:
            self._optuna.set_user_attr("question", study.question)
            self._enqueue(study)
        self._orphans = deque(t.number for t in self._optuna.get_trials(states=(TrialState.RUNNING,)))
        self._open: dict[int, optuna.trial.Trial] = {}
        pruned = self._optuna.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
        self._stopped = [Record(folder.runs / str(t.user_attrs["run"])) for t in pruned]

    def ask(self) -> Assignment | None:
        """The next point: first those a killed driver left behind, then new ones; None when all are asked."""
        self.settle(patience=0)
        if self._orphans:
            number = self._orphans.popleft()
            trial = optuna.trial.Trial(self._optuna, self._optuna.trials[number]._trial_id)
        elif self.asked < self.study.points:
            trial = self._optuna.ask()
        else:
            return None
        config = self.study.run.having(self._point(trial))
        name = f"{trial.number:04d}-{config.fingerprint[:8]}"
        trial.set_user_attr("run", name)
        self._open[trial.number] = trial
        return Assignment(trial.number, name, config)

    @property
    def asked(self) -> int:
        """Points that have been given out, ended or not."""
        return sum(t.state is not TrialState.WAITING for t in self._optuna.get_trials(deepcopy=False))

    @property
    def unfinished(self) -> int:
        """Points without a final state, asked or not: what a resume has left to do."""
        done = sum(t.state.is_finished() for t in self._optuna.get_trials(deepcopy=False))
        return self.study.points - done

    @property
    def failed(self) -> int:
        """Points that were lost to infrastructure."""
        return len(self._optuna.get_trials(deepcopy=False, states=(TrialState.FAIL,)))

    def hear(self, number: int, step: int, quality: float | None, stability: float) -> bool:
        """Note a run's Dice x S so far; whether it should stop, being worse than most at this step.

        A study's first points are its controls, such as published settings: they run to their end or divergence.
        """
        if quality is None:
            return False
        trial = self._open[number]
        trial.report(quality * stability, step)
        worse = trial.should_prune()  # asked for controls too: the pruner compares others with what it has been asked
        return worse and number >= len(self.study.first)

    def close(self, number: int, name: str) -> None:
        """Tell how a run ended that no error ended; one without a verdict was stopped by the pruner."""
        record, trial = Record(self.folder.runs / name), self._open.pop(number)
        verdict = record.verdict
        if verdict is None:
            trial.set_user_attr("verdict", "censored")
            self._stopped.append(record)
            self._tell(trial, TrialState.PRUNED)
            return
        self._describe(trial, verdict)
        trial.set_constraint("stability", search.violation(verdict, self.study.feasible))
        self._tell(trial, TrialState.COMPLETE, search.value(verdict, self._quality(record)))

    def settle(self, patience: float = 60.0) -> None:
        """Write the verdict of runs that were stopped, once their workers have let go of the record.

        Args:
            patience: seconds to wait for each; one that is still written to is left for the next call.
        """
        for record in [r for r in self._stopped if r.verdict is None]:
            try:
                with record.locked(patience):
                    rows = record.rows()
                    step = int(rows[-1]["step"]) if rows else 0
                    record.close(Verdict("censored", step, record.config.steps, None))
            except InputError:
                continue
        self._stopped = [r for r in self._stopped if r.verdict is None]

    def fail(self, number: int) -> None:
        """Tell that infrastructure failed a run for good; a study never holds that against the settings."""
        trial = self._open.pop(number)
        trial.set_user_attr("verdict", "infrastructure failure")
        self._tell(trial, TrialState.FAIL)

    def best(self) -> str | None:
        """Name of the run to confirm: the highest Dice among feasible points, else the highest Dice x S."""
        done = self._optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        records = [Record(self.folder.runs / str(t.user_attrs["run"])) for t in done]
        best = max(records, key=lambda r: search.rank(_verdict(r), self._quality(r), self.study.feasible), default=None)
        return best.name if best else None

    def _enqueue(self, study: Study) -> None:
        """Put the controls in front: all of them, should more points be asked for when the study is resumed."""
        for point, label in zip_longest(study.first, study.labels):
            told = {} if label is None else {"label": label}
            params = search.coordinates(point, study.space, study.run)
            self._optuna.enqueue_trial(
                params or {}, user_attrs=told if params is not None else told | {"point": dict(point)}
            )

    def _point(self, trial: optuna.trial.Trial) -> Point:
        """What a trial sets: known of a control outside the space, and of one that was asked before; else drawn."""
        known: Point | None = trial.user_attrs.get("point")
        if known is None:
            known = search.draw(trial, self.study.space, self.study.run)
            trial.set_user_attr("point", known)
        return known

    def _quality(self, record: Record) -> float:
        """The Dice that a run ended with; NaN where its end could not be measured."""
        return record.rows()[-1].get(f"quality/{self.study.objective}", float("nan"))

    def _describe(self, trial: optuna.trial.Trial, verdict: Verdict) -> None:
        """As user attributes too: the dashboard shows these."""
        for key, value in (
            ("verdict", verdict.kind),
            ("onset", verdict.onset),
            ("stability", verdict.stability),
            ("steps", verdict.step),
            ("sentence", verdict.sentence()),
        ):
            trial.set_user_attr(key, value)

    def _tell(self, trial: optuna.trial.Trial, state: TrialState, value: float | None = None) -> None:
        self._optuna.tell(trial, value, state=state)

    def _trials(self, storage: JournalStorage) -> Sequence[optuna.trial.FrozenTrial]:
        return storage.get_all_trials(storage.get_study_id_from_name(self.study.name), deepcopy=False)


def _verdict(record: Record) -> Verdict:
    verdict = record.verdict
    if verdict is None:
        raise InputError(
            record.folder,
            found="no verdict.json",
            rule="a point that the journal calls complete has one",
            remedy="restore the run's folder, or start a new study",
        )
    return verdict


def _first_rung(run: RunConfig) -> int:
    """The first step at which a run may be stopped for its Dice: a quarter of the run, past the monitor's warm-up."""
    horizon = Horizon.of(run.monitor, run.steps)
    return max(run.steps // 4, horizon.warm_up * horizon.block)
