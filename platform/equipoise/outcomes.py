"""What a grid's runs came to: a row a run, a cell a condition and rate, and the tables made of them.

Knows records, verdicts and how several seeds are told together; knows nothing of what a particular study asks. A value
that is not finite is told as such: no mean is taken over it, and none without it is passed off as the whole.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from equipoise.contact_sheet import SATURATION, write_contact_sheets
from equipoise.figures import Run, words
from equipoise.grid import condition_of, label
from equipoise.study import StudyFolder
from equipoise.survival import log_rank, restricted_mean
from equipoise.verdict import Finding

LAST = 0.1
"""Share of a run's blocks, at its end, over which an end level is averaged."""
ENDS = (
    "loss/cycle_s",
    "loss/cycle_t",
    "loss/segmentation",
    "loss/generator",
    "critic/loss_t",
    "auc/s",
    "auc/t",
    *SATURATION,
    "balance/generator",
    "balance/decoder",
    "balance/encoder",
    "validator/entropy",
    "validator/information",
    "validator/nuclear",
    "validator/volume",
)
"""Signals whose end levels are written for every run."""
NOTHING = "–"
"""Stands for what was never measured or did not happen."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One run of a grid."""

    condition: str
    run: Run

    @property
    def lr(self) -> float:
        """Its `optim.lr`."""
        return self.run.config.optim.lr

    @property
    def seed(self) -> int:
        """Its `seed`."""
        return self.run.config.seed

    @property
    def onset(self) -> int | None:
        """Step at which it began to blow up, to diverge or saturate, recovered afterwards or not; None if it did not.

        A collapse is none: it ends no run, and masks may collapse by themselves. The verdict tells it.
        """
        return min((f.onset for f in self._blown), default=None)

    @property
    def alarm(self) -> int | None:
        """Step at which that was certain."""
        return min((f.alarm for f in self._blown if f.onset == self.onset), default=None)

    @property
    def spared(self) -> float | None:
        """Share of its planned steps that were not done, because the monitor ended it; None while it has not ended."""
        return 1 - self.run.steps / self.run.config.steps if self.run.verdict else None

    @property
    def saturation(self) -> float | None:
        """The largest end level of the translations' saturations: share of pixels at tanh's ends, beyond real ones."""
        each = [level for signal in SATURATION if (level := self.end(signal)) is not None]
        return float(np.max(each)) if each else None

    @property
    def _blown(self) -> list[Finding]:
        return [f for f in self.run.verdict.findings if f.diverged] if self.run.verdict else []

    def quality(self, name: str) -> float | None:
        """The last `quality/name` that was measured; None if none was. May be NaN."""
        return self.run.last(f"quality/{name}")

    def end(self, signal: str) -> float | None:
        """Mean of a signal over the last tenth of its blocks; None if it has none, NaN or infinite if a block was."""
        _, values = self.run.curve(signal)
        with np.errstate(invalid="ignore"):  # infinity less infinity is NaN, as it should be
            return float(values[-math.ceil(LAST * len(values)) :].mean()) if len(values) else None


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """The runs of one condition at one rate, in the order of their seeds."""

    condition: str
    lr: float
    outcomes: tuple[Outcome, ...]

    @property
    def watched(self) -> tuple[list[int | None], list[int]]:
        """Of each run its onset, None where there was none, and the steps that it did: see `survival`."""
        return [outcome.onset for outcome in self.outcomes], [outcome.run.steps for outcome in self.outcomes]

    def lived(self, horizon: int) -> float | None:
        """Mean number of the first `horizon` steps before the onset; None where no run that lives was watched so long.

        The area below Kaplan and Meier's curve: see `survival.restricted_mean`.
        """
        known = all(onset is not None for onset in self.watched[0]) or max(self.watched[1]) >= horizon
        return restricted_mean(*self.watched, horizon) if known else None

    @property
    def worst(self) -> float | None:
        """The smallest S over seeds; None unless all have one."""
        each = [outcome.run.stability for outcome in self.outcomes]
        known = [s for s in each if s is not None]
        return min(known) if known and len(known) == len(each) else None

    def mean(self, name: str) -> float:
        """Mean over seeds of the last `quality/name`; NaN where a run has none."""
        each = [outcome.quality(name) for outcome in self.outcomes]
        return sum(math.nan if q is None else q for q in each) / len(each)


Column = tuple[str, Callable[[Cell], str]]
"""A heading and what stands below it."""


def read(folder: StudyFolder) -> list[Outcome]:
    """The runs of a grid's study so far, by condition, rate and seed.

    Raises:
        KeyError: a record is of no point of the study.
    """
    names = {config: condition_of(called, config) for config, called in folder.study.names().items()}
    order = list(dict.fromkeys(names.values()))
    runs = [Run.read(record) for record in folder.records() if not record.confirms]
    found = [Outcome(names[run.config], run) for run in runs]
    return sorted(found, key=lambda outcome: (order.index(outcome.condition), outcome.lr, outcome.seed))


def cells(outcomes: Iterable[Outcome]) -> list[Cell]:
    """Outcomes by condition and rate, in the order in which these first come."""
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.condition, outcome.lr), []).append(outcome)
    return [Cell(condition, lr, tuple(group)) for (condition, lr), group in groups.items()]


# --- words for a cell -------------------------------------------------------------------------------------------------


def verdicts(cell: Cell) -> str:
    """How many of its runs ended how, the most frequent first."""
    counts = Counter(outcome.run.kind for outcome in cell.outcomes)
    return ", ".join(f"{count} {words(kind)}" for kind, count in counts.most_common())


def onsets(cell: Cell) -> str:
    """The onset of each seed's blow-up, or that there was none."""
    return ", ".join(NOTHING if outcome.onset is None else str(outcome.onset) for outcome in cell.outcomes)


