"""In-plane resampling: grids, weights and the planes that they make.

Knows how pixels of one grid cover those of another; knows nothing of intensities, labels or files. Arrays are
(slice, y, x); slices keep their places throughout.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.sparse import csr_array

from slicestore.geometry import Geometry
from slicestore.volume import Volume

SLIVER = 1e-4
"""Share of a voxel below which two grids only seem to differ: headers round 0.89 mm to float32 and then it is not
0.89."""


def resample(volume: Volume, spacing_mm: float, planes: Iterable[np.ndarray] | None = None) -> Volume:
    """Bring the in-plane spacing to exactly `spacing_mm`, as float32.

    Shrinking averages over the area of each new pixel (a scanner with larger voxels; subsampling would alias thin
    vessels and keep the noise), enlarging is linear, and each axis does what it needs: an oblong pixel may shrink along
    one and grow along the other. Old and new grid share the outer corner of their first pixel. `planes` replaces the
    volume's own, one by one, so that a corrected copy of a raw volume never exists as a whole.
    """
    new = grid_at(volume.geometry, spacing_mm)
    return Volume(resample_planes(volume.voxels if planes is None else planes, volume.geometry, new), new)


def grid_at(old: Geometry, spacing_mm: float) -> Geometry:
    """Lay out the grid with that in-plane spacing which covers the old one, to the nearest pixel."""
    spacing = (spacing_mm, spacing_mm, old.spacing_mm[2])
    width, height = (max(1, round(n * s / spacing_mm)) for n, s in zip(old.size[:2], old.spacing_mm[:2], strict=True))
    x, y = ((spacing_mm / s - 1) / 2 for s in old.spacing_mm[:2])
    return Geometry((width, height, old.size[2]), spacing, old.point_mm((x, y, 0.0)), old.direction)


def resample_planes(planes: Iterable[np.ndarray], old: Geometry, new: Geometry) -> np.ndarray:
    """Take each plane from the old in-plane grid to the new: float32 (slice, y, x), zero where a plane is."""
    between = Between(old, new)
    out = np.zeros(new.size[::-1], dtype=np.float32)
    for plane, target in zip(planes, out, strict=True):
        if plane.any():
            target[:] = between(plane)
    return out


class Between:
    """The way from one in-plane grid to another: sparse weights of both axes, applied to a plane at a time.

    With `rows` and `columns` it takes only this part of each old plane, where all that is not zero lies. Its scratch
    memory is kept from plane to plane, as fresh pages cost more than the sums; so one thread at a time.
    """

    def __init__(self, old: Geometry, new: Geometry, rows: slice = slice(None), columns: slice = slice(None)) -> None:
        self._columns, self._rows = (
            csr_array(weights(old.size[k], old.spacing_mm[k], new.size[k], new.spacing_mm[k])[:, part])
            for k, part in ((0, columns), (1, rows))
        )
        self._values = np.empty((self._rows.shape[1], self._columns.shape[1]), dtype=np.float32)
        self._turned = np.empty((self._columns.shape[1], self._rows.shape[0]), dtype=np.float32)

    def __call__(self, plane: np.ndarray) -> np.ndarray:
        """Resample one plane (y, x) to float32."""
        np.copyto(self._values, plane)
        np.copyto(self._turned, (self._rows @ self._values).T)
        made: np.ndarray = (self._columns @ self._turned).T
        return made


def weights(old: int, old_mm: float, new: int, new_mm: float) -> np.ndarray:
    """Weights (new, old) of one axis between corner-aligned grids, float32; every row sums to 1."""
    if new_mm >= old_mm:
        low, high = np.arange(new)[:, None] * new_mm, np.arange(1, new + 1)[:, None] * new_mm
        begin, end = np.arange(old) * old_mm, np.arange(1, old + 1) * old_mm
        shares = np.clip(np.minimum(high, end) - np.maximum(low, begin), 0, None) / old_mm
    else:
        centre = np.clip((np.arange(new)[:, None] + 0.5) * new_mm / old_mm - 0.5, 0, old - 1)
        shares = np.clip(1 - np.abs(centre - np.arange(old)), 0, None)
    shares[shares < SLIVER] = 0
    normal: np.ndarray = (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
    return normal


def nearest(old: Geometry, new: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the old pixel that holds the centre of each new one; past the old grid's end, its size or more.

    Corner-aligned grids only, as of `grid_at`.
    """
    rows, columns = ((np.arange(new.size[k]) + 0.5) * new.spacing_mm[k] // old.spacing_mm[k] for k in (1, 0))
    return rows.astype(np.intp), columns.astype(np.intp)
