"""Losses against values worked out by hand, against a few lines of numpy, and on two real processes against one.

This file is also the program that each rank runs (`python test_losses.py RANK FOLDER`): it leaves what it found in
`rank-R.pt`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from equipoise.centrelines import soft_skeleton
from equipoise.config import LossConfig
from equipoise.losses import (
    cldice_loss,
    cross_entropy,
    cycle,
    dice_loss,
    focal_tversky_loss,
    patch_auc,
    segmentation_loss,
    tversky_loss,
)
from equipoise.ranks import Ranks

LOG2 = math.log(2)

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


# --- the formulas once more, in numpy ---------------------------------------------------------------------------------


def probabilities(logits: Array) -> Array:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def surprise(logits: Array, labels: Labels, clip: float) -> Array:
    """-log of the clipped probability of each pixel's own class."""
    own = np.take_along_axis(probabilities(logits), labels[:, None], 1)[:, 0]
    return np.asarray(-np.log(np.clip(own, clip, 1)))


def pixel_reference(logits: Array, labels: Labels, clip: float = 0.005) -> float:
    """The formula of the published code, with its sums over one-hot labels."""
    p, g = probabilities(logits), np.moveaxis(np.eye(logits.shape[1])[labels], -1, 1)
    w = 1 - g.sum((0, 2, 3)) / g.sum()
    return float((-w.reshape(1, -1, 1, 1) * g * np.log(np.clip(p, clip, 1))).sum(1).mean())


def weight_reference(logits: Array, labels: Labels, clip: float = 0.005) -> float:
    w = 1 - np.bincount(labels.ravel(), minlength=logits.shape[1]) / labels.size
    return float((w[labels] * surprise(logits, labels, clip)).sum() / w[labels].sum())


def balanced_reference(logits: Array, labels: Labels, clip: float = 0.005) -> float:
    lost = surprise(logits, labels, clip)
    return float(np.mean([lost[labels == c].mean() for c in np.unique(labels)]))


def dice_reference(logits: Array, labels: Labels) -> float:
    p, scores = probabilities(logits), []
    for c in range(logits.shape[1]):
        mask = labels == c
        scores.append(2 * p[:, c][mask].sum() / ((p[:, c] ** 2).sum() + mask.sum() + 1e-7))
    return float(1 - np.mean(scores))


def tversky_reference(logits: Array, labels: Labels, missed: float = 0.7, exponent: float = 1.0) -> float:
    p, terms = probabilities(logits), []
    for c in range(logits.shape[1]):
        mine, mask = p[:, c], labels == c
        hit, lost, false = mine[mask].sum(), (1 - mine[mask]).sum(), mine[~mask].sum()
        terms.append((1 - hit / (hit + missed * lost + (1 - missed) * false + 0.5e-7)) ** exponent)
    return float(np.mean(terms))


def skeleton_reference(maps: Array, iterations: int) -> Array:
    cross, square = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]]), np.ones((1, 3, 3))
    skeleton = np.zeros_like(maps)
    for _ in range(iterations + 1):
        smaller = ndimage.grey_erosion(maps, footprint=cross, mode="nearest")
        opened = ndimage.grey_dilation(smaller, footprint=square, mode="nearest")
        skeleton = skeleton + (1 - skeleton) * np.maximum(maps - opened, 0)
        maps = smaller
    return np.asarray(skeleton)


