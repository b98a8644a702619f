"""Synthetic heads: what a study may rely on when no scan is at hand."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from slicestore import phantom, vasculature
from slicestore.errors import InputError
from slicestore.geometry import AXIAL, Geometry
from slicestore.phantom import MODALITIES, ORIGINAL_SIZE, SMALL_SIZE, Head, Modality, head, write_cohort
from slicestore.volume import Volume, read

IN_PLANE = np.array([[[0, 0, 0]] * 3, [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0, 0, 0]] * 3], dtype=bool)
ANY_NEIGHBOUR = np.ones((3, 3, 3), dtype=bool)
PARTS = ("image", "vessel", "brain")


@cache
def scan(modality: Modality, subject: int = 1, seed: int = 0, original_size: bool = False) -> Head:
    return head(modality, subject=subject, seed=seed, original_size=original_size)


def arrays(made: Head) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return made.image.voxels, made.vessel.voxels.astype(bool), made.brain.voxels.astype(bool)


def corners(image: np.ndarray) -> np.ndarray:
    """The air beside the head: 10 x 10 pixels in the four corners of every slice."""
    return np.concatenate(
        [image[:, y, x].ravel() for y in (slice(10), slice(-10, None)) for x in (slice(10), slice(-10, None))]
    )


def inside_the_skin(image: np.ndarray) -> np.ndarray:
    """Slice by slice, what lies between tissue along a row or a column; air and signal voids do not interrupt it."""
    tissue = ndimage.gaussian_filter(image.astype(float), (0, 1, 1)) > 3 * corners(image).mean()
    between = np.zeros_like(tissue)
    for axis in (1, 2):
        before = np.logical_or.accumulate(tissue, axis)
        after = np.flip(np.logical_or.accumulate(np.flip(tissue, axis), axis), axis)
        between |= before & after
    return np.asarray(between)


@pytest.mark.parametrize("modality", MODALITIES)
class TestEveryHead:
    def test_is_a_pure_function_of_its_arguments(self, modality: Modality) -> None:
        again = head(modality, subject=1)
        for part in PARTS:
            np.testing.assert_array_equal(getattr(again, part).voxels, getattr(scan(modality), part).voxels)

    def test_differs_between_subjects_and_between_seeds(self, modality: Modality) -> None:
        _, vessel, brain = arrays(scan(modality))
        for other in (scan(modality, subject=2), scan(modality, seed=1)):
            _, vessel_too, brain_too = arrays(other)
            # Another tree in another brain, not the same one with other noise.
            assert 2 * (vessel & vessel_too).sum() / (vessel.sum() + vessel_too.sum()) < 0.7
            assert 0.005 < np.mean(brain != brain_too) / brain.mean() < 0.4

    def test_has_the_small_size_with_the_whole_field_of_view_centred_on_the_origin(self, modality: Modality) -> None:
        size, spacing = SMALL_SIZE[modality]
        geometry = scan(modality).image.geometry
        assert scan(modality).image.voxels.shape == size
        assert geometry.spacing_mm == spacing[::-1]
        assert geometry.direction == AXIAL
        x, y, z = ((n - 1) / 2 for n in geometry.size)
        assert geometry.point_mm((x, y, z)) == pytest.approx((0, 0, 0))
        original_size, original_spacing = ORIGINAL_SIZE[modality]
        for axis in (0, 1):  # from below to above, and front to back
            assert size[axis] * spacing[axis] == pytest.approx(original_size[axis] * original_spacing[axis], rel=0.03)

    def test_has_masks_of_zeros_and_ones_on_the_grid_of_its_image(self, modality: Modality) -> None:
        made = scan(modality)
        assert made.image.voxels.dtype == np.int16
        assert made.image.voxels.min() >= 0
        for mask in (made.vessel, made.brain):
            assert mask.geometry == made.image.geometry
            assert mask.voxels.dtype == np.uint8
            assert np.unique(mask.voxels).tolist() == [0, 1]

    def test_fills_the_picture_with_a_head_and_the_head_with_a_brain(self, modality: Modality) -> None:
        image, _, brain = arrays(scan(modality))
        skin, widest = inside_the_skin(image), image.shape[0] // 2
        assert 0.5 < skin[widest].mean() < 0.95
        assert 0.4 < brain[widest].sum() / skin[widest].sum() < 0.9
        assert ndimage.label(brain)[1] == 1
        assert (brain & ~skin).sum() == 0

    def test_lies_whole_within_the_picture(self, modality: Modality) -> None:
        for subject in (1, 2):
            made = scan(modality, subject)
            image, geometry = made.image.voxels, made.image.geometry
            above_the_nose = image[geometry.origin_mm[2] + geometry.spacing_mm[2] * np.arange(len(image)) > -20]
            for edge in (above_the_nose[:, [0, -1]], above_the_nose[:, :, [0, -1]]):
                assert np.mean(edge > 6 * corners(image).mean()) < 0.001

    def test_keeps_its_vessels_inside_the_skin_and_few(self, modality: Modality) -> None:
        image, vessel, brain = arrays(scan(modality))
        assert (vessel & ~inside_the_skin(image)).sum() <= 0.002 * vessel.sum()
        assert 0.003 < vessel.mean() < 0.02
        assert 0.003 < vessel[brain].mean() < 0.03

    def test_has_vessels_that_hang_together_as_trees(self, modality: Modality) -> None:
        _, vessel, _ = arrays(scan(modality))
        pieces, count = ndimage.label(vessel, ANY_NEIGHBOUR)
        sizes = np.sort(np.bincount(pieces.ravel())[1:])[::-1]
        assert sizes[:5].sum() > 0.85 * vessel.sum()
        assert count < 60
        assert 2 * sizes[0] > vessel.sum()

    def test_has_rician_noise_where_there_is_only_air(self, modality: Modality) -> None:
        air = corners(scan(modality).image.voxels).astype(float)
        # Rayleigh: mean / std = sqrt(pi / (4 - pi)) = 1.913. A Gaussian about 0 has 0; its modulus 1.32.
        assert air.mean() > 3
        assert air.mean() / air.std() == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), rel=0.05)


class TestTof:
    def test_has_arteries_brighter_than_the_brain(self) -> None:
        image, vessel, brain = arrays(scan("tof"))
        tissue = image[brain & ~vessel]
        assert np.median(image[vessel]) > 1.5 * np.median(tissue)
        assert np.percentile(image[vessel], 90) > 2.5 * np.percentile(tissue, 95)

    def test_has_arteries_that_fade_on_their_way_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fillings: list[vasculature.Filling] = []
        fill = vasculature.fill

        def remember(*args: Any, **kwargs: Any) -> vasculature.Filling:
            fillings.append(fill(*args, **kwargs))
            return fillings[-1]

        monkeypatch.setattr(vasculature, "fill", remember)
        image, _, brain = arrays(head("tof", subject=1))
        # Higher vessels are thinner too, so the tissue's part of each voxel is taken out first.
        share, index = fillings[0].share, fillings[0].index
        tissue = np.median(image[brain])
        blood = (image.ravel()[index] - tissue * (1 - share)) / share
        height = index // image[0].size / len(image)
        low, middle, high = (np.median(blood[(share > 0.5) & (height // (1 / 3) == third)]) for third in range(3))
        assert low > 1.1 * middle
        assert middle > 1.1 * high
        assert high > 2 * tissue

    def test_has_a_dark_brain_under_a_bright_scalp(self) -> None:
        image, vessel, brain = arrays(scan("tof"))
        skin = inside_the_skin(image)
        rim = skin & ~ndimage.binary_erosion(skin, IN_PLANE, iterations=4)
        assert np.percentile(image[rim], 90) > 1.5 * np.median(image[brain & ~vessel])


class TestSwi:
    def test_has_veins_darker_than_the_brain(self) -> None:
        image, vessel, brain = arrays(scan("swi"))
        tissue = image[brain & ~vessel]
        assert np.median(image[vessel]) < 0.4 * np.median(tissue)
        assert np.median(image[vessel & brain]) < np.percentile(tissue, 5)

    def test_has_veins_that_bloom_beyond_their_mask(self) -> None:
        image, vessel, brain = arrays(scan("swi", original_size=True))
        deep = ndimage.binary_erosion(brain, IN_PLANE, iterations=4)
        rings = [ndimage.binary_dilation(vessel, IN_PLANE, iterations=n) for n in (1, 2)]
        tissue = np.median(image[deep & ~rings[1]])
        # Partial volume alone gives 0.94 in the first ring and 1.0 in the second.
        assert np.median(image[deep & rings[0] & ~vessel]) < 0.85 * tissue
        assert np.median(image[deep & rings[1] & ~rings[0]]) < 0.98 * tissue

    def test_loses_signal_above_the_air_sinuses(self) -> None:
        image, vessel, brain = arrays(scan("swi"))
        geometry = scan("swi").image.geometry
        z, y, x = np.ogrid[tuple(slice(n) for n in image.shape)]
        (dx, dy, dz), (x0, y0, z0) = geometry.spacing_mm, geometry.origin_mm
        base = brain & ~ndimage.binary_dilation(vessel, IN_PLANE) & (np.abs(z0 + dz * z + 12) < 15)
        middle = base & (np.abs(x0 + dx * x) < 16)
        dark = image < 0.6 * np.median(image[brain])
        assert dark[middle & (y0 + dy * y < -15)].mean() > 0.05
        assert dark[middle & (y0 + dy * y > 15)].mean() < 0.025


class TestOriginalSize:
    def test_is_that_of_the_study(self) -> None:
        assert ORIGINAL_SIZE["tof"] == ((232, 576, 768), (0.59, 0.29, 0.29))
        assert ORIGINAL_SIZE["swi"] == ((80, 192, 256), (2.00, 0.89, 0.89))

    def test_is_what_a_head_of_original_size_has(self) -> None:
        made = scan("swi", original_size=True)
        assert made.image.voxels.shape == (80, 192, 256)
        assert made.image.geometry.spacing_mm == (0.89, 0.89, 2.00)
        assert made.vessel.geometry == made.image.geometry


def test_an_unknown_modality_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'flair' is none of tof, swi"):
        head("flair", subject=1)  # type: ignore[arg-type]


class TestTree:
    @pytest.fixture
    def tree(self) -> vasculature.Tree:
        rng = np.random.default_rng(5)
        surface = rng.normal(size=(60, 3))
        surface *= vasculature.SHELL_MM / np.linalg.norm(surface, axis=1, keepdims=True)
        return vasculature.arteries(surface, rng)

    def test_tapers_by_murrays_law_at_every_fork(self, tree: vasculature.Tree) -> None:
        below = np.zeros(len(tree.parent))
        np.add.at(below, tree.parent[tree.parent >= 0], tree.radius_mm[tree.parent >= 0] ** 3)
        forks = np.bincount(tree.parent[tree.parent >= 0], minlength=len(below)) > 1
        excess = tree.radius_mm[forks] ** 3 - below[forks]
        assert forks.sum() > 20
        assert excess.min() > -1e-9
        # Only where a trunk ends and twigs go on does something more leave, unseen.
        assert np.mean(excess < 1e-9) > 0.85

    def test_delays_blood_more_the_further_it_travels_and_the_thinner_the_vessel(self, tree: vasculature.Tree) -> None:
        child = np.flatnonzero(tree.parent >= 0)
        parent = tree.parent[child]
        length = np.linalg.norm(tree.points_mm[child] - tree.points_mm[parent], axis=1)
        np.testing.assert_allclose(tree.delay[child] - tree.delay[parent], length / tree.radius_mm[child], atol=1e-9)

    def test_fills_a_straight_vessel_with_its_own_volume(self) -> None:
        points = np.column_stack([np.full(21, 0.2), np.full(21, -0.3), np.linspace(-10, 10, 21)])
        parent = np.arange(-1, 20)
        tree = vasculature.Tree(points, parent, np.full(21, 3.0), np.arange(21.0))
        geometry = Geometry((21, 21, 41), (1.0, 1.0, 1.0), (-10.0, -10.0, -20.0))
        filling = vasculature.fill(tree, geometry, least_radius_mm=0.0)
        # A cylinder of radius 3 and length 20: 565.5 cubic millimetres; a voxel has one.
        assert filling.share.sum() == pytest.approx(np.pi * 9 * 20, rel=0.03)
        assert filling.share.max() <= 1
        x, y = filling.index % 21 - 10, filling.index // 21 % 21 - 10
        assert np.hypot(x - 0.2, y + 0.3).max() < 3 + np.sqrt(0.5)
        z = filling.index // 441 - 20
        assert np.corrcoef(z, filling.delay)[0, 1] > 0.99


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of a cohort of three and three."""
    return write_cohort(tmp_path_factory.mktemp("here") / "new" / "heads", subjects=3, seed=0)


