"""A point of several seeds is as good as they say together."""

from __future__ import annotations

import math

import pytest

from equipoise.search import FLOOR, violation
from equipoise.seeds import Ended, joined, undecided
from equipoise.verdict import Finding, Verdict


def stable(stability: float, dice: float = 0.8) -> Ended:
    return Verdict("stable", 400, 400, stability), dice


def diverged(step: int, dice: float = 0.7) -> Ended:
    found = Finding("explosion", "loss/cycle_t", step, step, 13.0, 1.0)
    return Verdict("diverged", step, 400, step / 400, (found,)), dice


def test_a_point_is_as_stable_as_its_worst_seed_and_its_dice_is_the_mean() -> None:
    verdict, dice = joined([stable(1.0, 0.9), stable(0.95, 0.6), stable(0.97, 0.6)])
    assert (verdict.kind, verdict.stability) == ("stable", 0.95)
    assert dice == pytest.approx(0.7)


def test_one_seed_that_failed_makes_the_point_a_failure_and_counts_as_one_in_its_dice() -> None:
    verdict, dice = joined([stable(1.0, 0.9), diverged(100)])
    assert (verdict.kind, verdict.stability, verdict.onset) == ("diverged", 0.25, 100)
    assert dice == pytest.approx((0.9 + FLOOR) / 2)


def test_a_seed_that_diverged_late_is_told_before_a_shaky_one_that_lived() -> None:
    verdict, _ = joined([stable(0.1), diverged(390)])
    assert (verdict.kind, verdict.stability) == ("diverged", 0.1)


def test_a_recovered_seed_keeps_the_point_from_being_feasible() -> None:
    recovered = Verdict("recovered", 400, 400, 0.99), 0.8
    verdict, _ = joined([stable(0.95), recovered])
    assert violation(verdict, 0.9) > 0


def test_a_fifth_of_the_seeds_may_fail_by_the_20_percent_quantile() -> None:
    verdict, _ = joined([stable(1.0)] * 4 + [diverged(100)], "q20")
    # Between the worst, .25, and the second worst, 1, at .2 x 4 = .8 of the way.
    assert verdict.kind == "stable"
    assert verdict.stability == pytest.approx(0.85)


def test_a_dice_that_could_not_be_measured_counts_as_a_failure_s() -> None:
    _, dice = joined([stable(1.0, math.nan), stable(1.0, 0.8)])
    assert dice == pytest.approx((FLOOR + 0.8) / 2)


def test_seeds_are_run_as_long_as_they_could_make_the_point_feasible() -> None:
    assert undecided([stable(0.95)], 3, 0.9)
    assert not undecided([stable(0.95)] * 3, 3, 0.9)
    assert not undecided([diverged(100)], 3, 0.9)
    assert not undecided([stable(0.5)], 3, 0.9)
    # Ten seeds of which one failed: .2 x 9 = 1.8, between the second and the third worst.
    assert undecided([diverged(100)], 10, 0.9, "q20")
