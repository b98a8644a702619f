"""What studies compute themselves; that importing one does nothing is tested in `test_layout`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from equipoise.config import DEFECTS, PUBLISHED, STUDY_2022, VESSEL, RunConfig
from equipoise.config_base import Leaf
from equipoise.figures import Run
from equipoise.heads import Heads
from equipoise.monitor import Finding, Verdict
from equipoise.outcomes import Cell, Outcome
from equipoise.study import Study
from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.volume import Volume


def differences(one: RunConfig, other: RunConfig) -> dict[str, Leaf]:
    """What `other` sets otherwise than `one`."""
    before = one.flat()
    return {path: value for path, value in other.flat().items() if value != before[path]}


@pytest.fixture(scope="module")
def schedules() -> ModuleType:
    return import_module("schedules")


@pytest.fixture(scope="module")
def vessels() -> ModuleType:
    return import_module("vessels")


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


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def seed_defects(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return of_size(256, import_module("seed_defects"), monkeypatch)


@pytest.fixture
def seed_experiments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return of_size(256, import_module("seed_experiments"), monkeypatch)


@pytest.fixture(scope="module")
def games() -> ModuleType:
    return import_module("games")


@pytest.fixture(scope="module")
def balance() -> ModuleType:
    return import_module("balance")


def of_size(size: int, study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A study whose stores, wherever they are, have slices of so many pixels a side."""
    store = SimpleNamespace(preprocessing=SimpleNamespace(size=size))
    monkeypatch.setattr(study, "Store", SimpleNamespace(open=lambda _: store))
    return study


def runs_of(study: Study) -> dict[str, RunConfig]:
    """All runs of a study in which every one is given, by what they are called."""
    assert not study.searches
    assert len(set(study.labels)) == len(study.first) == study.points
    assert Study.from_dict(json.loads(json.dumps(study.to_dict()))).names() == study.names()
    return {called: run for run, called in study.names().items()}


def cell(condition: str, lr: float, *stabilities: float, dice: float = 0.5) -> Cell:
    """Runs that ended with these S and one Dice; those below .5 by a divergence at that share of their steps."""

    def outcome(s: float) -> Outcome:
        config = PUBLISHED.having({"steps": 100, "optim.lr": lr})
        onset = round(100 * s)
        found = (Finding("explosion", "loss/cycle_t", onset, onset + 10, 9.0, 1.0),) if s < 0.5 else ()
        verdict = Verdict("diverged" if found else "stable", onset + 10 if found else 100, 100, s, found)
        rows = [{"step": float(verdict.step), "quality/translated_dice": dice, "loss/cycle_t": 2.0}]
        return Outcome(condition, Run("run", config, verdict, rows, None))

    return Cell(condition, lr, tuple(map(outcome, stabilities)))


