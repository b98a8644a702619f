"""`equipoise prepare` and `equipoise store`, run as typed: what is taken, what is told, and with which exit code."""

import itertools
import locale
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import boto3
import numpy as np
import pytest
import SimpleITK as sitk
from moto.server import ThreadedMotoServer

from equipoise import cli
from slicestore.geometry import Geometry
from slicestore.settings import PRESETS
from slicestore.store import Store
from slicestore.volume import Volume, write

Run = Callable[..., tuple[int, str]]
SMALL = ("--size", 16, "--spacing-mm", 1.0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Type `equipoise ...`; exit code, and all that was printed with its white space evened out."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def typed(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["equipoise", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, " ".join((printed.out + printed.err).split())

    return typed


def head(seed: int, *, angle: float = 0.0) -> tuple[Volume, Volume]:
    """Five slices of 24 x 20 voxels of half a millimetre with a block in them; its axes turned about z by `angle`."""
    label = np.zeros((5, 24, 20), dtype=np.uint8)
    label[1:4, 6:14, 4:12] = 1
    image = np.random.default_rng(seed).normal(100, 10, label.shape) + 200 * label
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    grid = Geometry((20, 24, 5), (0.5, 0.5, 2.0), direction=(c, -s, 0.0, s, c, 0.0, 0.0, 0.0, 1.0))
    return Volume(np.round(image).astype(np.int16), grid), Volume(label, grid)


def put(volume: Volume, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(volume, path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Folders `tof` (three heads with masks) and `swi` (two without, one of them turned by 20 degrees)."""
    for number in range(3):
        image, label = head(number)
        put(image, tmp_path / "tof" / f"jane{number}.nii.gz")
        put(label, tmp_path / "tof" / f"jane{number}_vessel.nii.gz")
    for number in range(2):
        put(head(10 + number, angle=20.0 * number)[0], tmp_path / "swi" / f"john{number}.nii.gz")
    return tmp_path


def prepared(run: Run, folders: Path, *more: object) -> tuple[Path, str]:
    store = folders / "cohort.zarr"
    code, told = run("prepare", store, "--source", folders / "tof", "--target", folders / "swi", "--mask", "vessel",
                     *SMALL, "--processes", 1, *more)  # fmt: skip
    assert code == 0, told
    return store, told


def test_preparing_tells_what_became_of_every_label(run: Run, folders: Path) -> None:
    _, told = prepared(run, folders)
    assert "source: 3 volumes, 15 slices of 16 x 16; subjects: 1 train, 1 val, 1 test" in told
    assert told.count("│ 1 │ 100.0% │ 1 → 1 │") == 3  # class 1: its volume, its pieces; a block has no centreline
    assert "20° oblique: its slices are not axial" in told
    assert told.count("oblique") == 1
    assert "jane" not in told
    assert "john" not in told


def test_brain_becomes_a_class_beside_the_vessels(run: Run, folders: Path) -> None:
    line = ("prepare", folders / "b.zarr", "--source", folders / "tof", "--target", folders / "swi", "--mask", "vessel",
            *SMALL, "--processes", 1, "--brain-class", 2)  # fmt: skip
    code, told = run(*line)
    assert code == 2
    assert "tof/jane0.nii.gz: found no brain mask; brain_class needs the brain mask of every labelled" in told
    assert not (folders / "b.zarr").exists()
    for number in range(3):  # the targets have no label, and need none
        image, label = head(number)
        brain = np.zeros_like(label.voxels)
        brain[:, 2:22, 2:18] = 1
        put(Volume(brain, image.geometry), folders / "tof" / f"jane{number}_brain_mask.nii.gz")
    code, told = run(*line)
    assert code == 0, told
    assert told.count("│ 1 │ 100.0% │ 1 → 1 │") == told.count("│ 2 (brain) │ 100.0% │ 1 → 1 │") == 3
    assert f"{folders / 'b.zarr'}: 3 classes" in told
    assert "brain_class 2" in run("store", "info", folders / "b.zarr")[1]


def test_preparing_again_keeps_all(run: Run, folders: Path) -> None:
    store, _ = prepared(run, folders)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    prepared(run, folders)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_two_processes_make_the_store_that_one_makes(run: Run, folders: Path) -> None:
    store, _ = prepared(run, folders)
    other = folders / "other.zarr"
    code, told = run("prepare", other, "--source", folders / "tof", "--target", folders / "swi", "--mask", "vessel",
                     *SMALL, "--processes", 2)  # fmt: skip
    assert code == 0, told
    assert "5/5" in told
    made = {path.relative_to(other): path.read_bytes() for path in other.rglob("*") if path.is_file()}
    assert made == {path.relative_to(store): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_single_settings_depart_from_the_preset(run: Run, folders: Path) -> None:
    store, _ = prepared(run, folders, "--preset", "seed2022")
    assert Store.open(store).preprocessing == replace(PRESETS["seed2022"], size=16, spacing_mm=1.0)
    prepared(run, folders, "--preset=seed2022", "--centre", "foreground")
    assert Store.open(store).preprocessing.centre == "foreground"
    prepared(run, folders)
    assert Store.open(store).preprocessing == replace(PRESETS["recommended"], size=16, spacing_mm=1.0)


def test_every_preset_can_be_typed() -> None:
    assert set(get_args(get_type_hints(cli.prepare)["preset"])) == set(PRESETS)


def test_the_key_goes_where_it_is_told_to(run: Run, folders: Path) -> None:
    store, _ = prepared(run, folders, "--key-file", folders / "safe.json")
    assert "jane0" in (folders / "safe.json").read_text()
    assert not store.with_name("cohort.zarr.key.json").exists()


def test_a_bids_data_set_is_a_cohort(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "bids"
    for number in (1, 2):
        image, label = head(number)
        put(image, root / f"sub-0{number}" / "anat" / f"sub-0{number}_angio.nii.gz")
        put(label, root / "derivatives" / "v" / f"sub-0{number}" / "anat" / f"sub-0{number}_desc-vessel_mask.nii.gz")
        put(head(5 + number)[0], root / f"sub-0{number}" / "swi" / f"sub-0{number}_swi.nii.gz")
    code, told = run("prepare", tmp_path / "c.zarr", "--bids", root, "--mask", "vessel", *SMALL, "--processes", 1)
    assert code == 0, told
    assert [(e.subject, e.labelled) for e in Store.open(tmp_path / "c.zarr").entries] == [
        ("s000", True), ("s001", True), ("t000", False), ("t001", False),
    ]  # fmt: skip
    code, told = run("prepare", tmp_path / "d.zarr", "--bids", root, "--bids-filter", "acq", "x", "--processes", 1)
    assert code == 2
    assert "'acq': 'x'" in told


def test_folders_of_dicom_files_are_volumes(run: Run, folders: Path) -> None:
    before = locale.setlocale(locale.LC_ALL)
    voxels = np.random.default_rng(0).integers(0, 500, (6, 20, 16)).astype(np.int16)
    for z, plane in enumerate(voxels):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing((0.5, 0.5, 2.0))
        image.SetOrigin((0, 0, 2.0 * z))
        tags = {"0008|0060": "MR", "0020|000d": "1.2.3", "0020|000e": "1.2.3.4", "0020|0037": r"1\0\0\0\1\0",
                "0020|0032": rf"0\0\{2.0 * z}", "0018|0050": "2", "0020|0013": str(z)}  # fmt: skip
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        (folders / "scan").mkdir(exist_ok=True)
        writer.SetFileName(str(folders / "scan" / f"{9 - z}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, before)  # ITK's DICOM writer leaves "C" behind, and other tests read UTF-8
    store = folders / "c.zarr"
    code, told = run("prepare", store, "--source", folders / "tof", "--mask", "vessel", "--target", folders / "scan",
                     *SMALL, "--processes", 1)  # fmt: skip
    assert code == 0, told
    (target,) = Store.open(store).select("target")
    assert target.slices == 6


OPTIONS = {
    "both": (("--table", "t.csv", "--bids", "b"), "--table, from --bids, or from --source and --target"),
    "none": ((), "--table, from --bids, or from --source and --target"),
    "half": (("--source", "tof"), "--table, from --bids, or from --source and --target"),
    "component": (("--table", "t.csv", "--component", 1), "--component where it has no effect"),
    "filter": (("--table", "t.csv", "--bids-filter", "ses", "1"), "--bids-filter where it has no effect"),
    "label": (("--source", "tof", "--target", "swi", "--source-label", "x"), "--source-label where it has no effect"),
    "address": (("--source", "tof", "--target", "swi", "--mask", "vessel", "--address", "auto", "--processes", 2),
                "--processes and --address"),
    "processes": (("--source", "tof", "--target", "swi", "--mask", "vessel", "--processes", 0), "found 0"),
    "gone": (("--source", "tof", "--target", "swi", "--mask", "vessel", "--address", "127.0.0.1:1"),
             "a Ray cluster listens at the address"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_take_effect_are_refused(
    run: Run, folders: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(folders)
    words, message = OPTIONS[name]
    code, told = run("prepare", "c.zarr", *words)
    assert code == 2
    assert message in told
    assert "Remedy: " in told
    assert not (folders / "c.zarr").exists()


# --- equipoise store --------------------------------------------------------------------------------------------------


def test_info_tells_what_a_store_holds(run: Run, folders: Path) -> None:
    store, _ = prepared(run, folders, "--pad", "zero")
    code, told = run("store", "info", store)
    assert code == 0
    opened = Store.open(store)
    low, high = opened.limits("source")
    for part in (
        "source: 3 volumes, 15 slices of 16 x 16",
        "target: 2 volumes, 10 slices",
        "2 classes",
        f"fingerprint {opened.fingerprint[:12]}",
        "schema 2",
        # 15 labelled slices of 3 bytes a pixel and 10 of 2: 16 * 16 * (15 * 3 + 10 * 2) = 16 640
        "16.6 kB in memory",
        "preprocessing: size 16, spacing_mm 1.0, pad zero",
        f"limits, source: {low:.2f} to {high:.2f} standard deviations",
        "100.0%",
    ):
        assert part in told
    assert "jane" not in told


def test_verify_passes_an_intact_store_and_names_what_is_broken(run: Run, folders: Path) -> None:
    store, _ = prepared(run, folders)
    code, told = run("store", "verify", store)
    assert code == 0
    assert "5 volumes, 25 slices" in told
    assert told.endswith("every byte read intact")
    entry = Store.open(store).select("source")[1]
    shard = store / entry.group / "label" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[20] ^= 4
    shard.write_bytes(data)
    code, told = run("store", "verify", store)
    assert code == 1
    assert "broken: source subject s001: " in told
    assert "Remedy: run `equipoise prepare` again with the same inputs" in told
    code, told = run("store", "verify", store, "--quick")  # sizes are as they were
    assert code == 0
    assert "names and sizes read" in told
    prepared(run, folders)
    assert run("store", "verify", store)[0] == 0


def test_what_is_no_store_is_refused(run: Run, folders: Path) -> None:
    for command in (("verify",), ("info",), ("export", folders / "out")):
        code, told = run("store", command[0], folders / "tof", *command[1:])
        assert code == 2
        assert told.startswith(f"error: {folders / 'tof'}: ")


def test_export_and_import_are_each_other_s_inverse(run: Run, folders: Path) -> None:
    store, _ = prepared(run, folders)
    code, told = run("store", "export", store, folders / "out", "--format", "tfrecord")
    assert code == 0
    assert f"{folders / 'out'}: 25 files" in told
    lists = {}
    for domain in ("source", "target"):
        lists[domain] = folders / "out" / f"all_{domain}.txt"
        lists[domain].write_text("".join(part.read_text() for part in (folders / "out").glob(f"{domain}_*.txt")))
    again = folders / "again.zarr"
    line = ("store", "import", again, "--source", lists["source"], "--target", lists["target"], "--processes", 1)
    code, told = run(*line)
    assert code == 2
    assert "give a regular expression that finds the subject" in told
    code, told = run(*line, "--subject", r"^([st]\d+)_")
    assert code == 0, told
    before, after = Store.open(store), Store.open(again)
    for old, new in itertools.zip_longest(before.entries, after.entries):
        np.testing.assert_array_equal(after.read(new, "image"), before.read(old, "image"))
    assert run("store", "info", again)[1].count("geometry unknown") == 5


def test_masks_are_exported_in_the_scan_s_grid(run: Run, folders: Path) -> None:
    store, _ = prepared(run, folders)
    code, told = run("store", "export", store, folders / "out", "--grid", "raw")
    assert code == 0
    assert "3 files" in told
    mask = sitk.ReadImage(folders / "out" / "source" / "s000_label.nii.gz")
    assert mask.GetSize() == (20, 24, 5)


# --- a store in S3 ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real S3 server on loopback, to which the environment leads."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "a",
                "AWS_SECRET_ACCESS_KEY": "b"}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="angiography")
    client.close()
    yield "s3://angiography/cohort.zarr"
    server.stop()


def test_a_store_in_s3_is_made_looked_over_and_trained_on(run: Run, folders: Path, bucket: str) -> None:
    code, told = run("prepare", bucket, "--source", folders / "tof", "--target", folders / "swi", "--mask", "vessel",
                     *SMALL, "--processes", 2, "--key-file", folders / "key.json")  # fmt: skip
    assert code == 0, told
    assert "s3://angiography/cohort.zarr: 2 classes" in told
    local, _ = prepared(run, folders, "--key-file", folders / "key.json")
    assert Store.open(bucket).fingerprint == Store.open(local).fingerprint
    code, told = run("store", "verify", bucket)
    assert code == 0
    assert told.endswith("every byte read intact")
    code, told = run("train", bucket, folders / "run", "--steps", 2, "--evaluations", 1, "--batch", 2, "--net.width",
                     0.0625, "--wandb", "disabled")  # fmt: skip
    assert code == 0, told
    assert "after 2 of 2 steps" in told
