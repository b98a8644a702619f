"""The commands, as a user types them."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise import cli, speed
from equipoise.config import PRESETS, RunConfig
from equipoise.launch import local
from equipoise.record import Record
from equipoise.store_cli import later
from equipoise.wandb_file import history
from slicestore.geometry import Geometry
from slicestore.layout import SCHEMA
from slicestore.store import Store
from slicestore.volume import Volume, read, write

REAL = os.environ.get("EQUIPOISE_REAL_DATA")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"NO_COLOR": "1", "COLUMNS": "200"}


def equipoise(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "equipoise.cli", *map(str, words)]
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=False)


Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, command: Typed) -> Typed:
    """Type `equipoise ...` in this process, which is on a CPU: seconds sooner than in one of its own."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(local, "device_here", lambda: torch.device("cpu"))
    return command


def told(done: subprocess.CompletedProcess[str]) -> str:
    """All that was printed, its frames and line ends taken out."""
    return " ".join((done.stdout + done.stderr).replace("│", " ").split())


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


def prepare(typed: Typed, pair: dict[str, Path], store: Path) -> subprocess.CompletedProcess[str]:
    return typed("prepare", store, "--source", pair["source"], "--source-label", pair["label"],
                 "--target", pair["target"], "--size", 32, "--spacing-mm", 1.0, "--processes", 1)  # fmt: skip


