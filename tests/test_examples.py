"""The examples run, and show what they say."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slicestore.geometry import Geometry
from slicestore.ingest import ingest
from slicestore.inputs import Input
from slicestore.settings import Preprocessing
from slicestore.volume import Volume, write

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    inputs = []
    for number in range(3):
        label = np.zeros((4, 16, 16), np.uint8)
        label[1:, 4:9, 5:9] = 1
        image = np.random.default_rng(number).normal(100, 10, label.shape) + 100 * label
        grid = Geometry((16, 16, 4), (1.0, 1.0, 2.0))
        write(Volume(image.astype(np.float32), grid), folder / f"image{number}.nii.gz")
        write(Volume(label, grid), folder / f"label{number}.nii.gz")
        inputs.append(Input("source", f"a{number}", folder / f"image{number}.nii.gz", folder / f"label{number}.nii.gz"))
    inputs.append(Input("target", "b", folder / "image0.nii.gz"))
    ingest(inputs, folder / "cohort.zarr", Preprocessing(size=16, spacing_mm=1.0))
    return folder / "cohort.zarr"


def test_a_batch_is_read_with_plain_zarr_and_with_slicestore(store: Path) -> None:
    line = [sys.executable, "-W", "error", str(EXAMPLES / "read_batch.py"), str(store)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "zarr: (8, 16, 16) float16 (8, 16, 16) uint8",
        "slicestore: (8, 16, 16) float32 (8, 16, 16) uint8",
    ]


def test_the_example_is_about_ten_lines_a_way() -> None:
    code = (EXAMPLES / "read_batch.py").read_text().partition("path = ")[2]
    for way in code.split("# With ")[1:]:
        assert len([line for line in way.splitlines()[1:] if line.strip()]) <= 10
