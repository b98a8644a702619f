"""Slices of a store as batches: order, shares, scale, and what is refused."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from equipoise.batches import Cohort, needed
from equipoise.config import AugmentConfig, DataConfig, RunConfig
from equipoise.config_base import Leaf
from equipoise.shelf import Shelf, Slices, neighbours
from equipoise.step import Batch
from equipoise.train import fit
from slicestore.errors import InputError
from slicestore.staging import stage
from slicestore.store import DOMAINS, Store, normalise

CPU = torch.device("cpu")


def which(images: Tensor, among: Shelf | Slices) -> list[int]:
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
        staged = stage(store, domain, "val").image.astype(np.float64)  # type: ignore[arg-type]
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


class TestLimits:
    """Other scales than minimum and maximum."""

    def test_fixed_limits_are_those_of_the_configuration(self, store: Store, tiny: RunConfig) -> None:
        config = tiny.at("data.limits", "fixed").at("data.target_high", 5.2)
        fixed = Cohort(store, config, CPU)
        for domain, low, high in (("source", -1.8, 4.4), ("target", -2.8, 5.2)):
            staged = stage(store, domain, "train").image.astype(np.float64)  # type: ignore[arg-type]
            image = fixed.train[domain].image[:, 0].numpy()  # type: ignore[index]
            np.testing.assert_allclose(image, 2 * (staged - low) / (high - low) - 1, atol=2e-6)

    def test_percentiles_are_of_the_training_subjects_and_clip_what_lies_beyond(
        self, store: Store, tiny: RunConfig
    ) -> None:
        clipped = Cohort(store, tiny.at("data.percentile", 5.0), CPU)
        for domain in DOMAINS:
            low, high = store.limits(domain, percentile=5.0)
            entries = store.select(domain, "train")
            tails = [{float(level): tail for level, tail in e.percentiles.items()}[5.0] for e in entries]
            assert low == min(tail[0] for tail in tails)
            assert high == max(tail[1] for tail in tails)
            staged = stage(store, domain, "val").image.astype(np.float64)
            want = (2 * (staged - low) / (high - low) - 1).clip(-1, 1)
            image = clipped.val[domain].image[:, 0].numpy()
            np.testing.assert_allclose(image, want, atol=2e-6)
            assert (image == 1).any()

    @pytest.mark.parametrize("limits", ["domain", "pooled"])
    def test_values_are_those_of_normalise_to_the_last_bit(self, store: Store, tiny: RunConfig, limits: str) -> None:
        cohort = Cohort(store, tiny.at("data.limits", limits), CPU)
        for domain in DOMAINS:
            staged = stage(store, domain, "train", pooled=limits == "pooled")
            assert np.array_equal(cohort.train[domain].image[:, 0].numpy(), normalise(staged.image, staged.limits))


class TestForeground:
    """A set share of slices with foreground; every slice here has some, so half of them are made bare."""

    @pytest.fixture
    def mixed(self, store: Store, tiny: RunConfig) -> Cohort:
        cohort = Cohort(store, tiny, CPU)
        slices = cohort.train["source"].take(range(12))
        assert slices.label is not None
        slices.label[::2] = 0
        cohort.train["source"] = slices
        return cohort

    @staticmethod
    def rich(cohort: Cohort, config: RunConfig, number: int, rank: int = 0) -> int:
        return int(cohort.batch(config, number, rank).label.flatten(1).any(1).sum())

    @pytest.mark.parametrize(
        ("share", "batch", "want"), [(0.5, 4, 2), (0.25, 4, 1), (1, 6, 6), (0.1, 4, 1), (0.6, 5, 3)]
    )
    def test_every_batch_has_the_share_rounded_to_whole_slices_and_at_least_one(
        self, mixed: Cohort, tiny: RunConfig, share: float, batch: int, want: int
    ) -> None:
        config = tiny.at("batch", batch).at("data.foreground", share)
        assert {self.rich(mixed, config, number) for number in range(1, 9)} == {want}

    def test_without_a_share_slices_come_as_they_are(self, mixed: Cohort, tiny: RunConfig) -> None:
        assert len({self.rich(mixed, tiny.at("batch", 4), number) for number in range(1, 9)}) > 1

    def test_no_slice_comes_twice_in_a_batch_and_all_have_come_before_any_comes_again(
        self, mixed: Cohort, tiny: RunConfig
    ) -> None:
        config = tiny.at("batch", 4).at("data.foreground", 0.5)  # 6 with and 6 without: three batches a round
        order = seen(mixed, config, range(1, 13))
        assert all(sorted(order[i : i + 12]) == list(range(12)) for i in range(0, 48, 12))
        assert len({tuple(order[i : i + 12]) for i in range(0, 48, 12)}) == 4

    def test_the_ranks_shares_are_disjoint_and_join_to_the_batch_of_one_process(
        self, mixed: Cohort, tiny: RunConfig
    ) -> None:
        alone = tiny.at("batch", 6).at("data.foreground", 0.5)
        shared = alone.at("workers", 2)
        richness = set()
        for number in range(1, 9):
            whole, shares = mixed.batch(alone, number), [mixed.batch(shared, number, rank) for rank in range(2)]
            for k in range(3):
                assert torch.equal(torch.cat([share[k] for share in shares]), whole[k])
            richness.add(tuple(self.rich(mixed, shared, number, rank) for rank in range(2)))
        assert richness == {(1, 2), (2, 1)}  # three of six, over two ranks in turn

    def test_the_target_domain_has_no_labels_and_keeps_its_order(self, mixed: Cohort, tiny: RunConfig) -> None:
        config = tiny.at("data.foreground", 1.0)
        assert torch.equal(mixed.batch(config, 3).target, mixed.batch(tiny, 3).target)

    def test_too_few_slices_of_a_kind_are_refused_before_training(self, store: Store, tiny: RunConfig) -> None:
        with pytest.raises(InputError) as error:
            Cohort(store, tiny.at("batch", 4).at("data.foreground", 0.5), CPU)
        assert "0 source training slices without foreground" in error.value.found
        assert "takes 2" in error.value.rule
        assert "data.foreground" in error.value.remedy


AUGMENTED = (
    RunConfig(batch=6, data=DataConfig(augment=AugmentConfig(rotation_degrees=20, scale=0.2, flip=0.5, gamma=0.2)))
    .at("data.augment.gain", 0.2)
    .at("data.augment.shift", 0.1)
)


class TestAugmentation:
    def test_it_is_a_pure_function_of_seed_step_and_domain(self, store: Store, cohort: Cohort) -> None:
        forwards = [cohort.batch(AUGMENTED, n) for n in (1, 2, 3)]
        torch.manual_seed(5)
        other = Cohort(store, AUGMENTED, CPU)
        for number in (3, 2, 1):
            assert all(map(torch.equal, other.batch(AUGMENTED, number), forwards[number - 1]))
        again = cohort.batch(AUGMENTED.at("seed", 1), 1)
        assert not any(map(torch.equal, again, forwards[0]))

    def test_shares_of_ranks_join_to_the_batch_of_one_process_bit_for_bit(self, cohort: Cohort) -> None:
        for workers in (2, 3):
            shares = [cohort.batch(AUGMENTED.at("workers", workers), 4, rank) for rank in range(workers)]
            for k, whole in enumerate(cohort.batch(AUGMENTED, 4)):
                assert torch.equal(torch.cat([share[k] for share in shares]), whole)

    def test_the_same_slice_is_changed_otherwise_each_time_it_comes(self, cohort: Cohort) -> None:
        all_of_them = AUGMENTED.at("batch", 12)
        plain = replace(all_of_them, data=DataConfig())
        changed = {}
        for number in (1, 2):
            places = which(cohort.batch(plain, number).source, cohort.train["source"])
            changed[number] = dict(zip(places, cohort.batch(all_of_them, number).source, strict=True))
        assert not any(torch.equal(changed[1][place], changed[2][place]) for place in range(12))

    def test_the_domains_are_changed_independently(self, cohort: Cohort) -> None:
        twins = copy.copy(cohort)
        twins.train = dict.fromkeys(DOMAINS, cohort.train["source"])
        config = AUGMENTED.at("batch", 12)
        plain = twins.batch(replace(config, data=DataConfig()), 1)
        order = [which(x, cohort.train["source"]) for x in (plain.source, plain.target)]
        batch = twins.batch(config, 1)
        target = dict(zip(order[1], batch.target, strict=True))
        assert not any(torch.equal(x, target[i]) for i, x in zip(order[0], batch.source, strict=True))

    def test_labels_follow_their_images(self, store: Store, tiny: RunConfig) -> None:
        config = tiny.at("batch", 6).at("data.augment.rotation_degrees", 90.0).at("data.augment.flip", 0.5)
        cohort = Cohort(store, config, CPU)
        batch = cohort.batch(config, 1)
        structure = batch.label > 0  # brighter than all else in this store's source domain
        assert structure.any()
        for image, inside in zip(batch.source[:, 0], structure, strict=True):
            assert image[inside].mean() > image[~inside].mean() + 0.5

    def test_validation_and_probes_are_left_as_they_are(self, store: Store, cohort: Cohort) -> None:
        changed = Cohort(store, AUGMENTED, CPU)
        for domain in DOMAINS:
            assert torch.equal(changed.val[domain].image, cohort.val[domain].image)
            assert torch.equal(changed.probe(domain, 3).image, cohort.probe(domain, 3).image)


class TestWhereSlicesLie:
    """The same batches, whatever holds the slices and however many threads fetch them."""

    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("memory", [None, 0], ids=["memory", "stream"])
    def test_threads_and_streaming_change_nothing(
        self, store: Store, cohort: Cohort, threads: int, memory: int | None
    ) -> None:
        config = AUGMENTED.at("workers", 2)
        other = Cohort(store, config, CPU, threads=threads, memory=memory, share=False)
        for number in (1, 2, 3, 7, 2):  # forwards, with a leap, and back
            for rank in range(2):
                assert all(map(torch.equal, other.batch(config, number, rank), cohort.batch(config, number, rank)))
        for domain in DOMAINS:
            val, same = other.val[domain], cohort.val[domain]
            assert torch.equal(val.image, same.image)
            assert val.label is not None
            assert same.label is not None
            assert torch.equal(val.label, same.label)
            assert torch.equal(other.probe(domain, 3).image, cohort.probe(domain, 3).image)

    def test_damage_met_while_streaming_is_told(self, store: Store, tiny: RunConfig, tmp_path: Path) -> None:
        shutil.copytree(str(store.path), tmp_path / "cohort.zarr")
        copied = Store.open(tmp_path / "cohort.zarr")
        config = tiny.at("batch", 12)
        cohort = Cohort(copied, config, CPU, memory=0, share=False)
        entry = copied.select("source", "train")[0]
        file = tmp_path / "cohort.zarr" / entry.group / "image" / "c" / "0" / "0" / "0"
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
        with pytest.raises(InputError, match=f"image of source subject {entry.subject}"):
            cohort.batch(config, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnADevice:
    @pytest.mark.parametrize("device_share", [0.25, 0.0], ids=["resident", "gathered"])
    @pytest.mark.parametrize("memory", [None, 0], ids=["memory", "stream"])
    def test_batches_are_those_of_the_cpu(
        self, store: Store, cohort: Cohort, tiny: RunConfig, device_share: float, memory: int | None
    ) -> None:
        config = tiny.at("batch", 6)
        other = Cohort(
            store, config, torch.device("cuda"), memory=memory, share=memory is None, device_share=device_share
        )
        for number in (1, 2, 3, 7):
            for got, want in zip(other.batch(config, number), cohort.batch(config, number), strict=True):
                assert got.device.type == "cuda"
                assert torch.equal(got.cpu(), want)
            for got, want in zip(other.batch(AUGMENTED, number), cohort.batch(AUGMENTED, number), strict=True):
                close = torch.isclose(got.cpu(), want, atol=1e-3)
                assert close.float().mean() > 0.999, "kernels round otherwise, and a label may fall to its neighbour"


class TestNeighbours:
    """2.5D: each slice between those below and above it."""

    def test_the_first_and_last_slice_of_a_volume_stand_in_for_what_lies_beyond(
        self, store: Store, cohort: Cohort, tiny: RunConfig
    ) -> None:
        three = Cohort(store, tiny.at("net.channels", 3), CPU).train["source"]
        flat = cohort.train["source"].image[:, 0]  # two volumes of six slices
        assert three.image.shape == (12, 3, 32, 32)
        for k in range(12):
            below, above = (k if k % 6 == 0 else k - 1), (k if k % 6 == 5 else k + 1)
            assert torch.equal(three.image[k], flat[[below, k, above]])

    def test_positions_that_were_dropped_are_never_bridged(self) -> None:
        subject, position = np.array([0, 0, 0, 0, 1, 1]), np.array([3, 4, 6, 7, 7, 8])
        want = [[0, 0, 1], [0, 1, 1], [2, 2, 3], [2, 3, 3], [4, 4, 5], [4, 5, 5]]
        assert neighbours(subject, position, 3).tolist() == want

    def test_of_five_the_outer_ones_fall_back_to_the_inner_ones(self) -> None:
        subject, position = np.zeros(5, dtype=int), np.array([0, 1, 2, 4, 6])
        want = [[0, 0, 0, 1, 2], [0, 0, 1, 2, 2], [0, 1, 2, 2, 3], [2, 3, 3, 3, 4], [3, 4, 4, 4, 4]]
        assert neighbours(subject, position, 5).tolist() == want

    def test_one_channel_is_the_slice_itself_and_no_slices_have_no_neighbours(self) -> None:
        assert neighbours(np.array([0, 0]), np.array([1, 2]), 1).tolist() == [[0], [1]]
        assert neighbours(np.empty(0, dtype=int), np.empty(0, dtype=int), 3).shape == (0, 3)

    def test_a_run_of_three_channels_trains_evaluates_and_draws_the_middle_slice(
        self, store: Store, tiny: RunConfig
    ) -> None:
        config = tiny.at("net.channels", 3).at("data.augment.flip", 0.5)
        cohort = Cohort(store, config, CPU)
        last = list(fit(config, cohort))[-1]
        assert last.verdict is not None
        assert {"quality/translated_dice", "quality/target_dice"} <= set(last.signals)
        assert last.panels is not None
        probe = cohort.probe("source", 4)
        assert np.array_equal(last.panels.images["x_s"], probe.image[:, 1].numpy())
        assert not torch.equal(probe.image[:, 1], probe.image[:, 0])


class TestSplitBySlice:
    def test_it_lets_subjects_train_and_validate_which_the_default_never_does(
        self, store: Store, cohort: Cohort, tiny: RunConfig
    ) -> None:
        leaky = Cohort(store, tiny.at("data.split", "slice"), CPU)
        for domain in DOMAINS:
            train, val = leaky.train[domain], leaky.val[domain]
            assert set(train.subject) & set(val.subject)
            assert (len(train), len(val)) == (14, 5)  # of 4 subjects with 6 slices: 60 and 20 % of 24
            same = [(a == b).all() for a in train.image for b in val.image]
            assert not any(same), "the slices themselves are disjoint"
            assert not set(cohort.train[domain].subject) & set(cohort.val[domain].subject)


@pytest.mark.parametrize(
    ("path", "value", "same"),
    [
        ("data.cohort", "abc", False),
        ("data.split", "slice", False),
        ("data.limits", "pooled", False),
        ("data.source_low", -1.0, False),
        ("data.target_high", 5.0, False),
        ("data.percentile", 0.5, False),
        ("data.foreground", 0.5, False),
        ("net.channels", 3, False),
        ("net.classes", 3, False),
        ("batch", 4, False),
        ("data.augment.flip", 0.5, True),
        ("net.width", 1.0, True),
        ("loss.cycle", 5.0, True),
        ("optim.lr", 1e-4, True),
        ("steps", 9, True),
        ("seed", 1, True),
    ],
)
def test_runs_that_agree_in_what_a_cohort_depends_on_may_share_one(
    tiny: RunConfig, path: str, value: Leaf, same: bool
) -> None:
    assert (needed(tiny.at(path, value)) == needed(tiny)) is same


def test_a_resumed_run_is_given_the_batches_it_would_have_been_given(cohort: Cohort) -> None:
    """The sampler's position is the step in the checkpoint."""
    config = AUGMENTED.at("steps", 8).at("evaluations", 2).at("net.width", 0.0625).at("batch", 2)
    state = next(progress.state() for progress in fit(config, cohort) if progress.step == 4)
    assert state.shared["step"] == 4

    class Listening(Cohort):
        def __init__(self) -> None:
            self.__dict__ |= cohort.__dict__
            self.asked: list[tuple[int, Batch]] = []

        def batch(self, config: RunConfig, step: int, rank: int = 0) -> Batch:
            self.asked.append((step, super().batch(config, step, rank)))
            return self.asked[-1][1]

    listening = Listening()
    list(fit(config, listening, resume=state))
    assert [step for step, _ in listening.asked] == [5, 6, 7, 8]
    for step, batch in listening.asked:
        assert all(map(torch.equal, batch, cohort.batch(config, step)))


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
