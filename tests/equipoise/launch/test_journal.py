"""Where points are kept: a journal that a kill has torn, and a database that two drivers share."""

from __future__ import annotations

import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from equipoise.launch.journal import database, journal, name_in
from equipoise.record import Record
from equipoise.sessions import sessions
from equipoise.study import StudyFolder
from slicestore.errors import InputError

SCRIPT = Path(__file__).with_name("contract_study.py")


def started(path: Path) -> optuna.Study:
    return optuna.create_study(study_name="torn", storage=journal(path), load_if_exists=True, direction="maximize")


def test_a_line_that_a_kill_left_unfinished_costs_nothing_that_was_written_before_or_is_written_after(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal.log"
    study = started(path)
    study.tell(study.ask(), 0.5)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"op_code":6,"worker_id":"killed in the mid')
    again = started(path)
    again.tell(again.ask(), 0.7)
    assert path.read_bytes().startswith(whole)
    assert [trial.value for trial in started(path).trials] == [0.5, 0.7]


def test_optuna_alone_would_not_read_on_behind_such_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    started(path)
    with path.open("ab") as file:
        file.write(b'{"op_code":6,')
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    for _ in range(2):
        backend.append_logs([{"op_code": 0}])
    with pytest.raises(ValueError, match="Expecting"):
        list(optuna.storages.journal.JournalFileBackend(str(path)).read_logs(0))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("no-url", "--storage: found no database URL"),
        ("postgresql+psycopg://me:secret@127.0.0.1/x", "a URL with a password.*PGPASSWORD"),
        ("nosuch://127.0.0.1/x", "no driver for it.*pip install"),
        ("postgresql+psycopg://me@127.0.0.1:1/x", "127.0.0.1:1/x: found .*refused.*start the database"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_at_once_and_no_password_is_shown(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        database(url)
    assert "secret" not in str(caught.value)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server on loopback, of the system's package, with a data folder of its own."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = shutil.which("initdb") or (str(installed[-1]) if installed else None)
    if found is None:
        pytest.skip("no PostgreSQL server is installed: apt-get install postgresql")
    programs = Path(found).resolve().parent
    folder = Path(tempfile.mkdtemp(prefix="equipoise-postgresql-"))  # pytest's folders are closed to its user
    data = folder / "data"
    user: list[str] = []
    if os.getuid() == 0:  # it refuses to be run by root
        user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    subprocess.run(
        [*user, programs / "initdb", "-D", data, "-A", "trust", "-U", "lab"], check=True, capture_output=True
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = f"listen_addresses=127.0.0.1 unix_socket_directories={folder} fsync=off port={port}"
    flags = [word for setting in settings.split() for word in ("-c", setting)]
    log = folder / "log"
    with log.open("w") as file:
        server = subprocess.Popen([*user, programs / "postgres", "-D", data, *flags], stdout=file, stderr=file)
    try:
        ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        deadline = time.monotonic() + 120
        while subprocess.run(ready, check=False).returncode:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"postgresql+psycopg://lab@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*user, programs / "pg_ctl", "-D", data, "-m", "immediate", "stop"], check=False)
        server.wait(timeout=30)
        shutil.rmtree(folder)


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.long
def test_two_drivers_at_once_share_a_study_s_points_in_postgresql(postgresql: str, tmp_path: Path) -> None:
    contract = runpy.run_path(str(SCRIPT))
    folder = tmp_path / "study"
    made = StudyFolder.create(folder, contract["STUDY"], "contract", {})
    drivers = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(folder), "ours", "0.5", postgresql]) for _ in range(2)
    ]
    assert [driver.wait(timeout=600) for driver in drivers] == [0, 0]
    shared = database(postgresql)
    trials = optuna.load_study(study_name=name_in(made, postgresql), storage=shared).trials
    shared.engine.dispose()
    assert [trial.number for trial in trials] == list(range(len(contract["CASES"])))
    states = dict(zip(contract["CASES"], (trial.state.name for trial in trials), strict=True))
    assert states.pop("always_killed") == "FAIL"
    assert set(states.values()) <= {"COMPLETE", "PRUNED"}  # whom the pruner meets first depends on the drivers' pace
    assert states["diverged_late"] == states["nan_at_once"] == "COMPLETE"
    ids = {session.id for session in sessions(folder)}
    assert {trial.user_attrs["session"] for trial in trials} == ids
    assert len(ids) == 2
    for trial in trials:
        attempts = Record(folder / "runs" / trial.user_attrs["run"]).attempts
        assert {attempt.session for attempt in attempts} == {trial.user_attrs["session"]}  # nobody else touched it
    assert not (folder / "journal.log").exists()
