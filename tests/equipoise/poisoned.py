"""Runs whose weights stop being numbers at updates that a test chooses."""

from __future__ import annotations

import itertools
import math

import pytest

from equipoise.step import Batch, Signals
from equipoise.train import Run


def poison(monkeypatch: pytest.MonkeyPatch, at: set[int]) -> list[float]:
    """Make one weight of G no number just before the so-manieth updates; returns G's rates, update by update."""
    count, update, rates = itertools.count(1), Run.update, list[float]()

    def poisoned(run: Run, batch: Batch) -> Signals:
        rates.append(run.players.optimiser("generator").param_groups[0]["lr"])
        if next(count) in at:
            next(iter(run.net.generator.parameters())).data[0, 0, 0, 0] = math.nan
        return update(run, batch)

    monkeypatch.setattr(Run, "update", poisoned)
    return rates
