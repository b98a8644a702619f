"""The picture of an evaluation: each subject and the means, a panel a measure.

Knows marks, scales and words; must not know how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from equipoise.agreement import MEASURES
from equipoise.figures import GRID, INK, LINE, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from equipoise.evaluation import Evaluation, Mean, Row

MARKS = {
    "": ("o", "#3f74b5", "subject"),
    "prediction": ("x", "#c2272d", "empty prediction"),
    "reference": ("+", "#b06f00", "empty reference"),
    "both": ("s", "#858d99", "both empty"),
}
"""Symbol, colour and words of a subject, by which mask is empty."""
OUTLYING = 20
"""A distance so many times the median would leave the others illegible on an even scale."""


def draw(evaluation: Evaluation) -> Figure:
    """Draw a panel a measure: a mark a subject, and beside them the mean with its interval."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    summary, layout = evaluation.summary(), ConstrainedLayoutEngine(h_pad=0.1)
    figure = Figure(figsize=(max(9.0, 3.0 + 2.4 * len(summary)), 6.2), facecolor="white", layout=layout)
    for axes, measure in zip(figure.subplots(2, 4).ravel(), MEASURES, strict=True):
        for place, (structure, means) in enumerate(summary.items()):
            _subjects_at(axes, place, [row for row in evaluation.rows if row.structure == structure], measure)
            _mean_at(axes, place + 0.3, means[measure])
        _scale(axes, measure, evaluation)
        _looks(axes, MEASURES[measure], summary)
    _heading(figure, evaluation)
    return figure


def _subjects_at(axes: Axes, place: float, rows: Sequence[Row], measure: str) -> None:
    """Subjects side by side in the order of their values, so that none hides another."""
    valued = [(getattr(row.agreement, measure), row.agreement.empty) for row in rows]
    shown = sorted(one for one in valued if not math.isnan(one[0]))
    for (value, empty), x in zip(shown, place + np.linspace(-0.35, 0.2, len(shown) + 2)[1:-1], strict=True):
        mark, colour, _ = MARKS[empty]
        axes.plot([x], [value], mark, color=colour, markersize=4.5, alpha=0.8, zorder=3, clip_on=False)


def _mean_at(axes: Axes, x: float, one: Mean) -> None:
    if one.interval is not None:
        axes.plot([x, x], one.interval, color=INK, linewidth=1.8, solid_capstyle="butt")
    axes.plot([x], [one.mean], "D", color=INK, markersize=5, zorder=3, clip_on=False)


def _scale(axes: Axes, measure: str, evaluation: Evaluation) -> None:
    """Overlaps from 0 to 1, errors round 0, distances from 0 and in decades where one of them outlies."""
    from matplotlib.ticker import FuncFormatter

    values = np.array([getattr(row.agreement, measure) for row in evaluation.rows])
    values = values[~np.isnan(values)]
    if measure.startswith("volume"):
        axes.axhline(0, color=SOFT, linewidth=1)
        if values.any():
            return
        axes.set_ylim(-1, 1)
    elif not measure.endswith("mm"):
        axes.set_ylim(0, 1)
    else:
        if values.any() and values.max() > OUTLYING * max(1.0, float(np.median(values))):
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(0, 1.08 * values.max() if values.any() else 1)


def _looks(axes: Axes, title: str, structures: Iterable[int]) -> None:
    names = [f"class {structure}" for structure in structures]
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.tick_params(colors=SOFT, labelsize=8.5)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_color(LINE)
    axes.spines[["top", "right"]].set_visible(False)


def _heading(figure: Figure, evaluation: Evaluation) -> None:
    """How many subjects there are, and what the marks mean."""
    from matplotlib.lines import Line2D

    seen = {row.agreement.empty for row in evaluation.rows}
    marks = [look for empty, look in MARKS.items() if empty in seen]
    marks.append(("D", INK, "mean and its interval" if len(evaluation.subjects) > 1 else "mean"))
    figure.suptitle(evaluation.counted, x=0.01, ha="left", fontsize=11, color=INK)
    figure.legend(
        [Line2D([], [], marker=mark, color=colour, linestyle="none", markersize=5.5) for mark, colour, _ in marks],
        [words for _, _, words in marks],
        loc="outside lower left", ncols=len(marks), fontsize=9, labelcolor=SOFT, frameon=False,
    )  # fmt: skip
