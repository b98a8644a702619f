"""An ingest killed at any moment: what is there stays true, and the resumed store is the undisturbed one, bit for bit.

`EQUIPOISE_KILLS` says how often (6 by default).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from slicestore.inputs import Input
from slicestore.place import Folder
from slicestore.settings import Preprocessing
from slicestore.store import Store
from slicestore.verify import verify

KILLS = int(os.environ.get("EQUIPOISE_KILLS", "6"))


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a store and the hash of its bytes."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


class Ingests:
    """Ingests in processes of their own, which start in a moment."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("kill_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def run(
        self,
        table: Path,
        store: Path,
        config: Preprocessing,
        *,
        processes: int = 0,
        until: float | None = None,
        fsync: int = 0,
    ) -> int:
        """Start one, and give its exit status.

        It is killed with all its children after `until` seconds, or dies where its `fsync`-th fsync would be.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        told = {"table": str(table), "store": str(store), "config": asdict(config)}
        told |= {"processes": processes, "fsync": fsync}
        self._server.stdin.write(json.dumps(told) + "\n")
        self._server.stdin.flush()
        child = int(self._server.stdout.readline())
        if until is not None:
            time.sleep(until)
            with suppress(ProcessLookupError):  # it was quicker
                os.killpg(child, signal.SIGKILL)
        return int(self._server.stdout.readline())

    def close(self) -> None:
        with self._server:  # closes both pipes, and waits
            pass


@pytest.fixture(scope="module")
def ingests() -> Iterator[Ingests]:
    server = Ingests()
    yield server
    server.close()


def write_table(inputs: list[Input]) -> Path:
    """Name inputs in a table beside them."""
    path = inputs[0].image.parent / "cohort.csv"
    lines = [f"{item.subject},{item.domain},{item.image},{item.label or ''}" for item in inputs]
    path.write_text("\n".join(["subject,domain,image,label", *lines]))
    return path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory, make_cohort: Callable[..., list[Input]]) -> Path:
    """A table of eight tiny volumes."""
    return write_table(make_cohort(tmp_path_factory.mktemp("cohort"), sources=5, targets=3))


def check(path: Path, before: Store | None, after: str) -> str:
    """Hold every promise that a store makes after a kill; says what was found."""
    if Folder(path).kind() in ("nothing there", "an empty folder"):  # killed before the first object was there
        assert before is None
        return "nothing"
    report = verify(path)
    assert report.intact, report.problems
    if before is None and not report.finished:
        return "unfinished"
    now = Store.open(path)  # an update leaves the old manifest true until the new one is there
    assert now.fingerprint in ({before.fingerprint, after} if before else {after})
    for entry in now.entries:
        now.read(entry, "image")
    return "old" if before and now.fingerprint == before.fingerprint else "new"


def test_killed_at_random_moments_it_resumes_to_the_undisturbed_store(
    tmp_path: Path, cohort: Path, ingests: Ingests, small: Preprocessing
) -> None:
    """Fresh ones, and updates of a finished store to other settings, by turns."""
    kinds = {"fresh": small, "update": replace(small, spacing_mm=0.8)}
    took, whole = dict.fromkeys(kinds, float("inf")), {}
    for name, config in kinds.items():
        assert ingests.run(cohort, tmp_path / f"{name}.zarr", config) == 0
        whole[name] = hashes(tmp_path / f"{name}.zarr")
    finished = Store.open(tmp_path / "fresh.zarr")
    rng, path, kills, tries, seen = random.Random(7), tmp_path / "killed.zarr", 0, 0, set()
    while kills < KILLS:
        kind = list(kinds)[kills % 2]
        config, before = kinds[kind], finished if kind == "update" else None
        shutil.rmtree(path, ignore_errors=True)
        if before:
            shutil.copytree(finished.path, path)
        share, started = (kills + rng.random()) / KILLS, time.monotonic()  # the kills lie all over its length
        until = share * took[kind] if took[kind] < float("inf") else None
        if ingests.run(cohort, path, config, until=until) == 0:
            took[kind] = min(took[kind], time.monotonic() - started)
            tries += 1
            assert tries < 4 * KILLS + 20, "the ingests end before they can be killed"
            continue
        kills += 1
        after = Store.open(tmp_path / f"{kind}.zarr").fingerprint
        seen.add(check(path, before, after))
        if kills % 3 == 0:
            ingests.run(cohort, path, config, until=share * took[kind] / 2)  # and once more
            check(path, before, after)
        assert ingests.run(cohort, path, config) == 0
        assert hashes(path) == whole[kind]
    assert seen & {"unfinished", "old"}  # some were killed midway


def test_killed_with_its_processes_it_resumes_to_the_undisturbed_store(
    tmp_path: Path, cohort: Path, ingests: Ingests, small: Preprocessing
) -> None:
    assert ingests.run(cohort, tmp_path / "whole.zarr", small) == 0
    path = tmp_path / "killed.zarr"
    ingests.run(cohort, path, small, processes=2, until=2.5)  # they need a second or two to import what they work with
    check(path, None, Store.open(tmp_path / "whole.zarr").fingerprint)
    assert ingests.run(cohort, path, small) == 0
    assert hashes(path) == hashes(tmp_path / "whole.zarr")


def test_killed_at_every_single_write_it_resumes_to_the_undisturbed_store(
    tmp_path: Path, make_cohort: Callable[..., list[Input]], ingests: Ingests, small: Preprocessing
) -> None:
    """Death before each fsync in turn, or before every third; the last one is the manifest's."""
    table, other = write_table(make_cohort(tmp_path / "raw", sources=1, targets=1)), replace(small, spacing_mm=0.8)
    for name, config in (("old", small), ("new", other)):
        assert ingests.run(table, tmp_path / f"{name}.zarr", config) == 0
    old, new = Store.open(tmp_path / "old.zarr"), Store.open(tmp_path / "new.zarr")
    path, at, step, seen = tmp_path / "killed.zarr", 1, 3 if KILLS <= 6 else 1, list[str]()
    while True:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(old.path, path)
        status = ingests.run(table, path, other, fsync=at)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        seen.append(check(path, old, new.fingerprint))
        at += step
    assert hashes(path) == hashes(Path(new.path))
    assert len(seen) > 26 / step  # ten objects, two commit records and a manifest, each with its folder
    assert seen == sorted(seen, reverse=True)  # the old content until the manifest, the new one from then on
    shutil.rmtree(path)
    shutil.copytree(old.path, path)
    for at in (30, 20, 10, 1):  # and again and again
        ingests.run(table, path, other, fsync=at)
        check(path, old, new.fingerprint)
    assert ingests.run(table, path, other) == 0
    assert hashes(path) == hashes(Path(new.path))