class TestCohort:
    @pytest.fixture
    def rows(self, table: Path) -> list[dict[str, str]]:
        with table.open(newline="") as file:
            return list(csv.DictReader(file))

    def test_lists_subjects_of_both_domains_of_whom_none_is_in_both(self, rows: list[dict[str, str]]) -> None:
        assert list(rows[0]) == ["subject", "domain", "image", "vessel", "brain"]
        by_domain = {d: [r["subject"] for r in rows if r["domain"] == d] for d in ("source", "target")}
        assert by_domain == {
            "source": ["sub-001", "sub-002", "sub-003"],
            "target": ["sub-101", "sub-102", "sub-103"],
        }

    def test_reads_back_as_the_heads_it_was_made_from(self, table: Path, rows: list[dict[str, str]]) -> None:
        modality: dict[str, Modality] = {"source": "tof", "target": "swi"}
        for row in (rows[0], rows[3]):
            made = scan(modality[row["domain"]], int(row["subject"][4:]))
            for part in PARTS:
                found, wanted = read(table.parent / row[part]), getattr(made, part)
                np.testing.assert_array_equal(found.voxels, wanted.voxels)
                assert found.voxels.dtype == wanted.voxels.dtype
                assert found.geometry.differences(wanted.geometry) == []

    def test_has_its_files_where_the_table_says_and_no_others(self, table: Path, rows: list[dict[str, str]]) -> None:
        named = {row[part] for row in rows for part in PARTS}
        assert {"tof/sub-001.nii.gz", "swi/sub-103_vessel.nii.gz", "tof/sub-002_brain.nii.gz"} < named
        files = {p.relative_to(table.parent).as_posix() for p in table.parent.rglob("*") if p.is_file()}
        assert files == named | {"cohort.csv"}
        assert [p.name for p in table.parent.parent.iterdir()] == ["heads"]

    def test_refuses_a_folder_that_holds_something_and_leaves_it_as_it_was(self, tmp_path: Path) -> None:
        (tmp_path / "heads").mkdir()
        (tmp_path / "heads" / "note.txt").write_text("mine")
        with pytest.raises(InputError, match="new or empty folder"):
            write_cohort(tmp_path / "heads", subjects=3)
        assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["heads", "heads/note.txt"]

    def test_needs_three_subjects_for_three_splits(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="three or more"):
            write_cohort(tmp_path / "heads", subjects=2)
        assert list(tmp_path.iterdir()) == []

    def test_leaves_nothing_when_it_fails_half_way(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[Path] = []

        def fail_at_the_fifth(volume: Volume, path: Path) -> None:
            if len(written) == 4:
                raise OSError("disk full")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            written.append(path)

        monkeypatch.setattr(phantom, "head", lambda modality, **_: scan(modality))
        monkeypatch.setattr(phantom, "write", fail_at_the_fifth)
        with pytest.raises(OSError, match="disk full"):
            write_cohort(tmp_path / "heads", subjects=3)
        assert len(written) == 4
        assert list(tmp_path.iterdir()) == []
