"""Labels through a change of grid: area fractions, hard classes that keep their volume, and what became of them.

Knows class indices and shares of pixels; knows nothing of intensities, crops or files. Arrays are (slice, y, x).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from slicestore.errors import InputError
from slicestore.geometry import Geometry, Triple
from slicestore.resample import Between, grid_at, nearest
from slicestore.settings import MAX_CLASSES
from slicestore.shape import TUBE_MM, centreline, pieces, width_mm
from slicestore.volume import Volume


class Shrunk(NamedTuple):
    """A label on another grid."""

    hard: np.ndarray
    """uint8 class indices."""
    fraction: np.ndarray
    """uint8 share of the label's own classes, times 255."""
    thresholds: list[float]
    """Area fraction from which a pixel off the centreline belongs to class 1, 2, ...; 0 for a class without voxels."""
    lines: list[np.ndarray]
    """Centreline of each class on the old grid, (n, 3) indices z, y, x; n is 0 for what is no vessel."""


def resample_label(label: Volume, spacing_mm: float, *, join: bool = True) -> Shrunk:
    """Area fractions, and hard classes cut from them so that each class keeps its physical volume.

    Half an area would lose 30 % of a vessel tree, nearest neighbours shatter it and a smoothed label erases what is
    thin (measured: `make bench ONLY=vessels`). So of each class the largest fractions are taken, as many as its volume
    asks for, and with `join` those on a vessel's centreline before the others: the same volume in far fewer pieces.
    Where two classes claim a pixel the larger fraction has it, and what nobody claims is background.
    """
    old, new = label.geometry, grid_at(label.geometry, spacing_mm)
    shrink = old.spacing_mm[0] * old.spacing_mm[1] / spacing_mm**2
    box = foreground_box(label.voxels)
    inner, between = label.voxels[box], Between(old, new, *box[1:])
    hard, best = np.zeros(new.size[::-1], dtype=np.uint8), np.zeros(new.size[::-1], dtype=np.uint8)
    made = Shrunk(hard, hard, [], [])
    for index in range(1, int(inner.max(initial=0)) + 1):
        member = inner == index
        fraction = _fractions(member, between, box[0], new)
        made.lines.append(_line(member, old.spacing_mm) + [part.start for part in box])
        first = holding(made.lines[-1], old, new) if join else None
        winnable = np.where(fraction > best, fraction, np.uint8(0))
        won, threshold = largest(winnable, round(np.count_nonzero(member) * shrink), first)
        hard[won], best[won] = index, fraction[won]
        made.thresholds.append(threshold / 255)
    union = fraction if len(made.lines) == 1 else _fractions(inner > 0, between, box[0], new)
    return made._replace(fraction=union)


def with_brain(label: Volume, shrunk: Shrunk, brain: Volume, small: Shrunk, index: int) -> tuple[Volume, Shrunk]:
    """Add a class for what is left of a brain, on the old grid (`label`, `brain`) and on the new (`shrunk`, `small`).

    The label's own classes keep their pixels, and `fraction` stays theirs: it tells how much of a pixel is vessel. What
    is left of the brain is that of the whole brain's pixels, and not resampled by itself: a brain with the vessels cut
    out would leave a rim of background round each. It is no vessel and has no centreline.
    """
    voxels, hard = (
        np.where((own == 0) & (whole > 0), np.uint8(index), own)
        for own, whole in ((label.voxels, brain.voxels), (shrunk.hard, small.hard))
    )
    absent = index - 1 - len(shrunk.lines)  # the label's last classes, where this volume shows none of them
    thresholds = [*shrunk.thresholds, *[0.0] * absent, *small.thresholds]
    lines = [*shrunk.lines, *[np.empty((0, 3), dtype=np.intp)] * (absent + 1)]
    return Volume(voxels, label.geometry), Shrunk(hard, shrunk.fraction, thresholds, lines)


def _fractions(member: np.ndarray, between: Between, depth: slice, new: Geometry) -> np.ndarray:
    """Share of each new pixel that is in a mask of the slices `depth`, times 255."""
    out = np.zeros(new.size[::-1], dtype=np.uint8)
    for plane, target in zip(member, out[depth], strict=True):
        if plane.any():
            target[:] = np.rint(between(plane) * 255)
    return out


def _line(mask: np.ndarray, spacing_mm: Triple) -> np.ndarray:
    """Centreline of a mask, if it is thin enough for a vessel: indices (n, 3)."""
    thin = 0 < width_mm(mask, spacing_mm) <= TUBE_MM
    return centreline(mask) if thin else np.empty((0, 3), dtype=np.intp)


