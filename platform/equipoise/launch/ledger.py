"""A study's points in Optuna's storage, each in the state it deserves.

Knows ask, report, prune and tell, and what a verdict is told as; knows nothing of Ray.

The storage is the only memory of a search: sampler and pruner read it, so a killed study loses nothing. A point whose
trial was left RUNNING by a session that has ended is adopted before anything new is asked, and its runs continue in
their folders; that of a session that lives is left to it, so that several may work on one study.

| the run | Optuna is told |
|---|---|
| ended, lived | COMPLETE, its Dice, constraint `search.violation`: met where S reaches `feasible` |
| diverged, saturated or collapsed | COMPLETE, the finite `search.FLOOR`, the constraint violated: FAIL would pull TPE \
towards it |
| recovered | COMPLETE, its Dice, the constraint violated whatever its S |
| stopped by the pruner | PRUNED, with its intermediate values |
| lost to infrastructure, retries spent | FAIL |

A point of several seeds is told once, when all have ended or nothing can make it feasible any more (`seeds`): its
first seed is compared with other points and may be stopped, those that follow run to their end.

Every point keeps all it sets as the user attribute `point`, implied settings included. A control that the space does
not hold has no parameters: a sampler would blame what it searches for what it does not.
"""

from __future__ import annotations

import fcntl
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest

import optuna
from optuna.trial import FrozenTrial, TrialState

from equipoise import search, seeds
from equipoise.config import RunConfig
from equipoise.launch import pruners, samplers
from equipoise.launch.journal import name_in, storage
from equipoise.launch.trials import Trials
from equipoise.monitor import Verdict
from equipoise.record import Record
from equipoise.search import Point
from equipoise.sessions import alive
from equipoise.study import Study, StudyFolder
from slicestore.errors import InputError

PATIENCE = 180.0
"""Seconds to wait for a worker to let go of a record."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A run of a point."""

    number: int
    """Of the point in the study."""
    name: str
    """Of the run's folder."""
    config: RunConfig
    races: bool = True
    """Whether it may be stopped for its Dice: a control may not, nor a point's second seed."""


@dataclass(slots=True)
class _Open:
    """A point that has been given out and not been told."""

    trial: optuna.trial.Trial
    runs: list[Assignment]
    """One a seed."""
    heard: set[int]
    """Steps that Optuna has been told of."""
    ended: list[seeds.Ended] = field(default_factory=list)
    """How its first runs ended."""

    def next(self) -> Assignment:
        """The first run that has not ended."""
        return self.runs[len(self.ended)]


