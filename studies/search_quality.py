"""Does our search find the best stable settings with less than stock Ray Tune, and than chance?

    python studies/search_quality.py                        # ten minutes on one core: replays the table, trains nothing
    python studies/search_quality.py --record my.csv        # an hour on one free core: trains the table's runs anew

`search_quality.csv` holds 192 real runs of SIFA, each once: every combination of six learning rates, least squares and
hinge, instance norm or none in the images' networks and in the critics, heads of stride 8 and 2, and intensities
clipped or not; and 16 of them with a second seed. Searches replay it in virtual time, four runs at a time, each with
the real code of its searcher and scheduler: our `Ledger` on a study's folder; Ray's OptunaSearch and ASHA as Tune's
controller calls them, rungs and sampler at their defaults (rungs at looks 1 and 4 of 8, a quarter goes on) and with our
rungs (look 4, half goes on); chance, drawing with repeats or shuffling the grid. Without our alarm a run that
diverges costs all its steps and keeps its last Dice. Goals are the table's highest Dice with S of at least .9, or near
it. Every search judges 192 points; 20 seeds; medians with binomial intervals of 95 %, "never" where a goal was not
reached. A multiple of stock's computing is a ratio of medians with a bootstrap interval, in which a search that never
got there counts with all it spent: where half of stock's did not, it is an upper bound.

Finding (table: 27 November 2026, commit 8dde2ad, `--record`, two shared AMD EPYC cores, torch 2.13; replay: 28 November
2026, commit e66ead8, the same machine, nine minutes). Our search gets there in 19 of 20 seeds where stock does in 8,
at no more than .16 (.06 to .71) of its computing: as soon as chance does, and no sooner. Without its pruner it takes
two thirds of that.

Until a feasible run within 5 % of the best has ended (13 of the 192 are such), points and computing in whole runs:

                                   reached   points            whole runs          x stock's device-time   less:more
    Equipoise                      19 of 20  20 (8-29)          12.2 (4.0-17.9)     <= 0.16 (0.06-0.71)   15:4
    Equipoise, no pruner           20 of 20  10 (7-16)          8.0 (4.0-12.0)     <= 0.10 (0.05-0.51)     18:2
    stock ASHA + OptunaSearch       8 of 20  never (38-never)  never (12.5-never)  1
    stock, and our alarm            8 of 20  never (33-never)  never (10.0-never)                           6:3
    stock, our alarm and rungs     20 of 20  30 (23-34)         18.2 (13.5-21.5)    <= 0.23 (0.17-1.20)   13:7
    OptunaSearch alone             20 of 20  20 (8-28)         20.0 (8.0-28.0)     <= 0.26 (0.14-1.43)     13:7
    random                         20 of 20  12 (4-20)         12.0 (4.0-20.0)     <= 0.16 (0.08-1.00)     13:7
    random, and our alarm          20 of 20  14 (5-23)         10.0 (4.0-16.9)     <= 0.14 (0.07-0.80)     15:5
    shuffled grid, and our alarm   20 of 20  12 (6-18)          7.9 (4.0-12.7)     <= 0.11 (0.05-0.62)     16:4

Within 2 % (4 runs; points): Equipoise 142 (85-never), without pruner 41 (19-60), stock never, with our rungs never,
OptunaSearch alone 34 (24-64), random 36 (20-60), shuffled grid 22 (12-39). The very best: 3 of 20 Equipoise, 13 without
pruner, 0 stock, 10 random, all 20 shuffled. What is recommended after all points is feasible in 20 of 20 Equipoise, 8
of 20 stock, 17 of 20 random without verdicts; its Dice is .983 of the best, 1 without pruner. Until a first feasible
recommendation stock is the quickest (1.5 whole runs against 4.0), since it recommends runs that it stopped.

Why the first rung is at half: a short run's early Dice says little of its last, so that halving by it stops the best
points, and since the table gives a point the same curve again, for good. With a first rung at a quarter, as here until
then (commit before b280606), ours got there in 17 of 20 after 14.8 (7.9 to 42.8) whole runs. And of 192 points many are
the same, since TPE proposes judged points again.

What limits it: one small table, whose Dice of the same settings differs between seeds by a standard deviation of .087,
so that "the best" is in part luck that no search can foresee; 96 steps at 32 x 32, where a Dice presumably swings more
than in a run of 20 000; settings that are all choices, so that nothing can be interpolated; stock's reduction by 4 from
the first look is its default and not what an expert would set. That a pruner costs more than it saves may not hold at
the real size: it has not been run.
"""

