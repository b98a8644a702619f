"""Losses against values worked out by hand and against a few lines of numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from equipoise.losses import ADVERSARIAL, cross_entropy, cycle, dice_loss, patch_auc

LOG2 = math.log(2)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def segmentation(classes: int, seed: int = 0) -> tuple[Tensor, Tensor, NDArray[np.float64], NDArray[np.float64]]:
    """Logits and labels, and their probabilities and one-hot labels (B, K, H, W) by numpy."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 3, (2, classes, 6, 5)), rng.integers(0, classes, (2, 6, 5))
    labels[:, :2] = 0  # unbalanced
    e = np.exp(logits)
    g = np.moveaxis(np.eye(classes)[labels], -1, 1)
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels), e / e.sum(1, keepdims=True), g


class TestGames:
    @pytest.mark.parametrize(
        ("name", "critic", "generator"),
        [
            # real (2, .5), fake (0, -1)
            ("lsgan", 0.5 * ((1 + 0.25) / 2 + (0 + 1) / 2), (1 + 4) / 2),
            ("ns", (softplus(-2) + softplus(-0.5)) / 2 + (LOG2 + softplus(-1)) / 2, (LOG2 + softplus(1)) / 2),
            ("hinge", (0 + 0.5) / 2 + (1 + 0) / 2, 0.5),
        ],
    )
    def test_both_sides_have_the_value_worked_out_by_hand(self, name: str, critic: float, generator: float) -> None:
        real, fake = torch.tensor([2.0, 0.5]), torch.tensor([0.0, -1.0])
        assert ADVERSARIAL[name].critic(real, fake).item() == pytest.approx(critic, abs=1e-6)
        assert ADVERSARIAL[name].generator(fake).item() == pytest.approx(generator, abs=1e-6)

    def test_there_are_three_games_and_the_table_cannot_be_changed(self) -> None:
        assert list(ADVERSARIAL) == ["lsgan", "ns", "hinge"]
        with pytest.raises(TypeError):
            ADVERSARIAL["mine"] = ADVERSARIAL["ns"]  # type: ignore[index]

    @pytest.mark.parametrize("name", list(ADVERSARIAL))
    def test_the_two_sides_pull_a_fake_patch_in_opposite_directions(self, name: str) -> None:
        fake = torch.tensor([0.3], requires_grad=True)
        (down,) = torch.autograd.grad(ADVERSARIAL[name].critic(torch.ones(1), fake), fake)
        (up,) = torch.autograd.grad(ADVERSARIAL[name].generator(fake), fake)
        assert down.item() > 0 > up.item()

    @pytest.mark.parametrize("name", list(ADVERSARIAL))
    def test_half_precision_logits_are_averaged_in_float32(self, name: str) -> None:
        fake = torch.linspace(-2, 2, 1001).bfloat16()
        losses = [ADVERSARIAL[name].critic(fake, fake), ADVERSARIAL[name].generator(fake)]
        wide = [ADVERSARIAL[name].critic(fake.float(), fake.float()), ADVERSARIAL[name].generator(fake.float())]
        assert losses == wide
        assert all(x.dtype == torch.float32 for x in losses)

    def test_non_saturating_losses_stay_finite_at_extreme_logits(self) -> None:
        far = torch.tensor([1e4, -1e4])
        assert ADVERSARIAL["ns"].critic(far, far).item() == pytest.approx(1e4)


def test_cycle_is_the_mean_absolute_difference() -> None:
    assert cycle(torch.tensor([[1.0, -1.0], [0.0, 0.5]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])).item() == 3.5 / 4


