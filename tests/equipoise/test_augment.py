"""Random changes: geometry and grey values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from equipoise.augment import DRAWS, augment, changes, draw, inverse, move, recolour
from equipoise.config import AugmentConfig

CORNERS = [[1.0, 2.0], [3.0, 4.0]]


def one(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows)[None, None]


def way(*, angle: float = 0, scale: float = 1, side: float = 1) -> np.ndarray:
    return inverse(np.radians([angle]), np.array([scale]), np.array([side]))


class TestGeometry:
    """Every case with its label, which has to follow."""

    @pytest.mark.parametrize(
        ("back", "want"),
        [
            (way(), [[1, 2], [3, 4]]),
            (way(angle=90), [[2, 4], [1, 3]]),  # anticlockwise: the upper right corner becomes the upper left one
            (way(angle=-90), [[3, 1], [4, 2]]),
            (way(angle=180), [[4, 3], [2, 1]]),
            (way(side=-1), [[2, 1], [4, 3]]),
            (way(side=-1, angle=90), [[1, 3], [2, 4]]),  # left and right change sides first
        ],
    )
    def test_corners_go_where_a_quarter_turn_or_a_flip_takes_them(
        self, back: np.ndarray, want: list[list[int]]
    ) -> None:
        image, label = move(one(CORNERS), torch.tensor([[[1, 2], [3, 4]]], dtype=torch.uint8), back)
        assert torch.allclose(image[0, 0], torch.tensor(want, dtype=torch.float32), atol=1e-5)
        assert label is not None
        assert label.dtype == torch.uint8
        assert label[0].tolist() == want

    def test_twice_as_large_shows_the_middle_half_and_the_border_goes_on(self) -> None:
        row = [0.0, 4.0, 8.0, 12.0]
        grown, label = move(one([row] * 4), torch.tensor([[[0, 1, 2, 3]] * 4]), way(scale=2))
        # places -.75, -.25, .25, .75 about the centre 1.5: 0.75, 1.25, 1.75, 2.25 on an axis of 4 a pixel
        assert grown[0, 0, 0].tolist() == pytest.approx([3, 5, 7, 9])
        assert label is not None
        assert label[0, 0].tolist() == [1, 1, 2, 2]
        shrunk, label = move(one([row] * 4), torch.tensor([[[0, 1, 2, 3]] * 4]), way(scale=0.5))
        # -3, -1, 1, 3 about 1.5: -1.5 and 4.5 lie outside, where the border's value goes on
        assert shrunk[0, 0, 0].tolist() == pytest.approx([0, 2, 10, 12])
        assert label is not None
        assert label[0, 0, 0].item() == 0
        assert label[0, 0, 3].item() == 3

    def test_neighbouring_slices_move_as_one(self) -> None:
        stack = torch.cat([one(CORNERS), 10 * one(CORNERS), 100 * one(CORNERS)], dim=1)
        moved, _ = move(stack, None, way(angle=90))
        assert torch.allclose(moved[0, 1], 10 * moved[0, 0], atol=1e-3)
        assert torch.allclose(moved[0, 2], 100 * moved[0, 0], atol=1e-2)

    def test_a_disc_of_label_stays_on_its_disc_of_image(self) -> None:
        y, x = np.mgrid[:64, :64]
        disc = torch.from_numpy((np.hypot(y - 20, x - 40) < 8).astype(np.float32))
        for number in range(5):
            config = AugmentConfig(rotation_degrees=180, scale=0.3, flip=0.5)
            image, label = augment(disc[None, None], disc[None].byte(), config, draw((number,), 1))
            assert label is not None
            inside = label[0].bool()
            assert inside.sum() > 60
            assert ((image[0, 0] > 0.5) != inside).sum() < 0.1 * inside.sum(), "but for the disc's rim"


class TestGrey:
    @pytest.mark.parametrize(
        ("gamma", "gain", "shift", "want"),
        [
            (1, 1, 0, [-1, 0, 1]),
            (1, 1.5, 0, [-1, 0.5, 1]),  # 2 * 1.5 * .5 - 1; the brightest is clipped
            (1, 0.5, 0, [-1, -0.5, 0]),
            (1, 1, 0.25, [-0.75, 0.25, 1]),
            (2, 1, 0, [-1, -0.5, 1]),  # .5 squared is .25
            (2, 0.5, -0.25, [-1, -1, -0.25]),  # 2 * .5 * .25 - 1 - .25 = -1.0: after the power, before the clip
        ],
    )
    def test_values_by_hand(self, gamma: float, gain: float, shift: float, want: list[float]) -> None:
        got = recolour(one([[-1, 0, 1]]), np.array([gamma]), np.array([gain]), np.array([shift]))
        assert got.flatten().tolist() == pytest.approx(want)

    def test_values_beyond_the_range_are_clipped_before_they_are_raised_to_a_power(self) -> None:
        got = recolour(one([[-3, 3]]), np.array([0.5]), np.array([1.0]), np.array([0.0]))
        assert got.flatten().tolist() == [-1, 1]


class TestDraws:
    def test_extremes_of_each_setting_are_reached_and_not_passed(self) -> None:
        config = AugmentConfig(rotation_degrees=30, scale=0.25, flip=0.5, gamma=1, gain=0.5, shift=0.2)
        low, high = changes(config, np.zeros((1, DRAWS))), changes(config, np.full((1, DRAWS), 1 - 1e-12))
        # angle -30, scale 1 / 1.25, flipped; the way back has cos(30) / scale and sin(30) / scale
        assert low.inverse[0] == pytest.approx(inverse(np.radians([-30]), np.array([0.8]), np.array([-1.0]))[0])
        assert high.inverse[0] == pytest.approx(inverse(np.radians([30]), np.array([1.25]), np.array([1.0]))[0])
        assert (low.gamma[0], low.gain[0], low.shift[0]) == pytest.approx((0.5, 0.5, -0.2))
        assert (high.gamma[0], high.gain[0], high.shift[0]) == pytest.approx((2, 1.5, 0.2))

    def test_half_of_the_slices_are_flipped_at_probability_one_half(self) -> None:
        back = changes(AugmentConfig(flip=0.5), draw((1,), 4000)).inverse
        assert np.mean(np.linalg.det(back) < 0) == pytest.approx(0.5, abs=0.03)

    def test_switched_off_it_gives_the_very_tensors_back(self) -> None:
        image, label = torch.rand(3, 1, 8, 8) * 4 - 2, torch.zeros(3, 8, 8)
        got = augment(image, label, AugmentConfig(), draw((0,), 3))
        assert got[0] is image
        assert got[1] is label

    def test_each_setting_alone_changes_something(self) -> None:
        image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        settings = {"rotation_degrees": 10.0, "scale": 0.2, "flip": 1.0, "gamma": 0.3, "gain": 0.2, "shift": 0.1}
        assert set(settings) == set(AugmentConfig().flat())
        for name, value in settings.items():
            config = AugmentConfig(**{name: value})
            assert (augment(image, None, config, draw((0,), 2))[0] - image).abs().max() > 0.01, name

    def test_a_slice_is_changed_alike_whatever_lies_beside_it(self) -> None:
        config = AugmentConfig(rotation_degrees=20, scale=0.2, flip=0.5, gamma=0.3, gain=0.2, shift=0.1)
        image = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        uniform = draw((7, 5), 5)
        together, _ = augment(image, None, config, uniform)
        for k in range(5):
            alone, _ = augment(image[k : k + 1], None, config, uniform[k : k + 1])
            assert torch.equal(alone, together[k : k + 1])