from __future__ import annotations

import csv
import heapq
import itertools
import json
import logging
import math
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import optuna
import torch
import tyro
from optuna.distributions import CategoricalDistribution
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Printed

from equipoise import search
from equipoise.config import PUBLISHED, RunConfig
from equipoise.config_base import Leaf
from equipoise.heads import synthetic_store
from equipoise.keeping import Keeping
from equipoise.launch.ledger import Assignment, Ledger
from equipoise.launch.local import launch
from equipoise.record import Record
from equipoise.rehearsal import Look, Script, rehearse
from equipoise.search import Choice
from equipoise.study import PrunerName, Study, StudyFolder
from equipoise.train import Progress
from equipoise.verdict import Verdict
from slicestore.store import Store

GRID: Mapping[str, tuple[Leaf, ...]] = {
    "optim.lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "loss.adversarial": ("lsgan", "hinge"),
    "net.image_norm": ("instance", "none"),
    "net.critic_norm": ("instance", "none"),
    "net.head_stride": (8, 2),
    "data.percentile": (0.0, 1.0),
}
"""Every combination is a run of the table."""
SMALL: Mapping[str, Leaf] = {
    "steps": 96,
    "evaluations": 8,
    "batch": 2,
    "net.width": 0.0625,
    "balance.every": 0,
    "data.limits": "pooled",
    "optim.schedule": "linear_half",
    "optim.ema": 0.0,
    "speed.fused_adam": True,
}
"""What the table's runs change of the published settings besides."""
SIDE = 32
"""Pixels a side of a synthetic slice."""
TABLE = Path(__file__).with_suffix(".csv")
REPEATS = 16
"""Runs that are recorded with a second seed too: by them it is known how much of a Dice is luck."""
FEASIBLE = 0.9
"""The stability S that a point must reach."""
NEAR = (0.98, 0.95)
"""Shares of the best Dice that count as near it."""
SLOTS = 4
"""Runs at a time."""
SEEDS = 20
CONFIDENCE = 0.95
"""Of intervals."""
WIDTH = 140
"""Columns of what is printed."""

Key = tuple[Leaf, ...]
"""A point's values, in the order of the grid's settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line says."""

    table: Path = TABLE
    """The recorded runs to replay."""
    record: Path | None = None
    """Train every run of the grid and write them there, instead; what is there already is not trained again."""
    results: Path = Path("results/search_quality")
    """Where synthetic heads and the run at work are kept while recording."""
    seeds: int = SEEDS
    """Searches by each arm."""
    first_seed: int = 0
    """Seed of the first of them. What is tuned is tuned on seeds from 1000 on."""
    points: int | None = None
    """Points that each search may judge; by default as many as the table has."""
    slots: int = SLOTS
    """Runs at a time."""


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """A recorded run."""

    point: Key
    verdict: Verdict
    seconds: float
    """CPU seconds of its one thread, for training and evaluation."""
    looks: tuple[Look, ...]

    @property
    def dice(self) -> float:
        """At its end; may be NaN."""
        return self.looks[-1].dice

    @property
    def feasible(self) -> bool:
        """Whether it meets the constraint."""
        return search.violation(self.verdict, FEASIBLE) <= 0

    @property
    def pace(self) -> float:
        """Seconds of a step."""
        return self.seconds / self.verdict.step

    def endless(self, steps: Sequence[int]) -> tuple[Look, ...]:
        """Its looks had nothing ended it: what came last stays.

        Args:
            steps: at which a whole run is looked at.
        """
        last = self.looks[-1]
        return (*self.looks, *(last._replace(step=step) for step in steps if step > last.step))


