"""Contact sheets show every run with its verdict, and hide nothing that cannot be drawn."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equipoise.config import PUBLISHED
from equipoise.contact_sheet import contact_sheet, write_contact_sheets
from equipoise.figures import LOOKS, Run
from equipoise.monitor import Finding, Verdict
from equipoise.record import Row

STEPS = 100
EXPLODED = Finding("explosion", "loss/cycle_t", onset=60, alarm=75, value=12.5, limit=0.4)
WON = Finding("d_wins", "auc/t", onset=20, alarm=30, value=0.995, limit=0.99)
DIVERGED = Verdict("diverged", 75, STEPS, 0.6, (WON, EXPLODED))
STABLE = Verdict("stable", STEPS, STEPS, 1.0)


def run(name: str = "run", verdict: Verdict | None = STABLE, **signals: float) -> Run:
    """A run whose signals are level, but for those that are given for its last block."""
    last = verdict.step if verdict else STEPS // 2
    level = {"loss/cycle_s": 0.5, "loss/cycle_t": 0.4, "loss/segmentation": 0.8, "loss/generator": 9.0, "auc/t": 0.7}
    level |= {"saturation/st": 0.0, "saturation/tst": 0.1}
    rows: list[Row] = [{"step": step, **level} for step in range(1, last + 1)]
    rows[-1] |= {path.replace("__", "/"): value for path, value in signals.items()}
    return Run(name, PUBLISHED.at("steps", STEPS), verdict, rows, None)


def test_a_run_is_shown_with_its_verdict_s_sentence_its_curves_and_where_it_failed() -> None:
    upper, lower = contact_sheet([run(verdict=DIVERGED)], {"run": "no norm, lr 0.002, seed 1"}).axes
    assert upper.get_title(loc="left") == "no norm, lr 0.002, seed 1"
    (sentence,) = (text.get_text() for text in upper.texts)
    assert sentence.replace("\n", " ") == DIVERGED.sentence()
    assert upper.get_yscale() == "log"
    assert len(upper.lines) == 4 + 2  # the losses, onset and alarm
    for axes in (upper, lower):
        marks = [line for line in axes.lines if len(set(line.get_xdata())) == 1]
        assert [line.get_xdata()[0] for line in marks] == [60, 75], "a critic that won has no line"
        assert axes.get_xlim() == (0, STEPS)


def test_the_panel_below_shows_the_largest_saturation_and_the_critic_s_auc() -> None:
    _, lower = contact_sheet([run(saturation__st=0.9)], {}).axes
    saturation, auc = lower.lines
    assert saturation.get_ydata().tolist() == [0.1] * 99 + [0.9]
    assert auc.get_ydata().tolist() == [0.7] * 100


def test_what_no_logarithm_shows_is_a_gap_and_said() -> None:
    upper, _ = contact_sheet([run(loss__generator=-2.0, loss__cycle_t=math.nan)], {}).axes
    said = upper.texts[-1].get_text().split("\n")
    assert said == [
        "cycle, target: not finite in 1 of 100 blocks",
        "generator, total: 0 or negative in 1 of 100 blocks",
    ]
    gaps = [line for line in upper.lines if len(line.get_ydata()) == 100 and np.isnan(line.get_ydata()[-1])]
    assert len(gaps) == 2
    (cross,) = (line for line in upper.lines if line.get_marker() == "x")
    assert cross.get_xdata().tolist() == [100]


def test_a_saturation_that_is_not_finite_is_said_too() -> None:
    upper, _ = contact_sheet([run(saturation__st=math.nan)], {}).axes
    assert upper.texts[-1].get_text() == "saturation, the largest: not finite in 1 of 100 blocks"


@pytest.mark.parametrize("kind", [kind for kind in LOOKS if kind != "unfinished"])
def test_every_verdict_can_be_shown(kind: str) -> None:
    assert contact_sheet([run(verdict=Verdict(kind, STEPS, STEPS, 0.5))], {}).axes  # type: ignore[arg-type]


def test_a_run_without_a_verdict_or_without_a_row_is_shown_as_unfinished() -> None:
    bare = Run("bare", PUBLISHED.at("steps", STEPS), None, [], None)
    sheet = contact_sheet([run(verdict=None), bare], {})
    told = [text.get_text() for axes in sheet.axes for text in axes.texts]
    assert told == ["unfinished after 50 of 100 steps", "unfinished after 0 of 100 steps"]


def test_twelve_runs_are_a_page_and_pages_of_a_longer_study_go(tmp_path: Path) -> None:
    for number in (2, 3):
        (tmp_path / f"curves-{number:02d}.png").write_bytes(b"old")
    pages = write_contact_sheets(tmp_path, [run(str(n), DIVERGED) for n in range(13)])
    assert [page.name for page in pages] == ["curves-01.png", "curves-02.png"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["curves-01.png", "curves-02.png"]
    for page, size in zip(pages, [(2240, 1440), (1680, 480)], strict=True):
        with Image.open(page) as picture:
            assert picture.size == size