def test_from_two_volumes_to_a_trained_run_and_on_from_where_it_stopped(
    typed: Typed, pair: dict[str, Path], tmp_path: Path
) -> None:
    store, run = tmp_path / "cohort.zarr", tmp_path / "run"
    done = prepare(typed, pair, store)
    assert done.returncode == 0, done.stderr
    assert "no source subject is left to validate on" in done.stdout
    settings = ("--net.width", 0.0625, "--batch", 2, "--evaluations", 2, "--steps", 6)
    done = equipoise("train", store, run, *settings, "--wandb", "offline", "--tensorboard")
    assert done.returncode == 0, done.stderr
    assert "stable after 6 of 6 steps" in done.stdout
    assert re.search(r"step 3/6, [\d.]+ steps/s, 0:00:\d\d left, .*; panels: .*step-000003\.png", done.stdout)
    assert [row["step"] for row in Record(run).rows()] == [1, 2, 3, 4, 5, 6]
    assert list(run.glob("tensorboard/run/events*"))
    assert not [path for path in run.rglob("*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()]
    (log,) = run.glob("wandb/wandb/offline-run-*/*.wandb")
    assert history(log)[-1]["loss/cycle_t"] == pytest.approx(Record(run).rows()[-1]["loss/cycle_t"])
    again = typed("train", store, run, *settings, "--wandb", "disabled")
    assert again.returncode == 0
    assert [row["step"] for row in Record(run).rows()] == [1, 2, 3, 4, 5, 6]
    refused(typed("train", store, run, *settings, "--optim.lr", 1e-3), "optim.lr was 0.0002, is 0.001")


def test_a_batch_of_more_slices_than_there_are_is_refused(typed: Typed, pair: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "cohort.zarr"
    prepare(typed, pair, store)
    done = typed("train", store, tmp_path / "run", "--batch", 64, "--net.width", 0.0625)
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
    typed: Typed, pair: dict[str, Path], tmp_path: Path, name: str, break_it: object, parts: tuple[str, ...]
) -> None:
    import SimpleITK as sitk

    voxels = break_it(sitk.GetArrayFromImage(sitk.ReadImage(pair["target"])))  # type: ignore[operator]
    pair["target"] = tmp_path / f"{name}.nii.gz"
    if voxels is not None:
        sitk.WriteImage(sitk.GetImageFromArray(voxels.astype(np.float32), isVector=False), pair["target"])
    done = prepare(typed, pair, tmp_path / "cohort.zarr")
    refused(done, str(pair["target"]), *parts)
    assert not (tmp_path / "cohort.zarr").exists()


def test_a_mask_on_another_grid_is_refused(typed: Typed, pair: dict[str, Path], tmp_path: Path) -> None:
    geometry = Geometry(size=(32, 32, 12), spacing_mm=(1.0, 1.0, 2.0), origin_mm=(0.0, 5.0, 0.0))
    write(Volume(np.ones((12, 32, 32), np.uint8), geometry), pair["label"])
    refused(prepare(typed, pair, tmp_path / "cohort.zarr"), str(pair["label"]), "origin", "grid")
    assert not (tmp_path / "cohort.zarr").exists()


def test_an_empty_folder_is_refused(typed: Typed, pair: dict[str, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = typed("prepare", tmp_path / "c.zarr", "--source", empty, "--target", empty)
    refused(done, str(empty))
    assert not (tmp_path / "c.zarr").exists()


def test_a_store_of_another_schema_is_refused(typed: Typed, pair: dict[str, Path], tmp_path: Path) -> None:
    """Readers trust the manifest; who writes looks at what the folder says it is."""
    store = tmp_path / "cohort.zarr"
    prepare(typed, pair, store)
    for file, key in (("zarr.json", "slicestore"), ("manifest.json", "schema")):
        text = (store / file).read_text()
        (store / file).write_text(re.sub(rf'"{key}":( ?){SCHEMA}', f'"{key}": 99', text))
    refused(typed("train", store, tmp_path / "run", "--steps", 1), str(store), "schema 99", f"schema {SCHEMA}")
    refused(prepare(typed, pair, store), str(store), "schema 99", f"schema {SCHEMA}")
    assert not (tmp_path / "run").exists()


# --- the settings of a run, as typed ----------------------------------------------------------------------------------


@pytest.fixture
def run(
    typed: Typed, pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunConfig]:
    """Type `equipoise train STORE FOLDER ...` and give the settings with which training would have begun."""
    begun: list[RunConfig] = []
    monkeypatch.setattr(cli, "_train_here", lambda console, record, run, store, keeping: begun.append(run))
    store = tmp_path / "cohort.zarr"
    done = prepare(typed, pair, store)
    assert done.returncode == 0, told(done)

    def settings(*words: object) -> RunConfig:
        done = typed("train", store, tmp_path / "run", "--wandb", "disabled", *words)
        assert done.returncode == 0, told(done)
        return begun.pop()

    return settings


def test_every_preset_of_a_run_can_be_typed() -> None:
    assert set(get_args(get_type_hints(cli.train)["preset"])) == set(PRESETS)


def test_a_run_is_the_published_one_but_for_what_is_typed(run: Callable[..., RunConfig]) -> None:
    bound = run()
    assert bound == PRESETS["published"].at("data.cohort", bound.data.cohort)
    assert bound.data.cohort
    assert run("--loss.cycle", 5) == bound.at("loss.cycle", 5)


def test_single_settings_depart_from_the_preset(run: Callable[..., RunConfig]) -> None:
    cohort = run().data.cohort
    for words in (("--preset", "v1"), ("--preset=v1",)):
        assert run(*words, "--optim.lr", 1e-3) == PRESETS["v1"].at("data.cohort", cohort).at("optim.lr", 1e-3)
    assert run("--batch", 2, "--preset", "study2022") == (
        PRESETS["study2022"].at("data.cohort", cohort).at("batch", 2)
    )  # fmt: skip


def test_the_help_tells_the_defaults_of_the_preset(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # for a single column
    for preset, epoch in (("published", 0), ("v1", 5)):
        done = typed("train", "--help", "--preset", preset)
        assert done.returncode == 0
        assert f"5 in v1. See `optim.epoch_steps`. (default: {epoch})" in told(done)


def test_the_classes_are_the_stores_unless_others_are_typed(
    typed: Typed, pair: dict[str, Path], run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    label = read(pair["label"])
    label.voxels[3:6, 10:14, 10:14] = 2
    write(label, pair["label"])
    store = tmp_path / "three.zarr"
    assert prepare(typed, pair, store).returncode == 0
    words = ("--data.cohort", "", "--wandb", "disabled")
    for classes, typed_so in ((2, ("--net.classes", 2)), (2, ("--net.classes=2",)), (4, ("--net.classes", 4))):
        done = typed("train", store, tmp_path / "other", *words, *typed_so)  # 2 is the default
        refused(done, f"error: {store}: found 3 classes; net.classes is {classes}.", "set net.classes to 3")
        assert not (tmp_path / "other").exists()
    assert run().net.classes == run("--net.classes", 2).net.classes == 2
    assert typed("train", store, tmp_path / "other", *words).returncode == 0
    assert typed("train", store, tmp_path / "other", *words, "--net.classes", 3).returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--optim.lr", "-1"), "optim.lr = -1.0: must be positive"),
        (("--batch", 1), "error: batch = 1: batch norm needs at least 2 slices"),
        (("--batch", 3, "--workers", 2), "error: batch = 3: must be a multiple of workers (2)"),
        (("--loss.adv-p-from-epoch", 9), "loss.adv_p_full_epoch = 0: must not come before loss.adv_p_from_epoch (9)"),
        (("--optim.lrr", 1), "Unrecognized options: --optim.lrr"),
        (("--optim.lr", "high"), "Error parsing --optim.lr: could not convert string to float: 'high'"),
        (
            ("--net.head-stride", 3),
            "invalid choice '3' for argument '--net.head-stride'. Expected one of ('8', '4', '2')",
        ),
        (("--preset", "v7"), "invalid choice 'v7' for argument '--preset'"),
        (("--preset",), "Missing value for argument '--preset'"),
        (("--speed.graphs",), "error: speed.graphs: found True on cpu"),
        (("--speed.precision", "tf32"), "error: speed.precision: found tf32 on cpu"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_begun(
    typed: Typed, run: Callable[..., RunConfig], tmp_path: Path, words: tuple[object, ...], said: str
) -> None:
    done = typed("train", tmp_path / "cohort.zarr", tmp_path / "run", "--wandb", "disabled", *words)
    assert done.returncode == 2
    assert said in told(done)
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_program_keeps_its_traceback(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    def doctor() -> None:
        raise ValueError("a mistake of ours")

    monkeypatch.setitem(cli.COMMANDS, "doctor", later(doctor))
    with pytest.raises(ValueError, match="a mistake of ours"):
        typed("doctor")


@pytest.mark.parametrize("words", [(), ("trian",)])
def test_what_is_no_command_is_answered_with_the_commands(typed: Typed, words: tuple[str, ...]) -> None:
    done = typed(*words)
    assert done.returncode == 2
    names = "prepare, store, phantom, train, study, report, dashboard, sync, workspace, diagnose, predict, translate"
    assert f"{names}, evaluate, export, doctor" in told(done)


def test_prepare_wants_a_table_or_both_domains(typed: Typed, tmp_path: Path) -> None:
    refused(typed("prepare", tmp_path / "c.zarr", "--source", tmp_path), "volumes come from --table")


def test_doctor_names_what_is_installed(typed: Typed) -> None:
    done = typed("doctor")
    assert done.returncode == 0
    for word in ("torch 2.", "ray 2.", "optuna 5.", "GPUs: ", "W&B "):
        assert word in done.stdout


def test_doctor_says_which_ways_of_computing_there_are(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "compiler", lambda: None)
    monkeypatch.setattr(speed, "bfloat16", lambda device: True)
    done = typed("doctor")
    assert done.returncode == 0
    assert "--speed.precision bfloat16: yes" in told(done)
    assert "--speed.precision tf32: no; NVIDIA has it since Ampere" in told(done)
    assert "--speed.compile: no; torch.compile needs a C++ compiler" in told(done)
    assert "--speed.graphs: no; CUDA graphs need a CUDA device" in told(done)


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
