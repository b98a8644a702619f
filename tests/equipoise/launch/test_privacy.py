"""Whatever a study writes and sends, it names no patient, no user, no machine and no folder.

One cohort whose patients are named wherever a name can stand, prepared, searched, shown and sent to W&B under a host, a
user and folders with names of their own; then every byte is searched for what all these names have in common. (More of
DICOM's headers, dates among them, is searched for where stores are tested.)

Two files are exempt, and both stay where they are: the store's key, which leads from pseudonyms back, and `local.json`,
by which a study finds its store again.
"""

from __future__ import annotations

import csv
import gzip
import os
import secrets
import shlex
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import nibabel
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage
from wandb_server import serving

from equipoise.keeping import Keeping
from equipoise.launch.ray_tune import _placeless
from equipoise.wandb_file import records
from slicestore.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
SCRIPT = Path(__file__).with_name("tiny_study.py")
SECRET = secrets.token_hex(4)
"""Part of every name. Made anew: a run keeps what git has not committed, which may be of this file."""
UID = f"1.2.826.0.1.3680043.8.498.{secrets.randbelow(10**20)}"
PATIENT, HOST, USER = f"Doe-{SECRET}", f"host-{SECRET}", f"user{SECRET}"
RAW, HOME, RESULTS, STORES = (f"{name}-{SECRET}" for name in ("raw", "home", "results", "stores"))
EXEMPT = ("cohort.zarr.key.json", "local.json")


def test_nothing_that_is_written_or_sent_names_a_patient_a_user_a_machine_or_a_folder(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    home, results, store = tmp_path / HOME, tmp_path / RESULTS, tmp_path / STORES / "cohort.zarr"
    table = planted(make_store(tmp_path / "heads").path.parent, tmp_path / RAW)
    home.mkdir()
    store.parent.mkdir()
    with serving() as server:
        online = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url}
        said = as_somebody_else(
            home, online,
            [sys.executable, "-m", "equipoise.cli", "prepare", str(store), "--table", str(table), "--mask", "label",
             "--size", "32", "--spacing-mm", "1.0"],
            [sys.executable, str(SCRIPT), "--store", str(store), "--results", str(results), "--points", "1",
             "--steps", "4", "--confirm-workers", "0", "--tensorboard", "--wandb", "online"],
        )  # fmt: skip
        masked = {entry.split for entry in Store.open(store).select("target") if entry.labelled}
        said += as_somebody_else(
            home, online,
            [sys.executable, "-m", "equipoise.cli", "export", str(results / "tiny"), str(results / "model")],
            [sys.executable, "-m", "equipoise.cli", "evaluate", str(results / "tiny"), str(store),
             "-o", str(results / "test"), "--part", "test" if "test" in masked else "val"],
            [sys.executable, "-m", "equipoise.cli", "predict", str(results / "model"),
             str(table.parent / f"{PATIENT}-target1.nii.gz"), "-o", str(tmp_path / "masks")],
        )  # fmt: skip
        sent = [*server.sent, *map(str.encode, server.heads)]
    study = results / "tiny"
    assert all((results / name).is_file() for name in ("tiny/report.html", "model/README.md"))
    assert list((results / "test").rglob("subjects.csv"))
    (mask,) = (tmp_path / "masks").iterdir()  # named like its scan
    assert not names("", gzip.decompress(mask.read_bytes()))
    assert list(study.glob("tensorboard/*/events*"))
    assert server.runs
    assert not any(b"\x89PNG" in body for body in sent)  # nobody asked for images to be sent
    found = [place for place, content in everything([store.parent, results, home], sent) if names(place, content)]
    assert not found, found
    for name in EXEMPT:  # and there it would be found
        (path,) = tmp_path.glob(f"*-{SECRET}/**/{name}")
        assert names("", path.read_bytes())
    for told in (str(store), str(results), f"{PATIENT}-target1.nii.gz"):  # to the user: what was asked for
        said = said.replace(told, "")
    assert not names("", said.encode()), said


