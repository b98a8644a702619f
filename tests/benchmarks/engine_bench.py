"""What a study's engine costs: a run in it against the run alone, warm workers against cold, ten thousand runs; and
what its search spends against Ray's own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from measure import Result, seconds

from equipoise.config import PUBLISHED, RunConfig
from equipoise.heads import synthetic_store
from equipoise.launch.cluster import Share, connect
from equipoise.launch.local import launch
from equipoise.launch.ray_tune import Terms, search_points
from equipoise.search import Range
from equipoise.study import Study, StudyFolder
from slicestore.store import Store

RUNS = 10_000
"""Of the simulated study."""
SMALL = PUBLISHED.having({"net.width": 0.125, "batch": 4, "steps": 60, "evaluations": 2, "balance.every": 0})
TERMS = Terms(share=Share(), slots=1)


def engine(scratch: Path) -> Iterator[Result]:
    """Overhead, warmth and scale."""
    store = synthetic_store(scratch).absolute()
    run = SMALL.at("data.cohort", Store.open(store).fingerprint)
    with connect(None):
        yield from _overhead(scratch, store, run)
        yield from _warmth(scratch, store, run.having({"steps": 4, "evaluations": 1}))
    yield from _scale(Path("/dev/shm") if Path("/dev/shm").is_dir() else scratch)
    yield from _search()


def _overhead(scratch: Path, store: Path, run: RunConfig) -> Iterator[Result]:
    """Runs of a study in one slot, and in turns the same runs in this process: both have staged the cohort before."""
    rates = (1e-4, 2e-4, 4e-4)

    def alone(turn: int) -> None:
        for rate in rates:
            list(launch(scratch / f"alone-{turn}-{rate}", run.at("optim.lr", rate), store))

    alone(-1)
    times = []
    for turn in range(3):
        ours = seconds(lambda turn=turn: _study(scratch / f"study-{turn}", run, store, rates, TERMS))  # type: ignore[misc]
        theirs = seconds(lambda turn=turn: alone(turn))  # type: ignore[misc]
        times.append((ours, theirs))
    study, fit = (statistics.median(each) / len(rates) for each in zip(*times, strict=True))
    yield Result(
        "engine.run_overhead", study / fit, "time", "the same fit() alone",
        f"{run.steps} steps, {fit:.1f} s alone; {study - fit:.1f} s more, the first worker's start included",
    )  # fmt: skip


def _warmth(scratch: Path, store: Path, run: RunConfig) -> Iterator[Result]:
    rates = tuple(1e-4 * 1.2**n for n in range(8))
    cold, warm = (
        seconds(lambda warm=warm: _study(scratch / f"warm-{warm}", run, store, rates, replace(TERMS, warm=warm)))  # type: ignore[misc]
        for warm in (False, True)
    )
    yield Result(
        "engine.runs_per_hour_warm", cold / warm, "runs an hour", "a new process for every run",
        f"8 runs of {run.steps} steps: {8 * 3600 / warm:.0f} against {8 * 3600 / cold:.0f} an hour",
    )  # fmt: skip


def _study(folder: Path, run: RunConfig, store: Path, rates: tuple[float, ...], terms: Terms) -> None:
    points = tuple({"optim.lr": rate} for rate in rates)
    study = Study(
        name="bench", question="?", run=run, space={"optim.lr": Range(1e-5, 1e-2)}, first=points, points=len(points)
    )
    search_points(StudyFolder.create(folder, study, "bench", {}), study, store, terms)


def _scale(scratch: Path) -> Iterator[Result]:
    script = Path(__file__).with_name("simulated_study.py")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        line = [sys.executable, "-W", "ignore", str(script), f"{folder}/study", str(RUNS)]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    each = told["seconds_a_run"]
    yield Result(
        "engine.sim10k_driver_gb", told["driver_gb"], "GB", "nothing",
        f"peak memory of the driver of {told['runs']} played runs",
    )  # fmt: skip
    yield Result(
        "engine.sim10k_flatness", statistics.median(each[-3:]) / statistics.median(each[1:4]), "time a run",
        "the first runs", f"median of tenths 8-10 over 2-4; each: {' '.join(f'{s:.2f}' for s in each)} s",
    )  # fmt: skip


def _search() -> Iterator[Result]:
    """The study's own comparison, on its table of recorded runs."""
    sys.path.append(str(Path(__file__).parents[2] / "studies"))
    study = import_module("search_quality")
    found = study.cost_vs_stock()
    yield Result(
        "engine.cost_vs_stock_asha", found.middle, "device-seconds", study.STOCK,
        f"until {study.NEARLY}, {study.SEEDS} seeds: {found.words('.2f')}, an upper bound where stock never got there",
    )  # fmt: skip
