"""From a raw volume to training slices and back: pure steps, and the one chain of them.

Knows grids, kernels and intensities; knows nothing of files, stores, domains or splits. Arrays are (slice, y, x).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy.sparse import csr_array

from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.volume import Volume

VERSION = 1
"""Version of the numbers that this file makes; raise it when they change, and every store is made anew."""
CANONICAL = "LPS"
"""Axes of a prepared volume point to the patient's left, posterior and superior: its slices are axial."""
MAX_CLASSES = 32
"""A label with a larger index is taken for a mistake (a 0/255 mask, an intensity image)."""
MAX_LOST = 1e-3
"""Share of the foreground that the crop may cut off."""
BACKGROUND_PERCENTILE = 0.5
"""Percentile of a volume that stands for air. The minimum would follow one stray voxel, and the mode of the border is
tissue where the field of view is a crop; this one is air wherever there is any, and the darkest tissue where there is
none."""
EMPTY_STD = 0.1
"""A slice is empty when its standard deviation is below this share of the volume's: air has noise but no contrast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """What the chain may be told; everything else about it is fixed by `VERSION`."""

    size: int = 256
    """Width and height of a training slice in pixels; divisible by 8, the stride of SIFA's encoder."""
    spacing_mm: float = 0.89
    """In-plane distance between pixel centres, that of the study's SWI; the distance between slices is left as it
    is."""
    pad: Literal["background", "zero"] = "background"
    """What fills the frame round an image smaller than `size`: its background value, or zero. `Store.stage` moves a
    zero frame to the middle of the data-set limits, so that it is 0 after `normalise`: the mid-grey frame of the 2022
    study."""
    drop_empty: bool = False
    """Leave out slices of air (see `EMPTY_STD`). Decided on the image alone, so that no label steers what a domain
    sees."""

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 8:
            raise InputError(
                "Preprocessing.size",
                found=self.size,
                remedy=f"take {max(8, round(self.size / 8) * 8)}",
                rule="a slice's side is a positive multiple of 8 pixels",
            )
        if not 0 < self.spacing_mm < 100:
            raise InputError(
                "Preprocessing.spacing_mm",
                found=self.spacing_mm,
                rule="a pixel is between 0 and 100 mm wide",
                remedy="give the target spacing in mm",
            )
        if self.pad not in ("background", "zero"):
            raise InputError(
                "Preprocessing.pad",
                found=repr(self.pad),
                remedy="choose one of the two",
                rule="a frame is filled with 'background' or 'zero'",
            )

    @property
    def fingerprint(self) -> str:
        """Names these settings and this code's version on any machine; 16 hexadecimal digits."""
        canonical = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Training slices of one volume."""

    image: np.ndarray
    """float16 (n, size, size), standardised with the volume's own mean and standard deviation; finite."""
    label: np.ndarray | None
    """uint8 (n, size, size), class indices, 0 is background; None without a label."""
    fraction: np.ndarray | None
    """uint8 (n, size, size), share of each pixel that is foreground, times 255."""
    record: dict[str, Any]
    """All that `restore` and the store need, ready for JSON; see `prepare`."""


def prepare(volume: Volume, label: Volume | None, config: Preprocessing, *, where: object = "volume") -> Prepared:
    """Run the chain: orient, resample in-plane, standardise, centre crop and pad, drop empty slices.

    The record holds the four grids (`original`, `oriented`, `resampled`, `prepared`), `shift_yx` (prepared minus
    resampled index), `slices` (which of the grid's slices are kept), `mean` and `std` (raw units), `background`,
    `minimum` and `maximum` (standardised, of the kept image without its frame), and `label` (None or classes,
    volumes, thresholds, loss).

    Raises:
        InputError: a label on another grid or not of class indices; a constant image; foreground lost to the crop.
    """
    oriented = orient(volume)
    resampled = resample(oriented, config.spacing_mm)
    standard, mean, std = standardise(resampled, where)
    background = float(np.percentile(standard.voxels, BACKGROUND_PERCENTILE))
    framed, shift = frame(standard, config.size, background if config.pad == "background" else 0.0)
    full = standard.voxels.std(axis=(1, 2)) >= EMPTY_STD if config.drop_empty else np.full(len(standard.voxels), True)
    kept = np.flatnonzero(full)
    image = framed.voxels.astype(np.float16)[kept]
    inside = image[_inside(resampled, config.size)]
    if not len(kept) or inside.min() == inside.max():
        raise InputError(
            where,
            found="no contrast in any slice's crop",
            rule="a training image has contrast",
            remedy="check the image, its orientation and the size of the slices",
        )
    record = {
        "original": volume.geometry.to_dict(),
        "oriented": oriented.geometry.to_dict(),
        "resampled": resampled.geometry.to_dict(),
        "prepared": framed.geometry.to_dict(),
        "shift_yx": list(shift),
        "slices": kept.tolist(),
        "mean": mean,
        "std": std,
        "background": background,
        "minimum": float(inside.min()),
        "maximum": float(inside.max()),
        "label": None,
    }
    if label is None:
        return Prepared(image, None, None, record)
    hard, fraction, facts = _prepare_label(volume, label, config, kept, where)
    return Prepared(image, hard, fraction, record | {"label": facts})


