"""The loop: exact continuation, evaluations that disturb nothing, divergence as a result."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise import checkpoint, train
from equipoise.batches import Cohort
from equipoise.checkpoint import State
from equipoise.config import DEFECTS, PRESETS, RunConfig
from equipoise.config_base import Leaf
from equipoise.ranks import Ranks
from equipoise.step import Batch, Signals
from equipoise.train import Progress, Run, fit
from slicestore.errors import InputError
from slicestore.store import Store

CPU = torch.device("cpu")
QUALITY = {f"quality/{mean}{domain}_dice" for mean in ("", "ema_") for domain in ("translated", "target")}
VALIDATORS = {f"validator/{name}" for name in ("entropy", "information", "nuclear", "volume")}
LOOKS = ("quality/", "validator/", "probe/")


def stopped(config: RunConfig, cohort: Cohort, step: int) -> State:
    """The state at `step` of a run that goes no further."""
    for progress in fit(config, cohort):
        if progress.step == step:
            return progress.state()
    raise AssertionError(f"the run never came to {step}")


def assert_identical(one: Any, other: Any) -> None:
    """Bit for bit, through nested dictionaries and lists."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_identical(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_identical(a, b)
    else:
        assert one == other or (one != one and other != other)


@pytest.fixture(scope="module")
def straight(tiny: RunConfig, cohort: Cohort) -> list[Progress]:
    """Eight steps in one go."""
    return list(fit(tiny, cohort))


class TestContinuation:
    def test_4_steps_and_4_more_are_8_straight_signal_for_signal_and_bit_for_bit(
        self, tiny: RunConfig, cohort: Cohort, straight: list[Progress]
    ) -> None:
        resumed = list(fit(tiny, cohort, resume=stopped(tiny, cohort, 4)))
        assert [p.step for p in resumed] == [5, 6, 7, 8]
        assert [p.signals for p in resumed] == [p.signals for p in straight[4:]]
        assert_identical(resumed[-1].state(), straight[-1].state())
        assert resumed[-1].verdict == straight[-1].verdict

    @pytest.mark.parametrize("step", [1, 5])
    def test_it_holds_at_any_step_and_through_the_disk(
        self, tiny: RunConfig, cohort: Cohort, straight: list[Progress], tmp_path: Path, step: int
    ) -> None:
        checkpoint.save(tmp_path, step, stopped(tiny, cohort, step), Ranks())
        torch.manual_seed(1234)
        found = checkpoint.latest(tmp_path)
        assert found is not None
        resumed = list(fit(tiny, cohort, resume=checkpoint.load(found, 0)))
        assert [p.signals for p in resumed] == [p.signals for p in straight[step:]]
        assert_identical(resumed[-1].state(), straight[-1].state())

    def test_pools_have_swapped_and_dropout_has_drawn_where_this_is_shown(
        self, tiny: RunConfig, cohort: Cohort, straight: list[Progress]
    ) -> None:
        own = straight[-1].state().own
        first = stopped(tiny, cohort, 4).own
        for before, after in zip(first["pools"], own["pools"], strict=True):
            assert len(before["images"]) == 2, "the pool is full at the cut"
            assert not torch.equal(before["generator"], after["generator"])
        assert any(not torch.equal(a["images"], b["images"]) for a, b in zip(first["pools"], own["pools"], strict=True))
        assert not torch.equal(first["rng"], own["rng"])

    def test_leaving_out_any_part_of_the_state_is_noticed(
        self, tiny: RunConfig, cohort: Cohort, straight: list[Progress]
    ) -> None:
        """The comparison above would see a state that lacks pools, random numbers, statistics or moments."""
        saved, fresh = stopped(tiny, cohort, 4), train.Run.start(tiny, CPU, Ranks()).state()
        for part in ("rng", "pools"):
            lame = copy.deepcopy(saved)
            lame.own[part] = fresh.own[part]
            assert [p.signals for p in fit(tiny, cohort, resume=lame)] != [p.signals for p in straight[4:]], part
        lame = copy.deepcopy(saved)
        lame.shared["players"] = fresh.shared["players"]
        assert [p.signals for p in fit(tiny, cohort, resume=lame)] != [p.signals for p in straight[4:]]

    def test_a_state_is_a_copy_that_does_not_follow_the_run(
        self, tiny: RunConfig, cohort: Cohort, straight: list[Progress]
    ) -> None:
        states = {p.step: p.state() for p in fit(tiny, cohort)}
        resumed = list(fit(tiny, cohort, resume=states[4]))
        assert [p.signals for p in resumed] == [p.signals for p in straight[4:]]

    def test_a_state_can_be_continued_twice(self, tiny: RunConfig, cohort: Cohort, straight: list[Progress]) -> None:
        state = copy.deepcopy(stopped(tiny, cohort, 4))
        for _ in range(2):
            assert [p.signals for p in fit(tiny, cohort, resume=state)] == [p.signals for p in straight[4:]]

    def test_the_same_config_gives_the_same_numbers_and_another_seed_others(
        self, tiny: RunConfig, cohort: Cohort, straight: list[Progress]
    ) -> None:
        torch.manual_seed(4321)
        again = [p.signals for p in fit(tiny, cohort)]
        assert again == [p.signals for p in straight]
        assert next(p.signals for p in fit(tiny.at("seed", 1), cohort)) != again[0]


