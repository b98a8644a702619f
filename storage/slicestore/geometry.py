"""Where a voxel grid lies in the patient.

Knows ITK's convention (LPS frame, axes in the order x, y, z, millimetres); knows nothing of files or voxel values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

Triple = tuple[float, float, float]
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
"""Direction of a grid whose axes are the patient's left, posterior and superior."""


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

    def _matrix(self) -> np.ndarray:
        return np.asarray(self.direction, dtype=float).reshape(3, 3)
