"""What happened within runs: curves of losses and critics, as Plotly figures.

Knows which signals a verdict rests on and how trouble is marked; knows nothing of pages or of where figures go. A
value that is not finite is never drawn as a number: the curve has a gap there, a cross at the upper edge says where it
begins, and a sentence below the figure says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
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
BALANCE = {
    "balance/generator": "source to target (G)",
    "balance/decoder": "target to source (U)",
    "balance/encoder": "encoder (E)",
}
"""The networks at which several terms pull."""
TERMS = (
    "#1f4e8c", "#b0543c", "#5b7f2b", "#7a4f94", "#2f8f8f", "#a8862b", "#8d9199", "#d48fb0", "#6aa7de", "#3d3d3d"
)  # fmt: skip
"""One a term."""
POINTS = 120_000
"""Values that a figure of curves draws at most, as a rule; with more, only every k-th block is drawn."""


def losses(runs: Sequence[Run], best: Run | None, points: int = POINTS) -> Figure:
    """Curves of the losses that can explode, with each onset.

    Where a game's generator loss may be negative its critic's margin, E D(real) - E D(fake), stands in for it, as for
    the monitor.

    Args:
        runs: all of them.
        best: the best point's run, which is drawn on top.
        points: values that are drawn at most.
    """
    shown = {signal: title for signal, title in LOSSES.items() if any(signal in watched(run.config) for run in runs)}
    return _curves(runs, best, shown, log=[signal for signal in shown if signal not in LINEAR], points=points)


def critics(runs: Sequence[Run], best: Run | None, points: int = POINTS) -> Figure:
    """How well each critic tells real from fake: 0.5 is a guess, the dotted line is where a critic wins."""
    made = _curves(runs, best, CRITICS, log=(), points=points)
    for limit in sorted({run.config.monitor.win_auc for run in runs}):
        made.figure.add_hline(limit, line={"dash": "dot", "color": SOFT, "width": 1})
    made.figure.update_layout({f"yaxis{i}": {"range": [0, 1.03]} for i in range(1, len(CRITICS) + 1)})
    return made


def balance(runs: Sequence[Run], best: Run | None) -> Figure | None:
    """How evenly the terms of the objective pull at each network: 1 where all do alike. None where nobody measured."""
    measured = {signal: title for signal, title in BALANCE.items() if any(run.last(signal) is not None for run in runs)}
    if not measured:
        return None
    made = _curves(runs, best, measured, log=(), points=POINTS)
    made.figure.update_layout({f"yaxis{i}": {"range": [0, 1.03]} for i in range(1, len(measured) + 1)})
    return made


def pulls(run: Run) -> Figure | None:
    """Each term's share in moving each network of one run, stacked; None where it was not measured."""
    from plotly.subplots import make_subplots

    networks = [signal for signal in BALANCE if run.last(signal) is not None]
    if not networks:
        return None
    titles = [BALANCE[signal] for signal in networks]
    figure = make_subplots(rows=1, cols=len(networks), subplot_titles=titles, horizontal_spacing=0.05)
    terms = {signal: sorted(n for n in run.columns.names() if n.startswith(f"{signal}_")) for signal in networks}
    words_of = sorted({name.removeprefix(f"{signal}_") for signal, names in terms.items() for name in names})
    for i, signal in enumerate(networks, start=1):
        for name in terms[signal]:
            term, (steps, values) = name.removeprefix(f"{signal}_"), run.curve(name)
            colour = TERMS[words_of.index(term) % len(TERMS)]
            figure.add_scatter(
                x=steps.astype(np.int32), y=values.astype(np.float32), mode="lines", stackgroup=signal, name=term,
                legendgroup=term, showlegend=signal == next(s for s in networks if f"{s}_{term}" in terms[s]),
                line={"width": 0.6, "color": colour}, fillcolor=colour, xaxis=f"x{i}", yaxis=f"y{i}",
                hovertemplate=f"{term}, step %{{x}}: %{{y:.0%}}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(title="step")
    figure.update_yaxes(range=[0, 1])
    return Figure(styled(figure, 320, legend=1.12), [])


def _curves(
    runs: Sequence[Run], best: Run | None, panels: Mapping[str, str], *, log: Container[str], points: int
) -> Figure:
    """Panels side by side, a line a run; over each an axis from 0 to 1, for marks that have no value.

    `log`: the signals on a logarithmic axis.
    """
    from plotly.subplots import make_subplots

    count = len(panels)
    figure = make_subplots(rows=1, cols=count, subplot_titles=list(panels.values()), horizontal_spacing=0.05)
    every = 1 + sum(len(run.rows) for run in runs) * count // points
    notes = [f"One block in {every} is drawn; onsets and crosses are exact."] if every > 1 else []
    for name, group, look in _lines(runs, best):
        line = {"color": look.colour, "width": look.width, "dash": look.dash}
        figure.add_scatter(
            x=[None], y=[None], mode="lines", name=name, legendgroup=name, legendrank=look.rank, line=line
        )
        for i, signal in enumerate(panels, start=1):
            drawn = [_Drawn.of(run, signal, every, signal in log) for run in group if _judged(run, signal)]
            notes += [note for one in drawn for note in one.notes]
            _draw(figure, drawn, line, (name, i, i + count))
    figure.update_xaxes(title="step", rangemode="tozero")
    for i, signal in enumerate(panels, start=1):
        over = {"overlaying": f"y{i}", "anchor": f"x{i}", "range": [0, 1], "visible": False, "fixedrange": True}
        figure.update_layout({f"yaxis{count + i}": over})
        if signal in log:
            figure.update_layout({f"yaxis{i}": {"type": "log", "dtick": "D2", "tickformat": "~g"}})
    return Figure(styled(figure, 400, legend=1.1), notes)


class _Mark(NamedTuple):
    step: float
    value: float
    """NaN where the curve has none."""
    symbol: str
    told: str


@dataclass(frozen=True, slots=True, eq=False)
class _Drawn:
    """What is drawn of one run and signal."""

    run: Run
    steps: np.ndarray
    values: np.ndarray
    marks: list[_Mark]
    notes: list[str]

    @classmethod
    def of(cls, run: Run, signal: str, every: int, log: bool) -> _Drawn:
        """Thin a curve out, and find what must not be lost by that."""
        steps, values = run.curve(signal)
        shown = np.where(np.isfinite(values) & (values > 0 if log else True), values, np.nan)
        thin = steps[::every].astype(np.int32), shown[::every].astype(np.float32)
        return cls(run, *thin, _marks(run, signal, steps, shown, values), _gaps(run, signal, steps, values, log))


def _draw(figure: Any, drawn: Sequence[_Drawn], line: Mapping[str, Any], place: tuple[str, int, int]) -> None:
    """Draw runs of one look as one trace, with a gap between one and the next, and their marks.

    `meta` tells a page which part of the trace is which run's.

    `place`: the group in the legend, the panel, and the axis from 0 to 1 that lies over it.
    """
    group, panel, over = place
    drawn = [one for one in drawn if len(one.steps)]
    if not drawn:
        return
    common = {"legendgroup": group, "showlegend": False, "name": group, "xaxis": f"x{panel}"}
    gap = np.array([np.nan], np.float32)
    figure.add_scatter(
        x=np.concatenate([part for one in drawn for part in (one.steps, one.steps[-1:])]),
        y=np.concatenate([part for one in drawn for part in (one.values, gap)]),
        text=[one.run.name for one in drawn for _ in range(len(one.steps) + 1)],
        mode="lines",
        yaxis=f"y{panel}",
        line=line,
        hovertemplate="%{text}<br>step %{x}: %{y:.4g}<extra></extra>",
        meta={"runs": {one.run.name: len(one.steps) + 1 for one in drawn}},
        **common,
    )
    colour = LOOKS[drawn[0].run.kind].colour
    looks = {
        "x-thin": {"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": colour}},
        "diamond": {"symbol": "diamond", "size": 10, "color": colour, "line": {"width": 1.2, "color": "white"}},
    }
    marks = [(one.run, mark) for one in drawn for mark in one.marks]
    for symbol, edge in itertools.product(looks, (False, True)):
        those = [(run, mark) for run, mark in marks if mark.symbol == symbol and math.isnan(mark.value) == edge]
        if those:
            figure.add_scatter(
                x=[mark.step for _, mark in those],
                y=[0.975 if edge else mark.value for _, mark in those],
                text=[f"{about(run)}<br>{mark.told}" for run, mark in those],
                mode="markers",
                yaxis=f"y{over if edge else panel}",
                marker=looks[symbol],
                hovertemplate="%{text}, step %{x}<extra></extra>",
                meta={"points": [run.name for run, _ in those]},
                **common,
            )


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
    """Whether a verdict on the run can rest on a signal, or its balance was measured."""
    if signal in BALANCE:
        return run.last(signal) is not None
    return signal in watched(run.config) or signal.removeprefix("auc/") in counted(run.config)


def _marks(run: Run, signal: str, steps: np.ndarray, shown: np.ndarray, values: np.ndarray) -> list[_Mark]:
    """Where trouble begins: on the curve where it has a value, else to be drawn at the panel's upper edge."""
    bad = ~np.isfinite(values)
    first = steps[bad & ~np.r_[False, bad[:-1]]]
    marks = [_Mark(step, math.nan, "x-thin", f"{signal}: not finite from here on") for step in first]
    for onset in _onsets(run, signal):
        at = int(np.searchsorted(steps, onset))
        value = float(np.float32(shown[at])) if at < len(shown) else math.nan  # as the curve, to the last digit
        marks.append(_Mark(onset, value, "diamond", f"{signal}: onset"))
    return marks


def _onsets(run: Run, signal: str) -> list[int]:
    """A critic's panel shows its own win, every other one the step at which the run began to fail."""
    if run.verdict is None or signal in BALANCE:
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
