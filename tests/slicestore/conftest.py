"""What the storage tests share: small synthetic cohorts, and the real crops where they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slicestore.geometry import Geometry
from slicestore.inputs import Input
from slicestore.preprocess import Preprocessing
from slicestore.volume import Volume, write

MakeCohort = Callable[..., list[Input]]


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real crops (`EQUIPOISE_REAL_DATA`)."""
    folder = os.environ.get("EQUIPOISE_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("EQUIPOISE_REAL_DATA names no folder of real volumes")
    return Path(folder)


@pytest.fixture(scope="session")
def small() -> Preprocessing:
    """Slices of 16 x 16 pixels of 1 mm."""
    return Preprocessing(size=16, spacing_mm=1.0)


@pytest.fixture(scope="session")
def make_cohort() -> MakeCohort:
    """Write tiny labelled sources and targets, 5 slices of 24 x 20 voxels of half a millimetre; return the inputs."""
    return _make_cohort


def _make_cohort(folder: Path, *, sources: int = 2, targets: int = 2, target_labels: bool = False) -> list[Input]:
    inputs = []
    for domain, count in (("source", sources), ("target", targets)):
        for number in range(count):
            rng = np.random.default_rng([number, len(domain), ord(domain[0])])
            geometry = Geometry((20, 24, 5), (0.5, 0.5, 2.0), (1.0, 2.0, 3.0 + number))
            label = np.zeros((5, 24, 20), dtype=np.uint8)
            label[1:4, 6:14, 4 + number : 12 + number] = 1
            image = np.round(rng.normal(100, 10, label.shape) + 200 * label).astype(np.int16)
            name = f"patient-{domain}-{number}"
            write(Volume(image, geometry), folder / f"{name}.nii.gz")
            labelled = domain == "source" or target_labels
            if labelled:
                write(Volume(label, geometry), folder / f"{name}_label.nii.gz")
            inputs.append(
                Input(
                    domain,
                    name,
                    folder / f"{name}.nii.gz",  # type: ignore[arg-type]
                    folder / f"{name}_label.nii.gz" if labelled else None,
                )
            )
    return inputs
