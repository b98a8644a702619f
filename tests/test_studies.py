"""What studies compute themselves; that importing one does nothing is tested in `test_layout`."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from equipoise.config import PUBLISHED, VESSEL
from slicestore.geometry import Geometry
from slicestore.volume import Volume

ROOT = Path(__file__).parents[1]


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"study_{name}", ROOT / "studies" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def schedules() -> ModuleType:
    return loaded("schedules")


@pytest.fixture(scope="module")
def vessels() -> ModuleType:
    return loaded("vessels")


def result(updates: str, seed: int, rows: list[dict[str, float]]) -> dict[str, Any]:
    config = {"updates": updates, "seed": seed, "steps": 20}
    return {"config": config, "seconds": 1.0, "cpu_seconds": 1.0, "verdict": None, "rows": rows}


def test_schedules_are_compared_seed_by_seed_and_against_what_seeds_alone_do(schedules: ModuleType) -> None:
    found = schedules.compared([1.0, 3.0], [2.0, 6.0])
    assert (found.sequential, found.fused, found.difference) == (2.0, 4.0, 2.0)
    assert found.of_difference == pytest.approx(math.sqrt(2))  # of 1 and 3
    assert found.of_seeds == pytest.approx(math.sqrt((2 + 8) / 2))


def test_a_horizon_is_the_tenth_of_the_run_that_ends_there(schedules: ModuleType) -> None:
    run = result("fused", 0, [{"step": n, "loss/cycle_t": float(n)} for n in range(1, 21)])
    assert schedules.level(run, "loss/cycle_t", 0.5) == 9.5  # steps 9 and 10
    assert schedules.level(run, "loss/cycle_t", 1.0) == 19.5
    assert schedules.level(run, "loss/cycle_s", 1.0) is None
    run["rows"][9]["loss/cycle_t"] = math.nan
    assert math.isnan(schedules.level(run, "loss/cycle_t", 0.5))


def test_what_one_run_did_not_reach_is_not_compared_and_seeds_meet_their_own(schedules: ModuleType) -> None:
    def rows(level: float, last: int) -> list[dict[str, float]]:
        return [{"step": n, "loss/cycle_t": level} for n in range(1, last + 1)]

    runs = [
        result("fused", 1, rows(4.0, 20)),
        result("sequential", 0, rows(1.0, 20)),
        result("fused", 0, rows(1.5, 20)),
        result("sequential", 1, rows(3.0, 12)),
    ]
    found = schedules.compare(runs)
    assert set(found) == {("loss/cycle_t", share) for share in (0.1, 0.25, 0.5)}
    assert found["loss/cycle_t", 0.5].difference == 0.75  # of .5 and 1
    assert found["loss/cycle_t", 0.5].of_difference == pytest.approx(math.sqrt(0.125))


def test_a_thick_line_has_a_poor_dice_and_a_perfect_centreline(vessels: ModuleType) -> None:
    label, thick = np.zeros((2, 5, 20, 20), dtype=bool)
    label[2, 10, 4:16] = True
    thick[2, 9:12, 4:16] = True
    found = vessels.agreement(thick, label)
    assert found["precision"] == pytest.approx(1 / 3)
    assert found["recall"] == 1.0
    assert found["dice"] == pytest.approx(2 * 12 / (12 + 36))
    assert found["cldice"] > 0.8  # its ends are thinned away


def test_half_a_line_is_half_found(vessels: ModuleType) -> None:
    label, half, beside = np.zeros((3, 5, 20, 20), dtype=bool)
    label[2, 10, 4:16], half[2, 10, 4:10], beside[2, 14, 4:16] = True, True, True
    found = vessels.agreement(half, label)
    assert found == pytest.approx({"dice": 2 / 3, "cldice": 2 / 3, "precision": 1.0, "recall": 0.5})
    assert set(vessels.agreement(label, label).values()) == {1.0}
    assert set(vessels.agreement(beside, label).values()) == {0.0}
    assert set(vessels.agreement(np.zeros_like(label), label).values()) == {0.0}


def test_the_middle_of_a_head_stays_where_it_was(vessels: ModuleType) -> None:
    grid = Geometry((10, 8, 3), (1.0, 2.0, 5.0), (-4.5, -7.0, 3.0))
    head = Volume(np.arange(240).reshape(3, 8, 10), grid)
    cut = vessels.middle(head, 6.0)
    assert cut.geometry.size == (6, 3, 3)
    x, y, z = (
        round((a - b) / s) for a, b, s in zip(cut.geometry.origin_mm, grid.origin_mm, grid.spacing_mm, strict=True)
    )
    assert (x, y, z) == (2, 2, 0)
    assert cut.voxels[1, 2, 5] == head.voxels[1, 4, 7]
    assert vessels.middle(head, 100.0).geometry == grid


def test_every_switch_of_the_vessel_study_is_a_setting_that_can_be_made(vessels: ModuleType) -> None:
    for name, changes in {**vessels.SCREENED, "VESSEL": vessels.VESSEL}.items():
        run = PUBLISHED.having(changes)
        assert (run == PUBLISHED) == (name == "published")
        assert (run == VESSEL) == (name in ("VESSEL", "stride 2, balanced CE")), "the preset is what the study supports"
    assert set(vessels.FINALISTS) <= set(vessels.SCREENED)
