"""What lies where in a store, and what every attribute in it means.

Knows names and words; knows nothing of voxels, of where the store lies, or of who a subject is.

    cohort.zarr/
      zarr.json                             root group; its attributes say that this is a store, and explain all of it
      source/s000-3fa9c1d2e4b5/             one group per volume, named by pseudonym and content; never overwritten
        zarr.json                           domain, subject, settings, the record that leads back to the raw grid
        image/ label/ fraction/             (z, y, x): chunk = slice, shard = volume; blosc-lz4, then crc32c
      commits/source-s000-3fa9c1d2e4b5.json what was written, sizes and sha256; made when all of it is there
      manifest.json                         volumes and their splits; written last of all, and all that readers trust

Shard = volume makes few files, whole-shard reads and one writer per shard (two would lose updates). Blosc alone lets
19 of 20 flipped bits pass, so each chunk ends in a crc32c. A lost shard reads as the fill value without an error, so
the fill values are ones that no chunk holds (NaN, 255), and empty chunks are written. Every object is put in one step;
because a volume's group is named by its content, an old manifest stays true until the new one replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any, Literal, get_args

from slicestore.settings import Preprocessing

SCHEMA = 2
"""Version of the layout; a reader refuses every other."""
UNLABELLED = 255
"""Class index of pixels that nobody labelled; also the fill value of labels and fractions."""
REMEDY = "run `equipoise prepare` again with the same inputs: it mends what is missing and keeps the rest"

Domain = Literal["source", "target"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)
ArrayName = Literal["image", "label", "fraction"]
NAMES: tuple[ArrayName, ...] = get_args(ArrayName)
ROOT = "zarr.json"
MANIFEST = "manifest.json"
AXES = ("z", "y", "x")
GRIDS = ("original", "oriented", "resampled", "prepared")
"""The grids of a record, in the order of the chain."""

README = (
    "Training slices of brain angiography, made by slicestore (project Equipoise).",
    "source/* and target/* hold one group per volume. `image` is float16 (z, y, x): axial slices from the feet up, "
    "rows from the front of the head to its back, columns from the patient's right to the left. With a label, "
    "`label` is uint8 class indices, and `fraction` the uint8 share of each pixel that is of the raw label's own "
    "classes, times 255: settings.brain_class, if there is one, is in `label` and not in `fraction`.",
    "Image values are standard deviations from the volume's mean. To get what the networks see, map them linearly so "
    "that the smallest record.minimum of the training volumes becomes -1 and the largest record.maximum becomes 1, per "
    "domain or pooled. With record.mean and record.std they become raw units again.",
    "A slice is one chunk, a volume one shard. Fill values are NaN and 255: no image or label holds them, so they "
    "mean that data is missing. Every chunk ends in a crc32c, which any reader of Zarr v3 checks.",
    "Trust what manifest.json names, and nothing else: a group that it does not name is left over from an update that "
    "was broken off, or belongs to one at work. It gives each volume's split; subjects never lie in two splits.",
    "To put a mask of slices back on the scanner's grid: array index i along z is slice record.slices[i] of "
    "record.prepared; subtract record.shift_yx to get the index in record.resampled; undo the resampling to "
    "record.oriented, and the permutation and flips to record.original. `slicestore.preprocess.restore` does it all.",
    "Grids are in ITK's convention: LPS frame, millimetres, axes in the order x, y, z, origin at the centre of the "
    "first voxel.",
    "Subjects are pseudonyms. The key that names them is a file beside the store, or on the machine that made it.",
)
"""The store in a page, for whoever finds it without this program."""

ARRAYS: Mapping[ArrayName, Mapping[str, Any]] = {
    "image": {
        "axes": list(AXES),
        "units": "standard deviations of the volume",
        "meaning": "intensity, standardised with the volume's own record.mean and record.std; finite; NaN is missing",
    },
    "label": {
        "axes": list(AXES),
        "units": "class index",
        "meaning": "0 is background, settings.brain_class (if not 0) is brain outside the raw label's classes; "
        "255 is missing",
    },
    "fraction": {
        "axes": list(AXES),
        "units": "1/255 of a pixel's area",
        "meaning": "share of the pixel that is foreground, of any class of the raw label; brain added by "
        "settings.brain_class is none",
    },
}

ATTRIBUTES: Mapping[str, str] = {
    "slicestore": "version of this layout",
    "readme": "the layout in words",
    "attributes": "this list",
    "domain": "source (labelled modality) or target (the one to be segmented)",
    "subject": "pseudonym; s000, s001, ... in source, t000, ... in target",
    "key": "sha256 of what the volume was made from: bytes of its files, settings, this layout's version",
    "preprocessing": "fingerprint of settings and of the code's version",
    "settings": "what preprocessing was told; the fields of slicestore.settings.Preprocessing",
    "ome": "OME-Zarr 0.5 metadata for viewers, only where the slices are contiguous. It has no rotation: "
    "record.prepared is the truth",
    "axes": "of an array, in its own order",
    "units": "of an array's values",
    "meaning": "of an array's values",
    "settings.size": "width and height of a slice in pixels",
    "settings.spacing_mm": "distance between pixel centres in a slice",
    "settings.pad": "what fills the frame round a small image: its background, or zero",
    "settings.centre": "what the middle of a slice shows: the middle of the grid, of the tissue, or of the brain mask",
    "settings.slices": "which slices were kept: all, those with tissue, or those with foreground of the raw label",
    "settings.join": "whether pixels on a vessel's centreline were taken before those that are filled most",
    "settings.bias_field": "whether N4 removed the image's shading first",
    "settings.strip": "whether everything outside the brain mask was made background",
    "settings.brain_class": "class index of what is in the brain mask and not in the raw label; 0: there is none. It "
    "is a class of label, and in none of the words foreground, fraction, stripped and lost",
    "record": "how the slices came from the raw volume and lead back to it",
    "record.original": "grid of the raw file",
    "record.oriented": "grid after permuting and flipping axes towards left, posterior, superior",
    "record.resampled": "grid after resampling in the plane",
    "record.prepared": "grid after cropping and padding; its z runs over all slices, kept or not",
    "record.<grid>.size": "voxels along x, y, z",
    "record.<grid>.spacing_mm": "distance between voxel centres along x, y, z",
    "record.<grid>.origin_mm": "centre of the first voxel, LPS",
    "record.<grid>.direction": "row-major 3 x 3 matrix; column k is the unit vector of axis k",
    "record.shift_yx": "index in prepared minus index in resampled, rows and columns",
    "record.slices": "of each slice in the arrays, its index along z in prepared",
    "record.mean": "of the resampled image in raw units; what became 0",
    "record.std": "of the resampled image in raw units; what became 1",
    "record.background": "value of air, in standard deviations; fills the frame if settings.pad says so",
    "record.minimum": "of the kept image without its frame, in standard deviations",
    "record.maximum": "of the kept image without its frame, in standard deviations",
    "record.percentiles": "of the kept image without its frame, in standard deviations",
    "record.percentiles.<level>": "for a level of 0.1: the 0.1th and the 99.9th percentile",
    "record.geometry": "`unknown` where the files tell no grid (TFRecords): each grid is then 1 mm from 0; else absent",
    "record.oblique_degrees": "largest angle between an axis of oriented and the patient's",
    "record.label": "of the label, or null",
    "record.label.classes": "largest class index plus one, settings.brain_class among them",
    "record.label.thresholds": "by class from 1: share of a pixel's area from which it is of the class, chosen so that "
    "the volume is kept; of settings.brain_class that of the whole brain",
    "record.label.volume_mm3": "by class from 1",
    "record.label.pieces": "by class from 1: connected pieces",
    "record.label.centreline": "by class from 1: share of the raw label's centreline that the slices cover; null where "
    "it has none",
    "record.label.stripped": "share of the foreground that was outside the brain mask",
    "record.label.lost": "share of the rest that the crop cut off",
    "record.label.volume_mm3.before": "of the raw label",
    "record.label.volume_mm3.after": "of the resampled label",
    "record.label.pieces.before": "of the raw label",
    "record.label.pieces.after": "of the resampled label",
    "manifest": "manifest.json; commits/* hold the same of one volume",
    "manifest.format": "slicestore",
    "manifest.schema": "version of this layout",
    "manifest.fingerprint": "sha256 over every volume's key and split and the settings: names the content anywhere",
    "manifest.preprocessing": "the settings",
    "manifest.classes": "number of classes of the source labels, background included",
    "manifest.seed": "of the split",
    "manifest.volumes": "one entry per volume, sorted",
    "manifest.volumes.split": "train, val or test",
    "manifest.volumes.slices": "number of slices",
    "manifest.volumes.labelled": "whether there is a label",
    "manifest.volumes.evaluation_only": "whether the label may judge only, never teach: true in the target domain",
    "manifest.volumes.classes": "largest class index of the label plus one; 0 without a label",
    "manifest.volumes.group": "path of the volume's group",
    "manifest.volumes.arrays": "zarr.json of each array, without its attributes",
    "manifest.volumes.objects": "every object of the group, and its size in bytes; in commits/* its sha256 too",
    "manifest.volumes.minimum": "as in the record, as are maximum, percentiles, mean and std",
}
"""Meaning of every key of the attributes and of the manifest, by path. `<grid>` is one of the record's grids."""


