"""The table of a study's runs, where the output is no terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console

from equipoise.config import PUBLISHED
from equipoise.monitor import Verdict
from equipoise.record import Record
from equipoise.table import ROWS, TableTracker
from equipoise.verdict import Kind


@pytest.fixture
def record(tmp_path: Path) -> Record:
    made = Record(tmp_path / "000-abc")
    made.open(PUBLISHED.at("steps", 4), torch.device("cpu"))
    return made


def said(record: Record, verdict: Verdict, **names: Any) -> str:
    """All that is printed of one run."""
    out = io.StringIO()
    table = TableTracker(Console(file=out, width=150), "target_dice", **names)
    table.rows(record, [{"step": 2, "quality/target_dice": 0.25, "time/block": 0.5}])
    losses = {"loss/cycle_t": 0.125, "loss/segmentation": 0.5, "auc/t": 0.75}
    table.rows(record, [{"step": 4, "divergence/stability": 0.9, "time/block": 1.5, **losses}])
    table.ended(record, verdict)
    table.close()
    return out.getvalue()


def test_a_run_s_end_is_a_line_with_its_verdict_dice_and_time(record: Record) -> None:
    assert said(record, Verdict("stable", 4, 4, 0.9)).splitlines()[0] == (
        "000-abc: stable after 4 of 4 steps; Dice 0.250; 2 s of training"
    )


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_verdict_stands_in_the_table(record: Record, kind: Any) -> None:
    (row,) = (line for line in said(record, Verdict(kind, 4, 4, 0.9)).splitlines() if "4/4" in line)
    assert re.split(r"\s{2,}", row.strip()) == [
        "000-abc", "lsgan", "2.0e-04", "4/4", "2", "0.125", "0.500", "0.750", "0.250", "0.900", kind.replace("_", " ")
    ]  # fmt: skip


def test_a_control_is_told_with_its_name(record: Record) -> None:
    told = said(record, Verdict("stable", 4, 4, 0.9), names={record.config: "as published"})
    assert told.startswith("000-abc as published: stable")
    assert "\n  000-abc as published   lsgan" in told


def test_a_run_at_work_is_told_with_its_speed_and_the_time_it_still_takes(record: Record) -> None:
    table = TableTracker(Console(file=io.StringIO()), "target_dice")
    table.rows(record, [{"step": step, "time/block": 30.0} for step in (1, 2)])
    cells = {str(column.header): next(iter(column.cells)) for column in table.table().columns}
    assert (cells["steps/s"], cells["left"], cells["state"]) == ("0.0333", "60 s", "[white]training[/]")


def test_of_many_runs_those_at_work_and_the_best_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    table = TableTracker(Console(file=io.StringIO()), "target_dice")
    for number in range(ROWS + 10):
        made = Record(tmp_path / f"{number:03d}-abc")
        made.open(PUBLISHED.at("steps", 4), torch.device("cpu"))
        row = {"step": 4.0, "time/block": 1.0, "quality/target_dice": number / 100, "divergence/stability": 1.0}
        table.rows(made, [row])
        if number:
            table.ended(made, Verdict("stable", 4, 4, 1.0))
    shown = table.table()
    names = list(shown.columns[0].cells)
    assert names == ["000-abc", *(f"{number:03d}-abc" for number in range(11, ROWS + 10))]
    assert shown.caption == "and 10 stable"
