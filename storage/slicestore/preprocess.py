"""From a raw volume to training slices and back: the one chain of steps.

Knows the order of the steps and what each needs of the others; knows nothing of files, stores, domains or splits.
Arrays are (slice, y, x).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from slicestore.errors import InputError
from slicestore.frame import Box, box_of, canonical_axes, crop_pad, frame, inside, oblique_degrees, orient, shift_to
from slicestore.geometry import Geometry, check_grids
from slicestore.intensity import BACKGROUND_PERCENT, Histogram, shading, standardise, tissue_box, with_contrast
from slicestore.labels import Shrunk, class_indices, label_facts, largest, resample_label, with_brain
from slicestore.resample import Between, nearest, resample, resample_planes
from slicestore.settings import Prepared, Preprocessing
from slicestore.volume import Volume

MAX_LOST = 1e-3
"""Share of the foreground that the crop may cut off."""


def prepare(
    volume: Volume,
    label: Volume | None,
    config: Preprocessing,
    *,
    brain: Volume | None = None,
    where: object = "volume",
) -> Prepared:
    """Run the chain: orient, correct shading, resample in-plane, standardise, strip, crop and pad, choose slices.

    `brain` is a mask of the brain on the image's grid, used where the settings ask for it; what is not 0 is brain.
    With `brain_class` it becomes a class of the label; "foreground" means the label's own classes all the same: in
    `fraction`, in the choice of slices, and in the record.
    Orienting permutes and flips axes and never interpolates: an oblique volume keeps its own slices, and the record
    tells by how much they are turned.

    The record holds the four grids (`original`, `oriented`, `resampled`, `prepared`), `oblique_degrees` (largest angle
    between an axis and the patient's), `shift_yx` (prepared minus resampled index), `slices` (which of the grid's
    slices are kept: consecutive numbers are neighbours), `mean` and `std` (raw units), `background`, `minimum`,
    `maximum` and `percentiles` (standardised; the last three of the kept image without its frame, see
    `settings.LEVELS`), and `label`: None, or `labels.label_facts`, the share of the foreground that was `stripped`
    with the image, and the share of the rest that the crop `lost`.

    Raises:
        InputError: a mask on another grid, or missing though the settings need it; a label that is not of class
            indices; a constant image; no slice left; foreground lost to the crop.
    """
    found = _brain(volume, brain, config, where) if config.needs_brain(labelled=label is not None) else None
    made = _standard(volume, found, config, where)
    shift = _shift(made, config)
    framed = frame(made.image, config.size, shift, made.background if config.pad == "background" else 0.0)
    masks = _masks(volume, label, made.brain, config, shift, where) if label is not None else None
    kept = _kept(made.image, masks, config)
    image = framed.voxels[kept]
    shown = Histogram.of(image[inside(made.image.geometry, config.size, shift)])
    if len(shown.values) < 2:
        raise InputError(
            where,
            found=f"no contrast in any slice's crop of values from {volume.voxels.min():g} to {volume.voxels.max():g}",
            rule="a training image has contrast",
            remedy="check the image for stray values, its orientation, and the size and choice of the slices",
        )
    record = {
        "original": volume.geometry.to_dict(),
        "oriented": made.oriented.to_dict(),
        "resampled": made.image.geometry.to_dict(),
        "prepared": framed.geometry.to_dict(),
        "oblique_degrees": oblique_degrees(made.oriented),
        "shift_yx": list(shift),
        "slices": kept.tolist(),
        "mean": made.mean,
        "std": made.std,
        "background": made.background,
        "minimum": float(shown.values[0]),
        "maximum": float(shown.values[-1]),
        "percentiles": shown.tails(),
        "label": masks.facts if masks else None,
    }
    if masks is None:
        return Prepared(image, None, None, record)
    return Prepared(image, masks.hard[kept], masks.fraction[kept], record)


def restore(slices: np.ndarray, record: Mapping[str, Any], *, linear: bool = False) -> Volume:
    """Take slices of a prepared volume back to the grid of the file that they came from.

    The slices are (n, size, size), n as in the record that `prepare` made of the volume. `linear` interpolates, for
    probabilities; otherwise each voxel takes the pixel that holds its centre, for labels. Voxels outside the crop, and
    slices that were dropped, are 0. The geometry equals the original's.
    """
    resampled, oriented = (Geometry.from_dict(record[key]) for key in ("resampled", "oriented"))
    back = _unframed(slices, record)
    if linear:
        back = resample_planes(back, resampled, oriented)
    else:
        rows, columns = nearest(resampled, oriented)
        rows, columns = np.minimum(rows, back.shape[1] - 1), np.minimum(columns, back.shape[2] - 1)
        back = back[:, rows[:, None], columns]
    return _unoriented(back, record)


def restore_mask(share: np.ndarray, record: Mapping[str, Any]) -> Volume:
    """Take a soft mask back to the grid that it came from and cut it there, keeping its physical volume.

    `share` (n, size, size) is the share of each pixel that is foreground: a stored area fraction (uint8, 255 is all),
    or probabilities from 0 to 1. Since a pixel's share tells where in it an edge runs, this gives back edges finer than
    the pixels, which hard classes cannot: a tube 3 mm wide is nine pixels of 0.89 mm.
    """
    resampled, oriented = (Geometry.from_dict(record[key]) for key in ("resampled", "oriented"))
    back = _unframed(share, record)
    between = Between(resampled, oriented)
    fine = np.zeros(oriented.size[::-1], dtype=np.uint8)
    full = 1.0 if share.dtype == np.uint8 else 255.0
    for plane, target in zip(back, fine, strict=True):
        if plane.any():
            target[:] = np.rint(between(plane) * full)
    pixels = float(back.sum(dtype=np.float64)) * full / 255
    pixel, voxel = (np.prod(grid.spacing_mm) for grid in (resampled, oriented))
    mask, _ = largest(fine, round(pixels * pixel / voxel))
    return _unoriented(mask.view(np.uint8), record)


def _unframed(slices: np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
    """Undo the frame and put dropped slices back, as zeros."""
    depth, height, width = record["prepared"]["size"][::-1]
    if slices.shape != (len(record["slices"]), height, width):
        expected = len(record["slices"]), height, width
        raise ValueError(f"slices {slices.shape}; the record describes {expected} (slice, y, x)")
    down, right = record["shift_yx"]
    inner = crop_pad(slices, tuple(record["resampled"]["size"][1::-1]), (-down, -right), 0)
    full = np.zeros((depth, *inner.shape[1:]), dtype=slices.dtype)
    full[record["slices"]] = inner
    return full


def _unoriented(voxels: np.ndarray, record: Mapping[str, Any]) -> Volume:
    original = Geometry.from_dict(record["original"])
    order, flips = canonical_axes(original)
    return Volume(np.ascontiguousarray(np.flip(voxels, flips).transpose(np.argsort(order))), original)


# --- the parts of the chain -------------------------------------------------------------------------------------------


class _Standard(NamedTuple):
    """An image before it is cut to size."""

    oriented: Geometry
    image: Volume
    """float16."""
    mean: float
    std: float
    background: float
    histogram: Histogram
    """Of the image before stripping."""
    brain: _Brain | None


class _Brain(NamedTuple):
    """A brain mask."""

    oriented: Volume
    """uint8 0 or 1, on the oriented grid."""
    shrunk: Shrunk
    """On the resampled grid."""

    @property
    def mask(self) -> np.ndarray:
        """bool, on the resampled grid."""
        return self.shrunk.hard.view(np.bool_)


class _Masks(NamedTuple):
    """A label cut to size, every slice of it."""

    hard: np.ndarray
    fraction: np.ndarray
    facts: dict[str, Any]


def _standard(volume: Volume, brain: _Brain | None, config: Preprocessing, where: object) -> _Standard:
    """Orient, correct shading, resample, standardise and strip an image."""
    oriented = orient(volume)
    mask = brain.mask if brain is not None and config.strip else None
    planes = shading(oriented).corrected(oriented.voxels) if config.bias_field else None
    resampled = resample(oriented, config.spacing_mm, planes)
    image, mean, std = standardise(resampled, where, mask)
    histogram = Histogram.of(image.voxels)
    background = histogram.percentile(BACKGROUND_PERCENT)
    if mask is not None:
        image.voxels[~mask] = background
    return _Standard(oriented.geometry, image, mean, std, background, histogram, brain)


def without_brain(config: Preprocessing, where: object) -> InputError:
    """What to raise where a brain mask is missing."""
    asked = "strip" if config.strip else "centre='brain'" if config.centre == "brain" else "brain_class"
    return InputError(
        where,
        found="no brain mask",
        rule=f"{asked} needs the brain mask of every {'labelled ' if asked == 'brain_class' else ''}volume",
        remedy=f"name the masks in the table of inputs, or leave {asked} out",
    )


def _brain(volume: Volume, brain: Volume | None, config: Preprocessing, where: object) -> _Brain:
    """Check, orient and resample a brain mask."""
    if brain is None:
        raise without_brain(config, where)
    check_grids(volume.geometry, brain.geometry, f"brain mask of {where}", kind="brain mask")
    oriented = orient(Volume((brain.voxels > 0).view(np.uint8), volume.geometry))
    shrunk = resample_label(oriented, config.spacing_mm)
    if not shrunk.hard.any():
        raise InputError(
            f"brain mask of {where}",
            found="no brain in it",
            rule="a brain mask is above 0 where the brain is",
            remedy="find the right mask",
        )
    return _Brain(oriented, shrunk)


def _shift(made: _Standard, config: Preprocessing) -> tuple[int, int]:
    """By how much indices grow along y and x, so that the slice's middle shows what `config.centre` says."""
    width, height, _ = made.image.geometry.size
    box: Box = (0, height), (0, width)
    if config.centre == "brain" and made.brain is not None:
        box = box_of(made.brain.mask)
    elif config.centre == "foreground":
        box = tissue_box(made.image.voxels, made.histogram)
    down, right = (shift_to(old, config.size, sum(ends) / 2) for old, ends in zip((height, width), box, strict=True))
    return down, right