@dataclass(frozen=True, slots=True)
class Table:
    """All runs of a grid, by their settings."""

    grid: Mapping[str, tuple[Leaf, ...]]
    rows: Mapping[Key, Row]

    @classmethod
    def of(cls, paths: Sequence[str], rows: Sequence[Row]) -> Table:
        """Some runs.

        Args:
            paths: of the settings in which they differ.
            rows: the runs.

        Raises:
            ValueError: they are no whole grid, or a run is there twice.
        """
        grid = {path: tuple(dict.fromkeys(row.point[i] for row in rows)) for i, path in enumerate(paths)}
        by_point = {row.point: row for row in rows}
        whole = math.prod(map(len, grid.values()))
        if not len(rows) == len(by_point) == whole:
            raise ValueError(f"{len(rows)} runs of {len(by_point)} points, where a whole grid has {whole}")
        return cls(grid, by_point)

    @property
    def best(self) -> float:
        """The highest Dice among feasible runs."""
        return max(row.dice for row in self.rows.values() if row.feasible)

    @property
    def steps(self) -> tuple[int, ...]:
        """At which a whole run is looked at, the last one at its end."""
        return tuple(look.step for look in max((row.looks for row in self.rows.values()), key=len))

    def near(self, row: Row, share: float) -> bool:
        """Whether a run is feasible and reaches this share of the best Dice."""
        return row.feasible and row.dice >= share * self.best


