"""What a study's records show, as Plotly figures.

Knows runs, their verdicts and how a person compares them; knows nothing of pages, of Optuna or of where figures go.
A value that is not finite is never drawn as a number: the curve has a gap there, a cross at the upper edge says where
it begins, and a sentence says so below the figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from equipoise.config import RunConfig
from equipoise.monitor import Verdict, counted, watched
from equipoise.record import Record, Row
from equipoise.study import Study

LOSSES = {
    "loss/cycle_t": "cycle, target",
    "loss/segmentation": "segmentation",
    "loss/generator": "generator, total",
    "critic/gap_t": "margin of D_t, hinge",
}
"""Curves on a logarithmic axis, with the words above them. Each run shows those that can explode in it."""
CRITICS = {"auc/t": "D_t", "auc/s": "D_s", "auc/p": "D_p1", "auc/p_low": "D_p2"}
"""The critics that can win, by the names of the paper."""
INK, SOFT, LINE, GRID = "#1b2430", "#667080", "#b9c0c9", "#e7eaee"
POINTS = 120_000
"""Values that a figure of curves draws at most; with more, only every k-th block is drawn."""


class Look(NamedTuple):
    """How a verdict is drawn: never by colour alone."""

    colour: str
    symbol: str


LOOKS = {
    "stable": Look("#17795e", "circle"),
    "d_wins": Look("#b06f00", "diamond"),
    "diverged": Look("#c2272d", "x"),
    "censored": Look("#858d99", "circle-open"),
    "unfinished": Look("#3f74b5", "square-open"),
}
"""In the order in which verdicts are told."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One run, read once, so that all that is told of it agrees."""

    name: str
    config: RunConfig
    verdict: Verdict | None
    rows: Sequence[Row]
    picture: Path | None
    """The last panels."""

    @classmethod
    def read(cls, record: Record) -> Run:
        """What a record holds now."""
        verdict = record.verdict  # before the rows: a run with a verdict then has all of them
        pictures = record.pictures()
        return cls(record.name, record.config, verdict, record.rows(), pictures[-1] if pictures else None)

    @property
    def kind(self) -> str:
        """The verdict's kind; `unfinished` without one."""
        return self.verdict.kind if self.verdict else "unfinished"

    @property
    def confirms(self) -> bool:
        """Whether this is no point of the search but the repetition of the best one."""
        return self.name.startswith("confirm")

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def device_seconds(self) -> float:
        """Wall time of the steps, times workers."""
        return sum(row["time/block"] for row in self.rows) * self.config.workers

    @property
    def stability(self) -> float | None:
        """S at the planned horizon; None while it is not known, as for a censored run."""
        return self.verdict.stability if self.verdict else None

    def last(self, signal: str) -> float | None:
        """The last value recorded of a signal; None if there is none. May be NaN or infinite."""
        return next((row[signal] for row in reversed(self.rows) if signal in row), None)

    def curve(self, signal: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps `(n,)` and values `(n,)` of the blocks that hold a signal."""
        held = [(row["step"], row[signal]) for row in self.rows if signal in row]
        steps, values = np.array(held, dtype=np.float64).reshape(-1, 2).T
        return steps, values


class Figure(NamedTuple):
    """A figure and what it cannot show."""

    figure: Any
    """A `plotly.graph_objects.Figure`."""
    notes: list[str]


def dice_against_stability(runs: Sequence[Run], study: Study, best: Run | None) -> Figure:
    """Every run at its S and its last Dice; a run whose S is not known yet, hollow, at its S so far."""
    import plotly.graph_objects as go

    figure, notes = go.Figure(), []
    quality = f"quality/{study.objective}"
    figure.add_vrect(study.feasible, 1.03, fillcolor=LOOKS["stable"].colour, opacity=0.07, line_width=0, layer="below")
    for kind, group in _by_kind(runs):
        shown = []
        for run in group:
            dice = run.last(quality)
            x = run.stability if run.stability is not None else run.last("divergence/stability")
            if dice is not None and x is not None and math.isfinite(dice) and math.isfinite(x):
                shown.append((run, x, dice))
            else:
                notes.append(f"{run.name} is not drawn: {'no Dice' if dice is None else 'no finite Dice or S'}.")
        figure.add_scatter(
            x=[x for _, x, _ in shown],
            y=[dice for _, _, dice in shown],
            mode="markers+text",
            name=f"{_words(kind)} ({len(group)})",
            marker=_marker(kind, 11),
            text=[_role(run, best) for run, _, _ in shown],
            textposition="middle left",
            hovertext=[f"{about(run)}<br>{_words(run.kind)}" for run, _, _ in shown],
            hovertemplate="%{hovertext}<br>Dice %{y:.3f}, S %{x:.3f}<extra></extra>",
        )
    figure.add_annotation(
        x=study.feasible, y=1, yref="paper", text=f"feasible: S ≥ {study.feasible:g}",
        showarrow=False, xanchor="right", yanchor="top", xshift=-6, font={"color": LOOKS["stable"].colour},
    )  # fmt: skip
    figure.update_xaxes(title="stability S (hollow: so far)", range=[-0.03, 1.03])
    figure.update_yaxes(title=study.objective.replace("_", " "), rangemode="tozero")
    return Figure(_styled(figure, 420), notes)


def losses(runs: Sequence[Run], best: Run | None) -> Figure:
    """Curves of the losses that can explode, on a logarithmic axis, with each divergence's onset.

    A hinge game's generator loss may be negative: as for the monitor, its critic's margin stands in for it.
    """
    shown = {signal: title for signal, title in LOSSES.items() if any(signal in watched(run.config) for run in runs)}
    return _curves(runs, best, shown, log=True)


def critics(runs: Sequence[Run], best: Run | None) -> Figure:
    """How well each critic tells real from fake: 0.5 is a guess, the dotted line is where a critic wins."""
    made = _curves(runs, best, CRITICS, log=False)
    for limit in sorted({run.config.monitor.win_auc for run in runs}):
        made.figure.add_hline(limit, line={"dash": "dot", "color": SOFT, "width": 1})
    made.figure.update_yaxes(range=[0.3, 1.03])
    return made


def survival(points: Sequence[Run]) -> Figure | None:
    """Share of points that have not diverged, by game (Kaplan-Meier); None where no point diverged."""
    import plotly.graph_objects as go

    if not any(run.kind == "diverged" for run in points):
        return None
    figure = go.Figure()
    colours = ("#1f4e8c", "#b0543c", "#5b7f2b", "#7a4f94")
    for i, game in enumerate(sorted({run.config.loss.adversarial for run in points})):
        group = [run for run in points if run.config.loss.adversarial == game]
        times = [_lasted(run) for run in group]
        diverged = [run.kind == "diverged" for run in group]
        curve = kaplan_meier(times, diverged)
        curve.append((max(times), curve[-1][1]))
        colour = colours[i % len(colours)]
        figure.add_scatter(
            x=[t for t, _ in curve], y=[share for _, share in curve], mode="lines", legendgroup=game,
            name=f"{game} ({sum(diverged)} of {len(group)} diverged)",
            line={"shape": "hv", "color": colour, "width": 2.2},
            hovertemplate=f"{game}: %{{y:.2f}} from step %{{x}} on<extra></extra>",
        )  # fmt: skip
        ends = [t for t, event in zip(times, diverged, strict=True) if not event]
        figure.add_scatter(
            x=ends, y=[next(share for at, share in reversed(curve) if at <= t) for t in ends], mode="markers",
            marker={"symbol": "line-ns-open", "size": 10, "color": colour}, legendgroup=game, showlegend=False,
            hovertemplate=f"{game}: a run ended at step %{{x}} without diverging<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title="step", rangemode="tozero")
    figure.update_yaxes(title="share not diverged", range=[-0.03, 1.05])
    return Figure(_styled(figure, 360), [])


def kaplan_meier(times: Iterable[int], events: Iterable[bool]) -> list[tuple[int, float]]:
    """The survival curve as corners (time, share from then on), beginning with (0, 1).

    An end without an event counts as under observation up to its own time, events at that time included.
    """
    ends = sorted(zip(times, events, strict=True))
    curve, share = [(0, 1.0)], 1.0
    for time in sorted({t for t, event in ends if event}):
        at_risk = sum(t >= time for t, _ in ends)
        share *= 1 - sum(event for t, event in ends if t == time) / at_risk
        curve.append((time, share))
    return curve


def about(run: Run) -> str:
    """A run's name with what a reader wants to know of it first."""
    return f"<b>{run.name}</b><br>{run.config.loss.adversarial}, lr {run.config.optim.lr:.2g}, {run.steps} steps"


def _curves(runs: Sequence[Run], best: Run | None, panels: Mapping[str, str], *, log: bool) -> Figure:
    """Panels side by side, a line a run; over each an axis from 0 to 1, for marks that have no value."""
    from plotly.subplots import make_subplots

    count = len(panels)
    figure = make_subplots(rows=1, cols=count, subplot_titles=list(panels.values()), horizontal_spacing=0.05)
    every = 1 + sum(len(run.rows) for run in runs) * count // POINTS
    notes = [f"Every {every}th block is drawn; onsets and crosses are exact."] if every > 1 else []
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
                shown = np.where(np.isfinite(values) & (values > 0 if log else True), values, np.nan)
                notes += _gaps(run, signal, steps, values, log)
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
    for i in range(1, count + 1):
        over = {"overlaying": f"y{i}", "anchor": f"x{i}", "range": [0, 1], "visible": False, "fixedrange": True}
        figure.update_layout({f"yaxis{count + i}": over})
        if log:
            figure.update_layout({f"yaxis{i}": {"type": "log", "dtick": "D2", "tickformat": "~g"}})
    return Figure(_styled(figure, 400, legend=1.1), notes)


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
        (f"{_words(kind)} ({len(group)})", group, _Line(LOOKS[kind].colour, 1.1, "solid", ranks[kind]))
        for kind, group in _by_kind(others)
    ]
    order = ("censored", "unfinished", "stable", "d_wins", "diverged")
    groups.sort(key=lambda group: order.index(group[1][0].kind))
    if best is not None:
        groups.append((f"best point ({_words(best.kind)})", [best], _Line(INK, 2.2, "solid", len(LOOKS))))
    if repeated:
        groups.append((f"confirmation ({_words(repeated[0].kind)})", repeated, _Line(INK, 1.8, "dot", len(LOOKS) + 1)))
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
        marks.append((onset, float(shown[at]) if at < len(shown) else math.nan, diamond, "onset"))
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
    """A critic's panel shows its own win, every other one the onset of the divergence."""
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