def restore(slices: np.ndarray, record: Mapping[str, Any], *, linear: bool = False) -> Volume:
    """Take slices of a prepared volume back to the grid of the file that they came from.

    The slices are (n, size, size), n as in the record that `prepare` made of the volume. `linear` interpolates, for
    probabilities; otherwise each voxel takes the pixel that holds its centre, for labels. Voxels outside the crop, and
    slices that were dropped, are 0. The geometry equals the original's.
    """
    original, resampled, prepared = (Geometry.from_dict(record[key]) for key in ("original", "resampled", "prepared"))
    width, height, depth = prepared.size
    if slices.shape != (len(record["slices"]), height, width):
        expected = len(record["slices"]), height, width
        raise ValueError(f"slices {slices.shape}; the record describes {expected} (slice, y, x)")
    full = np.zeros((depth, height, width), dtype=np.float32 if linear else slices.dtype)
    full[record["slices"]] = slices
    back = _crop_pad(full, resampled.size[1::-1], 0)
    if linear:
        back = _resample_planes(back, resampled, Geometry.from_dict(record["oriented"]))
    else:
        rows, columns = _nearest(resampled, Geometry.from_dict(record["oriented"]))
        back = back[:, rows[:, None], columns]
    order, flips = _axes(original)
    back = np.flip(back, flips).transpose(np.argsort(order))
    return Volume(np.ascontiguousarray(back), original)


# --- orientation ------------------------------------------------------------------------------------------------------


def orient(volume: Volume) -> Volume:
    """Permute and flip axes until they are as near to left, posterior and superior as that gets them (a view)."""
    order, flips = _axes(volume.geometry)
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


