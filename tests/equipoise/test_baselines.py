"""What SIFA is compared with learns from what it may, and from nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from equipoise.baselines import (
    Curve,
    Look,
    cyclegan,
    cyclegan_then_segment,
    matched,
    segment,
    segment_translated,
    sifa,
    source_only,
    supervised,
    taught_by_target,
)
from equipoise.batches import Cohort
from equipoise.config import RunConfig
from equipoise.shelf import Slices
from slicestore.errors import InputError
from slicestore.store import Store

CPU = torch.device("cpu")
Method = Callable[[RunConfig, Cohort], Iterator[Look]]


@pytest.fixture(scope="module")
def unlabelled(make_store: Callable[..., Store], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The two-class store, without a single target mask."""
    return make_store(tmp_path_factory.mktemp("unlabelled"), target_labels=False)


@pytest.fixture(scope="module")
def brief(tiny: RunConfig) -> RunConfig:
    """Three steps: enough for a label to reach the weights, were it allowed to."""
    return tiny.at("steps", 3).at("evaluations", 1)


def last(looks: Iterator[Look]) -> Look:
    *_, look = looks
    return look


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def with_inverted_source_masks(cohort: Cohort) -> Cohort:
    """The cohort with structure and background exchanged in the masks of its source training slices."""
    held = cohort.train["source"].take(range(len(cohort.train["source"])))
    assert held.label is not None
    changed = copy.copy(cohort)
    changed.train = {**cohort.train, "source": replace(held, label=1 - held.label)}
    return changed


@pytest.mark.parametrize("method", [source_only, matched, cyclegan_then_segment, sifa])
def test_target_masks_change_nothing_but_what_is_measured(
    method: Method, store: Store, unlabelled: Store, brief: RunConfig
) -> None:
    seeing, blind = (last(method(brief, Cohort(s, brief, CPU))) for s in (store, unlabelled))
    assert same(seeing.state(), blind.state())
    assert "quality/target_dice" in seeing.quality
    assert "quality/target_dice" not in blind.quality


@pytest.mark.parametrize("method", [source_only, matched, cyclegan_then_segment])
def test_source_masks_teach_the_methods_that_have_no_others(method: Method, cohort: Cohort, brief: RunConfig) -> None:
    poisoned = with_inverted_source_masks(cohort)
    one, other = (last(method(brief, c)).state() for c in (cohort, poisoned))
    assert not torch.equal(one["segmenter.classify.weight"], other["segmenter.classify.weight"])


def test_the_oracle_never_sees_source_masks_or_images(store: Store, cohort: Cohort, brief: RunConfig) -> None:
    held = cohort.train["source"].take(range(len(cohort.train["source"])))
    poisoned = copy.copy(cohort)
    label = torch.full_like(torch.as_tensor(held.label), 77)  # no class has this number
    poisoned.train = {**cohort.train, "source": Slices(held.image * float("nan"), label, held.subject)}
    one, other = (last(supervised(brief, c, store)).state() for c in (cohort, poisoned))
    assert same(one, other)
    assert all(x.isfinite().all() for x in one.values())


def test_the_oracle_is_taught_by_training_subjects_alone_and_by_their_own_masks(
    store: Store, cohort: Cohort, brief: RunConfig
) -> None:
    taught = taught_by_target(brief, cohort, store).train["source"]
    label = taught.label
    assert label is not None
    training = store.select("target", "train")
    assert set(taught.subject) == {e.subject for e in training}
    assert not set(taught.subject) & set(cohort.val["target"].subject)
    assert len(taught) == len(label) == sum(e.slices for e in training)
    # The structure is darker than its surroundings in this target domain: masks that belong to other slices, or to
    # slices in another order, would not fit so well.
    for image, mask in zip(taught.image[:, 0], label, strict=True):
        ring = torch.nn.functional.max_pool2d((mask > 0).float()[None], 5, 1, 2)[0].bool() & (mask == 0)
        assert image[mask > 0].mean() < image[ring].mean() - 0.1
    assert cohort.train["target"].label is None, "the cohort itself goes on hiding them"


def test_the_oracle_refuses_what_it_cannot_be_taught_by(store: Store, unlabelled: Store, brief: RunConfig) -> None:
    with pytest.raises(InputError, match="0 labelled target training slices"):
        taught_by_target(brief, Cohort(unlabelled, brief, CPU), unlabelled)
    by_slice = brief.at("data.split", "slice")
    with pytest.raises(ValueError, match="'slice'"):
        taught_by_target(by_slice, Cohort(store, by_slice, CPU), store)