def _by_kind(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    groups = [(kind, [run for run in runs if run.kind == kind]) for kind in LOOKS]
    return [(kind, group) for kind, group in groups if group]


def _lasted(run: Run) -> int:
    return run.verdict.onset if run.verdict and run.verdict.onset is not None else run.steps


def _role(run: Run, best: Run | None) -> str:
    return "best point " if run is best else "confirmation " if run.confirms else ""


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _marker(kind: str, size: int) -> dict[str, Any]:
    colour, symbol = LOOKS[kind]
    return {"color": colour, "symbol": symbol, "size": size, "line": {"width": 1.6, "color": colour}, "opacity": 0.9}


def _styled(figure: Any, height: int, legend: float = 1.02) -> Any:
    """Dark on light, one type, quiet grid."""
    type_ = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 16, "t": 72, "b": 52},
        font={"family": type_, "size": 13, "color": INK},
        legend={"orientation": "h", "x": 0, "y": legend, "yanchor": "bottom"},
        hoverlabel={"bgcolor": "white", "font": {"color": INK}},
        paper_bgcolor="white",
        plot_bgcolor="white",
    )
    axis = {"gridcolor": GRID, "linecolor": LINE, "zeroline": False, "ticks": "outside", "tickcolor": LINE}
    title = {"font": {"size": 12, "color": SOFT}, "standoff": 10}
    figure.update_xaxes(**axis, title=title)
    figure.update_yaxes(**axis, title=title)
    return figure
