"""From a raw grid to slices and back: every voxel keeps its millimetres, however the grid lies and is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from slicestore.frame import frame, orient
from slicestore.geometry import Geometry
from slicestore.preprocess import prepare, restore, restore_mask
from slicestore.resample import resample
from slicestore.settings import Preprocessing
from slicestore.volume import Volume

ERROR_MM = 1e-3
FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Case:
    """A raw grid, what to do to it, and a seed for its voxels."""

    geometry: Geometry
    config: Preprocessing
    seed: int

    def image(self) -> Volume:
        """Noise round a bright block; the last of several slices is air."""
        voxels = np.random.default_rng(self.seed).normal(0, 1, self.geometry.size[::-1])
        voxels[tuple(slice(n // 4, n // 4 + max(1, n // 2)) for n in voxels.shape)] += 50
        if self.config.slices == "tissue" and len(orient(Volume(voxels, self.geometry)).voxels) > 1:
            orient(Volume(voxels, self.geometry)).voxels[-1] = 0  # a view
        return Volume(voxels, self.geometry)

    def brain(self) -> Volume:
        """A box anywhere."""
        rng, mask = np.random.default_rng(self.seed + 1), np.zeros(self.geometry.size[::-1], dtype=np.uint8)
        mask[tuple(slice(int(rng.integers(n // 2 + 1)), n) for n in mask.shape)] = 1
        return Volume(mask, self.geometry)


@st.composite
def cases(draw: st.DrawFn, *, resampled: bool) -> Case:
    """Any direction, handedness and order of axes; oblong voxels; slices cut off, padded and left out.

    In-plane spacings divide the target's by whole numbers, since a pixel that covers a part of a voxel takes its value
    as if it lay at the voxel's centre. One slice is allowed.
    """
    turn = Rotation.from_euler(
        "xyz", [draw(st.floats(-180, 180, allow_subnormal=False)) for _ in range(3)], degrees=True
    ).as_matrix()
    direction = turn * [1.0, 1.0, draw(st.sampled_from([1.0, -1.0]))]
    into = np.argmax(
        np.abs(direction), axis=0
    )  # the patient's axis that each of the grid's is taken for, if they differ
    target = draw(st.floats(0.4, 2.0, allow_subnormal=False))
    shrink = [draw(st.integers(1, 4)) if resampled else 1 for _ in range(2)]
    along = (target / shrink[0], target / shrink[1], draw(st.floats(0.5, 4.0, allow_subnormal=False)))
    lengths = (*(draw(st.integers(2, 14)) * k for k in shrink), draw(st.integers(1, 5)))
    if sorted(into) != [0, 1, 2]:  # between two axes: SimpleITK decides, so it must not matter
        along, lengths = (target,) * 3, (lengths[0], lengths[0], lengths[0])
        into = np.arange(3)
    size, spacing = tuple(int(lengths[k]) for k in into), tuple(float(along[k]) for k in into)
    origin = tuple(draw(st.floats(-100, 100, allow_subnormal=False)) for _ in range(3))
    config = Preprocessing(
        size=draw(st.sampled_from([8, 16])),
        spacing_mm=target,
        pad=draw(st.sampled_from(["background", "zero"])),
        centre=draw(st.sampled_from(["grid", "foreground", "brain"])),
        slices=draw(st.sampled_from(["all", "tissue", "foreground"])),
    )
    geometry = Geometry(size, spacing, origin, tuple(direction.ravel().tolist()))  # type: ignore[arg-type]
    return Case(geometry, config, draw(st.integers(0, 1000)))


def world(geometry: Geometry) -> np.ndarray:
    """Coordinates in millimetres of every voxel, (z, y, x, 3)."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in geometry.size[::-1]), indexing="ij")[::-1], axis=-1)
    matrix = np.reshape(geometry.direction, (3, 3)) * geometry.spacing_mm
    return np.asarray(index @ matrix.T + geometry.origin_mm)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * np.count_nonzero((a > 0) & (b > 0)) / (np.count_nonzero(a) + np.count_nonzero(b)))


@FEW
@given(cases(resampled=True))
def test_every_pixel_shows_the_place_that_its_grid_says(case: Case) -> None:
    """An image of a coordinate, resampled and cut, holds each pixel's own coordinate."""
    record = prepare(case.image(), None, case.config, brain=case.brain()).record
    for axis in range(3):
        coordinate = Volume(world(case.geometry)[..., axis], case.geometry)
        made = frame(
            resample(orient(coordinate), case.config.spacing_mm), case.config.size, tuple(record["shift_yx"]), np.nan
        )
        assert made.geometry == Geometry.from_dict(record["prepared"])
        assert np.nanmax(np.abs(made.voxels - world(made.geometry)[..., axis])) < ERROR_MM