class TestEvaluations:
    @pytest.mark.parametrize("evaluations", [1, 8])
    def test_how_often_a_run_is_looked_at_does_not_change_its_numbers(
        self, tiny: RunConfig, cohort: Cohort, straight: list[Progress], evaluations: int
    ) -> None:
        other = list(fit(tiny.at("evaluations", evaluations), cohort))
        assert sum(p.looked for p in other) == evaluations
        for a, b in zip(other, straight, strict=True):
            assert {k: v for k, v in a.signals.items() if not k.startswith(LOOKS)} == {
                k: v for k, v in b.signals.items() if not k.startswith(LOOKS)
            }
        states = [told[-1].state() for told in (other, straight)]
        for state in states:
            del state.shared["monitor"]  # which remembers every look
        assert_identical(*states)

    def test_they_are_evenly_spaced_and_bring_dice_and_pictures(self, straight: list[Progress]) -> None:
        assert [p.step for p in straight] == list(range(1, 9))
        assert [p.step for p in straight if p.looked] == [4, 8]
        for p in straight:
            assert (p.panels is not None) == p.looked
            assert (p.signals.keys() >= QUALITY) == p.looked

    def test_they_bring_what_needs_no_target_label_and_of_averaged_weights_the_composite_alone(
        self, straight: list[Progress]
    ) -> None:
        composites = {"quality/composite", "quality/ema_composite"}
        for p in straight:
            assert {name for name in p.signals if "composite" in name} == (composites if p.looked else set())
            assert {name for name in p.signals if "validator" in name} == (VALIDATORS if p.looked else set())

    def test_the_last_progress_and_no_other_carries_the_verdict(self, straight: list[Progress]) -> None:
        assert [p.verdict is not None for p in straight] == [False] * 7 + [True]
        verdict = straight[-1].verdict
        assert verdict is not None
        assert (verdict.kind, verdict.step, verdict.planned) == ("stable", 8, 8)

    def test_more_evaluations_than_steps_look_at_every_step(self, tiny: RunConfig, cohort: Cohort) -> None:
        assert [p.looked for p in fit(tiny.at("evaluations", 100).at("steps", 3), cohort)] == [True] * 3


class TestBlocks:
    def test_a_progress_is_a_block_and_its_signals_are_means_over_its_steps(
        self, tiny: RunConfig, cohort: Cohort
    ) -> None:
        def first(steps: int, count: int) -> list[Progress]:
            return list(itertools.islice(fit(tiny.at("steps", steps).at("evaluations", 1), cohort), count))

        single, triple = first(400, 6), first(1200, 2)  # blocks of 1 and of 3 steps; the planned length alters no step
        assert [p.step for p in triple] == [3, 6]
        for k, block in enumerate(triple):
            parts = [p.signals for p in single[3 * k : 3 * k + 3]]
            means = {n: sum(p[n] for p in parts) / 3 for n in parts[0]}
            means["weights/norm"] = parts[-1]["weights/norm"]  # as the block left them
            assert block.signals == pytest.approx(means, rel=1e-5)

    def test_a_last_block_may_be_shorter(self, cohort: Cohort, tiny: RunConfig, monkeypatch: Any) -> None:
        monkeypatch.setattr(Run, "update", lambda run, batch: {"loss/x": torch.zeros(())})
        monkeypatch.setattr(train, "watched", lambda _: {"loss/x": 2.0})
        steps = [p.step for p in fit(tiny.at("steps", 802), cohort)]
        assert steps[-2:] == [800, 802]


