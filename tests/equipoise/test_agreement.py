"""Agreement of two masks: by hand, and against other implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from skimage.morphology import skeletonize

from equipoise.agreement import MEASURES, NOTHING, agreement, skeleton
from slicestore.errors import InputError
from slicestore.geometry import Geometry, Triple
from slicestore.shape import centreline
from slicestore.volume import Volume

SPACING: Triple = (0.5, 1.0, 2.0)
OVERLAPS = ("dice", "cldice", "sensitivity", "precision")


def volume(mask: np.ndarray, spacing: Triple = SPACING, **place: tuple[float, ...]) -> Volume:
    z, y, x = mask.shape
    return Volume(mask.astype(np.uint8), Geometry((x, y, z), spacing, **place))  # type: ignore[arg-type]


def box(*spans: tuple[int, int], shape: tuple[int, int, int] = (6, 10, 12)) -> np.ndarray:
    """A block of ones, by its first and one past its last voxel along z, y, x."""
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*span) for span in spans)] = True
    return mask


class TestByHand:
    def test_a_line_that_is_half_found(self) -> None:
        # R: 8 voxels along x; P: the last 4 of them and 2 beyond. Voxels are 0.5 x 1 x 2 mm = 0.001 ml.
        r, p = box((2, 3), (4, 5), (1, 9)), box((2, 3), (4, 5), (5, 11))
        got = agreement(volume(p), volume(r), 1, "p")
        assert got.dice == pytest.approx(2 * 4 / (6 + 8))
        assert got.sensitivity == pytest.approx(4 / 8)
        assert got.precision == pytest.approx(4 / 6)
        # A line one voxel wide is its own centreline.
        assert got.cldice == pytest.approx(2 * (4 / 6) * (4 / 8) / (4 / 6 + 4 / 8))
        assert (got.predicted_ml, got.reference_ml) == pytest.approx((0.006, 0.008))
        assert got.volume_error_ml == pytest.approx(-0.002)
        assert got.volume_error == pytest.approx(-2 / 8)
        # From P: 4 of 0, then 0.5 and 1 mm; from R: 2, 1.5, 1 and 0.5 mm, then 4 of 0.
        assert got.assd_mm == pytest.approx((0.5 + 1 + 2 + 1.5 + 1 + 0.5) / 14)
        # 95th percentile: of 6 values place 4.75, .5 + .75 * .5; of 8 values place 6.65, 1.5 + .65 * .5.
        assert got.hd95_mm == pytest.approx(1.825)
        assert got.empty == ""

    @pytest.mark.parametrize(("axis", "step_mm"), [(0, 2.0), (1, 1.0), (2, 0.5)])
    def test_distances_are_in_millimetres_along_each_axis(self, axis: int, step_mm: float) -> None:
        r, p = np.zeros((9, 9, 9)), np.zeros((9, 9, 9))
        r[4, 4, 4] = 1
        p[tuple(4 + 3 * (k == axis) for k in range(3))] = 1
        got = agreement(volume(p), volume(r), 1, "p")
        assert (got.assd_mm, got.hd95_mm) == pytest.approx((3 * step_mm, 3 * step_mm))
        assert [getattr(got, name) for name in OVERLAPS] == [0, 0, 0, 0]

    def test_the_inside_of_a_mask_is_no_surface(self) -> None:
        r, p = box((1, 4), (2, 5), (3, 6)), box((2, 3), (3, 4), (4, 5))
        got = agreement(volume(p, (1, 1, 1)), volume(r, (1, 1, 1)), 1, "p")
        # 3 x 3 x 3 round its middle: 6 faces at 1, 12 edges at sqrt 2, 8 corners at sqrt 3; back the nearest is at 1.
        assert got.assd_mm == pytest.approx((6 + 12 * math.sqrt(2) + 8 * math.sqrt(3) + 1) / 27)
        assert got.hd95_mm == pytest.approx(math.sqrt(3))

    def test_the_edge_of_the_grid_is_surface(self) -> None:
        r = np.ones((3, 4, 5))
        p = np.zeros((3, 4, 5))
        p[1, 1, 0] = 1
        got = agreement(volume(p, (1, 1, 1)), volume(r, (1, 1, 1)), 1, "p")
        distances = np.linalg.norm(np.argwhere(r) - (1, 1, 0), axis=1)
        inside = np.linalg.norm(np.argwhere(box((1, 2), (1, 3), (1, 4), shape=(3, 4, 5))) - (1, 1, 0), axis=1)
        assert got.assd_mm == pytest.approx((distances.sum() - inside.sum()) / (60 - 6 + 1), rel=1e-6)

    def test_cldice_counts_lengths_and_not_widths(self) -> None:
        thick, thin = box((1, 4), (3, 6), (1, 11)), box((2, 3), (4, 5), (1, 11))
        got = agreement(volume(thick), volume(thin), 1, "p")
        assert got.cldice == 1
        assert got.dice == pytest.approx(2 * 10 / (90 + 10))

    def test_other_classes_are_background(self) -> None:
        r, p = box((2, 3), (4, 5), (1, 9)) * 2, box((2, 3), (4, 5), (5, 11)) * 2
        r[0, 0, :3], p[0, 0, 2:4] = 1, 3
        assert agreement(volume(p), volume(r), 2, "p").dice == pytest.approx(2 * 4 / 14)
        assert agreement(volume(p), volume(r), 1, "p").empty == "prediction"
        assert agreement(volume(p), volume(r), 3, "p").empty == "reference"

    def test_equal_masks_agree_wholly(self) -> None:
        mask = volume(box((1, 4), (3, 7), (2, 9)))
        got = agreement(mask, mask, 1, "p")
        assert [getattr(got, name) for name in OVERLAPS] == [1, 1, 1, 1]
        assert (got.volume_error_ml, got.volume_error, got.assd_mm, got.hd95_mm) == (0, 0, 0, 0)


class TestEmptyMasks:
    FULL, VOID = volume(box((1, 3), (2, 4), (3, 6))), volume(box((0, 0), (0, 0), (0, 0)))
    DIAGONAL = math.sqrt((11 * 0.5) ** 2 + (9 * 1.0) ** 2 + (5 * 2.0) ** 2)

    def test_nothing_predicted_where_nothing_is_agrees_wholly(self) -> None:
        assert agreement(self.VOID, self.VOID, 1, "p") == NOTHING
        assert [getattr(NOTHING, name) for name in MEASURES] == [1, 1, 1, 1, 0, 0, 0, 0]

    def test_to_predict_nothing_is_the_worst_that_the_grid_holds(self) -> None:
        got = agreement(self.VOID, self.FULL, 1, "p")
        assert [getattr(got, name) for name in OVERLAPS] == [0, 0, 0, 0]
        assert (got.assd_mm, got.hd95_mm) == pytest.approx((self.DIAGONAL, self.DIAGONAL))
        assert (got.volume_error, got.volume_error_ml) == pytest.approx((-1, -0.012))
        assert got.empty == "prediction"
        corners = np.zeros((2, 6, 10, 12))
        corners[0, 0, 0, 0] = corners[1, -1, -1, -1] = 1
        p, r = map(volume, corners)
        assert agreement(p, r, 1, "p").hd95_mm == pytest.approx(self.DIAGONAL)

    def test_to_make_up_what_is_not_there_has_no_relative_error(self) -> None:
        got = agreement(self.FULL, self.VOID, 1, "p")
        assert [getattr(got, name) for name in OVERLAPS] == [0, 0, 0, 0]
        assert (got.assd_mm, got.hd95_mm) == pytest.approx((self.DIAGONAL, self.DIAGONAL))
        assert math.isnan(got.volume_error)
        assert got.volume_error_ml == pytest.approx(0.012)
        assert got.empty == "reference"


class TestSkeleton:
    @pytest.mark.parametrize("width", [1, 2, 3, 4, 6])
    def test_a_tube_of_any_width_has_one(self, width: int) -> None:
        tube = box((2, 2 + width), (2, 2 + width), (2, 30), shape=(12, 12, 32))
        line = skeleton(tube)
        assert tube[tuple(line.T)].all()
        assert len(set(line[:, 2])) >= 28 - width

    def test_each_piece_that_thinning_loses_has_one_too(self) -> None:
        lost, kept = box((0, 2), (0, 2), (0, 9)), box((4, 5), (6, 7), (0, 9))
        assert not len(centreline(lost)), "scikit-image no longer loses tubes of even width: `skeleton` is centreline"
        line = {tuple(map(int, point)) for point in skeleton(lost | kept)}
        assert line == set(zip(*np.nonzero(lost | kept), strict=True))

    def test_no_mask_has_none(self) -> None:
        assert not len(skeleton(np.zeros((3, 4, 5), dtype=bool)))


class TestRefused:
    def test_another_grid_is_told_with_the_prediction_s_name_both_values_and_a_remedy(self) -> None:
        p, r = volume(box((1, 2), (1, 2), (1, 2))), volume(box((1, 2), (1, 2), (1, 2)), (0.5, 1.0, 2.5))
        with pytest.raises(InputError, match=r"case-7\.nii\.gz: found spacing .*2\.5.* against .*2\.0.*resample"):
            agreement(p, r, 1, "case-7.nii.gz")

    @pytest.mark.parametrize("bad", [0.5, -1, 255])
    def test_values_that_are_no_classes(self, bad: float) -> None:
        fine = volume(box((1, 2), (1, 2), (1, 2)))
        broken = Volume(np.where(fine.voxels > 0, np.float32(bad), np.float32(0)), fine.geometry)
        with pytest.raises(InputError, match=r"^case-7: found values"):
            agreement(broken, fine, 1, "case-7")
        with pytest.raises(InputError, match=r"^reference of case-7: found values"):
            agreement(fine, broken, 1, "case-7")


def random_masks(seed: int) -> tuple[np.ndarray, np.ndarray, Triple]:
    """A blob or a tube and something like it, on an anisotropic grid; both touch the grid's edge now and then."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(8, 26, 3))
    x, y, z = rng.uniform(0.3, 3.0, 3)
    if seed % 2:
        noise = ndimage.gaussian_filter(rng.normal(size=shape), rng.uniform(0.8, 2.5))
        r = noise > np.quantile(noise, rng.uniform(0.6, 0.98))
    else:
        steps = np.cumsum(rng.normal(0, 0.6, (60, 3)) + rng.normal(0, 0.4, 3), axis=0)
        path = (rng.uniform(0.3, 0.7, 3) * shape + steps).round().astype(int)
        r = np.zeros(shape, dtype=bool)
        r[tuple(path[((path >= 0) & (path < shape)).all(axis=1)].T)] = True
        r = ndimage.binary_dilation(r, iterations=int(rng.integers(1, 3)))
    p = np.roll(r, tuple(rng.integers(-2, 3, 3)), (0, 1, 2)) ^ (rng.random(shape) < rng.choice([0, 0.002, 0.02]))
    return p, r, (float(x), float(y), float(z))


