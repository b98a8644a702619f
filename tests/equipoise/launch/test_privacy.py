"""Whatever a study writes and sends, it names no patient, no user, no machine and no folder.

One cohort whose patients are named wherever a name can stand, prepared, searched, shown and sent to W&B under a host, a
user and folders with names of their own; then every byte is searched for these names. (That a store says nothing of
DICOM's headers is shown where stores are tested.)

Two files are exempt, and both stay where they are: the store's key, which leads from pseudonyms back, and `local.json`,
by which a study finds its store again.
"""

from __future__ import annotations

import csv
import gzip
import os
import shlex
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import pytest
from wandb_server import serving

from equipoise.wandb_file import records
from slicestore.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
SCRIPT = Path(__file__).with_name("tiny_study.py")
PATIENT, HOST, USER = "Doe-Jane-1931", "planted-host", "planteduser"
FOLDERS = ("plantedraw", "plantedhome", "plantedresults")
EXEMPT = ("cohort.zarr.key.json", "local.json")


def test_nothing_that_is_written_or_sent_names_a_patient_a_user_a_machine_or_a_folder(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    raw, home, results = (tmp_path / name for name in FOLDERS)
    table = planted(make_store(tmp_path / "heads").path.parent, raw)
    store = tmp_path / "cohort.zarr"
    home.mkdir()
    with serving() as server:
        online = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url}
        said = as_somebody_else(
            home, online,
            [sys.executable, "-m", "equipoise.cli", "prepare", str(store), "--table", str(table), "--mask", "label",
             "--size", "32", "--spacing-mm", "1.0"],
            [sys.executable, str(SCRIPT), "--store", str(store), "--results", str(results), "--points", "1",
             "--steps", "4", "--confirm-workers", "0", "--tensorboard", "--wandb", "online"],
        )  # fmt: skip
        sent = list(server.sent)
    study = results / "tiny"
    assert (study / "report.html").is_file()
    assert list(study.glob("tensorboard/*/events*"))
    assert server.runs
    assert not any(b"\x89PNG" in body for body in sent)  # nobody asked for images to be sent
    found = [place for place, content in everything(store, results, sent) if names_somebody(place, content)]
    assert not found, found
    assert names_somebody("", (study / "local.json").read_bytes())  # it would be found
    assert HOST not in said
    assert PATIENT not in said
    assert USER not in said


def planted(heads: Path, raw: Path) -> Path:
    """Raw volumes under the patients' names, in file names, headers and the table; the table."""
    raw.mkdir()
    rows = []
    for path in sorted(heads.glob("*[0-9].nii.gz")):
        domain, number = path.name.removesuffix(".nii.gz").split("-")
        subject = f"{PATIENT}-{domain}{number}"
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


def as_somebody_else(home: Path, more: dict[str, str], *commands: list[str]) -> str:
    """Run commands as a user on a host of other names; what they print."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | more
    environment |= {"HOME": str(home), "USER": USER, "LOGNAME": USER, "RAY_AUTH_MODE": "disabled", "NO_COLOR": "1"}
    script = " && ".join(shlex.join(command) for command in commands)
    renamed = ["unshare", "--uts", "sh", "-c", f"hostname {HOST} && {script}"]
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False).returncode:
        renamed = ["sh", "-c", script]  # the host keeps its name where one may not change it
    done = subprocess.run(renamed, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def everything(store: Path, results: Path, sent: list[bytes]) -> Iterator[tuple[str, bytes]]:
    """All that was written, by its place below the folders that a user named, and all that was sent."""
    for root in (store, results):
        for path in sorted(root.rglob("*")):
            place = str(path.relative_to(root))
            if path.is_file() and path.name not in EXEMPT:
                yield place, path.read_bytes()
                if path.suffix == ".wandb":
                    yield place, b"".join(record.SerializeToString() for record in records(path))
    for number, body in enumerate(sent):
        yield f"request {number}", body
        for unpack in (gzip.decompress, zlib.decompress):
            try:
                yield f"request {number}", unpack(body.partition(b" ")[2])
            except (OSError, EOFError, zlib.error):
                continue


def names_somebody(place: str, content: bytes) -> bool:
    words = [PATIENT, HOST, USER, *FOLDERS]
    return any(word in place or word.encode() in content or word.encode("utf-16-le") in content for word in words)
