"""The table of a study's runs, where the output is no terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console

from equipoise.config import PUBLISHED
from equipoise.monitor import Verdict
from equipoise.record import Record
from equipoise.table import TableTracker
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
    table.rows(record, [{"step": 4, "divergence/stability": 0.9, "time/block": 1.5}])
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
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["000-abc", "lsgan", "2.0e-04", "4/4", "2.0", "", "", "0.250", "0.900", kind.replace("_", " ")]


def test_a_control_is_told_with_its_name(record: Record) -> None:
    told = said(record, Verdict("stable", 4, 4, 0.9), names={record.config: "as published"})
    assert told.startswith("000-abc as published: stable")
    assert "│ 000-abc as published │" in told