def test_why_a_point_was_given_up_is_kept_without_the_user_s_folders() -> None:
    job = {
        "store": f"/data/{SECRET}/c.zarr",
        "runs": f"/home/{SECRET}/one/runs",
        "keeping": Keeping(copies=f"/nfs/{SECRET}"),
    }
    why = f"/home/{SECRET}/one/runs/0001/signals.jsonl: of /data/{SECRET}/c.zarr, copied to {job['keeping'].copies}: no"
    assert _placeless(why, job) == "STUDY/runs/0001/signals.jsonl: of STORE, copied to COPIES: no"
    assert _placeless("[Errno 13] '/home/alice/.cache/x.bin': 3/4", job) == "[Errno 13] '.../x.bin': 3/4"
    assert _placeless("", job) == ""


def planted(heads: Path, raw: Path) -> Path:
    """Raw volumes under the patients' names, in file names, headers and the table; the table."""
    raw.mkdir()
    rows = []
    for path in sorted(heads.glob("*[0-9].nii.gz")):
        domain, number = path.name.removesuffix(".nii.gz").split("-")
        subject = f"{PATIENT}-{domain}{number}"
        if domain == "target" and number == "0":
            series(nibabel.load(path), raw / subject)
            rows.append([subject, domain, subject, ""])
            continue
        label = path.with_name(f"{domain}-{number}_label.nii.gz")
        for name, source in ((f"{subject}.nii.gz", path), (f"{subject}_label.nii.gz", label)):
            image = nibabel.load(source)
            image.header["descrip"] = PATIENT.encode()
            image.header["intent_name"] = PATIENT.encode()
            nibabel.save(image, raw / name)
        rows.append([subject, domain, f"{subject}.nii.gz", f"{subject}_label.nii.gz"])
    table = raw / f"{PATIENT}.csv"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([["subject", "domain", "image", "label"], *rows])
    return table


def series(image: nibabel.Nifti1Image, folder: Path) -> None:
    """The volume as a scanner exports it: a folder of slices, each with the patient's name in it."""
    folder.mkdir()
    named = ("PatientName", "PatientID", "InstitutionName", "StudyDescription", "ReferringPhysicianName")
    for number, pixels in enumerate(image.get_fdata().astype("<i2").T):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = MRImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"{UID}.{number}"
        elements = dict.fromkeys(named, PATIENT) | {
            "StudyInstanceUID": UID, "SeriesInstanceUID": f"{UID}.0", "Modality": "MR",
            "Rows": pixels.shape[0], "Columns": pixels.shape[1], "PixelSpacing": [1, 1],
            "ImagePositionPatient": [0, 0, 3 * number], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16,
            "HighBit": 15, "PixelRepresentation": 1, "PixelData": pixels.tobytes(),
        }  # fmt: skip
        for name, value in elements.items():
            setattr(data, name, value)
        data.save_as(folder / f"{PATIENT}-{number}.dcm", enforce_file_format=True)


def as_somebody_else(home: Path, more: dict[str, str], *commands: list[str]) -> str:
    """Run commands as a user on a host of other names; what they print."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | more
    environment |= {"HOME": str(home), "USER": USER, "LOGNAME": USER, "RAY_AUTH_MODE": "disabled", "NO_COLOR": "1"}
    environment["PYTHONUTF8"] = "1"
    script = " && ".join(shlex.join(command) for command in commands)
    renamed = ["unshare", "--uts", "sh", "-c", f"hostname {HOST} && {script}"]
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False).returncode:
        renamed = ["sh", "-c", script]  # the host keeps its name where one may not change it
    done = subprocess.run(renamed, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def everything(roots: list[Path], sent: list[bytes]) -> Iterator[tuple[str, bytes]]:
    """All that was written, by its place below the folders that a user named, and all that was sent."""
    for root in roots:
        for path in sorted(root.rglob("*")):
            place = str(path.relative_to(root))
            if path.is_file() and path.name not in EXEMPT:
                yield place, path.read_bytes()
                if path.suffix == ".wandb":
                    yield place, b"".join(record.SerializeToString() for record in records(path))
    for number, body in enumerate(sent):
        yield f"request {number}", body
        with suppress(zlib.error):  # what is unpacked already, as the server does with gzip
            yield f"request {number}", zlib.decompress(body.partition(b" ")[2])


def names(place: str, content: bytes) -> bool:
    """Whether this holds what is part of every name, or a UID."""
    words = (SECRET, UID, str(SCRIPT.parent))
    return any(word in place or word.encode() in content or word.encode("utf-16-le") in content for word in words)
