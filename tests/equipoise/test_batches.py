"""Slices of a store as batches: order, shares, scale, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from equipoise.batches import Cohort, Slices
from equipoise.config import RunConfig
from slicestore.errors import InputError
from slicestore.store import DOMAINS, Store

CPU = torch.device("cpu")


def which(images: Tensor, among: Slices) -> list[int]:
    """Number each image by its place among `among`; noise makes every slice its own."""
    found = [(among.image == image).flatten(1).all(1).nonzero().flatten().tolist() for image in images]
    assert all(len(places) == 1 for places in found)
    return [places[0] for places in found]


def seen(cohort: Cohort, config: RunConfig, steps: range, domain: str = "source") -> list[int]:
    return [
        i
        for n in steps
        for i in which(getattr(cohort.batch(config, n), domain), cohort.train[domain])  # type: ignore[index]
    ]


class TestOrder:
    def test_the_ranks_shares_are_disjoint_and_in_order_they_are_the_batch_of_one_process(
        self, cohort: Cohort, tiny: RunConfig
    ) -> None:
        alone = tiny.at("batch", 6)
        shared = alone.at("workers", 3)
        for number in range(1, 5):
            whole = cohort.batch(alone, number)
            shares = [cohort.batch(shared, number, rank) for rank in range(3)]
            for k in range(3):
                assert torch.equal(torch.cat([share[k] for share in shares]), whole[k])
            numbers = [i for share in shares for i in which(share.source, cohort.train["source"])]
            assert len(set(numbers)) == 6

    def test_shares_join_to_the_batch_whatever_the_number_of_ranks(self, cohort: Cohort, tiny: RunConfig) -> None:
        alone = tiny.at("batch", 10)
        for number in (1, 2, 3):
            whole = cohort.batch(alone, number)
            shares = [cohort.batch(alone.at("workers", 5), number, rank) for rank in range(5)]
            assert torch.equal(torch.cat([share.target for share in shares]), whole.target)

    @pytest.mark.parametrize("domain", DOMAINS)
    def test_every_slice_is_seen_once_before_any_is_seen_twice(
        self, cohort: Cohort, tiny: RunConfig, domain: str
    ) -> None:
        order = seen(cohort, tiny.at("batch", 4), range(1, 16), domain)  # 12 slices: three batches a round
        rounds = [order[i : i + 12] for i in range(0, 60, 12)]
        assert all(sorted(r) == list(range(12)) for r in rounds)
        assert len({tuple(r) for r in rounds}) == 5, "each round has an order of its own"

    def test_no_batch_holds_a_slice_twice_and_none_rests_for_ever_where_batches_do_not_divide_the_slices(
        self, cohort: Cohort, tiny: RunConfig
    ) -> None:
        config = tiny.at("batch", 5)
        assert all(len(set(seen(cohort, config, range(n, n + 1)))) == 5 for n in range(1, 41))
        assert set(seen(cohort, config, range(1, 41))) == set(range(12))

    def test_it_is_a_pure_function_of_seed_and_step(self, store: Store, cohort: Cohort, tiny: RunConfig) -> None:
        forwards = seen(cohort, tiny, range(1, 13))
        torch.manual_seed(99)
        np.random.seed(99)
        other = Cohort(store, tiny.at("batch", 4), CPU)
        backwards = [seen(other, tiny, range(n, n + 1)) for n in range(12, 0, -1)]
        assert [i for batch in reversed(backwards) for i in batch] == forwards

    def test_drawing_leaves_the_global_random_numbers_alone(self, cohort: Cohort, tiny: RunConfig) -> None:
        before = torch.get_rng_state()
        cohort.batch(tiny, 3)
        assert torch.equal(torch.get_rng_state(), before)

    def test_another_seed_gives_another_order_and_the_domains_orders_differ(
        self, cohort: Cohort, tiny: RunConfig
    ) -> None:
        steps = range(1, 7)
        assert seen(cohort, tiny, steps) != seen(cohort, tiny.at("seed", 1), steps)
        assert seen(cohort, tiny, steps) != seen(cohort, tiny, steps, "target")

    def test_it_does_not_depend_on_the_batch_size(self, cohort: Cohort, tiny: RunConfig) -> None:
        assert seen(cohort, tiny.at("batch", 3), range(1, 5)) == seen(cohort, tiny.at("batch", 6), range(1, 3))

    def test_a_slice_comes_with_its_own_label(self, cohort: Cohort, tiny: RunConfig) -> None:
        labels = cohort.train["source"].label
        assert labels is not None
        for number in range(1, 7):
            batch = cohort.batch(tiny, number)
            places = which(batch.source, cohort.train["source"])
            assert torch.equal(batch.label, labels[places].long())
            assert batch.label.dtype == torch.int64


class TestScale:
    @pytest.mark.parametrize("domain", DOMAINS)
    def test_training_subjects_fill_minus_1_to_1_exactly(self, cohort: Cohort, domain: str) -> None:
        image = cohort.train[domain].image  # type: ignore[index]
        assert image.dtype == torch.float32
        assert image.shape == (12, 1, 32, 32)
        assert image.min().item() == pytest.approx(-1, abs=1e-6)
        assert image.max().item() == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize("domain", DOMAINS)
    def test_a_validation_slice_is_on_the_scale_of_the_training_subjects_not_on_its_own(
        self, store: Store, cohort: Cohort, domain: str
    ) -> None:
        train = store.select(domain, "train")  # type: ignore[arg-type]
        low, high = min(e.minimum for e in train), max(e.maximum for e in train)
        staged = store.stage(domain, "val").image.astype(np.float64)  # type: ignore[arg-type]
        want = 2 * (staged - low) / (high - low) - 1
        image = cohort.val[domain].image[:, 0].numpy()  # type: ignore[index]
        np.testing.assert_allclose(image, want, atol=2e-6)
        assert not (abs(image.min() + 1) < 1e-6 and abs(image.max() - 1) < 1e-6)

    def test_pooled_limits_are_those_of_both_domains(self, store: Store, cohort: Cohort, tiny: RunConfig) -> None:
        pooled = Cohort(store, tiny.at("data.limits", "pooled"), CPU)
        ends = {d: (pooled.train[d].image.min().item(), pooled.train[d].image.max().item()) for d in DOMAINS}
        assert min(low for low, _ in ends.values()) == pytest.approx(-1, abs=1e-6)
        assert max(high for _, high in ends.values()) == pytest.approx(1, abs=1e-6)
        for domain in DOMAINS:  # neither domain fills the range: each has one end only
            assert not torch.allclose(pooled.train[domain].image, cohort.train[domain].image, atol=1e-2)

    def test_labels_are_class_indices_of_the_same_slices(self, store_of_three: Store, tiny: RunConfig) -> None:
        three = Cohort(store_of_three, tiny.at("net.classes", 3), CPU)
        label = three.train["source"].label
        assert label is not None
        assert label.shape == (12, 32, 32)
        assert label.unique().tolist() == [0, 1, 2]


class TestSplits:
    def test_no_subject_is_trained_on_and_validated_on(self, cohort: Cohort) -> None:
        for domain in DOMAINS:
            train, val = (Counter(part[domain].subject) for part in (cohort.train, cohort.val))
            assert sorted(train.values()) == [6, 6]
            assert list(val.values()) == [6]
            assert not train.keys() & val.keys()

    def test_target_training_slices_carry_no_label_though_the_store_has_them(
        self, store: Store, cohort: Cohort
    ) -> None:
        assert all(entry.labelled for entry in store.select("target", "train"))
        assert cohort.train["target"].label is None
        assert cohort.val["target"].label is not None

    def test_target_volumes_without_labels_can_be_trained_on(
        self, make_store: Callable[..., Store], tmp_path: Path, tiny: RunConfig
    ) -> None:
        bare = Cohort(make_store(tmp_path, target_labels=False, slices=2), tiny, CPU)
        assert bare.val["target"].label is None
        assert bare.batch(tiny, 1).target.shape == (2, 1, 32, 32)


class TestRefusals:
    """Each with where it is, what was found, the rule and the remedy."""

    def test_a_run_bound_to_another_cohort(self, store: Store, tiny: RunConfig) -> None:
        with pytest.raises(InputError) as error:
            Cohort(store, tiny.at("data.cohort", "0123abcd"), CPU)
        self.check(error.value, store, found=store.fingerprint, rule="0123abcd", remedy="store")

    def test_a_run_bound_to_this_cohort_is_taken(self, store: Store, tiny: RunConfig) -> None:
        assert Cohort(store, tiny.at("data.cohort", store.fingerprint), CPU).fingerprint == store.fingerprint

    def test_a_network_of_another_number_of_classes(self, store: Store, tiny: RunConfig) -> None:
        with pytest.raises(InputError) as error:
            Cohort(store, tiny.at("net.classes", 3), CPU)
        self.check(error.value, store, found="2 classes", rule="net.classes is 3", remedy="set net.classes to 2")

    def test_fewer_training_slices_than_a_batch(self, store: Store, tiny: RunConfig) -> None:
        with pytest.raises(InputError) as error:
            Cohort(store, tiny.at("batch", 13), CPU)
        self.check(error.value, store, found="12 source", rule="13", remedy="at most 12")

    def test_as_many_as_a_batch_are_enough(self, store: Store, tiny: RunConfig) -> None:
        config = tiny.at("batch", 12)
        batch = Cohort(store, config, CPU).batch(config, 7)
        assert len({tuple(x.flatten().tolist()) for x in batch.source}) == 12

    @staticmethod
    def check(error: InputError, store: Store, *, found: str, rule: str, remedy: str) -> None:
        assert error.where == str(store.path)
        assert found in error.found
        assert rule in error.rule
        assert remedy in error.remedy


class TestProbe:
    def test_it_is_the_same_validation_slices_every_time(self, store: Store, tiny: RunConfig, cohort: Cohort) -> None:
        again = Cohort(store, tiny, CPU)
        for domain in DOMAINS:
            probe = cohort.probe(domain, 4)
            assert torch.equal(probe.image, again.probe(domain, 4).image)
            assert set(probe.subject) == set(cohort.val[domain].subject)
            assert len(set(which(probe.image, cohort.val[domain]))) == 4

    def test_it_never_gives_more_than_there_are(self, cohort: Cohort) -> None:
        assert len(cohort.probe("source", 100)) == 6

    def test_it_prefers_slices_that_show_what_is_segmented(self) -> None:
        label = torch.zeros(8, 4, 4, dtype=torch.uint8)
        label[5, :2], label[2, 0] = 1, 1  # 8 and 4 pixels
        slices = Slices(torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 4, 4), label, ("s",) * 8)
        cohort = object.__new__(Cohort)
        cohort.val, cohort.train = {"source": slices}, {}
        assert {2.0, 5.0} <= set(cohort.probe("source", 4).image[:, 0, 0, 0].tolist())

    def test_without_validation_subjects_it_takes_training_slices(
        self, make_store: Callable[..., Store], tmp_path: Path, tiny: RunConfig
    ) -> None:
        lonely = Cohort(make_store(tmp_path, subjects=1, slices=3), tiny, CPU)
        assert len(lonely.val["source"]) == 0
        assert set(lonely.probe("target", 2).subject) == {"t000"}


def test_taking_slices_keeps_image_label_and_subject_together() -> None:
    image, label = torch.arange(3.0).view(3, 1, 1, 1), torch.tensor([[[0]], [[1]], [[2]]], dtype=torch.uint8)
    taken = Slices(image, label, ("a", "b", "c")).take([2, 0])
    assert taken.image.flatten().tolist() == [2, 0]
    assert taken.label is not None
    assert taken.label.flatten().tolist() == [2, 0]
    assert taken.subject == ("c", "a")
    assert len(Slices(image, None, ("a", "b", "c")).take([])) == 0
