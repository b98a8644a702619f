"""The files of a BIDS data set: what their names say, and which belong together.

Knows BIDS names (https://bids-specification.readthedocs.io); knows nothing of voxels, domains' rules or stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from slicestore.errors import InputError

FOLDERS = ("anat", "swi", "angio")
"""Data types that hold angiography."""
LABEL_SUFFIXES = ("mask", "dseg")
"""What a segmentation's name ends in, in `derivatives`."""
OF_LABELS = {"desc", "label", "mod", "space"}
"""Entities that a segmentation has of its own; all others it shares with its image."""
SPACES = (None, "orig", "native", "scanner")
"""Values of `space` that mean the image's own grid; a label in any other is left aside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """Which images make a domain: by suffix, or by a word in their acquisition's name; small letters."""

    suffixes: tuple[str, ...]
    acquisitions: tuple[str, ...] = ()

    def fits(self, file: BidsFile) -> bool:
        """Whether the suffix is one of these, or `acq` contains one of these words."""
        acquisition = file.entities.get("acq", "").lower()
        return file.suffix.lower() in self.suffixes or any(word in acquisition for word in self.acquisitions)


TOF = Pattern(suffixes=("angio", "tof", "mra"), acquisitions=("tof",))
"""Time-of-flight angiography: `_angio`, BIDS' suffix, its usual misnomers, or `acq-...TOF...`."""
SWI = Pattern(suffixes=("swi",))
"""Susceptibility-weighted images; neither their minimum projections nor what they were made from."""


@dataclass(frozen=True, slots=True)
class BidsFile:
    """An image and what its name says."""

    path: Path
    suffix: str
    """Last word of the name, such as angio."""
    entities: Mapping[str, str]
    """Pairs of the name, such as acq: tof; always with `sub`."""
    folder: str
    """Name of the folder it lies in, usually its data type."""

    def has(self, filters: Mapping[str, str]) -> bool:
        """Whether the name holds every one of some entities, given with or without their keys' prefix."""
        return all(self.entities.get(key) == value.removeprefix(f"{key}-") for key, value in filters.items())


def images(root: Path, endings: Iterable[str]) -> list[BidsFile]:
    """Raw images of all subjects.

    Raises:
        InputError: the folder has no subjects, or they have no images.
    """
    places = [f"sub-*/{session}{folder}" for session in ("", "ses-*/") for folder in FOLDERS]
    found = [file for place in places for file in _files(root, f"{place}/sub-*", endings)]
    if not found:
        raise InputError(
            root,
            found="no image in sub-*/[ses-*/](anat|swi|angio)/" if root.is_dir() else "no such folder",
            rule="a BIDS data set has a folder for each subject",
            remedy="check the path",
        )
    return sorted(found, key=lambda file: file.path)


def segmentations(root: Path, endings: Iterable[str]) -> list[BidsFile]:
    """Masks and segmentations under `derivatives`, on the grids of raw images."""
    files = _files(root, "derivatives/**/sub-*", endings)
    fit = [f for f in files if f.suffix in LABEL_SUFFIXES and f.entities.get("space") in SPACES]
    return sorted(fit, key=lambda file: file.path)


def belongs(label: BidsFile, image: BidsFile) -> bool:
    """Whether a segmentation is one of an image: no entity of one contradicts the other, and sub and ses are the same.

    A `mod` names the image's suffix. A label that leaves out an entity of the image (`acq`, `run`, `echo`, ...) fits,
    one that adds an entity does not; in a folder named like another data type it does not.
    """
    shared = {key: value for key, value in label.entities.items() if key not in OF_LABELS}
    return (
        all(image.entities.get(key) == value for key, value in shared.items())
        and label.entities.get("ses") == image.entities.get("ses")
        and label.entities.get("mod", image.suffix).lower() == image.suffix.lower()
        and (label.folder == image.folder or label.folder not in FOLDERS)
    )


def kind_is(label: BidsFile, kind: str, root: Path) -> bool:
    """Whether a segmentation is of a kind: its `desc`, `label`, suffix or the name of its folder in `derivatives`."""
    pipeline = label.path.relative_to(root).parts[1]
    words = (label.entities.get("desc", ""), label.entities.get("label", ""), label.suffix, pipeline)
    return kind.lower() in (word.lower() for word in words)


def differing(files: Iterable[BidsFile]) -> dict[str, str]:
    """Entities in which files differ, each with the first value found: what a filter could name."""
    files = list(files)
    keys = dict.fromkeys(key for file in files for key in file.entities)
    values = {key: [file.entities[key] for file in files if key in file.entities] for key in keys}
    return {key: found[0] for key, found in values.items() if len(found) < len(files) or len(set(found)) > 1}


def _files(root: Path, pattern: str, endings: Iterable[str]) -> list[BidsFile]:
    found = []
    for path in root.glob(f"{pattern}_*"):
        ending = next((ending for ending in endings if path.name.lower().endswith(ending)), None)
        if ending is None:
            continue
        *pairs, suffix = path.name[: -len(ending)].split("_")
        entities = dict(pair.split("-", 1) for pair in pairs if "-" in pair)
        found.append(BidsFile(path, suffix, entities, path.parent.name))
    return found
