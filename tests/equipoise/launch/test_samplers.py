"""Any of Optuna's samplers proposes points, the same ones however often a study is resumed, in bounded time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial

from equipoise.config import PUBLISHED
from equipoise.launch import samplers
from equipoise.launch.ledger import Ledger
from equipoise.launch.trials import Trials
from equipoise.search import Choice, Range
from equipoise.study import Study, StudyFolder
from slicestore.errors import InputError

pytestmark = pytest.mark.filterwarnings(
    "ignore::optuna.exceptions.ExperimentalWarning", "ignore:Constraints have been set, but CmaEsSampler:UserWarning"
)
STUDY = Study(
    name="samplers",
    question="?",
    run=PUBLISHED.at("steps", 400),
    space={
        "optim.lr": Range(1e-5, 1e-2),
        "critic.penalty": Choice(("none", "r1")),
        "critic.gamma": Range(1e-2, 1e2, when={"critic.penalty": ("r1",)}),
    },
    points=12,
)
ABLE = [name for name in samplers.names() if name != "BruteForceSampler"]


def proposed(folder: Path, study: Study, *, resumed_after: int | None = None) -> list[str]:
    """Fingerprints of all points, told one after the other; the ledger may be made anew half-way."""
    made = StudyFolder.create(folder, study, "", {})
    ledger, found = Ledger(made, study), []
    for number in range(study.points):
        if number == resumed_after:
            ledger = Ledger(made, study)
        run = ledger.ask()
        assert run is not None
        point = ledger._open.pop(run.number).trial
        if not study.pareto:
            point.set_constraint("stability", 0.1 * (number % 3 - 1))
        ledger._optuna.tell(point, [0.5 + number / 100] * (1 + study.pareto))
        found.append(run.config.fingerprint)
    return found


@pytest.mark.parametrize("name", ABLE)
def test_every_sampler_serves_a_conditional_space_and_a_resume_changes_nothing(name: str, tmp_path: Path) -> None:
    study = dataclasses.replace(STUDY, sampler=name)
    whole = proposed(tmp_path / "whole", study)
    assert len(set(whole)) > study.points / 2
    assert proposed(tmp_path / "resumed", study, resumed_after=7) == whole


def test_other_seeds_propose_other_points(tmp_path: Path) -> None:
    first, other = (proposed(tmp_path / str(seed), dataclasses.replace(STUDY, seed=seed)) for seed in (0, 1))
    assert not set(first) & set(other)


@pytest.mark.parametrize(
    ("name", "pareto", "rule"),
    [
        ("TSPSampler", False, "Optuna's samplers that need no more than a name are .*TPESampler"),
        ("GridSampler", False, "need no more than a name"),
        ("BruteForceSampler", False, "FloatDistribution.step must be given"),
        ("CmaEsSampler", True, "multi-objective"),
    ],
)
def test_a_sampler_that_cannot_serve_is_refused_before_anything_is_asked(name: str, pareto: bool, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        samplers.check(dataclasses.replace(STUDY, sampler=name, pareto=pareto))


def test_a_sampler_sees_the_best_and_the_newest_points_of_a_long_study_and_no_more() -> None:
    seen: list[int] = []

    class Spy(optuna.samplers.RandomSampler):
        def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, Any]:
            seen.extend(t.number for t in study._get_trials(deepcopy=False, states=None, use_cache=False))
            return super().infer_relative_search_space(study, trial)

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(0))
    for number in range(30):
        trial = study.ask()
        trial.set_constraint("stability", -1.0 if number in (3, 7, 9) else 1.0)
        study.tell(trial, 0.9 if number in (5, 9) else 0.5 + number / 1000)
    study.sampler = samplers.Remembering(Spy(), samplers.Memory(Trials(study), 6))
    study.ask().suggest_float("x", 0.0, 1.0)
    # The trial that is asked for is the newest; of the others the three feasible ones are the best.
    assert seen == [3, 7, 9, 28, 29, 30]
