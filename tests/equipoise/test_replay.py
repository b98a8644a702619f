"""Curves of unequal steps, judged as a live run is; and the first study's, which are why there is a monitor."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from equipoise.config import MonitorConfig
from equipoise.monitor import CRITICS, Monitor
from equipoise.replay import Curve, replay, resolution


def curve(values: np.ndarray, every: int = 50, start: int = 0) -> Curve:
    """A value every so many steps, the first at `start` + `every`."""
    return start + every * (1 + np.arange(len(values))), values


def rising(count: int, at: int, high: float = 10.0, low: float = 1.0) -> np.ndarray:
    return np.where(np.arange(count) < at, low, high)


class TestGrid:
    def test_a_record_of_block_means_gives_the_verdict_of_the_live_run(self) -> None:
        rng, monitor = np.random.default_rng(0), Monitor(MonitorConfig(), 20_000, {"loss/cycle_t": 1.5})
        trace = rising(400, 200, 5.0) * np.exp(0.15 * rng.standard_normal(400))
        auc = np.where(np.arange(400) < 60, 0.6, 1.0)
        for k in range(400):
            block = np.array([[trace[k], auc[k]]] * 50)
            monitor.observe(50 * k + 1, ["loss/cycle_t", "auc/t"], block)
        found = replay({"loss/cycle_t": curve(trace), "auc/t": curve(auc)})
        assert [f.kind for f in found.verdict.findings] == ["d_wins", "explosion"]
        for ours, theirs in zip(found.verdict.findings, monitor.findings, strict=True):
            assert (ours.signal, ours.onset, ours.alarm) == (theirs.signal, theirs.onset, theirs.alarm)
            assert ours.value == pytest.approx(theirs.value)
        assert found.verdict.stability == pytest.approx(monitor.verdict(20_000).stability)

    def test_blocks_are_as_long_as_a_live_run_s_or_as_the_samples_of_the_coarsest_loss_are_apart(self) -> None:
        fine, coarse = curve(np.ones(800), 25), curve(np.ones(100), 200)
        assert replay({"loss/cycle_s": fine}).horizon.block == 50
        assert replay({"loss/cycle_s": fine, "loss/cycle_t": coarse}).horizon.block == 200
        assert replay({"loss/cycle_s": fine, "auc/t": coarse}).horizon.block == 50

    def test_a_gap_in_a_record_makes_it_no_coarser(self) -> None:
        steps = np.concatenate([np.arange(50, 5_000, 50), np.arange(8_000, 20_000, 50)])
        assert resolution({"loss/cycle_t": (steps, np.ones(len(steps)))}, {"loss/cycle_t": 1.5}) == 50

    def test_samples_within_a_block_are_averaged_and_empty_blocks_lie_on_a_straight_line(self) -> None:
        # Samples of 1 and 3 make a block of 2. Of the jump from 2 to 10 with blocks missing in between, the limit of
        # 1.5 times the plateau of 2 is 3.
        steps = np.concatenate([np.arange(25, 10_001, 25), np.arange(10_500, 20_001, 25)])
        values = np.where(steps > 10_000, 10.0, np.where(steps // 25 % 2, 1.0, 3.0))
        found = replay({"loss/cycle_t": (steps, values)})
        (finding,) = found.verdict.findings
        assert (finding.before, finding.limit) == pytest.approx((2.0, 3.0))
        assert 10_000 <= finding.onset <= 10_100

    def test_a_curve_that_begins_late_or_ends_early_is_judged_where_it_is(self) -> None:
        late = curve(rising(200, 100), start=10_000)
        short = curve(np.ones(100))
        found = replay({"loss/cycle_t": late, "loss/cycle_s": short, "loss/generator": curve(np.ones(400))})
        (finding,) = found.verdict.findings
        assert (finding.signal, finding.onset) == ("loss/cycle_t", 15_000)

    def test_nothing_is_made_up_after_a_curve_s_last_sample(self) -> None:
        # A win after the warm-up of 20 blocks is certain with block 29.
        for samples, kind in ((29, "stable"), (30, "d_wins")):
            curves = {"loss/cycle_t": curve(np.ones(400)), "auc/t": curve(np.ones(samples))}
            assert replay(curves).verdict.kind == kind

    def test_a_line_between_samples_is_read_in_the_middle_of_a_block(self) -> None:
        # From 0 at 5010 to 1 at 10 010 it reaches .3 at 6510, and is above in the middle of the block after 6500.
        line = (np.array([1, 5_010, 10_010, 20_000]), np.array([0.0, 0.0, 1.0, 1.0]))
        (finding,) = replay({"loss/cycle_t": curve(np.ones(400)), "saturation/st": line}).verdict.findings
        assert (finding.kind, finding.onset) == ("saturation", 6_500)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("step", [0, 4_321, 20_000])
    def test_a_sample_that_is_no_number_is_found_at_its_very_step_in_any_curve(self, value: float, step: int) -> None:
        steps = np.array(sorted({*range(0, 20_001, 100), step}))
        curves = {
            "loss/cycle_t": (steps, np.ones(len(steps))),
            "their/own": (steps, np.where(steps == step, value, 1.0)),
        }
        (finding,) = replay(curves).verdict.findings
        assert (finding.kind, finding.signal, finding.onset) == ("non_finite", "their/own", max(1, step))
        assert str(finding.value) == str(value)

    def test_probes_are_looked_at_at_their_own_steps(self) -> None:
        probe = (np.array([2_000, 3_000, 4_000, 5_000]), np.array([1.0, 0.01, 0.01, 0.01]))
        found = replay({"loss/cycle_t": curve(np.ones(400)), "probe/foreground": probe})
        (finding,) = found.verdict.findings
        assert (finding.kind, finding.onset, finding.alarm) == ("collapse", 2_000, 5_000)
        assert found.verdict.kind == "collapsed"

    def test_the_run_is_as_long_as_its_longest_curve_unless_more_was_planned(self) -> None:
        curves = {"loss/cycle_t": curve(np.ones(200)), "auc/t": curve(np.full(201, 0.5))}
        assert replay(curves).verdict.kind == "stable"
        assert replay(curves).verdict.step == replay(curves).verdict.planned == 10_050
        assert replay(curves, 40_000).verdict.kind == "censored"
        assert replay(curves, 100).verdict.planned == 10_050

    def test_the_limits_that_held_are_told_block_by_block_up_to_the_end(self) -> None:
        found = replay({"loss/cycle_t": curve(rising(400, 200, low=2.0))})
        assert found.judged
        assert len(found.steps) == len(found.limits["loss/cycle_t"]) == 214
        assert found.steps[-1] == found.verdict.findings[0].alarm == 10_700
        assert np.isinf(found.limits["loss/cycle_t"][:30]).all()
        assert found.limits["loss/cycle_t"][30:] == pytest.approx(3.0)

    def test_of_a_record_too_short_to_judge_that_is_told(self) -> None:
        found = replay({"loss/cycle_t": curve(np.ones(8), 1_000)})
        assert (found.verdict.kind, found.judged) == ("stable", False)

    def test_one_sample_alone_is_a_record(self) -> None:
        assert replay({"loss/cycle_t": (np.array([0]), np.array([1.0]))}).verdict.kind == "stable"

    @pytest.mark.parametrize(
        ("curves", "rule"),
        [
            ({}, "none"),
            ({"a": (np.array([]), np.array([]))}, "at least one"),
            ({"a": (np.array([1, 2]), np.array([1.0]))}, "as many"),
            ({"a": (np.array([2, 1]), np.array([1.0, 1.0]))}, "must not decrease"),
            ({"a": (np.array([-1, 1]), np.array([1.0, 1.0]))}, "from 0"),
            ({"a": (np.array([1, math.nan]), np.array([1.0, 1.0]))}, "must not decrease"),
        ],
    )
    def test_what_is_no_record_is_refused(self, curves: Mapping[str, Curve], rule: str) -> None:
        with pytest.raises(ValueError, match=rule):
            replay(curves)


class TestRules:
    def test_which_rules_apply_follows_from_the_names(self) -> None:
        ones, names = curve(np.ones(400)), ("loss/cycle_s", "loss/segmentation", "loss/generator", "loss/adv_t")
        found = replay(dict.fromkeys((*names, "auc/s", "critic/loss_s", "critic/loss_t", "critic/gap_t"), ones))
        assert found.watched == ("loss/cycle_s", "loss/segmentation", "loss/generator")
        assert found.critics == ("auc/s", "critic/loss_t")
        assert set(CRITICS) == {"s", "t", "p", "p_low"}

    def test_for_a_generator_loss_that_is_negative_margins_stand_in(self) -> None:
        curves = {"loss/generator": curve(np.linspace(1, -1, 400)), "critic/gap_t": curve(rising(400, 200, 30.0))}
        found = replay(curves)
        assert found.watched == ("critic/gap_t",)
        assert found.verdict.findings[0].signal == "critic/gap_t"

    def test_a_critic_without_auc_wins_by_its_least_squares_loss(self) -> None:
        (finding,) = replay({"critic/loss_t": curve(rising(400, 200, high=0.004, low=0.25))}).verdict.findings
        assert (finding.kind, finding.signal, finding.onset) == ("d_wins", "critic/loss_t", 10_000)

    def test_but_not_by_a_loss_that_is_negative_and_so_no_such_one(self) -> None:
        assert replay({"critic/loss_t": curve(np.full(400, -3.0))}).verdict.kind == "stable"

    def test_other_limits_can_be_given(self) -> None:
        curves = {"loss/cycle_t": curve(rising(400, 200, 2.0))}
        assert replay(curves).verdict.kind == "diverged"
        assert replay(curves, config=MonitorConfig(cycle_growth=3.0)).verdict.kind == "stable"


NAMES = {
    "cycl_a": "loss/cycle_s",
    "cycl_b": "loss/cycle_t",
    "dice_B": "loss/segmentation",
    "tot_gb": "loss/generator",
    "d_A": "critic/loss_s",
    "d_B": "critic/loss_t",
    "g_A": "loss/adv_s",
    "g_B": "loss/adv_t",
}
"""The first study's, and ours."""