class Ledger:
    """Asks for points and tells how they fared."""

    def __init__(self, folder: StudyFolder, study: Study, *, session: str = "", url: str | None = None) -> None:
        """Open the study's storage, or start it.

        Args:
            folder: the study's.
            study: its declaration.
            session: who asks; see `sessions`.
            url: a database to keep points in, instead of the folder's journal.

        Raises:
            InputError: its sampler cannot serve it, or the database does not answer.
        """
        samplers.quiet()
        self.folder, self.study, self._session = folder, study, session
        samplers.check(study)
        where, name = storage(folder, url), name_in(folder, url)
        with self._alone():
            known = name in optuna.get_all_study_names(where)
            self._optuna = optuna.create_study(
                storage=where,
                study_name=name,
                directions=["maximize"] * (1 + study.pareto),
                load_if_exists=True,
            )
            if not known:
                self._optuna.set_user_attr("question", study.question)
                self._enqueue(study)
        self._trials = Trials(self._optuna)
        self._memory = samplers.Memory(self._trials)
        self._optuna.pruner = pruners.pruner(study, self._trials)
        self._open: dict[int, _Open] = {}
        self._more: deque[Assignment] = deque()
        pruned = self._optuna.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
        self._stopped = [Record(folder.runs / str(t.user_attrs["run"])) for t in pruned]

    def ask(self) -> Assignment | None:
        """The next run: seeds of points at work, then points that a dead session left, then new ones.

        None when there is nothing to start now; `waiting` tells whether there may be later.
        """
        self.settle(patience=0)
        while not self._more:
            with self._alone():
                trial = self._left() or self._fresh()
                if trial is None:
                    return None
                self._take(trial)
        return self._more.popleft()

    @property
    def waiting(self) -> bool:
        """Whether a point at work may ask for another seed."""
        return self.study.seeds > 1 and bool(self._open)

    @property
    def unfinished(self) -> int:
        """Points without a final state, asked or not: what a resume has left to do."""
        self._trials.read()
        return self.study.points - len(self._trials.ended)

    @property
    def failed(self) -> int:
        """Points that were lost to infrastructure."""
        return len(self._optuna.get_trials(deepcopy=False, states=(TrialState.FAIL,)))

    @property
    def reasons(self) -> list[str]:
        """Why points were given up, as far as that is known: their runs, and what was said."""
        lost = self._optuna.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        return [f"{t.user_attrs['run']}: {t.user_attrs['why']}" for t in lost if "why" in t.user_attrs]

    def hear(self, run: Assignment, step: int, quality: float | None, stability: float) -> bool:
        """Note a run's Dice x S so far; whether it should stop, being worse than most at this step.

        A Dice that is not finite is noted as such, and stops a run at the next step at which runs are compared.
        """
        point = self._open[run.number]
        if quality is None or self.study.pareto or run != point.runs[0] or step in point.heard:
            return False
        point.heard.add(step)
        point.trial.report(quality * stability, step)
        if not math.isfinite(quality * stability):
            return run.races and self.study.pruner != "none" and step >= pruners.first_rung(self.study.run)
        worse = point.trial.should_prune()  # asked for controls too: the pruner compares others with those it has seen
        return worse and run.races

    def close(self, run: Assignment) -> None:
        """Tell how a run ended that no error ended; one without a verdict was stopped by the pruner."""
        record, point = Record(self.folder.runs / run.name), self._open[run.number]
        verdict = record.verdict
        if verdict is None:
            del self._open[run.number]
            point.trial.set_user_attr("verdict", "censored")
            self._stopped.append(record)
            self._optuna.tell(point.trial, state=TrialState.PRUNED)
            return
        self._note(point, verdict, record)

    def settle(self, patience: float = PATIENCE) -> None:
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

    def fail(self, run: Assignment, why: str = "") -> None:
        """Tell that a run was lost for good, to its machines or a mistake; that is never held against the settings."""
        trial = self._open.pop(run.number).trial
        trial.set_user_attr("verdict", "infrastructure failure")
        if why:
            trial.set_user_attr("why", why)
        self._optuna.tell(trial, state=TrialState.FAIL)

    def best(self) -> str | None:
        """Name of the run to confirm: of the feasible point of the highest Dice, else of the highest Dice x S."""
        done = self._optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best = max(done, key=lambda t: tuple(t.user_attrs["rank"]), default=None)
        return str(best.user_attrs["run"]) if best else None

    def _take(self, trial: optuna.trial.Trial) -> None:
        """Make a trial's point one of ours. What has ended of it already, before a kill, is told again."""
        trial.set_user_attr("session", self._session)
        runs = self.study.runs(self._point(trial))
        races = trial.number >= len(self.study.first)
        given = [
            Assignment(trial.number, f"{trial.number:04d}-{run.fingerprint[:8]}", run, races and nth == 0)
            for nth, run in enumerate(runs)
        ]
        trial.set_user_attr("run", given[0].name)
        heard = set(self._optuna._storage.get_trial(trial._trial_id).intermediate_values)
        point = self._open[trial.number] = _Open(trial, given, heard)
        self._more.append(given[0])
        for run in given[:-1]:  # the last is given out even if it has ended: a study of one seed needs no second way
            record = Record(self.folder.runs / run.name)
            if (verdict := record.verdict) is None or verdict.kind == "censored":
                break
            self._more.clear()
            self._note(point, verdict, record)

    def _note(self, point: _Open, verdict: Verdict, record: Record) -> None:
        """A seed's run has ended: give out the next, or tell the point."""
        study = self.study
        point.ended.append((verdict, self._quality(record)))
        if seeds.undecided(point.ended, study.seeds, study.feasible, study.over_seeds):
            self._more.append(point.next())
            return
        whole, dice = seeds.joined(point.ended, study.over_seeds) if study.seeds > 1 else point.ended[0]
        trial = self._open.pop(point.trial.number).trial
        self._describe(trial, whole, dice)
        values = [search.value(whole, dice)]
        if study.pareto:
            values.append(whole.stability or 0.0)
        else:
            trial.set_constraint("stability", search.violation(whole, study.feasible))
        self._optuna.tell(trial, values)

    def _left(self) -> optuna.trial.Trial | None:
        """A point that a session which has ended left unfinished."""
        for trial in self._trials.open():
            if trial.state is not TrialState.RUNNING:
                continue
            session = str(trial.user_attrs.get("session", ""))
            ours = session == self._session and trial.number in self._open
            others = session != self._session and alive(self.folder.folder, session)
            if not ours and not others:
                return optuna.trial.Trial(self._asking(trial.number), trial._trial_id)
        return None

    def _fresh(self) -> optuna.trial.Trial | None:
        waiting = sum(trial.state is TrialState.WAITING for trial in self._trials.open())
        asked = len(self._trials.known) - waiting
        if asked >= self.study.points:
            return None
        study = self._asking(asked)
        if waiting:
            return study.ask()
        # As `ask` does, but that looks through all trials for one that waits.
        return optuna.trial.Trial(study, study._storage.create_new_trial(study._study_id))

    def _asking(self, number: int) -> optuna.Study:
        """The study with the sampler that proposes this point."""
        study = self.study
        self._optuna.sampler = samplers.sampler(
            study.sampler, seed=study.seed, number=number, points=study.points, memory=self._memory
        )
        return self._optuna

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
        rows = record.rows()
        return rows[-1].get(f"quality/{self.study.objective}", float("nan")) if rows else float("nan")

    def _describe(self, trial: optuna.trial.Trial, verdict: Verdict, dice: float) -> None:
        """As user attributes too: the dashboard shows these."""
        for key, value in (
            ("verdict", verdict.kind),
            ("onset", verdict.onset),
            ("stability", verdict.stability),
            ("steps", verdict.step),
            ("sentence", verdict.sentence()),
            ("constraint", search.violation(verdict, self.study.feasible)),
            ("rank", search.rank(verdict, dice, self.study.feasible)),
        ):
            trial.set_user_attr(key, value)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only session that takes points: counting them and asking for one more must be one act."""
        with open(self.folder.folder / ".asking", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def states(folder: StudyFolder, url: str | None = None) -> list[FrozenTrial]:
    """Every point that Optuna knows of, in order."""
    return optuna.load_study(study_name=name_in(folder, url), storage=storage(folder, url)).get_trials(deepcopy=False)
