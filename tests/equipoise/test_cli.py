"""The commands, as a user types them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equipoise.record import Record
from equipoise.wandb_file import history
from slicestore.geometry import Geometry
from slicestore.layout import SCHEMA
from slicestore.store import Store
from slicestore.volume import Volume, write

REAL = os.environ.get("EQUIPOISE_REAL_DATA")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"NO_COLOR": "1", "COLUMNS": "200"}


def equipoise(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "equipoise.cli", *map(str, words)]
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    told = " ".join(done.stderr.split())
    assert told.startswith("error: ")
    for part in (*parts, "Remedy: "):
        assert part in told


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """A source volume with its mask, and a target volume; twelve 32 x 32 slices."""
    rng = np.random.default_rng(0)
    geometry = Geometry(size=(32, 32, 12), spacing_mm=(1.0, 1.0, 2.0))
    mask = np.zeros((12, 32, 32), np.uint8)
    mask[2:10, 8:24, 8:24] = 1
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("source", "label", "target")}
    write(Volume((rng.normal(100, 5, mask.shape) + 50 * mask).astype(np.float32), geometry), paths["source"])
    write(Volume(mask, geometry), paths["label"])
    write(Volume((rng.normal(100, 5, mask.shape) - 50 * mask).astype(np.float32), geometry), paths["target"])
    return paths


def prepare(pair: dict[str, Path], store: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return equipoise("prepare", store, "--source", pair["source"], "--source-label", pair["label"],
                     "--target", pair["target"], "--size", 32, "--spacing-mm", 1.0, *more)  # fmt: skip


def test_from_two_volumes_to_a_trained_run_and_on_from_where_it_stopped(pair: dict[str, Path], tmp_path: Path) -> None:
    store, run = tmp_path / "cohort.zarr", tmp_path / "run"
    done = prepare(pair, store)
    assert done.returncode == 0, done.stderr
    assert "no source subject is left to validate on" in done.stdout
    settings = ("--net.width", 0.0625, "--batch", 2, "--evaluations", 2, "--steps", 6)
    done = equipoise("train", store, run, *settings, "--wandb", "offline")
    assert done.returncode == 0, done.stderr
    assert "stable after 6 of 6 steps" in done.stdout
    assert [row["step"] for row in Record(run).rows()] == [1, 2, 3, 4, 5, 6]
    (log,) = run.glob("wandb/wandb/offline-run-*/*.wandb")
    assert history(log)[-1]["loss/cycle_t"] == pytest.approx(Record(run).rows()[-1]["loss/cycle_t"])
    again = equipoise("train", store, run, *settings, "--wandb", "disabled")
    assert again.returncode == 0
    assert [row["step"] for row in Record(run).rows()] == [1, 2, 3, 4, 5, 6]
    refused(equipoise("train", store, run, *settings, "--optim.lr", 1e-3), "optim.lr was 0.0002, is 0.001")


def test_a_batch_of_more_slices_than_there_are_is_refused(pair: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "cohort.zarr"
    prepare(pair, store)
    done = equipoise("train", store, tmp_path / "run", "--batch", 64, "--net.width", 0.0625)
    refused(done, str(store), "found 12 source training slices", "a batch takes 64", "set batch to at most 12")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "break_it", "parts"),
    [
        ("missing", lambda v: None, ("found no such file",)),
        ("nan", lambda v: np.where(v == v.max(), np.nan, v), ("1 NaN or infinite voxels", "finite number")),
        ("flat", lambda v: v[0], ("2D image of size 32 x 32", "three axes")),
        ("series", lambda v: np.stack([v, v]), ("found 2 volumes", "0 to 1: `--component`")),
    ],
)
def test_a_bad_volume_is_refused_by_name_and_nothing_is_left(
    pair: dict[str, Path], tmp_path: Path, name: str, break_it: object, parts: tuple[str, ...]
) -> None:
    import SimpleITK as sitk

    voxels = break_it(sitk.GetArrayFromImage(sitk.ReadImage(pair["target"])))  # type: ignore[operator]
    pair["target"] = tmp_path / f"{name}.nii.gz"
    if voxels is not None:
        sitk.WriteImage(sitk.GetImageFromArray(voxels.astype(np.float32), isVector=False), pair["target"])
    done = prepare(pair, tmp_path / "cohort.zarr")
    refused(done, str(pair["target"]), *parts)
    assert not (tmp_path / "cohort.zarr").exists()


def test_a_mask_on_another_grid_is_refused(pair: dict[str, Path], tmp_path: Path) -> None:
    geometry = Geometry(size=(32, 32, 12), spacing_mm=(1.0, 1.0, 2.0), origin_mm=(0.0, 5.0, 0.0))
    write(Volume(np.ones((12, 32, 32), np.uint8), geometry), pair["label"])
    refused(prepare(pair, tmp_path / "cohort.zarr"), str(pair["label"]), "origin", "grid")
    assert not (tmp_path / "cohort.zarr").exists()


def test_an_empty_folder_is_refused(pair: dict[str, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = equipoise("prepare", tmp_path / "c.zarr", "--source", empty, "--target", empty)
    refused(done, str(empty))
    assert not (tmp_path / "c.zarr").exists()


def test_a_store_of_another_schema_is_refused(pair: dict[str, Path], tmp_path: Path) -> None:
    """Readers trust the manifest; who writes looks at what the folder says it is."""
    store = tmp_path / "cohort.zarr"
    prepare(pair, store)
    for file, key in (("zarr.json", "slicestore"), ("manifest.json", "schema")):
        text = (store / file).read_text()
        (store / file).write_text(re.sub(rf'"{key}":( ?){SCHEMA}', f'"{key}": 99', text))
    refused(equipoise("train", store, tmp_path / "run", "--steps", 1), str(store), "schema 99", f"schema {SCHEMA}")
    refused(prepare(pair, store), str(store), "schema 99", f"schema {SCHEMA}")
    assert not (tmp_path / "run").exists()


def test_prepare_wants_a_table_or_both_domains(tmp_path: Path) -> None:
    refused(equipoise("prepare", tmp_path / "c.zarr", "--source", tmp_path), "volumes come from --table")


def test_doctor_names_what_is_installed() -> None:
    done = equipoise("doctor")
    assert done.returncode == 0
    for word in ("torch 2.", "ray 2.", "optuna 5.", "GPUs: ", "W&B "):
        assert word in done.stdout


@pytest.mark.skipif(not REAL, reason="EQUIPOISE_REAL_DATA is not set")
def test_real_angiography_becomes_a_store_and_trains(tmp_path: Path) -> None:
    data, store, run = Path(str(REAL)), tmp_path / "cohort.zarr", tmp_path / "run"
    done = equipoise("prepare", store, "--source", data / "topcow_tof.mha", "--source-label",
                     data / "topcow_tof_vessels.nii.gz", "--target", data / "romeo_swi.nii.gz",
                     "--size", 144, "--spacing-mm", 0.297)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [e.slices for e in Store.open(store).entries] == [34, 41]
    done = equipoise("train", store, run, "--steps", 20, "--net.width", 0.0625, "--batch", 2, "--evaluations", 1,
                     "--wandb", "disabled")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(np.isfinite(list(row.values())).all() for row in Record(run).rows())
    (picture,) = Record(run).pictures()
    rows = np.asarray(Image.open(picture).convert("RGB"), dtype=float)[:, 64:].reshape(9, 144, -1, 3)
    truth = rows[1]
    red = truth[..., 0] > truth[..., 1] + 20  # the mask's overlay
    assert 0.005 < red.mean() < 0.2
    assert rows[0][..., 0][red].mean() > 3 * rows[0][..., 0][~red].mean()  # it lies on bright vessels
