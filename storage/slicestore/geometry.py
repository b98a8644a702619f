"""Where a voxel grid lies in the patient.

Knows ITK's convention (LPS frame, axes in the order x, y, z, millimetres); knows nothing of files or voxel values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from slicestore.errors import InputError

Triple = tuple[float, float, float]
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
"""Direction of a grid whose axes are the patient's left, posterior and superior."""
SAME_GRID_MM = 1e-2
"""How far apart the corner voxels of an image and its mask may lie: a hundredth of a millimetre is far below a voxel,
and more than the rounding of headers by different programs (float32 matrices, DICOM's decimal strings) costs."""
SINGULAR = 1e-3
"""Volume of three unit axes below which they lie in a plane, and area of two below which they lie on a line."""
MISPLACED_MM = 0.1
"""How far a header may contradict itself: its two matrices, its axes against a right angle, a slice against its place
in the stack. Rounding stays below it, and a voxel of these modalities is about three times as wide at least."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Size, spacing, origin and direction of a grid; axis order x, y, z throughout."""

    size: tuple[int, int, int]
    """Voxels along x, y, z."""
    spacing_mm: Triple
    """Distance between voxel centres along x, y, z in millimetres."""
    origin_mm: Triple = (0.0, 0.0, 0.0)
    """Centre of the first voxel in the LPS frame."""
    direction: tuple[float, ...] = AXIAL
    """Row-major 3 x 3 matrix; column k is the unit vector of axis k."""

    def point_mm(self, index_xyz: tuple[float, float, float]) -> Triple:
        """Centre of a (possibly fractional) voxel index, in the LPS frame."""
        step = self._matrix() @ (np.asarray(self.spacing_mm) * np.asarray(index_xyz, dtype=float))
        x, y, z = (float(o + s) for o, s in zip(self.origin_mm, step, strict=True))
        return x, y, z

    def differences(self, other: Geometry, tolerance_mm: float = 1e-3) -> list[str]:
        """Name every part in which two grids disagree by more than `tolerance_mm` at a corner voxel."""
        if self.size != other.size:
            return [f"size {self.size} against {other.size}"]
        last = tuple(n - 1 for n in self.size)
        corners = [(x, y, z) for x in (0, last[0]) for y in (0, last[1]) for z in (0, last[2])]
        gap = max(np.abs(np.subtract(self.point_mm(c), other.point_mm(c))).max() for c in corners)
        if gap <= tolerance_mm:
            return []
        parts = (
            ("spacing", self.spacing_mm, other.spacing_mm),
            ("origin", self.origin_mm, other.origin_mm),
            ("direction", self.direction, other.direction),
        )
        named = [f"{name} {a} against {b}" for name, a, b in parts if not np.allclose(a, b, atol=1e-6)]
        return [*named, f"corners up to {gap:.3g} mm apart"]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON attributes."""
        return {key: list(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**{key: tuple(value) for key, value in data.items()})

    @classmethod
    def from_affine(cls, size: tuple[int, int, int], affine: np.ndarray) -> Self:
        """The grid that a 4 x 4 matrix from index to LPS millimetres describes; a zero column gives a spacing of 0."""
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        rows = affine[:3, :3] / np.where(spacing > 0, spacing, 1.0)
        x, y, z = spacing.tolist()
        a, b, c = affine[:3, 3].tolist()
        return cls(size, (x, y, z), (a, b, c), tuple(rows.ravel().tolist()))

    def skew_mm(self) -> float:
        """Farthest a voxel lies from where the nearest rectangular grid round the same centre would have it."""
        u, _, v = np.linalg.svd(self._matrix())
        half = np.asarray(self.spacing_mm) * (np.asarray(self.size) - 1) / 2
        corners = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * half
        return float(np.linalg.norm(corners @ (self._matrix() - u @ v).T, axis=1).max())

    def _matrix(self) -> np.ndarray:
        return np.asarray(self.direction, dtype=float).reshape(3, 3)


def check_grids(image: Geometry, mask: Geometry, where: object, *, kind: str = "label") -> None:
    """Refuse a label (or a mask of another `kind`) that is not on its image's grid, naming what differs.

    Grids are one when their sizes are equal and their corner voxels lie within `SAME_GRID_MM` of each other.

    Raises:
        InputError: size, spacing, origin or direction differ.
    """
    differences = image.differences(mask, SAME_GRID_MM)
    if differences:
        raise InputError(
            where,
            found=f"{'; '.join(differences)} (image against {kind})",
            rule=f"a {kind} lies on the voxel grid of its image, corners within {SAME_GRID_MM:g} mm",
            remedy=f"resample the {kind} to its image with nearest neighbours, or find the right image",
        )


def check_size(size: Sequence[int], where: object) -> None:
    """Refuse an image of fewer than three axes, or of more than one axis of a single voxel; one slice is a volume.

    Raises:
        InputError: it is no volume.
    """
    if len(size) != 3 or min(size) < 1 or sorted(size)[1] < 2:
        raise InputError(
            where,
            found=f"a {sum(n > 1 for n in size)}D image of size {' x '.join(map(str, size))}",
            rule="a volume has three axes, of which one may be a single slice",
            remedy="give the volume that it was cut from",
        )


def check_axes(grid: Geometry, where: object) -> None:
    """Refuse a grid that no scanner makes, and that ITK would change or misread without a word.

    Raises:
        InputError: a spacing or an origin that is no number, a spacing of 0 or below, axes that span no volume, or axes
            whose angles are off the right one by more than `MISPLACED_MM` at a corner voxel.
    """
    rule, remedy = "a grid has positive spacings and three axes at right angles", "export the image anew"
    if not np.isfinite([*grid.spacing_mm, *grid.origin_mm, *grid.direction]).all():
        found = f"spacing {grid.spacing_mm}, origin {grid.origin_mm} and direction {grid.direction}"
        raise InputError(where, found=found, rule="a grid is described by finite numbers", remedy=remedy)
    if min(grid.spacing_mm) <= 0:
        raise InputError(where, found=f"spacing {grid.spacing_mm} mm", rule=rule, remedy=remedy)
    if abs(np.linalg.det(np.reshape(grid.direction, (3, 3)))) < SINGULAR:
        raise InputError(where, found=f"a singular direction {grid.direction}", rule=rule, remedy=remedy)
    if (skew := grid.skew_mm()) > MISPLACED_MM:
        raise InputError(
            where,
            found=f"sheared or scaled axes (a corner is {skew:.3g} mm off a rectangular grid, direction "
            f"{tuple(round(value, 4) for value in grid.direction)})",
            rule=f"{rule}, to {MISPLACED_MM:g} mm at the corners",
            remedy="resample it to a rectangular grid (a registration tool can), or export it anew",
        )
