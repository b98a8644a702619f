"""Every end of a run is told to Optuna as what it was, and a killed driver loses nothing."""

from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState

from equipoise.config import PUBLISHED
from equipoise.launch.ledger import Assignment, Ledger, journal
from equipoise.monitor import Finding, Verdict
from equipoise.record import Record, _line
from equipoise.search import FLOOR, Range
from equipoise.study import Study, StudyFolder
from slicestore.errors import InputError

STUDY = Study(
    name="ledger",
    question="?",
    run=PUBLISHED.at("steps", 400).at("evaluations", 4),
    space={"optim.lr": Range(1e-5, 1e-2), "loss.cycle": Range(1.0, 30.0)},
    first=({}, {"optim.lr": 2e-3}),
    points=6,
)


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder.create(tmp_path / "study", STUDY, "test", {})


def trials(folder: StudyFolder) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="ledger", storage=journal(folder.journal)).trials


def run(folder: StudyFolder, point: Assignment | None, dice: float, verdict: Verdict | None, step: int = 400) -> int:
    """Leave the record of a run behind, as a worker would."""
    assert point is not None
    record = Record(folder.runs / point.name)
    record.open(point.config, torch.device("cpu"))
    row = {"step": step, "quality/translated_dice": dice, "divergence/stability": 1.0, "time/block": 1.0}
    (record.folder / "signals.jsonl").write_text(_line(row))
    if verdict:
        record.close(verdict)
    return point.number


def stable(stability: float = 1.0) -> Verdict:
    return Verdict("stable", 400, 400, stability)


def test_first_points_come_first_and_in_order(folder: StudyFolder) -> None:
    ledger = Ledger(folder, STUDY)
    first, second = ledger.ask(), ledger.ask()
    assert first is not None
    assert second is not None
    assert first.config == STUDY.run
    assert second.config == STUDY.run.at("optim.lr", 2e-3)
    assert (first.number, second.number) == (0, 1)


def test_a_finished_run_is_complete_with_its_dice_and_a_constraint_it_meets(folder: StudyFolder) -> None:
    ledger = Ledger(folder, STUDY)
    point = ledger.ask()
    assert point is not None
    ledger.close(run(folder, point, 0.75, stable(0.95)), point.name)
    trial = trials(folder)[0]
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.75)
    assert trial.constraints["stability"] == pytest.approx(0.9 - 0.95)
    assert trial.user_attrs["verdict"] == "stable"
    assert trial.user_attrs["run"] == point.name


@pytest.mark.parametrize("dice", [0.9, float("nan")])
def test_a_diverged_run_is_complete_with_a_finite_value_and_a_violated_constraint(
    folder: StudyFolder, dice: float
) -> None:
    ledger = Ledger(folder, STUDY)
    point = ledger.ask()
    finding = Finding("non_finite", "loss/ce", 100, 100, float("nan"), float("inf"))
    verdict = Verdict("diverged", 100, 400, 0.25, (finding,))
    assert point is not None
    ledger.close(run(folder, point, dice, verdict, 100), point.name)
    trial = trials(folder)[0]
    assert (trial.state, trial.value) == (TrialState.COMPLETE, FLOOR)
    assert trial.constraints["stability"] == pytest.approx(0.65)
    assert (trial.user_attrs["onset"], trial.user_attrs["stability"]) == (100, 0.25)


def test_a_run_stopped_for_its_dice_is_pruned_with_what_it_reported_and_its_record_is_closed(
    folder: StudyFolder,
) -> None:
    ledger = Ledger(folder, STUDY)
    points = [ledger.ask() for _ in range(4)]
    stops = []
    for rank, point in enumerate(points):
        assert point is not None
        stops.append(ledger.hear(point.number, 100, 0.9 - 0.2 * rank, 1.0))
    assert stops == [False, False, True, True]  # the better half goes on, and so do both first points
    last = points[-1]
    assert last is not None
    ledger.close(run(folder, last, 0.3, None, 100), last.name)
    ledger.settle()
    trial = trials(folder)[last.number]
    assert trial.state is TrialState.PRUNED
    assert trial.intermediate_values == {100: pytest.approx(0.3)}
    assert trial.user_attrs["verdict"] == "censored"
    closed = Record(folder.runs / last.name).verdict
    assert closed is not None
    assert (closed.kind, closed.step) == ("censored", 100)


