"""Labels through a change of grid: volumes, pieces and centrelines against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import label as components
from skimage.morphology import skeletonize

from slicestore import vasculature
from slicestore.geometry import Geometry
from slicestore.labels import covered, label_facts, largest, resample_label
from slicestore.resample import grid_at
from slicestore.shape import centreline, pieces, width_mm
from slicestore.volume import Volume


def flat(voxels: object, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    """An axial volume in scanner axes; two dimensions make one slice."""
    array = np.asarray(voxels)
    array = array[None] if array.ndim == 2 else array
    return Volume(array, Geometry(array.shape[::-1], spacing_mm))  # type: ignore[arg-type]


def branches(seed: int, size: tuple[int, int, int] = (40, 120, 130), count: int = 12) -> np.ndarray:
    """Crooked tubes of 3 voxels' radius, bool."""
    rng, mask = np.random.default_rng(seed), np.zeros(size, dtype=bool)
    z, y, x = np.ogrid[: size[0], : size[1], : size[2]]
    for _ in range(count):
        at, step = rng.uniform(0, size), rng.normal(size=3)
        for _ in range(25):
            mask |= (z - at[0]) ** 2 + (y - at[1]) ** 2 + (x - at[2]) ** 2 <= 9
            step += 0.4 * rng.normal(size=3)
            at += 2 * step / np.linalg.norm(step)
    return mask


# --- resampling -------------------------------------------------------------------------------------------------------


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


def test_a_class_that_loses_pixels_to_its_neighbour_takes_its_next_best() -> None:
    label = np.zeros((40, 28), dtype=np.uint8)
    label[:, 3:14], label[:, 14:26] = 1, 2  # of four voxels a pixel; they meet in the middle of the fourth column
    hard = resample_label(flat(label, (0.25, 0.25, 1.0)), 1.0).hard
    assert [np.count_nonzero(hard == index) for index in (1, 2)] == [28, 30]  # 2.75 and 3 pixels in each of 10 rows


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


def test_an_oblong_voxel_shrinks_along_one_axis_and_grows_along_the_other() -> None:
    label = np.zeros((1, 8, 4), dtype=np.uint8)
    label[0, 2:6, 1:3] = 1  # 4 rows of 0.5 mm and 2 columns of 2 mm: 8 mm2
    shrunk = resample_label(flat(label, (2.0, 0.5, 1.0)), 1.0)
    assert shrunk.hard[0].tolist() == [[0, 0, *[1] * 4, 0, 0] if 1 <= row < 3 else [0] * 8 for row in range(4)]


