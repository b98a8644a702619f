"""What a run costs beyond its training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from measure import Result, seconds

from equipoise.account import Account
from equipoise.config import PUBLISHED, RunConfig
from equipoise.heads import synthetic_store
from equipoise.launch.cluster import Share, connect, room
from equipoise.launch.ray_train import train
from equipoise.launch.ray_tune import Terms, search_points
from equipoise.search import Range
from equipoise.study import Study, StudyFolder
from slicestore.store import Store

SMALL = PUBLISHED.at("net.width", 0.125).at("batch", 4)


def run(scratch: Path) -> Iterator[Result]:
    """Seconds a run costs beyond its training: inside a study's warm worker, and as two workers of its own."""
    store = synthetic_store(scratch).absolute()
    base: RunConfig = SMALL.at("steps", 12).at("evaluations", 1).at("data.cohort", Store.open(store).fingerprint)
    study = Study(name="bench", question="?", run=base, space={"optim.lr": Range(1e-4, 1e-3)}, points=8)
    folder = StudyFolder.create(scratch / "bench", study, "bench", {})
    with connect(None):
        slots = room(Share(), 1)
        wall = seconds(lambda: search_points(folder, study, store, Terms(share=Share(), slots=slots)))
        trained = Account.of(folder.records()).seconds
        each = (wall * slots - trained) / study.points
        yield Result("run.overhead_seconds", each, "s", "its training", f"8 runs, {slots} at a time, workers kept warm")
        pair = base.at("workers", 2)
        wall = seconds(lambda: train(folder.runs / "pair", pair, store, Share()))
    trained = Account.of(r for r in folder.records() if r.name == "pair").seconds / 2
    yield Result("run.overhead_seconds.ddp", wall - trained, "s", "its training", "one run of two workers")
