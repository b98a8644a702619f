"""A study's view at W&B: the panels by which its runs are compared, in code rather than clicked together.

Knows what our runs log and are summarised by, and which panels W&B has; knows nothing of records, of how anything gets
to W&B, or of the command line.

    Overview        what is asked, verdicts, what the settings of runs differ in
    Dice against S  a point a run
    What matters    searched settings beside S and Dice, and their importance for either
    Losses, Critics, Balance, Divergence, Quality, System   signals over steps
    Panels          slices with masks over them, where the user gave them to W&B

What the package gets wrong of our runs, and its private parts, are `wandb_view`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from equipoise import balance, panels, wandb_view
from equipoise.account import UNFINISHED
from equipoise.config import PUBLISHED
from equipoise.search import Range, called, cases
from equipoise.study import Study
from equipoise.uploading import reach
from equipoise.verdict import NAMES, Kind
from equipoise.wandb_row import ONSET, named
from equipoise.wandb_run import PROJECT
from slicestore.errors import InputError

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

RUNS = 100
"""So many runs a panel shows; W&B's own limit is 10. The most stable come first."""
FEW = 5
"""So many where a run has a line for each of many terms."""
SUMMARY = ("verdict", "stability", "dice", "onset", "steps", "device_hours", "device_hours_saved")
"""By what runs are compared: columns beside their names."""
VERDICTS = tuple(f"runs/{kind}" for kind in (*get_args(Kind), UNFINISHED))
"""Where a study's own run keeps how many runs had which verdict."""
IMAGES = tuple(f"panels/{row}" for row in panels.ROWS if row.startswith("x_"))
_OBJECTIVES = {
    "translated_dice": "Dice of masks predicted on translated source slices",
    "target_dice": "Dice of masks predicted on target slices",
    "composite": "geometric mean of the Dice on translated source slices and of how near target masks come to the "
    "volume of source masks",
}
_VALIDATORS = tuple(f"validator/{name}" for name in ("entropy", "information", "nuclear", "volume"))
_TERMS = balance.weights(PUBLISHED.at("loss.identity", 1.0))
"""All terms that can move a network."""
_COLOURS = ("#c2272d", "#e0b400", "#17795e")
"""From what ended at once to what lived."""
_OPEN = ("Overview", "Dice against S", "What matters", "Losses")


@dataclass(frozen=True, slots=True)
class Plot:
    """A panel of signals over steps, a line a run and signal."""

    title: str
    signals: tuple[str, ...]
    """By W&B's names."""
    log: bool = False
    between: tuple[float | None, float | None] = (None, None)
    """Ends of the vertical axis."""
    runs: int | None = None
    """So many runs at most; None: as many as in any panel."""


_UNIT = (0.0, 1.0)
PLOTS: Mapping[str, Sequence[Plot]] = {
    "Losses": (
        Plot("target cycle loss, and a dot where the run began to fail", ("loss/cycle_t", ONSET), log=True),
        *(Plot(NAMES[name], (name,), log=True) for name in ("loss/cycle_s", "loss/segmentation", "loss/generator")),
    ),
    "Critics": (
        *(
            Plot(f"AUC of {NAMES[name]}", (named(name),), between=_UNIT)
            for name in ("auc/t", "auc/s", "auc/p", "auc/p_low")
        ),
        *(Plot(NAMES[name], (name,)) for name in ("critic/gap_t", "critic/gap_s")),
    ),
    "Balance": (
        *(Plot(f"how evenly terms move the {network}", (f"balance/{network}",), between=_UNIT) for network in _TERMS),
        *(
            Plot(
                f"each term's share in moving the {network}",
                tuple(f"balance/{network}_{term}" for term in terms),
                between=_UNIT,
                runs=FEW,
            )
            for network, terms in _TERMS.items()
        ),
    ),
    "Divergence": (
        Plot("stability S so far", ("divergence/stability",), between=_UNIT),
        *(
            Plot(f"saturation: {NAMES[name]}", (named(name),), between=(0.0, None))
            for name in ("saturation/st", "saturation/ts")
        ),
    ),
    "Quality": (
        Plot("Dice on translated source slices", ("quality/translated_dice",), between=_UNIT),
        Plot("Dice on target slices", ("quality/target_dice",), between=_UNIT),
        Plot("composite: Dice on translated slices, volume on target slices", ("quality/composite",), between=_UNIT),
        Plot("validators, which need no target labels: higher is better", _VALIDATORS, between=(-1.0, 1.0), runs=FEW),
    ),
    "System": (
        Plot("steps per second", ("system/steps_per_second",), between=(0.0, None)),
        Plot("device-hours", ("system/device_hours",), between=(0.0, None)),
    ),
}
"""Sections of signals."""


def workspace(study: Study, entity: str, project: str) -> ws.Workspace:
    """A study's view, not saved yet; nothing is asked of W&B.

    Args:
        study: whose runs are shown; they are W&B's group of its name.
        entity: W&B's user or team; it may be empty until the view is saved.
        project: W&B's project of the runs.
    """
    wandb_view.load()
    import wandb_workspaces.workspaces as ws

    order = [ws.Ordering(ws.Summary(name), ascending=False) for name in ("stability", "dice")]
    columns = ["run:displayName", *(f"summary:{name}" for name in SUMMARY), "run:jobType", "run:notes"]
    made = wandb_view.exact(study.name)(
        entity=entity,
        project=project,
        name=re.sub(r"[^\w .,:()-]", "-", study.name),  # the package refuses signs, taking them for emoji
        sections=_sections(study),
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=RUNS),
        runset_settings=ws.RunsetSettings(order=order, pinned_columns=columns),
    )
    wandb_view.name(made, study.name)
    return made