def cldice_reference(logits: Array, labels: Labels, iterations: int = 3) -> float:
    p, g = probabilities(logits)[:, 1], (labels == 1).astype(float)
    along_p, along_g = skeleton_reference(p, iterations), skeleton_reference(g, iterations)
    precision = ((along_p * g).sum() + 1) / (along_p.sum() + 1)
    sensitivity = ((along_g * p).sum() + 1) / (along_g.sum() + 1)
    return float(1 - 2 * precision * sensitivity / (precision + sensitivity))


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[Array, Labels], float]]] = {
    "pixel": (cross_entropy, pixel_reference),
    "pixel, not clipped": (partial(cross_entropy, clip=0.0), partial(pixel_reference, clip=0.0)),
    "weight": (partial(cross_entropy, weighing="weight"), weight_reference),
    "weight, not clipped": (partial(cross_entropy, weighing="weight", clip=0.0), partial(weight_reference, clip=0.0)),
    "balanced": (partial(cross_entropy, weighing="balanced"), balanced_reference),
    "balanced, not clipped": (
        partial(cross_entropy, weighing="balanced", clip=0.0),
        partial(balanced_reference, clip=0.0),
    ),
    "dice": (dice_loss, dice_reference),
    "tversky": (tversky_loss, tversky_reference),
    "tversky .2": (partial(tversky_loss, missed=0.2), partial(tversky_reference, missed=0.2)),
    "focal tversky": (focal_tversky_loss, partial(tversky_reference, exponent=0.75)),
    "focal tversky 2": (
        partial(focal_tversky_loss, missed=0.4, exponent=2.0),
        partial(tversky_reference, missed=0.4, exponent=2.0),
    ),
    "cldice": (cldice_loss, cldice_reference),
    "cldice 1": (partial(cldice_loss, iterations=1), partial(cldice_reference, iterations=1)),
}
EVERY = pytest.mark.parametrize("loss", [loss for loss, _ in LOSSES.values()], ids=list(LOSSES))


# --- what several tests look at ---------------------------------------------------------------------------------------


def example(classes: int, seed: int = 0, batch: int = 2) -> tuple[Array, Labels]:
    """Logits (B, K, 6, 5) of which some are sure and wrong, and labels of very different shares, also among slices."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 3, (batch, classes, 6, 5)), rng.integers(0, classes, (batch, 6, 5))
    labels[:, :2], labels[0, :5] = 0, 0
    return logits, labels


def sure(labels: Tensor, classes: int = 2, by: float = 40.0) -> Tensor:
    """Logits that say exactly `labels`."""
    return by * torch.moveaxis(F.one_hot(labels, classes), -1, 1).float()


def masks(*pictures: str) -> Tensor:
    """Drawings, # for class 1, as labels (B, H, W)."""
    return torch.tensor([[[int(pixel == "#") for pixel in row] for row in picture.split()] for picture in pictures])


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, logits)
    return found


# --- a rank -----------------------------------------------------------------------------------------------------------


def joint_batch() -> tuple[Tensor, Tensor]:
    """Four slices; the first two hold next to nothing but background, so halves differ from the whole."""
    logits, labels = example(3, seed=5, batch=4)
    labels[:2] = 0
    labels[1, 3, :3] = 1
    return torch.tensor(logits), torch.tensor(labels)


def half(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        ranks, out = Ranks(), {}
        logits, labels = joint_batch()
        for name, (loss, _) in LOSSES.items():
            mine = logits[half(rank)].clone().requires_grad_()
            factor = torch.ones((), dtype=torch.float64, requires_grad=True)  # a parameter that all ranks share
            value = loss(mine * factor, labels[half(rank)], total=ranks.total)
            own, shared = torch.autograd.grad(value, [mine, factor])
            out[name] = {"value": value.detach(), "own": own, "shared": ranks.average([shared])[0]}
        torch.save(out, folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "reference"), LOSSES.values(), ids=list(LOSSES))
class TestReferences:
    @pytest.mark.parametrize("classes", [2, 3, 5])
    def test_values_are_those_of_numpy(
        self, loss: Callable[..., Tensor], reference: Callable[[Array, Labels], float], classes: int
    ) -> None:
        for seed in range(4):
            logits, labels = example(classes, seed)
            assert (surprise(logits, labels, 0) > -math.log(0.005)).any(), "the clip must matter in this test"
            got = loss(torch.tensor(logits), torch.tensor(labels))
            assert got.shape == ()
            assert got.item() == pytest.approx(reference(logits, labels), abs=1e-6, rel=1e-9)
            single = loss(torch.tensor(logits, dtype=torch.float32), torch.tensor(labels))
            assert single.item() == pytest.approx(reference(logits, labels), abs=1e-6)

    def test_gradients_are_numpys_finite_differences(
        self, loss: Callable[..., Tensor], reference: Callable[[Array, Labels], float]
    ) -> None:
        logits, labels = example(3)
        want = np.zeros_like(logits)
        for index in np.ndindex(logits.shape):
            there, back = logits.copy(), logits.copy()
            there[index] += 1e-6
            back[index] -= 1e-6
            want[index] = (reference(there, labels) - reference(back, labels)) / 2e-6
        z = torch.tensor(logits, requires_grad=True)
        got = gradient(loss(z, torch.tensor(labels)), z).numpy()
        assert np.abs(got).max() > 1e-3
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_cycle_is_the_mean_absolute_difference() -> None:
    assert cycle(torch.tensor([[1.0, -1.0], [0.0, 0.5]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])).item() == 3.5 / 4


