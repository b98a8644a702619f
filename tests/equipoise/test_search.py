"""Spaces, points and what a search is told of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from equipoise.config import STUDY_2022, RunConfig
from equipoise.monitor import Verdict
from equipoise.search import FLOOR, Choice, Point, Range, Space, check, coordinates, draw, rank, value, violation

SPACE: Space = {
    "optim.lr": Range(2e-5, 2e-3),
    "loss.cycle": Range(1.0, 30.0, log=False),
    "loss.adversarial": Choice(("lsgan", "hinge")),
}


class Trial:
    """Notes what it is asked for, and answers with an end of each range."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.asked.append((name, low, high, log))
        return high

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        self.asked.append((name, choices))
        return choices[-1]


class TestCheck:
    def test_a_space_of_settings_that_exist_passes(self) -> None:
        check(SPACE, RunConfig())

    @pytest.mark.parametrize("path", ["optim.lrr", "lr", "optim", "optim.lr.x", ""])
    def test_a_misspelt_path_is_found(self, path: str) -> None:
        with pytest.raises(KeyError):
            check({path: Range(1e-4, 1e-3)}, RunConfig())

    @pytest.mark.parametrize(
        "dimension",
        [
            Range(1e-3, 1e-4),
            Range(1e-3, 1e-3),
            Range(0.0, 1.0),  # no logarithm of 0
            Range(-1.0, 1.0),
            Range(math.nan, 1.0),
            Range(1e-4, math.nan),
        ],
    )
    def test_an_empty_or_impossible_range_is_found_and_named(self, dimension: Range) -> None:
        with pytest.raises(ValueError, match=r"optim\.lr"):
            check({"optim.lr": dimension}, RunConfig())

    @pytest.mark.parametrize(
        ("path", "dimension"),
        [
            ("optim.lr", Range(-1.0, 1.0, log=False)),
            ("optim.lr", Range(1e-4, math.inf)),
            ("optim.beta1", Range(0.5, 1.0, log=False)),
            ("loss.cycle", Range(-1.0, 30.0, log=False)),
            ("steps", Range(10.5, 20.5)),
            ("loss.adversarial", Range(0.1, 1.0)),
            ("loss.adversarial", Choice(("lsgan", "wgan"))),
            ("optim.lr", Choice(("fast",))),
        ],
    )
    def test_an_end_or_an_option_that_breaks_the_settings_own_rule_is_found(
        self, path: str, dimension: Range | Choice
    ) -> None:
        with pytest.raises(ValueError, match=path.split(".")[-1]):
            check({path: dimension}, RunConfig())

    def test_a_choice_of_nothing_is_found(self) -> None:
        with pytest.raises(ValueError, match="adversarial"):
            check({"loss.adversarial": Choice(())}, RunConfig())


class TestPoints:
    def test_a_draw_asks_for_every_dimension_on_its_own_scale(self) -> None:
        trial = Trial()
        assert draw(trial, SPACE) == {"optim.lr": 2e-3, "loss.cycle": 30.0, "loss.adversarial": "hinge"}
        assert trial.asked == [
            ("optim.lr", 2e-5, 2e-3, True),
            ("loss.cycle", 1.0, 30.0, False),
            ("loss.adversarial", ["lsgan", "hinge"]),
        ]

    def test_a_point_is_placed_in_a_run_and_found_there_again(self) -> None:
        point: Point = {"optim.lr": 1e-3, "loss.cycle": 5.0, "loss.adversarial": "hinge"}
        run = RunConfig().having(point)
        assert (run.optim.lr, run.loss.cycle, run.loss.adversarial) == (1e-3, 5.0, "hinge")
        assert coordinates(run, SPACE) == point
        assert run.having({}) == run

    def test_a_point_with_a_misspelt_path_is_refused(self) -> None:
        with pytest.raises(KeyError, match="lrr"):
            RunConfig().having({"optim.lrr": 1e-3})

    def test_both_ends_belong_to_the_space(self) -> None:
        for lr in (2e-5, 2e-3):
            assert coordinates(RunConfig().at("optim.lr", lr), SPACE)["optim.lr"] == lr

    @pytest.mark.parametrize(
        ("path", "outside"), [("optim.lr", 2.1e-3), ("loss.cycle", 0.5), ("loss.adversarial", "ns")]
    )
    def test_settings_outside_are_refused_and_named(self, path: str, outside: float | str) -> None:
        with pytest.raises(ValueError, match="outside the space") as error:
            coordinates(RunConfig().at(path, outside), SPACE)
        assert path in str(error.value)
        assert str(outside) in str(error.value)

    def test_the_2022_study_lies_at_the_edge_of_the_rates_that_are_searched(self) -> None:
        assert coordinates(STUDY_2022, {"optim.lr": Range(2e-5, 2e-3)}) == {"optim.lr": 2e-3}


class TestObjective:
    @staticmethod
    def verdict(kind: Any, stability: float | None = 1.0) -> Verdict:
        return Verdict(kind, 10, 10, stability)

    @pytest.mark.parametrize("kind", ["stable", "d_wins", "censored"])
    def test_a_run_that_lived_is_worth_its_dice(self, kind: str) -> None:
        assert value(self.verdict(kind), 0.7) == 0.7

    @pytest.mark.parametrize("quality", [0.7, math.nan])
    def test_a_diverged_run_is_worth_the_worst_dice_there_is_which_is_finite(self, quality: float) -> None:
        assert value(self.verdict("diverged"), quality) == FLOOR == 0.0

    def test_a_dice_that_is_no_number_is_worth_the_worst(self) -> None:
        assert value(self.verdict("stable"), math.nan) == 0.0

    @pytest.mark.parametrize(("stability", "want"), [(1.0, -0.1), (0.9, 0.0), (0.5, 0.4), (0.0, 0.9), (None, 0.9)])
    def test_the_constraint_is_met_from_the_wanted_stability_on_and_not_without_one(
        self, stability: float | None, want: float
    ) -> None:
        assert violation(self.verdict("stable", stability), 0.9) == pytest.approx(want)

    def test_feasible_points_come_before_all_others_and_those_are_weighed_by_their_stability(self) -> None:
        runs = {
            "poor but stable": (self.verdict("stable", 0.95), 0.2),
            "good and stable": (self.verdict("d_wins", 0.9), 0.6),
            "best but shaky": (self.verdict("d_wins", 0.5), 0.9),  # .45
            "good and hardly shaky": (self.verdict("stable", 0.8), 0.6),  # .48
            "diverged": (self.verdict("diverged", 0.89), 0.8),  # 0
        }
        order = sorted(runs, key=lambda name: rank(*runs[name], 0.9), reverse=True)
        assert order == [
            "good and stable",
            "poor but stable",
            "good and hardly shaky",
            "best but shaky",
            "diverged",
        ]
        assert rank(self.verdict("censored", None), 0.7, 0.9) == (False, 0.0)
