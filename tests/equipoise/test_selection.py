"""Which run and evaluation each protocol keeps, what that costs, and how scores rank runs, by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from equipoise.config import PUBLISHED
from equipoise.figures import Run
from equipoise.search import Range
from equipoise.selection import (
    PROTOCOLS,
    SCORES,
    Chosen,
    best_step,
    correlations,
    evaluations,
    protocols,
)
from equipoise.study import Study
from equipoise.verdict import Verdict

NAN = math.nan
STUDY = Study(name="s", question="?", run=PUBLISHED, space={"optim.lr": Range(1e-5, 1e-3)}, points=4)
SHORT = {"source": "quality/translated_dice", "oracle": "quality/target_dice", "composite": "quality/composite"}


def rows(**signals: Sequence[float | None]) -> list[dict[str, float]]:
    """Evaluations at 10, 20, ..., each behind a row that is none; None: not measured."""
    made: list[dict[str, float]] = []
    for number in range(max(map(len, signals.values()))):
        given = {SHORT.get(name, f"validator/{name}"): several[number] for name, several in signals.items()}
        made.append({"step": 10.0 * number + 5, "loss/cycle_t": 1.0})
        made.append({"step": 10.0 * number + 10} | {k: v for k, v in given.items() if v is not None})
    return made


def run(name: str, kind: Any = "stable", s: float | None = 1.0, **signals: Sequence[float | None]) -> Run:
    verdict = None if kind == "unfinished" else Verdict(kind, 100, 100, s)
    return Run(name, PUBLISHED, verdict, rows(**signals), None)


def by_name(choices: Sequence[Chosen]) -> dict[str, Chosen]:
    return {choice.protocol: choice for choice in choices}


ONE = run("0-a", source=[0.5, 0.7, 0.6], entropy=[-0.1, -0.3, -0.2], oracle=[0.4, 0.2, 0.3])
OTHER = run("1-b", source=[0.1, 0.65, 0.8], entropy=[-0.5, NAN, -0.1], oracle=[0.1, 0.6, 0.5])


class TestBestStep:
    def test_it_is_where_the_protocol_s_signal_is_highest_and_the_last_evaluation_without_one(self) -> None:
        steps = {name: best_step(ONE.rows, name) for name in ("last", "source", "entropy", "oracle")}
        assert steps == {"last": 30, "source": 20, "entropy": 10, "oracle": 10}

    def test_of_equals_it_is_the_later(self) -> None:
        assert best_step(rows(source=[0.5, 0.7, 0.7, 0.6]), "source") == 30

    @pytest.mark.parametrize("broken", [NAN, math.inf])
    def test_what_is_not_finite_never_wins_but_is_an_evaluation(self, broken: float) -> None:
        assert best_step(rows(source=[0.1, broken]), "source") == 10
        assert best_step(rows(source=[0.1, broken]), "last") == 20
        assert best_step(rows(source=[broken, broken]), "source") is None

    def test_rows_that_are_no_evaluations_do_not_count(self) -> None:
        assert best_step([*rows(source=[0.5]), {"step": 99.0, "loss/cycle_t": 1.0}], "last") == 10
        assert best_step([{"step": 99.0, "quality/ema_target_dice": 1.0}], "last") is None
        assert best_step([], "last") is None

    def test_a_signal_that_was_never_measured_chooses_nothing(self) -> None:
        assert best_step(ONE.rows, "nuclear") is None

    def test_a_protocol_that_does_not_exist_is_an_error(self) -> None:
        with pytest.raises(KeyError):
            best_step(ONE.rows, "luck")


class TestProtocols:
    def test_each_keeps_the_run_and_step_of_its_signal_s_highest_value(self) -> None:
        found = by_name(protocols([ONE, OTHER], STUDY, ONE))
        assert list(found) == ["last", "source", "entropy", "oracle"]
        kept = {name: (choice.run, choice.step, choice.dice) for name, choice in found.items()}
        assert kept == {
            "last": ("0-a", 30, 0.3),
            "source": ("1-b", 30, 0.5),
            "entropy": ("1-b", 30, 0.5),  # as high as in the first run at step 10, and later
            "oracle": ("1-b", 20, 0.6),
        }

    def test_regret_is_what_is_missing_to_the_oracle(self) -> None:
        regret = {choice.protocol: choice.regret for choice in protocols([ONE, OTHER], STUDY, ONE)}
        assert regret == pytest.approx({"last": 0.3, "source": 0.1, "entropy": 0.1, "oracle": 0.0})

    def test_within_runs_each_run_is_stopped_where_the_protocol_says(self) -> None:
        found = by_name(protocols([ONE, OTHER], STUDY, ONE))
        each = {name: choice.each for name, choice in found.items()}
        assert each == {"last": (0.3, 0.5), "source": (0.2, 0.5), "entropy": (0.4, 0.5), "oracle": (0.4, 0.6)}
        assert found["source"].mean == pytest.approx(0.35)
        assert found["source"].sd == pytest.approx(0.3 / math.sqrt(2))

    def test_of_one_run_there_is_no_deviation_and_of_none_no_mean(self) -> None:
        (last, *_) = protocols([ONE], STUDY, ONE)
        assert (last.mean, last.sd) == (0.3, None)
        (last, *_) = protocols([run("0-a", source=[0.5])], STUDY, run("0-a", source=[0.5]))
        assert (last.dice, last.regret, last.each, last.mean, last.sd) == (None, None, (), None, None)

    def test_a_target_dice_that_is_no_number_is_told_as_such(self) -> None:
        one = run("0-a", source=[0.1, 0.9], oracle=[0.4, NAN])
        source = by_name(protocols([one, ONE], STUDY, None))["source"]
        assert source.dice is not None
        assert source.mean is not None
        assert math.isnan(source.dice)
        assert math.isnan(source.mean)

    def test_runs_without_the_signal_are_not_counted_within(self) -> None:
        bare = run("2-c", source=[0.2], oracle=[0.7])
        found = by_name(protocols([ONE, bare], STUDY, None))
        assert found["entropy"].each == (0.4,)
        assert found["source"].each == (0.2, 0.7)

    def test_without_target_masks_choices_stand_without_dice_regret_or_oracle(self) -> None:
        blind = run("0-a", source=[0.5, 0.4], volume=[0.1, 0.9])
        found = by_name(protocols([blind], STUDY, blind))
        assert {name: choice.step for name, choice in found.items()} == {"last": 20, "source": 10, "volume": 20}
        assert {(choice.dice, choice.regret, choice.mean) for choice in found.values()} == {(None, None, None)}

    def test_without_a_best_point_no_last_step_is_kept(self) -> None:
        assert "last" not in by_name(protocols([ONE, OTHER], STUDY, None))

    def test_a_study_without_evaluations_chooses_nothing(self) -> None:
        assert protocols([], STUDY, None) == []
        assert protocols([Run("0", PUBLISHED, None, [{"step": 1.0}], None)], STUDY, None) == []


class TestEligible:
    BEST = run("9-z", "diverged", 0.1, source=[0.99], oracle=[0.9])
    UNSTABLE = run("8-y", "d_wins", 0.7, source=[0.95], oracle=[0.8])
    RECOVERED = run("7-x", "recovered", 1.0, source=[0.96], oracle=[0.8])
    CENSORED = run("6-w", "censored", None, source=[0.97], oracle=[0.8])
    GOING = run("5-v", "unfinished", source=[0.98], oracle=[0.8])

    def kept(self, *runs: Run) -> str:
        return by_name(protocols(runs, STUDY, None))["source"].run

    def test_feasible_points_go_before_all_others(self) -> None:
        assert self.kept(self.BEST, self.UNSTABLE, self.RECOVERED, self.CENSORED, self.GOING, ONE) == ONE.name

    def test_without_a_feasible_one_all_that_did_not_fail_may_be_kept(self) -> None:
        assert self.kept(self.BEST, self.UNSTABLE, self.RECOVERED) == self.RECOVERED.name
        assert self.kept(self.BEST, self.UNSTABLE, self.CENSORED) == self.CENSORED.name
        assert self.kept(self.BEST, self.UNSTABLE, self.CENSORED, self.GOING) == self.GOING.name

    @pytest.mark.parametrize("kind", ["diverged", "saturated", "collapsed"])
    def test_failed_ones_are_kept_where_there_are_no_others(self, kind: str) -> None:
        assert self.kept(run("4-u", kind, 0.95, source=[0.9]), self.UNSTABLE) == self.UNSTABLE.name
        assert self.kept(run("4-u", kind, 0.95, source=[0.9])) == "4-u"

    def test_a_confirmation_is_none(self) -> None:
        assert self.kept(ONE, run("confirm-0", source=[0.99])) == ONE.name


class TestCorrelations:
    def test_over_runs_the_last_evaluations_count_and_over_evaluations_all(self) -> None:
        runs = [
            run("0", source=[0.9, 0.1], oracle=[0.1, 0.2]),
            run("1", source=[0.8, 0.2], oracle=[0.2, 0.3]),
            run("2", "diverged", source=[0.7, 0.3], oracle=[0.3, 0.4]),
        ]
        found = {(one.protocol, one.over): one for one in correlations(runs)}
        over_runs, over_all = found["source", "runs"], found["source", "evaluations"]
        assert (over_runs.pairs, over_runs.rho, over_runs.reason) == (3, pytest.approx(1.0), "")
        # ranks, pair by pair, of the score 6 1 5 2 4 3, of the Dice 1 2.5 2.5 4.5 4.5 6; products of their deviations
        # from 3.5: -6.25 + 2.5 - 1.5 - 1.5 + .5 - 1.25 = -7.5; squares: 17.5, and 6.25 + 1 + 1 + 1 + 1 + 6.25 = 16.5
        assert (over_all.pairs, over_all.rho) == (6, pytest.approx(-7.5 / math.sqrt(17.5 * 16.5)))

    def test_every_score_is_told_of_and_neither_the_last_step_nor_the_oracle(self) -> None:
        found = correlations([ONE, OTHER])
        assert {one.protocol for one in found} == set(SCORES) == set(PROTOCOLS) - {"last", "oracle"}
        assert {one.over for one in found} == {"runs", "evaluations"}

    def test_fewer_than_3_pairs_tell_nothing(self) -> None:
        found = {(one.protocol, one.over): one for one in correlations([ONE, OTHER])}
        one = found["source", "runs"]
        assert (one.pairs, one.rho, one.reason) == (2, None, "fewer than 3")
        assert found["source", "evaluations"].rho is not None
        assert found["nuclear", "evaluations"].pairs == 0

    def test_what_is_always_the_same_tells_nothing_and_why(self) -> None:
        steady = run("0", source=[0.5] * 4, volume=[0.1, 0.2, 0.3, 0.4], oracle=[0.1, 0.2, 0.3, 0.5])
        (told,) = (one for one in correlations([steady]) if (one.protocol, one.over) == ("source", "evaluations"))
        assert (told.pairs, told.rho, told.reason) == (4, None, "the score is always the same")
        blank = run("0", source=[0.1, 0.2, 0.3], oracle=[0.0, 0.0, 0.0])
        (told,) = (one for one in correlations([blank]) if (one.protocol, one.over) == ("source", "evaluations"))
        assert told.reason == "the Dice is always the same"

    def test_pairs_that_are_not_finite_or_not_whole_do_not_count(self) -> None:
        gaps = run("0", source=[0.1, NAN, 0.3, 0.4, 0.5], oracle=[0.1, 0.2, NAN, None, 0.5])
        (told,) = (one for one in correlations([gaps]) if (one.protocol, one.over) == ("source", "evaluations"))
        assert told.pairs == 2

    def test_without_target_masks_there_are_none_and_confirmations_do_not_count(self) -> None:
        assert correlations([run("0", source=[0.1, 0.2, 0.3])]) == []
        assert correlations([run("confirm-0", source=[0.1], oracle=[0.1])]) == []


def test_evaluations_are_told_in_order_with_what_protocols_need_and_no_other_rows() -> None:
    (first, *others) = evaluations(ONE)
    assert [row["step"] for row in (first, *others)] == [10, 20, 30]
    assert first == {
        "step": 10, "quality/translated_dice": 0.5, "validator/entropy": -0.1, "quality/target_dice": 0.4
    }  # fmt: skip


def test_selection_itself_brings_neither_torch_nor_scipy() -> None:
    script = "import sys; import equipoise.selection; assert not {'torch', 'scipy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
