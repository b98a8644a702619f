"""Raw volumes of seconds and the store made of them, shared by the tests that start Ray."""

from pathlib import Path

import numpy as np
import pytest

from slicestore.geometry import Geometry
from slicestore.ingest import Input, ingest
from slicestore.preprocess import Preprocessing
from slicestore.volume import Volume, write


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three subjects a domain, eight 32 x 32 slices each: a bright ball in one domain, a dark one in the other."""
    folder = tmp_path_factory.mktemp("cohort")
    z, y, x = np.mgrid[:8, :32, :32]
    geometry = Geometry(size=(32, 32, 8), spacing_mm=(1.0, 1.0, 2.0))
    rng = np.random.default_rng(0)
    inputs = []
    for number in range(3):
        ball = ((y - 16) ** 2 + (x - 14 - number) ** 2 < 64) & (z > 0)
        head = (y - 16) ** 2 + (x - 16) ** 2 < 196
        for domain, sign in (("source", 1), ("target", -1)):
            image = 100.0 * head + sign * 60.0 * ball + rng.normal(0, 5, ball.shape)
            paths = {n: folder / f"{domain}-{number}{n}.nii.gz" for n in ("", "_label")}
            write(Volume(image.astype(np.float32), geometry), paths[""])
            write(Volume(ball.astype(np.uint8), geometry), paths["_label"])
            inputs.append(Input(domain, f"patient-{number}", paths[""], paths["_label"]))  # type: ignore[arg-type]
    path = folder / "cohort.zarr"
    ingest(inputs, path, Preprocessing(size=32, spacing_mm=1.0))
    return path