def surviving(mask: np.ndarray) -> np.ndarray:
    """The pieces of a mask of which thinning leaves something."""
    pieces, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    return np.isin(pieces, pieces[skeletonize(mask)])


CASES = range(50)


class TestAgainstOthers:
    @pytest.mark.parametrize("seed", CASES)
    def test_overlaps_and_volumes_are_those_of_itk(self, seed: int) -> None:
        p, r, spacing = random_masks(seed)
        got, itk = agreement(volume(p, spacing), volume(r, spacing), 1, "p"), sitk.LabelOverlapMeasuresImageFilter()
        itk.Execute(volume(p, spacing).to_image(), volume(r, spacing).to_image())
        assert got.dice == pytest.approx(itk.GetDiceCoefficient(1), abs=1e-6)
        assert got.sensitivity == pytest.approx(1 - itk.GetFalseNegativeError(1), abs=1e-6)
        assert got.precision == pytest.approx(1 - itk.GetFalseDiscoveryRate(1), abs=1e-6)
        assert got.reference_ml == pytest.approx(r.sum() * np.prod(spacing) / 1000, abs=1e-6)
        assert got.predicted_ml == pytest.approx(p.sum() * np.prod(spacing) / 1000, abs=1e-6)
        assert got.volume_error_ml == pytest.approx(got.predicted_ml - got.reference_ml, abs=1e-6)
        assert got.volume_error == pytest.approx(p.sum() / r.sum() - 1, abs=1e-6)

    @pytest.mark.parametrize("seed", CASES)
    def test_distances_are_those_of_maps_of_distances(self, seed: int) -> None:
        p, r, spacing = random_masks(seed)
        got = agreement(volume(p, spacing), volume(r, spacing), 1, "p")
        images = [volume(np.pad(mask, 1), spacing).to_image() for mask in (p, r)]
        a, b = (sitk.GetArrayFromImage(sitk.LabelContour(image)) > 0 for image in images)
        to_a, to_b = (ndimage.distance_transform_edt(~surface, spacing[::-1]) for surface in (a, b))
        assert got.assd_mm == pytest.approx(np.concatenate((to_b[a], to_a[b])).mean(), abs=1e-6)
        assert got.hd95_mm == pytest.approx(max(np.percentile(to_b[a], 95), np.percentile(to_a[b], 95)), abs=1e-6)

    @pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI 1.6 warns of its own calls
    @pytest.mark.parametrize("seed", CASES)
    def test_distances_are_those_of_monai(self, seed: int) -> None:
        metrics = pytest.importorskip("monai.metrics", reason="MONAI is a peer: `make bench` installs it")
        torch = pytest.importorskip("torch")
        p, r, spacing = random_masks(seed)
        got = agreement(volume(p, spacing), volume(r, spacing), 1, "p")
        one_hot = [torch.from_numpy(np.stack((~mask, mask))[None]) for mask in (p, r)]
        options = {"include_background": False, "spacing": spacing[::-1]}
        hd95 = metrics.compute_hausdorff_distance(*one_hot, percentile=95, **options).item()
        assd = metrics.compute_average_surface_distance(*one_hot, symmetric=True, **options).item()
        assert got.hd95_mm == pytest.approx(hd95, abs=1e-4)
        assert got.assd_mm == pytest.approx(assd, abs=1e-4)

    @pytest.mark.parametrize("seed", CASES)
    def test_cldice_is_that_of_scikit_image_s_skeletons_where_these_lose_no_piece(self, seed: int) -> None:
        p, r, spacing = random_masks(seed)
        p, r = surviving(p), surviving(r)
        line_p, line_r = skeletonize(p), skeletonize(r)
        precision, sensitivity = (r & line_p).sum() / max(1, line_p.sum()), (p & line_r).sum() / max(1, line_r.sum())
        want = 2 * precision * sensitivity / (precision + sensitivity) if precision + sensitivity else 0
        assert agreement(volume(p, spacing), volume(r, spacing), 1, "p").cldice == pytest.approx(want, abs=1e-6)


