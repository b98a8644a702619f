"""Branching vessels for synthetic heads: named trunks, twigs grown to given targets, radii by Murray's law.

Knows the courses of the great arteries and veins in a template head and how much of a voxel a vessel fills; knows
nothing of tissues, contrast or files. Points are `(x, y, z)` millimetres, left, posterior and superior of the head's
centre.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline

from slicestore.geometry import Geometry

NODE_STEP_MM = 1.2
"""Distance between neighbouring nodes of a tree."""
SHELL_MM = np.array([56.0, 67.0, 52.0])
"""Half axes of the shell that twigs follow instead of cutting straight through the brain."""


class Trunk(NamedTuple):
    """A named vessel: where it runs, and what leaves through its far end."""

    course_mm: tuple[tuple[float, float, float], ...]
    tips: int = 1
    """Twigs that the picture does not show but that the end feeds; sets the calibre where little is grown."""
    root: bool = False
    bare: bool = False
    """No twig may start here."""


def _mirrored(trunk: Trunk) -> Trunk:
    return trunk._replace(course_mm=tuple((-x, y, z) for x, y, z in trunk.course_mm))


def _both(*trunks: Trunk) -> list[Trunk]:
    return [version for trunk in trunks for version in (trunk, _mirrored(trunk))]


# A course is read along the line, so the formatter leaves these two tables alone.
# fmt: off
ARTERIES: tuple[Trunk, ...] = (
    # Internal carotid: neck, petrous bone, the S of the siphon, terminus beside the optic chiasm.
    *_both(Trunk(((25, 2, -84), (25, 3, -66), (24, 2, -54), (19, -2, -46), (12, -9, -41), (10, -18, -38),
                  (10, -25, -33), (10, -22, -27), (12, -17, -24), (13, -13, -19)), root=True, bare=True)),
    # Vertebrals and the basilar artery in front of the pons.
    Trunk(((15, 12, -84), (16, 14, -68), (10, 8, -58), (3, 2, -49), (0, -1, -44), (0, -3, -34), (0, -6, -23)),
          root=True, bare=True),
    Trunk(((-15, 12, -84), (-16, 14, -68), (-10, 8, -58), (-3, 2, -49), (0, -1, -44)), tips=14, root=True, bare=True),
    *_both(
        # Middle cerebral: M1 to the side, then two M2 divisions over the insula and out of the Sylvian fissure.
        Trunk(((13, -13, -19), (20, -13, -15), (28, -14, -15), (35, -13, -14))),
        Trunk(((35, -13, -14), (38, -14, -5), (38, -12, 6), (43, -14, 12), (48, -20, 22), (45, -26, 34)), tips=3),
        Trunk(((35, -13, -14), (39, -5, -11), (38, 6, -2), (41, 18, 6), (48, 30, 14), (46, 42, 22)), tips=3),
        # Anterior cerebral: A1 to the midline, A2 round the genu and back over the corpus callosum.
        Trunk(((13, -13, -19), (8, -19, -18), (2.5, -23, -16), (2, -32, -8), (2, -42, 4), (2, -38, 18), (2, -24, 28),
               (2, -4, 32), (2, 14, 31)), tips=2),
        # Posterior cerebral: round the midbrain to the calcarine cortex.
        Trunk(((0, -6, -23), (7, -6, -23), (15, 1, -21), (18, 12, -18), (14, 26, -11), (11, 42, -3), (9, 54, 4)),
              tips=2),
        # Posterior communicating, superior cerebellar, anterior and posterior inferior cerebellar.
        Trunk(((12, -17, -22), (10, -11, -22.5), (10, -5, -22.5)), tips=3, bare=True),
        Trunk(((0, -5, -27), (9, -3, -28), (17, 8, -27), (20, 24, -24), (16, 36, -24)), tips=4, bare=True),
        Trunk(((0, -2, -40), (10, 1, -41), (22, 12, -42), (32, 24, -40)), tips=2, bare=True),
        Trunk(((12, 10, -62), (16, 20, -56), (12, 32, -55), (20, 42, -52)), tips=3, bare=True),
    ),
    Trunk(((2.5, -23, -16), (0, -24, -16), (-2.5, -23, -16)), tips=3, bare=True),
)
"""Circle of Willis and its tributaries, from the neck upwards."""

VEINS: tuple[Trunk, ...] = (
    # Right jugular, sigmoid and transverse sinus, the confluence, then forwards along the vault: the sagittal sinus.
    Trunk(((-24, 10, -84), (-25, 12, -62), (-36, 19, -48), (-42, 24, -37), (-43.5, 34.5, -21.5), (-37.5, 51, -15),
           (-19, 62.5, -12.5), (0, 65, -9.5)), root=True, bare=True),
    Trunk(((0, 65, -9.5), (0, 66, 5.5), (0, 61.5, 25), (0, 50.5, 39.5), (0, 33.5, 50), (0, 14, 54.5), (0, -5.5, 55),
           (0, -25.5, 52.5), (0, -44, 45), (0, -58, 31), (0, -65.5, 12)), tips=4),
    Trunk(((0, 65, -9.5), (19, 62.5, -12.5), (37.5, 51, -15), (43.5, 34.5, -21.5), (42, 24, -37), (36, 19, -48),
           (25, 12, -62), (24, 10, -84)), tips=70),
    # Straight sinus up to the great vein of Galen, inferior sagittal sinus along the falx.
    Trunk(((0, 65, -9.5), (0, 55, -4), (0, 44, 3), (0, 34, 8), (0, 27, 9)), bare=True),
    Trunk(((0, 34, 8), (0, 26, 22), (0, 8, 33), (0, -14, 33), (0, -30, 26)), tips=6),
    *_both(
        # Internal cerebral, thalamostriate, septal; then the wall of the ventricle, where the medullary veins end.
        Trunk(((0, 27, 9), (2.5, 20, 10.5), (2.5, 8, 11), (3, -5, 8)), tips=2, bare=True),
        Trunk(((3, -5, 8), (9, -7, 12), (14, -2, 17), (17, 10, 19), (20, 22, 18)), tips=2),
        Trunk(((3, -5, 8), (5, -18, 12), (11, -28, 15)), tips=2),
        Trunk(((0, 27, 9), (12, 28, 11), (22, 32, 11), (24, 42, 10)), tips=2),
        # Basal vein of Rosenthal round the midbrain; Labbé and Trolard bridge the convexity.
        Trunk(((0, 27, 9), (10, 20, -6), (14, 8, -14), (13, -6, -19), (20, -12, -18)), tips=2, bare=True),
        Trunk(((41.5, 40.5, -15.5), (47.5, 30.5, -6), (51, 14, -2), (49, -4, -4)), tips=4),
        Trunk(((0, 16, 54), (14, 17, 52.5), (32, 14.5, 45.5), (46, 8, 30.5), (52, 1.5, 13)), tips=4),
    ),
)
"""Dural sinuses, deep and bridging veins, from the jugular upwards (against the flow)."""
# fmt: on


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """Nodes of a forest; every parent comes before its children."""

    points_mm: np.ndarray
    """`(n, 3)`, x, y, z."""
    parent: np.ndarray
    """`(n,)` index of the node nearer to the heart, -1 at a root."""
    radius_mm: np.ndarray
    """`(n,)`; the cube of a parent's radius is the sum of its children's (Murray 1926)."""
    delay: np.ndarray
    """`(n,)` path length over radius, summed from the root: proportional to the blood's travelling time."""

    def moved(self, to: Callable[[np.ndarray], np.ndarray]) -> Tree:
        """The same tree with its points mapped by `to`, `(n, 3)` to `(n, 3)` millimetres."""
        return replace(self, points_mm=to(self.points_mm))