class TestCrossEntropy:
    @pytest.mark.parametrize("classes", [2, 5])
    def test_it_is_the_references_formula(self, classes: int) -> None:
        logits, labels, p, g = segmentation(classes)
        w = 1 - g.sum((0, 2, 3)) / g.sum()
        want = (-w.reshape(1, -1, 1, 1) * g * np.log(np.clip(p, 0.005, 1))).sum(1).mean()
        assert (p[g == 1] < 0.005).any(), "the clip must matter in this test"
        assert cross_entropy(logits, labels).item() == pytest.approx(want, abs=1e-6)

    def test_two_pixels_by_hand(self) -> None:
        # p = (.5, .5) and (.8, .2); labels 0 and 1: both classes have weight 1/2.
        logits = torch.tensor([[0.0, math.log(4)], [0.0, 0.0]]).view(1, 2, 1, 2)
        want = -0.5 * (math.log(0.5) + math.log(0.2)) / 2
        assert cross_entropy(logits, torch.tensor([[[0, 1]]])).item() == pytest.approx(want, abs=1e-6)

    def test_pixels_below_the_clip_give_exactly_no_gradient(self) -> None:
        # Foreground probabilities of three vessel pixels: .004, .006, .5; and one background pixel.
        p = torch.tensor([0.004, 0.006, 0.5, 0.1])
        logits = torch.stack([(1 - p).log(), p.log()]).view(1, 2, 1, 4).requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([[[1, 1, 1, 0]]])), logits)
        assert (grad[..., 0] == 0).all()
        assert (grad[..., 1:] != 0).all()
        assert grad[0, 1, 0, 1].item() == pytest.approx(-0.25 * (1 - 0.006) / 4, rel=1e-4)  # -w (1 - p) / pixels

    def test_it_never_exceeds_5_3_times_f_times_1_minus_f(self) -> None:
        labels = torch.zeros(1, 10, 10, dtype=torch.int64)
        labels[0, 0, :3] = 1
        worst = torch.stack([labels.float(), 1 - labels.float()], 1) * 100  # certain and wrong everywhere
        f = 0.03
        assert cross_entropy(worst, labels).item() == pytest.approx(2 * f * (1 - f) * -math.log(0.005), rel=1e-5)
        # 2 log 200 is 10.6; if only the vessels are missed half of it is left: 5.3 f (1 - f).
        missed = torch.stack([torch.full((1, 10, 10), 100.0), torch.zeros(1, 10, 10)], 1)
        assert cross_entropy(missed, labels).item() == pytest.approx(5.298 * f * (1 - f), rel=1e-3)

    def test_pytorchs_weighted_cross_entropy_is_another_loss_167_times_larger_at_three_per_mille(self) -> None:
        labels = torch.zeros(1, 100, 100, dtype=torch.int64)
        labels[0, 0, :30] = 1
        logits = torch.randn(1, 2, 100, 100, generator=torch.Generator().manual_seed(0))
        theirs = F.cross_entropy(logits, labels, weight=torch.tensor([0.003, 0.997]))
        ratio = (theirs / cross_entropy(logits, labels, clip=1e-12)).item()
        assert ratio == pytest.approx(1 / (2 * 0.003 * 0.997), rel=1e-4)
        assert round(ratio) == 167

    def test_a_label_that_is_no_class_is_an_error(self) -> None:
        with pytest.raises(RuntimeError, match="out of bounds"):
            cross_entropy(torch.zeros(1, 2, 1, 1), torch.tensor([[[255]]]))


class TestDice:
    @pytest.mark.parametrize("classes", [2, 5])
    def test_it_is_the_references_formula(self, classes: int) -> None:
        logits, labels, p, g = segmentation(classes)
        axes = (0, 2, 3)
        want = 1 - (2 * (p * g).sum(axes) / ((p**2).sum(axes) + g.sum(axes) + 1e-7)).mean()
        assert dice_loss(logits, labels).item() == pytest.approx(want, abs=1e-6)

    def test_perfect_is_0_and_half_probabilities_by_hand(self) -> None:
        labels = torch.tensor([[[0, 1]]])
        sure = torch.tensor([[100.0, 0.0], [0.0, 100.0]]).view(1, 2, 1, 2)
        assert dice_loss(sure, labels).item() == pytest.approx(0, abs=1e-6)
        # per class: 2 * .5 / (2 * .25 + 1) = 2/3
        assert dice_loss(torch.zeros(1, 2, 1, 2), labels).item() == pytest.approx(1 / 3, abs=1e-6)

    def test_it_parks_near_one_half_when_the_vessels_are_never_predicted(self) -> None:
        labels = torch.zeros(1, 32, 32, dtype=torch.int64)
        labels[0, 5, :10] = 1
        background = torch.stack([torch.full((1, 32, 32), 20.0), torch.zeros(1, 32, 32)], 1)
        assert dice_loss(background, labels).item() == pytest.approx(0.5, abs=0.01)


