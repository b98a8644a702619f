"""Benchmarks as ratios measured side by side in one run: `make bench`, or `make bench ONLY=storage` for one family.

Prints a table and writes build/bench.json. A machine's absolute speed is noise here; only what is measured against the
same machine in the same minute is reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from equipoise.batches import Cohort
from equipoise.config import PUBLISHED, RunConfig
from equipoise.launch.cluster import Share, connect, room
from equipoise.launch.conduct import synthetic_store
from equipoise.launch.ray_train import train
from equipoise.launch.ray_tune import search_points
from equipoise.monitor import Monitor, watched
from equipoise.ranks import Ranks
from equipoise.search import Range
from equipoise.step import step
from equipoise.study import Account, Study, StudyFolder
from equipoise.train import Run
from slicestore.store import Store

REPEATS = 5
SMALL = PUBLISHED.at("net.width", 0.125).at("batch", 4)


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    ratio: float
    unit: str
    against: str
    detail: str


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def paired(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """Median wall times of two pieces of work, taken in turns."""
    times = [(seconds(ours), seconds(theirs)) for _ in range(REPEATS)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def storage(scratch: Path) -> Iterator[Result]:
    """Staging a cohort, checksums verified, against reading the same arrays from .npy files."""
    path = synthetic_store(scratch)
    arrays = [Store.open(path).stage(domain, "train") for domain in ("source", "target")]
    files = []
    for number, staged in enumerate(arrays):
        for name, array in (("image", staged.image), ("label", staged.label)):
            if array is not None:
                files.append(scratch / f"{number}-{name}.npy")
                np.save(files[-1], array)
    store = Store.open(path)
    ours, theirs = paired(
        lambda: [store.stage(d, "train") for d in ("source", "target")], lambda: [np.load(f) for f in files]
    )
    size = sum(f.stat().st_size for f in files) / 1e6
    yield Result("storage.load_vs_npy", ours / theirs, "times the time", "numpy.load", f"{size:.1f} MB, warm")


def monitor(scratch: Path) -> Iterator[Result]:
    """The monitor's share of a training step."""
    config = SMALL.at("steps", 20_000)
    cohort = Cohort(Store.open(synthetic_store(scratch)), config, torch.device("cpu"))
    run = Run.start(config, torch.device("cpu"), Ranks())
    rows = [step(run.net, run.players, run.pools, cohort.batch(config, n), config, Ranks()) for n in (1, 2)]
    judge = Monitor(config.monitor, config.steps, watched(config))
    block = np.tile([[float(v) for v in row.values()] for row in rows], (25, 1))

    def observe_many() -> None:
        for number in range(20):
            judge.observe(number * 50 + 1, list(rows[0]), block)

    def one_step() -> None:
        step(run.net, run.players, run.pools, cohort.batch(config, 3), config, Ranks())

    ours, theirs = paired(observe_many, one_step)
    share = ours / (20 * 50) / theirs
    yield Result("monitor.step_overhead", share, "of a step", "the step it judges", "64 x 64, width 1/8, blocks of 50")


def run(scratch: Path) -> Iterator[Result]:
    """Seconds a run costs beyond its training: inside a study's warm worker, and as two workers of its own."""
    store = synthetic_store(scratch).absolute()
    base: RunConfig = SMALL.at("steps", 12).at("evaluations", 1).at("data.cohort", Store.open(store).fingerprint)
    study = Study(name="bench", question="?", run=base, space={"optim.lr": Range(1e-4, 1e-3)}, points=8)
    folder = StudyFolder.create(scratch / "bench", study, "bench", {})
    with connect(None):
        slots = room(Share(), 1)
        wall = seconds(lambda: search_points(folder, study, store, Share()))
        trained = Account.of(folder.records()).seconds
        each = (wall * slots - trained) / study.points
        yield Result("run.overhead_seconds", each, "s", "its training", f"8 runs, {slots} at a time, workers kept warm")
        pair = base.at("workers", 2)
        wall = seconds(lambda: train(folder.runs / "pair", pair, store, Share()))
    trained = Account.of(r for r in folder.records() if r.name == "pair").seconds / 2
    yield Result("run.overhead_seconds.ddp", wall - trained, "s", "its training", "one run of two workers")


FAMILIES = {family.__name__: family for family in (storage, monitor, run)}


def main() -> None:
    """Run the families that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(FAMILIES))
    only = parser.parse_args().only
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as scratch:
        results = [r for name, family in FAMILIES.items() if only in (None, name) for r in family(Path(scratch))]
    table = Table("name", "ratio", "unit", "against", "detail")
    for result in results:
        table.add_row(result.name, f"{result.ratio:.3g}", result.unit, result.against, result.detail)
    Console(width=120).print(table)
    out = Path("build") / "bench.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps([asdict(r) for r in results], indent=2))


if __name__ == "__main__":
    main()
