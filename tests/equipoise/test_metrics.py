"""Dice by hand."""

from __future__ import annotations

import copy
import math
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from equipoise.batches import Cohort
from equipoise.config import NetConfig, RunConfig
from equipoise.metrics import composite, dice, evaluate, subject_dice
from equipoise.nets import Sifa
from equipoise.shelf import Slices
from equipoise.validators import Sums, validators
from slicestore.store import Store

LABEL_FREE = {"quality/translated_dice", "quality/composite"} | {
    f"validator/{name}" for name in ("entropy", "information", "nuclear", "volume")
}
"""All that needs no target label."""


def t(*values: int) -> Tensor:
    return torch.tensor(values)


class TestDice:
    def test_two_classes_by_hand(self) -> None:
        # prediction {0, 1, 2}, label {1, 2, 3}: 2 * 2 / (3 + 3)
        assert dice(t(1, 1, 1, 0, 0), t(0, 1, 1, 1, 0), [1]) == pytest.approx(2 / 3)

    def test_three_classes_are_averaged_whatever_their_sizes(self) -> None:
        # class 1: 2 * 1 / (1 + 3) = 1/2; class 2: 2 * 1 / (2 + 1) = 2/3
        assert dice(t(1, 0, 2, 2, 0), t(1, 1, 1, 2, 0), [1, 2]) == pytest.approx((1 / 2 + 2 / 3) / 2)

    def test_background_does_not_count(self) -> None:
        assert dice(t(0, 0, 0, 0, 1), t(0, 0, 0, 0, 0), [1]) == 0

    def test_a_structure_in_neither_counts_1(self) -> None:
        assert dice(t(0, 0), t(0, 0), [1]) == 1
        # class 1: 2 * 1 / (2 + 1); class 2 is nowhere
        assert dice(t(1, 1), t(1, 0), [1, 2]) == pytest.approx((2 / 3 + 1) / 2)

    def test_a_structure_that_is_missed_or_made_up_counts_0(self) -> None:
        assert dice(t(0, 0), t(1, 0), [1]) == 0
        assert dice(t(1, 0), t(0, 0), [1]) == 0

    def test_only_the_structures_asked_for_count(self) -> None:
        assert dice(t(1, 0, 2, 2, 0), t(1, 1, 1, 2, 0), [2]) == pytest.approx(2 / 3)

    def test_equal_masks_of_any_shape_and_type_count_1(self) -> None:
        label = torch.tensor([[[0, 1], [2, 1]]], dtype=torch.uint8)
        assert dice(label.long(), label, [1, 2]) == 1


class TestSubjectDice:
    def test_slices_are_joined_within_a_subject_and_subjects_averaged(self) -> None:
        label = torch.tensor([[[1, 1, 1]], [[1, 1, 1]], [[1, 0, 0]]], dtype=torch.uint8)
        slices = Slices(torch.zeros(3, 1, 1, 3), label, ("a", "b", "a"))
        prediction = torch.tensor([[[1, 1, 0]], [[0, 0, 0]], [[0, 0, 0]]])
        # a: 2 * 2 / (2 + 4) over both of its slices (their mean would be (.8 + 0) / 2); b: 0
        assert subject_dice(prediction, slices, [1]) == pytest.approx((2 / 3 + 0) / 2)

    def test_without_labels_or_slices_there_is_none(self) -> None:
        assert subject_dice(torch.zeros(1, 1, 1), Slices(torch.zeros(1, 1, 1, 1), None, ("a",)), [1]) is None
        empty = Slices(torch.zeros(0, 1, 1, 1), torch.zeros(0, 1, 1), ())
        assert subject_dice(torch.zeros(0, 1, 1), empty, [1]) is None


def test_the_composite_is_the_geometric_mean_and_0_or_no_number_with_either() -> None:
    assert composite(0.64, 0.25) == pytest.approx(0.4)
    assert composite(0.64, 0.0) == composite(0.0, 1.0) == 0
    assert math.isnan(composite(math.nan, 0.0))


def with_targets(cohort: Cohort, slices: Slices) -> Cohort:
    """The cohort with other target slices to validate on."""
    other = copy.copy(cohort)
    other.val = {"source": cohort.val["source"], "target": slices}
    return other


class Blind(nn.Module):
    """Networks that see a structure everywhere in translated images, and nothing in target images."""

    def generator(self, image: Tensor) -> Tensor:
        return image

    def encoder(self, image: Tensor, domain: str) -> Tensor:
        return torch.full((len(image),), 1.0 if domain == "translated" else -1.0)

    def segmenter(self, sight: Tensor, size: tuple[int, int]) -> Tensor:
        return torch.stack([-sight, sight], 1)[..., None, None].expand(-1, -1, *size)


