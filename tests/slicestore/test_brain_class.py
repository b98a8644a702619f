"""The class of brain beside a label's own: what it takes, what it leaves alone, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slicestore import phantom
from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.ingest import ingest
from slicestore.inputs import Input
from slicestore.preprocess import prepare, restore, restore_mask
from slicestore.settings import Prepared, Preprocessing
from slicestore.staging import stage
from slicestore.store import Store
from slicestore.volume import Volume, read, write

Cohort = Callable[..., list[Input]]
PLAIN = Preprocessing(size=8, spacing_mm=2.0, centre="grid")
BRAIN = replace(PLAIN, brain_class=2)


def noise(*shape: int) -> Volume:
    """An image on voxels of 1 mm."""
    return volume(np.random.default_rng(0).normal(size=shape))


def volume(voxels: np.ndarray) -> Volume:
    return Volume(voxels, Geometry(voxels.shape[::-1], (1.0, 1.0, 1.0)))


def masks(shape: tuple[int, int, int] = (1, 16, 16)) -> tuple[np.ndarray, np.ndarray]:
    """An empty label, and a brain that leaves a frame of 4 voxels, two pixels."""
    label, brain = (np.zeros(shape, dtype=np.uint8) for _ in range(2))
    brain[:, 4:12, 4:12] = 1
    return label, brain


def parts(made: Prepared) -> tuple[np.ndarray, np.ndarray]:
    assert made.label is not None
    assert made.fraction is not None
    return made.label, made.fraction


# --- what it takes ----------------------------------------------------------------------------------------------------


def test_brain_is_what_is_left_of_the_brain_mask_by_the_label() -> None:
    label, brain = masks()
    label[0, 4:8, 6:9] = 1  # in two rows of pixels: one whole, and half of its right neighbour
    label[0, 0:2, 0:2] = 1  # one whole pixel outside the brain
    made = prepare(noise(1, 16, 16), volume(label), BRAIN, brain=volume(255 * brain))
    hard, fraction = parts(made)
    by_hand = np.zeros((8, 8), dtype=np.uint8)
    by_hand[2:6, 2:6] = 2
    by_hand[2:4, 3] = 1
    by_hand[0, 0] = 1
    by_hand[2, 4] = 1  # 16 voxels are 4 pixels: three whole ones and of the two halves that which comes first
    assert hard[0].tolist() == by_hand.tolist()
    share = np.zeros((8, 8), dtype=np.uint8)
    share[2:4, 3], share[2:4, 4], share[0, 0] = 255, 128, 255
    assert fraction[0].tolist() == share.tolist()
    assert made.record["label"] == {
        "classes": 3,
        "thresholds": [128 / 255, 1.0],
        "volume_mm3": {"before": [16.0, 52.0], "after": [16.0, 52.0]},  # 64 - 12 voxels, 16 - 3 pixels of 4 mm2
        "pieces": {"before": [2, 1], "after": [2, 1]},
        "centreline": [made.record["label"]["centreline"][0], None],
        "stripped": 0.0,
        "lost": 0.0,
    }


def test_a_volume_without_some_of_the_labels_classes_numbers_its_brain_as_the_others_do() -> None:
    label, brain = masks()
    label[0, 4:6, 4:6] = 1
    made = prepare(noise(1, 16, 16), volume(label), replace(BRAIN, brain_class=3), brain=volume(brain))
    hard, _ = parts(made)
    assert np.bincount(hard.ravel(), minlength=4).tolist() == [48, 1, 0, 15]
    facts = made.record["label"]
    assert facts["classes"] == 4
    assert facts["thresholds"] == [1.0, 0.0, 1.0]
    assert facts["volume_mm3"] == {"before": [4.0, 0.0, 60.0], "after": [4.0, 0.0, 60.0]}
    assert facts["centreline"][1:] == [None, None]
    bare = prepare(noise(1, 16, 16), volume(np.zeros_like(label)), BRAIN, brain=volume(brain))
    assert set(np.unique(parts(bare)[0])) == {0, 2}
    assert not parts(bare)[1].any()
    assert bare.record["label"]["classes"] == 3


def test_in_a_stripped_image_all_that_is_seen_has_a_class() -> None:
    label, brain = masks()
    label[0, 4:6, 0:8] = 1  # half of it outside the brain
    made = prepare(noise(1, 16, 16), volume(label), replace(BRAIN, strip=True), brain=volume(brain))
    hard, _ = parts(made)
    inside = np.zeros((8, 8), dtype=bool)
    inside[2:6, 2:6] = True
    assert ((hard[0] > 0) == inside).all()
    assert np.count_nonzero(hard == 1) == 2
    assert made.record["label"]["stripped"] == 0.5


@pytest.mark.parametrize("modality", ["tof", "swi"])
@pytest.mark.parametrize("slices", ["all", "foreground"])
def test_the_labels_own_classes_are_those_of_a_store_without_it(modality: Any, slices: Any) -> None:
    """On a phantom: pixels, shares, slices, facts, and the masks that lead back to the scan."""
    head = phantom.head(modality, subject=1)
    config = Preprocessing(size=88, spacing_mm=2.0, slices=slices)
    plain = prepare(head.image, head.vessel, config)
    made = prepare(head.image, head.vessel, replace(config, brain_class=2), brain=head.brain)
    (was, share), (now, same_share) = parts(plain), parts(made)
    assert np.array_equal(was == 1, now == 1)
    assert set(np.unique(now)) == {0, 1, 2}
    assert np.array_equal(share, same_share)
    assert np.array_equal(plain.image, made.image)
    assert plain.record["slices"] == made.record["slices"]
    before, after = (one.record["label"] for one in (plain, made))
    for name in ("thresholds", "pieces", "volume_mm3", "centreline"):
        if isinstance(before[name], dict):
            assert before[name] == {when: values[:1] for when, values in after[name].items()}
        else:
            assert before[name] == after[name][:1]
    assert (before["stripped"], before["lost"]) == (after["stripped"], after["lost"])
    back = restore(now, made.record).voxels
    assert np.array_equal(restore(was, plain.record).voxels == 1, back == 1)
    assert np.array_equal(restore_mask(share, plain.record).voxels, restore_mask(same_share, made.record).voxels)
    if slices == "all":
        assert after["volume_mm3"]["after"][1] == pytest.approx(after["volume_mm3"]["before"][1], rel=0.02)
        both = np.count_nonzero((back == 2) & (head.brain.voxels > 0) & (head.vessel.voxels == 0))
        assert 2 * both / (np.count_nonzero(back == 2) + after["volume_mm3"]["before"][1] / voxel(head)) > 0.94


def voxel(head: phantom.Head) -> float:
    return float(np.prod(head.image.geometry.spacing_mm))


# --- what foreground means --------------------------------------------------------------------------------------------


def test_a_slice_that_shows_brain_alone_shows_no_foreground() -> None:
    label, brain = masks((3, 16, 16))
    label[1, 6:8, 6:8] = 1
    config = replace(BRAIN, slices="foreground")
    assert prepare(noise(3, 16, 16), volume(label), config, brain=volume(brain)).record["slices"] == [1]


@pytest.mark.parametrize("how", [{}, {"share": False}, {"share": False, "memory": 0}])
def test_the_area_of_a_staged_slice_is_that_of_the_labels_own_classes(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing, how: dict[str, Any]
) -> None:
    inputs = with_brains(make_cohort(tmp_path / "raw"))
    plain = ingest(inputs, tmp_path / "plain.zarr", small)
    store = ingest(inputs, tmp_path / "brain.zarr", replace(small, brain_class=2))
    assert (plain.classes, store.classes) == (2, 3)
    was, now = (stage(one, "source", "train", **how) for one in (plain, store))
    assert was.area is not None
    assert now.area is not None
    assert now.label is not None
    assert now.area.tolist() == was.area.tolist()
    assert now.area.sum() == 48  # 8 x 8 voxels of half a millimetre in three slices
    assert (now.area > 0).tolist() == [False, True, True, True, False]
    assert (now.label == 2).any(axis=(1, 2)).all()  # though brain is on every slice


# --- stores -----------------------------------------------------------------------------------------------------------


def with_brains(inputs: list[Input]) -> list[Input]:
    """Write a brain mask beside every image of the small cohort."""
    masked = [replace(item, brain=item.image.with_name(f"{item.subject}_brain_mask.nii.gz")) for item in inputs]
    for item in masked:
        grid = read(item.image).geometry
        mask = np.zeros(grid.size[::-1], dtype=np.uint8)
        mask[:, 4:20, 3:18] = 1
        write(Volume(mask, grid), item.brain or "")
    return masked


def steps(inputs: list[Input], store: Path, config: Preprocessing) -> list[str]:
    said: list[str] = []
    ingest(inputs, store, config, progress=lambda done, total, what: said.append(what))
    return said


def test_a_labelled_volume_without_a_brain_mask_is_refused_before_anything_is_written(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs = with_brains(make_cohort(tmp_path / "raw", target_labels=True))
    for number in (1, 3):  # of a source, and of a target whose label judges
        lacking = [replace(item, brain=None) if i == number else item for i, item in enumerate(inputs)]
        with pytest.raises(InputError, match=rf"{inputs[number].image.name}: found no brain mask; brain_class needs"):
            ingest(lacking, tmp_path / "c.zarr", replace(small, brain_class=2))
        assert not (tmp_path / "c.zarr").exists()


def test_the_brain_masks_of_unlabelled_volumes_do_not_count(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs, config = with_brains(make_cohort(tmp_path / "raw")), replace(small, brain_class=2)
    assert steps(inputs, tmp_path / "c.zarr", config) == ["s000 made", "s001 made", "t000 made", "t001 made"]
    without = [replace(item, brain=None) if item.domain == "target" else item for item in inputs]
    assert all(step.endswith("kept") for step in steps(without, tmp_path / "c.zarr", config))
    mask = read(inputs[0].brain or "")
    mask.voxels[2, 5, 5] = 0
    write(mask, inputs[0].brain or "")
    assert steps(inputs, tmp_path / "c.zarr", config) == ["s001 kept", "t000 kept", "t001 kept", "s000 made"]
    store = Store.open(tmp_path / "c.zarr")
    assert [entry.classes for entry in store.entries] == [3, 3, 0, 0]


def test_a_class_that_the_label_has_already_is_refused_by_name(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs = with_brains(make_cohort(tmp_path / "raw"))
    label = read(inputs[1].label or "")
    write(Volume(2 * label.voxels, label.geometry), inputs[1].label or "")
    with pytest.raises(InputError, match=rf"{(inputs[1].label or Path()).name}: found class 2.*set brain_class to 3"):
        ingest(inputs, tmp_path / "c.zarr", replace(small, brain_class=2))
    assert not (tmp_path / "c.zarr").exists()


def test_a_gap_between_the_labels_classes_and_brain_is_refused(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs = with_brains(make_cohort(tmp_path / "raw"))
    with pytest.raises(InputError, match=r"class 4, but no voxel of class 2, 3 in any.*take a brain_class below 4"):
        ingest(inputs, tmp_path / "c.zarr", replace(small, brain_class=4))


@pytest.mark.parametrize("number", [1, -1, 32, True])
def test_a_number_that_can_be_no_class_of_brain_is_refused(number: int) -> None:
    with pytest.raises(InputError, match=rf"brain_class: found {number}; .*take 2"):
        Preprocessing(brain_class=number)


def test_stores_made_before_there_was_such_a_class_are_kept(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    assert Preprocessing().fingerprint == "fe8ba095cb59f29b"  # as VERSION 3 gave it then
    assert Preprocessing(strip=True, centre="brain").fingerprint == "3a6a27b07943e605"
    inputs, path = make_cohort(tmp_path / "raw"), tmp_path / "c.zarr"
    fingerprint = ingest(inputs, path, small).fingerprint
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["preprocessing"]["brain_class"]  # as it was written then
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert Store.open(path).preprocessing == small
    assert all(step.endswith("kept") for step in steps(inputs, path, small))
    assert Store.open(path).fingerprint == fingerprint
