"""Divergence as a measured result: the rules by hand, and what must not disturb them.

Most traces are for 20 000 planned steps: 400 blocks of 50, a warm-up of 20 blocks, a hold of 10.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise.config import MonitorConfig, RunConfig
from equipoise.losses import patch_auc
from equipoise.monitor import CRITICS, Finding, Horizon, Monitor, Verdict, counted, watched

STEPS, BLOCK = 20_000, 50
TERMS = {"loss/cycle_s": 1.5, "loss/cycle_t": 1.5, "loss/segmentation": 2.0, "loss/generator": 2.0}


def monitor(terms: Mapping[str, float] | None = None, steps: int = STEPS) -> Monitor:
    return Monitor(MonitorConfig(), steps, TERMS if terms is None else terms)


def feed(watch: Monitor, traces: Mapping[str, np.ndarray], start: int = 0, stop: int | None = None) -> Monitor:
    """Show block means (one a block, repeated over its steps) from block `start` to block `stop`."""
    names, table = list(traces), np.stack(list(traces.values()), axis=1)
    for k in range(start, len(table) if stop is None else stop):
        watch.observe(k * BLOCK + 1, names, np.repeat(table[k : k + 1], BLOCK, axis=0))
    return watch


def cycle_t(values: np.ndarray) -> Monitor:
    return feed(monitor({"loss/cycle_t": 1.5}), {"loss/cycle_t": values})


def jump(at: int = 100, low: float = 1.0, high: float = 10.0, blocks: int = 400) -> np.ndarray:
    """`at` blocks of `low`, then `high`."""
    return np.where(np.arange(blocks) < at, low, high)


def noisy(seed: int, *, sigma: float = 0.15, memory: float = 0.0, blocks: int = 400, level: float = 1.0) -> np.ndarray:
    """A loss that settles from five times its plateau, with log-normal noise; `memory` makes the noise drift."""
    noise = np.random.default_rng((seed, 7)).normal(0, 1, blocks)
    for k in range(1, blocks):
        noise[k] = memory * noise[k - 1] + math.sqrt(1 - memory**2) * noise[k]
    trace: np.ndarray = level * (1 + 4 * np.exp(-np.arange(blocks) / 60)) * np.exp(sigma * noise)
    return trace


def told(watch: Monitor) -> list[tuple[str, str, int, int]]:
    return [(f.kind, f.signal, f.onset, f.alarm) for f in watch.findings]


class TestHorizon:
    @pytest.mark.parametrize(
        ("steps", "block", "warm_up", "hold"),
        [
            (20_000, 50, 20, 10),  # 1000 and 500 steps
            (40_000, 50, 20, 10),  # .025 T is 1000 as well, .0125 T is 500
            (80_000, 50, 40, 20),  # .025 T = 2000 steps, .0125 T = 1000
            (100_000, 50, 50, 25),
            (2_000, 5, 20, 10),  # 400 blocks again
            (1_250, 3, 20, 10),
            (399, 1, 20, 10),
            (8, 1, 20, 10),
        ],
    )
    def test_lengths_follow_the_planned_steps(self, steps: int, block: int, warm_up: int, hold: int) -> None:
        assert Horizon.of(MonitorConfig(), steps) == Horizon(steps, block, warm_up, hold)

    def test_a_shorter_block_that_is_asked_for_is_used(self) -> None:
        assert Horizon.of(MonitorConfig(block_steps=10), 20_000) == Horizon(20_000, 10, 50, 25)

    def test_a_short_run_is_judged_by_the_same_rules_on_shorter_blocks(self) -> None:
        trace = jump()
        long, short = cycle_t(trace), monitor({"loss/cycle_t": 1.5}, steps=2_000)
        for k, value in enumerate(trace):
            short.observe(5 * k + 1, ["loss/cycle_t"], np.full((5, 1), value))
        assert [(k, s, o // 10, a // 10) for k, s, o, a in told(long)] == told(short)
        assert short.verdict(570).stability == pytest.approx(long.verdict(5_700).stability)


class TestNonFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("step", [1, 777, 19_999])
    def test_it_is_found_at_its_very_step_even_before_the_warm_up_and_in_any_signal(
        self, value: float, step: int
    ) -> None:
        watch = monitor({})
        for first in range(1, STEPS, BLOCK):
            rows = np.ones((BLOCK, 3), dtype=np.float32)
            if first <= step < first + BLOCK:
                rows[step - first, 1] = value
            watch.observe(first, ["loss/adv_t", "grad/critic", "auc/aux"], rows)
            if watch.diverged:
                break
        (finding,) = watch.findings
        assert (finding.kind, finding.signal, finding.onset, finding.alarm) == ("non_finite", "grad/critic", step, step)
        assert str(finding.value) == str(value)
        assert finding.sentence() == f"grad/critic became {value} at step {step}"

    def test_the_earliest_step_is_named_and_of_equals_the_first_signal(self) -> None:
        rows = np.ones((4, 3))
        rows[2, 0] = rows[1, 2] = rows[1, 1] = math.nan
        watch = monitor({})
        means = watch.observe(11, ["a", "b", "c"], rows)
        assert told(watch) == [("non_finite", "b", 12, 12)]
        assert all(math.isnan(means[name]) for name in "abc"), "nothing is made up for what is measured"

    def test_nothing_after_it_is_judged(self) -> None:
        trace = jump()
        trace[50] = math.nan
        watch = feed(monitor(), dict.fromkeys(TERMS, trace))
        assert told(watch) == [("non_finite", "loss/cycle_s", 2501, 2501)]


class TestExplosion:
    def test_a_jump_by_hand(self) -> None:
        # Blocks 0-99 stand at 1, later ones at 10; noise 0. The median of ten passes the limit 1 * 1.5 with the fifth
        # block at 10 (block 104) and has held for ten blocks after block 113, which ends at step 5700. The last block
        # whose median was on the plateau is block 103 (four of ten at 10), which ends at step 5200.
        watch = cycle_t(jump())
        (finding,) = watch.findings
        assert (finding.kind, finding.signal, finding.onset, finding.alarm) == (
            "explosion", "loss/cycle_t", 5200, 5700,
        )  # fmt: skip
        assert finding.value == pytest.approx(10)
        assert finding.limit == pytest.approx(1.5)
        assert finding.diverged
        assert "left its plateau at step 5200" in finding.sentence()

    def test_a_rise_below_the_growth_factor_is_none_and_one_above_it_is(self) -> None:
        assert cycle_t(jump(high=1.49)).findings == []
        assert len(cycle_t(jump(high=1.51)).findings) == 1

    def test_each_term_has_its_own_factor(self) -> None:
        trace = jump(high=1.8)
        assert [s for _, s, _, _ in told(feed(monitor(), dict.fromkeys(TERMS, trace)))] == ["loss/cycle_s"]
        assert feed(monitor(), {name: trace if "cycle" not in name else trace * 0 + 1 for name in TERMS}).findings == []

    def test_a_fall_however_deep_is_none(self) -> None:
        assert cycle_t(jump(low=10, high=0.001)).findings == []

    def test_the_best_so_far_counts_and_not_the_last(self) -> None:
        # 1, then .5, then .8: more than 1.5 times the best, though below where it began.
        trace = np.where(np.arange(400) < 100, 1.0, np.where(np.arange(400) < 200, 0.5, 0.8))
        (finding,) = cycle_t(trace).findings
        assert finding.onset == 204 * BLOCK
        assert finding.limit == pytest.approx(0.75)

    def test_a_rise_that_lasts_less_than_the_hold_is_none(self) -> None:
        # A rise of eight blocks holds five of the last ten for nine blocks, one of nine blocks for ten.
        eight, nine = jump(), jump()
        eight[108:] = nine[109:] = 1.0
        assert cycle_t(eight).findings == []
        assert len(cycle_t(nine).findings) == 1

    def test_nothing_is_judged_in_the_warm_up(self) -> None:
        trace = jump(at=12)  # the warm-up ends with block 19
        watch = feed(monitor({"loss/cycle_t": 1.5}), {"loss/cycle_t": trace}, stop=29)
        assert watch.findings == []

    def test_noise_raises_the_limit_by_two_sigma(self) -> None:
        # log L alternates between -.2 and .2: every residual is .2, sigma = 1.4826 * .2.
        trace = np.exp(0.2 * (-1.0) ** np.arange(400))
        trace[200:] *= 10
        (finding,) = cycle_t(trace).findings
        assert finding.limit == pytest.approx(1.5 * math.exp(2 * 1.4826 * 0.2), rel=1e-6)

    def test_only_the_first_term_is_named(self) -> None:
        traces = dict.fromkeys(TERMS, jump(at=200)) | {"loss/cycle_t": jump(at=190)}
        assert told(feed(monitor(), traces)) == [("explosion", "loss/cycle_t", 194 * BLOCK, 204 * BLOCK)]

    def test_a_loss_of_exactly_0_is_judged_and_does_not_raise(self) -> None:
        assert cycle_t(np.zeros(400)).findings == []
        assert len(cycle_t(jump(low=0.0)).findings) == 1

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("ramp", [1, 10])
    def test_a_planted_blow_up_is_found_with_its_term_and_its_onset_within_500_steps(
        self, seed: int, ramp: int
    ) -> None:
        at = 240  # step 12 000
        traces = {name: noisy(10 * seed + k, level=0.3) for k, name in enumerate(TERMS)}
        growth = np.clip((np.arange(400) - at) / ramp, 0, 1)
        traces["loss/cycle_t"] *= 40**growth
        traces["loss/generator"] *= 10**growth
        (finding,) = feed(monitor(), traces).findings
        assert finding.signal == "loss/cycle_t"
        assert abs(finding.onset - at * BLOCK) <= 500
        assert finding.onset < finding.alarm <= at * BLOCK + 1500


class TestNothingToFind:
    def test_a_spike_of_8_is_none(self) -> None:
        for block in (5, 21, 150, 399):
            trace = noisy(0)
            trace[block] *= 8
            assert cycle_t(trace).findings == [], block

    def test_a_spike_of_8_in_a_single_step_is_none(self) -> None:
        watch = monitor({"loss/cycle_t": 1.5})
        for k in range(400):
            rows = np.ones((BLOCK, 1))
            if k == 200:
                rows[17] = 8
            watch.observe(k * BLOCK + 1, ["loss/cycle_t"], rows)
        assert watch.findings == []

    def test_noise_alone_raises_at_most_1_alarm_in_100_runs(self) -> None:
        """Measured: 0 of 200, and 0 of 100 for white noise up to sigma .5; noise that drifts more raises more."""
        alarms = {
            (sigma, memory): sum(
                cycle_t(noisy(seed, sigma=sigma, memory=memory)).diverged is not None for seed in range(100)
            )
            for sigma, memory in ((0.15, 0.5), (0.3, 0.0))
        }
        print(f"false alarms in 100 traces by (sigma, memory): {alarms}")
        assert sum(alarms.values()) <= 2


class TestInvariance:
    @pytest.mark.parametrize("factor", [1e-3, 4.0, 1e4])
    def test_a_loss_in_other_units_is_judged_alike(self, factor: float) -> None:
        trace = noisy(3) * jump(at=250, high=6.0)
        one, other = cycle_t(trace), cycle_t(factor * trace)
        assert told(one) == told(other) != []
        assert other.findings[0].value == pytest.approx(factor * one.findings[0].value)
        assert other.stability() == pytest.approx(one.stability())

    def test_a_critic_whose_logits_are_stretched_and_shifted_wins_alike(self) -> None:
        g = torch.Generator().manual_seed(0)
        curves: list[list[float]] = [[], []]
        for k in range(60):
            gap = 8.0 if k >= 20 else 0.0
            real = torch.randint(-8, 8, (300,), generator=g) / 8 + gap
            fake = torch.randint(-8, 8, (300,), generator=g) / 8
            curves[0].append(patch_auc(real, fake).item())
            curves[1].append(patch_auc(3 * real + 7, 3 * fake + 7).item())
        one, other = (feed(monitor({}), {"auc/t": np.array(curve)}) for curve in curves)
        assert told(one) == told(other) == [("d_wins", "auc/t", 30 * BLOCK, 39 * BLOCK)]


class TestCriticWins:
    def test_by_hand_and_the_run_goes_on(self) -> None:
        # From block 100 on every patch is told apart. The mean of ten reaches .99 with block 109 (with nine of ten it
        # is .95), which ends at step 5500, and has held for ten blocks after block 118, which ends at step 5950.
        watch = feed(monitor(), dict.fromkeys(TERMS, np.ones(400)) | {"auc/t": jump(low=0.5, high=1.0)})
        (finding,) = watch.findings
        assert (finding.kind, finding.signal, finding.onset, finding.alarm) == ("d_wins", "auc/t", 5500, 5950)
        assert finding.value == pytest.approx(1)
        assert finding.limit == 0.99
        assert not finding.diverged
        assert watch.diverged is None
        assert watch.verdict(STEPS).kind == "d_wins"
        assert watch.verdict(STEPS).onset is None

    def test_each_critic_is_named_once(self) -> None:
        on_off = np.where(np.arange(400) // 50 % 2 == 1, 1.0, 0.5)
        watch = feed(monitor({}), {"auc/p": on_off, "auc/s": jump(at=200, low=0.5, high=1.0)})
        assert [f.signal for f in watch.findings] == ["auc/p", "auc/s"]

    def test_just_below_the_threshold_or_for_too_short_it_does_not(self) -> None:
        assert feed(monitor({}), {"auc/t": np.full(400, 0.989)}).findings == []
        assert len(feed(monitor({}), {"auc/t": np.full(400, 0.9901)}).findings) == 1
        passing = np.where((np.arange(400) >= 100) & (np.arange(400) < 118), 1.0, 0.5)
        assert feed(monitor({}), {"auc/t": passing}).findings == []

    def test_it_is_not_judged_in_the_warm_up(self) -> None:
        assert told(feed(monitor({}), {"auc/t": np.ones(30)})) == [("d_wins", "auc/t", 21 * BLOCK, 30 * BLOCK)]

    def test_while_nobody_plays_against_it_it_cannot_win(self) -> None:
        watch = Monitor(MonitorConfig(), STEPS, {}, CRITICS, {"p": 100 * BLOCK})
        auc = np.where(np.arange(400) < 100, 1.0, 0.7)
        assert told(feed(watch, {"auc/p": auc})) == []
        watch = Monitor(MonitorConfig(), STEPS, {}, CRITICS, {"p": 100 * BLOCK})
        assert told(feed(watch, {"auc/p": np.ones(400), "auc/t": np.full(400, 0.5)})) == [
            ("d_wins", "auc/p", 101 * BLOCK, 110 * BLOCK)
        ]

    def test_the_auxiliary_game_does_not_count(self) -> None:
        assert feed(monitor({}), {"auc/aux": np.ones(400)}).findings == []
        assert "aux" not in CRITICS


class TestVerdict:
    def test_a_quiet_run_is_stable_with_s_1(self) -> None:
        verdict = feed(monitor(), dict.fromkeys(TERMS, np.ones(400))).verdict(STEPS)
        assert verdict == Verdict("stable", STEPS, STEPS, 1.0)
        assert verdict.sentence() == "stable after 20000 of 20000 steps"

    def test_s_of_a_diverged_run_by_hand(self) -> None:
        # Onset 5200 of 20 000; late growth: log 10 over a plateau of log 1.1.
        verdict = cycle_t(jump()).verdict(5700)
        assert (verdict.kind, verdict.onset, verdict.step) == ("diverged", 5200, 5700)
        assert verdict.stability == pytest.approx(0.26 * 1.1 / 10)

    def test_s_of_a_run_that_grew_late_without_exploding_by_hand(self) -> None:
        verdict = cycle_t(jump(at=300, high=1.3)).verdict(STEPS)
        assert verdict.kind == "stable"
        assert verdict.stability == pytest.approx(1.1 / 1.3)

    def test_s_of_a_run_whose_critic_won_by_hand(self) -> None:
        # The rule holds from block 118 to block 399: 282 of the 380 blocks after the warm-up.
        verdict = feed(monitor({}), {"auc/t": jump(low=0.5, high=1.0)}).verdict(STEPS)
        assert verdict.stability == pytest.approx(1 - 0.5 * (400 - 118) / 380)

    def test_two_critics_that_win_at_once_are_counted_once(self) -> None:
        # From block 29 to block 399 at least one of them wins: 371 of 380.
        for s, t in ((1.0, 0.5), (0.5, 1.0), (1.0, 1.0)):
            watch = feed(monitor({}), {"auc/s": np.full(400, s), "auc/t": np.full(400, t)})
            assert watch.stability() == pytest.approx(1 - 0.5 * 371 / 380)

    def test_a_non_finite_value_makes_s_the_share_that_was_run(self) -> None:
        trace = np.ones(400)
        trace[100] = math.nan
        assert cycle_t(trace).verdict(5050).stability == pytest.approx(5001 / STEPS)

    def test_a_run_that_was_stopped_early_is_censored_and_has_no_s(self) -> None:
        verdict = feed(monitor(), dict.fromkeys(TERMS, np.ones(200))).verdict(10_000)
        assert (verdict.kind, verdict.step, verdict.planned, verdict.stability) == ("censored", 10_000, STEPS, None)

    def test_a_censored_run_keeps_what_was_found(self) -> None:
        verdict = feed(monitor({}), {"auc/t": np.ones(200)}).verdict(10_000)
        assert verdict.kind == "censored"
        assert [f.kind for f in verdict.findings] == ["d_wins"]

    def test_a_run_that_diverged_early_is_diverged_and_not_censored(self) -> None:
        assert cycle_t(jump()).verdict(5_700).kind == "diverged"

    def test_divergence_outranks_a_winning_critic_and_both_are_told(self) -> None:
        watch = feed(monitor(), dict.fromkeys(TERMS, jump(at=200)) | {"auc/t": np.ones(400)})
        verdict = watch.verdict(10_700)
        assert verdict.kind == "diverged"
        assert [f.kind for f in verdict.findings] == ["d_wins", "explosion"]
        assert verdict.onset == 204 * BLOCK

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.25])
    @pytest.mark.parametrize("stability", [None, 0.125])
    def test_it_survives_strict_json(self, value: float, stability: float | None) -> None:
        findings = (Finding("d_wins", "auc/t", 5, 9, 1.0, 0.99), Finding("non_finite", "x", 12, 12, value, math.inf))
        verdict = Verdict("diverged", 12, 100, stability, findings)
        text = json.dumps(verdict.to_dict(), allow_nan=False)
        assert str(Verdict.from_dict(json.loads(text))) == str(verdict)  # NaN is not equal to itself
        assert json.loads(text)["onset"] == 12


class TestState:
    @pytest.mark.parametrize("cut", [0, 3, 19, 105, 112, 350])
    def test_a_monitor_saved_and_loaded_anywhere_judges_like_one_that_saw_all(self, cut: int) -> None:
        traces = {name: noisy(k) for k, name in enumerate(TERMS)} | {
            "auc/t": jump(low=0.6, high=1.0),
            "auc/s": jump(at=300, low=0.6, high=1.0),
        }
        traces["loss/cycle_t"] = traces["loss/cycle_t"] * jump(at=330, high=9.0)
        whole = feed(monitor(), traces)
        first, file = feed(monitor(), traces, stop=cut), io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = monitor()
        second.load_state_dict(torch.load(file, weights_only=True))
        feed(second, traces, start=cut)
        assert second.findings == whole.findings
        assert [f.kind for f in whole.findings] == ["d_wins", "d_wins", "explosion"]
        assert second.verdict(STEPS) == whole.verdict(STEPS)
        assert second.state_dict() == whole.state_dict()

    def test_a_state_does_not_follow_the_monitor(self) -> None:
        traces = {name: noisy(k) for k, name in enumerate(TERMS)} | {"auc/t": jump(low=0.6, high=1.0)}
        watch = feed(monitor(), traces, stop=50)
        state = watch.state_dict()
        text = json.dumps(state)
        feed(watch, traces, start=50)
        assert json.dumps(state) == text

    def test_block_means_from_a_record_give_the_verdict_of_the_live_run(self) -> None:
        traces = {name: noisy(k) for k, name in enumerate(TERMS)} | {"auc/t": jump(low=0.6, high=1.0)}
        traces["loss/cycle_s"] = traces["loss/cycle_s"] * jump(at=200, high=5.0)
        rng, live, offline, rows = np.random.default_rng(0), monitor(), monitor(), []
        names, table = list(traces), np.stack(list(traces.values()), axis=1)
        for k in range(400):
            steps = table[k] * rng.uniform(0.9, 1.1, (BLOCK, len(names)))
            rows.append((k * BLOCK + BLOCK, live.observe(k * BLOCK + 1, names, steps)))
        for step, row in json.loads(json.dumps(rows)):
            offline.observe(step, list(row), np.array([list(row.values())]))
        assert told(offline) == told(live) != []
        assert offline.verdict(STEPS) == live.verdict(STEPS)

    def test_observe_gives_the_means_of_the_block(self) -> None:
        means = monitor({}).observe(1, ["a", "b"], np.array([[1, 10], [2, 20], [6, 60]], dtype=np.float32))
        assert means == {"a": 3.0, "b": 30.0}


class TestWhatIsWatched:
    def test_both_cycles_segmentation_and_generator_each_with_its_factor(self) -> None:
        config = RunConfig(monitor=MonitorConfig(cycle_growth=1.4, loss_growth=2.5))
        assert watched(config) == {
            "loss/cycle_s": 1.4, "loss/cycle_t": 1.4, "loss/segmentation": 2.5, "loss/generator": 2.5,
        }  # fmt: skip
        assert counted(config) == ("s", "t", "p", "p_low")

    def test_without_segmentation_losses_neither_they_nor_their_critics_are(self) -> None:
        config = RunConfig().at("loss.segmentation", 0.0)
        assert set(watched(config)) == {"loss/cycle_s", "loss/cycle_t", "loss/generator"}
        assert counted(config) == ("s", "t")

    def test_critics_that_nobody_plays_against_are_not(self) -> None:
        config = RunConfig()
        assert counted(config.at("net.low", False)) == ("s", "t", "p")
        assert counted(config.at("loss.adv_p", 0.0)) == ("s", "t")
        assert counted(config.at("loss.adv_p_low_ratio", 0.0)) == ("s", "t", "p")
        assert counted(config.at("loss.adv_image", 0.0)) == ("p", "p_low")

    def test_for_the_hinge_game_the_critics_margin_stands_in_for_a_loss_that_may_be_negative(self) -> None:
        terms = watched(RunConfig().at("loss.adversarial", "hinge"))
        assert "loss/generator" not in terms
        assert terms["critic/gap_t"] == terms["critic/gap_s"] == 3.0


class TestFirstStudy:
    """The 2022 study's vessel run, read off its published plot (its brain run is left to the calibration)."""

    @pytest.fixture
    def curves(self, real: Path) -> dict[str, np.ndarray]:
        points: dict[str, list[tuple[float, float]]] = {"cycl_a": [], "cycl_b": []}
        with (real / "first_study_losses.csv").open() as file:
            for row in csv.DictReader(file):
                if row["run"] == "vessel" and row["signal"] in points:
                    points[row["signal"]].append((float(row["step"]), (float(row["low"]) + float(row["high"])) / 2))
        steps = np.arange(1, 40_001)
        return {name: np.interp(steps, *np.array(sorted(p)).T) for name, p in points.items()}

    @staticmethod
    def watch(curves: dict[str, np.ndarray], stop: int) -> Monitor:
        watch = Monitor(MonitorConfig(), 40_000, dict.fromkeys(curves, 1.5), ())
        table = np.stack(list(curves.values()), axis=1)
        for first in range(0, stop, BLOCK):
            watch.observe(first + 1, list(curves), table[first : first + BLOCK])
        return watch

    def test_it_diverged_and_the_target_cycle_is_named(self, curves: dict[str, np.ndarray]) -> None:
        (finding,) = self.watch(curves, 40_000).findings
        assert (finding.kind, finding.signal) == ("explosion", "cycl_b")
        assert 13_000 < finding.onset < finding.alarm < 17_000
        assert finding.value > 12

    def test_nothing_was_to_be_found_in_its_first_10_000_steps(self, curves: dict[str, np.ndarray]) -> None:
        watch = self.watch(curves, 10_000)
        assert watch.findings == []
        assert watch.verdict(10_000).kind == "censored"