class TestCrossEntropy:
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

    @pytest.mark.parametrize("classes", [2, 3, 5])
    def test_by_weight_and_not_clipped_it_is_pytorchs_weighted_cross_entropy(self, classes: int) -> None:
        z, labels = (torch.tensor(x) for x in example(classes))
        z.requires_grad_()
        share = labels.flatten().bincount(minlength=classes) / labels.numel()
        theirs = F.cross_entropy(z, labels, weight=1 - share.double())
        ours = cross_entropy(z, labels, weighing="weight", clip=0.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient(ours, z), gradient(theirs, z), rtol=1e-6, atol=1e-12)

    def test_by_weight_it_is_balanced_for_two_classes_and_not_for_three(self) -> None:
        def difference(classes: int) -> float:
            z, labels = (torch.tensor(x) for x in example(classes))
            one, other = (cross_entropy(z, labels, weighing=name) for name in ("weight", "balanced"))
            return abs((one - other).item())

        assert difference(2) < 1e-12
        assert difference(3) > 0.01

    @pytest.mark.parametrize("few", [1, 7, 40])
    def test_balanced_gives_every_class_the_same_pull_whatever_its_share(self, few: int) -> None:
        labels = torch.zeros(1, 10, 10, dtype=torch.int64)
        labels[0, 0, 0], labels.view(-1)[1 : 1 + few] = 2, 1
        z = torch.zeros(
            1, 3, 10, 10, dtype=torch.float64, requires_grad=True
        )  # p = 1/3: each pixel pulls by 2/3 + 1/3 + 1/3

        def pulls(**how: Any) -> list[float]:
            grad = gradient(cross_entropy(z, labels, **how), z).abs().sum(1)
            return [grad[labels == c].sum().item() for c in range(3)]

        assert pulls(weighing="balanced") == pytest.approx([4 / 9] * 3)
        by_pixel = [4 / 3 * f * (1 - f) for f in ((99 - few) / 100, few / 100, 0.01)]
        assert pulls(weighing="pixel") == pytest.approx(by_pixel), "the published one: in proportion to f (1 - f)"

    @pytest.mark.parametrize("weighing", ["pixel", "weight", "balanced"])
    def test_without_a_clip_a_sure_mistake_keeps_its_gradient_and_with_one_has_exactly_none(
        self, weighing: Any
    ) -> None:
        labels = torch.tensor([[[1, 1, 0]]])
        z = torch.tensor([[[[60.0, 0, 0]], [[0.0, 0, 0]]]], requires_grad=True)  # p of the first is e^-60
        clipped = gradient(cross_entropy(z, labels, weighing=weighing), z)
        assert (clipped[..., 0] == 0).all()
        assert (clipped[..., 1:] != 0).all()
        loss = cross_entropy(z, labels, weighing=weighing, clip=0.0)
        assert gradient(loss, z)[0, 1, 0, 0].item() == pytest.approx({"pixel": -1 / 9}.get(weighing, -1 / 4))
        assert loss.item() == pytest.approx(
            {"pixel": (60 + LOG2 + 2 * LOG2) / 9}.get(weighing, ((60 + LOG2) / 2 + LOG2) / 2)
        )

    def test_a_batch_of_one_class_has_loss_0_unless_balanced_which_is_its_plain_mean(self) -> None:
        z, _ = (torch.tensor(x) for x in example(3))
        z.requires_grad_()
        labels = torch.ones(2, 6, 5, dtype=torch.int64)
        for weighing in ("pixel", "weight"):
            loss = cross_entropy(z, labels, weighing=weighing)
            assert loss == 0
            assert (gradient(loss, z) == 0).all()
        assert F.cross_entropy(z, labels, weight=torch.tensor([1.0, 0, 1]).double()).isnan(), "PyTorch's is 0 / 0"
        torch.testing.assert_close(
            cross_entropy(z, labels, weighing="balanced", clip=0.0), F.cross_entropy(z, labels), rtol=1e-9, atol=0
        )

    def test_a_class_that_no_label_has_changes_no_mean(self) -> None:
        z, labels = (torch.tensor(x) for x in example(3))
        more = torch.cat([z, torch.full((2, 2, 6, 5), -math.inf, dtype=torch.float64)], 1)  # impossible classes
        for weighing in ("pixel", "weight", "balanced"):
            want = cross_entropy(z, labels, weighing=weighing)
            torch.testing.assert_close(cross_entropy(more, labels, weighing=weighing), want)