def specification(study: Study) -> dict[str, Any]:
    """What W&B would be given of a study's view, as plain data; the same each time. It needs no network."""
    return wandb_view.plain(workspace(study, "", PROJECT))


def create(study: Study) -> str:
    """Save a study's view to W&B and return its address.

    A study has one view in a project: asked again, it is written anew, and what was changed in the browser is lost. To
    keep that, save it there under another name.

    Raises:
        InputError: there is no key, W&B does not answer or refuses, or it has no run of ours yet.
    """
    with wandb_view.asking():
        reach()
        import wandb

        api = wandb.Api()
        entity = api.settings["entity"] or api.default_entity
        if not entity:
            raise InputError(
                "W&B",
                found="an account without a default entity",
                rule="a view belongs to a user or a team",
                remedy="name one: set WANDB_ENTITY",
            )
        made = workspace(study, entity, PROJECT)
        return wandb_view.saved(made, api)


# --- panels -----------------------------------------------------------------------------------------------------------


def _sections(study: Study) -> list[ws.Section]:
    """All panels, in the order in which they are read."""
    signals = {name: [_lines(plot) for plot in several] for name, several in PLOTS.items()}
    system = {"System": signals.pop("System")}
    return [
        _section("Overview", _overview(study), 3),
        _section("Dice against S", [_dice_against_s(study)], 1),
        _section("What matters", _what_matters(study), 1),
        *(_section(name, several, 3) for name, several in signals.items()),
        _section("Panels", _images(), 1),
        *(_section(name, several, 3) for name, several in system.items()),
    ]


def _section(name: str, several: Sequence[Any], columns: int) -> ws.Section:
    import wandb_workspaces.workspaces as ws

    layout = ws.SectionLayoutSettings(columns=columns, rows=math.ceil(len(several) / columns))
    panel_settings = ws.SectionPanelSettings(x_axis="step")
    return ws.Section(
        name=name, panels=list(several), is_open=name in _OPEN, layout_settings=layout, panel_settings=panel_settings
    )


def _overview(study: Study) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.MarkdownPanel(markdown=_about(study)),
        wr.BarPlot(title="runs by verdict, when the study has ended", metrics=list(VERDICTS), orientation="h"),
        wr.RunComparer(diff_only="split"),
    ]


def _about(study: Study) -> str:
    """What is asked, what is sought, and what it may cost, in Markdown."""
    seeds = f" × {study.seeds} seeds" if study.seeds > 1 else ""
    many = "Dice and S are two objectives." if study.pareto else f"Feasible: S ≥ {study.feasible:g}."
    return (
        f"**{study.question}**\n\n"
        f"Objective: {_OBJECTIVES[study.objective]}. {many}\n\n"
        f"Budget: {study.points} points × {study.run.steps} steps{seeds}.\n\n"
        "S in [0, 1] is the share of the planned steps before a run began to fail, less for winning critics and late "
        "growth; a run that was stopped because others were better has none. A run that failed, or had to be "
        "recovered, is never feasible."
    )


def _dice_against_s(study: Study) -> wr.ScatterPlot:
    """A point a run. Its colour is how far the run got, since W&B colours by numbers; its verdict stands beside it."""
    import wandb_workspaces.reports.v2 as wr

    return wr.ScatterPlot(
        title=f"{called(study.objective)} against S; feasible: S ≥ {study.feasible:g}; colour: steps done",
        x=wr.SummaryMetric("stability"),
        y=wr.SummaryMetric("dice"),
        z=wr.SummaryMetric("steps"),
        range_x=_UNIT,
        range_y=_UNIT,
        gradient=_gradient(),
        legend_template="${run:displayName}: ${summary:verdict}",
    )


def _what_matters(study: Study) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    column = wr.ParallelCoordinatesPlotColumn
    searched = [
        column(metric=wr.Config(path), display_name=path, log=_is_log(study, path) or None) for path in _searched(study)
    ]
    told = [column(metric=wr.SummaryMetric(name), display_name=name) for name in ("stability", "dice")]
    return [
        wr.ParallelCoordinatesPlot(title="settings, S and Dice", columns=[*searched, *told], gradient=_gradient()),
        wr.ParameterImportancePlot(with_respect_to="dice"),
        wr.ParameterImportancePlot(with_respect_to="stability"),
    ]


def _searched(study: Study) -> list[str]:
    """The settings in which points differ."""
    return list(study.space) or list(dict.fromkeys(path for point in study.first for path in point))


def _is_log(study: Study, path: str) -> bool:
    """Whether a setting is searched by its ratios; 0, which an axis of ratios has not, may stand for its absence."""
    ranges = [case for case in cases(study.space.get(path, ())) if isinstance(case, Range)]
    return bool(ranges) and all(case.log and case.off is None for case in ranges)


def _gradient() -> list[wr.GradientPoint]:
    import wandb_workspaces.reports.v2 as wr

    return [wr.GradientPoint(color=c, offset=100 * k / (len(_COLOURS) - 1)) for k, c in enumerate(_COLOURS)]


def _lines(plot: Plot) -> wr.LinePlot:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(
        title=plot.title,
        x="step",
        y=list(plot.signals),
        log_y=plot.log or None,
        range_y=plot.between,
        max_runs_to_show=plot.runs,
    )


def _images() -> list[wr.MediaBrowser]:
    """All images of a step side by side, and how translations came about, a row a run."""
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.MediaBrowser(title="source, translated, back; target, translated, back", media_keys=list(IMAGES)),
        wr.MediaBrowser(
            title="translated source slices", media_keys=["panels/x_st"], grid_x_axis="step", grid_y_axis="run"
        ),
    ]