@pytest.mark.parametrize(
    ("name", "given", "runs", "steps"),
    [
        ("seed_defects", {}, 12 * 3, 500),
        ("seed_defects", {"full": True, "seeds": 4, "rates": (2e-3,)}, 21 * 4, 500),
        ("seed_defects", {"cures": True, "seeds": 3}, 17 * 3, 500),
        ("seed_defects", {"store": "cohort"}, 12 * 2 * 3, 40_000),
        ("seed_defects", {"store": "cohort", "full": True}, 21 * 2 * 3, 40_000),
        ("seed_defects", {"store": "cohort", "cures": True, "steps": 800}, 17 * 3, 800),
        ("games", {}, 14 * 3, 400),
        ("games", {"full": True, "rates": (1e-4,), "seeds": 2}, 52 * 2, 400),
        ("games", {"store": "cohort"}, 52 * 5 * 3, 40_000),
        ("balance", {}, 12 * 3, 500),
        ("balance", {"steps": 40}, 12 * 3, 40),
        ("balance", {"store": "cohort", "seeds": 1}, 15, 40_000),
    ],
)
def test_a_grid_has_the_runs_that_its_budget_says_and_each_of_them_can_be(
    name: str, given: dict[str, Any], runs: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(name)
    if hasattr(module, "Store"):
        of_size(256, module, monkeypatch)
    made = runs_of(module.declare(module.Options(**given)))
    assert len(made) == runs
    assert {run.steps for run in made.values()} == {steps}
    assert {run.batch for run in made.values()} == {4}
    assert {run.pool for run in made.values()} == {50}
    assert {run.net.width for run in made.values()} == {1.0 if "store" in given else 0.25}


def test_a_defect_alone_changes_what_it_says_and_its_frame_takes_the_same_share_of_smaller_slices(
    seed_defects: ModuleType,
) -> None:
    for side, store, frame in ((32, None, 8), (256, "cohort", 64)):
        made = runs_of(seed_defects.declare(seed_defects.Options(store=store, seeds=1)))
        for rate in ("0.0002", "0.002"):
            control = made[f"as published, lr {rate}, seed 0"]
            assert differences(PUBLISHED, control).get("optim.lr", 2e-4) == float(rate)
            alone = {name: changes for name, changes in DEFECTS.items() if name != "tenfold rate"}
            for name, changes in {**alone, "grey frame": {"data.frame": frame}}.items():
                assert differences(control, made[f"{name}, lr {rate}, seed 0"]) == changes, (side, name)


def test_all_defects_together_are_those_that_go_together_and_all_but_one_lacks_that_one(
    seed_defects: ModuleType,
) -> None:
    made = runs_of(seed_defects.declare(seed_defects.Options(full=True, seeds=1, store="cohort")))
    control, together = (made[f"{name}, lr 0.002, seed 0"] for name in ("as published", "all together"))
    assert differences(control, together) == {
        "net.image_norm": "none",
        "net.critic_norm": "none",
        "net.batch_statistics": "stale",
        "net.initial": "glorot",
        "data.frame": 64,
        "data.limits": "pooled",
        "data.split": "slice",
    }
    fewer = {name: run for name, run in made.items() if name.startswith("all but ") and "lr 0.002" in name}
    assert len(fewer) == 6
    for name, run in fewer.items():
        defect = name.removeprefix("all but ").removesuffix(", lr 0.002, seed 0")
        assert set(differences(run, together)) == set(DEFECTS[defect])
    fixed = made["all, fixed batch norm, lr 0.002, seed 0"]
    assert differences(together, fixed) == {"net.batch_statistics": "fixed"}
    halves = [made[f"no instance norm in {where}, lr 0.002, seed 0"] for where in ("images", "critics")]
    assert differences(control, halves[0]) | differences(control, halves[1]) == DEFECTS["no instance norm"]


def test_a_cure_is_added_to_the_two_defects_that_fail_at_once_at_their_rate(seed_defects: ModuleType) -> None:
    study = seed_defects.declare(seed_defects.Options(cures=True, seeds=1))
    made = runs_of(study)
    assert study.name == "seed_cures"
    blown_up = made["none, lr 0.002, seed 0"]
    two = "no instance norm, pooled limits, lr 0.002, seed 0"
    assert blown_up == runs_of(seed_defects.declare(seed_defects.Options(seeds=1)))[two]
    for name, cure in seed_defects.CURES.items():
        assert differences(blown_up, made[f"{name}, lr 0.002, seed 0"]) == cure


def test_the_experiments_are_the_2022_study_with_its_port_s_defects(seed_experiments: ModuleType) -> None:
    options = seed_experiments.Options(store="cohort", seeds=1)
    made = runs_of(seed_experiments.declare("vessel", options)) | runs_of(seed_experiments.declare("brain", options))
    ported = [DEFECTS[name] for name in seed_experiments.PORTED]
    seed = STUDY_2022.having({path: value for changes in ported for path, value in changes.items()})
    horizon = {"monitor.horizon_steps": 10_000}
    assert differences(seed, made["experiment 1, lr 0.002, seed 0"]) == horizon
    assert differences(seed, made["experiment 2, lr 0.002, seed 0"]) == horizon
    shorter = {**horizon, "steps": 10_000, "optim.lr": 1e-4}
    assert differences(seed, made["experiment 3, lr 0.0001, seed 0"]) == shorter
    assert differences(seed, made["experiment 3, continued, lr 0.0001, seed 0"]) == {**horizon, "optim.lr": 1e-4}
    assert differences(PUBLISHED, made["as published, lr 0.0002, seed 0"]) == {**horizon, "steps": 40_000, "batch": 4}
    assert seed.loss.segmentation == 1.0


def test_built_in_experiments_keep_their_ratio_of_steps_and_what_differs_between_them(
    seed_experiments: ModuleType,
) -> None:
    options = seed_experiments.Options()
    vessel, brain = (runs_of(seed_experiments.declare(mask, options)) for mask in ("vessel", "brain"))
    assert (len(vessel), len(brain)) == (6, 12)
    steps = {name.split(", lr")[0]: run.steps for name, run in (vessel | brain).items()}
    assert steps == {
        "experiment 1": 600,
        "experiment 2": 600,
        "experiment 3": 150,
        "experiment 3, continued": 600,
        "as published": 600,
    }
    assert {run.monitor.horizon_steps for run in (vessel | brain).values()} == {150}
    assert vessel["experiment 1, lr 0.002, seed 0"].data.frame == 8


def test_experiments_are_a_study_a_mask_and_resuming_begins_what_had_not_begun(
    seed_experiments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Heads, bool]] = []

    def conduct(declare: Any, options: Any, *, tell: Any, heads: Heads) -> None:
        done.append((options.name or declare(options).name, heads, options.resume))

    monkeypatch.setattr(seed_experiments.conduct, "conduct", conduct)
    (tmp_path / "seed_experiments_vessel").mkdir()
    (tmp_path / "seed_experiments_vessel" / "study.json").touch()
    both = [("seed_experiments_vessel", Heads(32, "vessel")), ("seed_experiments_brain", Heads(32, "brain"))]
    seed_experiments.main(seed_experiments.Options(results=tmp_path))
    assert done == [(name, heads, False) for name, heads in both]
    done.clear()
    seed_experiments.main(seed_experiments.Options(results=tmp_path, resume=True))
    assert done == [(*both[0], True), (*both[1], False)]
    done.clear()
    seed_experiments.main(seed_experiments.Options(results=tmp_path, name="again", mask="brain", store="brain.zarr"))
    assert done == [("again_brain", Heads(32, "brain"), False)]
    with pytest.raises(InputError, match="say which"):
        seed_experiments.main(seed_experiments.Options(results=tmp_path, store="brain.zarr"))


