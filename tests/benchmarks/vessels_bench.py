"""What is left of vessels when their mask goes from 0.29 mm to 0.89 mm, by the way of resampling and by their diameter.

The tree is a synthetic artery's, of which every centreline point and radius is known, on the study's TOF grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from measure import Result
from rich.console import Console
from rich.table import Table

from slicestore import vasculature
from slicestore.geometry import Geometry
from slicestore.labels import resample_label
from slicestore.phantom import ORIGINAL_SIZE
from slicestore.resample import grid_at
from slicestore.shape import pieces
from slicestore.volume import Volume

SPACING_MM = 0.89
SEEDS = (0, 1)
TWIGS = 500
BANDS_MM = {"05_1": (0.5, 1.0), "1_2": (1.0, 2.0), "over_2": (2.0, 9.0)}
"""Diameters; the tree has none below 0.5 mm."""
STEP_MM = 0.2
"""Between the centreline's points that are looked up."""
MARKS = {"generous": (0.55 * ORIGINAL_SIZE["tof"][1][2], 0.2), "exact": (1e-3, 0.5)}
"""How the mask was drawn: what is added to radii (in quadrature, mm), and how much of a voxel must be vessel.
`generous` is the phantom's observer, who marks what stands out; `exact` is the tree itself."""


def vessels(scratch: Path) -> Iterator[Result]:
    """Share of the centreline kept by our label resampling over that of others; prints every figure."""
    del scratch  # nothing is written
    table = Table(
        "mask", "method", *(f"kept, {low:g}-{high:g} mm" for low, high in BANDS_MM.values()), "volume", "pieces"
    )
    found: dict[tuple[str, str], dict[str, float]] = {}
    for mark in MARKS:
        trees = [measured(seed, mark) for seed in SEEDS]
        for method in trees[0]:
            mean = {key: float(np.mean([tree[method][key] for tree in trees])) for key in trees[0][method]}
            found[mark, method] = mean
            kept = [f"{mean[band]:.1%}" for band in BANDS_MM]
            table.add_row(mark, method, *kept, f"{mean['volume']:.2f}", f"{mean['pieces']:.0f}")
    Console(width=120).print(table)
    for band in BANDS_MM:
        for other in ("nearest", "label_gaussian"):
            ours, theirs = (found["generous", method][band] for method in ("ours", other))
            exact = " against ".join(f"{found['exact', method][band]:.1%}" for method in ("ours", other))
            yield Result(
                f"vessels.centreline_{band}.ours_vs_{other}",
                ours / max(theirs, 1e-3),
                "times the centreline",
                other,
                f"{ours:.1%} against {theirs:.1%} of it kept from 0.29 to 0.89 mm; of an exact mask's {exact}",
            )


def measured(seed: int, mark: str) -> dict[str, dict[str, float]]:
    """For each method: share of the centreline kept in each band, volume over the raw volume, pieces."""
    label, points_mm, diameter_mm = grown(seed, mark)
    seen = looked_up(label.voxels > 0, label.geometry, points_mm)  # near the edge of the field of view some are not
    grid, found = grid_at(label.geometry, SPACING_MM), {}
    for method, work in METHODS.items():
        mask = work(label, grid)
        where = label.geometry if method == "raw" else grid
        kept = looked_up(mask, where, points_mm)
        found[method] = {
            band: float(kept[seen & (diameter_mm >= low) & (diameter_mm < high)].mean())
            for band, (low, high) in BANDS_MM.items()
        }
        found[method]["volume"] = float(np.count_nonzero(mask) * np.prod(where.spacing_mm))
        found[method]["pieces"] = float(pieces(mask))
    raw = found["raw"]["volume"]
    return {method: row | {"volume": row["volume"] / raw} for method, row in found.items()}


def grown(seed: int, mark: str) -> tuple[Volume, np.ndarray, np.ndarray]:
    """A tree's mask, the points of its centreline (n, 3; x, y, z), and the diameter at each."""
    rng = np.random.default_rng(seed)
    ways = rng.normal(size=(TWIGS, 3))
    targets = ways / np.linalg.norm(ways, axis=1, keepdims=True) * vasculature.SHELL_MM
    tree = vasculature.arteries(targets[targets[:, 2] > -24], rng)
    size, spacing = (of[::-1] for of in ORIGINAL_SIZE["tof"])
    x, y, z = (-0.5 * (n - 1) * s for n, s in zip(size, spacing, strict=True))
    geometry = Geometry(size, spacing, (x, y, z))  # type: ignore[arg-type]
    added, least = MARKS[mark]
    filling = vasculature.fill(tree, geometry, least_radius_mm=added)
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask.reshape(-1)[filling.index] = filling.share > least
    child = np.flatnonzero(tree.parent >= 0)
    steps = np.linspace(0, 1, int(np.ceil(vasculature.NODE_STEP_MM / STEP_MM)), endpoint=False)
    begin, end = tree.points_mm[tree.parent[child]], tree.points_mm[child]
    points = (begin[:, None] + steps[None, :, None] * (end - begin)[:, None]).reshape(-1, 3)
    return Volume(mask, geometry), points, np.repeat(2 * np.hypot(tree.radius_mm[child], added), len(steps))


def looked_up(mask: np.ndarray, grid: Geometry, points_mm: np.ndarray) -> np.ndarray:
    """Tell which points (n, 3; x, y, z) of an axial grid lie in a voxel of a mask."""
    index = np.floor((points_mm - grid.origin_mm) / grid.spacing_mm + 0.5).astype(np.int64)
    inside = np.all((index >= 0) & (index < grid.size), axis=1)
    inside[inside] = mask[tuple(index[inside].T[::-1])]
    return inside


def _raw(label: Volume, _: Geometry) -> np.ndarray:
    return np.asarray(label.voxels > 0)


def _ours(label: Volume, grid: Geometry) -> np.ndarray:
    return np.asarray(resample_label(label, grid.spacing_mm[0]).hard > 0)


def _area_alone(label: Volume, grid: Geometry) -> np.ndarray:
    return np.asarray(resample_label(label, grid.spacing_mm[0], join=False).hard > 0)


def _by_itk(interpolator: int) -> Callable[[Volume, Geometry], np.ndarray]:
    def work(label: Volume, grid: Geometry) -> np.ndarray:
        kind = sitk.sitkFloat32 if interpolator == sitk.sitkLinear else sitk.sitkUInt8
        made = sitk.Resample(
            label.to_image(),
            grid.size,
            sitk.Transform(),
            interpolator,
            grid.origin_mm,
            grid.spacing_mm,
            grid.direction,
            0,
            kind,
        )
        return np.asarray(sitk.GetArrayViewFromImage(made) > 0.5)

    return work


METHODS: Mapping[str, Callable[[Volume, Geometry], np.ndarray]] = {
    "raw": _raw,
    "ours": _ours,
    "area alone": _area_alone,
    "nearest": _by_itk(sitk.sitkNearestNeighbor),
    "linear > 0.5": _by_itk(sitk.sitkLinear),
    "label_gaussian": _by_itk(sitk.sitkLabelGaussian),
}
"""`area alone` is ours without `join`."""
