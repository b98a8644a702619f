"""The live table: what every run of a study is doing, in the terminal.

Knows rich and what a person wants to see at a glance; plain lines where the output is no terminal.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from equipoise.config import RunConfig
from equipoise.figures import words
from equipoise.monitor import Verdict
from equipoise.page import duration
from equipoise.progress import Pace
from equipoise.record import Record, Row
from equipoise.search import called

COLOURS = {
    "stable": "green",
    "blurry": "green",
    "d_wins": "yellow",
    "recovered": "magenta",
    "collapsed": "red",
    "saturated": "red",
    "diverged": "red",
    "censored": "bright_black",
}


class _Line:
    """A run as it is known so far."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.row: Row = {}
        self.quality: dict[str, float] = {}
        self.seconds = 0.0
        self.pace = Pace(clock=lambda: self.seconds)  # of a record only the time of training is known
        self.verdict: Verdict | None = None

    def add(self, rows: Sequence[Row]) -> None:
        """Hear new blocks."""
        for row in rows:
            self.seconds += row["time/block"]
            self.pace.block(int(row["step"]), row["time/block"])
            self.quality |= {k: v for k, v in row.items() if k.startswith("quality/")}
        self.row = rows[-1]

    @property
    def rate(self) -> float | None:
        """Steps a second: of the last blocks while it trains, of all of them afterwards."""
        if self.verdict is None:
            return self.pace.steps_per_second
        return self.row.get("step", 0.0) / self.seconds if self.seconds else None

    @property
    def left(self) -> str:
        """Time of training to its last step."""
        left = None if self.verdict else self.pace.left(self.config.steps)
        return "" if left is None else duration(left.total_seconds())


ROWS = 40
"""Runs that a table shows; of more, the best have ended and the rest is counted."""


def wide_console(*, quiet: bool = False) -> Console:
    """The terminal at its own width; a file or pipe at one that holds the table.

    Args:
        quiet: swallow all that is printed.
    """
    console = Console(quiet=quiet)
    return console if console.is_terminal else Console(width=120, quiet=quiet)


class TableTracker:
    """A `Tracker` that keeps a table up to date."""

    def __init__(self, console: Console, objective: str, names: Mapping[RunConfig, str] | None = None) -> None:
        """Show nothing yet.

        Args:
            console: where.
            objective: what is shown: a Dice or the composite.
            names: what runs are called beside the names of their folders, by their settings.
        """
        self._console, self._objective, self._names = console, f"quality/{objective}", names or {}
        self._quality = called(objective)
        self._lines: dict[str, _Line] = {}
        live = console.is_terminal and not console.quiet
        self._live = Live(console=console, refresh_per_second=2, transient=False) if live else None
        if self._live:
            self._live.start()

    def rows(self, record: Record, rows: Sequence[Row]) -> None:
        """Show the newest block."""
        self._line(record).add(rows)
        self._refresh()

    def ended(self, record: Record, verdict: Verdict) -> None:
        """Show the verdict."""
        line = self._line(record)
        line.verdict = verdict
        if self._live is None:
            dice = _number(line.quality.get(self._objective)) or "-"
            told = f"{verdict.sentence()}; {self._quality} {dice}; {line.seconds:.0f} s of training"
            self._console.print(f"{self._called(record.name, line)}: {told}", soft_wrap=True)
        self._refresh()

    def close(self) -> None:
        """Leave the final table behind."""
        if self._live:
            self._live.update(self.table(ROWS))
            self._live.stop()
        else:
            self._console.print(self.table(ROWS))

    def table(self, most: int = ROWS) -> Table:
        """Runs, a row each: those at work and, as far as there is room, those that ended best."""
        shown, hidden = self._shown(most)
        caption = ", ".join(f"{n} {words(kind)}" for kind, n in Counter(map(_kind, hidden)).items())
        signals = ("cycle t", "segm.", "AUC t", self._quality, "S")
        heads = ("run", "game", "lr", "step", "steps/s", "left", *signals, "state")
        table = Table(*heads, box=box.SIMPLE_HEAD, title="runs", caption=f"and {caption}" if caption else None)
        for name, line in shown:
            kind, rate = _kind(line), line.rate
            table.add_row(
                self._called(name, line),
                line.config.loss.adversarial,
                f"{line.config.optim.lr:.1e}",
                f"{int(line.row.get('step', 0))}/{line.config.steps}",
                f"{rate:.3g}" if rate else "",
                line.left,
                *(_number(line.row.get(k)) for k in ("loss/cycle_t", "loss/segmentation", "auc/t")),
                _number(line.quality.get(self._objective)),
                _number(line.row.get("divergence/stability")),
                f"[{COLOURS.get(kind, 'white')}]{words(kind)}[/]",
            )
        return table

    def _shown(self, most: int) -> tuple[list[tuple[str, _Line]], list[_Line]]:
        """The runs to show, in order of their names, and all others."""

        def rank(item: tuple[str, _Line]) -> tuple[bool, float]:
            line = item[1]
            dice = line.quality.get(self._objective, 0.0) * line.row.get("divergence/stability", 0.0)
            return line.verdict is None, dice if math.isfinite(dice) else 0.0

        ranked = sorted(self._lines.items(), key=rank, reverse=True)
        return sorted(ranked[:most]), [line for _, line in ranked[most:]]

    def _line(self, record: Record) -> _Line:
        if record.name not in self._lines:
            self._lines[record.name] = _Line(record.config)
        return self._lines[record.name]

    def _called(self, name: str, line: _Line) -> str:
        label = self._names.get(line.config)
        return f"{name} {label}" if label else name

    def _refresh(self) -> None:
        if self._live:
            self._live.update(self.table(max(1, self._console.height - 8)))


def _kind(line: _Line) -> str:
    return line.verdict.kind if line.verdict else "training"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