@FEW
@given(cases(resampled=True))
def test_what_is_put_on_a_pixel_comes_back_to_its_place(case: Case) -> None:
    """Slices of a coordinate, interpolated back, give each raw voxel its own coordinate, and its own geometry."""
    record = prepare(case.image(), None, case.config, brain=case.brain()).record
    places = world(Geometry.from_dict(record["prepared"]))[record["slices"]]
    ones = restore(np.ones(places.shape[:3], dtype=np.float32), record, linear=True)
    assert ones.geometry == case.geometry
    whole = np.isclose(ones.voxels, 1) & _between_centres(case, record["resampled"])
    for axis in range(3):
        back = restore(places[..., axis].astype(np.float32), record, linear=True)
        gap = np.abs(back.voxels - world(case.geometry)[..., axis])
        assert gap[whole].max(initial=0) < ERROR_MM


def _between_centres(case: Case, resampled: dict[str, object]) -> np.ndarray:
    """Raw voxels that lie between pixel centres in-plane; outside them nothing can be interpolated."""
    coarse = Geometry.from_dict(resampled)
    steps = np.linalg.inv(np.reshape(coarse.direction, (3, 3)) * coarse.spacing_mm)
    index = (world(case.geometry) - coarse.origin_mm) @ steps.T
    return np.asarray(np.all((index > -1e-6) & (index < np.array(coarse.size) - 1 + 1e-6), axis=-1))


@FEW
@given(cases(resampled=False), st.integers(1, 3))
def test_without_resampling_a_label_comes_back_as_it_was(case: Case, classes: int) -> None:
    image, brain = case.image(), case.brain()
    unlabelled = replace(case.config, slices="tissue" if case.config.slices == "tissue" else "all")
    record = prepare(image, None, unlabelled, brain=brain).record
    shown = restore(np.ones((len(record["slices"]), *[case.config.size] * 2), dtype=np.uint8), record).voxels
    label = np.random.default_rng(case.seed).integers(0, classes + 1, shown.shape).astype(np.uint8) * shown
    if not label.any():
        return
    made = prepare(image, Volume(label, case.geometry), case.config, brain=brain)
    assert made.label is not None
    assert made.fraction is not None
    back = restore(made.label, made.record)
    assert back.geometry == case.geometry
    assert np.array_equal(back.voxels, label)
    assert np.array_equal(restore_mask(made.fraction, made.record).voxels, label > 0)


# --- tubes ------------------------------------------------------------------------------------------------------------


def tube(geometry: Geometry, seed: int, width_mm: float) -> np.ndarray:
    """A straight tube through about the middle of a grid, in any direction."""
    rng, places = np.random.default_rng(seed), world(geometry)
    along, through = rng.normal(size=3), places.reshape(-1, 3).mean(axis=0) + rng.uniform(-1, 1, 3)
    along /= np.linalg.norm(along)
    across = places - through - ((places - through) @ along)[..., None] * along
    return (np.linalg.norm(across, axis=-1) <= width_mm / 2).astype(np.uint8)


@pytest.mark.parametrize("seed", range(8))
def test_a_tube_of_3_mm_comes_back_through_the_studys_resampling(seed: int) -> None:
    """0.29 mm to 0.89 mm and back: from the area fraction, nearly the tube; from the hard label, its nine pixels."""
    turn = Rotation.from_euler("xyz", [5, -7, 10 * seed], degrees=True).as_matrix()
    geometry = Geometry((110, 100, 32), (0.29, 0.29, 0.59), (3.0, -2.0, 1.0), tuple(turn.ravel().tolist()))
    label = tube(geometry, seed, 3.0)
    image = Volume(label + np.random.default_rng(seed).normal(0, 0.1, label.shape), geometry)
    made = prepare(image, Volume(label, geometry), Preprocessing(size=48))
    assert made.label is not None
    assert made.fraction is not None
    soft = restore_mask(made.fraction, made.record)
    assert soft.geometry == geometry
    assert dice(soft.voxels, label) >= 0.97
    # A tube that leaves the field of view fills the outermost pixels, which reach a little further than the voxels.
    assert np.count_nonzero(soft.voxels) == pytest.approx(np.count_nonzero(label), rel=0.015)
    assert dice(restore(made.label, made.record).voxels, label) > 0.84


@pytest.mark.parametrize("width_mm", [1.0, 2.0])
def test_probabilities_and_stored_fractions_come_back_alike(width_mm: float) -> None:
    geometry = Geometry((60, 50, 12), (0.29, 0.29, 0.59))
    label = tube(geometry, 0, width_mm)
    made = prepare(Volume(label.astype(float), geometry), Volume(label, geometry), Preprocessing(size=24))
    assert made.fraction is not None
    stored, likely = (
        restore_mask(share, made.record) for share in (made.fraction, (made.fraction / 255).astype(np.float32))
    )
    assert dice(stored.voxels, likely.voxels) > 0.999


def test_a_soft_mask_of_nothing_is_nothing() -> None:
    geometry = Geometry((12, 12, 2), (0.5, 0.5, 1.0))
    made = prepare(Volume(np.random.default_rng(0).normal(size=(2, 12, 12)), geometry), None, Preprocessing(size=8))
    assert not restore_mask(np.zeros((2, 8, 8), dtype=np.uint8), made.record).voxels.any()
