"""How a run's training is shown: a bar in a terminal, and lines, which a log keeps.

Knows what `train.Progress` says and what a person wants to know of it; knows nothing of how a run trains, nor of where
it is recorded, beyond the pictures that it is told of.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from equipoise.train import Progress

BLOCKS = 10
"""Blocks of steps that a speed is measured over: enough to be steady, few enough to follow what others do meanwhile."""
LINES = 20
"""Lines that a run is worth in a log, evaluations aside."""
SIGNALS = {"cycle": "loss/cycle_t", "AUC": "auc/t"}
"""What is shown beside the Dice."""


class Pace:
    """How quickly a run goes on, by its last blocks; the first, which warms up and may follow a resumption, is none."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._trained = 0.0
        self._marks: deque[tuple[int, float, float]] = deque(maxlen=BLOCKS + 1)

    def block(self, step: int, seconds: float) -> None:
        """Hear that a block has ended at `step`, after `seconds` of training."""
        self._trained += seconds
        self._marks.append((step, self._trained, self._clock()))

    @property
    def steps_per_second(self) -> float | None:
        """While training: what is measured, drawn and saved between blocks does not count. None before two blocks."""
        if len(self._marks) < 2:
            return None
        (first, began, _), (last, ended, _) = self._marks[0], self._marks[-1]
        return (last - first) / (ended - began)

    def left(self, steps: int) -> timedelta | None:
        """Time until step `steps` by the clock, to the second: with all that lies between blocks. None as above."""
        if len(self._marks) < 2:
            return None
        (first, _, began), (last, _, now) = self._marks[0], self._marks[-1]
        return timedelta(seconds=round((steps - last) * (now - began) / (last - first)))


@contextmanager
def shown(
    console: Console, steps: int, picture: Callable[[int], Path], clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[Progress], None]]:
    """Show a run of `steps` steps by what is told to the function that this gives.

    A terminal has a bar of steps with speed, time left and the newest signals. Every evaluation becomes a line with the
    Dice and the panels, which are at `picture(step)`; where the output is no terminal, so does every twentieth of the
    run.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    pace, said = Pace(clock), dict[str, str]()
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, lines = bar.add_task("steps", total=steps), 0

        def told(progress: Progress) -> None:
            nonlocal lines
            if not progress.signals:  # a run that had ended but for its verdict
                return
            pace.block(progress.step, progress.seconds)
            said.update(_said(progress.signals))
            text = ", ".join([*_speed(pace, steps), *(f"{name} {value}" for name, value in said.items())])
            bar.update(task, completed=progress.step, description=text)
            due = progress.step * LINES // steps
            if progress.looked or (due > lines and not console.is_terminal):
                lines = due
                panels = "" if progress.panels is None else f"; panels: {picture(progress.step)}"
                line = f"step {progress.step}/{steps}, {text}{panels}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield told


def _said(signals: dict[str, float]) -> dict[str, str]:
    """The signals that are shown: every Dice by its name, and a few more."""
    quality = {key.removeprefix("quality/").replace("_", " "): key for key in signals if key.startswith("quality/")}
    return {name: f"{signals[key]:.3f}" for name, key in (quality | SIGNALS).items() if key in signals}


def _speed(pace: Pace, steps: int) -> list[str]:
    speed, left = pace.steps_per_second, pace.left(steps)
    return [] if speed is None else [f"{speed:.3g} steps/s", f"{left} left"]
