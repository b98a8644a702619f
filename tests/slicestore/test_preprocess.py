"""The chain from raw volume to slices and back: each step against values worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from slicestore.errors import InputError
from slicestore.frame import frame, oblique_degrees, orient, shift_to
from slicestore.geometry import Geometry
from slicestore.intensity import Histogram, shading, standardise
from slicestore.preprocess import prepare, restore
from slicestore.resample import resample
from slicestore.settings import LEVELS, PRESETS, Preprocessing
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


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("size", 100),
        ("size", 0),
        ("spacing_mm", 0.0),
        ("spacing_mm", float("nan")),
        ("pad", "mirror"),
        ("centre", "nose"),
        ("slices", "some"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(setting: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"Preprocessing\.{setting}: found .*{value}"):
        Preprocessing(**{setting: value})  # type: ignore[arg-type]


def test_the_fingerprint_depends_on_every_setting_and_on_nothing_else() -> None:
    variants = [
        Preprocessing(),
        Preprocessing(size=128),
        Preprocessing(spacing_mm=0.5),
        Preprocessing(pad="zero"),
        Preprocessing(centre="grid"),
        Preprocessing(centre="brain"),
        Preprocessing(slices="tissue"),
        Preprocessing(slices="foreground"),
        Preprocessing(join=False),
        Preprocessing(bias_field=True),
        Preprocessing(strip=True),
        Preprocessing(brain_class=2),
        Preprocessing(brain_class=3),
        PRESETS["seed2022"],
    ]
    assert len({config.fingerprint for config in variants}) == len(variants)
    assert Preprocessing().fingerprint == Preprocessing(size=256).fingerprint
    assert len(Preprocessing().fingerprint) == 16


def test_the_presets_are_the_defaults_and_the_2022_study() -> None:
    assert PRESETS["recommended"] == Preprocessing()
    old = PRESETS["seed2022"]
    assert (old.size, old.pad, old.centre, old.slices, old.spacing_mm) == (352, "zero", "grid", "all", 0.89)


# --- orientation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["LPS", "RAS", "SAR", "IPL", "PIR", "ASL", "LIP"])
def test_orientation_agrees_with_simpleitk(code: str) -> None:
    volume = turned(code)
    ours, theirs = orient(volume), Volume.from_image(sitk.DICOMOrient(volume.to_image(), "LPS"))
    assert np.array_equal(ours.voxels, theirs.voxels)
    assert not ours.geometry.differences(theirs.geometry)


def test_obliquity_is_the_largest_angle_of_an_axis() -> None:
    turn = np.reshape(sitk.Euler3DTransform((0, 0, 0), 0, 0, np.radians(20)).GetMatrix(), (3, 3))
    for code in ("LPS", "SAR"):
        image = sitk.DICOMOrient(flat(np.zeros((3, 4, 5))).to_image(), code)
        assert oblique_degrees(orient(Volume.from_image(image)).geometry) == 0
        image.SetDirection((turn @ np.reshape(image.GetDirection(), (3, 3))).ravel())
        assert oblique_degrees(orient(Volume.from_image(image)).geometry) == pytest.approx(20, abs=1e-3)


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
            height, width = made.voxels.shape[1:]
            down, right = shift_to(height, size, height / 2), shift_to(width, size, width / 3)
            framed = frame(made, size, (down, right), np.nan)
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


def test_cropping_and_padding_keep_places() -> None:
    framed = frame(flat([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]] * 3), 8, (2, -1), 0)
    assert framed.voxels[0, 2:5].tolist() == [[2, 3, 4, 5, 6, 7, 8, 9]] * 3
    assert not framed.voxels[0, [0, 1, 5, 6, 7]].any()
    assert framed.geometry.origin_mm == (1.0, -2.0, 0.0)


@pytest.mark.parametrize(
    ("old", "new", "middle", "shift"),
    [
        (3, 8, 1.5, 2),  # padded by 2 and 3
        (11, 8, 5.5, -1),  # cropped by 1 and 2
        (11, 8, 4.0, 0),
        (11, 8, 2.0, 0),  # no padding before the first pixel while the last is cut off
        (11, 8, 9.0, -3),
        (3, 8, 0.0, 4),
        (3, 8, -9.0, 5),  # as far as it fits
        (8, 8, 0.0, 0),
    ],
)
def test_the_middle_moves_as_far_as_nothing_is_lost_for_it(old: int, new: int, middle: float, shift: int) -> None:
    assert shift_to(old, new, middle) == shift


def test_the_frame_is_air_or_zero_as_told() -> None:
    image = np.full((2, 8, 8), 10.0)
    image[:, :4], image[:, 6:] = 0, 20  # half air
    background, zero = (
        prepare(flat(image), None, Preprocessing(size=16, spacing_mm=1.0, pad=pad, centre="grid"))
        for pad in ("background", "zero")
    )  # type: ignore[arg-type]
    mean, std = image.mean(), image.std()
    assert background.image[0, 0, 0] == np.float16(-mean / std)
    assert zero.image[0, 0, 0] == 0
    assert np.array_equal(background.image[:, 4:12, 4:12], zero.image[:, 4:12, 4:12])
    assert np.all(zero.image[:, :4] == 0)
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
    config = Preprocessing(size=8, spacing_mm=1.0, slices="tissue")
    made = prepare(flat(image), None, config)
    assert made.record["slices"] == [1, 2, 3]
    assert made.image.shape == (3, 8, 8)
    back = restore(np.ones((3, 8, 8), dtype=np.uint8), made.record)
    assert back.voxels[:, 0, 0].tolist() == [0, 1, 1, 1, 0]
    assert prepare(flat(image), None, Preprocessing(size=8, spacing_mm=1.0)).record["slices"] == [0, 1, 2, 3, 4]


# --- tails and shading -----------------------------------------------------------------------------------------------


def test_percentiles_are_those_of_the_sorted_values() -> None:
    values = np.random.default_rng(0).normal(0, 3, (3, 20, 20)).astype(np.float16)
    values[0, 0, :3] = -0.0, 0.0, np.inf
    finite = np.sort(values[np.isfinite(values)].astype(np.float32))
    histogram = Histogram.of(values)
    assert histogram.counts.sum() == len(finite) == 1199
    assert np.array_equal(np.repeat(histogram.values, histogram.counts), finite)
    for percent in (0.1, 50, 99.9, 100):
        assert histogram.percentile(percent) == np.percentile(finite, percent, method="inverted_cdf")


def test_otsu_parts_two_heaps_between_them() -> None:
    heaps = np.concatenate([np.full(300, 1.0), np.full(10, 1.5), np.full(100, 7.0)]).astype(np.float16)
    assert Histogram.of(heaps[None]).otsu() == 1.5


def test_the_tails_are_recorded_without_the_frame() -> None:
    image = np.arange(1000, dtype=np.float64).reshape(10, 10, 10)
    made = prepare(flat(image), None, Preprocessing(size=16, spacing_mm=1.0))
    mean, std = image.mean(), image.std()
    assert list(made.record["percentiles"]) == [f"{level:g}" for level in LEVELS]
    low, high = made.record["percentiles"]["5"]
    assert low * std + mean == pytest.approx(49, abs=1)  # the 50th of 1000 values from 0
    assert high * std + mean == pytest.approx(949, abs=1)


def shaded(voxels: np.ndarray, gain: np.ndarray) -> tuple[float, float]:
    """Relative spread of a uniform ball before and after the correction."""
    seen = Volume((voxels * gain).astype(np.float32), Geometry(voxels.shape[::-1], (2.0, 2.0, 3.0)))  # type: ignore[arg-type]
    clean = np.stack(list(shading(seen).corrected(seen.voxels)))
    ball = voxels > 50
    return float(seen.voxels[ball].std() / seen.voxels[ball].mean()), float(clean[ball].std() / clean[ball].mean())


def test_shading_is_taken_off_without_touching_what_is_sharp() -> None:
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (20, 60, 64)), indexing="ij")
    noise = np.random.default_rng(0).normal(0, 2, z.shape)
    voxels = np.where(x**2 + y**2 + 0.5 * z**2 < 0.7, 100.0, 5.0) + noise
    before, after = shaded(voxels, 1 + 0.3 * x + 0.15 * z)
    assert before > 0.1
    assert after < 0.4 * before


def test_shading_comes_out_the_same_every_time_and_of_one_slice_too() -> None:
    rng = np.random.default_rng(0)
    for depth in (1, 6):
        image = rng.normal(10, 1, (depth, 30, 28))
        image[:, 6:24, 5:22] += np.linspace(50, 90, 17)
        config = Preprocessing(size=32, spacing_mm=1.0, bias_field=True)
        once, again = prepare(flat(image), None, config), prepare(flat(image), None, config)
        assert np.array_equal(once.image, again.image)
        assert not np.array_equal(once.image, prepare(flat(image), None, Preprocessing(size=32, spacing_mm=1.0)).image)


# --- the middle of a slice, the brain and the choice of slices --------------------------------------------------------


def head(*, rows: slice, columns: slice, size: tuple[int, int, int] = (4, 40, 48)) -> np.ndarray:
    """Noise of air round a bright block."""
    image = np.random.default_rng(0).normal(10, 1, size)
    image[:, rows, columns] += 200
    return image


def test_the_tissue_comes_to_lie_in_the_middle() -> None:
    image = head(rows=slice(20, 36), columns=slice(4, 24))  # its middle: row 28, column 14
    grid, tissue = (
        prepare(flat(image), None, Preprocessing(size=24, spacing_mm=1.0, centre=centre))
        for centre in ("grid", "foreground")
    )
    assert grid.record["shift_yx"] == [-8, -12]
    assert tissue.record["shift_yx"] == [-16, -2]  # 12 - 28, 12 - 14
    assert (tissue.image[:, 4:20, 2:22] > 1).all()


def test_a_few_bright_voxels_in_the_air_do_not_move_the_middle() -> None:
    image = head(rows=slice(20, 36), columns=slice(4, 24))
    image[0, 0, 47] = 4000
    made = prepare(flat(image), None, Preprocessing(size=24, spacing_mm=1.0))
    assert made.record["shift_yx"] == [-16, -2]


def test_the_brain_mask_sets_the_middle_and_what_is_left_of_the_image() -> None:
    image = head(rows=slice(2, 38), columns=slice(2, 46))
    label, brain = (np.zeros(image.shape, dtype=np.uint8) for _ in range(2))
    brain[1:3, 20:32, 8:20] = 255  # any value above 0; its middle: row 26, column 14
    label[1, 22:24, 10:18] = 1
    label[1, 10:12, 10:18] = 1  # as much outside the brain
    config = Preprocessing(size=24, spacing_mm=1.0, centre="brain", strip=True)
    made = prepare(flat(image), flat(label), config, brain=flat(brain))
    assert made.label is not None
    assert made.record["shift_yx"] == [-14, -2]
    inside = np.zeros((4, 24, 24), dtype=bool)
    inside[1:3, 6:18, 6:18] = True
    assert (made.image[~inside] == np.float16(made.record["background"])).all()
    assert made.image[inside].astype(float).mean() == pytest.approx(0, abs=1e-3)  # its mean and deviation count alone
    assert made.image[inside].astype(float).std() == pytest.approx(1, abs=1e-3)
    assert made.record["background"] < -100  # air is 200 below, in units of the tissue's noise
    assert np.argwhere(made.label).min(axis=0).tolist() == [1, 8, 8]
    assert np.count_nonzero(made.label) == 16
    assert made.record["label"]["stripped"] == 0.5
    assert made.record["label"]["lost"] == 0


def test_the_brain_mask_must_be_there_match_and_hold_a_brain() -> None:
    image = flat(head(rows=slice(2, 38), columns=slice(2, 46)))
    empty = flat(np.zeros((4, 40, 48), dtype=np.uint8))
    strip, centre = (
        Preprocessing(size=24, spacing_mm=1.0, strip=True),
        Preprocessing(size=24, spacing_mm=1.0, centre="brain"),
    )
    with pytest.raises(InputError, match=r"scan\.nii: found no brain mask; strip needs"):
        prepare(image, None, strip, where="scan.nii")
    with pytest.raises(InputError, match=r"scan\.nii: found no brain mask; centre='brain' needs"):
        prepare(image, None, centre, where="scan.nii")
    with pytest.raises(InputError, match=r"brain mask of scan\.nii: found no brain in it"):
        prepare(image, None, strip, brain=empty, where="scan.nii")
    with pytest.raises(InputError, match=r"brain mask of scan\.nii: found size"):
        prepare(image, None, strip, brain=flat(np.ones((4, 40, 47), dtype=np.uint8)), where="scan.nii")


def test_slices_with_foreground_are_kept_when_told_and_tissue_where_there_is_no_label() -> None:
    image = head(rows=slice(2, 38), columns=slice(2, 46), size=(5, 40, 48))
    image[4] = 10.0  # air
    label = np.zeros(image.shape, dtype=np.uint8)
    label[[1, 3], 10:14, 10:14] = 1
    config = Preprocessing(size=48, spacing_mm=1.0, slices="foreground")
    assert prepare(flat(image), flat(label), config).record["slices"] == [1, 3]
    assert prepare(flat(image), None, config).record["slices"] == [0, 1, 2, 3]
    with pytest.raises(InputError, match="no contrast in any slice's crop"):
        prepare(flat(image), flat(np.zeros_like(label)), config)


# --- labels -----------------------------------------------------------------------------------------------------------


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
