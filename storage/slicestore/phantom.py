"""Synthetic heads in two modalities, TOF angiograms and SWI, with masks: tests and demos need no download.

Knows a template head (level sets in millimetres, negative inside) and what tissues look like in either modality;
knows nothing of stores, preprocessing or networks. Arrays are `(z, y, x)`, points `(x, y, z)` millimetres, left,
posterior and superior of the head's centre. Nobody's anatomy went into it, so it may be shared; a score measured on it
says nothing about patients. Heads are about a sixth smaller than an adult's, because the study's field of view
(167 mm front to back) is to hold them whole.
"""

from __future__ import annotations

import csv
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args

import numpy as np
from scipy import fft, ndimage

from slicestore import vasculature
from slicestore.errors import InputError
from slicestore.geometry import Geometry, Triple
from slicestore.volume import Volume, write

Modality = Literal["tof", "swi"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
Levels = Mapping[str, np.ndarray]

ORIGINAL_SIZE: Mapping[Modality, tuple[tuple[int, int, int], Triple]] = {
    "tof": ((232, 576, 768), (0.59, 0.29, 0.29)),
    "swi": ((80, 192, 256), (2.00, 0.89, 0.89)),
}
"""Voxels `(z, y, x)` and spacing `(z, y, x)` in millimetres of the study's scans."""

SMALL_SIZE: Mapping[Modality, tuple[tuple[int, int, int], Triple]] = {
    "tof": ((32, 112, 112), (4.2, 1.5, 1.5)),
    "swi": ((32, 96, 96), (5.0, 1.76, 1.76)),
}
"""The same for tests and demos: the same field of view in about a second's work."""


class Tissue(NamedTuple):
    """What a tissue looks like."""

    tof: float
    """Signal in scanner units at a short repetition time: still water is saturated, fat recovers, white leads grey."""
    swi: float
    """Signal in scanner units at a long echo time and low flip angle: water is bright, white darker than grey."""
    ppm: float
    """Magnetic susceptibility against water."""


TISSUES: Mapping[str, Tissue] = {
    "fat": Tissue(270, 165, 0.0),
    "muscle": Tissue(120, 105, 0.0),
    "marrow": Tissue(95, 70, 0.0),
    "bone": Tissue(18, 15, 0.0),
    "csf": Tissue(72, 285, 0.0),
    "grey": Tissue(122, 250, 0.015),
    "white": Tissue(142, 206, -0.015),
    "deep": Tissue(128, 228, 0.03),
    "iron": Tissue(116, 178, 0.10),  # pallidum, substantia nigra, red and dentate nuclei
    "globe": Tissue(55, 285, 0.0),
    "air": Tissue(0, 0, 6.0),  # 9 ppm, less what the walls of a sinus take of its room
}
"""Before gain, bias and noise, and before each subject's own variation of some per cent."""

EDGE_MM = 0.9
"""Width of the border between tissues, or a voxel if that is wider."""
KNOT_MM = 2.0
"""Spacing of the lattice on which level sets are computed; images interpolate them smoothly."""
SLAB = 16
"""Slices made at a time; part of the definition, because noise is drawn slab by slab."""


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
    pose = _Pose.draw(rng)
    lattice = _Lattice.over(geometry)
    template = np.ascontiguousarray(np.moveaxis(pose.to_template(lattice.points_mm()), -1, 0))
    levels = _anatomy(template, rng)
    # A coarse grid resolves fewer twigs; Murray's law makes the fewer ones thicker.
    twigs = int(rng.integers(230, 280) if original_size else rng.integers(80, 100))
    tree = _vessels(modality, template, levels, twigs, rng).moved(pose.to_scanner)
    # A coarse grid thickens vessels by its own voxel, as an average over the voxel would hide them.
    filling = vasculature.fill(tree, geometry, least_radius_mm=0.55 * geometry.spacing_mm[0])
    make = _tof if modality == "tof" else _swi
    image, brain = make(lattice, levels, filling, geometry, rng)
    # An observer marks what stands out: a voxel that is a fifth vessel does.
    vessel = np.zeros(image.size, np.uint8)
    vessel[filling.index] = filling.share > 0.2
    return Head(Volume(image, geometry), Volume(vessel.reshape(image.shape), geometry), Volume(brain, geometry))


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


def _grid(size_zyx: tuple[int, int, int], spacing_zyx_mm: Triple) -> Geometry:
    """An axial grid whose middle is the origin of the LPS frame."""
    size, spacing = size_zyx[::-1], spacing_zyx_mm[::-1]
    x, y, z = (-0.5 * (n - 1) * step for n, step in zip(size, spacing, strict=True))
    return Geometry(size, spacing, (x, y, z))


@dataclass(frozen=True, slots=True, eq=False)
class _Pose:
    """How a subject differs from the template: stretch, tilt, position and a gentle warp."""

    matrix: np.ndarray
    offset_mm: np.ndarray
    waves: np.ndarray
    """`(k, 7)`: a wave vector (radians a mm), a phase, an amplitude vector (mm)."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        pitch, roll, yaw = np.deg2rad(rng.normal(0, [3.0, 2.0, 3.0]).clip(-7, 7))
        tilt = _turn(0, pitch) @ _turn(1, roll) @ _turn(2, yaw)
        stretch = rng.uniform([0.95, 0.96, 0.95], [1.06, 1.03, 1.03])
        vector, phase, amplitude = (
            rng.normal(0, 0.035, (4, 3)),
            rng.uniform(0, 2 * np.pi, 4),
            rng.normal(0, 0.8, (4, 3)),
        )
        return cls(np.diag(1 / stretch) @ tilt, rng.normal(0, 0.7, 3), np.column_stack([vector, phase, amplitude]))

    def _warp(self, points_mm: np.ndarray) -> np.ndarray:
        waves = self.waves.astype(points_mm.dtype)
        return np.asarray(np.sin(points_mm @ waves[:, :3].T + waves[:, 3]) @ waves[:, 4:])

    def to_template(self, points_mm: np.ndarray) -> np.ndarray:
        """Points `(..., 3)` of the scanner in the template."""
        kind = points_mm.dtype
        straight = (points_mm - self.offset_mm.astype(kind)) @ self.matrix.T.astype(kind)
        return np.asarray(straight + self._warp(points_mm))

    def to_scanner(self, points_mm: np.ndarray) -> np.ndarray:
        """The inverse of `to_template`, to some hundredths of a millimetre."""
        back = np.linalg.inv(self.matrix).T
        found = points_mm @ back + self.offset_mm
        for _ in range(6):
            found = (points_mm - self._warp(found)) @ back + self.offset_mm
        return np.asarray(found)


def _turn(axis: int, angle: float) -> np.ndarray:
    i, j = (k for k in range(3) if k != axis)
    matrix = np.eye(3)
    matrix[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return matrix


class _Slab(NamedTuple):
    """Level sets on some of the image's slices, cut finer than the slices are thick."""

    where: slice
    fine: int
    """Cuts a slice."""
    levels: Levels

    def average(self, values: np.ndarray) -> np.ndarray:
        """From one value a cut to one a slice, `(z, y, x)`: edges blur across a thick slice as a scanner's do."""
        return np.asarray(values.reshape(-1, self.fine, *values.shape[1:]).mean(axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class _Lattice:
    """Knots of the level sets, in the scanner's frame."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray

    @classmethod
    def over(cls, geometry: Geometry) -> Self:
        reach = [0.5 * n * step + 2 * KNOT_MM for n, step in zip(geometry.size, geometry.spacing_mm, strict=True)]
        # Nothing of a head lies further to the side than 84 mm; the rest of a wide picture is air.
        return cls(*(KNOT_MM * np.arange(-(r // KNOT_MM), r // KNOT_MM + 1) for r in (min(reach[0], 84.0), *reach[1:])))

    def points_mm(self) -> np.ndarray:
        """`(z, y, x, 3)` float32."""
        z, y, x = np.meshgrid(self.z, self.y, self.x, indexing="ij")
        return np.stack([x, y, z], axis=-1).astype(np.float32)

    def slabs(self, levels: Levels, geometry: Geometry) -> Iterator[_Slab]:
        """Level sets on the image's grid, `SLAB` slices at a time."""
        x, y, z = (
            o + step * np.arange(n)
            for o, step, n in zip(geometry.origin_mm, geometry.spacing_mm, geometry.size, strict=True)
        )
        thick = geometry.spacing_mm[2]
        fine = max(1, round(thick / 1.5))
        cuts = thick * ((np.arange(fine) + 0.5) / fine - 0.5)
        across, along = _weights(x, self.x).T, _weights(y, self.y)
        for first in range(0, len(z), SLAB):
            part = z[first : first + SLAB, None] + cuts
            below = _weights(part.ravel(), self.z)
            yield _Slab(
                slice(first, first + len(part)),
                fine,
                {name: along @ np.tensordot(below, level, axes=1) @ across for name, level in levels.items()},
            )


def _weights(at_mm: np.ndarray, knots_mm: np.ndarray) -> np.ndarray:
    """`(points, knots)` weights of the uniform cubic B-spline: it smooths slightly, and repeats the edge outside."""
    place = np.clip((at_mm - knots_mm[0]) / KNOT_MM, 1, len(knots_mm) - 2)
    gap = np.abs(place[:, None] - np.arange(len(knots_mm)))
    near, far = 2 / 3 - gap**2 + gap**3 / 2, np.clip(2 - gap, 0, None) ** 3 / 6
    return np.asarray(np.where(gap < 1, near, far), np.float32)


def _ellipsoid(q: np.ndarray, centre: Triple, axes: Triple, power: float = 2.0) -> np.ndarray:
    """Level set of a (super)ellipsoid at points `(3, ...)`, about the distance to its surface in millimetres."""
    x, y, z = (a - c for a, c in zip(q, centre, strict=True))
    if power == 2.0:
        rho = np.sqrt((x / axes[0]) ** 2 + (y / axes[1]) ** 2 + (z / axes[2]) ** 2)
    else:
        rho = sum(np.abs(p / a) ** power for p, a in zip((x, y, z), axes, strict=True)) ** (1 / power)
    return np.asarray(np.sqrt(x * x + y * y + z * z) * (1 - 1 / np.maximum(rho, 0.05)))


def _union(*levels: np.ndarray, blend_mm: float = 4.0) -> np.ndarray:
    """Union whose seams are rounded over about `blend_mm`."""
    whole = levels[0]
    for level in levels[1:]:
        overlap = np.clip(1 - np.abs(whole - level) / blend_mm, 0, None)
        whole = np.minimum(whole, level) - overlap**2 * blend_mm / 4
    return whole


def _tube(q: np.ndarray, course: tuple[tuple[float, float, float, float], ...]) -> np.ndarray:
    """Level set of a bent tube through `(x, y, z, radius)` points."""
    level = np.full(q.shape[1:], np.inf, q.dtype)
    for (*start, a), (*end, b) in itertools.pairwise(course):
        along = [e - s for s, e in zip(start, end, strict=True)]
        x, y, z = (p - s for p, s in zip(q, start, strict=True))
        t = np.clip((x * along[0] + y * along[1] + z * along[2]) / sum(c * c for c in along), 0, 1)
        gap = np.sqrt((x - t * along[0]) ** 2 + (y - t * along[1]) ** 2 + (z - t * along[2]) ** 2)
        level = np.minimum(level, gap - a - t * (b - a))
    return level


def _anatomy(q: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Level sets at template points `(3, z, y, x)`: negative inside, about the distance in millimetres."""
    # The head is symmetric before the pose is applied, so pairs of organs are drawn once, on the left.
    m = np.stack([np.abs(q[0]), q[1], q[2]])
    fossa = _ellipsoid(m, (0, 34, -30), (47, 33, 26))
    cavity = _union(_ellipsoid(m, (0, 0, 2), (56.5, 67.5, 54), 2.15), fossa, blend_mm=10.0)
    floor = _union(
        _ellipsoid(m, (0, 2, 20), (58, 70, 40), 2.6),
        _ellipsoid(m, (31, -14, -22), (23, 30, 15)),
        _union(fossa, _ellipsoid(m, (0, 40, -4), (48, 30, 22)), blend_mm=10.0),
        blend_mm=8.0,
    )
    cavity = np.maximum(cavity, floor)
    canal = _tube(m, ((0, 8, -40, 11), (0, 16, -95, 9)))
    cavity = _union(cavity, canal)
    vault = _union(_ellipsoid(m, (0, 0, 2), (67.5, 78.5, 65), 2.15), _ellipsoid(m, (0, -32, -52), (50, 44, 50), 2.6))
    outer = _union(vault, _ellipsoid(m, (0, 14, -80), (52, 52, 62), 2.4), blend_mm=12)
    outer = _union(outer, _ellipsoid(m, (63, 14, -30), (9, 11, 17)), _ellipsoid(m, (0, -73, -36), (9, 9, 15)))
    ventricle_mm = rng.uniform(-0.8, 1.6)
    return {
        "outer": outer,
        "cavity": cavity,
        **_cortex(q, m, cavity, fossa, canal, rng),
        **_nuclei(m),
        "ventricle": _ventricles(m) - ventricle_mm,
        "globe": _ellipsoid(m, (27, -58, -24), (11, 11, 11)),
        "texture": 3.0 * _noise(q, rng, 5.0),
        "sinus": _sinuses(m),
    }


def _sinuses(m: np.ndarray) -> np.ndarray:
    """Air: frontal, ethmoid, sphenoid and maxillary sinuses, ear canal and mastoid, throat."""
    blobs: tuple[tuple[Triple, Triple], ...] = (
        ((7, -69, -8), (7, 3.5, 8)),
        ((6, -48, -30), (5, 15, 8)),
        ((5, -26, -36), (7, 8, 7)),
        ((23, -50, -48), (12, 14, 12)),
        ((48, 12, -38), (9, 6, 6)),
        ((60, 8, -38), (14, 3, 3)),
        ((0, -24, -72), (11, 8, 22)),
        ((3, -55, -50), (2.5, 20, 12)),
    )
    return _union(*(_ellipsoid(m, centre, axes) for centre, axes in blobs), blend_mm=1.0)


def _ventricles(m: np.ndarray) -> np.ndarray:
    lateral = _tube(m, ((7, -30, 13, 2.6), (9, -16, 18, 4.2), (11, 4, 22, 4.2), (17, 22, 17, 5.4), (20, 40, 11, 3.0)))
    temporal = _tube(m, ((18, 24, 15, 4.6), (29, 14, -8, 2.6), (29, -8, -16, 2.0)))
    third = _ellipsoid(m, (0, -2, 0), (1.6, 13, 9))
    fourth = _ellipsoid(m, (0, 21, -38), (6, 4, 8))
    return _union(lateral, temporal, third, fourth, blend_mm=2.0)


def _nuclei(m: np.ndarray) -> dict[str, np.ndarray]:
    caudate = _tube(m, ((13, -22, 12, 5.0), (16, -4, 20, 3.0), (21, 12, 20, 1.6)))
    putamen = _ellipsoid(m, (25, -5, 3), (5, 15, 9))
    thalamus = _ellipsoid(m, (9, 12, 6), (7.5, 12, 8))
    pallidum = _ellipsoid(m, (18.5, -3, 1), (4, 9, 5.5))
    small = _union(
        _ellipsoid(m, (5, 4, -13), (3.2, 3.2, 3.2)),
        _ellipsoid(m, (8, 0, -15), (5, 2.2, 3)),
        _ellipsoid(m, (13, 34, -38), (5, 5, 3)),
        blend_mm=0.5,
    )
    return {"deep": _union(caudate, putamen, thalamus, blend_mm=1.0), "iron": _union(pallidum, small, blend_mm=0.5)}


def _cortex(
    q: np.ndarray, m: np.ndarray, cavity: np.ndarray, fossa: np.ndarray, canal: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The brain's envelope, and the sheets of fluid that cut it: sulci, fissures, tentorium.

    Sulci are the zero sheets of a random field that changes little along the radius, so that they run inwards.
    """
    x, y, z = m
    cistern = _union(
        _ellipsoid(m, (0, -12, -21), (17, 11, 7)),
        _ellipsoid(m, (0, -2, -38), (15, 6, 18)),
        _ellipsoid(m, (0, 20, -17), (16, 6, 7)),
    )
    stem = _union(_tube(m, ((6, 2, -8, 7), (0, 6, -22, 9))), _ellipsoid(m, (0, 8, -33), (13, 11, 12)), canal + 4.5)
    envelope = np.maximum(_union(np.maximum(cavity + 1.8, -cistern), stem, blend_mm=2.0), cavity + 1.0)
    radius = np.maximum(np.sqrt((q * q).sum(axis=0)), 1.0)
    fold = _noise(q * (52 / radius) ** 0.4, rng, 2.9)
    folia = 1.6 * np.sin(2 * np.pi / 7.0 * np.sqrt(x**2 + (y - 14) ** 2 + (z + 30) ** 2) + 0.5 * fold)
    below = -22 + 9 * np.exp(-((x / 16) ** 2)) + 0.1 * (y - 30)
    tentorium = np.hypot(z - below, np.clip(12 - y, 0, None))
    callosum = _ellipsoid(m, (0, -2, 8), (40, 40, 21))
    falx = np.hypot(x, np.clip(-callosum, 0, None) + np.clip(-4 - z, 0, None) * (np.abs(y) < 40))
    sylvian = np.sqrt(
        (z + 6 - 0.3 * y) ** 2
        + np.clip(37 - x, 0, None) ** 2
        + np.clip(-30 - y, 0, None) ** 2
        + np.clip(y - 24, 0, None) ** 2
    )
    cerebellum = (fossa < 4) & (z < below)
    return {
        "envelope": envelope,
        "stem": stem,
        "fold": np.where(cerebellum, folia, fold),
        # The lattice rounds the bottom of a distance up by a quarter of a knot.
        "fissure": np.minimum(np.minimum(tentorium, falx), sylvian - 0.8) - 0.5,
    }


def _noise(q: np.ndarray, rng: np.random.Generator, scale_mm: float) -> np.ndarray:
    """A random field at points `(3, ...)`, band-passed round 6 `scale_mm`; its mean gradient is about 1 per mm."""
    cell = 1.6
    cube = rng.standard_normal((64, 64, 64)).astype(np.float32)
    narrow = ndimage.gaussian_filter(cube, scale_mm / cell, mode="wrap")
    cube = narrow - ndimage.gaussian_filter(narrow, scale_mm / cell, mode="wrap")
    slope = np.sqrt(sum(float(np.mean(g**2)) for g in np.gradient(cube, cell)))
    return np.asarray(ndimage.map_coordinates(cube / slope, q / cell, order=1, mode="grid-wrap"))


def _vessels(
    modality: Modality, q: np.ndarray, levels: Levels, twigs: int, rng: np.random.Generator
) -> vasculature.Tree:
    """Grow the modality's tree towards the surface of this subject's brain, veins also into its white matter."""
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


def _paint(levels: Levels, contrast: Mapping[str, float], edge_mm: float) -> np.ndarray:
    """Signal on the levels' grid: tissues laid over each other from the outside in, blurred over `edge_mm` at edges."""
    outer, cavity, texture = levels["outer"], levels["cavity"], levels["texture"]
    # Distance to the nearest fluid: the pial surface, a sulcus down to its floor, or a fissure.
    floor = 13 + np.clip(texture / 3, -6, 6)
    sulcus = np.hypot(levels["fold"], np.clip(-levels["envelope"] - floor, 0, None))
    rind = np.minimum(np.minimum(-levels["envelope"], sulcus), levels["fissure"])
    # Sheets of fat run between the muscles, with no sharp border.
    muscle = np.maximum(outer + 4.0, edge_mm * (4.0 - np.abs(texture)) / 8.0)
    stem = np.maximum(levels["stem"] + 1.0, levels["envelope"])
    layers = (
        ("fat", outer),
        ("muscle", muscle),
        ("bone", cavity - 6.2),
        ("marrow", np.abs(cavity - 3.2) - 1.1),
        ("globe", levels["globe"]),
        ("air", levels["sinus"]),
        ("csf", cavity),
        ("grey", 0.6 - rind),
        ("white", 2.9 - rind),
        ("white", stem),
        ("deep", levels["deep"]),
        ("iron", levels["iron"]),
        ("csf", levels["ventricle"]),
    )
    signal = np.zeros_like(outer)
    for tissue, level in layers:
        cover = np.clip(0.5 - level / edge_mm, 0, 1)
        signal += (np.float32(contrast[tissue]) - signal) * cover
    # No tissue is uniform.
    signal *= 1 + 0.025 * np.sin(0.4 * texture)
    return signal


def _tof(
    lattice: _Lattice, levels: Levels, filling: vasculature.Filling, geometry: Geometry, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Image int16 and brain mask: dark tissue, bright arteries that fade as their blood is saturated on the way."""
    shape = geometry.size[::-1]
    image, brain = np.empty(shape, np.int16), np.empty(shape, np.uint8)
    contrast = {name: tissue.tof * rng.uniform(0.94, 1.06) for name, tissue in TISSUES.items()}
    gain, noise, fresh = rng.uniform(0.9, 1.15), rng.uniform(6.0, 8.5), rng.uniform(700, 850)
    # Blood enters each of three overlapping excitation slabs fresh and is saturated again on its way up through it.
    plane = filling.index // (shape[1] * shape[2])
    within = (plane / shape[0] * 3) % 1.0
    blood = 150 + fresh * np.exp(-filling.delay / rng.uniform(110, 150)) * (1.06 - 0.22 * within)
    bias = _bias(geometry, rng)
    for slab in lattice.slabs(levels, geometry):
        where = slab.where
        signal = slab.average(_paint(slab.levels, contrast, max(EDGE_MM, geometry.spacing_mm[0])))
        mine = slice(*np.searchsorted(plane, [where.start, where.stop]))
        spot = filling.index[mine] - where.start * shape[1] * shape[2]
        flat = signal.reshape(-1)
        flat[spot] += filling.share[mine] * (blood[mine] - flat[spot]).astype(np.float32)
        signal *= gain * bias(where)
        image[where] = _rician(signal, noise, rng)
        brain[where] = slab.average(slab.levels["envelope"]) < 0
    return image, brain


def _swi(
    lattice: _Lattice, levels: Levels, filling: vasculature.Filling, geometry: Geometry, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Image int16 and brain mask: long-echo magnitude times a mask from the high-passed phase (Haacke 2004)."""
    shape = geometry.size[::-1]
    signal, source, brain = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, np.uint8)
    contrast = {name: tissue.swi * rng.uniform(0.95, 1.05) for name, tissue in TISSUES.items()}
    ppm = {name: tissue.ppm for name, tissue in TISSUES.items()}
    for slab in lattice.slabs(levels, geometry):
        edge = max(EDGE_MM, geometry.spacing_mm[0])
        signal[slab.where] = slab.average(_paint(slab.levels, contrast, edge))
        source[slab.where] = slab.average(_paint(slab.levels, ppm, edge))
        brain[slab.where] = slab.average(slab.levels["envelope"]) < 0
    share = np.zeros(signal.size, np.float32)
    share[filling.index] = filling.share
    share = share.reshape(shape)
    spacing = np.array(geometry.spacing_mm[::-1])
    field = _field(source + 0.35 * share, spacing)
    # Spins within a voxel lose step where the field changes across it: round vessels (blooming) and above the sinuses.
    steep = sum((g * d) ** 2 for g, d in zip(np.gradient(field, *spacing), ORIGINAL_SIZE["swi"][1], strict=True))
    halo = ndimage.gaussian_filter(share, rng.uniform(0.9, 1.2) / spacing)
    signal *= np.exp(-2.2 * share - 3.0 * halo - 200.0 * steep)
    phase = 18.0 * (field - ndimage.gaussian_filter(field, 3.5 / spacing))
    signal *= np.clip(1 - np.maximum(phase, 0) / np.pi, 0, 1) ** 4
    bias = _bias(geometry, rng)
    return _rician(signal * rng.uniform(0.9, 1.15) * bias(slice(None)), rng.uniform(8, 11), rng), brain


def _field(ppm: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Field shift in ppm along z that a susceptibility map `(z, y, x)` causes: the dipole kernel 1/3 - kz² / k²."""
    size = [fft.next_fast_len(n + 8, real=True) for n in ppm.shape]
    k = [fft.fftfreq(size[0], spacing_mm[0]), fft.fftfreq(size[1], spacing_mm[1]), fft.rfftfreq(size[2], spacing_mm[2])]
    z, y, x = np.meshgrid(*(np.square(a, dtype=np.float32) for a in k), indexing="ij", sparse=True)
    total = z + y + x
    total[0, 0, 0] = 1.0
    spectrum = fft.rfftn(ppm, size) * (1 / 3 - z / total)
    return np.asarray(fft.irfftn(spectrum, size)[tuple(slice(n) for n in ppm.shape)], np.float32)


def _bias(geometry: Geometry, rng: np.random.Generator) -> Callable[[slice], np.ndarray]:
    """The coil's smooth multiplicative field, for any range of slices."""
    profiles = []
    for n in geometry.size[::-1]:
        at, slope, bowl = np.linspace(-1, 1, n), rng.normal(0, 0.08), rng.uniform(-0.05, 0.12)
        profiles.append(np.exp(slope * at + bowl * at**2).astype(np.float32))
    z, y, x = profiles
    return lambda where: np.asarray(z[where, None, None] * y[:, None] * x)


def _rician(signal: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Magnitude of the signal with complex noise of standard deviation `sigma`, rounded to int16."""
    real = signal + sigma * rng.standard_normal(signal.shape, np.float32)
    imaginary = sigma * rng.standard_normal(signal.shape, np.float32)
    return np.asarray(np.clip(np.rint(np.hypot(real, imaginary)), 0, 32767), np.int16)