class TestDice:
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


class TestTversky:
    @pytest.mark.parametrize("missed", [0.7, 0.5, 0.2])
    def test_a_missed_pixel_and_a_false_one_by_hand(self, missed: float) -> None:
        true = torch.zeros(1, 10, 10, dtype=torch.int64)
        true[0, 0, :2] = 1
        shy, bold = true.clone(), true.clone()
        shy[0, 0, 1], bold[0, 0, 2] = 0, 1
        # Each vessel pixel missed is a background pixel falsely found, and the other way round.
        found = 1 - missed
        want = {"shy": (1 / (1 + missed) + 98 / (98 + found)) / 2, "bold": (2 / (2 + found) + 97 / (97 + missed)) / 2}
        got = {name: tversky_loss(sure(x), true, missed=missed).item() for name, x in (("shy", shy), ("bold", bold))}
        assert got == pytest.approx({name: 1 - mean for name, mean in want.items()}, abs=1e-6)

    def test_one_half_is_dice_with_unsquared_denominators_and_dice_itself_where_predictions_are_sure(self) -> None:
        logits, labels = example(3)
        p, g = probabilities(logits), np.moveaxis(np.eye(3)[labels], -1, 1)
        axes = (0, 2, 3)
        linear = 1 - (2 * (p * g).sum(axes) / (p.sum(axes) + g.sum(axes) + 1e-7)).mean()
        z, y = torch.tensor(logits), torch.tensor(labels)
        assert tversky_loss(z, y, missed=0.5).item() == pytest.approx(linear, abs=1e-12)
        assert abs(tversky_loss(z, y, missed=0.5) - dice_loss(z, y)) > 0.01
        said = sure(z.argmax(1), 3).double() * 10
        torch.testing.assert_close(tversky_loss(said, y, missed=0.5), dice_loss(said, y), rtol=1e-12, atol=1e-12)

    def test_focal_with_exponent_1_is_tversky(self) -> None:
        z, y = (torch.tensor(x) for x in example(3))
        assert focal_tversky_loss(z, y, missed=0.6, exponent=1.0) == tversky_loss(z, y, missed=0.6)

    @pytest.mark.parametrize("missed", [0.0, 0.7, 1.0])
    def test_focal_stays_finite_in_value_and_gradient_where_every_pixel_is_right(self, missed: float) -> None:
        labels = torch.randint(0, 3, (8, 64, 64), generator=torch.Generator().manual_seed(0))
        for by in (8.0, 16.0, 40.0, 200.0):  # between nearly and exactly 1
            z = sure(labels, 3, by).requires_grad_()
            loss = focal_tversky_loss(z, labels, missed=missed)
            assert 0 < loss < 0.01
            assert gradient(loss, z).isfinite().all()

    @pytest.mark.parametrize("loss", [dice_loss, tversky_loss, focal_tversky_loss])
    def test_a_class_absent_from_labels_and_prediction_counts_as_a_whole_mistake_without_a_pull(
        self, loss: Any
    ) -> None:
        labels = torch.tensor([[[0, 1, 1, 0]]])
        z = sure(labels, 3, 200.0).requires_grad_()
        value = loss(z, labels)
        assert value.item() == pytest.approx(1 / 3, abs=1e-4)
        assert (gradient(value, z) == 0).all()


