"""The shape of a synthetic head: organs as level sets in a template, how subjects differ from it, and slices of it.

Knows where tissues lie: level sets are about the distance to a surface in millimetres, negative inside. Knows nothing
of signals, modalities, vessels or files. Arrays are `(z, y, x)`, points `(x, y, z)` millimetres, left, posterior and
superior of the head's centre.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from scipy import ndimage

from slicestore.geometry import Geometry, Triple

Levels = Mapping[str, np.ndarray]
"""Level sets on one grid, by the name of what they bound; `fold` (zero in a sulcus) and `texture` are random fields."""

KNOT_MM = 2.0
"""Spacing of the lattice on which level sets are computed; images interpolate them smoothly."""
SLAB = 16
"""Slices made at a time; part of the definition, because noise is drawn slab by slab."""


def level_sets(q: np.ndarray, rng: np.random.Generator) -> Levels:
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


def _ventricles(m: np.ndarray) -> np.ndarray:
    lateral = _tube(m, ((7, -30, 13, 2.6), (9, -16, 18, 4.2), (11, 4, 22, 4.2), (17, 22, 17, 5.4), (20, 40, 11, 3.0)))
    temporal = _tube(m, ((18, 24, 15, 4.6), (29, 14, -8, 2.6), (29, -8, -16, 2.0)))
    third = _ellipsoid(m, (0, -2, 0), (1.6, 13, 9))
    fourth = _ellipsoid(m, (0, 21, -38), (6, 4, 8))
    return _union(lateral, temporal, third, fourth, blend_mm=2.0)


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


def _noise(q: np.ndarray, rng: np.random.Generator, scale_mm: float) -> np.ndarray:
    """A random field at points `(3, ...)`, band-passed round 6 `scale_mm`; its mean gradient is about 1 per mm."""
    cell = 1.6
    cube = rng.standard_normal((64, 64, 64)).astype(np.float32)
    narrow = ndimage.gaussian_filter(cube, scale_mm / cell, mode="wrap")
    cube = narrow - ndimage.gaussian_filter(narrow, scale_mm / cell, mode="wrap")
    slope = np.sqrt(sum(float(np.mean(g**2)) for g in np.gradient(cube, cell)))
    return np.asarray(ndimage.map_coordinates(cube / slope, q / cell, order=1, mode="grid-wrap"))


@dataclass(frozen=True, slots=True, eq=False)
class Pose:
    """How a subject differs from the template: stretch, tilt, position and a gentle warp."""

    matrix: np.ndarray
    offset_mm: np.ndarray
    waves: np.ndarray
    """`(k, 7)`: a wave vector (radians a mm), a phase, an amplitude vector (mm)."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        """Another subject."""
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


class Slab(NamedTuple):
    """Level sets on some of the image's slices, cut finer than the slices are thick."""

    where: slice
    fine: int
    """Cuts a slice."""
    levels: Levels

    def average(self, values: np.ndarray) -> np.ndarray:
        """From one value a cut to one a slice, `(z, y, x)`: edges blur across a thick slice as a scanner's do."""
        return np.asarray(values.reshape(-1, self.fine, *values.shape[1:]).mean(axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class Lattice:
    """Knots of the level sets, in the scanner's frame."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray

    @classmethod
    def over(cls, geometry: Geometry) -> Self:
        """Knots over the whole field of view of an image, and a little more."""
        reach = [0.5 * n * step + 2 * KNOT_MM for n, step in zip(geometry.size, geometry.spacing_mm, strict=True)]
        # Nothing of a head lies further to the side than 84 mm; the rest of a wide picture is air.
        return cls(*(KNOT_MM * np.arange(-(r // KNOT_MM), r // KNOT_MM + 1) for r in (min(reach[0], 84.0), *reach[1:])))

    def points_mm(self) -> np.ndarray:
        """`(z, y, x, 3)` float32."""
        z, y, x = np.meshgrid(self.z, self.y, self.x, indexing="ij")
        return np.stack([x, y, z], axis=-1).astype(np.float32)

    def slabs(self, levels: Levels, geometry: Geometry) -> Iterator[Slab]:
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
            yield Slab(
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
