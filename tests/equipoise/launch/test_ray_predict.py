"""A folder of volumes is segmented over a cluster as it is here, and one bad volume costs no other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.config import RunConfig
from equipoise.launch.local import launch
from slicestore.store import Store

pytestmark = pytest.mark.ray
EQUIPOISE = Path(sys.executable).with_name("equipoise")


def predict(run: Path, scans: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [str(EQUIPOISE), "predict", str(run), str(scans), "-o", str(out), *words]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, encoding="utf-8", env=environment, check=False)


def test_masks_of_a_cluster_are_those_of_this_machine(
    store: Path, tiny: RunConfig, cluster: str, tmp_path: Path
) -> None:
    run, scans = tmp_path / "run", tmp_path / "scans"
    for _ in launch(run, tiny.at("data.cohort", Store.open(store).fingerprint), store):
        pass
    scans.mkdir()
    for number in range(4):
        shutil.copy(store.parent / f"target-{number}.nii.gz", scans)
    done = predict(run, scans, tmp_path / "here")
    assert done.returncode == 0, done.stdout + done.stderr
    (scans / "target-9.nii.gz").write_bytes((scans / "target-0.nii.gz").read_bytes()[:-40])
    done = predict(run, scans, tmp_path / "there", "--address", cluster)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "4 of 5 volumes done" in done.stdout
    assert "target-9.nii.gz" in done.stdout.partition("error: ")[2]
    for number in range(4):
        here, there = ((tmp_path / where / f"target-{number}_mask.nii.gz") for where in ("here", "there"))
        assert here.read_bytes()[10:] == there.read_bytes()[10:]  # gzip's header has the time of writing