def arteries(targets_mm: np.ndarray, rng: np.random.Generator) -> Tree:
    """Grow the arterial tree; `targets_mm` `(n, 3)` are the places its twigs should reach."""
    return _grow(ARTERIES, targets_mm, rng, trunk_mm=rng.uniform(1.9, 2.15))


def veins(targets_mm: np.ndarray, rng: np.random.Generator) -> Tree:
    """Grow the venous tree; `targets_mm` `(n, 3)` are the places its twigs should drain."""
    return _grow(VEINS, targets_mm, rng, trunk_mm=rng.uniform(2.4, 2.8))


class _Growth:
    """Node lists under construction."""

    def __init__(self) -> None:
        self.points = np.empty((0, 3))
        self.heading = np.empty((0, 3))
        self.parent: list[int] = []
        self.open: list[bool] = []
        self.tips: dict[int, int] = {}

    def extend(self, path_mm: np.ndarray, start: int, *, bare: bool, tips: int) -> None:
        """Append a path `(n, 3)` whose first node hangs on node `start` (-1: on none)."""
        first = len(self.parent)
        step = np.gradient(path_mm, axis=0)
        heading = step / np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-6)
        self.points = np.concatenate([self.points, path_mm])
        self.heading = np.concatenate([self.heading, heading])
        self.parent += [start, *range(first, first + len(path_mm) - 1)]
        self.open += [not bare] * len(path_mm)
        self.tips[len(self.parent) - 1] = tips

    def nearest(self, point_mm: np.ndarray, *, steer: float = 0.0, usable: np.ndarray | None = None) -> int:
        """Node with the shortest way to a point; `steer` prefers nodes that already head there."""
        gap = point_mm - self.points
        distance = np.linalg.norm(gap, axis=1)
        cost = distance - steer * np.einsum("ij,ij->i", gap, self.heading)
        # Nothing crosses the falx: the far side costs more than any way round.
        cost += 60.0 * ((np.sign(point_mm[0]) * self.points[:, 0] < -3.0) & (steer > 0))
        return int(np.argmin(cost if usable is None else np.where(usable, cost, np.inf)))


