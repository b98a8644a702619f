"""A picture of how long the runs of a grid last: a panel a rate, a curve a condition.

Knows cells of runs and how their curves are told apart; knows nothing of how curves or verdicts are reached.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.figures import INK, LINE, SOFT
from equipoise.outcomes import Cell
from equipoise.survival import survival

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f4e8c", "#c2272d", "#5b7f2b", "#7a4f94", "#b06f00", "#17795e", "#d0598f", "#3f3f3f", "#4aa3c7", "#8c6d46")
APART = 0.007
"""By how much one curve is drawn below the last, so that none hides another."""


def write_survival_sheet(path: Path, cells: Sequence[Cell]) -> None:
    """Write the picture as PNG, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    survival_sheet(cells).savefig(partial, format="png", dpi=100)
    partial.replace(path)


def survival_sheet(cells: Sequence[Cell]) -> Figure:
    """Curves of Kaplan and Meier, a panel a rate."""
    from matplotlib.figure import Figure

    rates = sorted({cell.lr for cell in cells})
    conditions = list(dict.fromkeys(cell.condition for cell in cells))
    figure = Figure(figsize=(12, 4.6 * len(rates)), facecolor="white")
    panels = figure.subplots(len(rates), 1, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.07, right=0.66, top=1 - 0.12 / len(rates), bottom=0.14 / len(rates), hspace=0.32)
    looks = {name: (COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else ":") for i, name in enumerate(conditions)}
    for axes, rate in zip(panels, rates, strict=True):
        _panel(axes, [cell for cell in cells if cell.lr == rate], looks)
        axes.set_xlim(0, max(outcome.run.config.steps for cell in cells for outcome in cell.outcomes))
        axes.set_title(f"lr {rate:g}", loc="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def _panel(axes: Axes, cells: Sequence[Cell], looks: Mapping[str, tuple[str, str]]) -> None:
    """Curves of the cells in which some run blew up; the others are one line, and named beside it."""
    failing = [cell for cell in cells if any(onset is not None for onset in cell.watched[0])]
    others = [f"{cell.condition} ({len(cell.outcomes)})" for cell in cells if cell not in failing]
    end = max(max(cell.watched[1]) for cell in cells)
    for place, cell in enumerate(failing):
        (onsets, steps), (colour, dash) = cell.watched, looks[cell.condition]
        corners = survival(onsets, steps)
        at, share = zip(*corners, (max(steps), corners[-1][1]), strict=True)
        told = f"{cell.condition} ({sum(onset is not None for onset in onsets)} of {len(onsets)} blew up)"
        low = [value - APART * place for value in share]
        axes.step(at, low, where="post", color=colour, linestyle=dash, linewidth=2, label=told)
    if others:
        said = textwrap.fill(f"none blew up: {'; '.join(others)}", 52)
        axes.plot([0, end], [1 + 2 * APART] * 2, color=SOFT, linewidth=2, label=said)
    axes.set_ylim(-0.1, 1.06)
    axes.set_xlabel("step", color=SOFT)
    axes.set_ylabel("share not blown up", color=SOFT)
    axes.grid(color=LINE, linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=9)