def spread(values: Iterable[float | None], form: str = ".3f") -> str:
    """Mean and, of several, standard deviation; says how many there were where not all were measured and finite."""
    each = list(values)
    finite = [v for v in each if v is not None and math.isfinite(v)]
    told = [f"{statistics.fmean(finite):{form}}"] if finite else []
    if len(finite) > 1:
        told[0] += f" ± {statistics.stdev(finite):{form}}"
    told += [f"{each.count(None)} of {len(each)} not measured"] if finite and None in each else []
    wild = Counter(str(v) for v in each if v is not None and not math.isfinite(v))
    told += [f"{name} in {count} of {len(each)}" for name, count in sorted(wild.items())]
    return "; ".join(told) or NOTHING


def quality(name: str) -> Column:
    """The column of a Dice or composite, by its name without `quality/`."""
    return name.replace("_", " "), lambda cell: spread(outcome.quality(name) for outcome in cell.outcomes)


def end(signal: str, title: str) -> Column:
    """The column of a signal's end level."""
    return title, lambda cell: spread((outcome.end(signal) for outcome in cell.outcomes), ".3g")


def lived(horizon: int) -> Column:
    """The column of the steps that runs lived, of the first `horizon`."""

    def say(cell: Cell) -> str:
        steps = cell.lived(horizon)
        return NOTHING if steps is None else f"{steps:.0f}"

    return f"steps lived of {horizon}", say


def against(control: str, all_cells: Iterable[Cell]) -> Column:
    """The column of log-rank p-values against the cell of the condition `control` at the same rate."""
    controls = {cell.lr: cell for cell in all_cells if cell.condition == control}

    def say(cell: Cell) -> str:
        if cell.lr not in controls or cell.condition == control:
            return NOTHING
        both = cell.watched, controls[cell.lr].watched
        p = log_rank(*both)
        if math.isnan(p):  # nobody was left to compare with when they did, if any
            return "at once" if any(onset is not None for onsets, _ in both for onset in onsets) else "none blew up"
        return f"{p:.3f}"

    return f"p against {control}", say


CONDITION: Column = "condition", lambda cell: cell.condition
LR: Column = "lr", lambda cell: f"{cell.lr:.2g}"
VERDICTS: Column = "verdicts", verdicts
ONSETS: Column = "onsets", onsets
WORST: Column = "S, worst", lambda cell: NOTHING if cell.worst is None else f"{cell.worst:.3f}"
SATURATED: Column = "saturation, end", lambda cell: spread((outcome.saturation for outcome in cell.outcomes), ".2f")
SPARED: Column = "steps saved", lambda cell: spread((outcome.spared for outcome in cell.outcomes), ".0%")


def measured(outcomes: Iterable[Outcome]) -> list[str]:
    """Names of the qualities that some run has: Dice, raw before running mean, translated before target; composites."""
    found = {name for outcome in outcomes for name in outcome.run.columns.names()}
    wanted = ("translated_dice", "ema_translated_dice", "target_dice", "ema_target_dice", "composite", "ema_composite")
    return [name for name in wanted if f"quality/{name}" in found]


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Told:
    """A table of words."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, title: str, grid_cells: Iterable[Cell], columns: Sequence[Column]) -> Told:
        """A row a cell."""
        heads = tuple(head for head, _ in columns)
        return cls(title, heads, tuple(tuple(say(cell) for _, say in columns) for cell in grid_cells))

    def print(self, console: Console) -> None:
        """Whole, also where it is wider than a terminal or a log."""
        table = Table(box=SIMPLE_HEAD, title=self.title, title_justify="left", padding=(0, 1, 0, 0))
        for i, head in enumerate(self.heads):
            table.add_column(head, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        wide = Console(file=console.file, width=10_000)
        wide.width = max(console.width, Measurement.get(wide, wide.options, table).maximum)
        wide.print(table)

    def write(self, path: Path) -> None:
        """As CSV, whole or not at all."""
        _write(path, [self.heads, *self.rows])


def tell(folder: StudyFolder, console: Console, told: Told, outcomes: Sequence[Outcome]) -> None:
    """Print a table, and leave it, every run's row and every run's curves in the study's folder."""
    told.write(folder.folder / "table.csv")
    write_runs(folder.folder / "runs.csv", outcomes)
    told.print(console)
    console.print(f"tables: {folder.folder / 'table.csv'}, {folder.folder / 'runs.csv'}", soft_wrap=True)
    names = {outcome.run.name: label(outcome.condition, outcome.run.config) for outcome in outcomes}
    pages = write_contact_sheets(folder.folder, [outcome.run for outcome in outcomes], names)
    console.print(f"curves: {len(pages)} pages from {pages[0]} on", soft_wrap=True)


def write_runs(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Every run as a row of CSV, with all digits; what was not measured stays empty, NaN and infinity are named."""
    names = measured(outcomes)
    heads = ("run", "condition", "lr", "seed", "verdict", "onset", "alarm", "stability", "steps", "planned")
    rows: list[Sequence[object]] = [(*heads, *names, *(f"end {signal}" for signal in ENDS), "sentence")]
    for outcome in outcomes:
        run = outcome.run
        rows.append(
            (
                *(run.name, outcome.condition, outcome.lr, outcome.seed, run.kind, outcome.onset, outcome.alarm),
                *(run.stability, run.steps, run.config.steps),
                *(outcome.quality(name) for name in names),
                *(outcome.end(signal) for signal in ENDS),
                run.verdict and run.verdict.sentence(),
            )
        )
    _write(path, rows)


def _write(path: Path, rows: Iterable[Sequence[object]]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    os.replace(partial, path)
