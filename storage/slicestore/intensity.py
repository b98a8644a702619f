"""Intensities of one volume: standardising, air and tissue, tails, and shading.

Knows values and where they lie on a grid; knows nothing of labels, crops or files. Arrays are (slice, y, x).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.resample import Between, resample_planes, weights
from slicestore.settings import LEVELS
from slicestore.volume import Volume

BACKGROUND_PERCENT = 0.5
"""Percentage of a volume's values that lie below what stands for air. The minimum would follow one stray voxel, and the
mode of the border is tissue where the field of view is a crop; this one is air wherever there is any, and the darkest
tissue where there is none."""
EMPTY_STD = 0.1
"""A slice is empty when its standard deviation is below this share of the volume's: air has noise but no contrast."""
TISSUE_TAIL = 0.01
"""Share of the tissue that may lie outside its box at each end: noise and pulsation make a few voxels of air bright."""
SHADING_MM = 4.0
"""Voxels on which shading is estimated. It varies over centimetres, and N4 takes 700 times as long on a whole TOF."""
SHADING_ITERATIONS = (50, 50, 50, 50)
"""Most iterations of N4 at each of its levels, from 4 spline intervals along each axis to 32."""


def standardise(
    volume: Volume, where: object = "volume", mask: np.ndarray | None = None
) -> tuple[Volume, float, float]:
    """Shift and scale to mean 0 and standard deviation 1, of the voxels in `mask` or of all; float16 holds the result.

    Also returns the two numbers, in the volume's units.

    Raises:
        InputError: all those voxels are the same, or so far apart that their mean or spread is not finite.
    """
    counted = [(plane if mask is None else plane[mask[z]]) for z, plane in enumerate(volume.voxels)]
    size = sum(values.size for values in counted)
    with np.errstate(over="ignore", invalid="ignore"):  # told below
        mean = float(sum(values.sum(dtype=np.float64) for values in counted) / max(1, size))
        square = sum(np.square(values - mean, dtype=np.float64).sum() for values in counted)
        std = float(np.sqrt(square / max(1, size)))
    if not np.isfinite(std):
        raise InputError(
            where,
            found=f"values from {volume.voxels.min():g} to {volume.voxels.max():g}, too far apart for a mean",
            rule="intensities are measurements of a scanner",
            remedy="find the voxels that are no measurement, and replace them",
        )
    if not std > 1e-6 * abs(mean):
        raise InputError(
            where,
            found=f"the one value {mean:g} in every voxel",
            rule="an image has contrast",
            remedy="check that this is the image and not an empty or masked-out export",
        )
    standard = np.empty(volume.voxels.shape, dtype=np.float16)
    for plane, target in zip(volume.voxels, standard, strict=True):
        target[:] = (plane - np.float32(mean)) / np.float32(std)
    return Volume(standard, volume.geometry), mean, std


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Every value of a float16 array and how often it occurs: exact ranks without sorting millions of voxels."""

    values: np.ndarray
    """float32, ascending."""
    counts: np.ndarray
    """int64, all above 0."""

    @classmethod
    def of(cls, voxels: np.ndarray) -> Histogram:
        """Count the finite values of a float16 array, slice by slice."""
        counts = np.zeros(1 << 16, dtype=np.int64)
        for plane in voxels:
            counts += np.bincount(np.ascontiguousarray(plane).view(np.uint16).ravel(), minlength=1 << 16)
        every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
        found = np.flatnonzero((counts > 0) & np.isfinite(every))
        order = found[np.argsort(every[found], kind="stable")]
        return cls(every[order], counts[order])

    def percentile(self, percent: float) -> float:
        """Give the smallest value that at least `percent` of all values do not exceed."""
        below = np.cumsum(self.counts)
        return float(self.values[np.searchsorted(below, percent / 100 * below[-1] * (1 - 1e-12))])

    def tails(self) -> dict[str, list[float]]:
        """Give, for each of `LEVELS`, the values that cut this percentage off below and above."""
        return {f"{level:g}": [self.percentile(level), self.percentile(100 - level)] for level in LEVELS}

    def otsu(self) -> float:
        """Give the largest value of the darker class when two classes are parted best (Otsu 1979)."""
        below, weight = np.cumsum(self.counts).astype(float), np.cumsum(self.counts * self.values.astype(float))
        above = below[-1] - below[:-1]
        gap = weight[:-1] / below[:-1] - (weight[-1] - weight[:-1]) / above
        return float(self.values[np.argmax(below[:-1] * above * gap**2)]) if len(self.values) > 1 else np.inf


def tissue_box(standard: np.ndarray, histogram: Histogram) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and one past the last row, and column, between which the tissue lies, but for `TISSUE_TAIL` at each end.

    Tissue is what is brighter than Otsu's threshold, in all slices together: the image alone decides. Where there is no
    air, the bright half of the tissue does, which mostly fills the field of view.
    """
    threshold = histogram.otsu()
    rows, columns = np.zeros(standard.shape[1], dtype=np.int64), np.zeros(standard.shape[2], dtype=np.int64)
    for plane in standard:
        tissue = plane > threshold
        rows += np.count_nonzero(tissue, axis=1)
        columns += np.count_nonzero(tissue, axis=0)
    return _span(rows), _span(columns)


