"""A grid asks for every condition at every rate with every seed, and each of its runs says which it is."""

from __future__ import annotations

import pytest

from equipoise.config import PUBLISHED
from equipoise.grid import Changes, Grid, condition_of, label

CONDITIONS: dict[str, Changes] = {
    "as published": {},
    "no image norm": {"net.image_norm": "none"},
    "rp, r1r2": {"loss.adversarial": "rp", "critic.penalty": "r1r2"},
}


def test_every_condition_meets_every_rate_and_seed_and_a_seed_s_runs_come_together() -> None:
    grid = Grid(run=PUBLISHED, conditions=CONDITIONS, rates=(2e-4, 2e-3), seeds=(0, 7))
    study = grid.study("grid", "What happens?")
    assert study.points == len(study.first) == 12
    assert not study.searches
    assert study.labels[:4] == (
        "as published, lr 0.0002, seed 0",
        "no image norm, lr 0.0002, seed 0",
        "rp, r1r2, lr 0.0002, seed 0",
        "as published, lr 0.002, seed 0",
    )
    assert all(called.endswith("seed 0") for called in study.labels[:6])
    assert all(called.endswith("seed 7") for called in study.labels[6:])


def test_a_point_differs_from_the_run_in_what_its_condition_rate_and_seed_say_and_in_nothing_else() -> None:
    study = Grid(run=PUBLISHED, conditions=CONDITIONS, rates=(2e-3,), seeds=(7,)).study("grid", "What happens?")
    runs = dict(zip(study.labels, (study.run.having(point) for point in study.first), strict=True))
    for name, changes in CONDITIONS.items():
        expected = PUBLISHED.having({**changes, "optim.lr": 2e-3, "seed": 7})
        assert runs[f"{name}, lr 0.002, seed 7"] == expected


def test_a_study_s_space_is_the_settings_in_which_its_points_differ() -> None:
    study = Grid(run=PUBLISHED, conditions=CONDITIONS, rates=(2e-4,), seeds=(0, 1)).study("grid", "What happens?")
    assert {path: dimension.options for path, dimension in study.space.items()} == {
        "net.image_norm": ("instance", "none"),
        "loss.adversarial": ("lsgan", "rp"),
        "critic.penalty": ("none", "r1r2"),
        "optim.lr": (2e-4,),
        "seed": (0, 1),
    }


def test_without_rates_conditions_have_their_own() -> None:
    grid = Grid(run=PUBLISHED, conditions={"slow": {"optim.lr": 1e-5}, "usual": {}})
    assert grid.study("grid", "What happens?").labels == ("slow, lr 1e-05, seed 0", "usual, lr 0.0002, seed 0")


@pytest.mark.parametrize("condition", ["as published", "experiment 3, continued", "a, lr 1, seed 2", ""])
def test_a_label_leads_back_to_its_condition(condition: str) -> None:
    run = PUBLISHED.having({"optim.lr": 6.3e-4, "seed": 12})
    assert condition_of(label(condition, run), run) == condition


def test_a_label_of_another_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no label of a run at lr 0\.0002 with seed 0"):
        condition_of("as published, lr 0.002, seed 0", PUBLISHED)


@pytest.mark.parametrize(
    ("conditions", "rates", "seeds", "rule"),
    [
        ({}, (), (0,), "at least one condition and one seed"),
        (CONDITIONS, (), (), "at least one condition and one seed"),
        ({"fast": {"optim.lr": 2e-3}}, (2e-4,), (0,), "'fast' sets optim.lr, which the grid varies"),
        ({"lucky": {"seed": 7}}, (), (0,), "'lucky' sets seed, which the grid varies"),
    ],
)
def test_a_grid_that_asks_for_nothing_or_for_two_things_at_once_is_refused(
    conditions: dict[str, Changes], rates: tuple[float, ...], seeds: tuple[int, ...], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        Grid(run=PUBLISHED, conditions=conditions, rates=rates, seeds=seeds)


def test_two_conditions_that_are_the_same_run_are_refused() -> None:
    grid = Grid(run=PUBLISHED, conditions={"as published": {}, "instance norm": {"net.image_norm": "instance"}})
    with pytest.raises(ValueError, match=r"'as published, .*' and 'instance norm, .*' are the same run"):
        grid.study("grid", "What happens?")


def test_a_condition_that_no_run_can_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"critic\.penalty = 'none': must be 'r1r2'"):
        Grid(run=PUBLISHED, conditions={"bare rp": {"loss.adversarial": "rp"}}).study("grid", "What happens?")
