"""Where voxels lie in a slice: orienting, cropping and padding. Nothing here changes a value.

Knows axes, shifts and frames; knows nothing of intensities, labels or settings. Arrays are (slice, y, x).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import SimpleITK as sitk

from slicestore.geometry import AXIAL, Geometry
from slicestore.volume import Volume

CANONICAL = "LPS"
"""Axes of a prepared volume point to the patient's left, posterior and superior: its slices are axial."""

Box = tuple[tuple[int, int], tuple[int, int]]
"""First and one past the last row, then column."""


def orient(volume: Volume) -> Volume:
    """Permute and flip axes until they are as near to left, posterior and superior as that gets them (a view)."""
    order, flips = canonical_axes(volume.geometry)
    voxels = np.flip(volume.voxels.transpose(order), flips)
    old, index = volume.geometry, [2 - axis for axis in order[::-1]]  # index axis of the file that becomes x, y, z
    flipped = [2 - axis in flips for axis in range(3)]
    x, y, z = (old.size[axis] - 1.0 if flipped[index.index(axis)] else 0.0 for axis in range(3))
    width, height, depth = (old.spacing_mm[axis] for axis in index)
    signs = np.where(flipped, -1.0, 1.0)
    columns = np.reshape(old.direction, (3, 3))[:, index] * signs + 0.0  # + 0.0 turns -0.0 into 0.0
    direction = tuple(columns.ravel().tolist())
    geometry = Geometry(voxels.shape[::-1], (width, height, depth), old.point_mm((x, y, z)), direction)
    return Volume(voxels, geometry)


def canonical_axes(geometry: Geometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How to make voxels (z, y, x) canonical: the order to transpose them into, then the axes to flip.

    SimpleITK decides which axis is which; NumPy moves them as views, where `DICOMOrient` would copy 400 MB of a TOF.
    """
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(geometry.direction)
    pairs = [next((k, letter) for k, letter in enumerate(code) if letter in pair) for pair in ("LR", "PA", "SI")]
    order = tuple(2 - k for k, _ in reversed(pairs))
    return order, tuple(2 - new for new, (_, letter) in enumerate(pairs) if letter != CANONICAL[new])


def oblique_degrees(oriented: Geometry) -> float:
    """Give the largest angle between an axis of an oriented grid and the patient's axis that it stands for."""
    cosines = np.diag(np.reshape(oriented.direction, (3, 3))) * np.diag(np.reshape(AXIAL, (3, 3)))
    return round(float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1)))), 3)


def frame(volume: Volume, size: int, shift: tuple[int, int], fill: float) -> Volume:
    """Crop or pad each slice to `size` x `size`; indices grow by `shift` along y and x."""
    origin = volume.geometry.point_mm((-shift[1], -shift[0], 0))
    geometry = replace(volume.geometry, size=(size, size, volume.geometry.size[2]), origin_mm=origin)
    return Volume(crop_pad(volume.voxels, (size, size), shift, fill), geometry)


def shift_to(old: int, new: int, middle: float) -> int:
    """By how much indices grow for `middle`, in pixels from the old start, to become the middle of the new length.

    A length that fits stays whole, and one that does not fit fills the new one: the shift goes no further.
    """
    return min(max(int(new / 2 - middle), min(0, new - old)), max(0, new - old))


def crop_pad(voxels: np.ndarray, shape: tuple[int, ...], shift: tuple[int, int], fill: float) -> np.ndarray:
    """Copy each slice into one of another shape, `shift` further along y and x; `fill` is where nothing was."""
    out = np.full((len(voxels), *shape), fill, dtype=voxels.dtype)
    rows, columns = (_overlap(*axis) for axis in zip(voxels.shape[1:], shape, shift, strict=True))
    out[:, rows[1], columns[1]] = voxels[:, rows[0], columns[0]]
    return out


def _overlap(old: int, new: int, shift: int) -> tuple[slice, slice]:
    """Find what both lengths share, in indices of the old and of the new one."""
    first, last = max(0, shift), min(new, old + shift)
    return slice(first - shift, last - shift), slice(first, last)


def inside(resampled: Geometry, size: int, shift: tuple[int, int]) -> tuple[slice, slice, slice]:
    """Where a framed volume shows image rather than frame."""
    width, height, _ = resampled.size
    return slice(None), _overlap(height, size, shift[0])[1], _overlap(width, size, shift[1])[1]


def box_of(mask: np.ndarray) -> Box:
    """Give the bounding box of a mask in-plane, over all slices."""
    rows, columns = (np.flatnonzero(mask.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)
