"""Every end of a run is told to Optuna as what it was, and a killed driver loses nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

from equipoise.config import PUBLISHED
from equipoise.launch.journal import journal
from equipoise.launch.ledger import Assignment, Ledger
from equipoise.monitor import Finding, Verdict
from equipoise.record import Record, _line
from equipoise.search import FLOOR, Choice, Fixed, Range
from equipoise.sessions import Session
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
CONDITIONAL = dataclasses.replace(
    STUDY,
    space={
        "optim.lr": Range(1e-5, 1e-2),
        "loss.adversarial": Choice(("lsgan", "ns", "rp")),
        "optim.beta1": Fixed(0.0, when={"loss.adversarial": ("rp",)}),
        "critic.penalty": (Fixed("r1r2", when={"loss.adversarial": ("rp",)}), Choice(("none", "r1"))),
        "critic.gamma": Range(1e-2, 1e2, when={"critic.penalty": ("r1", "r1r2")}),
        "critic.penalty_every": Choice((1, 4, 16), when={"critic.penalty": ("r1", "r1r2")}),
        "optim.lr_critic_ratio": (Range(0.1, 4.0, when={"critic.penalty": ("r1", "r1r2")}), Range(0.1, 1.0)),
        "loss.identity": Range(0.1, 5.0, off=0.0),
        "net.critic_bias": Choice((True, False)),
    },
    first=(
        {},
        {"loss.adversarial": "wgan_gp", "critic.penalty": "gp", "critic.gamma": 10.0, "optim.lr": 1e-4},
        {"loss.adversarial": "rp", "critic.penalty": "r1r2", "optim.beta1": 0.0, "critic.penalty_every": 4},
    ),
    labels=("published", "WGAN-GP", "rp"),
    points=28,
)
GRID = dataclasses.replace(
    STUDY, space={}, first=tuple({"optim.lr": lr, "seed": seed} for lr in (1e-4, 1e-3) for seed in (0, 1)), points=4
)


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder.create(tmp_path / "study", STUDY, "test", {})


def trials(folder: StudyFolder) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="ledger", storage=journal(folder.journal)).trials


def run(
    folder: StudyFolder, point: Assignment | None, dice: float, verdict: Verdict | None, step: int = 400
) -> Assignment:
    """Leave the record of a run behind, as a worker would."""
    assert point is not None
    record = Record(folder.runs / point.name)
    record.open(point.config, torch.device("cpu"))
    row = {"step": step, "quality/translated_dice": dice, "divergence/stability": 1.0, "time/block": 1.0}
    (record.folder / "signals.jsonl").write_text(_line(row))
    if verdict:
        record.close(verdict)
    return point


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
    ledger.close(run(folder, point, 0.75, stable(0.95)))
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
    ledger.close(run(folder, point, dice, verdict, 100))
    trial = trials(folder)[0]
    assert (trial.state, trial.value) == (TrialState.COMPLETE, FLOOR)
    assert trial.constraints["stability"] == pytest.approx(0.65)
    assert (trial.user_attrs["onset"], trial.user_attrs["stability"]) == (100, 0.25)


@pytest.mark.parametrize(
    ("kind", "want"), [("saturated", FLOOR), ("collapsed", FLOOR), ("recovered", 0.8), ("blurry", 0.8)]
)
def test_only_a_blurry_run_of_those_that_went_wrong_can_be_feasible(
    folder: StudyFolder, kind: Any, want: float
) -> None:
    ledger = Ledger(folder, STUDY)
    point = ledger.ask()
    assert point is not None
    ledger.close(run(folder, point, 0.8, Verdict(kind, 400, 400, 0.97)))
    trial = trials(folder)[0]
    assert (trial.state, trial.value) == (TrialState.COMPLETE, want)
    assert (trial.constraints["stability"] <= 0) == (kind == "blurry")
    assert trial.user_attrs["verdict"] == kind


def test_a_run_stopped_for_its_dice_is_pruned_with_what_it_reported_and_its_record_is_closed(
    folder: StudyFolder,
) -> None:
    ledger = Ledger(folder, STUDY)
    points = [ledger.ask() for _ in range(4)]
    stops = []
    for rank, point in enumerate(points):
        assert point is not None
        stops.append(ledger.hear(point, 200, 0.9 - 0.2 * rank, 1.0))
    assert stops == [False, False, True, True]  # the better half goes on, and so do both first points
    last = points[-1]
    assert last is not None
    ledger.close(run(folder, last, 0.3, None, 200))
    ledger.settle()
    trial = trials(folder)[last.number]
    assert trial.state is TrialState.PRUNED
    assert trial.intermediate_values == {200: pytest.approx(0.3)}
    assert trial.user_attrs["verdict"] == "censored"
    closed = Record(folder.runs / last.name).verdict
    assert closed is not None
    assert (closed.kind, closed.step) == ("censored", 200)


def test_a_stopped_run_is_closed_only_when_its_worker_has_let_go_of_it(folder: StudyFolder) -> None:
    ledger = Ledger(folder, STUDY)
    point = ledger.ask()
    assert point is not None
    ledger.hear(point, 200, 0.5, 1.0)
    record = Record(folder.runs / point.name)
    with record.locked():
        ledger.close(run(folder, point, 0.5, None, 200))
        ledger.settle(patience=0)
        assert record.verdict is None
    Ledger(folder, STUDY).ask()  # a resumed study settles what the killed one could not
    assert record.verdict is not None


def test_stability_counts_when_runs_are_compared(folder: StudyFolder) -> None:
    ledger = Ledger(folder, STUDY)
    points = [ledger.ask() for _ in range(4)]
    for point in points[:3]:
        assert point is not None
        ledger.hear(point, 200, 0.5, 1.0)
    shaky = points[3]
    assert shaky is not None
    assert ledger.hear(shaky, 200, 0.9, 0.1)


def test_nothing_is_stopped_for_its_dice_before_the_first_rung(folder: StudyFolder) -> None:
    ledger = Ledger(folder, STUDY)
    for quality in (0.9, 0.9, 0.9, 0.0):
        point = ledger.ask()
        assert point is not None
        assert not ledger.hear(point, 100, quality, 1.0)


def test_lost_machines_are_a_failure_and_never_held_against_the_settings(folder: StudyFolder) -> None:
    ledger = Ledger(folder, STUDY)
    point = ledger.ask()
    assert point is not None
    ledger.fail(point)
    trial = trials(folder)[0]
    assert (trial.state, trial.value) == (TrialState.FAIL, None)
    assert not trial.constraints
    assert ledger.failed == 1
    assert ledger.reasons == []
    lost = ledger.ask()
    assert lost is not None
    ledger.fail(lost, "batch: found 64 slices")
    assert ledger.reasons == [f"{lost.name}: batch: found 64 slices"]


def test_a_killed_driver_s_points_are_adopted_before_new_ones_are_asked(folder: StudyFolder) -> None:
    before = Ledger(folder, STUDY)
    done, lost = before.ask(), before.ask()
    assert done is not None
    assert lost is not None
    before.close(run(folder, done, 0.5, stable()))
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


def finish(folder: StudyFolder, ledger: Ledger, dice: float) -> Assignment:
    point = ledger.ask()
    assert point is not None
    ledger.close(run(folder, point, dice, stable()))
    return point


def test_a_conditional_space_is_searched_past_the_random_start_with_every_run_one_that_can_be(tmp_path: Path) -> None:
    folder = StudyFolder.create(tmp_path / "study", CONDITIONAL, "test", {})
    ledger = Ledger(folder, CONDITIONAL)
    points = [finish(folder, ledger, 0.5 + n / 100) for n in range(CONDITIONAL.points)]
    assert ledger.ask() is None
    games = {point.config.loss.adversarial for point in points}
    assert games == {"lsgan", "ns", "rp", "wgan_gp"}
    for point, trial in zip(points, trials(folder), strict=True):
        assert trial.state is TrialState.COMPLETE
        assert CONDITIONAL.run.having(trial.user_attrs["point"]) == point.config
        if point.config.loss.adversarial == "rp":
            assert trial.user_attrs["point"]["optim.beta1"] == 0.0
            assert "critic.penalty" not in trial.params
        assert ("critic.gamma" in trial.params) == (point.config.critic.penalty in ("r1", "r1r2"))
        assert (trial.params.get("loss.identity on") is False) == (
            point.config.loss.identity == 0 and trial.number != 1
        )


def test_a_search_learns_from_controls_in_its_space_and_not_from_those_outside(tmp_path: Path) -> None:
    folder = StudyFolder.create(tmp_path / "study", CONDITIONAL, "test", {})
    ledger = Ledger(folder, CONDITIONAL)
    points = [finish(folder, ledger, 0.5) for _ in CONDITIONAL.first]
    assert [point.config for point in points] == [CONDITIONAL.run.having(point) for point in CONDITIONAL.first]
    published, outside, rp = trials(folder)[:3]
    assert [t.user_attrs["label"] for t in (published, outside, rp)] == ["published", "WGAN-GP", "rp"]
    assert published.params["optim.lr_critic_ratio (2)"] == 1.0
    assert outside.params == {}
    assert rp.params["critic.penalty_every"] == 4


def test_a_control_outside_the_space_that_a_killed_driver_left_is_the_same_run_again(tmp_path: Path) -> None:
    folder = StudyFolder.create(tmp_path / "study", CONDITIONAL, "test", {})
    before = Ledger(folder, CONDITIONAL)
    asked = [before.ask() for _ in range(4)]  # the fourth was drawn
    after = Ledger(folder, CONDITIONAL)
    assert [after.ask() for _ in range(4)] == asked


def test_a_grid_asks_for_every_point_once_and_stops_none_for_its_dice(tmp_path: Path) -> None:
    folder = StudyFolder.create(tmp_path / "study", GRID, "test", {})
    ledger = Ledger(folder, GRID)
    points = [ledger.ask() for _ in range(4)]
    assert ledger.ask() is None
    asked = [(point.config.optim.lr, point.config.seed) for point in points if point is not None]
    assert asked == [(1e-4, 0), (1e-4, 1), (1e-3, 0), (1e-3, 1)]
    for rank, point in enumerate(points):
        assert point is not None
        assert not ledger.hear(point, 200, 0.9 - 0.2 * rank, 1.0)


def test_controls_that_a_short_study_left_out_come_first_when_it_goes_on(tmp_path: Path) -> None:
    short = dataclasses.replace(STUDY, points=1)
    folder = StudyFolder.create(tmp_path / "study", short, "test", {})
    ledger = Ledger(folder, short)
    finish(folder, ledger, 0.5)
    assert ledger.ask() is None
    assert ledger.unfinished == 0
    second = Ledger(folder, STUDY).ask()
    assert second is not None
    assert second.config == STUDY.run.at("optim.lr", 2e-3)


def test_the_best_point_is_the_best_among_the_stable(folder: StudyFolder) -> None:
    ledger = Ledger(folder, STUDY)
    for dice, stability in ((0.5, 1.0), (0.9, 0.2), (0.6, 0.95)):
        point = ledger.ask()
        assert point is not None
        ledger.close(run(folder, point, dice, stable(stability)))
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


# --- several seeds a point --------------------------------------------------------------------------------------------

SEEDS = dataclasses.replace(STUDY, first=(), seeds=3, points=2)


def asked(ledger: Ledger) -> Assignment:
    run = ledger.ask()
    assert run is not None
    return run


def test_a_point_s_seeds_are_run_one_after_the_other_and_told_as_one(tmp_path: Path) -> None:
    folder = StudyFolder.create(tmp_path / "study", SEEDS, "test", {})
    ledger = Ledger(folder, SEEDS)
    first, other = asked(ledger), asked(ledger)
    assert (first.number, other.number, ledger.ask(), ledger.waiting) == (0, 1, None, True)
    for nth, (dice, stability) in enumerate(((0.9, 1.0), (0.6, 0.95), (0.6, 0.97))):
        assert (first.number, first.config.seed, first.races) == (0, nth, nth == 0)
        assert trials(folder)[0].state is TrialState.RUNNING
        ledger.close(run(folder, first, dice, stable(stability)))
        if nth < 2:
            first = asked(ledger)
    told = trials(folder)[0]
    assert (told.state, told.value) == (TrialState.COMPLETE, pytest.approx(0.7))
    assert told.constraints["stability"] == pytest.approx(0.9 - 0.95)
    assert len(trials(folder)) == 2


def test_the_first_seed_that_fails_spares_the_others(tmp_path: Path) -> None:
    folder = StudyFolder.create(tmp_path / "study", SEEDS, "test", {})
    ledger = Ledger(folder, SEEDS)
    point = asked(ledger)
    ledger.close(run(folder, point, 0.9, Verdict("diverged", 100, 400, 0.25), 100))
    told = trials(folder)[0]
    assert (told.state, told.value, told.user_attrs["verdict"]) == (TrialState.COMPLETE, FLOOR, "diverged")
    assert asked(ledger).number == 1


def test_a_second_seed_is_not_compared_with_other_points(tmp_path: Path) -> None:
    folder = StudyFolder.create(tmp_path / "study", SEEDS, "test", {})
    ledger = Ledger(folder, SEEDS)
    first, rival = asked(ledger), asked(ledger)
    ledger.hear(rival, 200, 0.9, 1.0)
    ledger.close(run(folder, first, 0.8, stable()))
    second = asked(ledger)
    assert not ledger.hear(second, 200, 0.0, 1.0)
    assert trials(folder)[0].intermediate_values == {}


def test_seeds_that_ended_before_a_kill_are_not_run_again(tmp_path: Path) -> None:
    folder = StudyFolder.create(tmp_path / "study", SEEDS, "test", {})
    before = Ledger(folder, SEEDS)
    first = asked(before)
    before.close(run(folder, first, 0.9, stable()))
    second = asked(before)
    run(folder, second, 0.7, stable())  # its verdict is on disk; the kill came before it was told
    after = Ledger(folder, SEEDS)
    third = asked(after)
    assert (third.number, third.config.seed) == (0, 2)
    after.close(run(folder, third, 0.8, stable()))
    assert trials(folder)[0].value == pytest.approx(0.8)


def test_seeds_that_a_study_gives_itself_are_not_multiplied() -> None:
    with pytest.raises(ValueError, match="seeds = 2: seeds are given or searched already"):
        dataclasses.replace(GRID, seeds=2)
    with pytest.raises(InputError, match="seeds: found 0; a point is run at least once"):
        dataclasses.replace(STUDY, seeds=0)


# --- objectives and pruners -------------------------------------------------------------------------------------------


def test_a_pareto_study_tells_dice_and_stability_and_stops_nothing_for_its_dice(tmp_path: Path) -> None:
    study = dataclasses.replace(STUDY, pareto=True, first=())
    folder = StudyFolder.create(tmp_path / "study", study, "test", {})
    ledger = Ledger(folder, study)
    points = [asked(ledger) for _ in range(4)]
    assert not any(ledger.hear(point, 200, 0.9 - 0.2 * rank, 1.0) for rank, point in enumerate(points))
    ledger.close(run(folder, points[0], 0.9, stable(0.5)))
    ledger.close(run(folder, points[1], 0.7, stable(0.95)))
    ledger.close(run(folder, points[2], 0.8, Verdict("diverged", 100, 400, 0.25), 100))
    assert [t.values for t in trials(folder)[:3]] == [[0.9, 0.5], [0.7, 0.95], [FLOOR, 0.25]]
    assert {t.state for t in trials(folder)[:3]} == {TrialState.COMPLETE}
    assert ledger.best() == points[1].name


def test_the_median_pruner_stops_what_falls_behind_half_of_those_that_ended_and_never_before_the_warm_up(
    tmp_path: Path,
) -> None:
    study = dataclasses.replace(STUDY, pruner="median", first=(), points=8)
    folder = StudyFolder.create(tmp_path / "study", study, "test", {})
    ledger = Ledger(folder, study)
    for dice in (0.5, 0.6, 0.7, 0.8):
        point = asked(ledger)
        assert not ledger.hear(point, 200, dice, 1.0)
        ledger.close(run(folder, point, dice, stable()))
    early, worse, better = asked(ledger), asked(ledger), asked(ledger)
    assert not ledger.hear(early, 100, 0.0, 1.0)
    assert ledger.hear(worse, 200, 0.6, 1.0)
    assert not ledger.hear(better, 200, 0.7, 1.0)


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_a_dice_that_is_not_finite_stops_a_run_at_the_first_rung(tmp_path: Path, pruner: Any) -> None:
    study = dataclasses.replace(STUDY, pruner=pruner, first=(), points=8)
    folder = StudyFolder.create(tmp_path / "study", study, "test", {})
    ledger = Ledger(folder, study)
    for _ in range(4):
        point = asked(ledger)
        ledger.hear(point, 200, 0.5, 1.0)
        ledger.close(run(folder, point, 0.5, stable()))
    lost = asked(ledger)
    assert ledger.hear(lost, 200, float("nan"), 1.0)
    assert str(trials(folder)[lost.number].intermediate_values) == "{200: nan}"


def test_without_a_pruner_nothing_is_stopped(tmp_path: Path) -> None:
    study = dataclasses.replace(STUDY, pruner="none", first=())
    folder = StudyFolder.create(tmp_path / "study", study, "test", {})
    ledger = Ledger(folder, study)
    points = [asked(ledger) for _ in range(4)]
    assert not any(ledger.hear(point, 200, 0.9 - 0.2 * rank, 1.0) for rank, point in enumerate(points))


# --- several sessions -------------------------------------------------------------------------------------------------


def test_two_living_sessions_share_a_study_s_points_and_take_none_from_each_other(folder: StudyFolder) -> None:
    with (
        Session.start(folder.folder, slots=1, workers=1, gpus=0) as one,
        Session.start(folder.folder, slots=1, workers=1, gpus=0) as other,
    ):
        ledgers = [Ledger(folder, STUDY, session=session.id) for session in (one, other)]
        points = [ledgers[n % 2].ask() for n in range(8)]
    numbers = [point.number for point in points if point]
    assert numbers == list(range(6))
    assert points[6:] == [None, None]
    assert len({point.name for point in points if point}) == 6


def test_what_a_dead_session_left_is_taken_by_one_that_lives_also_late(folder: StudyFolder) -> None:
    with Session.start(folder.folder, slots=1, workers=1, gpus=0) as mine:
        with Session.start(folder.folder, slots=1, workers=1, gpus=0) as other:
            lost = Ledger(folder, STUDY, session=other.id).ask()
            ledger = Ledger(folder, STUDY, session=mine.id)
            rest = [ledger.ask() for _ in range(5)]
            assert ledger.ask() is None
        assert ledger.ask() == lost
        assert ledger.ask() is None
    assert lost not in rest
