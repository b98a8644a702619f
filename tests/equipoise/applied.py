"""What the tests of applied networks share: a sphere anywhere in space, and a network that is right about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor, nn

from equipoise.config import RunConfig
from equipoise.intake import SLICE_MM, Intake
from equipoise.model import Model
from slicestore.geometry import Geometry
from slicestore.settings import Preprocessing
from slicestore.store import DOMAINS
from slicestore.volume import Volume

RADIUS_MM = 14.0
CENTRE_MM = np.array([-7.0, 21.0, 33.0])
"""Of a bright sphere, in the LPS frame."""
LOW, HIGH = 50.0, 1000.0
"""Raw values outside and inside."""
EXTENT_MM = 44.0
"""Of a scan, along each axis."""
SHARE = 4 / 3 * np.pi * RADIUS_MM**3 / EXTENT_MM**3
"""Of the scan, that the sphere fills."""


class Bright(nn.Module):
    """A network whose answer is known: bright is structure, dark is background, and halfway is the edge."""

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) in [-1, 1] -> logits (B, 2, H, W)."""
        return torch.cat([self.edge - image, image - self.edge], dim=1) * 4


def bright(spacing_mm: float = 1.0, size: int = 64, **settings: Any) -> Model:
    """That network as a model, for slices of so many pixels; -1 and 1 are the sphere's surroundings and the sphere.

    It takes no volume for odd.
    """
    levels = ("0.1", "0.5", "1", "2", "5", "95", "98", "99", "99.5", "99.9", SLICE_MM)
    limits = -((SHARE / (1 - SHARE)) ** 0.5), ((1 - SHARE) / SHARE) ** 0.5
    intake = Intake(
        cohort="none",
        preprocessing=Preprocessing(size=size, spacing_mm=spacing_mm, centre="grid", **settings),
        classes=2,
        limits=dict.fromkeys(DOMAINS, limits),
        clip=False,
        frame=0,
        channels=1,
        usual={domain: dict.fromkeys(levels, (-99.0, 99.0)) for domain in DOMAINS},
    )
    return Model(Bright(), intake, RunConfig(), {})  # type: ignore[arg-type]


def sphere(geometry: Geometry) -> Volume:
    """A bright sphere about `CENTRE_MM` with soft edges, as a scan on that grid would show it."""
    width, height, depth = geometry.size
    z, y, x = np.mgrid[:depth, :height, :width].astype(float)
    rows = np.reshape(geometry.direction, (3, 3)) * np.asarray(geometry.spacing_mm)
    points = np.einsum("ij,jzyx->zyxi", rows, np.stack([x, y, z])) + np.asarray(geometry.origin_mm)
    inside = np.clip(RADIUS_MM - np.linalg.norm(points - CENTRE_MM, axis=-1) + 0.5, 0, 1)
    return Volume(np.round(LOW + (HIGH - LOW) * inside).astype(np.int16), geometry)


def around(spacing_mm: tuple[float, float, float], direction: np.ndarray) -> Geometry:
    """A grid about `CENTRE_MM`, a little off its middle."""
    size = tuple(round(EXTENT_MM / mm) for mm in spacing_mm)
    half = direction @ (np.asarray(spacing_mm) * (np.asarray(size) - 1) / 2)
    origin = CENTRE_MM + np.array([1.5, -2.0, 1.0]) - half
    return Geometry(size, spacing_mm, tuple(origin.tolist()), tuple(direction.ravel().tolist()))  # type: ignore[arg-type]


def distances_mm(path: Path) -> np.ndarray:
    """How far each voxel that a mask's file holds lies from `CENTRE_MM`, as SimpleITK places it."""
    image = sitk.ReadImage(str(path))
    found = np.argwhere(sitk.GetArrayFromImage(image) > 0)[:, ::-1].tolist()
    return np.linalg.norm([np.subtract(image.TransformIndexToPhysicalPoint(p), CENTRE_MM) for p in found], axis=1)


def volume_ml(path: Path) -> float:
    """Of a mask's file, as SimpleITK counts it."""
    image = sitk.ReadImage(str(path))
    return float((sitk.GetArrayFromImage(image) > 0).sum() * np.prod(image.GetSpacing()) / 1000)