class TestEvaluate:
    @staticmethod
    def net() -> Sifa:
        torch.manual_seed(0)
        net = Sifa(NetConfig(width=0.0625)).train()
        with torch.no_grad():
            net.generator(torch.rand(2, 1, 32, 32))
            for _ in range(20):
                net.encoder(torch.rand(4, 1, 32, 32) * 2 - 1)  # running statistics that mean something
            net.segmenter.classify.weight.normal_(generator=torch.Generator().manual_seed(6))
        return net

    def test_it_segments_translated_sources_and_plain_targets_in_evaluation_mode(self, cohort: Cohort) -> None:
        net = self.net()
        twin = copy.deepcopy(net).eval()
        got = evaluate(net, cohort)
        with torch.no_grad():
            translated = twin(twin.generator(cohort.val["source"].image)).argmax(1)
            target = twin(cohort.val["target"].image).argmax(1)
        want = {}
        for name, prediction, slices in (
            ("quality/translated_dice", translated, cohort.val["source"]),
            ("quality/target_dice", target, cohort.val["target"]),
        ):
            assert slices.label is not None
            p, g = prediction == 1, slices.label == 1  # one validation subject
            want[name] = 2 * (p & g).sum().item() / (p.sum() + g.sum()).item()
        assert {name: got[name] for name in want} == pytest.approx(want)
        assert len({0.0, *(got[name] for name in want)}) == 3, "masks must meet labels, and G must matter, in this test"

    def test_it_neither_changes_the_network_nor_leaves_it_in_evaluation_mode(self, cohort: Cohort) -> None:
        net = self.net()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        evaluate(net, cohort)
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
        assert all(module.training for module in net.modules())

    def test_the_size_of_its_batches_does_not_matter(self, cohort: Cohort) -> None:
        assert evaluate(self.net(), cohort, batch=1) == pytest.approx(evaluate(self.net(), cohort, batch=5))

    def test_without_target_masks_all_is_told_but_the_target_dice_and_nothing_changes(self, cohort: Cohort) -> None:
        target = cohort.val["target"]
        bare = with_targets(cohort, Slices(target.image, None, target.subject))
        whole = evaluate(self.net(), cohort)
        assert set(whole) == {"quality/target_dice", *LABEL_FREE}
        assert evaluate(self.net(), bare) == pytest.approx({name: whole[name] for name in LABEL_FREE})

    def test_without_target_slices_only_the_translated_dice_is_told(self, cohort: Cohort) -> None:
        image = cohort.val["target"].image
        for labels in (None, torch.zeros(0, *image.shape[2:], dtype=torch.uint8)):
            bare = with_targets(cohort, Slices(image[:0], labels, ()))
            assert set(evaluate(self.net(), bare)) == {"quality/translated_dice"}

    def test_every_target_slice_is_segmented_once(self, cohort: Cohort) -> None:
        net = self.net()
        seen: list[int] = []
        net.segmenter.register_forward_hook(lambda _, __, logits: seen.append(len(logits)))
        evaluate(net, cohort, batch=4)
        assert sum(seen) == len(cohort.val["source"]) + len(cohort.val["target"])

    def test_the_scores_are_of_target_logits_and_the_size_of_source_masks(self, cohort: Cohort) -> None:
        net = self.net()
        twin = copy.deepcopy(net).eval()
        got = evaluate(net, cohort, batch=4)
        with torch.no_grad():
            logits = twin(cohort.val["target"].image)
        label = cohort.train["source"].label
        assert label is not None
        want = validators(Sums.of(logits, 0), (label > 0).sum().item() / len(label))
        assert {name: got[name] for name in want} == pytest.approx(want)
        product = got["quality/translated_dice"] * got["validator/volume"]
        assert got["quality/composite"] == pytest.approx(math.sqrt(product))

    def test_masks_that_vanish_on_target_images_show_in_the_composite_and_not_in_the_translated_dice(
        self, cohort: Cohort
    ) -> None:
        found = evaluate(cast(Sifa, Blind()), cohort)
        assert found["quality/translated_dice"] > 0
        assert (found["quality/composite"], found["validator/volume"], found["validator/entropy"]) == (0, 0, -1)

    def test_a_brain_class_has_a_dice_of_its_own_and_no_part_in_that_of_the_structures(
        self, store_of_three: Store, tiny: RunConfig
    ) -> None:
        config = tiny.at("net.classes", 3)
        cohort = Cohort(store_of_three, config, torch.device("cpu"))
        torch.manual_seed(0)
        net = Sifa(config.net).train()
        both = evaluate(net, cohort)
        cohort.brain_class = 2
        apart = evaluate(net, cohort)
        assert apart["validator/volume"] != both["validator/volume"]
        assert set(apart) - set(both) == {"quality/translated_brain_dice", "quality/target_brain_dice"}
        for name in ("translated", "target"):
            mean = (apart[f"quality/{name}_dice"] + apart[f"quality/{name}_brain_dice"]) / 2
            assert both[f"quality/{name}_dice"] == pytest.approx(mean)

    def test_a_broken_network_scores_and_does_not_raise(self, cohort: Cohort) -> None:
        net = self.net()
        for parameter in net.parameters():
            parameter.data.fill_(torch.nan)
        found = evaluate(net, cohort)
        assert set(found) == {"quality/target_dice", *LABEL_FREE}
        assert all(math.isnan(found[name]) for name in LABEL_FREE - {"quality/translated_dice"})