def test_a_game_s_condition_is_its_game_penalty_and_norm(games: ModuleType) -> None:
    made = runs_of(games.declare(games.Options(store="cohort", seeds=1, rates=(2e-4,), gamma=0.5)))
    control = made["lsgan, none, instance, lr 0.0002, seed 0"]
    assert differences(PUBLISHED, control) == {"batch": 4, "steps": 40_000}
    r1r2 = {"critic.penalty": "r1r2", "critic.gamma": 0.5e-3, "critic.penalty_every": 4}
    plain = {"critic.penalty": "gp", "critic.gamma": 10.0, "net.critic_norm": "none"}
    spectral = {"critic.penalty": "r1", "critic.penalty_every": 4, "critic.gamma": 0.5, "net.critic_norm": "spectral"}
    for name, expected in {
        "hinge, none, spectral": {"loss.adversarial": "hinge", "net.critic_norm": "spectral"},
        "ra_lsgan, r1r2, both": {"loss.adversarial": "ra_lsgan", "net.critic_norm": "both", **r1r2},
        "rp, r1r2, instance": {"loss.adversarial": "rp", "optim.beta1": 0.0, **r1r2},
        "lsgan, r1, spectral": spectral,
        "wgan_gp, gp, none": {"loss.adversarial": "wgan_gp", **plain},
    }.items():
        assert differences(control, made[f"{name}, lr 0.0002, seed 0"]) == expected


def test_the_built_in_games_are_some_of_all(games: ModuleType) -> None:
    few, all_of_them = (games.conditions(1.0, full=full) for full in (False, True))
    assert few.items() <= all_of_them.items()
    assert {changes["loss.adversarial"] for changes in few.values()} == {
        *("lsgan", "ns", "hinge", "ra_lsgan", "rp", "wgan_gp")
    }