def test_segmenting_translations_leaves_the_generator_unmoved(cohort: Cohort, brief: RunConfig) -> None:
    generator = cyclegan(brief, cohort)
    before = copy.deepcopy(generator.state_dict())
    look = last(segment_translated(brief, cohort, generator))
    found = {k.removeprefix("generator."): v for k, v in look.state().items() if k.startswith("generator.")}
    assert same(found, before)
    assert same(dict(generator.state_dict()), before)


def test_cyclegan_is_a_run_without_segmentation_losses_whose_generator_has_moved(
    cohort: Cohort, brief: RunConfig
) -> None:
    generator = cyclegan(brief, cohort)
    poisoned = cyclegan(brief, with_inverted_source_masks(cohort))
    assert same(dict(generator.state_dict()), dict(poisoned.state_dict())), "labels play no part in it"
    shorter = cyclegan(brief.at("steps", 2), cohort)
    assert not same(dict(generator.state_dict()), dict(shorter.state_dict()))
    assert not any(p.requires_grad for p in generator.parameters())


def test_a_segmenter_learns_what_its_labels_say(store: Store, cohort: Cohort, brief: RunConfig) -> None:
    config = brief.at("steps", 120).at("batch", 4).at("optim.lr", 3e-3).at("evaluations", 2)
    looks = list(supervised(config, cohort, store))
    assert [look.step for look in looks] == [60, 120]
    assert looks[-1].quality["quality/target_dice"] > 0.6


def test_methods_start_from_the_same_weights_and_look_at_the_same_subjects(cohort: Cohort, brief: RunConfig) -> None:
    still = brief.at("optim.lr", 1e-12).at("steps", 1).at("evaluations", 1)
    first = cohort.batch(still, 1)
    one = last(segment(still, cohort, lambda _: (first.source, first.label), nn.Identity()))
    other = last(sifa(still, cohort))
    weights = {k: v for k, v in other.state().items() if k.startswith("segmenter.")}
    for name, weight in weights.items():
        torch.testing.assert_close(one.state()[name], weight, rtol=0, atol=1e-9)
    for name in ("x_s", "x_t"):
        assert (one.panels.images[name] == other.panels.images[name]).all()


def test_panels_hold_no_image_of_a_network_that_was_not_trained(cohort: Cohort, brief: RunConfig) -> None:
    look = last(source_only(brief, cohort))
    assert set(look.panels.images) == {"x_s", "x_st", "x_t"}
    assert (look.panels.images["x_st"] == look.panels.images["x_s"]).all()
    assert set(look.panels.masks) == {"y_s", "mask_st", "mask_t"}


def test_several_workers_are_refused(cohort: Cohort, brief: RunConfig) -> None:
    with pytest.raises(ValueError, match="workers = 2: must be 1"):
        next(source_only(brief.at("workers", 2), cohort))


# --- grey values ------------------------------------------------------------------------------------------------------


def test_the_curve_of_grey_values_rises_in_air_and_falls_in_tissue_with_the_target_s_histogram() -> None:
    draw = np.random.default_rng(0)
    air, tissue = draw.normal(-0.9, 0.01, 6000), draw.uniform(-0.2, 0.8, 4000)
    source = torch.from_numpy(np.concatenate([air, tissue]).reshape(4, 1, 50, 50)).float()
    other = np.concatenate([draw.normal(-0.95, 0.02, 5000), draw.beta(2, 5, 5000) * 0.5 + 0.3])
    target = torch.from_numpy(other.reshape(4, 1, 50, 50)).float()
    curve = Curve.between(source, target)
    made = curve(source)
    assert made.shape == source.shape
    dark, bright = torch.tensor([-0.91, -0.89]), torch.tensor([-0.1, 0.1, 0.5, 0.7])
    assert (curve(dark).diff() > 0).all()
    assert (curve(bright).diff() < 0).all()
    levels = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(
        np.quantile(made[source > -0.5], levels), np.quantile(target[target > -0.5], levels), atol=0.01
    )
    np.testing.assert_allclose(
        np.quantile(made[source < -0.5], levels), np.quantile(target[target < -0.5], levels), atol=0.005
    )


def test_values_beyond_the_training_images_become_the_curve_s_ends() -> None:
    curve = Curve(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 7.0, 3.0]))
    assert curve(torch.tensor([-9.0, 0.0, 0.5, 1.0, 1.75, 2.0, 9.0])).tolist() == [5, 5, 6, 7, 4, 3, 3]