def _span(profile: np.ndarray) -> tuple[int, int]:
    share = np.cumsum(profile) / max(1, profile.sum())
    return int(np.argmax(share > TISSUE_TAIL)), int(np.argmax(share >= 1 - TISSUE_TAIL)) + 1


def with_contrast(standard: np.ndarray) -> np.ndarray:
    """Tell the slices that show more than air (see `EMPTY_STD`), bool (n,)."""
    return np.array([plane.std(dtype=np.float32) >= EMPTY_STD for plane in standard])


# --- shading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Shading:
    """A smooth factor over a volume: what was seen is what is there times this."""

    gain: np.ndarray
    """float32 (slice, y, x) on a coarse grid in-plane, every slice of the volume; its mean logarithm is about 0."""
    coarse: Geometry
    fine: Geometry

    def corrected(self, voxels: np.ndarray) -> Iterator[np.ndarray]:
        """Give the planes of the volume without its shading, float32, one at a time."""
        between = Between(self.coarse, self.fine)
        for plane, gain in zip(voxels, self.gain, strict=True):
            yield plane / between(gain)


def shading(volume: Volume) -> Shading:
    """Estimate a volume's shading by N4 (Tustison 2010) on voxels of about `SHADING_MM`, in tissue above air (Otsu).

    Runs on one thread, since N4 sums its splines in the order in which threads end.
    """
    size, spacing = volume.geometry.size, volume.geometry.spacing_mm
    small = [max(4, round(n * s / SHADING_MM)) for n, s in zip(size, spacing, strict=True)]  # 4: a cubic spline's knots
    step = [n * s / m for n, s, m in zip(size, spacing, small, strict=True)]
    coarse = Geometry((small[0], small[1], size[2]), (step[0], step[1], spacing[2]))
    along = weights(size[2], spacing[2], small[2], step[2])
    reduced = np.tensordot(along, resample_planes(volume.voxels, volume.geometry, coarse), axes=1)
    image = Volume(reduced, Geometry((small[0], small[1], small[2]), (step[0], step[1], step[2]))).to_image()
    mask = sitk.OtsuThreshold(image, 0, 1) & sitk.Cast(image > 0, sitk.sitkUInt8)  # N4 takes logarithms
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetNumberOfThreads(1)
    n4.SetMaximumNumberOfIterations(SHADING_ITERATIONS)
    n4.Execute(image, mask)
    field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).astype(np.float32)
    full = np.tensordot(weights(small[2], step[2], size[2], spacing[2]), field, axes=1)
    return Shading(np.exp(full), coarse, volume.geometry)