class TestTotals:
    @pytest.mark.parametrize("loss", [cross_entropy, dice_loss])
    def test_halves_of_a_batch_whose_sums_are_joined_give_the_loss_of_the_whole(
        self, loss: Callable[..., Tensor]
    ) -> None:
        logits, labels, _, _ = segmentation(3)
        seen: list[Tensor] = []
        for half in (0, 1):
            loss(logits[half : half + 1], labels[half : half + 1], total=lambda s: seen.append(s) or s)  # type: ignore[func-returns-value]
        assert len(seen) == 2, "one joint sum a loss: each is a round trip between the ranks"
        joint = sum(seen)
        values = [loss(logits[i : i + 1], labels[i : i + 1], total=lambda _: joint) for i in (0, 1)]
        assert torch.stack(values).mean().item() == pytest.approx(loss(logits, labels).item(), abs=1e-6)

    def test_two_ranks_gradients_averaged_are_those_of_the_joined_batch(self) -> None:
        logits, labels, _, _ = segmentation(2)
        whole = logits.clone().requires_grad_()
        (want,) = torch.autograd.grad(dice_loss(whole, labels), whole)
        sums: list[Tensor] = []
        dice_loss(logits[1:], labels[1:], total=lambda s: sums.append(s) or s)  # type: ignore[func-returns-value]

        def total(mine: Tensor) -> Tensor:
            """All-reduce of two ranks: adds the other's sums, and on the way back the other's equal gradient."""
            doubled = 2 * mine - mine.detach()
            return doubled + sums[0]

        mine = logits[:1].clone().requires_grad_()
        (got,) = torch.autograd.grad(dice_loss(mine, labels[:1], total=total), mine)
        torch.testing.assert_close(got / 2, want[:1])


class TestPatchAuc:
    @staticmethod
    def brute(real: Tensor, fake: Tensor) -> float:
        r, f = real.double().numpy().reshape(-1, 1), fake.double().numpy().reshape(1, -1)
        return float((r > f).mean() + 0.5 * (r == f).mean())

    @pytest.mark.parametrize("seed", range(5))
    def test_it_counts_pairs_and_ties_by_half(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        real, fake = (torch.randint(0, 6, shape, generator=g).float() for shape in ((2, 1, 5, 5), (3, 1, 4, 4)))
        auc = patch_auc(real + 0.5 * seed, fake)
        assert auc.shape == ()
        assert auc.dtype == torch.float32
        assert auc.item() == pytest.approx(self.brute(real + 0.5 * seed, fake), abs=1e-6)

    def test_by_hand(self) -> None:
        # 3 > 1, 3 > 2, 2 > 1 win; 2 = 2 ties: 3.5 of 4.
        assert patch_auc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0])).item() == 0.875
        assert patch_auc(torch.ones(3), torch.zeros(2)).item() == 1
        assert patch_auc(torch.zeros(3), torch.ones(2)).item() == 0
        assert patch_auc(torch.ones(3), torch.ones(2)).item() == 0.5

    def test_it_is_exact_at_the_size_of_a_real_batch(self) -> None:
        real, fake = torch.arange(1, 9801.0), torch.arange(9800.0) + 0.5
        assert patch_auc(real, fake).item() == pytest.approx((9800 * 9801 / 2) / 9800**2, abs=1e-7)

    def test_it_does_not_change_under_a_growing_map_of_the_logits(self) -> None:
        g = torch.Generator().manual_seed(0)
        real, fake = torch.randint(-40, 50, (200,), generator=g) / 8, torch.randint(-50, 40, (300,), generator=g) / 8
        want = patch_auc(real, fake)
        assert patch_auc(3 * real + 7, 3 * fake + 7) == want
        assert patch_auc(real.exp(), fake.exp()) == want

    @pytest.mark.parametrize("side", [0, 1])
    def test_nan_on_either_side_gives_nan(self, side: int) -> None:
        logits = [torch.ones(4), torch.zeros(4)]
        logits[side][2] = math.nan
        assert patch_auc(*logits).isnan()

    def test_nothing_to_compare_gives_nan(self) -> None:
        assert patch_auc(torch.ones(0), torch.ones(3)).isnan()

    def test_infinite_logits_are_ranked(self) -> None:
        assert patch_auc(torch.tensor([math.inf, 0.0]), torch.tensor([-math.inf, 0.0])).item() == 0.875

    def test_it_carries_no_gradient_and_takes_views_and_half_precision(self) -> None:
        maps = torch.randn(4, 2, 3, 3, requires_grad=True)
        auc = patch_auc(maps[:, :1].bfloat16(), maps[:, 1:])
        assert not auc.requires_grad
        assert patch_auc(maps[0, 0, :, 0], maps[0, 0, :, 0]).item() == 0.5
