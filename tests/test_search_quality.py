"""The replay of recorded runs: its clock, its arms, its figures, and the table that is kept with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState

from equipoise.config import PUBLISHED
from equipoise.rehearsal import Look
from equipoise.verdict import Kind, Verdict

PATHS = ("optim.lr", "loss.adversarial")
STEPS = (10, 20, 40)


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return import_module("search_quality")


def row(study: ModuleType, point: tuple[Any, ...], dice: Sequence[float], kind: Kind = "stable", s: float = 1.0) -> Any:
    """A run of .5 s a step that ends with its last look."""
    steps = STEPS[: len(dice)]
    looks = [Look(step, value, 1.0) for step, value in zip(steps, dice, strict=True)]
    looks[-1] = looks[-1]._replace(stability=s)
    return study.Row(point, Verdict(kind, steps[-1], STEPS[-1], s), 0.5 * steps[-1], tuple(looks))


@pytest.fixture(scope="module")
def table(study: ModuleType) -> Any:
    """Two rates by two games. The highest Dice of all diverges; the best that lives is 0.6."""
    return study.Table.of(
        PATHS,
        [
            row(study, (1e-3, "lsgan"), (0.1, 0.2, 0.5)),
            row(study, (1e-3, "hinge"), (0.3, 0.4, 0.6)),
            row(study, (1e-2, "lsgan"), (0.7, 0.9), "diverged", 0.4),
            row(study, (1e-2, "hinge"), (0.5, math.nan), "diverged", 0.3),
        ],
    )


class Scripted:
    """Asks for given points and stops given runs at given steps."""

    def __init__(self, points: Sequence[tuple[Any, ...]], stops: dict[int, int] | None = None) -> None:
        self.points, self.stops = list(enumerate(points)), stops or {}
        self.heard: list[tuple[int, Look, bool]] = []
        self.closed: list[int] = []

    def ask(self) -> tuple[int, tuple[Any, ...]] | None:
        return self.points.pop(0) if self.points else None

    def hear(self, number: int, look: Look, ended: bool) -> bool:
        self.heard.append((number, look, ended))
        return self.stops.get(number) == look.step

    def close(self, number: int) -> None:
        self.closed.append(number)

    def best(self) -> None:
        return None


def test_slots_work_side_by_side_and_take_the_next_point_when_a_run_is_over(study: ModuleType, table: Any) -> None:
    keys = list(table.rows)
    arm = Scripted([keys[0], keys[2], keys[1], keys[3]], stops={2: 10})
    trace = study.play(arm, table, slots=2)
    assert [(run.row.point, run.begun, run.ended, run.whole) for run in trace.runs] == [
        (keys[2], 0, 20, True),  # the alarm is its end
        (keys[1], 20, 30, False),  # stopped at its first look
        (keys[0], 0, 40, True),
        (keys[3], 30, 50, True),
    ]
    assert arm.closed == [1, 2, 0, 3]
    assert [(number, look.step, ended) for number, look, ended in arm.heard] == [
        *((0, 10, False), (1, 10, False), (0, 20, False), (1, 20, True), (2, 10, False)),
        *((0, 40, True), (3, 10, False), (3, 20, True)),
    ]


def test_what_was_spent_until_a_goal_counts_the_runs_still_at_work_as_far_as_they_are(
    study: ModuleType, table: Any
) -> None:
    keys = list(table.rows)
    trace = study.play(Scripted([keys[0], keys[2], keys[1], keys[3]], stops={2: 10}), table, slots=2)
    assert trace.spent(20) == (2, 40, 20.0)  # nothing of the point that is given out at that moment
    assert trace.spent(25) == (3, 50, 25.0)
    assert trace.spent() == (4, 40 + 20 + 10 + 20, 45.0)
    assert trace.until(lambda run: run.row.point == keys[1]) == (3, 60, 30.0)
    assert trace.until(lambda run: run.whole and run.row.point == keys[1]) == (math.inf,) * 3


def test_without_the_alarm_a_run_costs_all_its_steps_and_keeps_its_last_dice(study: ModuleType, table: Any) -> None:
    keys = list(table.rows)
    arm = Scripted([keys[2]])
    (run,) = study.play(arm, table, alarm=False).runs
    assert (run.ended, run.whole) == (40, True)
    assert [(look.step, look.dice) for _, look, _ in arm.heard] == [(10, 0.7), (20, 0.9), (40, 0.9)]
    arm = Scripted([keys[3]])
    study.play(arm, table, alarm=False)
    assert [math.isnan(look.dice) for _, look, _ in arm.heard] == [False, True, True]


def test_only_feasible_runs_that_ended_by_themselves_are_the_best(study: ModuleType, table: Any) -> None:
    assert table.best == 0.6
    keys = list(table.rows)
    best, near, nearly, chosen, feasible = study.GOALS.values()
    ended = {key: study.Ended(table.rows[key], 0, 40, True, table.rows[key]) for key in keys}
    for goal in (best, near, nearly, chosen):
        assert [goal(table, ended[key]) for key in keys] == [False, True, False, False]
    assert [feasible(table, ended[key]) for key in keys] == [True, True, False, False]
    stopped = study.Ended(table.rows[keys[1]], 0, 20, False, None)
    assert not any(goal(table, stopped) for goal in study.GOALS.values())


def test_stock_asha_stops_what_is_below_its_rung_and_its_last_dice_is_told_as_if_it_were_whole(
    study: ModuleType, table: Any
) -> None:
    arm = study.Stock(table, 0, 4, study.asha(table, 1, 2))
    assert [arm.ask()[0] for _ in range(4)] == [0, 1, 2, 3]
    assert arm.ask() is None
    heard = [arm.hear(number, Look(10, dice, 1.0), False) for number, dice in enumerate((0.5, 0.6, math.nan, 0.1))]
    assert heard == [False, False, False, True]  # .1 lies below the median of .5 and .6; NaN is below nothing
    arm.close(3)
    last = arm._searcher._ot_study.trials[3]
    assert (last.state, last.value) == (TrialState.COMPLETE, 0.1)


def test_stock_recommends_the_highest_dice_also_of_what_diverged_and_leaves_nan_running(
    study: ModuleType, table: Any
) -> None:
    arm = study.Stock(table, 0, 24, None)
    trace = study.play(arm, table, alarm=False)
    assert {(1e-2, "lsgan"), (1e-2, "hinge")} <= {run.row.point for run in trace.runs}
    assert arm.best().point == (1e-2, "lsgan")
    states = [t.state for t in arm._searcher._ot_study.trials]
    wild = sum(run.row.point == (1e-2, "hinge") for run in trace.runs)
    assert states.count(TrialState.RUNNING) == wild > 0


def test_ours_ends_with_the_best_feasible_point_and_knows_what_diverged(
    study: ModuleType, table: Any, tmp_path: Path
) -> None:
    arm = study.Ours(table, 0, 16, tmp_path, run=PUBLISHED)
    trace = study.play(arm, table)
    assert len(trace.runs) == 16
    assert arm.best().point == (1e-3, "hinge")
    states = {t.user_attrs["verdict"] for t in arm._ledger._optuna.trials}
    assert "diverged" in states
    assert all(t.state.is_finished() for t in arm._ledger._optuna.trials)
    assert trace.runs[-1].best == table.rows[1e-3, "hinge"]


def test_chance_draws_again_or_not_and_chooses_by_verdicts_or_dice_alone(study: ModuleType, table: Any) -> None:
    shuffled = study.play(study.Chance(table, 0, 9, again=False), table)
    assert sorted(run.row.point for run in shuffled.runs) == sorted(table.rows)
    drawn = study.play(study.Chance(table, 0, 30), table)
    assert len(drawn.runs) == 30
    assert drawn.runs[-1].best.point == (1e-3, "hinge")
    blind = study.play(study.Chance(table, 0, 30, judged=False), table, alarm=False)
    assert blind.runs[-1].best.point == (1e-2, "lsgan")
    assert [run.row for run in study.play(study.Chance(table, 0, 30), table).runs] == [r.row for r in drawn.runs]


def test_a_table_that_is_no_whole_grid_is_refused(study: ModuleType, table: Any) -> None:
    rows = list(table.rows.values())
    with pytest.raises(ValueError, match="3 runs of 3 points, where a whole grid has 4"):
        study.Table.of(PATHS, rows[:3])
    with pytest.raises(ValueError, match="5 runs of 4 points"):
        study.Table.of(PATHS, [*rows, rows[0]])


def test_a_median_lies_between_ranks_whose_chance_is_told_by_a_coin(study: ModuleType) -> None:
    # Of 20 the median lies between the 6th and the 15th with 95.9 %; between the 7th and the 14th with 88.5 %.
    assert study.median(list(range(1, 21))) == (10.5, 6, 15)
    assert study.median([1.0, 2.0, 3.0]) == (2.0, 1.0, 3.0)
    late = study.median([*range(1, 12), *[math.inf] * 9])
    assert late == (10.5, 6, math.inf)
    assert late.words(".1f") == "10.5 (6.0-never)"
    assert study.median([*range(1, 11), *[math.inf] * 10]).middle == math.inf


def test_a_ratio_of_medians_is_kept_in_pairs(study: ModuleType) -> None:
    theirs = [1.0, 2.0, 3.0, 40.0, 5.0, 6.0, 7.0]
    assert study.ratio([x / 2 for x in theirs], theirs) == (0.5, 0.5, 0.5)


def test_what_is_never_reached_counts_with_all_that_was_spent(study: ModuleType, table: Any) -> None:
    keys = list(table.rows)
    lucky, unlucky = (study.play(Scripted([key] * 2), table, slots=1) for key in (keys[1], keys[0]))
    found = study.Found(table, {study.OURS: [lucky, lucky], study.STOCK: [unlucky, lucky]})
    assert found.seconds(study.STOCK, study.NEARLY) == [40.0, 20.0]
    assert found.cheaper(study.OURS, study.NEARLY) == (1, 0)
    assert found.against(study.OURS, study.NEARLY).middle == pytest.approx(20 / 30)


def test_a_killed_recording_goes_on_where_it_was(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"optim.lr": (1e-3, 1e-2), "loss.adversarial": ("lsgan",)}
    trained: list[tuple[Any, ...]] = []

    def train(folder: Path, config: Any, _store: Path) -> list[object]:
        if len(trained) == 1:
            trained.append(())
            raise KeyboardInterrupt
        trained.append((config.optim.lr, config.seed))
        return ["stable", None, 1.0, 96, 96, 9.0, 8.0, "48 96", "0.25 nan", "1 1", "0.5", "stable"]

    monkeypatch.setattr(study, "GRID", small)
    monkeypatch.setattr(study, "REPEATS", 1)
    monkeypatch.setattr(study, "_trained", train)
    monkeypatch.setattr(study, "synthetic_store", lambda folder, size: folder)
    monkeypatch.setattr(study.Store, "open", lambda _: SimpleNamespace(fingerprint="heads", classes=2))
    path = tmp_path / "table.csv"
    with pytest.raises(KeyboardInterrupt):
        study.record(path, tmp_path)
    study.record(path, tmp_path)
    study.record(path, tmp_path)
    ran = [run for run in trained if run]
    assert len(ran) == len(set(ran)) == 3
    assert {(1e-3, 0), (1e-2, 0)} < set(ran)
    rows = study.read(path)
    assert {r.point for r in rows} == {(1e-3, "lsgan"), (1e-2, "lsgan")}
    assert rows[0].looks[0] == (48, 0.25, 1.0)
    assert math.isnan(rows[0].dice)
    assert len(study.read(path, seed=1)) == 1


@pytest.fixture(scope="module")
def kept(study: ModuleType) -> Any:
    return study.Table.of(tuple(study.GRID), study.read())


def test_the_table_is_whole_and_consistent(study: ModuleType, kept: Any) -> None:
    assert dict(kept.grid) == {path: pytest.approx(kept.grid[path]) for path in study.GRID}
    assert {path: set(values) for path, values in kept.grid.items()} == {k: set(v) for k, v in study.GRID.items()}
    assert study.TABLE.stat().st_size < 300_000
    for run in kept.rows.values():
        steps = [look.step for look in run.looks]
        verdict = run.verdict
        assert steps == sorted(set(steps))
        assert steps[-1] == verdict.step <= verdict.planned == kept.steps[-1]
        assert steps[:-1] == [step for step in kept.steps if step < verdict.step]
        assert all(0 <= look.dice <= 1 or math.isnan(look.dice) for look in run.looks)
        assert all(0 <= look.stability <= 1 for look in run.looks)
        assert run.looks[-1].stability == pytest.approx(verdict.stability, rel=1e-4)
        assert (verdict.kind in ("diverged", "saturated")) >= (verdict.step < verdict.planned)
        assert run.seconds > 0


def test_the_table_spans_stable_and_failing_settings_whose_dice_differ_by_more_than_luck(
    study: ModuleType, kept: Any
) -> None:
    rows = list(kept.rows.values())
    assert 0.2 <= sum(not run.feasible for run in rows) / len(rows) <= 0.5
    near = [sum(kept.near(run, share) for run in rows) for share in study.NEAR]
    assert 1 <= near[0] <= near[1] <= len(rows) / 10
    again = study.read(seed=1)
    assert len(again) == study.REPEATS
    assert {run.point for run in again} <= set(kept.rows)
    assert len(list(study.described(kept, again))) == 4


def test_every_way_searches_the_table_within_its_points_and_never_idles(study: ModuleType, kept: Any) -> None:
    found = study.compare(kept, [7], points=10)
    assert set(found.traces) == set(study.WAYS)
    for way, (trace,) in found.traces.items():
        assert len(trace.runs) == 10, way
        assert trace.spent().steps <= 10 * kept.steps[-1]
        assert trace.spent(12) == (study.SLOTS, 12 * study.SLOTS, pytest.approx(trace.spent(12).seconds))
        assert all(run.whole for run in trace.runs) or "alone" not in way
    for goal in study.GOALS:
        assert study.told(found, goal).row_count == len(study.WAYS)
    assert study.ends(found).row_count == len(study.WAYS)
