"""Contact sheets: every run's curves in a small panel, so that a person can check verdicts by eye.

Knows the curves that a verdict can be read from and how a page of them is laid out; knows nothing of how verdicts are
reached. A value that no logarithm can show leaves a gap, and the panel says how many and of what.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.figures import INK, LINE, LOOKS, SOFT, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES = {
    "loss/cycle_s": ("cycle, source", "#7fb2e5"),
    "loss/cycle_t": ("cycle, target", "#1f4e8c"),
    "loss/segmentation": ("segmentation", "#5b7f2b"),
    "loss/generator": ("generator, total", "#b0543c"),
}
"""Drawn above, on a logarithmic axis: what they are called, and their colours."""
SATURATION = ("saturation/st", "saturation/ts", "saturation/sts", "saturation/tst")
SHARES = {"saturation": ("saturation, the largest", "#c2272d"), "auc/t": ("AUC of D_t", "#7a4f94")}
"""Drawn below, from 0 to 1."""
COLUMNS, ROWS = 4, 3
DASHES = (0, (4, 2))
WIDTH, HEIGHT = 5.6, 4.8
"""Of a panel, in inches; a page has 100 dots an inch."""


def write_contact_sheets(folder: Path, runs: Sequence[Run], names: Mapping[str, str] | None = None) -> list[Path]:
    """Write `curves-01.png` and so on, twelve runs a page, and remove those of an earlier, longer study.

    Args:
        folder: where they go.
        runs: in the order in which they are shown.
        names: what a panel is called, by the run's name; else that name itself.
    """
    size = COLUMNS * ROWS
    pages = [runs[i : i + size] for i in range(0, len(runs), size)]
    written = []
    for number, some in enumerate(pages, start=1):
        path = folder / f"curves-{number:02d}.png"
        partial = path.with_name(f".{path.name}.partial")
        contact_sheet(some, names or {}).savefig(partial, format="png", dpi=100)
        partial.replace(path)
        written.append(path)
    for old in set(folder.glob("curves-*.png")) - set(written):
        old.unlink()
    return written


def contact_sheet(runs: Sequence[Run], names: Mapping[str, str]) -> Figure:
    """One page: a panel a run, at most twelve."""
    from matplotlib.figure import Figure

    columns = max(COLUMNS - 1, min(COLUMNS, len(runs)))  # the key wants the room
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(columns * WIDTH, rows * HEIGHT), facecolor="white")
    share = 0.4 / (rows * HEIGHT)  # of the page's height: a line for the key, another for the last steps' numbers
    edges = {"left": 0.3 / columns / WIDTH + 0.01, "right": 0.99, "top": 1 - 3.4 * share, "bottom": share}
    grid = figure.add_gridspec(rows, columns, **edges, wspace=0.14, hspace=0.45)
    for i, run in enumerate(runs):
        cell = grid[i // columns, i % columns].subgridspec(2, 1, height_ratios=(3, 1), hspace=0.06)
        upper, lower = (figure.add_subplot(cell[part]) for part in (0, 1))
        _panel(upper, lower, run, names.get(run.name, run.name))
    figure.legend(handles=_key(), loc="upper center", ncols=8, frameon=False, fontsize=11)
    return figure


def _panel(upper: Axes, lower: Axes, run: Run, name: str) -> None:
    """Losses above, shares below, the verdict's own sentence over both."""
    notes = []
    for signal, (title, colour) in LOSSES.items():
        steps, values = run.curve(signal)
        notes += _curve(upper, steps, values, title, colour, log=True)
    for signal, (title, colour) in SHARES.items():
        steps, values = _saturation(run) if signal == "saturation" else run.curve(signal)
        notes += _curve(lower, steps, values, title, colour, log=False)
    upper.set_yscale("log")
    lower.set_ylim(-0.05, 1.05)
    colour = LOOKS[run.kind].colour
    sentence = run.verdict.sentence() if run.verdict else f"unfinished after {run.steps} of {run.config.steps} steps"
    upper.set_title(textwrap.fill(name, 74), loc="left", fontsize=9.5, fontweight="bold", color=INK, pad=52)
    shown = textwrap.shorten(sentence, 290, placeholder=" ...")
    upper.text(0, 1.02, textwrap.fill(shown, 76), transform=upper.transAxes, fontsize=8, color=colour, va="bottom")
    if notes:
        ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
        said = "\n".join(notes)
        upper.text(0.01, 0.02, said, transform=upper.transAxes, fontsize=7.5, color=INK, va="bottom", bbox=ground)
    for axes in (upper, lower):
        for onset, alarm in _events(run):
            axes.axvline(onset, color=INK, linewidth=1.2, linestyle=DASHES)
            axes.axvline(alarm, color=INK, linewidth=1.2)
        axes.set_xlim(0, run.config.steps)
        axes.tick_params(labelsize=7, colors=SOFT)
        axes.grid(color=LINE, linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    upper.tick_params(labelbottom=False)


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, title: str, colour: str, *, log: bool) -> list[str]:
    """Draw what an axis can show; crosses at its upper edge where a value is not finite, and sentences for the rest."""
    finite = np.isfinite(values)
    low = finite & (values <= 0) if log else np.zeros_like(finite)
    axes.plot(steps, np.where(finite & ~low, values, np.nan), color=colour, linewidth=1.0)
    notes = []
    if low.any():
        notes.append(f"{title}: 0 or negative in {low.sum()} of {len(low)} blocks")
    if not finite.all():
        edge = axes.get_xaxis_transform()
        axes.plot(steps[~finite], np.full((~finite).sum(), 0.98), "x", color=colour, transform=edge, markersize=5)
        notes.append(f"{title}: not finite in {(~finite).sum()} of {len(finite)} blocks")
    return notes


def _saturation(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The largest of the saturations that each block has; NaN where one of them is."""
    held = [(row["step"], [row[s] for s in SATURATION if s in row]) for row in run.rows]
    made = [(step, float(np.max(values))) for step, values in held if values]
    steps, values = np.array(made, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _events(run: Run) -> list[tuple[int, int]]:
    """Onset and alarm of every divergence, and of a collapse that did not pass."""
    findings = run.verdict.findings if run.verdict else ()
    return [(f.onset, f.alarm) for f in findings if f.diverged or (f.kind == "collapse" and f.until is None)]


def _key() -> list[Any]:
    """What the lines of all panels mean."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, label=title) for title, colour in (*LOSSES.values(), *SHARES.values())]
    onset, alarm = Line2D([], [], color=INK, linestyle=DASHES, label="onset"), Line2D([], [], color=INK, label="alarm")
    return [*lines, onset, alarm]
