"""Survival curves of a grid, by hand."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from equipoise.config import PUBLISHED
from equipoise.figures import Run
from equipoise.monitor import Finding, Verdict
from equipoise.outcomes import Cell, Outcome
from equipoise.survival_sheet import APART, survival_sheet, write_survival_sheet


def cell(condition: str, lr: float, *onsets: int | None) -> Cell:
    config = PUBLISHED.having({"steps": 100, "optim.lr": lr})

    def run(onset: int | None) -> Run:
        last = 100 if onset is None else onset + 10
        found = () if onset is None else (Finding("explosion", "loss/cycle_t", onset, last, 9.0, 1.0),)
        verdict = Verdict("diverged" if found else "stable", last, 100, 1.0, found)
        return Run("run", config, verdict, [{"step": last}], None)

    return Cell(condition, lr, tuple(Outcome(condition, run(onset)) for onset in onsets))


CELLS = [
    cell("calm", 2e-4, None, None),
    cell("wild", 2e-4, None, None),
    cell("calm", 2e-3, None, None),
    cell("wild", 2e-3, 20, None),
    cell("wilder", 2e-3, 10, 30),
]


def test_a_rate_is_a_panel_and_a_condition_that_blows_up_a_curve() -> None:
    slow, fast = survival_sheet(CELLS).axes
    assert slow.get_title(loc="left") == "lr 0.0002"
    assert [line.get_label() for line in slow.lines] == ["none blew up: calm (2); wild (2)"]
    wild, wilder, others = fast.lines
    assert wild.get_label() == "wild (1 of 2 blew up)"
    assert list(zip(wild.get_xdata(), wild.get_ydata(), strict=True)) == [(0, 1), (20, 0.5), (100, 0.5)]
    assert wilder.get_label() == "wilder (2 of 2 blew up)"
    lower = [(0, 1 - APART), (10, 0.5 - APART), (30, -APART), (40, -APART)]
    assert list(zip(wilder.get_xdata(), wilder.get_ydata(), strict=True)) == lower
    assert others.get_label() == "none blew up: calm (2)"
    assert slow.get_xlim() == fast.get_xlim() == (0, 100)


def test_a_condition_has_one_colour_in_all_panels(tmp_path: Path) -> None:
    both = [cell("wild", 2e-4, 5), cell("calm", 2e-3, 7), cell("wild", 2e-3, 5)]
    slow, fast = survival_sheet(both).axes
    assert slow.lines[0].get_color() == fast.lines[1].get_color() != fast.lines[0].get_color()
    write_survival_sheet(tmp_path / "survival.png", both)
    with Image.open(tmp_path / "survival.png") as picture:
        assert picture.size == (1200, 920)