class TestSkeleton:
    def skeleton(self, picture: str, iterations: int = 3) -> Tensor:
        return soft_skeleton(masks(picture).unsqueeze(1).float(), iterations)[0, 0]

    @pytest.mark.parametrize(
        "line",
        [
            "....... ....... ####### ....... .......",
            "#...... .#..... ..#.... ...#... ....#..",
            "..#.... ..#.... ..##### ..#.... ..#....",
            "##..... ..#.... ..#.... ...###. ......#",
        ],
    )
    def test_a_line_one_pixel_wide_is_its_own_skeleton(self, line: str) -> None:
        assert torch.equal(self.skeleton(line), masks(line)[0].float())

    def test_of_a_line_three_pixels_wide_the_middle_is_left(self) -> None:
        got = self.skeleton("......... .#######. .#######. .#######. .........")
        assert torch.equal(got, masks("......... ......... ..#####.. ......... .........")[0].float())

    def test_a_vessel_that_leaves_the_slice_keeps_its_centreline_up_to_the_edge(self) -> None:
        got = self.skeleton("......... ######### ######### ######### .........")
        assert torch.equal(got, masks("......... ......... ######### ......... .........")[0].float())

    @pytest.mark.parametrize("radius", [3, 5, 8])
    def test_of_a_disc_its_centre_is_left_once_the_erosions_reach_it(self, radius: int) -> None:
        y, x = torch.meshgrid(torch.arange(21) - 10, torch.arange(21) - 10, indexing="ij")
        disc = (x**2 + y**2 <= radius**2).float()
        got = soft_skeleton(disc[None, None], radius)[0, 0]
        assert got[10, 10] == 1
        assert got.sum() == 1
        assert soft_skeleton(disc[None, None], radius - 1).sum() == 0

    def test_grey_maps_by_numpy_one_batch_and_channel_at_a_time(self) -> None:
        maps = np.random.default_rng(0).random((2, 3, 9, 8))
        got = soft_skeleton(torch.tensor(maps), 2).numpy()
        for b, c in np.ndindex(2, 3):
            np.testing.assert_allclose(got[b, c], skeleton_reference(maps[b, c][None], 2)[0], rtol=1e-12)

    @given(maps=npst.arrays(np.float64, (1, 1, 7, 6), elements=st.floats(0, 1, allow_subnormal=False)))
    @settings(max_examples=50, deadline=None)
    def test_it_lies_between_0_and_the_map(self, maps: Array) -> None:
        got = soft_skeleton(torch.tensor(maps), 3).numpy()
        assert (got >= 0).all()
        assert (got <= maps + 1e-12).all()