def test_a_condition_is_as_good_as_the_largest_rate_that_every_seed_bears(games: ModuleType) -> None:
    cells = [
        cell("frail", 2e-4, 0.2, 0.1),
        cell("frail", 2e-3, 0.95, 0.3),
        cell("gap", 2e-4, 0.95, 0.89, dice=0.9),
        cell("gap", 2e-3, 0.95, 0.9, dice=0.6),
        cell("sound", 2e-4, 1.0, 1.0),
        cell("sound", 2e-3, 1.0, 1.0, dice=0.7),
        cell("usual", 2e-4, 1.0, 1.0),
        cell("usual", 2e-3, 0.2, 1.0),
    ]
    found = games.limits(cells, 0.9)
    assert [limit.condition for limit in found] == ["sound", "gap", "usual", "frail"]
    assert [limit.words() for limit in found] == [
        "at least 0.002",
        "at least 0.002, but not 0.0002",
        "0.0002",
        "none",
    ]
    told = games.table("Which?", [outcome for one in cells for outcome in one.outcomes], 0.9)
    assert told.heads == ("condition", "largest stable lr", "S at 0.0002", "S at 0.002", "translated dice")
    assert told.rows[1] == ("gap", "at least 0.002, but not 0.0002", "0.890", "0.900", "0.600 ± 0.000")
    assert told.rows[3] == ("frail", "none", "0.100", "0.300", "–")


def test_a_run_without_s_does_not_count_as_stable(games: ModuleType) -> None:
    config = PUBLISHED.having({"steps": 100})
    cut = Outcome("cut", Run("run", config, None, [{"step": 50.0}], None))
    (limit,) = games.limits([Cell("cut", 2e-4, (cut,))], 0.9)
    assert limit.words() == "none"


def test_balance_crosses_rules_with_adversarial_weights(balance: ModuleType) -> None:
    made = runs_of(balance.declare(balance.Options(store="cohort", seeds=1)))
    control = made["static, x 1, lr 0.0002, seed 0"]
    assert differences(PUBLISHED, control) == {"batch": 4, "steps": 40_000}
    for name, expected in {
        "static, x 3": {"loss.adv_image": 3.0, "loss.adv_p": 0.3, "loss.aux": 0.3},
        "calibrated, x 1": {"balance.mode": "calibrated"},
        "grad_ratio, all at 1": {"balance.mode": "grad_ratio", "loss.adv_p": 1.0, "loss.aux": 1.0},
    }.items():
        assert differences(control, made[f"{name}, lr 0.0002, seed 0"]) == pytest.approx(expected)
    small = runs_of(balance.declare(balance.Options(seeds=1)))
    calibrated = small["calibrated, x 1, lr 0.0002, seed 0"].balance
    assert (calibrated.every, calibrated.calibration_steps) == (25, 50)


def test_tables_of_defects_compare_with_the_control_and_those_of_experiments_need_none(
    seed_defects: ModuleType, balance: ModuleType
) -> None:
    cells = [cell("as published", 2e-3, 1.0, 1.0), cell("glorot", 2e-3, 0.2, 0.4)]
    heads, says = zip(*seed_defects.columns(cells, "as published"), strict=True)
    assert heads == (
        *("condition", "lr", "verdicts", "onsets", "steps lived of 100", "p against as published", "S, worst"),
        *("cycle t, end", "saturation, end", "steps saved", "translated dice"),
    )
    told = [say(cells[1]) for say in says]
    # At 20: 2 + 2 at risk, 1/2 expected, variance 1/4. At 40: 1 + 2 at risk, 1/3 expected, variance 2/9.
    p = math.erfc((2 - 5 / 6) / math.sqrt(1 / 4 + 2 / 9) / math.sqrt(2))
    assert told == [
        *("glorot", "0.002", "2 diverged", "20, 40", "30", f"{p:.3f}", "0.200"),
        *("2 ± 0", "–", "60% ± 14%", "0.500 ± 0.000"),
    ]
    named: Sequence[str] = [head for head, _ in balance.columns(cells[0].outcomes)]
    assert {"evenness, G", "evenness, U", "evenness, E"} <= set(named)
