"""Spaces, points and what a search is told of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest

from equipoise import search
from equipoise.config import PUBLISHED, STUDY_2022, RunConfig
from equipoise.config_base import Leaf
from equipoise.monitor import Verdict
from equipoise.search import (
    FLOOR,
    Choice,
    Dimension,
    Fixed,
    ObjectiveName,
    Point,
    Range,
    Space,
    called,
    check,
    coordinates,
    draw,
    parsed,
    plain,
    rank,
    value,
    violation,
)

SPACE: Space = {
    "optim.lr": Range(2e-5, 2e-3),
    "loss.cycle": Range(1.0, 30.0, log=False),
    "loss.adversarial": Choice(("lsgan", "hinge")),
}


GAMES: Space = {
    "loss.adversarial": Choice(("lsgan", "ns", "rp")),
    "optim.beta1": Fixed(0.0, when={"loss.adversarial": ("rp",)}),
    "critic.penalty": (Fixed("r1r2", when={"loss.adversarial": ("rp",)}), Choice(("none", "r1"))),
    "critic.gamma": Range(0.01, 100.0, when={"critic.penalty": ("r1", "r1r2")}),
    "critic.penalty_every": Choice((1, 4, 16), when={"critic.penalty": ("r1", "r1r2")}),
    "optim.lr_critic_ratio": (
        Range(0.1, 4.0, when={"critic.penalty": ("r1", "r1r2")}),
        Range(0.1, 1.0),
    ),
}
"""Where a choice decides what else is searched, and what follows."""


class Trial:
    """Notes what it is asked for, and answers with the upper end, the last option, or what it was told to."""

    def __init__(self, **told: Leaf) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.told = told

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.asked.append((name, low, high, log))
        return high

    def suggest_categorical(self, name: str, choices: Sequence[Leaf]) -> Leaf:
        self.asked.append((name, choices))
        return self.told.get(name.rpartition(".")[2], choices[-1])

    @property
    def names(self) -> list[str]:
        """What it was asked for."""
        return [name for name, *_ in self.asked]


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

    @pytest.mark.parametrize("options", [(), "lsgan", ("lsgan", "lsgan")])
    def test_a_choice_of_nothing_of_letters_or_twice_of_the_same_is_found(self, options: Sequence[str]) -> None:
        with pytest.raises(ValueError, match=r"loss\.adversarial: a choice takes a tuple of different options"):
            check({"loss.adversarial": Choice(options)}, RunConfig())

    def test_a_value_for_off_within_the_range_is_found(self) -> None:
        with pytest.raises(ValueError, match=r"loss\.identity: off \(0\.5\)"):
            check({"loss.identity": Range(0.1, 5.0, off=0.5)}, RunConfig())

    @pytest.mark.parametrize(
        ("path", "fits", "not_of_its_type"),
        [
            ("pool", Choice((0, 4)), Choice((0, 4.0))),
            ("loss.dice", Choice((0.5, 1)), Choice((0.5, "1"))),
            ("net.skip", Choice((True, False)), Choice((True, 0))),
            ("pool", Fixed(4), Fixed(True)),
        ],
    )
    def test_options_are_held_to_the_setting_s_type(
        self, path: str, fits: Dimension, not_of_its_type: Dimension
    ) -> None:
        check({path: fits}, RunConfig())
        with pytest.raises(ValueError, match="must be of type"):
            check({path: not_of_its_type}, RunConfig())


class TestConditions:
    def test_a_conditional_space_passes(self) -> None:
        check(GAMES, RunConfig())

    def test_a_condition_on_a_setting_that_does_not_exist_is_found(self) -> None:
        with pytest.raises(KeyError, match="penaltyy"):
            check({"critic.gamma": Range(1, 2, when={"critic.penaltyy": ("r1",)})}, RunConfig())

    def test_a_condition_must_come_before_what_depends_on_it(self) -> None:
        backwards = {path: GAMES[path] for path in reversed(GAMES)}
        with pytest.raises(ValueError, match=r"depends on critic\.penalty, which must come before it"):
            check(backwards, RunConfig())
        with pytest.raises(ValueError, match=r"depends on loss\.cycle, which must come before it"):
            check({"loss.cycle": Range(1, 2, when={"loss.cycle": (1.0,)})}, RunConfig())

    def test_a_condition_that_the_space_can_never_meet_is_found(self) -> None:
        space = {**GAMES, "optim.clip": Range(0.1, 1.0, when={"loss.adversarial": ("hinge",)})}
        with pytest.raises(ValueError, match=r"optim\.clip depends on loss\.adversarial being 'hinge', but it can be"):
            check(space, RunConfig())

    def test_of_a_setting_that_is_not_searched_a_condition_is_met_by_the_run_s_own_value_or_never(self) -> None:
        space = {"optim.clip": Range(0.1, 1.0, when={"loss.adversarial": ("ns", "hinge")})}
        check(space, RunConfig().at("loss.adversarial", "ns"))
        with pytest.raises(ValueError, match="which is 'lsgan' and not searched: it never applies"):
            check(space, RunConfig())

    def test_a_condition_on_a_value_that_the_setting_cannot_have_is_found(self) -> None:
        with pytest.raises(ValueError, match="must be one of 'lsgan'"):
            check({"optim.clip": Range(0.1, 1.0, when={"loss.adversarial": ("lsgan", "wgan")})}, RunConfig())

    @pytest.mark.parametrize("allowed", ["lsgan", ()])
    def test_a_condition_takes_a_tuple(self, allowed: Sequence[str]) -> None:
        with pytest.raises(ValueError, match=r"what loss\.adversarial must be is a tuple of values"):
            check({"optim.clip": Range(0.1, 1.0, when={"loss.adversarial": allowed})}, RunConfig())

    def test_a_case_after_one_that_always_applies_is_found(self) -> None:
        several = (Range(0.1, 1.0), Range(0.1, 4.0, when={"loss.adversarial": ("lsgan",)}))
        with pytest.raises(ValueError, match=r"optim\.lr_critic_ratio: case 1 always applies"):
            check({"optim.lr_critic_ratio": several}, RunConfig())


class TestForbiddenCombinations:
    @pytest.mark.parametrize(
        ("space", "names", "rule"),
        [
            (
                {"loss.adversarial": Choice(("lsgan", "rp")), "critic.penalty": Choice(("none", "r1r2"))},
                "loss.adversarial 'rp'",
                "critic.penalty = 'none': must be 'r1r2' where loss.adversarial is 'rp'",
            ),
            (
                {"loss.adversarial": Choice(("wgan_gp", "hinge")), "critic.penalty": Choice(("gp",))},
                "loss.adversarial 'hinge', critic.penalty 'gp'",
                "critic.penalty = 'gp': belongs to loss.adversarial 'wgan_gp'",
            ),
            (
                {"optim.lr": Range(1e-4, 1e-2), "critic.gamma": Range(0.1, 10.0)},
                "critic.gamma 0.1",
                "has no effect without a penalty",
            ),
            ({"loss.cycle": Range(-1.0, 2.0, log=False)}, "loss.cycle -1.0", "must not be negative"),
            (
                {"optim.lr": Range(1e-4, 1e-2), "monitor.horizon_steps": Choice((0, 200))},
                "monitor.horizon_steps 200",
                "must not exceed steps (100)",
            ),
            (
                {"workers": Choice((1, 2)), "batch": Choice((2, 3))},
                "workers 2, batch 3",
                "must be a multiple of workers (2)",
            ),
            (
                {"data.source_low": Range(-3, 0, log=False), "data.source_high": Range(-1, 3, log=False)},
                "data.source_low 0, data.source_high -1",
                "must be less than data.source_high",
            ),
        ],
    )
    def test_they_are_refused_by_the_combination_s_name_and_its_rule(self, space: Space, names: str, rule: str) -> None:
        with pytest.raises(ValueError, match="the space holds a run that cannot be") as error:
            check(space, RunConfig(steps=100))
        assert f"cannot be: {names}: " in str(error.value)
        assert rule in str(error.value)

    def test_a_condition_keeps_them_out(self) -> None:
        penalty, always = Choice(("none", "r1")), Range(0.01, 100.0)
        with pytest.raises(ValueError, match="has no effect without a penalty"):
            check({"critic.penalty": penalty, "critic.gamma": always}, RunConfig())
        check(
            {"critic.penalty": penalty, "critic.gamma": replace(always, when={"critic.penalty": ("r1",)})}, RunConfig()
        )

    def test_every_combination_is_tried_where_there_are_few(self) -> None:
        leaves = RunConfig().flat()
        tried = list(search._tried(GAMES, leaves))
        # lsgan and ns: without a penalty 2 ends of the ratio, with r1 2 of gamma x 3 x 2. rp: 2 x 3 x 2.
        assert len(tried) == 2 * (2 + 12) + 12
        assert len({json.dumps(point, sort_keys=True) for point in tried}) == len(tried)
        rp = [point for point in tried if point["loss.adversarial"] == "rp"]
        assert all((point["critic.penalty"], point["optim.beta1"]) == ("r1r2", 0.0) for point in rp)
        assert not any("critic.gamma" in point for point in tried if point["critic.penalty"] == "none")

    def test_of_a_large_space_a_sample_is_tried_in_which_three_values_that_conflict_meet(self) -> None:
        plain = {f"loss.{name}": Range(0.1, 1.0) for name in ("cycle", "aux", "adv_p", "adv_image", "ce", "dice")}
        wide: Space = {
            **plain,
            "optim.beta2": Choice((0.9, 0.99, 0.999)),
            "optim.schedule": Choice(("constant", "linear_half", "cosine")),
            "workers": Choice((1, 2, 4)),
            "batch": Choice((4, 8, 12)),
            "net.encoder_norm": Choice(("batch", "instance", "group")),
            "net.batch_norm_over": Choice(("batch", "worker")),
        }
        assert len(list(search._tried(wide, RunConfig().flat()))) == search.SAMPLE
        with pytest.raises(ValueError, match="batch norm needs at least 2 slices a step") as error:
            check(wide, RunConfig())
        culprits = str(error.value).split(": ")[1]
        assert culprits == "workers 4, batch 4, net.batch_norm_over 'worker'"
        check({**wide, "workers": Choice((1, 2))}, RunConfig())


class TestPoints:
    def test_a_draw_asks_for_every_dimension_on_its_own_scale(self) -> None:
        trial = Trial()
        assert draw(trial, SPACE, RunConfig()) == {"optim.lr": 2e-3, "loss.cycle": 30.0, "loss.adversarial": "hinge"}
        assert trial.asked == [
            ("optim.lr", 2e-5, 2e-3, True),
            ("loss.cycle", 1.0, 30.0, False),
            ("loss.adversarial", ["lsgan", "hinge"]),
        ]

    def test_what_does_not_apply_is_neither_asked_for_nor_set(self) -> None:
        trial = Trial(adversarial="ns", penalty="none")
        point = draw(trial, GAMES, RunConfig())
        assert point == {"loss.adversarial": "ns", "critic.penalty": "none", "optim.lr_critic_ratio": 1.0}
        assert trial.names == ["loss.adversarial", "critic.penalty", "optim.lr_critic_ratio (2)"]

    def test_what_follows_from_others_is_set_without_being_asked_for(self) -> None:
        trial = Trial(adversarial="rp", penalty_every=4)
        assert draw(trial, GAMES, RunConfig()) == {
            "loss.adversarial": "rp",
            "optim.beta1": 0.0,
            "critic.penalty": "r1r2",
            "critic.gamma": 100.0,
            "critic.penalty_every": 4,
            "optim.lr_critic_ratio": 4.0,
        }
        assert trial.names == ["loss.adversarial", "critic.gamma", "critic.penalty_every", "optim.lr_critic_ratio"]

    def test_a_name_always_stands_for_one_distribution(self) -> None:
        """Optuna refuses another one under the same name."""
        found: dict[str, set[str]] = {}
        for game in ("lsgan", "ns", "rp"):
            for penalty in ("none", "r1"):
                trial = Trial(adversarial=game, penalty=penalty)
                draw(trial, GAMES, RunConfig())
                for name, *distribution in trial.asked:
                    found.setdefault(name, set()).add(repr(distribution))
        assert {name: len(distributions) for name, distributions in found.items()} == dict.fromkeys(found, 1)

    def test_cases_that_differ_in_their_condition_alone_share_a_name(self) -> None:
        wide = Range(0.1, 4.0)
        space: Space = {
            "loss.adversarial": Choice(("lsgan", "ns", "hinge")),
            "optim.lr_critic_ratio": (
                Range(0.1, 4.0, when={"loss.adversarial": ("lsgan",)}),
                Range(0.1, 1.0, when={"loss.adversarial": ("ns",)}),
                wide,
            ),
        }
        for game, name in (("lsgan", ""), ("ns", " (2)"), ("hinge", "")):
            trial = Trial(adversarial=game)
            draw(trial, space, RunConfig())
            assert trial.names[1] == f"optim.lr_critic_ratio{name}"

    def test_a_condition_looks_at_the_run_where_the_point_says_nothing(self) -> None:
        space: Space = {"critic.gamma": Range(0.1, 10.0, when={"critic.penalty": ("r1",)})}
        assert draw(Trial(), space, RunConfig()) == {}
        assert draw(Trial(), space, RunConfig().at("critic.penalty", "r1")) == {"critic.gamma": 10.0}

    @pytest.mark.parametrize(("on", "want"), [(False, 0.0), (True, 5.0)])
    def test_a_term_may_be_off_by_a_switch_of_its_own(self, on: bool, want: float) -> None:
        space: Space = {"loss.identity": Range(0.1, 5.0, off=0.0)}
        trial = Trial(**{"identity on": on})
        assert draw(trial, space, RunConfig()) == {"loss.identity": want}
        assert trial.names == ["loss.identity on", "loss.identity"][: 1 + on]

    def test_a_drawn_point_makes_a_run(self) -> None:
        for game in ("lsgan", "rp"):
            run = RunConfig().having(draw(Trial(adversarial=game), GAMES, RunConfig()))
            assert run.loss.adversarial == game


class TestCoordinates:
    def test_a_point_is_placed_in_a_run_and_found_there_again(self) -> None:
        point: Point = {"optim.lr": 1e-3, "loss.cycle": 5.0, "loss.adversarial": "hinge"}
        run = RunConfig().having(point)
        assert (run.optim.lr, run.loss.cycle, run.loss.adversarial) == (1e-3, 5.0, "hinge")
        assert coordinates(point, SPACE, RunConfig()) == point
        assert coordinates({}, SPACE, run) == point
        assert run.having({}) == run

    def test_a_point_with_a_misspelt_path_is_refused(self) -> None:
        with pytest.raises(KeyError, match="lrr"):
            coordinates({"optim.lrr": 1e-3}, SPACE, RunConfig())

    def test_both_ends_belong_to_the_space(self) -> None:
        for lr in (2e-5, 2e-3):
            kept = coordinates({"optim.lr": lr}, SPACE, RunConfig())
            assert kept is not None
            assert kept["optim.lr"] == lr

    @pytest.mark.parametrize(
        "outside",
        [
            {"optim.lr": 2.1e-3},
            {"loss.cycle": 0.5},
            {"loss.adversarial": "ns"},
            {"optim.lr": 1e-3, "optim.ema": 0.9999},  # inside, but for what the space knows nothing of
            {"seed": 1},
        ],
    )
    def test_a_point_that_the_space_does_not_hold_has_none(self, outside: Point) -> None:
        assert coordinates(outside, SPACE, RunConfig()) is None

    def test_the_2022_study_lies_at_the_edge_of_the_rates_that_are_searched(self) -> None:
        space: Space = {"optim.lr": Range(2e-5, 2e-3)}
        assert coordinates({"optim.lr": STUDY_2022.optim.lr}, space, PUBLISHED) == {"optim.lr": 2e-3}

    def test_only_what_a_draw_would_ask_for_is_kept(self) -> None:
        for point in (
            {"loss.adversarial": "ns", "critic.penalty": "none", "optim.lr_critic_ratio": 0.5},
            {
                "loss.adversarial": "rp",
                "optim.beta1": 0.0,
                "critic.penalty": "r1r2",
                "critic.gamma": 2.0,
                "critic.penalty_every": 16,
                "optim.lr_critic_ratio": 2.0,
            },
        ):
            kept = coordinates(point, GAMES, RunConfig())
            trial = Trial(**{name.rpartition(".")[2]: value for name, value in point.items()})
            draw(trial, GAMES, RunConfig())
            assert kept is not None
            assert list(kept) == trial.names
            assert list(kept.values()) == [point[name.split(" ")[0]] for name in trial.names]

    def test_what_must_follow_but_does_not_lies_outside(self) -> None:
        rp: Point = {"loss.adversarial": "rp", "critic.penalty": "r1r2"}  # beta1 stays at .5
        assert coordinates(rp, GAMES, RunConfig()) is None
        assert coordinates(rp | {"optim.beta1": 0.0}, GAMES, RunConfig()) is not None

    def test_a_critic_that_is_too_quick_for_its_case_lies_outside(self) -> None:
        assert coordinates({"optim.lr_critic_ratio": 2.0}, GAMES, RunConfig()) is None
        assert coordinates({"critic.penalty": "r1", "optim.lr_critic_ratio": 2.0}, GAMES, RunConfig()) is not None

    def test_a_term_that_is_off_keeps_its_switch_alone(self) -> None:
        space: Space = {"loss.identity": Range(0.1, 5.0, off=0.0)}
        assert coordinates({}, space, RunConfig()) == {"loss.identity on": False}
        assert coordinates({"loss.identity": 2.5}, space, RunConfig()) == {
            "loss.identity on": True,
            "loss.identity": 2.5,
        }
        assert coordinates({"loss.identity": 0.01}, space, RunConfig()) is None

    def test_options_of_any_type_keep_their_type(self) -> None:
        space: Space = {"net.skip": Choice((False, True)), "seed": Choice((0, 1, 2)), "optim.clip": Choice((0.0, 1.0))}
        kept = coordinates({"net.skip": False, "seed": 1, "optim.clip": 1}, space, RunConfig())
        assert kept is not None
        assert [(v, type(v)) for v in kept.values()] == [(False, bool), (1, int), (1.0, float)]


@pytest.mark.parametrize("objective", get_args(ObjectiveName))
def test_every_objective_is_called_dice_or_by_its_name(objective: str) -> None:
    assert called(objective) == {"composite": "composite"}.get(objective, "Dice")


def test_a_space_survives_json_with_its_order_and_conditions() -> None:
    space: Space = {**GAMES, "loss.identity": Range(0.1, 5.0, off=0.0), "net.skip": Choice((True, False))}
    again = parsed(json.loads(json.dumps(plain(space), allow_nan=False)))
    assert list(again.items()) == list(space.items())


class TestObjective:
    @staticmethod
    def verdict(kind: Any, stability: float | None = 1.0) -> Verdict:
        return Verdict(kind, 10, 10, stability)

    @pytest.mark.parametrize("kind", ["stable", "d_wins", "blurry", "recovered", "censored"])
    def test_a_run_that_lived_is_worth_its_dice(self, kind: str) -> None:
        assert value(self.verdict(kind), 0.7) == 0.7

    @pytest.mark.parametrize("quality", [0.7, math.nan])
    @pytest.mark.parametrize("kind", ["diverged", "saturated", "collapsed"])
    def test_a_failed_run_is_worth_the_worst_dice_there_is_which_is_finite(self, kind: str, quality: float) -> None:
        assert value(self.verdict(kind), quality) == FLOOR == 0.0

    @pytest.mark.parametrize("kind", ["diverged", "saturated", "collapsed", "recovered"])
    def test_a_run_that_failed_or_was_recovered_is_never_feasible_whatever_its_stability(self, kind: str) -> None:
        for stability in (1.0, 0.95):
            assert violation(self.verdict(kind, stability), 0.9) > 0
            assert violation(self.verdict(kind, stability), 0.0) > 0
        assert violation(self.verdict(kind, 0.2), 0.9) == pytest.approx(0.7)  # and worse the earlier it failed
        assert violation(self.verdict("blurry", 0.95), 0.9) < 0  # a matter of quality

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
            "recovered late": (self.verdict("recovered", 0.95), 0.45),  # .4275: not feasible
            "diverged late": (self.verdict("diverged", 0.95), 0.8),  # 0
        }
        order = sorted(runs, key=lambda name: rank(*runs[name], 0.9), reverse=True)
        assert order == [
            "good and stable",
            "poor but stable",
            "good and hardly shaky",
            "best but shaky",
            "recovered late",
            "diverged late",
        ]
        assert rank(self.verdict("censored", None), 0.7, 0.9) == (False, 0.0)
