"""Synthetic heads in two modalities, TOF angiograms and SWI, with masks: tests and demos need no download.

Knows what makes a scan, a subject and a cohort, out of `anatomy`, `vasculature` and `contrast`; knows nothing of
stores, preprocessing or networks. Arrays are `(z, y, x)`. Nobody's anatomy went into a head, so it may be shared; a
score measured on it says nothing about patients. Heads are about a sixth smaller than an adult's, because the study's
field of view (167 mm front to back) is to hold them whole.
"""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from slicestore import anatomy, contrast, vasculature
from slicestore.errors import InputError
from slicestore.geometry import Geometry, Triple
from slicestore.volume import Volume, write

Modality = Literal["tof", "swi"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)

ORIGINAL_SIZE: Mapping[Modality, tuple[tuple[int, int, int], Triple]] = {
    "tof": ((232, 576, 768), (0.59, 0.29, 0.29)),
    "swi": ((80, 192, 256), contrast.SWI_VOXEL_MM),
}
"""Voxels `(z, y, x)` and spacing `(z, y, x)` in millimetres of the study's scans."""

SMALL_SIZE: Mapping[Modality, tuple[tuple[int, int, int], Triple]] = {
    "tof": ((32, 112, 112), (4.2, 1.5, 1.5)),
    "swi": ((32, 96, 96), (5.0, 1.76, 1.76)),
}
"""The same for tests and demos: the same field of view in about a second's work."""


@dataclass(frozen=True, slots=True)
class Head:
    """One synthetic scan; the three volumes share a grid."""

    image: Volume
    """int16, 0 and above, as a scanner stores it."""
    vessel: Volume
    """uint8 mask 0 or 1: arteries in TOF, veins and sinuses in SWI."""
    brain: Volume
    """uint8 mask 0 or 1: brain with its ventricles and sulci."""


def head(modality: Modality, *, subject: int, seed: int = 0, original_size: bool = False) -> Head:
    """Make one subject's scan, a pure function of the arguments.

    Raises:
        ValueError: an unknown modality, or a negative subject or seed.
    """
    if modality not in MODALITIES:
        raise ValueError(f"modality {modality!r} is none of {', '.join(MODALITIES)}")
    rng = np.random.default_rng([seed, subject, MODALITIES.index(modality)])
    geometry = _grid(*(ORIGINAL_SIZE if original_size else SMALL_SIZE)[modality])
    pose = anatomy.Pose.draw(rng)
    lattice = anatomy.Lattice.over(geometry)
    template = np.ascontiguousarray(np.moveaxis(pose.to_template(lattice.points_mm()), -1, 0))
    levels = anatomy.level_sets(template, rng)
    # A coarse grid resolves fewer twigs; Murray's law makes the fewer ones thicker.
    twigs = int(rng.integers(230, 280) if original_size else rng.integers(80, 100))
    tree = _vessels(modality, template, levels, twigs, rng).moved(pose.to_scanner)
    # A coarse grid thickens vessels by its own voxel, as an average over the voxel would hide them.
    filling = vasculature.fill(tree, geometry, least_radius_mm=0.55 * geometry.spacing_mm[0])
    make = contrast.tof if modality == "tof" else contrast.swi
    image, brain = make(lattice, levels, filling, geometry, rng)
    # An observer marks what stands out: a voxel that is a fifth vessel does.
    vessel = np.zeros(image.size, np.uint8)
    vessel[filling.index] = filling.share > 0.2
    return Head(Volume(image, geometry), Volume(vessel.reshape(image.shape), geometry), Volume(brain, geometry))


def _grid(size_zyx: tuple[int, int, int], spacing_zyx_mm: Triple) -> Geometry:
    """An axial grid whose middle is the origin of the LPS frame."""
    size, spacing = size_zyx[::-1], spacing_zyx_mm[::-1]
    x, y, z = (-0.5 * (n - 1) * step for n, step in zip(size, spacing, strict=True))
    return Geometry(size, spacing, (x, y, z))


def _vessels(
    modality: Modality, q: np.ndarray, levels: anatomy.Levels, twigs: int, rng: np.random.Generator
) -> vasculature.Tree:
    """Grow the modality's tree towards the surface of this subject's brain, veins also into its white matter.

    `q` are template points `(3, z, y, x)` in millimetres, at which `levels` are known.
    """
    depth = -levels["envelope"]
    surface = (depth > 0) & ((depth < 3.5) | (np.abs(levels["fissure"]) < 1.5))
    surface &= q[2] > (-24 if modality == "tof" else -12)
    targets = rng.permutation(q[:, surface].T)[:twigs]
    if modality == "tof":
        return vasculature.arteries(targets.astype(float), rng)
    inner = (levels["ventricle"] > 2) & (levels["ventricle"] < 18) & (depth > 12) & (levels["deep"] > 1)
    inner &= (q[2] > 8) & (np.abs(q[0]) > 8)
    medulla = rng.permutation(q[:, inner].T)[: twigs // 3]
    return vasculature.veins(np.concatenate([targets, medulla]).astype(float), rng)


def write_cohort(folder: Path, *, subjects: int, seed: int = 0, original_size: bool = False) -> Path:
    """Write `subjects` TOF heads and as many SWI heads of other subjects, with masks; return the path of their table.

    The table `cohort.csv` has columns subject, domain (source: TOF, target: SWI), image, vessel, brain; its paths are
    relative to it. Target masks are for evaluation only. The folder appears whole or not at all.

    Raises:
        InputError: fewer than three subjects, or a folder that holds something.
    """
    folder = Path(folder)
    if subjects < 3:
        raise InputError(
            "subjects",
            found=subjects,
            rule="training, validation and test need a subject each",
            remedy="ask for three or more",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            folder,
            found="something there already",
            rule="a cohort is written into a new or empty folder",
            remedy="name another folder or remove this one",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    first_target = 100 * -(-subjects // 100) + 1
    domains: tuple[tuple[Modality, str, int], ...] = (("tof", "source", 1), ("swi", "target", first_target))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.partial-") as partial:
        built = Path(partial) / "cohort"
        rows = [
            _write_head(built, modality, domain, first + i, seed, original_size)
            for modality, domain, first in domains
            for i in range(subjects)
        ]
        with (built / "cohort.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        os.replace(built, folder)
    return folder / "cohort.csv"


def _write_head(
    folder: Path, modality: Modality, domain: str, subject: int, seed: int, original_size: bool
) -> dict[str, str]:
    made, name = head(modality, subject=subject, seed=seed, original_size=original_size), f"sub-{subject:03d}"
    row = {
        "subject": name,
        "domain": domain,
        "image": f"{modality}/{name}.nii.gz",
        "vessel": f"{modality}/{name}_vessel.nii.gz",
        "brain": f"{modality}/{name}_brain.nii.gz",
    }
    for part in ("image", "vessel", "brain"):
        write(getattr(made, part), folder / row[part])
    return row
