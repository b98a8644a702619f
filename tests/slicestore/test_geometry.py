"""Grids: when two are one, and which are none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slicestore.errors import InputError
from slicestore.geometry import Geometry, check_axes, check_grids, check_size

GRID = Geometry((101, 51, 11), (0.5, 1.0, 2.0), (-10.0, 5.0, 30.0))


def test_a_label_may_lie_a_hundredth_of_a_millimetre_beside_its_image() -> None:
    check_grids(GRID, replace(GRID, origin_mm=(-10.0, 5.009, 30.0)), "here")
    with pytest.raises(InputError, match=r"here: found origin .*corners up to 0\.011 mm apart .*within 0\.01 mm"):
        check_grids(GRID, replace(GRID, origin_mm=(-10.0, 5.011, 30.0)), "here")


def test_spacing_counts_at_the_far_corner() -> None:
    check_grids(GRID, replace(GRID, spacing_mm=(0.50009, 1.0, 2.0)), "here")  # 100 steps of 0.00009 mm
    with pytest.raises(InputError, match="found spacing"):
        check_grids(GRID, replace(GRID, spacing_mm=(0.50011, 1.0, 2.0)), "here")


def test_a_flipped_axis_is_another_grid_though_its_voxels_lie_alike() -> None:
    flipped = replace(GRID, origin_mm=(40.0, 5.0, 30.0), direction=(-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    with pytest.raises(InputError, match=r"found origin .*direction"):
        check_grids(GRID, flipped, "here", kind="brain mask")


def test_skew_is_the_way_of_the_farthest_corner() -> None:
    assert GRID.skew_mm() == pytest.approx(0, abs=1e-9)
    # Two axes lean towards each other by a small angle e: each is e/2 off, over 25 mm along x and along y.
    e = 0.004
    leaning = replace(GRID, direction=(1.0, np.sin(e), 0.0, 0.0, np.cos(e), 0.0, 0.0, 0.0, 1.0))
    assert leaning.skew_mm() == pytest.approx(25 * np.sqrt(2) * e / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"spacing_mm": (0.5, 0.0, 2.0)}, "spacing"),
        ({"spacing_mm": (0.5, 1.0, -2.0)}, "spacing"),
        ({"origin_mm": (float("nan"), 0.0, 0.0)}, "finite"),
        ({"direction": (0.0,) * 9}, "singular"),
        ({"direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.02)}, "scaled"),
        ({"direction": (1.0, 0.006, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)}, "sheared"),
    ],
)
def test_what_is_no_grid_is_refused(changed: dict[str, tuple[float, ...]], found: str) -> None:
    check_axes(GRID, "here")
    with pytest.raises(InputError, match=f"here: .*{found}"):
        check_axes(replace(GRID, **changed), "here")  # type: ignore[arg-type]


def test_left_handed_axes_are_a_grid() -> None:
    check_axes(replace(GRID, direction=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0)), "here")


@pytest.mark.parametrize("size", [(5, 4, 1), (1, 5, 4), (5, 4, 3)])
def test_one_slice_is_a_volume(size: tuple[int, int, int]) -> None:
    check_size(size, "here")


@pytest.mark.parametrize("size", [(5, 4), (5, 1, 1), (5, 4, 0), (5,), (5, 4, 3, 2)])
def test_less_or_more_than_a_volume_is_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="D image of size"):
        check_size(size, "here")


def test_an_affine_becomes_the_grid_that_it_describes() -> None:
    affine = np.array([[0.0, -1.0, 0.0, 7.0], [0.5, 0.0, 0.0, 8.0], [0.0, 0.0, 2.0, 9.0]])
    grid = Geometry.from_affine((3, 4, 5), affine)
    assert (grid.spacing_mm, grid.origin_mm) == ((0.5, 1.0, 2.0), (7.0, 8.0, 9.0))
    assert grid.point_mm((2, 3, 4)) == (7.0 - 3.0, 8.0 + 1.0, 9.0 + 8.0)
