"""How a run's training is shown, against speeds and times worked out by hand."""

import io
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from rich.console import Console

from equipoise.panels import Panels
from equipoise.progress import BLOCKS, LINES, Pace, shown
from equipoise.train import Progress


def clock(*times: float) -> Iterator[float]:
    return iter(times)


def block(
    step: int, *, seconds: float = 2.0, looked: bool = False, signals: dict[str, float] | None = None
) -> Progress:
    said = {"loss/cycle_t": 0.25, "auc/t": 0.5} if signals is None else signals
    return Progress(step, said, seconds, looked, Panels({}, {}) if looked else None, 1.0, None, lambda: None)  # type: ignore[arg-type, return-value]


def told(*blocks: Progress, steps: int, times: Iterator[float], terminal: bool = False) -> str:
    """What is shown of a run."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, no_color=True)
    with shown(console, steps, lambda step: Path(f"panels/{step}.png"), lambda: next(times)) as tell:
        for each in blocks:
            tell(each)
    return out.getvalue()


# --- speed ------------------------------------------------------------------------------------------------------------


def test_the_speed_is_that_of_training_and_the_time_left_that_of_the_clock() -> None:
    times = clock(100.0, 105.0, 110.0)
    pace = Pace(lambda: next(times))
    pace.block(1010, 9.0)  # resumed at step 1000, and warmed up
    assert pace.steps_per_second is None
    assert pace.left(1100) is None
    pace.block(1020, 2.0)  # 10 steps in 2 seconds, and 3 more for what lies between the blocks
    assert pace.steps_per_second == 5
    assert pace.left(1100) == timedelta(seconds=40)  # 80 steps, half a second each
    pace.block(1030, 2.0)
    assert pace.steps_per_second == 5
    assert pace.left(1100) == timedelta(seconds=35)
    assert pace.left(1030) == timedelta(0)


def test_the_speed_forgets_all_but_the_last_blocks() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    for step in range(3):
        now += 100
        pace.block(step, 100.0)
    for step in range(3, 3 + BLOCKS):
        now += 1
        pace.block(step, 0.5)
    assert pace.steps_per_second == 2
    assert pace.left(step + 7) == timedelta(seconds=7)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_log_has_a_line_for_every_evaluation_with_every_dice_and_its_panels() -> None:
    quality = {"quality/translated_dice": 0.5, "quality/target_dice": 0.1234, "loss/cycle_t": 1.0}
    text = told(
        block(1), block(2, looked=True, signals=quality), block(3), steps=1000, times=clock(0.0, 4.0, 8.0)
    )  # fmt: skip
    assert text.splitlines() == [
        "step 2/1000, 0.5 steps/s, 1:06:32 left, cycle 1.000, AUC 0.500, translated dice 0.500, target dice 0.123; "
        "panels: panels/2.png"  # 998 steps of 4 seconds
    ]


def test_between_evaluations_a_log_has_a_line_for_every_twentieth_of_the_run() -> None:
    steps = 3 * LINES
    text = told(*(block(step) for step in range(1, steps + 1)), steps=steps, times=iter(map(float, range(steps))))
    assert [line.split(",")[0] for line in text.splitlines()] == [f"step {3 * n}/{steps}" for n in range(1, LINES + 1)]


def test_a_terminal_has_a_bar_with_speed_and_time_left_and_lines_for_evaluations_alone() -> None:
    blocks = [block(step, looked=step == 2) for step in range(1, 101)]
    text = told(*blocks, steps=1000, times=iter(map(float, range(0, 400, 4))), terminal=True)
    assert text.count("panels: ") == 1
    assert "100/1000" in text
    assert "0.5 steps/s, 1:00:00 left, cycle 0.250, AUC 0.500" in text
    assert "step 50/1000" not in text


def test_markup_in_a_path_is_printed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    with shown(Console(file=out), 1, lambda step: Path("[bold]/x.png")) as tell:
        tell(block(1, looked=True))
    assert "panels: [bold]/x.png" in out.getvalue()


def test_a_run_that_had_ended_but_for_its_verdict_has_nothing_to_show() -> None:
    assert told(block(10, signals={}), steps=10, times=clock()) == ""
