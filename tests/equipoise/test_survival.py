"""How long runs last, by hand."""

from __future__ import annotations

import math

import pytest

from equipoise.survival import log_rank, restricted_mean, survival


def test_each_onset_takes_its_share_of_those_that_are_still_watched() -> None:
    # Four at risk at 10, one fails: 3/4. One is stopped at 20. Two at risk at 30, one fails: 3/4 x 1/2.
    assert survival([10, None, 30, None], [15, 20, 40, 40]) == [(0, 1.0), (10, 0.75), (30, 0.375)]


def test_a_run_that_stops_at_the_very_step_of_another_s_onset_was_still_watched_then() -> None:
    assert survival([10, None], [12, 10]) == [(0, 1.0), (10, 0.5)]


def test_two_onsets_at_one_step_are_one_corner() -> None:
    assert survival([10, 10, None], [10, 20, 30]) == [(0, 1.0), (10, pytest.approx(1 / 3))]


def test_where_nothing_fails_all_last() -> None:
    assert survival([None, None], [20, 30]) == [(0, 1.0)]


@pytest.mark.parametrize(("onsets", "steps"), [([], []), ([30], [20]), ([None], [10, 20])])
def test_what_cannot_have_been_watched_is_refused(onsets: list[float | None], steps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"no runs|cannot be known|longer"):
        survival(onsets, steps)


def test_the_restricted_mean_is_the_area_below_the_curve() -> None:
    onsets, steps = [10, None, 30, None], [15, 20, 40, 40]
    assert restricted_mean(onsets, steps, 40) == pytest.approx(10 * 1 + 20 * 0.75 + 10 * 0.375)
    assert restricted_mean(onsets, steps, 20) == pytest.approx(10 * 1 + 10 * 0.75)
    assert restricted_mean(onsets, steps, 10) == pytest.approx(10)
    assert restricted_mean([5, 10], [10, 10], 100) == pytest.approx(7.5)  # none is left to watch


def test_beyond_what_was_watched_there_is_no_mean() -> None:
    with pytest.raises(ValueError, match="no run was watched for 50 steps; the longest for 40"):
        restricted_mean([10, None], [10, 40], 50)


def test_log_rank_by_hand() -> None:
    # At 1: 2 + 2 at risk, one of the first group fails: 1/2 expected, variance 1/4. At 2: 1 + 2, the other one fails:
    # 1/3 expected, variance 1/3 x 2/3. The first group has none at risk any more. z = (2 - 5/6) / sqrt(1/4 + 2/9).
    z = (2 - 5 / 6) / math.sqrt(1 / 4 + 2 / 9)
    by_hand = math.erfc(z / math.sqrt(2))
    early, late = ([1, 2], [9, 9]), ([3, None], [9, 9])
    assert log_rank(early, late) == pytest.approx(by_hand)
    assert log_rank(late, early) == pytest.approx(by_hand)
    assert log_rank(early, early) == pytest.approx(1.0)


def test_groups_in_which_nothing_failed_say_nothing() -> None:
    assert math.isnan(log_rank(([None], [10]), ([None, None], [10, 20])))
