"""What judging a step costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from measure import Result, paired

from equipoise.batches import Cohort
from equipoise.config import PUBLISHED
from equipoise.heads import synthetic_store
from equipoise.monitor import Monitor, watched
from equipoise.ranks import Ranks
from equipoise.train import Run
from slicestore.store import Store

SMALL = PUBLISHED.at("net.width", 0.125).at("batch", 4)


def monitor(scratch: Path) -> Iterator[Result]:
    """The monitor's share of a training step."""
    config = SMALL.at("steps", 20_000)
    cohort = Cohort(Store.open(synthetic_store(scratch)), config, torch.device("cpu"))
    run = Run.start(config, torch.device("cpu"), Ranks())
    rows = [run.advance(cohort.batch(config, n), n) for n in (1, 2)]
    judge = Monitor(config.monitor, config.steps, watched(config))
    block = np.tile([[float(v) for v in row.values()] for row in rows], (25, 1))

    def observe_many(blocks: int = 20) -> None:
        for number in range(blocks):
            judge.observe(number * 50 + 1, list(rows[0]), block)

    observe_many(200)  # past the warm-up, and until its windows are full

    def one_step() -> None:
        run.advance(cohort.batch(config, 3), 3)

    ours, theirs = paired(observe_many, one_step)
    share = ours / (20 * 50) / theirs
    yield Result("monitor.step_overhead", share, "of a step", "the step it judges", "64 x 64, width 1/8, blocks of 50")