def largest(fraction: np.ndarray, wanted: int, first: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """Mask of the `wanted` largest fractions above 0 (uint8), and the smallest that was not taken for being `first`.

    Pixels `first` (bool) come before all others. Of those that tie at the smallest value, the ones with more of the
    class around them come first, so that vessels stay joined.
    """
    rank = fraction if first is None else fraction + np.uint16(256) * (first & (fraction > 0))
    at_least = np.cumsum(np.bincount(rank[rank > 0], minlength=512)[::-1])[::-1]
    wanted = min(wanted, int(at_least[1]))
    if wanted == 0:
        return np.zeros(fraction.shape, dtype=bool), 0
    threshold = int(np.flatnonzero(at_least >= wanted)[-1])
    mask: np.ndarray = rank > threshold
    ties = np.argwhere(rank == threshold)
    padded = np.pad(fraction, 1)
    around = np.zeros(len(ties), dtype=np.int32)
    for step in np.ndindex(3, 3, 3):
        around += padded[tuple((ties + step).T)]
    taken = ties[np.argsort(-around, kind="stable")[: wanted - np.count_nonzero(mask)]]
    mask[tuple(taken.T)] = True
    return mask, threshold % 256


def label_facts(label: Volume, shrunk: Shrunk, spacing_mm: float) -> dict[str, Any]:
    """What resampling did to each class 1, 2, ...: volume, 26-connected pieces, centreline.

    `centreline` is the share of the raw class's centreline that is still of its class; None where it has none, being
    empty or wider than vessels are.
    """
    old, new = label.geometry, grid_at(label.geometry, spacing_mm)
    facts: dict[str, Any] = {
        "classes": len(shrunk.thresholds) + 1,
        "thresholds": shrunk.thresholds,
        "volume_mm3": {"before": [], "after": []},
        "pieces": {"before": [], "after": []},
        "centreline": [],
    }
    box = foreground_box(label.voxels)
    for index, line in enumerate(shrunk.lines, start=1):
        masks = {"before": label.voxels[box] == index, "after": shrunk.hard == index}
        for when, grid in (("before", old), ("after", new)):
            facts["volume_mm3"][when].append(int(np.count_nonzero(masks[when])) * float(np.prod(grid.spacing_mm)))
            facts["pieces"][when].append(pieces(masks[when]))
        facts["centreline"].append(float(covered(line, masks["after"], old, new).mean()) if len(line) else None)
    return facts


def foreground_box(label: np.ndarray) -> tuple[slice, slice, slice]:
    """Where the foreground is: a vessel tree is in a third of its scan. Empty without any."""
    planes = np.flatnonzero([plane.max() for plane in label])
    footprint = label.max(axis=0)
    rows, columns = np.flatnonzero(footprint.any(axis=1)), np.flatnonzero(footprint.any(axis=0))
    z, y, x = (
        slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0) for found in (planes, rows, columns)
    )
    return z, y, x


def holding(points: np.ndarray, old: Geometry, new: Geometry) -> np.ndarray:
    """Mask of the new pixels, bool (slice, y, x), that hold the centres of voxels (n, 3; z, y, x) of the old grid."""
    rows, columns = nearest(new, old)
    mask = np.zeros(new.size[::-1], dtype=bool)
    z, y, x = points[:, 0], rows[points[:, 1]], columns[points[:, 2]]
    inside = (y < mask.shape[1]) & (x < mask.shape[2])
    mask[z[inside], y[inside], x[inside]] = True
    return mask


def covered(points: np.ndarray, mask: np.ndarray, old: Geometry, new: Geometry) -> np.ndarray:
    """Tell which voxels (n, 3; z, y, x) of the old grid have their centre in a pixel of a mask on the new one."""
    rows, columns = nearest(new, old)
    z, y, x = points[:, 0], rows[points[:, 1]], columns[points[:, 2]]
    inside: np.ndarray = (y < mask.shape[1]) & (x < mask.shape[2])
    inside[inside] = mask[z[inside], y[inside], x[inside]]
    return inside


def class_indices(voxels: np.ndarray, where: object, brain_class: int = 0) -> np.ndarray:
    """Give a label as uint8 class indices.

    Raises:
        InputError: negative, large or broken values, which no class has; `brain_class`, where it is not 0, or above.
    """
    low, high = float(voxels.min()), float(voxels.max())
    whole = voxels.dtype.kind in "iub" or all((plane == np.rint(plane)).all() for plane in voxels)
    if low < 0 or high >= MAX_CLASSES or not whole:
        raise InputError(
            where,
            found=f"values from {low:g} to {high:g}{'' if whole else ', not all of them whole'}",
            rule=f"a label holds class indices 0, 1, ... below {MAX_CLASSES}, 0 is background",
            remedy="renumber the classes (a 0/255 mask becomes 0/1); this may be an image, not a label",
        )
    if brain_class and high >= brain_class:
        raise InputError(
            where,
            found=f"class {high:g}",
            rule=f"brain_class, which is {brain_class}, comes after the label's own classes",
            remedy=f"set brain_class to {high + 1:g}, or choose another mask",
        )
    return voxels.astype(np.uint8, copy=False)