def test_a_stopped_run_is_closed_only_when_its_worker_has_let_go_of_it(folder: StudyFolder) -> None:
    ledger = Ledger(folder, STUDY)
    point = ledger.ask()
    assert point is not None
    ledger.hear(point.number, 100, 0.5, 1.0)
    record = Record(folder.runs / point.name)
    with record.locked():
        ledger.close(run(folder, point, 0.5, None, 100), point.name)
        ledger.settle(patience=0)
        assert record.verdict is None
    Ledger(folder, STUDY).ask()  # a resumed study settles what the killed one could not
    assert record.verdict is not None


def test_stability_counts_when_runs_are_compared(folder: StudyFolder) -> None:
    ledger = Ledger(folder, STUDY)
    points = [ledger.ask() for _ in range(4)]
    for point in points[:3]:
        assert point is not None
        ledger.hear(point.number, 100, 0.5, 1.0)
    shaky = points[3]
    assert shaky is not None
    assert ledger.hear(shaky.number, 100, 0.9, 0.1)


def test_nothing_is_stopped_for_its_dice_before_the_first_rung(folder: StudyFolder) -> None:
    ledger = Ledger(folder, STUDY)
    for quality in (0.9, 0.9, 0.9, 0.0):
        point = ledger.ask()
        assert point is not None
        assert not ledger.hear(point.number, 50, quality, 1.0)


def test_lost_machines_are_a_failure_and_never_held_against_the_settings(folder: StudyFolder) -> None:
    ledger = Ledger(folder, STUDY)
    point = ledger.ask()
    assert point is not None
    ledger.fail(point.number)
    trial = trials(folder)[0]
    assert (trial.state, trial.value) == (TrialState.FAIL, None)
    assert not trial.constraints
    assert ledger.failed == 1


def test_a_killed_driver_s_points_are_adopted_before_new_ones_are_asked(folder: StudyFolder) -> None:
    before = Ledger(folder, STUDY)
    done, lost = before.ask(), before.ask()
    assert done is not None
    assert lost is not None
    before.close(run(folder, done, 0.5, stable()), done.name)
    after = Ledger(folder, STUDY)
    adopted, fresh = after.ask(), after.ask()
    assert adopted == lost
    assert fresh is not None
    assert fresh.number == 2
    assert len(trials(folder)) == 3


def test_every_point_is_given_out_once(folder: StudyFolder) -> None:
    ledger = Ledger(folder, STUDY)
    points = [ledger.ask() for _ in range(6)]
    assert ledger.ask() is None
    assert len({p.name for p in points if p}) == 6
    assert ledger.unfinished == 6


def test_the_best_point_is_the_best_among_the_stable(folder: StudyFolder) -> None:
    ledger = Ledger(folder, STUDY)
    for dice, stability in ((0.5, 1.0), (0.9, 0.2), (0.6, 0.95)):
        point = ledger.ask()
        assert point is not None
        ledger.close(run(folder, point, dice, stable(stability)), point.name)
    best = ledger.best()
    assert best is not None
    assert best.startswith("0002-")


def test_the_same_seed_asks_for_the_same_points(tmp_path: Path) -> None:
    asked = []
    for name in ("a", "b"):
        ledger = Ledger(StudyFolder.create(tmp_path / name, STUDY, "test", {}), STUDY)
        asked.append([ledger.ask() for _ in range(6)])
    assert asked[0] == asked[1]


def test_a_study_of_no_points_is_refused() -> None:
    with pytest.raises(InputError, match="points: found 0; a study judges at least one"):
        Study(name="none", question="?", run=PUBLISHED, space={}, points=0)