class TestGeometry:
    @pytest.mark.parametrize("seed", range(4))
    def test_flipped_and_oblique_axes_leave_all_numbers_as_they_are(self, seed: int) -> None:
        p, r, spacing = random_masks(seed)
        plain = agreement(volume(p, spacing), volume(r, spacing), 1, "p")
        c, s = math.cos(0.4), math.sin(0.4)
        for direction in ((-1.0, 0, 0, 0, 1.0, 0, 0, 0, -1.0), (c, -s, 0, s, c, 0, 0, 0, 1.0)):
            place = {"origin_mm": (9.0, -80.0, 3.5), "direction": direction}
            assert agreement(volume(p, spacing, **place), volume(r, spacing, **place), 1, "p") == plain

    @pytest.mark.parametrize("seed", range(4))
    def test_mirrored_masks_keep_all_but_cldice_as_thinning_begins_at_one_side(self, seed: int) -> None:
        p, r, spacing = random_masks(seed)
        plain = agreement(volume(p, spacing), volume(r, spacing), 1, "p")
        mirrored = agreement(volume(p[::-1, :, ::-1], spacing), volume(r[::-1, :, ::-1], spacing), 1, "p")
        for name in MEASURES.keys() - {"cldice"}:
            assert getattr(mirrored, name) == pytest.approx(getattr(plain, name), abs=1e-6)

    def test_a_scan_of_full_size_is_compared_where_its_masks_are(self) -> None:
        r = np.zeros((100, 400, 400), dtype=bool)
        z, y, x = np.ogrid[:100, :400, :400]
        for k in range(5):
            r |= (y - 60 - 60 * k - 20 * np.sin(x / 40)) ** 2 + (z - 50) ** 2 < 12
        p = np.roll(r, 2, axis=1)
        got = agreement(volume(p, (0.3, 0.3, 0.6)), volume(r, (0.3, 0.3, 0.6)), 1, "p")
        assert 0.3 < got.dice < 0.9
        assert got.cldice == pytest.approx(1, abs=0.1)
        assert 0 < got.assd_mm < got.hd95_mm <= 0.6 + 1e-6