def read(path: Path = TABLE, seed: int = 0) -> list[Row]:
    """The runs of one seed in a file that `record` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(data) for data in csv.DictReader(file) if data["seed"] == str(seed)]


def _row(data: Mapping[str, str]) -> Row:
    point = tuple(next(value for value in GRID[path] if str(value) == data[path]) for path in GRID)
    kind: Any = data["verdict"]
    looks = zip(*(data[name].split() for name in ("looks", "dice", "s")), strict=True)
    return Row(
        point,
        Verdict(kind, int(data["steps"]), int(data["planned"]), float(data["stability"])),
        float(data["cpu_seconds"]),
        tuple(Look(int(step), float(dice), float(s)) for step, dice, s in looks),
    )


# --- recording it -----------------------------------------------------------------------------------------------------

MEASURED = ("verdict", "onset", "stability", "steps", "planned", "seconds", "cpu_seconds")
COURSE = ("looks", "dice", "s", "target_dice", "sentence")
"""Steps of evaluations with Dice and S so far at each; the last Dice on target slices; the verdict in words."""


def record(path: Path, results: Path) -> None:
    """Train every run of the grid, and some with a second seed, a row each; go on where a killed recording was."""
    torch.set_num_threads(1)
    store = synthetic_store(results, size=SIDE)
    heads = Store.open(store)
    base = PUBLISHED.having({**SMALL, "data.cohort": heads.fingerprint, "net.classes": heads.classes})
    points = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    random.Random(0).shuffle(points)  # so that the machine's moods fall on all settings
    runs = [(point, 0) for point in points] + [(point, 1) for point in points[:REPEATS]]
    if not path.is_file():
        _append(path, [*GRID, "seed", *MEASURED, *COURSE])
    with path.open(newline="", encoding="utf-8") as file:
        done = {tuple(data[name] for name in (*GRID, "seed")) for data in csv.DictReader(file)}
    for point, seed in runs:
        if (*map(str, point.values()), str(seed)) not in done:
            config = base.having({**point, "seed": seed})
            _append(path, [*point.values(), seed, *_trained(results / "runs" / config.fingerprint[:8], config, store)])


def _trained(folder: Path, config: RunConfig, store: Path) -> list[object]:
    """Train one run; what is told of it."""
    began = time.process_time()
    for _ in launch(folder, config, store):
        pass
    cpu_seconds = time.process_time() - began
    record = Record(folder)
    verdict, rows = record.verdict, record.rows()
    assert verdict is not None
    looks = [row for row in rows if "quality/translated_dice" in row]
    shutil.rmtree(folder)
    return [
        *(verdict.kind, verdict.onset, verdict.stability, verdict.step, verdict.planned),
        *(sum(row["time/block"] for row in rows), cpu_seconds),
        " ".join(f"{row['step']:.0f}" for row in looks),
        " ".join(f"{row['quality/translated_dice']:.5g}" for row in looks),
        " ".join(f"{row['divergence/stability']:.5g}" for row in looks),
        *(f"{rows[-1]['quality/target_dice']:.5g}", verdict.sentence()),
    ]


def _append(path: Path, row: Sequence[object]) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerow(row)


# --- who searches -----------------------------------------------------------------------------------------------------


class Arm(Protocol):
    """A way of searching."""

    def ask(self) -> tuple[int, Key] | None:
        """The next point, with a number to call its run by; None when it has had enough."""

    def hear(self, number: int, look: Look, ended: bool) -> bool:
        """Take note of a look; whether to stop the run. One that has `ended` is at its last."""

    def close(self, number: int) -> None:
        """Take note that a run is over, by itself or because it was stopped."""

    def best(self) -> Row | None:
        """What it would recommend now."""


class Ours:
    """Our ledger, its sampler, its pruner and its choice, on a study's real folder."""

    def __init__(
        self,
        table: Table,
        seed: int,
        points: int,
        folder: Path,
        *,
        pruner: PrunerName = "asha",
        run: RunConfig | None = None,
    ) -> None:
        """Declare the study.

        Args:
            table: what is searched.
            seed: of the search.
            points: that it may judge.
            folder: an empty one, for the study.
            pruner: what stops runs that fall behind.
            run: that points depart from; that of the recording by default.
        """
        self._table = table
        study = Study(
            name="replay",
            question="Which settings are best?",
            run=(run or PUBLISHED.having(SMALL)).at("steps", table.steps[-1]),
            space={path: Choice(values) for path, values in table.grid.items()},
            feasible=FEASIBLE,
            points=points,
            seed=seed,
            pruner=pruner,
        )
        self._folder = StudyFolder.create(folder, study, "replay", {})
        self._ledger = Ledger(self._folder, study)
        self._runs: dict[int, tuple[Assignment, Iterator[Progress]]] = {}
        self._rows: dict[str, Row] = {}

    def ask(self) -> tuple[int, Key] | None:
        """See `Arm`."""
        given = self._ledger.ask()
        if given is None:
            return None
        leaves = given.config.flat()
        row = self._rows[given.name] = self._table.rows[tuple(leaves[path] for path in self._table.grid)]
        script = Script(looks=row.looks, verdict=row.verdict, step_seconds=row.pace)
        folder = self._folder.runs / given.name
        folder.mkdir()  # begun already, so that git is not asked thousands of times for the state of the sources
        (folder / "config.json").write_text(json.dumps(given.config.to_dict()))
        played = rehearse(folder, given.config, None, keeping=Keeping(), book=lambda _: script)
        self._runs[given.number] = given, played
        return given.number, row.point

    def hear(self, number: int, look: Look, ended: bool) -> bool:
        """See `Arm`."""
        given, played = self._runs[number]
        next(played)
        return not ended and self._ledger.hear(given, look.step, look.dice, look.stability)

    def close(self, number: int) -> None:
        """See `Arm`."""
        given, played = self._runs.pop(number)
        played.close()  # type: ignore[attr-defined]  # a generator, which lets go of the record
        self._ledger.close(given)

    def best(self) -> Row | None:
        """See `Arm`."""
        name = self._ledger.best()
        return None if name is None else self._rows[name]