def _grow(trunks: Iterable[Trunk], targets_mm: np.ndarray, rng: np.random.Generator, *, trunk_mm: float) -> Tree:
    """Trunks first, then twigs, near targets before far ones; the thickest root has `trunk_mm`."""
    growth = _Growth()
    for trunk in trunks:
        course = np.array(trunk.course_mm, dtype=float)
        start = -1 if trunk.root else growth.nearest(course[0])
        # Inner bends vary between subjects; the ends stay, so that the named vessels still meet.
        course[1:-1] += rng.normal(0.0, 0.9, course[1:-1].shape) * [0.6, 1.0, 1.0]
        if start >= 0:
            course[0] = growth.points[start]
        growth.extend(_smooth(course), start, bare=trunk.bare, tips=trunk.tips)
    skeleton = growth.points[np.array(growth.open)]
    reach = np.linalg.norm(targets_mm[:, None] - skeleton[None, ::4], axis=2).min(axis=1)
    for target in targets_mm[np.argsort(reach)]:
        start = growth.nearest(target, steer=0.35, usable=np.array(growth.open))
        if np.linalg.norm(growth.points[start] - target) > 2 * NODE_STEP_MM:
            growth.extend(_twig(growth.points[start], growth.heading[start], target, rng), start, bare=False, tips=1)
    return _calibrated(growth, trunk_mm)


def _smooth(course_mm: np.ndarray) -> np.ndarray:
    chord = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(course_mm, axis=0), axis=1))])
    count = max(3, round(chord[-1] / NODE_STEP_MM))
    return np.asarray(CubicSpline(chord, course_mm)(np.linspace(0.0, chord[-1], count)))


