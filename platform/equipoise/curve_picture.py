"""Diagnosed runs side by side, as a picture to look at and to pass on.

Knows which curves a verdict is understood by, and how onset and alarm are marked; knows nothing of files of curves. No
name of the input is drawn, for a run may be called after a patient: columns are numbered as the runs are told.

A value that is not finite is never drawn as a number: the curve has a gap, and a cross at the upper edge says where it
begins. A value of 0 or less has no logarithm: it is a gap too.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from equipoise.curve_files import Curve
from equipoise.diagnose import Diagnosis
from equipoise.figures import GRID, INK, LINE, LOOKS, SOFT
from equipoise.verdict import Finding, count
from slicestore.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_RUNS = 6
"""Columns that can be told apart at the width of a page."""
DPI, COLOURS = 200, 64
"""Sharp at half its size; lines and letters need few colours, and a picture in a repository few bytes."""
SOURCE, TARGET, BOTH = "#1f6fb2", "#d1570b", "#4b5563"
WARM_UP = "#e4e7eb"
PANEL, GAP, LINE_HEIGHT, LEFT = 1.35, 0.3, 0.165, 0.72
"""Heights of a panel, of the gap above it and of a line of the title, and the margin at the left, in inches."""


class Panel(NamedTuple):
    """One row of the picture."""

    title: str
    lines: Mapping[str, tuple[str, str]]
    """Colour and words of each curve, by our names."""
    log: bool = True


PANELS = (
    Panel("cycle losses", {"loss/cycle_s": (SOURCE, "source"), "loss/cycle_t": (TARGET, "target")}),
    Panel(
        "generators",
        {
            "loss/generator": (BOTH, "total"),
            "loss/adv_s": (SOURCE, "adversarial, to source"),
            "loss/adv_t": (TARGET, "adversarial, to target"),
        },
    ),
    Panel("segmentation", {"loss/segmentation": (BOTH, "loss on translated source images")}),
    Panel(
        "critics' losses",
        {"critic/loss_s": (SOURCE, "of source images"), "critic/loss_t": (TARGET, "of target images")},
    ),
    Panel(
        "critics' AUC",
        {"auc/s": (SOURCE, "of source images"), "auc/t": (TARGET, "of target images"), "auc/p": (BOTH, "of masks")},
        log=False,
    ),
    Panel(
        "saturation",
        {"saturation/ts": (SOURCE, "made source-like"), "saturation/st": (TARGET, "made target-like")},
        log=False,
    ),
)


def draw(runs: Sequence[Diagnosis], path: Path) -> None:
    """Draw runs into a PNG file: a column a run, a row a kind of loss, critics below.

    Raises:
        InputError: more runs than fit, no curve that is ever drawn, or no place for a PNG file.
    """
    check(path)
    if len(runs) > MOST_RUNS:
        raise InputError(
            "--picture", found=f"{len(runs)} runs", rule=f"it shows {MOST_RUNS} at most", remedy="choose one with --run"
        )
    panels = [panel for panel in PANELS if any(name in run.curves for run in runs for name in panel.lines)]
    if not panels:
        raise InputError(
            "--picture",
            found="none of the curves that are drawn",
            rule="it shows losses and critics",
            remedy="leave it out",
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    titles = [_title(run, number if len(runs) > 1 else None) for number, run in enumerate(runs, 1)]
    width = LEFT + max(5.4, 4.2 * len(runs))
    above = 0.6 + LINE_HEIGHT * max(title.count("\n") + 1 for title in titles)
    height = above + (PANEL + GAP) * len(panels) - GAP + 0.5
    figure = Figure(figsize=(width, height), dpi=DPI)
    canvas: Any = FigureCanvasAgg(figure)  # in part without types
    grid = figure.subplots(len(panels), len(runs), squeeze=False, sharex="col", sharey="row")
    figure.subplots_adjust(
        left=LEFT / width,
        right=1 - 0.15 / width,
        top=1 - above / height,
        bottom=0.5 / height,
        wspace=0.06,
        hspace=GAP / PANEL,
    )
    for run, title, column in zip(runs, titles, grid.T, strict=True):
        for panel, axes in zip(panels, column, strict=True):
            _panel(axes, panel, run)
        _heading(column[0], title, run)
        for at, label in zip(column[-1].get_xticks(), column[-1].get_xticklabels(), strict=True):
            label.set_horizontalalignment("right" if at > 0.95 * run.verdict.planned else "center")
        column[-1].set_xlabel("step (grey: warm-up, not judged)", color=SOFT, fontsize=8.5)
    for panel, (first, *_) in zip(panels, grid, strict=True):
        _legend(first, panel, runs, raised=first is grid[0, 0])
    figure.align_ylabels(grid[:, 0])
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    partial = path.with_name(f".{path.name}.partial")
    drawn.quantize(COLOURS, dither=Image.Dither.NONE).save(partial, "PNG", optimize=True)
    os.replace(partial, path)


def check(path: Path) -> None:
    """Refuse a place where no PNG file can be.

    Raises:
        InputError: another ending, or no such folder.
    """
    if path.suffix.lower() != ".png":
        raise InputError("--picture", found=path.name, rule="a picture is a PNG file", remedy="end its name in .png")
    if not path.parent.is_dir():
        raise InputError(
            "--picture", found=f"no folder {path.parent}", rule="a picture goes into one", remedy="make the folder"
        )


def _title(run: Diagnosis, number: int | None) -> str:
    sentence = re.sub(r"(?<=\d) (?=\d{3}\b)", "\N{NO-BREAK SPACE}", run.verdict.sentence())
    return textwrap.fill(f"Run {number}: {sentence}" if number else sentence, 66 if number else 84)


def _heading(axes: Axes, title: str, run: Diagnosis) -> None:
    """The verdict, and the steps of its onset and alarm right above their lines."""
    axes.annotate(
        title, (0, 1), xytext=(0, 31), xycoords="axes fraction", textcoords="offset points",
        fontsize=9, color=INK, va="bottom", linespacing=1.25,
    )  # fmt: skip
    finding = _main(run)
    if finding is None:
        return
    low, high = 0.17 * run.verdict.planned, 0.83 * run.verdict.planned  # within these, words fit beside a line
    left = min(max(finding.onset, low), high)
    right = min(max(finding.alarm, left), high + 0.01 * run.verdict.planned)
    words: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "fontsize": 8.5, "va": "bottom", "weight": "bold"}
    axes.text(left, 1.02, f"onset {count(finding.onset)} ", color=_colour(run), ha="right", **words)
    if finding.alarm > finding.onset:
        axes.text(right, 1.02, f" alarm {count(finding.alarm)}", color=INK, ha="left", **words)


def _panel(axes: Axes, panel: Panel, run: Diagnosis) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.axvspan(0, run.horizon.warm_up * run.horizon.block, color=WARM_UP, linewidth=0, zorder=0)
    finding = _main(run)
    if finding is not None:
        axes.axvline(finding.onset, color=_colour(run), linewidth=1.4)
        if finding.alarm > finding.onset:
            axes.axvline(finding.alarm, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
    for name, (colour, _) in panel.lines.items():
        if name in run.curves:
            _line(axes, run.curves[name], colour, panel.log)
    if panel.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(0, run.verdict.planned)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(int(value))))
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=8)
    axes.spines[:].set_color(LINE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.label_outer()


def _line(axes: Axes, curve: Curve, colour: str, log: bool) -> None:
    steps, values = curve
    drawn = np.isfinite(values) & (values > 0 if log else True)
    axes.plot(steps, np.where(drawn, values, np.nan), color=colour, linewidth=1.1)
    bad = ~np.isfinite(values)
    begins = steps[bad & ~np.r_[False, bad[:-1]]]
    at_the_top: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    axes.plot(begins, np.full(len(begins), 0.95), "x", color=colour, markersize=6, markeredgewidth=1.6, **at_the_top)


def _legend(axes: Axes, panel: Panel, runs: Sequence[Diagnosis], *, raised: bool) -> None:
    """Names of the lines that any run has, above the first column; the top panel has onset and alarm in between."""
    from matplotlib.lines import Line2D

    shown = [look for name, look in panel.lines.items() if any(name in run.curves for run in runs)]
    axes.legend(
        [Line2D([], [], color=colour, linewidth=1.8) for colour, _ in shown],
        [words for _, words in shown],
        loc="lower left", bbox_to_anchor=(-0.01, 1.11 if raised else 0.97), ncols=len(shown),
        fontsize=8, labelcolor=SOFT, frameon=False, borderpad=0.1, handlelength=1.4, columnspacing=1.4,
    )  # fmt: skip
    axes.set_ylabel(panel.title, color=INK, fontsize=9)


def _main(run: Diagnosis) -> Finding | None:
    """The finding that the verdict is about."""
    findings = run.verdict.findings
    return next((finding for finding in findings if finding.diverged), findings[0] if findings else None)


def _colour(run: Diagnosis) -> str:
    return LOOKS[run.verdict.kind].colour
