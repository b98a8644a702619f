"""What the tests of training share: tiny stores made the real way, and runs small enough for one core."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise import cli
from equipoise.batches import Cohort
from equipoise.config import NetConfig, OptimConfig, RunConfig
from equipoise.config_game import BalanceConfig
from slicestore.geometry import Geometry
from slicestore.ingest import ingest
from slicestore.inputs import Input
from slicestore.settings import Preprocessing
from slicestore.store import DOMAINS, Domain, Store
from slicestore.volume import Volume, write

sys.path.append(str(Path(__file__).parent))  # for what tests share: `wandb_server`, `poisoned`, ...
SIZE = 32
MakeStore = Callable[..., Store]
TwoRanks = Callable[..., None]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums in one order, and no two tests fighting for a core."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real volumes and curves (`EQUIPOISE_REAL_DATA`)."""
    folder = os.environ.get("EQUIPOISE_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("EQUIPOISE_REAL_DATA names no folder of real data")
    return Path(folder)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Type `equipoise WORDS...` in this process."""

    def type_in(*words: object) -> subprocess.CompletedProcess[str]:
        line = ["equipoise", *map(str, words)]
        monkeypatch.setattr(sys, "argv", line)
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(line, code, *capsys.readouterr())

    return type_in


@pytest.fixture(scope="session")
def make_store() -> MakeStore:
    """Write raw volumes into a folder and ingest them: `make_store(folder, classes=2, subjects=4, slices=6, ...)`."""
    return _make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four subjects a domain (2 train, 1 validates, 1 tests) of 6 slices of 32 x 32; masks in both domains."""
    return _make_store(tmp_path_factory.mktemp("two-classes"))


@pytest.fixture(scope="session")
def store_of_three(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same with two structures and background."""
    return _make_store(tmp_path_factory.mktemp("three-classes"), classes=3)


@pytest.fixture(scope="session")
def tiny() -> RunConfig:
    """Eight steps of a sixteenth of SIFA's width; a pool of 2, so that it swaps within the run; terms not weighed."""
    net, optim, balance = NetConfig(width=0.0625), OptimConfig(lr=1e-3), BalanceConfig(every=0)
    return RunConfig(steps=8, batch=2, pool=2, evaluations=2, net=net, optim=optim, balance=balance)


@pytest.fixture(scope="session")
def cohort(store: Store, tiny: RunConfig) -> Cohort:
    """The two-class store, staged."""
    return Cohort(store, tiny, torch.device("cpu"))


@pytest.fixture(scope="session")
def two_ranks() -> TwoRanks:
    """Run a script as two ranks, `SCRIPT RANK FOLDER WORDS...`, and wait for both: `two_ranks(script, folder, ...)`."""
    return _two_ranks


def _two_ranks(script: str, folder: Path, *words: str, patience_s: float = 180) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    logs = [folder / f"rank-{rank}.log" for rank in (0, 1)]
    started = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-W", "ignore", script, str(rank), str(folder), *words]
        with log.open("w") as file:
            started.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        deadline = time.monotonic() + patience_s
        codes: list[int | None] = [None, None]
        while None in codes and set(codes) <= {None, 0} and time.monotonic() < deadline:  # one that fails strands both
            time.sleep(0.05)
            codes = [process.poll() for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)


def _make_store(
    folder: Path, *, classes: int = 2, subjects: int = 4, slices: int = 6, target_labels: bool = True
) -> Store:
    inputs = []
    for domain in DOMAINS:
        for number in range(subjects):
            image, label = _head(domain, number, classes, slices)
            name = f"{domain}-{number}"
            write(image, folder / f"{name}.nii.gz")
            labelled = domain == "source" or target_labels
            if labelled:
                write(label, folder / f"{name}_label.nii.gz")
            path = folder / f"{name}_label.nii.gz" if labelled else None
            inputs.append(Input(domain, name, folder / f"{name}.nii.gz", path))
    return ingest(inputs, folder / "cohort.zarr", Preprocessing(size=SIZE, spacing_mm=1.0))


def _head(domain: Domain, number: int, classes: int, slices: int) -> tuple[Volume, Volume]:
    """A disc of tissue with one small disc a structure; the target's contrast is reversed and wider."""
    rng = np.random.default_rng([number, DOMAINS.index(domain), classes])
    y, x = np.mgrid[:SIZE, :SIZE]
    label = np.zeros((slices, SIZE, SIZE), dtype=np.uint8)
    image = np.zeros(label.shape)
    for z in range(slices):
        image[z][np.hypot(y - 16, x - 15.5) < 11 + number / 2] = 100
        for structure in range(1, classes):
            centre = 12 + 7 * (structure - 1), 12 + z + number % 2
            label[z][np.hypot(y - centre[0], x - centre[1]) < 4] = structure
    image[label > 0] += 80 * label[label > 0]
    image = image if domain == "source" else 700 - 3 * image
    noisy = np.round(image + rng.normal(0, 8, image.shape)).astype(np.int16)
    geometry = Geometry((SIZE, SIZE, slices), (1.0, 1.0, 3.0), (0.0, 0.0, 0.0))
    return Volume(noisy, geometry), Volume(label, geometry)
