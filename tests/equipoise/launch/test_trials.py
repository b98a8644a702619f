"""What is kept of a study's trials is what Optuna would say, whoever changed them."""

from __future__ import annotations

import random
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from equipoise.launch import samplers
from equipoise.launch.journal import journal
from equipoise.launch.pruners import Comparing
from equipoise.launch.trials import Trials


def told(trials: list[FrozenTrial]) -> list[tuple[int, str, list[float] | None]]:
    return [(trial.number, trial.state.name, trial.values) for trial in trials]


def played(study: optuna.Study, rng: random.Random, trials: int) -> None:
    """Ask for trials and end those at work in any order and any way; a few stay open."""
    at_work: list[optuna.trial.Trial] = []
    for _ in range(trials):
        at_work.append(study.ask())
        while len(at_work) > rng.randrange(1, 4):
            trial = at_work.pop(rng.randrange(len(at_work)))
            trial.set_constraint("stability", rng.choice((-1.0, 1.0)))
            state = rng.choice((TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL))
            study.tell(trial, rng.randrange(5) / 5 if state is TrialState.COMPLETE else None, state=state)


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(storage=journal(tmp_path / "journal.log"), study_name="s", direction="maximize")


def test_they_are_what_optuna_says_also_of_what_another_session_did(study: optuna.Study, tmp_path: Path) -> None:
    other = optuna.load_study(study_name="s", storage=journal(tmp_path / "journal.log"))
    kept, rng = Trials(study), random.Random(0)
    assert kept.read() == []
    study.enqueue_trial({"x": 1.0})
    for turn in range(12):
        played((study, other)[turn % 2], rng, 7)
        now = study.get_trials(deepcopy=False)
        assert told(kept.read()) == told(now)
        assert told(kept.open()) == told([trial for trial in now if not trial.state.is_finished()])
        assert sorted(kept.ended) == [trial.number for trial in now if trial.state.is_finished()]


def test_the_newest_and_the_best_of_the_older_are_recalled(study: optuna.Study) -> None:
    memory, rng = samplers.Memory(Trials(study), 8), random.Random(1)
    for _ in range(20):
        played(study, rng, 4)
        now = study.get_trials(deepcopy=False)
        older = [trial for trial in now[:-4] if trial.state.is_finished()]
        best = sorted(older, key=lambda trial: (-merit(trial)[0], -merit(trial)[1], trial.number))[:4]
        expected = now if len(now) <= 8 else [*sorted(best, key=lambda trial: trial.number), *now[-4:]]
        assert told(memory.recall()) == told(expected)


def test_a_run_is_compared_with_the_newest_only(study: optuna.Study) -> None:
    study.pruner = Comparing(optuna.pruners.MedianPruner(n_startup_trials=2), Trials(study), memory=4)
    for value in (0.9, 0.9, 0.9, 0.3, 0.3, 0.3):
        trial = study.ask()
        trial.report(value, 1)
        study.tell(trial, value)
    trial = study.ask()  # the fourth of those that count
    trial.report(0.5, 1)
    assert not trial.should_prune()
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    assert trial.should_prune()


def merit(trial: FrozenTrial) -> tuple[bool, float]:
    complete = trial.state is TrialState.COMPLETE
    assert trial.values or not complete
    return complete and trial.constraints["stability"] <= 0, trial.values[0] if trial.values else float("-inf")
