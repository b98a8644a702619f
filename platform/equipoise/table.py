"""The live table: what every run of a study is doing, in the terminal.

Knows rich and what a person wants to see at a glance; plain lines where the output is no terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from equipoise.config import RunConfig
from equipoise.monitor import Verdict
from equipoise.record import Record, Row

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


@dataclass(slots=True)
class _Line:
    config: RunConfig
    row: Row
    quality: dict[str, float]
    seconds: float = 0.0
    verdict: Verdict | None = None


def wide_console() -> Console:
    """The terminal at its own width; a file or pipe at one that holds the table."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


class TableTracker:
    """A `Tracker` that keeps a table up to date."""

    def __init__(self, console: Console, objective: str, names: Mapping[RunConfig, str] | None = None) -> None:
        """Show nothing yet.

        Args:
            console: where.
            objective: the Dice that is shown.
            names: what runs are called beside the names of their folders, by their settings.
        """
        self._console, self._objective, self._names = console, f"quality/{objective}", names or {}
        self._lines: dict[str, _Line] = {}
        self._live = Live(console=console, refresh_per_second=2, transient=False) if console.is_terminal else None
        if self._live:
            self._live.start()

    def rows(self, record: Record, rows: Sequence[Row]) -> None:
        """Show the newest block."""
        line = self._lines.setdefault(record.name, _Line(record.config, {}, {}))
        line.row = rows[-1]
        line.seconds += sum(row["time/block"] for row in rows)
        for row in rows:
            line.quality |= {k: v for k, v in row.items() if k.startswith("quality/")}
        self._refresh()

    def ended(self, record: Record, verdict: Verdict) -> None:
        """Show the verdict."""
        line = self._lines.setdefault(record.name, _Line(record.config, {}, {}))
        line.verdict = verdict
        if self._live is None:
            dice = _number(line.quality.get(self._objective)) or "-"
            told = f"{verdict.sentence()}; Dice {dice}; {line.seconds:.0f} s of training"
            self._console.print(f"{self._called(record.name, line)}: {told}")
        self._refresh()

    def close(self) -> None:
        """Leave the final table behind."""
        if self._live:
            self._refresh()
            self._live.stop()
        else:
            self._console.print(self.table())

    def table(self) -> Table:
        """All runs, a row each."""
        table = Table("run", "game", "lr", "step", "steps/s", "cycle t", "AUC t", "Dice", "S", "verdict", title="runs")
        for name, line in sorted(self._lines.items()):
            done = int(line.row.get("step", 0))
            kind = line.verdict.kind if line.verdict else "training"
            table.add_row(
                self._called(name, line),
                line.config.loss.adversarial,
                f"{line.config.optim.lr:.1e}",
                f"{done}/{line.config.steps}",
                f"{done / line.seconds:.1f}" if line.seconds else "",
                *(_number(line.row.get(k)) for k in ("loss/cycle_t", "auc/t")),
                _number(line.quality.get(self._objective)),
                _number(line.row.get("divergence/stability")),
                f"[{COLOURS.get(kind, 'white')}]{kind.replace('_', ' ')}[/]",
            )
        return table

    def _called(self, name: str, line: _Line) -> str:
        label = self._names.get(line.config)
        return f"{name} {label}" if label else name

    def _refresh(self) -> None:
        if self._live:
            self._live.update(self.table())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