def _axes(geometry: Geometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How to make voxels (z, y, x) canonical: the order to transpose them into, then the axes to flip.

    SimpleITK decides which axis is which; NumPy moves them as views, where `DICOMOrient` would copy 400 MB of a TOF.
    """
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(geometry.direction)
    pairs = [next((k, letter) for k, letter in enumerate(code) if letter in pair) for pair in ("LR", "PA", "SI")]
    order = tuple(2 - k for k, _ in reversed(pairs))
    return order, tuple(2 - new for new, (_, letter) in enumerate(pairs) if letter != CANONICAL[new])


# --- resampling -------------------------------------------------------------------------------------------------------


def resample(volume: Volume, spacing_mm: float) -> Volume:
    """Bring the in-plane spacing to exactly `spacing_mm`, as float32; slices keep their places.

    Shrinking averages over the area of each new pixel (a scanner with larger voxels; subsampling would alias thin
    vessels and keep the noise), enlarging is linear. Old and new grid share the outer corner of their first pixel.
    """
    new = _coarsened(volume.geometry, spacing_mm)
    return Volume(_resample_planes(volume.voxels, volume.geometry, new), new)


def _coarsened(old: Geometry, spacing_mm: float) -> Geometry:
    spacing = (spacing_mm, spacing_mm, old.spacing_mm[2])
    width, height = (max(1, round(n * s / spacing_mm)) for n, s in zip(old.size[:2], old.spacing_mm[:2], strict=True))
    x, y = ((spacing_mm / s - 1) / 2 for s in old.spacing_mm[:2])
    return Geometry((width, height, old.size[2]), spacing, old.point_mm((x, y, 0.0)), old.direction)


def _resample_planes(voxels: np.ndarray, old: Geometry, new: Geometry) -> np.ndarray:
    """Apply both axes' weights plane by plane: sparse rows, and no float copy of the whole raw volume."""
    columns, rows = (
        csr_array(_weights(old.size[k], old.spacing_mm[k], new.size[k], new.spacing_mm[k])) for k in (0, 1)
    )
    out = np.empty(new.size[::-1], dtype=np.float32)
    for plane, target in zip(voxels, out, strict=True):
        if plane.any():
            target[:] = (columns @ (rows @ plane.astype(np.float32)).T).T
        else:
            target[:] = 0
    return out


def _weights(old: int, old_mm: float, new: int, new_mm: float) -> np.ndarray:
    """Weights (new, old) of one axis between corner-aligned grids; every row sums to 1."""
    if new_mm >= old_mm:
        low, high = np.arange(new)[:, None] * new_mm, np.arange(1, new + 1)[:, None] * new_mm
        begin, end = np.arange(old) * old_mm, np.arange(1, old + 1) * old_mm
        weights = np.clip(np.minimum(high, end) - np.maximum(low, begin), 0, None)
        weights[weights < 1e-6 * old_mm] = 0
    else:
        centre = np.clip((np.arange(new)[:, None] + 0.5) * new_mm / old_mm - 0.5, 0, old - 1)
        weights = np.clip(1 - np.abs(centre - np.arange(old)), 0, None)
    normal: np.ndarray = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normal


def _nearest(old: Geometry, new: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the old pixel that holds the centre of each new one."""
    rows, columns = ((np.arange(new.size[k]) + 0.5) * new.spacing_mm[k] // old.spacing_mm[k] for k in (1, 0))
    return np.minimum(rows.astype(np.intp), old.size[1] - 1), np.minimum(columns.astype(np.intp), old.size[0] - 1)


# --- intensities and frame --------------------------------------------------------------------------------------------


def standardise(volume: Volume, where: object = "volume") -> tuple[Volume, float, float]:
    """Shift and scale to mean 0 and standard deviation 1; also return the two numbers that were.

    Raises:
        InputError: all voxels are the same.
    """
    mean, std = float(volume.voxels.mean(dtype=np.float64)), float(volume.voxels.std(dtype=np.float64))
    if not std > 1e-6 * abs(mean):
        raise InputError(
            where,
            found=f"the one value {mean:g} in every voxel",
            rule="an image has contrast",
            remedy="check that this is the image and not an empty or masked-out export",
        )
    standard = (volume.voxels - np.float32(mean)) / np.float32(std)
    return Volume(standard, volume.geometry), mean, std


def frame(volume: Volume, size: int, fill: float) -> tuple[Volume, tuple[int, int]]:
    """Crop or pad each slice about its centre to `size` x `size`; also the shift of every index along y and x."""
    width, height, depth = volume.geometry.size
    shift = _shift(height, size), _shift(width, size)
    origin = volume.geometry.point_mm((-shift[1], -shift[0], 0))
    geometry = replace(volume.geometry, size=(size, size, depth), origin_mm=origin)
    return Volume(_crop_pad(volume.voxels, (size, size), fill), geometry), shift


def _crop_pad(voxels: np.ndarray, shape: tuple[int, ...], fill: float) -> np.ndarray:
    out = np.full((len(voxels), *shape), fill, dtype=voxels.dtype)
    rows, columns = (_overlap(old, new) for old, new in zip(voxels.shape[1:], shape, strict=True))
    out[:, rows[1], columns[1]] = voxels[:, rows[0], columns[0]]
    return out


def _shift(old: int, new: int) -> int:
    """Subtract the old index from the new when a length is cropped or padded about its centre; odd in its arguments."""
    return (new - old) // 2 if new >= old else -((old - new) // 2)


def _overlap(old: int, new: int) -> tuple[slice, slice]:
    """Find what both lengths share, in indices of the old and of the new one."""
    shift, length = _shift(old, new), min(old, new)
    return slice(max(0, -shift), max(0, -shift) + length), slice(max(0, shift), max(0, shift) + length)


def _inside(resampled: Volume, size: int) -> tuple[slice, slice, slice]:
    """Where a framed volume shows image rather than frame."""
    width, height, _ = resampled.geometry.size
    return slice(None), _overlap(height, size)[1], _overlap(width, size)[1]


# --- labels -----------------------------------------------------------------------------------------------------------


class Shrunk(NamedTuple):
    """A label on a coarser grid."""

    hard: np.ndarray
    """uint8 class indices."""
    fraction: np.ndarray
    """uint8 share of foreground, times 255."""
    thresholds: list[float]
    """Area fraction from which a pixel belongs to class 1, 2, ...; 0 for a class without voxels."""


def resample_label(label: Volume, spacing_mm: float) -> Shrunk:
    """Area fractions, and hard classes cut from them so that each class keeps its physical volume.

    Half an area would lose 30 % of a vessel tree, nearest neighbours shatter it and a smoothed label erases what is
    thin (measured: guide to storage). So of each class the largest fractions are taken, as many as its volume asks
    for; where two classes claim a pixel the larger fraction has it, and what nobody claims is background.
    """
    new = _coarsened(label.geometry, spacing_mm)
    shrink = label.geometry.spacing_mm[0] * label.geometry.spacing_mm[1] / spacing_mm**2
    counts = _counts(label.voxels, int(label.voxels.max()) + 1)
    hard, best = np.zeros(new.size[::-1], dtype=np.uint8), np.zeros(new.size[::-1], dtype=np.uint8)

    def fraction_of(member: np.ndarray) -> np.ndarray:
        share: np.ndarray = np.rint(_resample_planes(member, label.geometry, new) * 255).astype(np.uint8)
        return share

    thresholds = []
    for index, count in enumerate(counts, start=1):
        fraction = fraction_of(label.voxels == index)
        chosen, threshold = _largest(fraction, round(count * shrink))
        won = chosen & (fraction > best)
        hard[won], best[won] = index, fraction[won]
        thresholds.append(threshold / 255)
    return Shrunk(hard, fraction if len(counts) == 1 else fraction_of(label.voxels > 0), thresholds)


def _largest(fraction: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """Mask of the `count` largest fractions, and the smallest among them.

    Of pixels that tie at that value, those with more of the class around them come first, so that vessels stay joined.
    """
    at_least = np.cumsum(np.bincount(fraction[fraction > 0], minlength=256)[::-1])[::-1]
    count = min(count, int(at_least[1]))
    if count == 0:
        return np.zeros(fraction.shape, dtype=bool), 0
    threshold = int(np.flatnonzero(at_least >= count)[-1])
    mask: np.ndarray = fraction > threshold
    ties = np.argwhere(fraction == threshold)
    padded = np.pad(fraction, 1).astype(np.int32)
    around = np.zeros(len(ties), dtype=np.int32)
    for step in np.ndindex(3, 3, 3):
        around += padded[tuple((ties + step).T)]
    first = ties[np.argsort(-around, kind="stable")[: count - np.count_nonzero(mask)]]
    mask[tuple(first.T)] = True
    return mask, threshold


def _prepare_label(
    volume: Volume, label: Volume, config: Preprocessing, kept: np.ndarray, where: object
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Do the label's part of `prepare`: hard classes, foreground fraction and the facts for the record."""
    check_grids(volume.geometry, label.geometry, f"label of {where}")
    oriented = orient(Volume(_class_indices(label.voxels, f"label of {where}"), volume.geometry))
    shrunk = resample_label(oriented, config.spacing_mm)
    hard, fraction = (_crop_pad(array, (config.size,) * 2, 0)[kept] for array in (shrunk.hard, shrunk.fraction))
    total = int(shrunk.fraction.sum(dtype=np.int64))
    lost = 1 - int(fraction.sum(dtype=np.int64)) / total if total else 0.0
    if lost > MAX_LOST:
        raise InputError(
            f"label of {where}",
            found=f"{lost:.2%} of the foreground outside the prepared slices",
            rule=f"a crop to {config.size} x {config.size} pixels of {config.spacing_mm} mm may lose {MAX_LOST:.1%}",
            remedy="enlarge `size` or `spacing_mm`, or crop the image round its anatomy first",
        )
    voxel = float(np.prod(oriented.geometry.spacing_mm))
    pixel = config.spacing_mm**2 * oriented.geometry.spacing_mm[2]
    classes = len(shrunk.thresholds) + 1
    before, after = _counts(oriented.voxels, classes) * voxel, _counts(shrunk.hard, classes) * pixel
    return (
        hard,
        fraction,
        {
            "classes": classes,
            "volume_mm3": {"before": before.tolist(), "after": after.tolist()},
            "thresholds": shrunk.thresholds,
            "lost": lost,
        },
    )


def _counts(label: np.ndarray, classes: int) -> np.ndarray:
    """Count the voxels of each foreground class; `bincount` would widen the whole label to 8 bytes a voxel."""
    return np.array([np.count_nonzero(label == index) for index in range(1, classes)], dtype=np.int64)


def check_grids(image: Geometry, label: Geometry, where: object) -> None:
    """Refuse a label that is not on its image's grid, naming what differs.

    Raises:
        InputError: size, spacing, origin or direction differ.
    """
    differences = image.differences(label)
    if differences:
        raise InputError(
            where,
            found=f"{'; '.join(differences)} (image against label)",
            rule="a label lies on the voxel grid of its image",
            remedy="resample the label to its image with nearest neighbours, or find the right image",
        )


def _class_indices(voxels: np.ndarray, where: object) -> np.ndarray:
    low, high = float(voxels.min()), float(voxels.max())
    whole = voxels.dtype.kind in "iub" or bool((voxels == np.rint(voxels)).all())
    if low < 0 or high >= MAX_CLASSES or not whole:
        raise InputError(
            where,
            found=f"values from {low:g} to {high:g}{'' if whole else ', not all of them whole'}",
            rule=f"a label holds class indices 0, 1, ... below {MAX_CLASSES}, 0 is background",
            remedy="renumber the classes (a 0/255 mask becomes 0/1); this may be an image, not a label",
        )
    return voxels.astype(np.uint8)
