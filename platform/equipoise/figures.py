"""What a study's runs are told by: their looks, and the Plotly figures that compare whole runs.

Knows runs, their verdicts and how a person compares them; knows nothing of pages, of Optuna or of where figures go.
A value that is not finite is never drawn as a number: a sentence below the figure says that it is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from equipoise.columns import Columns, Row
from equipoise.config import RunConfig
from equipoise.monitor import Verdict
from equipoise.record import CONFIRM, Record
from equipoise.search import called
from equipoise.study import Study
from equipoise.survival import survival as kaplan_meier

INK, SOFT, LINE, GRID = "#1b2430", "#667080", "#b9c0c9", "#e7eaee"


class Look(NamedTuple):
    """How a verdict is drawn: never by colour alone."""

    colour: str
    symbol: str


LOOKS = {
    "stable": Look("#17795e", "circle"),
    "blurry": Look("#5f8a1c", "triangle-up"),
    "d_wins": Look("#b06f00", "diamond"),
    "recovered": Look("#7a4f94", "hexagon"),
    "collapsed": Look("#8c4a2f", "square"),
    "saturated": Look("#d0561f", "cross"),
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
        return cls(record.name, record.config, verdict, record.columns(), pictures[-1] if pictures else None)

    @property
    def kind(self) -> str:
        """The verdict's kind; `unfinished` without one."""
        return self.verdict.kind if self.verdict else "unfinished"

    @property
    def confirms(self) -> bool:
        """Whether this is no point of the search but the repetition of the best one."""
        return self.name.startswith(CONFIRM)

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(self.last("step") or 0)

    @property
    def device_seconds(self) -> float:
        """Wall time of the steps, times the workers that did them."""
        return self.columns.total("time/block", "time/workers", self.config.workers)

    @property
    def stability(self) -> float | None:
        """S at the planned horizon; None while it is not known, as for a censored run."""
        return self.verdict.stability if self.verdict else None

    def last(self, signal: str) -> float | None:
        """The last value recorded of a signal; None if there is none. May be NaN or infinite."""
        return self.columns.last(signal)

    def curve(self, signal: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps `(n,)` and values `(n,)` of the blocks that hold a signal."""
        return self.columns.curve(signal)

    @property
    def columns(self) -> Columns:
        """The rows by signals."""
        return self.rows if isinstance(self.rows, Columns) else Columns(self.rows)


class Figure(NamedTuple):
    """A figure and what it cannot show."""

    figure: Any
    """A `plotly.graph_objects.Figure`."""
    notes: list[str]


def dice_against_stability(runs: Sequence[Run], study: Study, best: Run | None) -> Figure:
    """Every run at its S and its last Dice or composite; a run whose S is not known yet, hollow, at its S so far."""
    import plotly.graph_objects as go

    figure, notes = go.Figure(), []
    quality, name = f"quality/{study.objective}", called(study.objective)
    figure.add_vrect(study.feasible, 1.03, fillcolor=LOOKS["stable"].colour, opacity=0.07, line_width=0, layer="below")
    for kind, group in by_kind(runs):
        shown = []
        for run in group:
            dice = run.last(quality)
            x = run.stability if run.stability is not None else run.last("divergence/stability")
            if dice is not None and x is not None and math.isfinite(dice) and math.isfinite(x):
                shown.append((run, x, dice))
            else:
                notes.append(f"{run.name} is not drawn: {f'no {name}' if dice is None else f'no finite {name} or S'}.")
        figure.add_scatter(
            x=[x for _, x, _ in shown],
            y=[dice for _, _, dice in shown],
            mode="markers+text",
            name=f"{words(kind)} ({len(group)})",
            marker=_marker(kind, 11),
            cliponaxis=False,
            text=[_role(run, best) for run, _, _ in shown],
            textposition="middle left",
            hovertext=[f"{about(run)}<br>{words(run.kind)}" for run, _, _ in shown],
            hovertemplate=f"%{{hovertext}}<br>{name} %{{y:.3f}}, S %{{x:.3f}}<extra></extra>",
            meta={"points": [run.name for run, _, _ in shown]},
        )
    front = pareto(runs, quality)
    if len(front) > 1:
        figure.add_scatter(
            x=[s for s, _ in front], y=[dice for _, dice in front], mode="lines", name="nothing beats these in both",
            line={"color": SOFT, "width": 1, "dash": "dot", "shape": "vh"}, hoverinfo="skip",
        )  # fmt: skip
    figure.add_annotation(
        x=study.feasible, y=1, yref="paper", text=f"feasible: S ≥ {study.feasible:g}",
        showarrow=False, xanchor="right", yanchor="top", xshift=-6, font={"color": LOOKS["stable"].colour},
    )  # fmt: skip
    figure.update_xaxes(title="stability S (hollow: so far)", range=[-0.03, 1.03])
    figure.update_yaxes(title=study.objective.replace("_", " "), rangemode="tozero")
    return Figure(styled(figure, 420), notes)


def pareto(runs: Sequence[Run], quality: str) -> list[tuple[float, float]]:
    """S and Dice of the points that no other beats in both, by S; of runs whose S is known, confirmations aside."""
    known = [(run.stability, run.last(quality)) for run in runs if not run.confirms]
    pairs = [(s, dice) for s, dice in known if s is not None and dice is not None and math.isfinite(dice)]
    front: list[tuple[float, float]] = []
    for s, dice in sorted(set(pairs), reverse=True):
        if not front or dice > front[-1][1]:
            front.append((s, dice))
    return front[::-1]


def survival(points: Sequence[Run]) -> Figure | None:
    """Share of points that have not begun to fail, by game (Kaplan-Meier); None where no point failed."""
    import plotly.graph_objects as go

    if all(onset(run) is None for run in points):
        return None
    figure = go.Figure()
    colours = ("#1f4e8c", "#b0543c", "#5b7f2b", "#7a4f94", "#2f8f8f", "#a8862b")
    for i, game in enumerate(sorted({run.config.loss.adversarial for run in points})):
        group = [run for run in points if run.config.loss.adversarial == game]
        onsets = [onset(run) for run in group]
        curve = kaplan_meier(onsets, [max(run.steps, at or 0) for run, at in zip(group, onsets, strict=True)])
        curve.append(
            (max(run.steps if at is None else at for run, at in zip(group, onsets, strict=True)), curve[-1][1])
        )
        colour = colours[i % len(colours)]
        figure.add_scatter(
            x=[t for t, _ in curve], y=[share for _, share in curve], mode="lines", legendgroup=game,
            name=f"{game} ({len(group) - onsets.count(None)} of {len(group)} failed)",
            line={"shape": "hv", "color": colour, "width": 2.2},
            hovertemplate=f"{game}: %{{y:.2f}} from step %{{x}} on<extra></extra>",
        )  # fmt: skip
        ends = [run.steps for run, at in zip(group, onsets, strict=True) if at is None]
        figure.add_scatter(
            x=ends, y=[next(share for at, share in reversed(curve) if at <= t) for t in ends], mode="markers",
            marker={"symbol": "line-ns-open", "size": 10, "color": colour}, legendgroup=game, showlegend=False,
            hovertemplate=f"{game}: a run ended at step %{{x}} without failing<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title="step", rangemode="tozero")
    figure.update_yaxes(title="share not failing", range=[-0.03, 1.05])
    return Figure(styled(figure, 360), [])


def bars(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """Shares in [0, 1] of some settings as bars, a panel a value that they are shares of; the largest on top."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(shares), subplot_titles=list(shares), horizontal_spacing=0.2)
    for i, told in enumerate(shares.values(), start=1):
        ordered = sorted(told.items(), key=lambda item: item[1])
        figure.add_bar(
            x=[share for _, share in ordered],
            y=[path for path, _ in ordered],
            orientation="h",
            marker={"color": LOOKS["unfinished"].colour},
            showlegend=False,
            xaxis=f"x{i}",
            yaxis=f"y{i}",
            hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )
    longest = max(map(len, shares.values()))
    figure.update_xaxes(title="share", rangemode="tozero")
    figure.update_yaxes(automargin=True)
    return Figure(styled(figure, 110 + 22 * longest), [])


def onset(run: Run) -> int | None:
    """Step at which a run began to fail: to diverge, saturate or collapse, recovered afterwards or not."""
    return run.verdict.onset if run.verdict else None


def about(run: Run) -> str:
    """A run's name with what a reader wants to know of it first."""
    return f"<b>{run.name}</b><br>{run.config.loss.adversarial}, lr {run.config.optim.lr:.2g}, {run.steps} steps"


def by_kind(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs by verdict, in the order in which verdicts are told."""
    groups = [(kind, [run for run in runs if run.kind == kind]) for kind in LOOKS]
    return [(kind, group) for kind, group in groups if group]


def _role(run: Run, best: Run | None) -> str:
    return "best point " if run is best else "confirmation " if run.confirms else ""


def words(kind: str) -> str:
    """A verdict's kind in plain words."""
    return kind.replace("_", " ")


def _marker(kind: str, size: int) -> dict[str, Any]:
    colour, symbol = LOOKS[kind]
    return {"color": colour, "symbol": symbol, "size": size, "line": {"width": 1.6, "color": colour}, "opacity": 0.9}


def styled(figure: Any, height: int, legend: float = 1.02) -> Any:
    """Dark on light, one type, quiet grid."""
    type_ = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 16, "t": 72 if legend > 1.05 else 40, "b": 52},
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