def _twig(start: np.ndarray, heading: np.ndarray, end: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A winding path that leaves along the parent and follows the shell of the brain."""
    chord = end - start
    length = float(np.linalg.norm(chord))
    t = np.linspace(0.0, 1.0, max(3, round(length / NODE_STEP_MM)) + 1)[1:, None]
    leave = start + (0.5 * heading * length + 0.5 * chord) / 3
    path = (1 - t) ** 3 * start + 3 * (1 - t) ** 2 * t * leave + 3 * (1 - t) * t**2 * (end - chord / 3) + t**3 * end
    wave = rng.normal(size=3) * np.sin(np.pi * t) * np.sin(2 * np.pi * (t * length / 14.0 + rng.uniform()))
    path += 0.05 * length * wave
    shell = np.linalg.norm(path / SHELL_MM, axis=1, keepdims=True)
    wanted = (1 - t) * np.linalg.norm(start / SHELL_MM) + t * np.linalg.norm(end / SHELL_MM)
    # Near the centre the shell has no direction to push in.
    return np.asarray(path * np.where(shell > 0.5, wanted / np.maximum(shell, 1e-3), 1.0))


def _calibrated(growth: _Growth, trunk_mm: float) -> Tree:
    parent = np.array(growth.parent)
    flow = np.zeros(len(parent))
    for end, tips in growth.tips.items():
        flow[end] += tips
    for node in range(len(parent) - 1, -1, -1):
        if parent[node] >= 0:
            flow[parent[node]] += flow[node]
    radius = trunk_mm * np.cbrt(flow / flow.max())
    origin = np.where(parent < 0, np.arange(len(parent)), parent)
    length = np.linalg.norm(growth.points - growth.points[origin], axis=1)
    delay = length / radius
    for node in range(len(parent)):
        if parent[node] >= 0:
            delay[node] += delay[parent[node]]
    return Tree(growth.points, parent, radius, delay)


@dataclass(frozen=True, slots=True, eq=False)
class Filling:
    """The voxels that vessels touch: flat indices into `(z, y, x)`, filled share 0..1, mean delay."""

    index: np.ndarray
    share: np.ndarray
    delay: np.ndarray


def fill(tree: Tree, geometry: Geometry, *, least_radius_mm: float) -> Filling:
    """How much of each voxel lies inside a vessel, by points spread evenly over every cross-section.

    `least_radius_mm` is added in quadrature, so that twigs survive on a coarse grid. `geometry` must be axial.
    """
    spacing = np.array(geometry.spacing_mm)
    step = min(0.45 * spacing.min(), NODE_STEP_MM)
    centre, along, thick, radius, delay = _stations(tree, step)
    radius = np.hypot(radius, least_radius_mm)
    # Powers of two keep the number of groups small; about eight points a voxel's face make the share smooth.
    wanted = np.pi * radius**2 / (spacing[0] * spacing[1] / 8)
    count = 2 ** np.ceil(np.log2(np.clip(wanted, 8, 1024))).astype(int)
    parts: dict[str, list[np.ndarray]] = {"index": [], "volume": [], "delay": []}
    for number in np.unique(count):
        chosen = count == number
        points = _discs(centre[chosen], along[chosen], radius[chosen], int(number))
        cell = np.floor((points - geometry.origin_mm) / spacing + 0.5).astype(np.int64)
        inside = np.all((cell >= 0) & (cell < geometry.size), axis=2)
        volume = np.broadcast_to((np.pi * radius[chosen] ** 2 * thick[chosen] / number)[:, None], inside.shape)
        flat = (cell[..., 2] * geometry.size[1] + cell[..., 1]) * geometry.size[0] + cell[..., 0]
        parts["index"].append(flat[inside])
        parts["volume"].append(volume[inside])
        parts["delay"].append(np.broadcast_to(delay[chosen][:, None], inside.shape)[inside])
    return _gathered(parts, float(np.prod(spacing)))


def _gathered(parts: Mapping[str, list[np.ndarray]], voxel_mm3: float) -> Filling:
    index, cell = np.unique(np.concatenate(parts["index"]), return_inverse=True)
    volume = np.concatenate(parts["volume"])
    total = np.bincount(cell, volume, len(index))
    delay = np.bincount(cell, volume * np.concatenate(parts["delay"]), len(index)) / total
    return Filling(index, np.minimum(total / voxel_mm3, 1.0).astype(np.float32), delay.astype(np.float32))


def _stations(tree: Tree, step_mm: float) -> tuple[np.ndarray, ...]:
    """Cross-sections about every `step_mm`: centres, unit tangents, thicknesses, radii, delays."""
    child = np.flatnonzero(tree.parent >= 0)
    origin = tree.parent[child]
    edge = tree.points_mm[child] - tree.points_mm[origin]
    length = np.linalg.norm(edge, axis=1)
    number = np.maximum(1, np.rint(length / step_mm).astype(int))
    which = np.repeat(np.arange(len(child)), number)
    first = np.repeat(np.cumsum(number) - number, number)
    t = ((np.arange(len(which)) - first + 0.5) / number[which])[:, None]
    tangent = edge[which] / np.maximum(length[which], 1e-9)[:, None]
    delay = (1 - t[:, 0]) * tree.delay[origin][which] + t[:, 0] * tree.delay[child][which]
    # A branch keeps its own calibre up to the fork: a parent's would swell every twig's first millimetre.
    radius = tree.radius_mm[child][which]
    return tree.points_mm[origin][which] + t * edge[which], tangent, (length / number)[which], radius, delay


def _discs(centre: np.ndarray, along: np.ndarray, radius: np.ndarray, number: int) -> np.ndarray:
    """`(n, number, 3)` points, sunflower-like, on discs across the tangents."""
    helper = np.where(np.abs(along[:, 2:3]) < 0.8, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    u = np.cross(along, helper)
    u /= np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-9)
    v = np.cross(along, u)
    k = np.arange(number)
    # The golden angle spreads points within a disc; an irrational turn per disc keeps neighbours from lining up.
    angle = k * np.pi * (3 - np.sqrt(5)) + (np.arange(len(centre)) * np.sqrt(2))[:, None]
    distance = radius[:, None] * np.sqrt((k + 0.5) / number)
    # Shifting points along the vessel closes the wedges between discs on the outside of a bend.
    shift = NODE_STEP_MM * ((k * np.sqrt(3)) % 1.0 - 0.5)
    return np.asarray(
        centre[:, None]
        + (distance * np.cos(angle))[..., None] * u[:, None]
        + (distance * np.sin(angle))[..., None] * v[:, None]
        + shift[:, None] * along[:, None]
    )
