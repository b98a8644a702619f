"""The chain from raw volume to slices and back: each step against values worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.preprocess import Preprocessing, frame, orient, prepare, resample, resample_label, restore, standardise
from slicestore.volume import Volume, read


def turned(code: str, angles: tuple[float, float, float] = (0.2, -0.1, 0.3)) -> Volume:
    """An oblique volume of random voxels whose axes point roughly to `code`."""
    voxels = np.random.default_rng(0).integers(0, 1000, (6, 8, 10)).astype(np.int16)
    image = sitk.DICOMOrient(Volume(voxels, Geometry((10, 8, 6), (0.5, 0.75, 2.0), (4.0, -5.0, 6.0))).to_image(), code)
    turn = np.reshape(sitk.Euler3DTransform((0, 0, 0), *angles).GetMatrix(), (3, 3))
    image.SetDirection((turn @ np.reshape(image.GetDirection(), (3, 3))).ravel())
    return Volume.from_image(image)


def flat(voxels: object, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    """An axial volume in scanner axes; two dimensions make one slice."""
    array = np.asarray(voxels)
    array = array[None] if array.ndim == 2 else array
    return Volume(array, Geometry(array.shape[::-1], spacing_mm))  # type: ignore[arg-type]


def world(geometry: Geometry, axis: int) -> np.ndarray:
    """A coordinate in millimetres at every voxel, (z, y, x)."""
    width, height, depth = geometry.size
    return np.array(
        [[[geometry.point_mm((x, y, z))[axis] for x in range(width)] for y in range(height)] for z in range(depth)]
    )


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * np.count_nonzero((a > 0) & (b > 0)) / (np.count_nonzero(a) + np.count_nonzero(b)))


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "value"), [("size", 100), ("size", 0), ("spacing_mm", 0.0), ("pad", "mirror")])
def test_a_setting_that_makes_no_sense_is_refused(setting: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"Preprocessing\.{setting}: found .*{value}"):
        Preprocessing(**{setting: value})  # type: ignore[arg-type]


def test_the_fingerprint_depends_on_every_setting_and_on_nothing_else() -> None:
    variants = [
        Preprocessing(),
        Preprocessing(size=128),
        Preprocessing(spacing_mm=0.5),
        Preprocessing(pad="zero"),
        Preprocessing(drop_empty=True),
    ]
    assert len({config.fingerprint for config in variants}) == len(variants)
    assert Preprocessing().fingerprint == Preprocessing(size=256).fingerprint
    assert len(Preprocessing().fingerprint) == 16


# --- orientation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["LPS", "RAS", "SAR", "IPL", "PIR", "ASL", "LIP"])
def test_orientation_agrees_with_simpleitk(code: str) -> None:
    volume = turned(code)
    ours, theirs = orient(volume), Volume.from_image(sitk.DICOMOrient(volume.to_image(), "LPS"))
    assert np.array_equal(ours.voxels, theirs.voxels)
    assert not ours.geometry.differences(theirs.geometry)


# --- resampling -------------------------------------------------------------------------------------------------------


def test_shrinking_averages_over_the_area_of_each_new_pixel() -> None:
    halved = resample(flat([[0, 2, 4, 6], [2, 4, 6, 8]]), 2.0)
    assert np.allclose(halved.voxels, [[[2, 6]]])
    thirds = resample(flat([[0, 3, 6], [0, 3, 6]], (1.0, 1.5, 1.0)), 1.5)  # (1 x 0 + 0.5 x 3) / 1.5 and mirrored
    assert np.allclose(thirds.voxels, [[[1, 5], [1, 5]]])


def test_enlarging_is_linear_between_pixel_centres() -> None:
    doubled = resample(flat([[0, 4]], (2.0, 1.0, 1.0)), 1.0)
    assert np.allclose(doubled.voxels, [[[0, 1, 3, 4]]])


def test_the_spacing_becomes_exact_and_the_outer_corner_stays() -> None:
    new = resample(flat(np.zeros((2, 7, 10)), (0.29, 0.29, 0.6)), 0.89).geometry
    assert new.spacing_mm == (0.89, 0.89, 0.6)
    assert new.size == (3, 2, 2)  # 10 x 0.29 / 0.89 = 3.26, 7 x 0.29 / 0.89 = 2.28
    assert new.point_mm((-0.5, -0.5, 0.0)) == pytest.approx((-0.145, -0.145, 0.0))


def test_an_unchanged_spacing_changes_nothing() -> None:
    volume = turned("LPS", (0.0, 0.0, 0.0))
    square = Volume(volume.voxels, Geometry(volume.geometry.size, (0.5, 0.5, 2.0)))
    same = resample(square, 0.5)
    assert np.array_equal(same.voxels, square.voxels)
    assert same.geometry == square.geometry


def test_averaging_lowers_noise_as_its_weights_predict_and_subsampling_does_not() -> None:
    noise = flat(np.random.default_rng(0).normal(0, 15, (8, 300, 300)).astype(np.float32), (0.29, 0.29, 1.0))
    shrunk = resample(noise, 0.87)  # exactly three by three voxels to a pixel
    assert shrunk.voxels.std() == pytest.approx(15 / 3, rel=0.02)
    assert noise.voxels[:, 1::3, 1::3].std() == pytest.approx(15, rel=0.02)


@pytest.mark.parametrize("code", ["LPS", "RAS", "SAR", "ASL"])
@pytest.mark.parametrize(("spacing_mm", "error_mm"), [(1.5, 1e-4), (1.1, 0.08)])
def test_every_pixel_stays_at_its_place_in_the_patient(code: str, spacing_mm: float, error_mm: float) -> None:
    """An image of a world coordinate, averaged over a pixel, is the coordinate of that pixel's centre.

    Exactly so for whole voxels (1.5 mm is 3 of 0.5 and 2 of 0.75); a part of a voxel counts as if it lay at its centre.
    """
    raw = turned(code)
    for axis in range(3):
        made = resample(orient(Volume(world(raw.geometry, axis), raw.geometry)), spacing_mm)
        assert np.abs(made.voxels - world(made.geometry, axis))[:, :-1, :-1].max() < error_mm
        for size in (4, 16):
            framed, (down, right) = frame(made, size, np.nan)
            assert np.nanmedian(np.abs(framed.voxels - world(framed.geometry, axis))) < error_mm
            assert framed.geometry.point_mm((right, down, 0)) == pytest.approx(made.geometry.origin_mm)


def test_a_bright_point_keeps_its_millimetres_through_the_whole_chain() -> None:
    raw = turned("SAR")
    voxels = np.zeros(raw.voxels.shape, dtype=np.float32)
    voxels[2, 4, 3] = 1000
    prepared = prepare(Volume(voxels, raw.geometry), None, Preprocessing(size=16, spacing_mm=0.5))
    z, y, x = (int(i) for i in np.unravel_index(np.argmax(prepared.image), prepared.image.shape))
    found = Geometry.from_dict(prepared.record["prepared"]).point_mm((x, y, z))
    assert (
        np.linalg.norm(np.subtract(found, raw.geometry.point_mm((3, 4, 2)))) < 0.5 * 2**0.5
    )  # half a pixel's diagonal


# --- intensities and frame --------------------------------------------------------------------------------------------


def test_a_volume_is_standardised_by_its_own_mean_and_deviation() -> None:
    standard, mean, std = standardise(flat([[1.0, 3.0], [1.0, 3.0]]))
    assert (mean, std) == (2.0, 1.0)
    assert standard.voxels.tolist() == [[[-1, 1], [-1, 1]]]


@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_image_is_refused_by_name(value: int) -> None:
    with pytest.raises(InputError, match=f"scan.nii: found the one value {value} in every voxel"):
        prepare(flat(np.full((2, 8, 8), value)), None, Preprocessing(size=8), where="scan.nii")


def test_the_crop_and_the_pad_are_centred() -> None:
    framed, shift = frame(flat([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]] * 3), 8, 0)
    assert shift == (2, -1)  # 3 rows sink by (8 - 3) // 2, 11 columns lose (11 - 8) // 2 on the left
    assert framed.voxels[0, 2:5].tolist() == [[2, 3, 4, 5, 6, 7, 8, 9]] * 3
    assert not framed.voxels[0, [0, 1, 5, 6, 7]].any()
    assert framed.geometry.origin_mm == (1.0, -2.0, 0.0)


def test_the_frame_is_air_or_zero_as_told() -> None:
    image = np.full((2, 8, 8), 10.0)
    image[:, :4], image[:, 6:] = 0, 20  # half air
    background, zero = (
        prepare(flat(image), None, Preprocessing(size=16, spacing_mm=1.0, pad=pad)) for pad in ("background", "zero")
    )  # type: ignore[arg-type]
    mean, std = image.mean(), image.std()
    assert background.image[0, 0, 0] == np.float16(-mean / std)
    assert zero.image[0, 0, 0] == 0
    assert np.array_equal(background.image[:, 4:12, 4:12], zero.image[:, 4:12, 4:12])
    assert background.record["minimum"] == pytest.approx(-mean / std, rel=1e-3)
    assert background.record["maximum"] == pytest.approx((20 - mean) / std, rel=1e-3)


def test_one_stray_voxel_does_not_set_the_background() -> None:
    image = np.random.default_rng(0).normal(100, 5, (4, 32, 32))
    image[0, 0, 0] = -5000
    made = prepare(flat(image), None, Preprocessing(size=40, spacing_mm=1.0))
    assert made.image[0, 0, 0] == np.float16(made.record["background"])
    assert made.record["background"] > -1 > made.record["minimum"]


def test_empty_slices_are_dropped_when_told_and_come_back_as_zeros() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(0, 1, (5, 8, 8))
    image[1:4] += 300 * rng.random((3, 8, 8))
    config = Preprocessing(size=8, spacing_mm=1.0, drop_empty=True)
    made = prepare(flat(image), None, config)
    assert made.record["slices"] == [1, 2, 3]
    assert made.image.shape == (3, 8, 8)
    back = restore(np.ones((3, 8, 8), dtype=np.uint8), made.record)
    assert back.voxels[:, 0, 0].tolist() == [0, 1, 1, 1, 0]
    assert prepare(flat(image), None, Preprocessing(size=8, spacing_mm=1.0)).record["slices"] == [0, 1, 2, 3, 4]


# --- labels -----------------------------------------------------------------------------------------------------------


def test_the_largest_fractions_become_foreground_until_the_volume_is_met() -> None:
    label = np.array([[1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0]], dtype=np.uint8)  # 4 voxels are one pixel of 2 x 2
    shrunk = resample_label(flat(label), 2.0)
    assert shrunk.fraction.tolist() == [[[191, 64, 0]]]  # 3/4 and 1/4 of 255
    assert shrunk.hard.tolist() == [[[1, 0, 0]]]
    assert shrunk.thresholds == [191 / 255]


def test_where_two_classes_claim_a_pixel_the_larger_fraction_has_it() -> None:
    label = np.array([[1, 2, 2, 2], [1, 2, 0, 0]], dtype=np.uint8)
    label[:, 0] = 1
    label[1, 1] = 1  # first pixel: 3 of class 1, 1 of class 2; second: 2 of class 2
    assert resample_label(flat(label), 2.0).hard.tolist() == [[[1, 2]]]


@pytest.mark.parametrize("spacing_mm", [0.31, 0.5, 0.89, 1.0])
def test_each_class_keeps_its_volume_to_within_a_voxel(spacing_mm: float) -> None:
    rng = np.random.default_rng(0)
    label = np.zeros((12, 60, 60), dtype=np.uint8)
    for _ in range(40):  # thin rods of two voxels
        z, y, x = rng.integers(0, (12, 58, 40))
        label[z, y : y + 2, x : x + 20] = 1
    shrunk = resample_label(flat(label, (0.25, 0.25, 1.0)), spacing_mm)
    pixel, before = spacing_mm**2, np.count_nonzero(label) * 0.25**2
    assert abs(np.count_nonzero(shrunk.hard) * pixel - before) <= pixel
    assert shrunk.fraction.sum() / 255 * pixel == pytest.approx(before, rel=0.02)


def test_of_equal_fractions_those_with_neighbours_come_first() -> None:
    label = np.zeros((1, 8, 8), dtype=np.uint8)
    label[0, 0::2, 0] = label[0, 0::2, 1] = 1  # a rod that fills half of each of four pixels in a column
    label[0, 0, 6] = label[0, 1, 6] = 1  # and half a pixel on its own, above in reading order
    kept = resample_label(flat(label), 2.0).hard[0]
    assert kept[:, 3].sum() == 0
    assert kept[:, 0].sum() == 2  # 10 voxels are 2.5 pixels: two


def test_a_label_of_nothing_is_nothing() -> None:
    shrunk = resample_label(flat(np.zeros((2, 4, 4), dtype=np.uint8)), 2.0)
    assert not shrunk.hard.any()
    assert not shrunk.fraction.any()
    assert shrunk.thresholds == []


def test_a_label_on_another_grid_is_refused_with_what_differs() -> None:
    image = flat(np.random.default_rng(0).normal(size=(4, 8, 8)))
    shifted = Geometry(image.geometry.size, (1.0, 1.0, 1.0), (0.0, 0.0, 0.5))
    for label, found in (
        (Volume(np.zeros((4, 8, 8)), shifted), "origin .* up to 0.5 mm"),
        (flat(np.zeros((4, 8, 7))), r"size \(8, 8, 4\) against \(7, 8, 4\)"),
        (flat(np.zeros((4, 8, 8)), (1.0, 1.0, 1.2)), "spacing"),
    ):
        with pytest.raises(InputError, match=f"label of scan.nii: found {found}"):
            prepare(image, label, Preprocessing(size=8), where="scan.nii")


@pytest.mark.parametrize(
    ("values", "found"), [((0, 255), "from 0 to 255"), ((-1, 1), "from -1"), ((0, 0.5), "not all")]
)
def test_a_label_that_holds_no_class_indices_is_refused(values: tuple[float, float], found: str) -> None:
    image = flat(np.random.default_rng(0).normal(size=(2, 8, 8)))
    label = np.full((2, 8, 8), values[0], dtype=np.float32)
    label[0, 0, 0] = values[1]
    with pytest.raises(InputError, match=found):
        prepare(image, flat(label), Preprocessing(size=8, spacing_mm=1.0))


def test_class_indices_stored_as_floats_are_taken() -> None:
    image, label = np.random.default_rng(0).normal(size=(2, 8, 8)), np.zeros((2, 8, 8), dtype=np.float64)
    label[:, 2:4] = 2.0
    made = prepare(flat(image), flat(label), Preprocessing(size=8, spacing_mm=1.0))
    assert made.label is not None
    assert np.array_equal(made.label, label)
    assert made.record["label"]["classes"] == 3
    assert made.record["label"]["volume_mm3"] == {"before": [0, 32], "after": [0, 32]}


def test_a_crop_may_not_cost_more_than_a_thousandth_of_the_foreground() -> None:
    image = flat(np.random.default_rng(0).normal(size=(2, 24, 24)))
    label = np.zeros((2, 24, 24), dtype=np.uint8)
    label[:, 6:18, 6:18] = 1
    config = Preprocessing(size=16, spacing_mm=1.0)
    assert prepare(image, flat(label), config).record["label"]["lost"] == 0
    label[0, 0, 0] = 1  # 1 of 289
    with pytest.raises(InputError, match=r"found 0\.35% of the foreground outside"):
        prepare(image, flat(label), config)


# --- the way back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["LPS", "RAS", "SAR", "IPL"])
@pytest.mark.parametrize("size", [8, 32])
def test_a_prepared_label_goes_back_to_the_grid_that_it_came_from(code: str, size: int) -> None:
    raw = turned(code)
    label = np.zeros(raw.voxels.shape, dtype=np.uint8)
    label[2:4, 3:5, 4:7] = 3
    made = prepare(raw, Volume(label, raw.geometry), Preprocessing(size=size, spacing_mm=0.2 if size == 32 else 0.75))
    assert made.label is not None
    record = json.loads(json.dumps(made.record))  # as the store keeps it
    back = restore(made.label, record)
    assert back.geometry == raw.geometry
    assert back.voxels.dtype == np.uint8
    if size == 32:  # finer than the raw grid: nothing but rounding is lost
        assert dice(back.voxels, label) > 0.9
    soft = restore(made.label.astype(np.float32), record, linear=True)
    assert soft.geometry == raw.geometry
    assert soft.voxels.dtype == np.float32
    assert soft.voxels.max() <= 3 + 1e-5


def test_at_its_own_spacing_a_label_goes_there_and_back_unchanged() -> None:
    raw = Volume(
        turned("RAS").voxels, Geometry((10, 8, 6), (0.5, 0.5, 2.0), (1.0, 2.0, 3.0), turned("RAS").geometry.direction)
    )
    label = Volume((raw.voxels > 700).astype(np.uint8), raw.geometry)
    made = prepare(raw, label, Preprocessing(size=16, spacing_mm=0.5))
    assert made.label is not None
    assert np.array_equal(restore(made.label, made.record).voxels, label.voxels)


def test_slices_that_do_not_fit_the_record_are_a_bug() -> None:
    made = prepare(turned("LPS"), None, Preprocessing(size=16, spacing_mm=0.5))
    with pytest.raises(ValueError, match=r"slices \(5, 16, 16\); the record describes \(6, 16, 16\)"):
        restore(np.zeros((5, 16, 16)), made.record)


def test_preparing_leaves_its_input_alone() -> None:
    raw = turned("RAS")
    before = raw.voxels.copy()
    prepare(raw, Volume((raw.voxels > 700).astype(np.uint8), raw.geometry), Preprocessing(size=16, spacing_mm=0.4))
    assert np.array_equal(raw.voxels, before)


# --- real volumes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spacing_mm", "least"), [(0.89, 0.85), (0.45, 0.92), (0.25, 0.98)])
def test_a_real_vessel_mask_keeps_volume_and_place(real: Path, spacing_mm: float, least: float) -> None:
    image, mask = read(real / "topcow_tof.mha"), read(real / "topcow_tof_vessels.nii.gz")
    made = prepare(image, mask, Preprocessing(size=192, spacing_mm=spacing_mm))
    assert made.label is not None
    assert made.fraction is not None
    volumes = made.record["label"]["volume_mm3"]
    assert abs(volumes["after"][0] - volumes["before"][0]) <= spacing_mm**2 * 0.6
    back = restore(made.label, made.record)
    assert back.geometry == image.geometry
    assert dice(back.voxels, mask.voxels) > least
    soft = restore(made.fraction / np.float32(255), made.record, linear=True)
    assert dice(soft.voxels > 0.5, mask.voxels) > least


@pytest.mark.parametrize("name", ["topcow_tof.mha", "chris_tof.nii.gz", "romeo_swi.nii.gz"])
def test_a_real_image_goes_back_to_its_oblique_grid(real: Path, name: str) -> None:
    image = read(real / name)
    made = prepare(image, None, Preprocessing(size=304, spacing_mm=0.45))
    back = restore(made.image, made.record, linear=True)
    assert back.geometry == image.geometry
    assert np.corrcoef(back.voxels.ravel(), image.voxels.ravel())[0, 1] > 0.97
