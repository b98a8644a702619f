"""Diversity, sharpness and foreground of a run's images, by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from equipoise.batches import Cohort
from equipoise.config import NetConfig
from equipoise.nets import Features, Sifa
from equipoise.probe import distance, energy, probe
from equipoise.shelf import Slices

NAMES = {f"probe/{what}_{way}" for what in ("diversity", "sharpness") for way in ("st", "ts")} | {"probe/foreground"}
Change = Callable[[Tensor], Tensor]


def same(image: Tensor) -> Tensor:
    return image


class Stub(nn.Module):
    """Networks that do to an image what they are told, and predict the same logits everywhere in it."""

    def __init__(self, st: Change = same, ts: Change = same, logits: tuple[float, ...] = (1, 0)) -> None:
        super().__init__()
        self.st, self.ts, self.logits = st, ts, logits
        self.translated = 0
        self.modes = set[bool]()

    def generator(self, image: Tensor) -> Tensor:
        self.translated += len(image)
        self.modes.add(self.training)
        return self.st(image)

    def encoder(self, image: Tensor, domain: str) -> Features:
        assert domain == "target"
        self.modes.add(self.training)
        return Features(high=image, low=image, fine=())

    def decoder(self, high: Tensor, skip: Tensor) -> Tensor:
        return self.ts(skip)

    def segmenter(self, seen: Features, size: tuple[int, int]) -> Tensor:
        return torch.tensor(self.logits).view(1, -1, 1, 1).expand(len(seen.high), -1, *size)


def looked(net: Stub, cohort: Cohort) -> dict[str, float]:
    return probe(cast(Sifa, net), cohort)


def images(count: int, seed: int, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def shown(source: Tensor, target: Tensor, label: Tensor | None = None, brain_class: int = 0) -> Cohort:
    """A cohort whose probe is all of these slices, and its training source slices too."""
    cohort = object.__new__(Cohort)
    cohort.brain_class = brain_class
    cohort.val = {
        "source": Slices(source, None, ("a",) * len(source)),
        "target": Slices(target, None, ("a",) * len(target)),
    }
    cohort.train = {"source": Slices(source, label, ("a",) * len(source))}
    everything = {"source": source, "target": target}

    def all_of_it(domain: str, count: int) -> Slices:
        image = everything[domain][:count]
        return Slices(image, None, ("a",) * len(image))

    setattr(cohort, "probe", all_of_it)  # noqa: B010 - plainly assigned it would be another type
    return cohort


class TestDistance:
    def test_it_is_the_mean_over_pairs_and_pixels_by_hand(self) -> None:
        # between the first two 1/2, the first and the last 1, the last two 1/2
        assert distance(torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 1.0]]])) == pytest.approx(2 / 3)

    def test_equal_images_or_a_single_one_have_none(self) -> None:
        assert distance(images(1, 0)[:, 0].expand(5, 8, 8)) == 0
        assert distance(images(1, 0)[:, 0]) == 0

    def test_a_pixel_that_is_no_number_makes_it_none_either(self) -> None:
        broken = images(3, 0)[:, 0]
        broken[1, 2, 3] = math.nan
        assert math.isnan(distance(broken))


class TestEnergy:
    def test_it_is_the_mean_square_down_plus_the_mean_square_across_by_hand(self) -> None:
        # down 3 and 2: (9 + 4) / 2; across 1 and 0: (1 + 0) / 2
        assert energy(torch.tensor([[[0.0, 1.0], [3.0, 3.0]]])) == pytest.approx(7)

    def test_it_is_averaged_over_images(self) -> None:
        flat = torch.zeros(1, 2, 2)
        assert energy(torch.cat([flat, torch.tensor([[[0.0, 1.0], [3.0, 3.0]]])])) == pytest.approx(3.5)

    def test_a_blurred_image_has_less_and_one_grey_has_none(self) -> None:
        sharp = images(4, 0)
        blurred = torch.nn.functional.avg_pool2d(sharp, 3, stride=1, padding=1)
        assert 0 < energy(blurred[:, 0]) < 0.5 * energy(sharp[:, 0])
        assert energy(torch.full((2, 4, 4), 0.3)) == 0


class TestProbe:
    def test_copies_of_real_images_of_the_domain_that_they_imitate_score_1(self) -> None:
        source, target = images(5, 0), 0.4 * images(5, 1)
        net = Stub(st=lambda x: target, ts=lambda x: source)
        got = looked(net, shown(source, target))
        assert got == pytest.approx(dict.fromkeys(NAMES - {"probe/foreground"}, 1.0))

    def test_each_translation_is_held_against_the_other_domains_real_images(self) -> None:
        source, target = images(5, 0), 0.5 * images(5, 0)
        got = looked(Stub(), shown(source, target))  # both translations leave images as they are
        assert got == pytest.approx(
            {
                "probe/diversity_st": 2, "probe/diversity_ts": 0.5, "probe/sharpness_st": 4, "probe/sharpness_ts": 0.25,
            }
        )  # fmt: skip

    def test_fakes_that_are_all_the_same_score_0(self) -> None:
        got = looked(Stub(st=lambda x: x[:1].expand_as(x)), shown(images(5, 0), images(5, 1)))
        assert got["probe/diversity_st"] == 0
        assert got["probe/sharpness_st"] > 0
        assert got["probe/diversity_ts"] > 0

    def test_real_slices_that_are_all_the_same_say_nothing_of_diversity(self) -> None:
        target = images(1, 1).expand(5, 1, 8, 8)
        got = looked(Stub(), shown(images(5, 0), target))
        assert got.keys() == {"probe/diversity_ts", "probe/sharpness_st", "probe/sharpness_ts"}
        assert got["probe/diversity_ts"] == 0, "the decoder gave these slices back"

    def test_flat_real_slices_say_nothing_of_sharpness(self) -> None:
        flat = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 8, 8)
        assert looked(Stub(), shown(flat, images(5, 1))).keys() & {"probe/sharpness_st", "probe/sharpness_ts"} == {
            "probe/sharpness_st"
        }

    def test_an_image_that_is_no_number_gives_none(self) -> None:
        got = looked(Stub(ts=lambda x: x * math.nan), shown(images(5, 0), images(5, 1)))
        assert math.isnan(got["probe/diversity_ts"])
        assert math.isnan(got["probe/sharpness_ts"])
        assert math.isfinite(got["probe/diversity_st"])

    def test_of_a_stack_of_neighbours_the_middle_slice_counts(self) -> None:
        source, target = images(5, 0, channels=3), images(5, 1, channels=3)
        middles = shown(source[:, 1:2], target[:, 1:2])
        assert looked(Stub(), shown(source, target)) == looked(Stub(), middles)

    def test_it_sees_16_slices_at_most_whatever_their_number_in_the_domains(self) -> None:
        source, target = images(20, 0), images(7, 1)
        net = Stub()
        assert looked(net, shown(source, target)) == looked(Stub(), shown(source[:16], target))
        assert net.translated == 16

    def test_networks_are_asked_in_evaluation_mode_and_left_in_the_mode_they_were_in(self) -> None:
        for training in (True, False):
            net = Stub().train(training)
            looked(net, shown(images(3, 0), images(3, 1)))
            assert net.modes == {False}
            assert net.training == training


class TestForeground:
    @staticmethod
    def label(pixels: int, brain: int = 0) -> Tensor:
        """Four slices, the first with so many pixels of class 1; of class 2 the last."""
        label = torch.zeros(4, 64, dtype=torch.uint8)
        label[0, :pixels] = 1
        label[3, :brain] = 2
        return label.view(4, 8, 8)

    def test_it_is_the_share_predicted_over_the_share_in_training_masks_by_hand(self) -> None:
        class Half(Stub):
            def segmenter(self, seen: Features, size: tuple[int, int]) -> Tensor:
                logits = torch.zeros(len(seen.high), 2, *size)
                logits[:, 1, :4] = torch.tensor([1.0, 1.0, -1.0, -1.0]).view(4, 1)  # 2 of 8 rows
                logits[:, 1, 4:] = -1
                return logits

        cohort = shown(images(4, 0), images(4, 1), self.label(32))
        assert looked(Half(), cohort)["probe/foreground"] == pytest.approx((2 / 8) / (32 / 256))

    def test_every_structure_counts_and_the_brain_does_not(self) -> None:
        cohort = shown(images(4, 0), images(4, 1), self.label(64))
        for largest, brain_class, want in ((1, 0, 4.0), (2, 0, 4.0), (2, 2, 0.0), (1, 2, 4.0), (0, 0, 0.0)):
            logits = cast(tuple[float, ...], tuple(float(k == largest) for k in range(3)))
            cohort.brain_class = brain_class
            assert looked(Stub(logits=logits), cohort)["probe/foreground"] == want

    def test_without_masks_or_with_empty_ones_it_is_left_out(self) -> None:
        for label in (None, self.label(0)):
            got = looked(Stub(), shown(images(4, 0), images(4, 1), label))
            assert "probe/foreground" not in got
            assert got.keys() == NAMES - {"probe/foreground"}

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_logits_that_are_no_numbers_predict_no_background_but_nothing(self, value: float) -> None:
        cohort = shown(images(4, 0), images(4, 1), self.label(32))
        assert math.isnan(looked(Stub(logits=(value, 0.0)), cohort)["probe/foreground"])

    def test_training_masks_are_those_of_all_training_slices_of_the_source_domain(self, cohort: Cohort) -> None:
        area = cohort.train["source"].area
        label = cohort.train["source"].label
        assert area is not None
        assert label is not None
        predicted_everywhere = Stub(logits=(0.0, 1.0))
        want = 1 / (float((label == 1).sum()) / label.numel())
        assert looked(predicted_everywhere, cohort)["probe/foreground"] == pytest.approx(want)


class TestWithNetworks:
    @staticmethod
    def net() -> Sifa:
        torch.manual_seed(0)
        net = Sifa(NetConfig(width=0.0625, decoder_dropout_always=False)).train()
        with torch.no_grad():
            for _ in range(20):
                net.encoder(torch.rand(4, 1, 32, 32) * 2 - 1)  # running statistics that mean something
            net.segmenter.classify.weight.normal_(generator=torch.Generator().manual_seed(6))
        return net

    def test_ratios_are_those_of_what_the_networks_make_of_the_probe(self, cohort: Cohort) -> None:
        net = self.net()
        twin = copy.deepcopy(net).eval()
        source, target = (cohort.probe(domain, 16).image for domain in ("source", "target"))
        with torch.no_grad():
            st, ts = twin.generator(source)[:, 0], twin.decoder(twin.encoder(target).high, target)[:, 0]
            structure = (twin(target).argmax(1) == 1).double().mean()
        label = cohort.train["source"].label
        assert label is not None
        want = {
            "probe/diversity_st": distance(st) / distance(target[:, 0]),
            "probe/diversity_ts": distance(ts) / distance(source[:, 0]),
            "probe/sharpness_st": energy(st) / energy(target[:, 0]),
            "probe/sharpness_ts": energy(ts) / energy(source[:, 0]),
            "probe/foreground": float(structure) / float((label == 1).double().mean()),
        }
        assert probe(net, cohort) == pytest.approx(want, rel=1e-4)
        assert all(value > 0 for value in want.values()), "a comparison of nothings proves nothing"

    def test_the_networks_stay_as_they_are(self, cohort: Cohort) -> None:
        net = self.net()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        probe(net, cohort)
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
        assert all(module.training for module in net.modules())
        assert all(p.grad is None for p in net.parameters())

    def test_broken_networks_give_no_numbers_and_do_not_raise(self, cohort: Cohort) -> None:
        net = self.net()
        for parameter in net.parameters():
            parameter.data.fill_(torch.nan)
        got = probe(net, cohort)
        assert got.keys() == NAMES
        assert all(math.isnan(value) for value in got.values())
