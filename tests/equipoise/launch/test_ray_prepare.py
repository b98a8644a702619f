"""`equipoise prepare` over a Ray cluster makes the store that one process makes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slicestore.geometry import Geometry
from slicestore.volume import Volume, write

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def prepare(folder: Path, store: str, *more: str) -> subprocess.CompletedProcess[str]:
    """With paths relative to the folder, which is not the one that Ray's workers run in."""
    words = [store, "--source", "tof", "--target", "swi", "--mask", "vessel", "--size", "16", "--spacing-mm", "1"]
    line = [sys.executable, "-m", "equipoise.cli", "prepare", *words, *more]
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "200", "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_cluster_makes_the_same_store_and_tells_the_same_mistakes(cluster: str, tmp_path: Path) -> None:
    label = np.zeros((5, 24, 20), dtype=np.uint8)
    label[1:4, 6:14, 4:12] = 1
    grid = Geometry((20, 24, 5), (0.5, 0.5, 2.0))
    for number in range(3):
        for name in ("tof", "swi"):
            (tmp_path / name).mkdir(exist_ok=True)
            image = np.random.default_rng([number, len(name), ord(name[0])]).normal(100, 10, label.shape) + 200 * label
            write(Volume(image.astype(np.int16), grid), tmp_path / name / f"{number}.nii.gz")
        write(Volume(label, grid), tmp_path / "tof" / f"{number}_vessel.nii.gz")
    alone = prepare(tmp_path, "alone.zarr", "--processes", "1")
    assert alone.returncode == 0, alone.stderr
    spread = prepare(tmp_path, "spread.zarr", "--address", cluster)
    assert spread.returncode == 0, spread.stderr
    (tmp_path / "tof" / "1.nii.gz").write_bytes((tmp_path / "tof" / "1.nii.gz").read_bytes()[:-20])
    broken = prepare(tmp_path, "broken.zarr", "--address", cluster)
    files = {
        name: {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("alone.zarr", "spread.zarr")
    }
    assert files["alone.zarr"] == files["spread.zarr"]
    assert broken.returncode == 2
    assert broken.stderr.startswith(f"error: {tmp_path / 'tof' / '1.nii.gz'}: ")
    assert "Traceback" not in broken.stderr
    assert not (tmp_path / "broken.zarr").exists()