def _masks(
    volume: Volume,
    label: Volume,
    brain: _Brain | None,
    config: Preprocessing,
    shift: tuple[int, int],
    where: object,
) -> _Masks:
    """Check, orient, resample and cut a label; what a stripped image no longer shows is no foreground either."""
    name = f"label of {where}"
    check_grids(volume.geometry, label.geometry, name)
    oriented = orient(Volume(class_indices(label.voxels, name, config.brain_class), volume.geometry))
    shrunk = resample_label(oriented, config.spacing_mm, join=config.join)
    if brain is not None and config.brain_class:
        oriented, shrunk = with_brain(oriented, shrunk, *brain, config.brain_class)
    facts, before = label_facts(oriented, shrunk, config.spacing_mm), int(shrunk.fraction.sum(dtype=np.int64))
    if brain is not None and config.strip:
        shrunk.hard[~brain.mask], shrunk.fraction[~brain.mask] = 0, 0
    visible = int(shrunk.fraction.sum(dtype=np.int64))
    hard, fraction = (crop_pad(part, (config.size,) * 2, shift, 0) for part in (shrunk.hard, shrunk.fraction))
    after = int(fraction.sum(dtype=np.int64))
    facts |= {"stripped": 1 - visible / before if before else 0.0, "lost": 1 - after / visible if visible else 0.0}
    if facts["lost"] > MAX_LOST:
        raise InputError(
            name,
            found=f"{facts['lost']:.2%} of the foreground outside the prepared slices",
            rule=f"a crop to {config.size} x {config.size} pixels of {config.spacing_mm} mm may lose {MAX_LOST:.1%}",
            remedy="enlarge `size` or `spacing_mm`, or choose another `centre`",
        )
    return _Masks(hard, fraction, facts)


def _kept(image: Volume, masks: _Masks | None, config: Preprocessing) -> np.ndarray:
    """Number the slices that the settings keep."""
    if config.slices == "all":
        return np.arange(len(image.voxels))
    if config.slices == "foreground" and masks is not None:
        return np.flatnonzero(config.foreground(masks.hard).any(axis=(1, 2)))
    return np.flatnonzero(with_contrast(image.voxels))