def group_name(domain: Domain, subject: str, key: str) -> str:
    """Name a volume's group: its path in the store."""
    return f"{domain}/{subject}-{key[:12]}"


def commit_name(group: str) -> str:
    """Name a volume's commit record."""
    return f"commits/{group.replace('/', '-')}.json"


def group_of(commit: str) -> str:
    """Name the group of a commit record; the inverse of `commit_name`."""
    return commit.removeprefix("commits/").removesuffix(".json").replace("-", "/", 1)


def root_attributes() -> dict[str, Any]:
    """What the root group says of itself."""
    return {"slicestore": SCHEMA, "readme": list(README), "attributes": dict(ATTRIBUTES)}


def volume_attributes(
    domain: Domain, subject: str, key: str, settings: Preprocessing, record: Mapping[str, Any]
) -> dict[str, Any]:
    """What a volume's group says of itself."""
    return {
        "slicestore": SCHEMA,
        "domain": domain,
        "subject": subject,
        "key": key,
        "preprocessing": settings.fingerprint,
        "settings": asdict(settings),
        "record": dict(record),
        **({"ome": _ome(record)} if _contiguous(record) else {}),
    }


def _contiguous(record: Mapping[str, Any]) -> bool:
    return all(b - a == 1 for a, b in pairwise(record["slices"]))


def _ome(record: Mapping[str, Any]) -> dict[str, Any]:
    """OME-Zarr 0.5 of one resolution: each voxel's centre along the array's own axes, whatever their direction.

    The first voxel lies where `prepared` puts it; without a rotation in the format the others do only as far as the
    volume's axes are the patient's.
    """
    grid = record["prepared"]
    step = [grid["spacing_mm"][2] * record["slices"][0] * grid["direction"][row * 3 + 2] for row in range(3)]
    first = [origin + along for origin, along in zip(grid["origin_mm"], step, strict=True)]
    transforms = [
        {"type": "scale", "scale": list(grid["spacing_mm"])[::-1]},
        {"type": "translation", "translation": first[::-1]},
    ]
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in AXES]
    datasets = [{"path": "image", "coordinateTransformations": transforms}]
    return {"version": "0.5", "multiscales": [{"name": "image", "axes": axes, "datasets": datasets}]}