class Stock:
    """Ray Tune's own OptunaSearch and, if wanted, ASHA, called as its controller calls them. They see Dice alone."""

    def __init__(self, table: Table, seed: int, points: int, scheduler: ASHAScheduler | None) -> None:
        """Args: what is searched, the search's seed, points that it may judge, and the scheduler."""
        self._table, self._left, self._scheduler = table, points, scheduler
        space: Any = {path: CategoricalDistribution(values) for path, values in table.grid.items()}
        self._searcher = OptunaSearch(space, metric="dice", mode="max", seed=seed)
        self._rows: dict[int, Row] = {}
        self._last: dict[int, dict[str, Any]] = {}

    def ask(self) -> tuple[int, Key] | None:
        """See `Arm`."""
        if not self._left:
            return None
        self._left -= 1
        number = len(self._rows)
        params = self._searcher.suggest(str(number))
        assert params is not None
        row = self._rows[number] = self._table.rows[tuple(params[path] for path in self._table.grid)]
        if self._scheduler is not None:
            self._scheduler.on_trial_add(NOBODY, _trial(number))
        return number, row.point

    def hear(self, number: int, look: Look, ended: bool) -> bool:
        """See `Arm`."""
        before = self._last.get(number, {"training_iteration": 0})["training_iteration"]
        result = self._last[number] = {"training_iteration": before + 1, "dice": look.dice}
        action = TrialScheduler.CONTINUE
        if self._scheduler is not None:
            action = self._scheduler.on_trial_result(NOBODY, _trial(number), result)
        if action == TrialScheduler.STOP:
            return True
        self._searcher.on_trial_result(str(number), result)
        return False

    def close(self, number: int) -> None:
        """See `Arm`."""
        result = self._last[number]
        if self._scheduler is not None:
            self._scheduler.on_trial_complete(NOBODY, _trial(number), result)
        self._searcher.on_trial_complete(str(number), result)

    def best(self) -> Row | None:
        """See `Arm`; as `ResultGrid.get_best_result` does by default: the highest of all runs' last values."""
        last = {number: result["dice"] for number, result in self._last.items() if math.isfinite(result["dice"])}
        return self._rows[max(last, key=last.__getitem__)] if last else None


NOBODY: Any = None
"""Tune's controller, whom ASHA never asks anything."""


def _trial(number: int) -> Any:
    """All that it asks of Tune's trial."""
    return SimpleNamespace(trial_id=str(number))


class Chance:
    """Points drawn at random, none ever stopped."""

    def __init__(self, table: Table, seed: int, points: int, *, again: bool = True, judged: bool = True) -> None:
        """Set out.

        Args:
            table: what is searched.
            seed: of the draws.
            points: that it may judge.
            again: whether a point may be drawn again; else the grid is shuffled.
            judged: whether it chooses by verdicts and S too, and not by Dice alone.
        """
        rng, keys = random.Random(seed), list(table.rows)
        drawn = rng.choices(keys, k=points) if again else rng.sample(keys, min(points, len(keys)))
        self._table, self._points, self._judged = table, iter(enumerate(drawn)), judged
        self._rows: dict[int, Row] = {}
        self._done: list[Row] = []

    def ask(self) -> tuple[int, Key] | None:
        """See `Arm`."""
        asked = next(self._points, None)
        if asked is not None:
            self._rows[asked[0]] = self._table.rows[asked[1]]
        return asked

    def hear(self, _number: int, _look: Look, _ended: bool) -> bool:
        """See `Arm`."""
        return False

    def close(self, number: int) -> None:
        """See `Arm`."""
        self._done.append(self._rows.pop(number))

    def best(self) -> Row | None:
        """See `Arm`."""
        if self._judged:
            return max(self._done, key=lambda row: search.rank(row.verdict, row.dice, FEASIBLE), default=None)
        return max((row for row in self._done if math.isfinite(row.dice)), key=lambda row: row.dice, default=None)


@dataclass(frozen=True, slots=True)
class Way:
    """An arm by its name."""

    start: Callable[[Table, int, int, Path], Arm]
    """From a table, a seed, a number of points and an empty folder."""
    alarm: bool = True
    """Whether the monitor ends what diverges. Where not, such a run costs all its steps and keeps its last Dice."""


def asha(table: Table, grace: int = 1, factor: int = 4) -> ASHAScheduler:
    """Tune's ASHA over a run's looks; rungs are its defaults."""
    return ASHAScheduler(metric="dice", mode="max", max_t=len(table.steps), grace_period=grace, reduction_factor=factor)


OURS, STOCK = "Equipoise", "stock ASHA + OptunaSearch"
WAYS: Mapping[str, Way] = {
    OURS: Way(Ours),
    "Equipoise, no pruner": Way(lambda table, seed, points, folder: Ours(table, seed, points, folder, pruner="none")),
    STOCK: Way(lambda table, seed, points, _: Stock(table, seed, points, asha(table)), alarm=False),
    "stock, and our alarm": Way(lambda table, seed, points, _: Stock(table, seed, points, asha(table))),
    "stock, our alarm and rungs": Way(lambda table, seed, points, _: Stock(table, seed, points, asha(table, 4, 2))),
    "OptunaSearch alone": Way(lambda table, seed, points, _: Stock(table, seed, points, None), alarm=False),
    "random": Way(lambda table, seed, points, _: Chance(table, seed, points, judged=False), alarm=False),
    "random, and our alarm": Way(lambda table, seed, points, _: Chance(table, seed, points)),
    "shuffled grid, and our alarm": Way(lambda table, seed, points, _: Chance(table, seed, points, again=False)),
}