class TestClDice:
    TREE = "............ ############ .....#...... ......#..... .......##### ............"

    def test_equal_masks_cost_next_to_nothing_and_disjoint_ones_nearly_1(self) -> None:
        tree = masks(self.TREE)
        assert cldice_loss(sure(tree), tree).item() == pytest.approx(0, abs=1e-6)
        above, below = (torch.zeros(1, 40, 40, dtype=torch.int64) for _ in range(2))
        above[0, 5:8, 2:38], below[0, 25:28, 2:38] = 1, 1
        # The centreline of each has 34 pixels: precision and sensitivity are 1/35.
        assert cldice_loss(sure(above), below).item() == pytest.approx(34 / 35, abs=1e-5)

    def test_without_vessels_it_is_0_and_false_ones_cost_nearly_1(self) -> None:
        tree = masks(self.TREE)
        nothing = torch.zeros_like(tree)
        assert cldice_loss(sure(nothing), nothing).item() == pytest.approx(0, abs=1e-6)
        # 19 false pixels, all of them centreline: precision 1/20, sensitivity 1.
        assert int(tree.sum()) == 19
        false = sure(tree).requires_grad_()
        assert cldice_loss(false, nothing).item() == pytest.approx(1 - 2 / 21, abs=1e-5)
        softly = sure(tree, by=2.0).requires_grad_()
        assert gradient(cldice_loss(softly, nothing), softly)[0, 1, 1].sum() > 0, "and push them away"

    def test_a_gap_in_a_thin_vessel_costs_more_than_in_dice_and_a_ragged_edge_less(self) -> None:
        true = torch.zeros(1, 40, 40, dtype=torch.int64)
        true[0, 5:14, :], true[0, 25, :] = 1, 1  # 9 pixels wide, and 1
        gap, ragged = true.clone(), true.clone()
        gap[0, 25, 10:20] = 0
        ragged[0, 5, 10:30:2] = 0  # as many pixels, from the wide one's edge
        both: tuple[Callable[..., Tensor], ...] = (dice_loss, partial(cldice_loss, iterations=5))
        dice, cl = ([loss(sure(x), true).item() for x in (true, gap, ragged)] for loss in both)
        assert dice[1] == pytest.approx(dice[2], abs=1e-6), "Dice counts pixels only"
        assert cl[1] > 5 * dice[1]
        # Sensitivity lacks 10 of 80 pixels of centreline: 71/81, and precision stays 1.
        assert cl[1] == pytest.approx(1 - 2 * (71 / 81) / (1 + 71 / 81), abs=1e-5)
        assert cl[2] < cl[1] / 2

    def test_it_looks_at_class_1_alone_also_where_the_brain_is_labelled_beside_it(self) -> None:
        tree = masks(self.TREE)
        with_brain = tree.clone()
        with_brain[0, :, 6:][tree[0, :, 6:] == 0] = 2
        assert cldice_loss(sure(tree, 3), with_brain).item() == pytest.approx(0, abs=1e-6)
        assert cldice_loss(sure(with_brain, 3), tree).item() == pytest.approx(0, abs=1e-6)
        assert cldice_loss(sure(tree, 3), with_brain, structure=2).item() > 0.9


class TestChoice:
    def test_the_published_terms_are_the_default(self) -> None:
        z, y = (torch.tensor(x) for x in example(3))
        terms = segmentation_loss(z, y, LossConfig())
        assert terms == {"ce": cross_entropy(z, y), "overlap": dice_loss(z, y)}

    def test_each_setting_takes_effect(self) -> None:
        z, y = (torch.tensor(x) for x in example(3))
        chosen = LossConfig(cross_entropy="balanced", ce_clip=0.1, overlap="tversky", tversky_missed=0.9)
        assert segmentation_loss(z, y, chosen) == {
            "ce": cross_entropy(z, y, weighing="balanced", clip=0.1),
            "overlap": tversky_loss(z, y, missed=0.9),
        }
        chosen = LossConfig(overlap="focal_tversky", tversky_missed=0.9, focal_exponent=0.5, cldice=0.3)
        terms = segmentation_loss(z, y, chosen)
        assert terms["overlap"] == focal_tversky_loss(z, y, missed=0.9, exponent=0.5)
        assert terms["cldice"] == cldice_loss(z, y, iterations=3), "unweighted"
        deeper = segmentation_loss(z, y, LossConfig(cldice=0.3, cldice_iterations=1))["cldice"]
        assert deeper == cldice_loss(z, y, iterations=1) != terms["cldice"]

    def test_its_sums_pass_through_the_hook_once_a_term(self) -> None:
        z, y = (torch.tensor(x) for x in example(3))
        seen: list[Tensor] = []
        segmentation_loss(z, y, LossConfig(cldice=1.0), total=lambda s: seen.append(s) or s)  # type: ignore[func-returns-value]
        assert [s.numel() for s in seen] == [3, 9, 4]


