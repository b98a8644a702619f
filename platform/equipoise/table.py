"""The live table: what every run of a study is doing, in the terminal.

Knows rich and what a person wants to see at a glance; plain lines where the output is no terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from equipoise.config import RunConfig
from equipoise.monitor import Verdict
from equipoise.record import Record, Row

COLOURS = {"stable": "green", "d_wins": "yellow", "diverged": "red", "censored": "bright_black"}


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

    def __init__(self, console: Console, objective: str) -> None:
        self._console, self._objective = console, f"quality/{objective}"
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
            dice = line.quality.get(self._objective)
            self._console.print(
                f"{record.name}: {verdict.sentence()}; Dice {'-' if dice is None else f'{dice:.3f}'}; "
                f"{line.seconds:.0f} s of training"
            )
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
                name,
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

    def _refresh(self) -> None:
        if self._live:
            self._live.update(self.table())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
