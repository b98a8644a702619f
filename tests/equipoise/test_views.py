"""What critics of images see: noise of the right size, shifts and holes at their places, and gradients through them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from equipoise.config_game import CriticConfig
from equipoise.views import EMPTY, view

OFF = torch.tensor(0.0)
NOISY, SHIFTED, CUT = CriticConfig(noise=0.3), CriticConfig(translation=0.125), CriticConfig(cutout=0.5)
ALL = CriticConfig(noise=0.3, translation=0.125, cutout=0.5)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def drawings(batch: int, height: int = 16, width: int = 24, channels: int = 1) -> Tensor:
    """Images (B, C, H, W) whose pixels all differ and lie in [0, 1), so that none looks empty."""
    return torch.rand(batch, channels, height, width)


def shift_of(image: Tensor, seen: Tensor) -> tuple[int, int]:
    """By how many pixels (C, H, W) was moved down and right, from where its pixels are found again."""
    height, width = image.shape[1:]
    found = []
    for down in range(-height + 1, height):
        for right in range(-width + 1, width):
            rows, columns = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
            want = torch.full_like(image, EMPTY)
            back = slice(max(-down, 0), height + min(-down, 0)), slice(max(-right, 0), width + min(-right, 0))
            want[:, rows, columns] = image[:, back[0], back[1]]
            if torch.equal(want, seen):
                found.append((down, right))
    assert len(found) == 1
    return found[0]


class TestOff:
    def test_the_image_itself_is_returned(self) -> None:
        image = drawings(2)
        assert view(image, torch.tensor(math.nan), CriticConfig()) is image

    def test_and_no_random_number_is_drawn(self) -> None:
        before = torch.get_rng_state()
        view(drawings(0), OFF, CriticConfig())
        assert torch.equal(torch.get_rng_state(), before)


class TestNoise:
    def test_it_has_mean_0_and_the_deviation_asked_for_now_not_that_of_the_start(self) -> None:
        image = drawings(4, 128, 128, channels=3)
        for sigma in (0.05, 0.3):
            noise = view(image, torch.tensor(sigma), NOISY) - image
            assert noise.mean().item() == pytest.approx(0, abs=5 * sigma / math.sqrt(noise.numel()))
            assert noise.std().item() == pytest.approx(sigma, rel=0.01)
            assert noise.abs().max() > 3.5 * sigma, "a bell, not a box"

    def test_it_differs_between_pixels_channels_images_and_calls(self) -> None:
        image, sigma = drawings(2, 64, 64, channels=3), torch.tensor(1.0)
        noise, later = (view(image, sigma, NOISY) - image for _ in range(2))
        for one, other in (
            (noise[0], noise[1]),
            (noise[:, 0], noise[:, 1]),
            (noise[..., 1:], noise[..., :-1]),
            (noise, later),
        ):
            together = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
            assert abs(together) < 0.1

    def test_at_a_deviation_of_0_nothing_changes(self) -> None:
        image = drawings(2)
        assert torch.equal(view(image, OFF, NOISY), image)

    def test_gradients_pass_unchanged(self) -> None:
        image = drawings(2).requires_grad_()
        view(image, torch.tensor(0.3), NOISY).sum().backward()
        assert image.grad is not None
        assert (image.grad == 1).all()


class TestTranslation:
    def test_an_image_is_moved_whole_and_what_it_uncovers_is_air(self) -> None:
        image = drawings(12, 16, 24, channels=3)  # up to 2 pixels down and 3 right, either way; slices together
        seen = view(image, OFF, SHIFTED)
        shifts = [shift_of(one, other) for one, other in zip(image, seen, strict=True)]
        assert len(set(shifts)) > 6, "each image by its own shift"
        assert {abs(down) for down, _ in shifts} == {0, 1, 2}
        assert max(abs(right) for _, right in shifts) == 3

    def test_every_shift_is_equally_likely(self) -> None:
        image = torch.full((7000, 1, 16, 24), EMPTY)
        image[:, 0, 8, 12] = 0.5
        seen = view(image, OFF, SHIFTED)
        where = (seen[:, 0] == 0.5).nonzero()
        assert len(where) == 7000, "the pixel stays inside"
        counts = torch.bincount((where[:, 1] - 6) * 7 + where[:, 2] - 9, minlength=35)
        assert len(counts) == 35
        assert counts.float().mean() == 200
        assert ((counts - 200).float().square() / 200).sum() < 70, "chi-squared of 34, of which 70 is beyond .9997"

    @pytest.mark.parametrize("side", [4, 8, 13, 48, 64, 100, 256, 352])
    @pytest.mark.parametrize("share", [0.1, 0.125, 0.5])
    def test_the_largest_draw_is_the_largest_shift_and_none_beyond(
        self, monkeypatch: pytest.MonkeyPatch, side: int, share: float
    ) -> None:
        monkeypatch.setattr(torch, "rand", lambda *size, device: torch.full(size, 1 - 2**-24, device=device))
        image = torch.arange(side * side).float().view(1, 1, side, side) / side**2
        seen, most = view(image, OFF, CriticConfig(translation=share))[0, 0], round(share * side)
        assert torch.equal(seen[most:, most:], image[0, 0, : side - most, : side - most])
        assert (seen[:most] == EMPTY).all()
        assert (seen[:, :most] == EMPTY).all()


class TestCutout:
    def test_a_square_is_cut_out_and_the_rest_is_the_image_bit_for_bit(self) -> None:
        image = drawings(200, 16, 24, channels=3)
        seen = view(image, OFF, CUT)
        gone = seen == EMPTY
        assert torch.equal(seen[~gone], image[~gone])
        assert (gone[:, 0] == gone[:, 1]).all(), "through all slices"
        heights, widths = gone[:, 0].any(2).sum(1), gone[:, 0].any(1).sum(1)
        assert torch.equal(heights * widths, gone[:, 0].sum((1, 2))), "a rectangle without gaps"
        assert (int(heights.min()), int(heights.max())) == (4, 8), "half of it hangs over at the utmost"
        assert (int(widths.min()), int(widths.max())) == (6, 12)

    @pytest.mark.parametrize("side", [15, 16])
    @pytest.mark.parametrize("share", [0.3, 0.5])
    def test_its_centre_is_equally_likely_everywhere(self, side: int, share: float) -> None:
        gone = (view(torch.zeros(20_000, 1, side, side), OFF, CriticConfig(cutout=share)) == EMPTY)[:, 0]
        length = round(share * side)
        # Of the places of a square of 2 h (or 2 h + 1) pixels, side + 1 (or side), those that cover pixel i.
        first = torch.arange(side + 1 - length % 2) - length // 2
        want = torch.stack([((first <= i) & (i < first + length)).float().mean() for i in range(side)])
        for axis in (1, 2):
            torch.testing.assert_close(gone.any(3 - axis).float().mean(0), want, atol=0.02, rtol=0)

    def test_a_square_as_large_as_the_image_leaves_three_quarters_at_the_utmost(self) -> None:
        seen = view(torch.zeros(500, 1, 16, 16), OFF, CriticConfig(cutout=1.0))
        left = (seen != EMPTY).float().mean((1, 2, 3))
        assert left.max() == 0.75
        assert left.min() == 0


class TestAll:
    def test_holes_are_empty_after_noise_and_shift(self) -> None:
        seen = view(drawings(50), torch.tensor(0.3), ALL)
        holes = (seen == EMPTY).float().mean((1, 2, 3))
        assert holes.min() >= 4 * 6 / (16 * 24)
        assert holes.max() <= 1 - (14 * 21 - 8 * 12) / (16 * 24)

    def test_grey_values_that_stay_are_the_images_own_so_that_contrast_tells_domains_apart(self) -> None:
        image = drawings(20)
        seen = view(image, OFF, CriticConfig(translation=0.125, cutout=0.5))
        for one, other in zip(image, seen, strict=True):
            assert torch.isin(other[other != EMPTY], one).all()

    def test_gradients_go_to_the_pixels_that_are_seen_where_they_came_from(self) -> None:
        image = drawings(3, 8, 8, channels=2).double().requires_grad_()
        torch.manual_seed(4)
        seen = view(image, torch.tensor(0.1), ALL)
        state, weight = torch.get_rng_state(), torch.randn_like(seen)
        (got,) = torch.autograd.grad((weight * seen).sum(), image)
        assert (got != 0).sum() == (seen != EMPTY).sum()

        def again(image: Tensor) -> Tensor:
            torch.manual_seed(4)
            return view(image, torch.tensor(0.1), ALL)

        assert torch.autograd.gradcheck(again, image, fast_mode=True)
        assert torch.autograd.gradgradcheck(again, image, fast_mode=True)
        torch.set_rng_state(state)
        assert not torch.equal(view(image, torch.tensor(0.1), ALL), seen), "anew at each call"

    def test_shape_type_and_image_stay_and_a_nan_is_not_hidden(self) -> None:
        image = drawings(2).bfloat16()
        before = image.clone()
        seen = view(image, torch.tensor(0.3), ALL)
        assert (seen.shape, seen.dtype) == (image.shape, torch.bfloat16)
        assert torch.equal(image, before)
        image[:, 0, 8, 12] = math.nan
        assert view(image, torch.tensor(0.3), CriticConfig(noise=0.3, translation=0.125)).isnan().sum() == 2

    def test_it_needs_no_look_at_data_on_the_way(self) -> None:
        # Tensors without values: what asks for one, in a branch, a size or by `item`, is an error.
        image = drawings(2).to("meta").requires_grad_()
        seen = view(image, OFF.to("meta"), ALL)
        assert torch.autograd.grad(seen.sum(), image)[0].shape == image.shape