class TestRates:
    def test_every_player_trains_at_its_own_rate_times_the_factor(self, tiny: RunConfig, cohort: Cohort) -> None:
        config = (
            tiny.at("optim.schedule", "linear_half")
            .at("optim.lr_critic_ratio", 2.0)
            .at("optim.lr_segmenter_ratio", 3.0)
        )
        for resume in (None, stopped(config, cohort, 6)):
            *_, last = fit(config, cohort, resume=resume)
            players = last.state().shared["players"]
            rates = {name: player["param_groups"][0]["lr"] for name, player in players.items()}
            critics = dict.fromkeys(("critic_t", "critic_s", "critic_p", "critic_p_low"), 5e-4)
            assert rates == pytest.approx({"generator": 2.5e-4, "decoder": 2.5e-4, "segmenter": 7.5e-4, **critics})


class TestDivergence:
    @staticmethod
    def plant(monkeypatch: pytest.MonkeyPatch, at: int, value: float = math.nan) -> None:
        """Poison one weight of G just before step `at`."""
        steps, update = itertools.count(1), Run.update

        def poisoned(run: Run, batch: Batch) -> Signals:
            if next(steps) == at:
                next(iter(run.net.generator.parameters())).data[0, 0, 0, 0] = value
            return update(run, batch)

        monkeypatch.setattr(Run, "update", poisoned)

    @pytest.mark.parametrize("at", [1, 3, 8])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_weight_that_is_no_number_ends_the_run_with_a_verdict_that_names_the_step(
        self, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch, at: int, value: float
    ) -> None:
        self.plant(monkeypatch, at, value)
        told = list(fit(tiny, cohort))
        assert [p.step for p in told] == list(range(1, at + 1))
        last = told[-1]
        assert last.verdict is not None
        assert (last.verdict.kind, last.verdict.onset, last.verdict.step) == ("diverged", at, at)
        assert [f.kind for f in last.verdict.findings] == ["non_finite"]
        assert last.looked
        assert last.panels is not None
        assert last.signals.keys() >= QUALITY
        assert math.isnan(last.signals["loss/generator"]), "a NaN is recorded as it is"

    def test_inside_a_block_the_very_step_is_named_and_the_block_ends_the_run(
        self, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.plant(monkeypatch, 5)
        told = list(fit(tiny.at("steps", 1600).at("evaluations", 1), cohort))  # blocks of 4
        assert [p.step for p in told] == [4, 8]
        assert told[-1].verdict is not None
        assert told[-1].verdict.onset == 5
        assert told[-1].verdict.stability == pytest.approx(5 / 1600)

    def test_a_gradient_that_is_no_number_is_found_at_its_step_though_the_losses_are_finite(
        self, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps, update = itertools.count(1), Run.update

        def poisoned(run: Run, batch: Batch) -> Signals:
            if next(steps) == 2:
                next(iter(run.net.critic_p.parameters())).register_hook(lambda gradient: gradient * math.nan)
            return update(run, batch)

        monkeypatch.setattr(Run, "update", poisoned)
        *_, last = fit(tiny, cohort)
        assert last.verdict is not None
        (finding,) = last.verdict.findings
        assert (finding.signal, finding.onset) == ("grad/critic", 2)

    def test_a_run_that_is_resumed_after_it_diverged_trains_no_further(
        self, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.plant(monkeypatch, 3)
        *_, last = fit(tiny, cohort)
        monkeypatch.undo()
        assert all(p.step == 3 for p in fit(tiny, cohort, resume=last.state()))


class TestMemory:
    """A device that holds `most` slices a step."""

    @staticmethod
    def fill(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        update = Run.update

        def limited(run: Run, batch: Batch) -> Signals:
            if len(batch.source) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return update(run, batch)

        monkeypatch.setattr(Run, "update", limited)

    @pytest.mark.parametrize(("most", "fits"), [(5, 4), (2, 2)])
    def test_too_large_a_batch_is_told_with_one_that_fits(
        self, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch, most: int, fits: int
    ) -> None:
        self.fill(monkeypatch, most)
        with pytest.raises(InputError, match="8 slices") as error:
            list(fit(tiny.at("batch", 8), cohort))
        assert f"set batch to {fits}" in error.value.remedy

    def test_where_not_even_the_smallest_fits_that_is_said(
        self, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fill(monkeypatch, 1)
        with pytest.raises(InputError) as error:
            list(fit(tiny, cohort))
        assert "set batch" not in error.value.remedy
        assert "bfloat16" in error.value.remedy

    def test_another_error_is_left_alone(
        self, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(run: Run, batch: Batch) -> Signals:
            raise RuntimeError("a bug")

        monkeypatch.setattr(Run, "update", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            list(fit(tiny, cohort))


@pytest.mark.parametrize("updates", ["fused", "sequential"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_in_either_schedule(updates: str, preset: str, tiny: RunConfig, store: Any) -> None:
    config = PRESETS[preset].at("updates", updates).at("steps", 2).at("batch", 2).at("evaluations", 1)
    config = config.at("net.width", 0.0625).at("data.cohort", store.fingerprint)
    *_, last = fit(config, Cohort(store, config, CPU))
    assert last.verdict is not None
    assert last.verdict.kind == "stable"
    assert all(math.isfinite(value) for value in last.signals.values())
    assert ("loss/seg_low" in last.signals) == config.net.low


SWITCHES: dict[str, Mapping[str, Leaf]] = {
    "no C2": {"net.low": False},
    "finer head": {"net.head_stride": 2},
    "norms by domain": {"net.encoder_norm": "batch_per_domain"},
    "group norm": {"net.encoder_norm": "group"},
    "softmax seen": {"loss.critic_p_sees": "softmax"},
    "vessel losses": {"loss.overlap": "focal_tversky", "loss.cross_entropy": "balanced", "loss.cldice": 0.5},
    "other targets": {"loss.lsgan_fake": -1.0, "loss.lsgan_wanted": 0.0},
    "pool of images": {"pool_by": "image"},
    "critics with biases": {"net.critic_bias": True},
    "relativistic averages": {"loss.adversarial": "ra_lsgan"},
    "R3GAN": {"loss.adversarial": "rp", "critic.penalty": "r1r2", "optim.beta1": 0.0},
    "WGAN-GP": {"loss.adversarial": "wgan_gp", "critic.penalty": "gp", "critic.gamma": 10.0},
    "hinge, spectral": {"loss.adversarial": "hinge", "net.critic_norm": "spectral", "optim.lr_critic_ratio": 4.0},
    "both norms": {"net.critic_norm": "both"},
    "short and narrow critics": {"net.critic_layers": 2, "net.critic_channels": 32},
    "smoothed labels": {"loss.adversarial": "ns", "critic.smoothing": 0.1},
    "lazy R1": {"critic.penalty": "r1", "critic.penalty_every": 2},
    "penalty on mixtures": {"critic.penalty": "gp0_mix", "critic.gamma": 0.5},
    "instance noise": {"critic.noise": 0.1},
    "shifts and holes": {"critic.translation": 0.125, "critic.cutout": 0.5},
    "LeCam": {"critic.lecam": 0.1},
    "identity": {"loss.identity": 5.0},
    "clipped": {"optim.clip": 1e-3},
    "cosine": {"optim.schedule": "cosine"},
    "warm-up": {"loss.adv_p_warmup": 0.5},
    "no running mean": {"optim.ema": 0.0},
    "weighed": {"balance.every": 2},
    "calibrated": {"balance.mode": "calibrated", "balance.every": 1, "balance.calibration_steps": 2},
    "ratios": {"balance.mode": "grad_ratio", "balance.every": 1},
    "grey frame": {"data.frame": 8},
} | {name: setting for name, setting in DEFECTS.items() if all(path.startswith("net.") for path in setting)}


@pytest.fixture(scope="module")
def plain(tiny: RunConfig, cohort: Cohort) -> list[Progress]:
    """Four steps without any switch."""
    return list(fit(tiny.at("steps", 4), cohort))


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_trains_and_continues_bit_for_bit(
    switch: str, tiny: RunConfig, cohort: Cohort, store: Store, plain: list[Progress]
) -> None:
    config = tiny.at("steps", 4).having(SWITCHES[switch])
    cohort = Cohort(store, config, CPU) if config.data != tiny.data else cohort
    whole = list(fit(config, cohort))
    resumed = list(fit(config, cohort, resume=stopped(config, cohort, 2)))
    assert [p.signals for p in resumed] == [p.signals for p in whole[2:]]
    assert all(math.isfinite(v) for p in whole for v in p.signals.values())
    ours, theirs = whole[-1].state().shared["net"], plain[-1].state().shared["net"]
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not same or [p.signals for p in whole] != [p.signals for p in plain], "the switch changes something"


def test_three_classes_train_too(store_of_three: Any, tiny: RunConfig) -> None:
    config = tiny.at("net.classes", 3).at("steps", 2)
    *_, last = fit(config, Cohort(store_of_three, config, CPU))
    assert last.verdict is not None
    assert last.verdict.kind == "stable"
    assert last.panels is not None
    assert last.panels.masks["y_s"].max() == 2
