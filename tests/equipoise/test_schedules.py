"""Rates and weights by the step, against v1's published numbers."""

from __future__ import annotations

import pytest

from equipoise.config import PUBLISHED, V1
from equipoise.schedules import idle_steps, rates


def test_v2_changes_nothing_while_it_trains() -> None:
    assert {rates(PUBLISHED, n, 10) for n in (1, 9_999, 20_000)} == {(1.0, 1.0, 1.0, 0.0)}


def test_v1_lets_the_game_of_predictions_in_at_epoch_5_and_whole_at_epoch_7() -> None:
    # epochs of 10 steps, counted from 0: epoch 4 ends with step 50
    weights = [rates(V1, n, 10).predictions for n in (1, 50, 51, 60, 61, 70, 71, 20_000)]
    assert weights == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert V1.loss.adv_p == 0.1


def test_v1_s_segmenter_starts_at_1e_3_and_loses_a_tenth_every_other_epoch() -> None:
    initial = V1.optim.lr * V1.optim.lr_segmenter_ratio
    assert initial == pytest.approx(1e-3)
    now = [initial * rates(V1, n, 10).segmenter for n in (1, 20, 21, 40, 41, 61)]
    assert now == pytest.approx([1e-3, 1e-3, 9e-4, 9e-4, 8.1e-4, 7.29e-4])
    assert rates(V1, 61, 10).images == 1.0


def test_a_linear_half_falls_to_a_last_step_above_0_for_everybody() -> None:
    config = PUBLISHED.at("steps", 8).at("optim.schedule", "linear_half").at("optim.segmenter_decay", 0.5)
    assert [rates(config, n, 8).images for n in range(1, 9)] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [rates(config, n, 1).segmenter for n in (1, 3, 6)] == [1, 0.5, 0.75 * 0.25]
    assert rates(config.at("steps", 1), 1, 8).images == 1


def test_a_game_that_starts_and_is_whole_at_the_same_epoch_comes_at_once() -> None:
    config = PUBLISHED.at("loss.adv_p_full_epoch", 3).at("loss.adv_p_from_epoch", 3)
    assert [rates(config, n, 5).predictions for n in (15, 16)] == [0, 1]


def test_a_cosine_falls_from_the_whole_rate_along_half_a_wave() -> None:
    config = PUBLISHED.having({"steps": 4, "optim.schedule": "cosine"})
    half = 0.5**0.5
    assert [rates(config, n, 8).images for n in (1, 2, 3, 4)] == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_the_game_of_predictions_warms_up_over_a_share_of_the_run() -> None:
    config = PUBLISHED.having({"steps": 100, "loss.adv_p_warmup": 0.1})
    assert [rates(config, n, 7).predictions for n in (1, 5, 10, 11, 100)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert idle_steps(config, 7) == 10
    assert idle_steps(V1, 7) == 35
    assert idle_steps(PUBLISHED, 7) == 0


def test_instance_noise_falls_linearly_to_none() -> None:
    config = PUBLISHED.having({"steps": 100, "critic.noise": 0.2})
    assert [rates(config, n, 7).noise for n in (1, 26, 51, 100)] == pytest.approx([0.2, 0.1, 0, 0])
    assert rates(config.at("critic.noise_until", 1.0), 51, 7).noise == pytest.approx(0.1)
    assert rates(config.at("critic.noise_until", 0.0), 1, 7).noise == 0
