"""The main study's space and controls: what they hold, and what they keep out."""

from __future__ import annotations

import random
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from equipoise.config_base import Leaf
from equipoise.launch.options import Options
from equipoise.search import Point, coordinates, draw
from equipoise.study import Study

SWEEP = runpy.run_path(str(Path(__file__).parents[1] / "studies" / "stability_sweep.py"))
declare: Callable[[Options], Study] = SWEEP["declare"]


class Dice:
    """Draws at random, with the same points every time."""

    def __init__(self) -> None:
        self._rng = random.Random(1)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return low * (high / low) ** self._rng.random()

    def suggest_categorical(self, name: str, choices: Sequence[Leaf]) -> Any:
        return self._rng.choice(choices)


@pytest.fixture(scope="module")
def small() -> Study:
    return declare(Options())


@pytest.fixture(scope="module")
def points(small: Study) -> list[Point]:
    trial = Dice()
    return [draw(trial, small.space, small.run) for _ in range(300)]


def test_the_built_in_size_is_eight_points_of_96_steps_of_which_some_are_searched(small: Study) -> None:
    assert (small.points, small.run.steps, len(small.first)) == (8, 96, 5)
    real = declare(Options(store="cohort.zarr", workers_per_run=2, seed=3))
    assert (real.points, real.run.steps, real.run.workers, real.run.seed, real.seed) == (32, 20_000, 2, 3, 3)


@pytest.mark.parametrize(("store", "outside"), [(None, {"WGAN-GP"}), ("cohort.zarr", {"WGAN-GP", "UVCGANv2"})])
def test_the_search_learns_from_every_control_that_the_space_holds(store: str | None, outside: set[str]) -> None:
    study = declare(Options(store=store))
    placed = {
        label: coordinates(point, study.space, study.run)
        for label, point in zip(study.labels, study.first, strict=True)
    }
    assert {label for label, found in placed.items() if found is None} == outside
    published = placed["SIFA as published"]
    assert published is not None
    assert (published["optim.lr"], published["loss.cycle"], published["loss.adversarial"]) == (2e-4, 10.0, "lsgan")


def test_every_point_is_a_run_and_every_option_is_drawn(small: Study, points: list[Point]) -> None:
    runs = [small.run.having(point) for point in points]
    assert {run.loss.adversarial for run in runs} == {"lsgan", "ns", "hinge", "ra_lsgan", "rp"}
    assert {run.critic.penalty for run in runs} == {"none", "r1", "r1r2", "gp0_mix"}
    assert {run.loss.identity == 0 for run in runs} == {True, False}
    assert {run.balance.mode for run in runs} == {"static", "calibrated", "grad_ratio"}


def test_the_relativistic_pairing_game_always_has_its_penalty_and_no_momentum(points: list[Point]) -> None:
    rp = [point for point in points if point["loss.adversarial"] == "rp"]
    assert rp
    assert {(point["critic.penalty"], point["optim.beta1"]) for point in rp} == {("r1r2", 0.0)}
    assert not any("optim.beta1" in point for point in points if point not in rp)


def test_a_critic_is_quicker_than_the_others_only_where_something_holds_it(points: list[Point]) -> None:
    quick = [point for point in points if float(point["optim.lr_critic_ratio"]) > 1]
    assert quick
    for point in quick:
        assert point["critic.penalty"] != "none" or point["net.critic_norm"] in ("spectral", "both")


def test_a_penalty_s_settings_are_searched_with_it_and_weights_where_nothing_else_sets_them(
    points: list[Point],
) -> None:
    for point in points:
        assert ("critic.gamma" in point) == ("critic.penalty_every" in point) == (point["critic.penalty"] != "none")
        static = point["balance.mode"] == "static"
        for name in ("adv_image", "adv_p", "adv_p_low_ratio", "aux", "image_in_encoder"):
            assert (f"loss.{name}" in point) == static
        assert ("balance.calibration_steps" in point) == (point["balance.mode"] == "calibrated")


def test_a_penalty_s_published_weight_is_converted_to_our_sums() -> None:
    # 32 x 32 patches of 256 pixels a side: lambda |d mean / dx|^2 = gamma / 2 |d sum / dx|^2 with sum = 1024 mean.
    controls = SWEEP["controls"](256)
    assert controls["UVCGANv2"]["critic.gamma"] / 2 * 1024**2 == pytest.approx(1.0)
    assert controls["R3GAN's game"]["critic.gamma"] == pytest.approx(2 / 1024)
