"""What happened within runs: curves of losses and critics, as Plotly figures.

Knows which signals a verdict rests on and how trouble is marked; knows nothing of pages or of where figures go. A
value that is not finite is never drawn as a number: the curve has a gap there, a cross at the upper edge says where it
begins, and a sentence below the figure says so.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from equipoise.figures import INK, LOOKS, SOFT, Figure, Run, about, by_kind, styled, words
from equipoise.monitor import counted, watched

LOSSES = {
    "loss/cycle_t": "cycle, target",
    "loss/segmentation": "segmentation",
    "loss/generator": "generator, total",
    "critic/gap_t": "margin of D_t",
}
"""Curves with the words above them. Each run shows those that can explode in it."""
LINEAR = ("critic/gap_t",)
"""What may be negative in health; other losses have a logarithmic axis."""
CRITICS = {"auc/t": "D_t", "auc/s": "D_s", "auc/p": "D_p1", "auc/p_low": "D_p2"}
"""The critics that can win, by the names of the paper."""
POINTS = 120_000
"""Values that a figure of curves draws at most; with more, only every k-th block is drawn."""


def losses(runs: Sequence[Run], best: Run | None) -> Figure:
    """Curves of the losses that can explode, with each onset.

    Where a game's generator loss may be negative its critic's margin, E D(real) - E D(fake), stands in for it, as for
    the monitor.
    """
    shown = {signal: title for signal, title in LOSSES.items() if any(signal in watched(run.config) for run in runs)}
    return _curves(runs, best, shown, log=[signal for signal in shown if signal not in LINEAR])


def critics(runs: Sequence[Run], best: Run | None) -> Figure:
    """How well each critic tells real from fake: 0.5 is a guess, the dotted line is where a critic wins."""
    made = _curves(runs, best, CRITICS, log=())
    for limit in sorted({run.config.monitor.win_auc for run in runs}):
        made.figure.add_hline(limit, line={"dash": "dot", "color": SOFT, "width": 1})
    made.figure.update_layout({f"yaxis{i}": {"range": [0, 1.03]} for i in range(1, len(CRITICS) + 1)})
    return made


def _curves(runs: Sequence[Run], best: Run | None, panels: Mapping[str, str], *, log: Container[str]) -> Figure:
    """Panels side by side, a line a run; over each an axis from 0 to 1, for marks that have no value.

    `log`: the signals on a logarithmic axis.
    """
    from plotly.subplots import make_subplots

    count = len(panels)
    figure = make_subplots(rows=1, cols=count, subplot_titles=list(panels.values()), horizontal_spacing=0.05)
    every = 1 + sum(len(run.rows) for run in runs) * count // POINTS
    notes = [f"One block in {every} is drawn; onsets and crosses are exact."] if every > 1 else []
    for name, group, look in _lines(runs, best):
        line = {"color": look.colour, "width": look.width, "dash": look.dash}
        figure.add_scatter(
            x=[None], y=[None], mode="lines", name=name, legendgroup=name, legendrank=look.rank, line=line
        )
        for run in group:
            for i, signal in enumerate(panels, start=1):
                if not _judged(run, signal):
                    continue
                steps, values = run.curve(signal)
                shown = np.where(np.isfinite(values) & (values > 0 if signal in log else True), values, np.nan)
                notes += _gaps(run, signal, steps, values, signal in log)
                figure.add_scatter(
                    x=steps[::every].astype(np.int32),
                    y=shown[::every].astype(np.float32),
                    mode="lines",
                    name=run.name,
                    legendgroup=name,
                    showlegend=False,
                    xaxis=f"x{i}",
                    yaxis=f"y{i}",
                    line=line,
                    hovertemplate=f"{about(run)}<br>step %{{x}}: %{{y:.4g}}<extra></extra>",
                )
                _mark(figure, run, signal, (name, i, i + count), steps, shown, values)
    figure.update_xaxes(title="step", rangemode="tozero")
    for i, signal in enumerate(panels, start=1):
        over = {"overlaying": f"y{i}", "anchor": f"x{i}", "range": [0, 1], "visible": False, "fixedrange": True}
        figure.update_layout({f"yaxis{count + i}": over})
        if signal in log:
            figure.update_layout({f"yaxis{i}": {"type": "log", "dtick": "D2", "tickformat": "~g"}})
    return Figure(styled(figure, 400, legend=1.1), notes)


class _Line(NamedTuple):
    colour: str
    width: float
    dash: str
    rank: int


def _lines(runs: Sequence[Run], best: Run | None) -> list[tuple[str, list[Run], _Line]]:
    """Groups of curves by verdict, what matters most last and so on top: the best point and its confirmation."""
    repeated = [run for run in runs if run.confirms]
    ranks = {kind: i for i, kind in enumerate(LOOKS)}
    others = [run for run in runs if run is not best and not run.confirms]
    groups = [
        (f"{words(kind)} ({len(group)})", group, _Line(LOOKS[kind].colour, 1.1, "solid", ranks[kind]))
        for kind, group in by_kind(others)
    ]
    order = ("censored", "unfinished", *LOOKS)
    groups.sort(key=lambda group: order.index(group[1][0].kind))
    if best is not None:
        groups.append((f"best point ({words(best.kind)})", [best], _Line(INK, 2.2, "solid", len(LOOKS))))
    if repeated:
        groups.append((f"confirmation ({words(repeated[0].kind)})", repeated, _Line(INK, 1.8, "dot", len(LOOKS) + 1)))
    return groups


def _judged(run: Run, signal: str) -> bool:
    """Whether a verdict on the run can rest on a signal."""
    return signal in watched(run.config) or signal.removeprefix("auc/") in counted(run.config)


def _mark(
    figure: Any,
    run: Run,
    signal: str,
    place: tuple[str, int, int],
    steps: np.ndarray,
    shown: np.ndarray,
    values: np.ndarray,
) -> None:
    """Mark where trouble begins: on the curve where it has a value, else at the panel's upper edge.

    `place`: the group in the legend, the panel, and the axis from 0 to 1 that lies over it.
    """
    group, panel, over = place
    colour = LOOKS[run.kind].colour
    cross = {"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": colour}}
    diamond = {"symbol": "diamond", "size": 10, "color": colour, "line": {"width": 1.2, "color": "white"}}
    marks: list[tuple[float, float, dict[str, Any], str]] = []
    bad = ~np.isfinite(values)
    marks += [(step, math.nan, cross, "not finite from here on") for step in steps[bad & ~np.r_[False, bad[:-1]]]]
    for onset in _onsets(run, signal):
        at = int(np.searchsorted(steps, onset))
        value = float(np.float32(shown[at])) if at < len(shown) else math.nan  # as the curve, to the last digit
        marks.append((onset, value, diamond, "onset"))
    for step, value, marker, word in marks:
        edge = math.isnan(value)
        figure.add_scatter(
            x=[step],
            y=[0.975 if edge else value],
            mode="markers",
            name=run.name,
            legendgroup=group,
            showlegend=False,
            xaxis=f"x{panel}",
            yaxis=f"y{over if edge else panel}",
            marker=marker,
            hovertemplate=f"{about(run)}<br>{signal}: {word}, step %{{x}}<extra></extra>",
        )


def _onsets(run: Run, signal: str) -> list[int]:
    """A critic's panel shows its own win, every other one the step at which the run began to fail."""
    if run.verdict is None:
        return []
    if signal.startswith("auc/"):
        return [finding.onset for finding in run.verdict.findings if finding.signal == signal]
    return [run.verdict.onset] if run.verdict.onset is not None else []


def _gaps(run: Run, signal: str, steps: np.ndarray, values: np.ndarray, log: bool) -> list[str]:
    """Sentences on what a curve cannot show."""
    bad = ~np.isfinite(values)
    notes = []
    if bad.any():
        notes.append(
            f"{run.name}: {signal} is not finite in {bad.sum()} of {len(bad)} blocks, from step {steps[bad][0]:.0f}."
        )
    if log and (low := np.count_nonzero(np.isfinite(values) & (values <= 0))):
        notes.append(f"{run.name}: {signal} is zero or negative in {low} of {len(bad)} blocks: no logarithm.")
    return notes
