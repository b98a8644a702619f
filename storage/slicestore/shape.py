"""The shape of a mask: how many pieces it has, whether it is a tube, and where its centreline runs.

Knows voxels that touch; knows nothing of resampling, classes or files. Masks are bool (z, y, x). Nothing here makes a
wide copy of a whole mask: a scan has a hundred million voxels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.morphology import skeletonize

TUBE_MM = 8.0
"""Up to this mean width in-plane a mask is taken for tubes. Vessels of the head are 0.3 to 6 mm wide, and a brain is
some 60: its centreline means nothing and would take minutes."""
TILE = (32, 64, 64)
"""Voxels of a mask thinned at a time: a vessel tree fills a hundredth of its box, and most tiles are empty."""
HALO = 6
"""Voxels of surroundings that a tile is thinned with, so that cut ends lie outside it. Of the 8 624 centreline points
of a full-size synthetic tree, 8 608 are those of thinning it as a whole."""


def pieces(mask: np.ndarray) -> int:
    """Count the 26-connected pieces of a mask.

    Works on runs of voxels along x instead of voxels, of which a tree has a twentieth as many.
    """
    _, height, width = mask.shape
    pitch = width + 2  # positions number a grid with a border, so that runs of different rows never seem to touch
    begin, end = (np.concatenate(ends) for ends in zip(*_runs(mask, pitch), strict=True))
    links = []
    for step in (pitch, (height + 1) * pitch, (height + 2) * pitch, (height + 3) * pitch):
        first = np.searchsorted(end, begin + step)
        count = np.searchsorted(begin, end + step, side="right") - first
        own = np.repeat(np.arange(len(begin)), count)
        other = np.arange(len(own)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
        links.append((own, other))
    own, other = (np.concatenate(side) for side in zip(*links, strict=True))
    graph = coo_array((np.ones(len(own), dtype=bool), (own, other)), shape=(len(begin), len(begin)))
    return int(connected_components(graph, directed=False, return_labels=False)) if len(begin) else 0


def _runs(mask: np.ndarray, pitch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions where runs begin, and one past where they end, plane by plane and in ascending order."""
    _, height, _ = mask.shape
    for z, plane in enumerate(mask):
        flat = np.zeros((height + 2, pitch), dtype=bool)
        flat[1:-1, 1:-1] = plane
        changes = np.flatnonzero(flat.ravel()[1:] != flat.ravel()[:-1]) + 1 + z * flat.size
        yield changes[::2], changes[1::2]


def width_mm(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> float:
    """Mean length of a mask's chords along x or y, whichever is shorter; a tube's is near its diameter. 0 if empty.

    `spacing_mm` is along x, y, z.
    """
    area = rows = columns = 0
    for plane in mask:
        if plane.any():
            area += int(np.count_nonzero(plane))
            rows += int(np.count_nonzero(plane[:, 0]) + np.count_nonzero(plane[:, 1:] > plane[:, :-1]))
            columns += int(np.count_nonzero(plane[0]) + np.count_nonzero(plane[1:] > plane[:-1]))
    return min(area * spacing_mm[0] / rows, area * spacing_mm[1] / columns) if area else 0.0


def centreline(mask: np.ndarray) -> np.ndarray:
    """Thin a mask to lines one voxel wide (Lee 1994): their indices (n, 3), z, y, x."""
    found = [np.empty((0, 3), dtype=np.intp)]
    for tile in np.ndindex(*(-(-n // step) for n, step in zip(mask.shape, TILE, strict=True))):
        core = tuple(slice(k * step, min(n, (k + 1) * step)) for k, n, step in zip(tile, mask.shape, TILE, strict=True))
        if mask[core].any():
            found.append(_thinned(mask, core))
    return np.concatenate(found)


def _thinned(mask: np.ndarray, core: tuple[slice, ...]) -> np.ndarray:
    """Indices of the centreline inside `core`, thinned with its surroundings."""
    low = np.array([max(0, part.start - HALO) for part in core])
    part = mask[tuple(slice(a, c.stop + HALO) for a, c in zip(low, core, strict=True))]
    axes = ((1, 2), (0, 2), (0, 1))
    filled = [np.flatnonzero(part.any(axis=others)) for others in axes]
    box = tuple(slice(f[0], f[-1] + 1) for f in filled)
    thin = skeletonize(np.ascontiguousarray(part[box]))
    points = np.argwhere(thin) + [f[0] for f in filled] + low
    inside = np.all([(points[:, k] >= c.start) & (points[:, k] < c.stop) for k, c in enumerate(core)], axis=0)
    kept: np.ndarray = points[inside]
    return kept