@EVERY
class TestEveryLoss:
    @pytest.mark.parametrize("at", [(0, 0, 0, 0), (1, 2, 5, 4), (1, 1, 2, 2)])
    def test_one_nan_among_the_logits_gives_nan(self, loss: Callable[..., Tensor], at: tuple[int, ...]) -> None:
        z, y = (torch.tensor(x) for x in example(3))
        z[at] = math.nan
        assert loss(z, y).isnan()
        assert loss(z, torch.zeros_like(y)).isnan(), "also where nothing but background is labelled"

    def test_half_precision_logits_are_widened_first(self, loss: Callable[..., Tensor]) -> None:
        z, y = (torch.tensor(x) for x in example(3))
        got = loss(z.bfloat16(), y)
        assert got.dtype == torch.float32
        assert got == loss(z.bfloat16().float(), y)

    @pytest.mark.parametrize("by", [-200.0, 0.0, 200.0])
    def test_gradients_are_finite_at_the_ends_and_where_classes_are_absent(
        self, loss: Callable[..., Tensor], by: float
    ) -> None:
        _, y = (torch.tensor(x) for x in example(3))
        for labels in (y, y.clamp(max=1), torch.zeros_like(y), torch.ones_like(y)):
            z = sure(y, 3, by).requires_grad_()
            value = loss(z, labels)
            assert value.isfinite()
            assert gradient(value, z).isfinite().all()

    def test_it_needs_no_look_at_data_on_the_way(self, loss: Callable[..., Tensor]) -> None:
        # Tensors without values: what asks for one, in a branch, a size or by `item`, is an error.
        z, y = (torch.tensor(x).to("meta") for x in example(3))
        z.requires_grad_()
        assert gradient(loss(z, y), z).shape == z.shape

    def test_it_compiles_as_one_graph(self, loss: Callable[..., Tensor]) -> None:
        z, y = (torch.tensor(x) for x in example(3))
        z.requires_grad_()
        compiled: Callable[..., Tensor] = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
        got, want = compiled(z, y), loss(z, y)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient(got, z), gradient(want, z), rtol=1e-9, atol=1e-12)

    @given(
        logits=npst.arrays(np.float32, (2, 3, 4, 3), elements=st.floats(-30, 30, width=32, allow_subnormal=False)),
        labels=npst.arrays(np.int64, (2, 4, 3), elements=st.integers(0, 2)),
        shift=st.floats(-4, 4, width=16, allow_subnormal=False),
    )
    @settings(max_examples=25, deadline=None)
    def test_it_stays_in_its_range_and_looks_at_probabilities_only(
        self, loss: Callable[..., Tensor], logits: NDArray[np.float32], labels: Labels, shift: float
    ) -> None:
        z, y = torch.tensor(logits), torch.tensor(labels)
        value = loss(z, y).item()
        words = loss.keywords if isinstance(loss, partial) else {}
        of_p = (loss.func if isinstance(loss, partial) else loss) is cross_entropy
        most = (62.0 if words.get("clip") == 0 else -math.log(0.005)) if of_p else 1.0
        assert -1e-6 <= value <= most + 1e-5
        assert loss(z + shift, y).item() == pytest.approx(value, abs=1e-4)
        assert loss(z.flip(0), y.flip(0)).item() == pytest.approx(value, abs=1e-5), "no order among slices"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, two_ranks: Callable[..., None]) -> tuple[dict[str, Any], ...]:
    """What two real processes found, each on its half of the joint batch."""
    folder = tmp_path_factory.mktemp("losses")
    two_ranks(__file__, folder, patience_s=120)
    return tuple(torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))


@pytest.mark.parametrize("name", list(LOSSES))
class TestTwoRanks:
    def test_the_mean_of_their_values_is_the_loss_of_the_joint_batch(
        self, pair: tuple[dict[str, Any], ...], name: str
    ) -> None:
        logits, labels = joint_batch()
        loss, _ = LOSSES[name]
        want = loss(logits, labels)
        halves = torch.stack([loss(logits[half(r)], labels[half(r)]) for r in (0, 1)]).mean()
        assert abs(want - halves) > 0.002, "the joint value must differ from the mean of the halves in this test"
        torch.testing.assert_close(torch.stack([found[name]["value"] for found in pair]).mean(), want)

    def test_the_mean_of_their_gradients_is_that_of_the_joint_batch(
        self, pair: tuple[dict[str, Any], ...], name: str
    ) -> None:
        logits, labels = joint_batch()
        logits.requires_grad_()
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        own, shared = torch.autograd.grad(LOSSES[name][0](logits * factor, labels), [logits, factor])
        for rank, found in enumerate(pair):
            torch.testing.assert_close(found[name]["own"] / 2, own[half(rank)])  # / 2: the mean over ranks
            torch.testing.assert_close(found[name]["shared"], shared)


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