def test_a_thin_vessel_stays_in_one_piece_at_the_same_volume() -> None:
    """A line one voxel wide wanders through pixels of 3 x 3; a thick vessel sets the threshold that it misses."""
    label = np.zeros((1, 60, 60), dtype=np.uint8)
    label[0, np.arange(60), 5 + np.arange(60) // 4] = 1
    label[0, :, 40:50] = 1
    joined, torn = (resample_label(flat(label), 3.0, join=join).hard for join in (True, False))
    assert np.count_nonzero(joined) == np.count_nonzero(torn) == round(np.count_nonzero(label) / 9)
    assert pieces(joined > 0) == 2
    assert joined[0, :, :8].any(axis=1).all()
    assert not torn[0, :, :8].any(axis=1).all()


def test_pixels_on_the_centreline_come_first_and_the_fullest_of_them_before_the_others() -> None:
    fraction = np.array([[[10, 20, 0, 200, 255]]], dtype=np.uint8)
    line = np.array([[[True, True, True, False, False]]])
    taken = [largest(fraction, wanted, line) for wanted in range(6)]
    assert [mask[0, 0].nonzero()[0].tolist() for mask, _ in taken] == [
        [],
        [1],
        [0, 1],
        [0, 1, 4],
        [0, 1, 3, 4],
        [0, 1, 3, 4],
    ]
    assert [threshold for _, threshold in taken] == [0, 20, 10, 255, 200, 200]


@pytest.mark.parametrize("diameter_mm", [0.7, 1.5])
def test_thin_vessels_keep_more_of_their_centreline_than_by_nearest_neighbours(diameter_mm: float) -> None:
    """Five tubes drawn by share of a voxel, from 0.29 mm to 0.89 mm; a thick one beside them sets the threshold."""
    rng = np.random.default_rng(0)
    starts, ends = rng.uniform(-16, 16, (6, 3)) * [1, 1, 0.4], rng.uniform(-16, 16, (6, 3)) * [1, 1, 0.4]
    ends[-1], starts[-1] = (14, 14, 6), (14, -14, 6)
    points = np.stack([starts, ends], axis=1).reshape(-1, 3)
    radius = np.repeat([diameter_mm / 2] * 5 + [1.5], 2)
    tree = vasculature.Tree(points, np.array([-1, 0, -1, 2, -1, 4, -1, 6, -1, 8, -1, 10]), radius, np.zeros(12))
    geometry = Geometry((130, 130, 30), (0.29, 0.29, 0.59), (-18.7, -18.7, -8.6))
    filling = vasculature.fill(tree, geometry, least_radius_mm=1e-3)
    mask = np.zeros(geometry.size[::-1], dtype=np.uint8)
    mask.reshape(-1)[filling.index] = filling.share > 0.4
    along = (starts[:5, None] + np.linspace(0.02, 0.98, 200)[None, :, None] * (ends - starts)[:5, None]).reshape(-1, 3)
    index = np.rint((along - geometry.origin_mm) / geometry.spacing_mm).astype(int)[:, ::-1]
    label, new = Volume(mask, geometry), grid_at(geometry, 0.89)
    ours = resample_label(label, 0.89).hard > 0
    nearest = sitk.Resample(
        label.to_image(),
        new.size,
        sitk.Transform(),
        sitk.sitkNearestNeighbor,
        new.origin_mm,
        new.spacing_mm,
        new.direction,
    )
    theirs = sitk.GetArrayFromImage(nearest) > 0
    kept, kept_by_nearest = (covered(index, hard, geometry, new).mean() for hard in (ours, theirs))
    if diameter_mm < 1:
        assert kept > kept_by_nearest + 0.05
    else:  # thick enough for either way
        assert min(kept, kept_by_nearest) > 0.98
    assert pieces(ours) == pieces(mask > 0) <= pieces(theirs)


# --- facts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("size", [(1, 7, 9), (6, 1, 8), (5, 6, 1), (6, 7, 8)])
def test_pieces_are_counted_as_scipy_counts_them(size: tuple[int, int, int], share: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random(size) < share
        assert pieces(mask) == components(mask, np.ones((3, 3, 3)))[1]


def test_the_centreline_in_tiles_is_that_of_the_whole() -> None:
    mask = branches(0)
    ours, whole = np.zeros_like(mask), skeletonize(mask)
    ours[tuple(centreline(mask).T)] = True
    assert np.count_nonzero(ours != whole) <= 0.01 * np.count_nonzero(whole)
    assert len(centreline(np.zeros((3, 4, 5), dtype=bool))) == 0


def test_width_is_a_tubes_whichever_way_it_runs() -> None:
    mask = np.zeros((9, 9, 9), dtype=bool)
    mask[3:6, 3:6, :] = True
    assert [width_mm(mask.transpose(axes), (0.5, 0.5, 0.5)) for axes in ((0, 1, 2), (0, 2, 1), (2, 1, 0))] == [1.5] * 3
    assert width_mm(np.zeros_like(mask), (1.0, 1.0, 1.0)) == 0


def test_the_facts_tell_what_became_of_each_class() -> None:
    label = np.zeros((1, 12, 24), dtype=np.uint8)
    label[0, 4:6, 2:22] = 1  # a vessel 2 voxels wide, that survives
    label[0, 8, 2:18:4] = 2  # four single voxels: one pixel of 2 x 2
    source = flat(label)
    facts = label_facts(source, resample_label(source, 2.0), 2.0)
    assert facts["classes"] == 3
    assert facts["volume_mm3"] == {"before": [40, 4], "after": [40, 4]}
    assert facts["pieces"] == {"before": [1, 4], "after": [1, 1]}
    assert facts["centreline"] == [1.0, 0.25]


def test_a_class_that_is_empty_or_no_tube_has_no_centreline() -> None:
    label = np.zeros((3, 20, 20), dtype=np.uint8)
    label[:, 5:15, 5:15] = 2  # 10 mm wide
    source = flat(label)
    facts = label_facts(source, resample_label(source, 2.0), 2.0)
    assert facts["centreline"] == [None, None]
    assert facts["pieces"] == {"before": [0, 1], "after": [0, 1]}


def test_a_voxel_beyond_the_last_pixel_counts_as_lost() -> None:
    old = Geometry((5, 1, 1), (1.0, 1.0, 1.0))
    new = grid_at(old, 2.0)  # 2 pixels of 2 mm, the fifth voxel is outside
    assert new.size == (2, 1, 1)
    points = np.array([[0, 0, x] for x in range(5)])
    assert covered(points, np.array([[[True, False]]]), old, new).tolist() == [True, True, False, False, False]
    assert covered(points, np.ones((1, 1, 2), dtype=bool), old, new).tolist() == [True] * 4 + [False]
