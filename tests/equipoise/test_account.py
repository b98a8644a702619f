"""What runs cost is added up by hand here, and as the accounts do it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from equipoise.account import Account, accounts
from equipoise.checkpoint import State
from equipoise.config import RunConfig
from equipoise.monitor import Verdict
from equipoise.record import Record
from equipoise.sessions import SessionInfo
from equipoise.train import Progress


def block(step: int, seconds: float, signals: dict[str, float] | None = None) -> Progress:
    return Progress(step, signals or {}, seconds, False, None, 1.0, None, lambda: State({}, {}))


def record(folder: Path, config: RunConfig, blocks: dict[int, float], verdict: str | None) -> Record:
    record = Record(folder)
    record.open(config, torch.device("cpu"))
    for step, seconds in blocks.items():
        record.add(block(step, seconds))
    if verdict:
        done = max(blocks, default=0)
        record.close(Verdict(verdict, done, config.steps, None))  # type: ignore[arg-type]
    return record


def test_steps_and_device_seconds_by_hand(tmp_path: Path) -> None:
    one, two = RunConfig(steps=100), RunConfig(steps=200, workers=2, batch=2)
    records = [
        record(tmp_path / "a", one, {50: 5.0, 100: 7.0}, "stable"),  # 12 s, nothing saved
        record(tmp_path / "b", two, {40: 10.0}, "diverged"),  # 20 device-seconds; 160 steps at .5 s saved
        record(tmp_path / "c", one, {20: 1.0}, "censored"),  # 1 s; 80 steps at .05 s saved
        record(tmp_path / "d", one, {10: 3.0}, None),  # 3 s; still running: saves nothing yet
        record(tmp_path / "e", one, {}, None),
        record(tmp_path / "f", one, {75: 3.0}, "saturated"),  # 3 s; 25 steps at .04 s saved
        record(tmp_path / "g", one, {100: 1.0}, "collapsed"),  # 1 s; at its end: nothing saved
    ]
    account = Account.of(records)
    ended = {"stable": 1, "diverged": 1, "censored": 1, "saturated": 1, "collapsed": 1}
    assert account.verdicts == ended | {"unfinished": 2}
    assert account.steps == 100 + 40 + 20 + 10 + 75 + 100
    assert (account.steps_saved_alarm, account.steps_saved_pruner) == (160 + 25, 80)
    assert account.steps_saved == 160 + 25 + 80
    assert account.seconds == pytest.approx(12 + 20 + 1 + 3 + 3 + 1)
    assert account.seconds_saved_alarm == pytest.approx(160 * 0.5 + 25 * 0.04)
    assert account.seconds_saved_pruner == pytest.approx(80 * 0.05)
    assert account.seconds_saved == pytest.approx(160 * 0.5 + 25 * 0.04 + 80 * 0.05)
    assert account.share_saved_alarm == pytest.approx(185 / (345 + 265))


def test_no_runs_cost_nothing() -> None:
    nothing = Account.of([])
    assert nothing == Account(verdicts={})
    assert (nothing.runs, nothing.share_saved_alarm, nothing.overhead) == (0, 0, None)


def test_each_verdict_has_its_own_account_and_they_add_up(tmp_path: Path) -> None:
    config = RunConfig(steps=100)
    both = [
        record(tmp_path / "0000-a", config, {100: 4.0}, "stable"),
        record(tmp_path / "0001-b", config, {40: 2.0}, "diverged"),
        record(tmp_path / "0001-c", config, {50: 3.0}, "diverged"),
        record(tmp_path / "0002-d", config, {10: 1.0}, "censored"),
    ]
    whole, parts = accounts(both)
    assert set(parts) == {"stable", "diverged", "censored"}
    assert (parts["diverged"].runs, parts["diverged"].steps, parts["diverged"].steps_saved_alarm) == (2, 90, 110)
    assert parts["censored"].steps_saved_pruner == 90
    for name in ("runs", "steps", "steps_saved", "seconds", "seconds_saved"):
        assert getattr(whole, name) == pytest.approx(sum(getattr(part, name) for part in parts.values()))


def test_seeds_are_runs_of_one_point_and_a_confirmation_is_of_none(tmp_path: Path) -> None:
    config = RunConfig(steps=100)
    names = ("0000-aaaa", "0000-bbbb", "0001-cccc", "confirm-dddd")
    account = Account.of(record(tmp_path / name, config, {100: 1.0}, "stable") for name in names)
    assert (account.points, account.runs) == (2, 4)


def test_rows_of_an_elastic_run_cost_the_workers_that_they_had(tmp_path: Path) -> None:
    run = record(tmp_path / "a", RunConfig(steps=100, workers=4, batch=4), {10: 1.0}, None)
    run.add(block(20, 2.0), workers=2)
    run.add(block(30, 1.5))
    assert Account.of([run]).seconds == pytest.approx(4 * 1.0 + 2 * 2.0 + 4 * 1.5)


def test_what_failures_cost_is_told_apart_from_what_was_done(tmp_path: Path) -> None:
    run = record(tmp_path / "a", RunConfig(steps=100, workers=4, batch=4), {}, None)
    run.take_up(0, "first", workers=4)
    for step in (10, 20, 30):
        run.add(block(step, 2.0))
    run.take_up(10, "first", workers=2)  # its machine was lost: steps 11 to 30 are done again, by fewer
    run.add(block(20, 3.0), workers=2)
    run.take_up(10, "second", workers=4)  # and once more
    run.add(block(20, 2.0))
    account = Account.of([run])
    assert (account.restarts, account.steps_lost, account.steps) == (2, 20 + 10, 20)
    assert account.seconds_lost == pytest.approx(2 * 2.0 * 4 + 3.0 * 2)
    assert account.seconds == pytest.approx(2 * 2.0 * 4)


def test_a_run_that_was_taken_up_once_has_not_been_restarted(tmp_path: Path) -> None:
    run = record(tmp_path / "a", RunConfig(steps=100), {}, None)
    run.take_up(0, "", workers=1)
    run.add(block(10, 1.0))
    assert (Account.of([run]).restarts, Account.of([run]).steps_lost) == (0, 0)


def test_a_folder_without_settings_and_a_row_that_is_torn_off_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "0001-b").mkdir()
    run = record(tmp_path / "0000-a", RunConfig(steps=100), {10: 1.0, 20: 2.0}, None)
    with open(run.folder / "signals.jsonl", "a") as file:
        file.write('{"step": 30, "time/block": 4.0')
    account = Account.of([run, Record(tmp_path / "0001-b")])
    assert (account.runs, account.points, account.steps, account.seconds) == (1, 1, 20, 3.0)


def test_signals_that_are_not_finite_are_no_hindrance(tmp_path: Path) -> None:
    run = record(tmp_path / "a", RunConfig(steps=100), {}, None)
    run.add(block(10, 1.5, {"loss/generator": math.nan, "loss/cycle_t": math.inf}))
    assert (Account.of([run]).steps, Account.of([run]).seconds) == (10, 1.5)


# --- what sessions had ------------------------------------------------------------------------------------------------


def session(seconds: float, gpus: float, slots: int = 2, workers: int = 1) -> SessionInfo:
    return SessionInfo(id="c0ffee00", began=1e9, seen=1e9 + seconds, slots=slots, workers=workers, gpus=gpus,
                       ended=None, folder=Path("nowhere"))  # fmt: skip


def test_overhead_is_what_sessions_had_beside_training(tmp_path: Path) -> None:
    runs = [record(tmp_path / name, RunConfig(steps=100), {100: 30.0}, "stable") for name in ("a", "b", "c")]
    account = Account.of(runs, [session(40, 0), session(20, 0, slots=4)])
    assert account.seconds_had == 2 * 40 + 4 * 20
    assert account.overhead == pytest.approx(1 - 90 / 160)
    assert Account.of(runs).overhead is None
    assert Account.of(runs, [session(0, 0)]).overhead is None, "it has only begun"
    assert Account.of(runs, [session(1, 0)]).overhead == 0, "most ran before sessions were kept"
    assert Account.of([], [session(1, 0)]).overhead == 1


def test_devices_of_several_workers_are_had_by_each_slot() -> None:
    assert Account.of([], [session(10, 1, slots=3, workers=4)]).seconds_had == 3 * 4 * 10


def test_a_share_of_a_card_costs_that_share_of_an_hour(tmp_path: Path) -> None:
    run = [record(tmp_path / "a", RunConfig(steps=100), {100: 7200.0}, "stable")]
    account = Account.of(run, [session(8000, 0.25)])
    assert account.hours.name == "GPU-hours"
    assert account.hours.of(account.seconds) == pytest.approx(0.5)
    mixed = Account.of(run, [session(3000, 0.25), session(1000, 0.5)])
    assert mixed.gpus == pytest.approx((3 * 0.25 + 1 * 0.5) / 4)


@pytest.mark.parametrize(
    ("sessions", "seconds", "name", "value"),
    [
        ([], 2.5 * 3600, "device-hours", 2.5),
        ([session(1, 0)], 2.5 * 3600, "CPU worker hours", 2.5),
        ([session(1, 0)], 1800, "CPU worker minutes", 30),
        ([session(1, 2)], 1800, "GPU-minutes", 60),
        ([session(1, 0.5)], 600, "GPU-seconds", 300),
        ([session(9000, 1)], 600, "GPU-hours", 1 / 6),  # what was had is long enough for hours
    ],
)
def test_time_is_told_by_what_a_device_is_in_a_unit_that_suits_it(
    tmp_path: Path, sessions: list[SessionInfo], seconds: float, name: str, value: float
) -> None:
    account = Account.of([record(tmp_path, RunConfig(steps=100), {100: seconds}, "stable")], sessions)
    assert account.unit.name == name
    assert account.unit.of(account.seconds) == pytest.approx(value)
