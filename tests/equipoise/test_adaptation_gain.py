"""The study of what adaptation gains: methods share all but what they are, and the gap's share is of test subjects."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import adaptation_gain
import pytest
import torch
from adaptation_gain import METHODS, Options, apart_from_data, check, differences, planned, share, spread, tell
from rich.console import Console

from equipoise.config import PUBLISHED, RunConfig
from slicestore.errors import InputError
from slicestore.store import Store


def test_every_method_is_trained_and_tested_and_the_table_has_a_row_for_each(store: Store, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    options = Options(store=str(store.path), steps=4, width=0.0625, batch=2, seeds=1, results=tmp_path)
    run = adaptation_gain.declare(options, store).at("evaluations", 1)
    jobs = planned(options, run, run.at("loss.cycle", 5.0), str(store.path))
    assert {job.method for job in jobs} == set(METHODS)
    for job in jobs:
        adaptation_gain.train(job)
    results = [json.loads(job.result.read_text()) for job in jobs]
    tested = {entry.subject for entry in store.select("target", "test")}
    assert all({one["subject"] for one in result["test"]} == tested for result in results)
    assert {r["method"]: r["config"]["loss"]["cycle"] for r in results}["SIFA, tuned"] == 5.0
    said = io.StringIO()
    tell(Console(file=said, width=200), results, run)
    assert all(method in said.getvalue() for method in METHODS)
    assert "1 test subjects" in said.getvalue()


def test_the_share_of_the_gap_is_of_means_over_seeds() -> None:
    dice = {"none": [0.2, 0.4], "SIFA": [0.5, 0.6], "supervised": [0.8, 0.8]}
    assert share(dice, "none") == "0%"
    assert share(dice, "SIFA") == "50%"  # (.55 - .3) / (.8 - .3)
    assert share(dice, "supervised") == "100%"
    assert share({**dice, "supervised": [0.1, 0.1]}, "SIFA") == "no gap"
    assert spread([0.2, 0.4]) == "0.300 +- 0.141"


def test_tuned_settings_are_taken_over_but_for_data_size_and_seed() -> None:
    found = RunConfig().having({"loss.cycle": 3.0, "steps": 50, "net.width": 0.5, "data.cohort": "other", "seed": 7})
    run = PUBLISHED.having({"steps": 20, "data.cohort": "own"})
    tuned = apart_from_data(found, run)
    assert tuned == run.at("loss.cycle", 3.0)
    assert differences(run, tuned) == "loss.cycle 3 (was 10)"
    assert differences(run, run) == "nothing"


def test_a_store_without_target_masks_is_refused(make_store: Callable[..., Store], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no target masks in train"):
        check(make_store(tmp_path, target_labels=False))