# --- virtual time -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Job:
    """A run at work."""

    number: int
    row: Row
    begun: int
    """Time: steps that a slot which never idles has done since the search began."""
    looks: Sequence[Look]
    seen: int = 0
    """Looks that are behind it."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that is over."""

    row: Row
    begun: int
    ended: int
    whole: bool
    """Whether it ended by itself, and was not stopped."""
    best: Row | None
    """What the arm recommended then."""


class Cost(NamedTuple):
    """What a search has used."""

    points: float
    """That it had given out."""
    steps: float
    seconds: float
    """At the runs' own pace."""


NEVER = Cost(math.inf, math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Trace:
    """A search, run by run, in the order in which they ended."""

    runs: tuple[Ended, ...]

    def spent(self, until: float = math.inf) -> Cost:
        """What all slots have used by some time."""
        begun = [run for run in self.runs if run.begun < until]
        steps = [min(run.ended, until) - run.begun for run in begun]
        return Cost(len(begun), sum(steps), sum(n * run.row.pace for n, run in zip(steps, begun, strict=True)))

    def until(self, reached: Callable[[Ended], bool]) -> Cost:
        """What was used until a goal was reached; infinite where it never was."""
        return next((self.spent(run.ended) for run in self.runs if reached(run)), NEVER)


def play(arm: Arm, table: Table, *, alarm: bool = True, slots: int = SLOTS) -> Trace:
    """Let an arm search a table, with runs that take no time but their steps.

    Args:
        arm: who searches.
        table: how runs go.
        alarm: whether what diverges is ended where it was.
        slots: runs at a time.
    """
    queue: list[tuple[int, int, Job]] = []
    ended: list[Ended] = []

    def begin(now: int) -> None:
        if asked := arm.ask():
            number, point = asked
            row = table.rows[point]
            job = Job(number, row, now, row.looks if alarm else row.endless(table.steps))
            heapq.heappush(queue, (now + job.looks[0].step, number, job))

    for _ in range(slots):
        begin(0)
    while queue:
        now, number, job = heapq.heappop(queue)
        look = job.looks[job.seen]
        job.seen += 1
        last = job.seen == len(job.looks)
        stopped = arm.hear(number, look, last)
        if last or stopped:
            arm.close(number)
            ended.append(Ended(job.row, job.begun, now, last, arm.best()))
            begin(now)
        else:
            heapq.heappush(queue, (job.begun + job.looks[job.seen].step, number, job))
    return Trace(tuple(ended))


# --- what it came to --------------------------------------------------------------------------------------------------

Goal = Callable[[Table, Ended], bool]
GOALS: Mapping[str, Goal] = {
    "a run of the best feasible Dice has ended": lambda table, run: run.whole and table.near(run.row, 1.0),
    "a feasible run within 2 % of it has ended": lambda table, run: run.whole and table.near(run.row, NEAR[0]),
    "a feasible run within 5 % of it has ended": lambda table, run: run.whole and table.near(run.row, NEAR[1]),
    "what it recommends is feasible and within 5 %": lambda table, run: (
        run.best is not None and table.near(run.best, NEAR[1])
    ),
    "what it recommends is feasible": lambda _, run: run.best is not None and run.best.feasible,
}
"""What is waited for. The first three are hindsight: who searches need not know."""
NEARLY = "a feasible run within 5 % of it has ended"
"""The goal by which computing is compared in a word: 2 % are less than a seed makes of the same settings."""


class Interval(NamedTuple):
    """A number and where it lies with a probability of `CONFIDENCE`."""

    middle: float
    low: float
    high: float

    def words(self, form: str) -> str:
        """As `3 (2-5)`; what is infinite was not seen to end."""
        each = ["never" if math.isinf(value) else f"{value:{form}}" for value in self]
        return f"{each[0]} ({each[1]}-{each[2]})"


def median(values: Sequence[float]) -> Interval:
    """The median, and between which ranks it lies whatever the distribution: by the binomial of a fair coin.

    Infinite values are late, and no more need be known of them. Fewer than six values have no such interval: theirs
    goes from the smallest to the largest.
    """
    ranked, n = sorted(values), len(values)
    middle = ranked[(n - 1) // 2], ranked[n // 2]
    outside = [sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range(n // 2)]
    cut = max(0, sum(2 * share <= 1 - CONFIDENCE for share in outside) - 1)
    return Interval(math.inf if math.isinf(middle[1]) else sum(middle) / 2, ranked[cut], ranked[n - 1 - cut])


def ratio(ours: Sequence[float], theirs: Sequence[float], draws: int = 2000) -> Interval:
    """Of two medians, seeds kept in pairs; the interval is a bootstrap's."""
    rng, pairs = random.Random(0), list(zip(ours, theirs, strict=True))
    found = []
    for _ in range(draws):
        one, other = zip(*rng.choices(pairs, k=len(pairs)), strict=True)
        found.append(statistics.median(one) / statistics.median(other))
    found.sort()
    edge = round((1 - CONFIDENCE) / 2 * draws)
    return Interval(statistics.median(ours) / statistics.median(theirs), found[edge], found[-1 - edge])


@dataclass(frozen=True, slots=True)
class Found:
    """What searches of each way were, seed by seed."""

    table: Table
    traces: Mapping[str, Sequence[Trace]]

    def costs(self, way: str, goal: str) -> list[Cost]:
        """Until a goal was reached; infinite where it was not."""
        reached = GOALS[goal]
        return [trace.until(lambda run: reached(self.table, run)) for trace in self.traces[way]]

    def seconds(self, way: str, goal: str) -> list[float]:
        """The same in seconds; where a goal was not reached, all that was spent: it would have taken more."""
        costs = zip(self.costs(way, goal), self.traces[way], strict=True)
        return [min(cost.seconds, trace.spent().seconds) for cost, trace in costs]

    def against(self, way: str, goal: str, other: str = STOCK) -> Interval:
        """A way's seconds as a multiple of another's: at most that, where the other did not always get there."""
        return ratio(self.seconds(way, goal), self.seconds(other, goal))

    def cheaper(self, way: str, goal: str, other: str = STOCK) -> tuple[int, int]:
        """In how many seeds it took less than the other, and in how many more; the rest are ties."""
        pairs = list(zip(self.costs(way, goal), self.costs(other, goal), strict=True))
        return sum(a.seconds < b.seconds for a, b in pairs), sum(a.seconds > b.seconds for a, b in pairs)


def compare(
    table: Table,
    seeds: Sequence[int],
    *,
    points: int | None = None,
    slots: int = SLOTS,
    ways: Sequence[str] = tuple(WAYS),
    say: Callable[[str], None] = lambda _: None,
) -> Found:
    """Let each way search once a seed.

    Args:
        table: what is searched.
        seeds: of the searches.
        points: that each may judge; as many as the table has by default.
        slots: runs at a time.
        ways: who searches, by the names in `WAYS`.
        say: is told what was done.
    """
    logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)  # Optuna refuses NaN, and Ray warns each time
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    traces: dict[str, list[Trace]] = {}
    for name in ways:
        began, way = time.monotonic(), WAYS[name]
        traces[name] = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as scratch:
                arm = way.start(table, seed, points or len(table.rows), Path(scratch))
                traces[name].append(play(arm, table, alarm=way.alarm, slots=slots))
        say(f"{name}: {len(seeds)} searches in {time.monotonic() - began:.0f} s")
    return Found(table, traces)


def cost_vs_stock(seeds: int = SEEDS, goal: str = NEARLY) -> Interval:
    """Device-seconds of our search to a goal as a multiple of stock Ray's, for the table of benchmarks.

    Stock searches that never get there count with all that they spent: the true ratio is smaller.
    """
    found = compare(Table.of(tuple(GRID), read()), range(seeds), ways=(OURS, STOCK))
    return found.against(OURS, goal)


def told(found: Found, goal: str) -> Printed:
    """What each way took to reach a goal."""
    heads = ("", "reached", "points", "whole runs' worth", "device-minutes", "x stock's", "less:more")
    printed = Printed(*heads, title="until " + goal, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    whole = found.table.steps[-1]
    for way, traces in found.traces.items():
        costs = found.costs(way, goal)
        printed.add_row(
            way,
            f"{sum(cost != NEVER for cost in costs)} of {len(traces)}",
            median([cost.points for cost in costs]).words(".0f"),
            median([cost.steps / whole for cost in costs]).words(".1f"),
            median([cost.seconds / 60 for cost in costs]).words(".1f"),
            against(found, way, goal),
            ":".join(map(str, found.cheaper(way, goal))),
        )
    return printed


def against(found: Found, way: str, goal: str) -> str:
    """A way's computing as a multiple of stock's, in words; nothing where most of its searches did not get there."""
    own, stock = (median([cost.seconds for cost in found.costs(name, goal)]).middle for name in (way, STOCK))
    if math.isinf(own) or way == STOCK:
        return "-"
    return ("at most " if math.isinf(stock) else "") + found.against(way, goal).words(".2f")


def ends(found: Found) -> Printed:
    """What each way spends on its points, and recommends at the end."""
    heads = (
        "",
        "different points",
        "stopped",
        "feasible runs",
        "whole runs' worth",
        "choice feasible",
        "its Dice / best",
    )
    title = "when all points are judged"
    printed = Printed(*heads, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for way, traces in found.traces.items():
        chosen = [trace.runs[-1].best for trace in traces]
        feasible = [row for row in chosen if row is not None and row.feasible]
        printed.add_row(
            way,
            median([len({run.row.point for run in trace.runs}) for trace in traces]).words(".0f"),
            median([sum(not run.whole for run in trace.runs) for trace in traces]).words(".0f"),
            median([sum(run.whole and run.row.feasible for run in trace.runs) for trace in traces]).words(".0f"),
            median([trace.spent().steps / found.table.steps[-1] for trace in traces]).words(".0f"),
            f"{len(feasible)} of {len(chosen)}",
            median([row.dice / found.table.best for row in feasible]).words(".3f") if feasible else "-",
        )
    return printed


def described(table: Table, again: Sequence[Row]) -> Iterator[str]:
    """What is searched, and how much of it is luck.

    Args:
        table: of one seed.
        again: some of its points, run with another seed.
    """
    rows = list(table.rows.values())
    kinds = Counter(row.verdict.kind for row in rows)
    steps = sum(row.verdict.step for row in rows)
    yield f"{len(rows)} runs of at most {table.steps[-1]} steps, {steps} in all, {sum(r.seconds for r in rows):.0f} s"
    yield ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.most_common())
    feasible = [row.dice for row in rows if row.feasible]
    near = [sum(table.near(row, share) for row in rows) for share in NEAR]
    yield (
        f"{len(feasible)} reach S = {FEASIBLE}; their Dice: {min(feasible):.3f} to {table.best:.3f}, standard "
        f"deviation {statistics.stdev(feasible):.3f}; {near[0]} lie within 2 % of the best, {near[1]} within 5 %"
    )
    pairs = [(row, table.rows[row.point]) for row in again]
    both = [one.dice - other.dice for one, other in pairs if one.feasible and other.feasible]
    same = sum(one.feasible == other.feasible for one, other in pairs)
    if len(both) > 1:
        luck = math.sqrt(statistics.fmean(d**2 for d in both) / 2)
        yield (
            f"of {len(pairs)} points run with a second seed {same} are feasible or not as with the first; where both "
            f"are, a Dice has a standard deviation of {luck:.3f} between seeds"
        )


def main(options: Options) -> None:
    """Record, or replay and tell."""
    if options.record is not None:
        record(options.record, options.results)
        return
    console = Console(width=WIDTH, highlight=False)
    table = Table.of(tuple(GRID), read(options.table))
    for line in described(table, read(options.table, seed=1)):
        console.print(line)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    found = compare(table, seeds, points=options.points, slots=options.slots, say=console.print)
    for goal in GOALS:
        console.print(told(found, goal))
    console.print(ends(found))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
