"""What runs cost is added up by hand here, and as the accounts do it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from equipoise.account import Account
from equipoise.checkpoint import State
from equipoise.config import RunConfig
from equipoise.monitor import Verdict
from equipoise.record import Record
from equipoise.train import Progress


def record(folder: Path, config: RunConfig, blocks: dict[int, float], verdict: str | None) -> Record:
    record = Record(folder)
    record.open(config, torch.device("cpu"))
    for step, seconds in blocks.items():
        record.add(Progress(step, {}, seconds, False, None, 1.0, None, lambda: State({}, {})))
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
    assert account.verdicts == ended | {"running": 2}
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
    assert nothing == Account({}, 0, 0, 0, 0.0, 0.0, 0.0)
    assert nothing.share_saved_alarm == 0
