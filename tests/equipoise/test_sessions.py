"""A session is alive as long as its process, whatever ends that, and whoever asks."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from equipoise import sessions as module
from equipoise.sessions import Session, SessionInfo, alive, sessions
from slicestore.errors import InputError

DRIVER = """
import os, sys, time
from pathlib import Path
from equipoise.sessions import Session
with Session.start(Path(sys.argv[1]), slots=2, workers=1, gpus=0.25) as session:
    print(session.id, flush=True)
    {work}
"""


@contextmanager
def driver(folder: Path, work: str = "time.sleep(600)") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that works on a study, and its session's id."""
    script = DRIVER.format(work=work)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something comes true before this machine's patience ends."""
    deadline = time.monotonic() + 60
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return held


def only(folder: Path) -> SessionInfo:
    (info,) = sessions(folder)
    return info


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEWAL_SECONDS", 0.01)


def test_a_session_tells_what_it_has_and_that_it_is_alive_and_then_how_it_ended(tmp_path: Path) -> None:
    with Session.start(tmp_path, slots=3, workers=2, gpus=0.25) as session:
        info = only(tmp_path)
        assert (info.id, info.slots, info.workers, info.gpus, info.ended) == (session.id, 3, 2, 0.25, None)
        assert info.alive
    info = only(tmp_path)
    assert info.ended == "finished"
    assert not info.alive
    assert info.seconds == info.seen - info.began >= 0


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(130), "interrupted"),
        (SystemExit(0), "finished"),
        (SystemExit(2), "failed: SystemExit"),
        (ValueError("/home/jane/study"), "failed: ValueError"),
    ],
)
def test_how_a_session_ended_is_told_without_its_errors_words(tmp_path: Path, error: BaseException, told: str) -> None:
    with pytest.raises(type(error)), Session.start(tmp_path, slots=1, workers=1, gpus=0):
        raise error
    assert only(tmp_path).ended == told
    assert "jane" not in (tmp_path / "sessions" / f"{only(tmp_path).id}.json").read_text()


def test_signs_of_life_are_renewed(tmp_path: Path, quick: None) -> None:
    with Session.start(tmp_path, slots=1, workers=1, gpus=0):
        assert eventually(lambda: only(tmp_path).seconds > 0)
        assert only(tmp_path).ended is None


def test_a_killed_process_is_dead_at_once_and_leaves_its_last_sign_of_life(tmp_path: Path) -> None:
    with driver(tmp_path) as (process, name):
        assert alive(tmp_path, name)
        assert only(tmp_path).alive
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not alive(tmp_path, name)
    info = only(tmp_path)
    assert not info.alive
    assert info.ended is None
    assert info.seen >= info.began


def test_a_killed_process_is_dead_though_a_child_that_it_forked_lives(tmp_path: Path) -> None:
    work = "os.fork() or print(os.getpid(), flush=True); time.sleep(600)"
    with driver(tmp_path, work) as (process, name):
        assert process.stdout
        child = int(process.stdout.readline())
        try:
            process.kill()
            process.wait()
            assert not alive(tmp_path, name)
            os.kill(child, 0)  # it is there indeed
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_forked_child_that_ends_leaves_the_session_alive(tmp_path: Path) -> None:
    work = "(child := os.fork()) or os._exit(0); os.waitpid(child, 0); print(1, flush=True); time.sleep(600)"
    with driver(tmp_path, work) as (process, name):
        assert process.stdout
        assert process.stdout.readline() == "1\n"
        assert alive(tmp_path, name)


def test_asking_disturbs_neither_the_owner_nor_others_who_ask(tmp_path: Path) -> None:
    with driver(tmp_path) as (process, name):
        for _ in range(200):
            assert alive(tmp_path, name)
        process.kill()
        process.wait()
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            answers = pool.map(_ask_often, [(tmp_path, name)] * 2)
        assert answers == [0, 0], "none of two took the other for the owner"


def _ask_often(where: tuple[Path, str]) -> int:
    return sum(alive(*where) for _ in range(2000))


def test_a_dead_session_stays_dead_for_the_process_that_had_it(tmp_path: Path) -> None:
    with Session.start(tmp_path, slots=1, workers=1, gpus=0) as first:
        pass
    with Session.start(tmp_path, slots=1, workers=1, gpus=0) as second:
        assert [info.id for info in sessions(tmp_path)] == [first.id, second.id], "the oldest first"
        assert [info.alive for info in sessions(tmp_path)] == [False, True]


def test_two_processes_work_on_one_study(tmp_path: Path) -> None:
    with driver(tmp_path) as (_, one), driver(tmp_path) as (other_process, other):
        assert alive(tmp_path, one)
        assert alive(tmp_path, other)
        other_process.kill()
        other_process.wait()
        assert [info.id for info in sessions(tmp_path) if info.alive] == [one]


def test_a_session_that_is_not_known_is_dead(tmp_path: Path) -> None:
    assert not alive(tmp_path, "00000000")
    assert sessions(tmp_path) == []


def test_a_study_that_is_copied_while_it_works_has_no_live_session(tmp_path: Path) -> None:
    with Session.start(tmp_path / "a", slots=1, workers=1, gpus=0):
        subprocess.run(["cp", "-r", tmp_path / "a", tmp_path / "b"], check=True)
        assert only(tmp_path / "a").alive
        assert not only(tmp_path / "b").alive


def test_a_disk_that_takes_nothing_ends_no_session_and_signs_of_life_come_back(tmp_path: Path, quick: None) -> None:
    with Session.start(tmp_path, slots=1, workers=1, gpus=0) as session:
        partial = tmp_path / "sessions" / f".{session.id}.json.partial"
        assert eventually(lambda: _blocked(partial))
        time.sleep(0.1)
        stuck = only(tmp_path).seen
        time.sleep(0.1)
        assert only(tmp_path).seen == stuck
        assert only(tmp_path).alive
        partial.rmdir()
        assert eventually(lambda: only(tmp_path).seen > stuck)
    assert only(tmp_path).ended == "finished"


def _blocked(partial: Path) -> bool:
    """Put a folder where a file is to be written; whether that succeeded, for a renewal may be under way."""
    try:
        partial.unlink(missing_ok=True)
        partial.mkdir()
    except OSError:
        return False
    return True


def test_a_file_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    with Session.start(tmp_path, slots=1, workers=1, gpus=0):
        for name, text in (("a", ""), ("b", "[]"), ("c", '{"id": "c"}')):
            (tmp_path / "sessions" / f"{name}.json").write_text(text)
        assert len(sessions(tmp_path)) == 1


def test_files_name_no_host_user_or_path(tmp_path: Path) -> None:
    with Session.start(tmp_path, slots=1, workers=1, gpus=0) as session:
        data = json.loads((tmp_path / "sessions" / f"{session.id}.json").read_text())
    assert list(data) == ["id", "began", "seen", "slots", "workers", "gpus", "ended"]


def test_where_files_cannot_be_locked_a_study_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(InputError, match="No locks available"):
        Session.start(tmp_path, slots=1, workers=1, gpus=0)
    assert list((tmp_path / "sessions").iterdir()) == []