class TestFirstStudy:
    """The 2022 study's runs, read off their published plots at every 130 to 140 steps; A was the source, B the target.

    The plot of the vessel run's cycle_t shows 13.5 from step 140 to 1740, which its other curves contradict: a line of
    the plot's frame. Nothing of it is corrected here.
    """

    @pytest.fixture
    def curves(self, real: Path) -> dict[str, dict[str, Curve]]:
        points: dict[str, dict[str, list[tuple[float, float]]]] = {"vessel": {}, "brain": {}}
        with (real / "first_study_losses.csv").open() as file:
            for row in csv.DictReader(file):
                if row["signal"] in NAMES:
                    sample = float(row["step"]), (float(row["low"]) + float(row["high"])) / 2
                    points[row["run"]].setdefault(NAMES[row["signal"]], []).append(sample)
        return {
            run: {name: (np.array(sorted(p))[:, 0], np.array(sorted(p))[:, 1]) for name, p in signals.items()}
            for run, signals in points.items()
        }

    @pytest.mark.parametrize(("run", "about"), [("vessel", 15_200), ("brain", 5_600)])
    @pytest.mark.parametrize("coarser", [1, 2])
    def test_it_diverged_and_the_target_cycle_left_its_plateau(
        self, curves: dict[str, dict[str, Curve]], run: str, about: int, coarser: int
    ) -> None:
        thinned = {name: (steps[::coarser], values[::coarser]) for name, (steps, values) in curves[run].items()}
        found = replay(thinned, 40_000)
        (finding,) = found.verdict.findings
        assert (found.verdict.kind, finding.kind, finding.signal) == ("diverged", "explosion", "loss/cycle_t")
        assert abs(finding.onset - about) <= 500
        assert finding.onset < finding.alarm <= finding.onset + 1_500
        assert (finding.before or math.inf) < 0.15
        assert finding.value > 12
        assert "target cycle loss left its plateau" in found.verdict.sentence()

    @pytest.mark.parametrize(("run", "about"), [("vessel", 15_200), ("brain", 5_600)])
    def test_interpolated_to_single_steps_and_seen_by_a_live_monitor_it_is_the_same(
        self, curves: dict[str, dict[str, Curve]], run: str, about: int
    ) -> None:
        steps = np.arange(1, 40_001)
        table = np.stack([np.interp(steps, *curve) for curve in curves[run].values()], axis=1)
        monitor = Monitor(MonitorConfig(), 40_000, {"loss/cycle_s": 1.5, "loss/cycle_t": 1.5, "loss/generator": 2.0})
        for first in range(0, 40_000, 50):
            monitor.observe(first + 1, list(curves[run]), table[first : first + 50])
        finding = monitor.diverged
        assert finding is not None
        assert finding.signal == "loss/cycle_t"
        assert abs(finding.onset - about) <= 500

    @pytest.mark.parametrize("planned", [None, 20_000, 40_000])
    @pytest.mark.parametrize(("run", "cut"), [("vessel", 10_000), ("vessel", 14_500), ("brain", 5_000)])
    def test_before_nothing_was_to_be_found_for_a_plan_of_any_length(
        self, curves: dict[str, dict[str, Curve]], run: str, cut: int, planned: int | None
    ) -> None:
        early = {name: (steps[steps <= cut], values[steps <= cut]) for name, (steps, values) in curves[run].items()}
        found = replay(early, planned)
        assert found.judged
        assert found.verdict.findings == ()
        assert found.verdict.kind == ("censored" if planned else "stable")

    def test_the_vessel_run_s_critic_won_after_it_blew_up(self, curves: dict[str, dict[str, Curve]]) -> None:
        found = replay({"critic/loss_t": curves["vessel"]["critic/loss_t"]})
        assert found.verdict.kind == "d_wins"
        assert abs(found.verdict.findings[0].onset - 15_500) <= 300

    def test_its_segmentation_collapsed_twice_before_and_that_passed(self, curves: dict[str, dict[str, Curve]]) -> None:
        """Near steps 3000 and 9500 its Dice loss doubled, as the monitor sees no explosion in: it never stayed high."""
        steps, values = curves["vessel"]["loss/segmentation"]
        high = steps[(values > 0.4) & (steps > 1_000) & (steps < 10_500)]
        assert high.size > 4
        assert all(2_500 < step < 4_500 or step > 9_000 for step in high)
