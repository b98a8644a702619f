"""A study's sessions: each time that a process works on it, from when to when, with what, and how that ended.

Knows files and locks; knows nothing of runs, of Ray or of Optuna. No host, user or path is written.

    sessions/ID.json   what the session has, when it began, its last sign of life, how it ended
    sessions/ID.lock   locked for as long as the process lives

A lock ends with its process, whatever ends that, and is seen by every machine that shares the folder: by it, and never
by a time, one session knows whether another lives. `flock` does so on local disks and, on Linux, over NFS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from slicestore.errors import InputError

RENEWAL_SECONDS = 2.0
"""How often a session gives a sign of life."""
_PAUSES = (0.0, 0.5, 0.5)
"""Seconds before each try to note how a session ended, should the disk be full."""
_INTERRUPTED = 130
"""The exit status of what Ctrl-C ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionInfo:
    """A session as its file tells it."""

    id: str
    began: float
    """Seconds since 1970."""
    seen: float
    """The last sign of life, in seconds since 1970."""
    slots: int
    """Runs at once."""
    workers: int
    """Devices of a run."""
    gpus: float
    """GPUs of a worker: a whole number, a fraction, or 0."""
    ended: str | None
    """`finished`, `interrupted`, or `failed: ` and what class of error; None while it works, and of one killed."""
    folder: Path
    """The study's."""

    @property
    def alive(self) -> bool:
        """Whether its process lives, on whatever machine."""
        return alive(self.folder, self.id)

    @property
    def seconds(self) -> float:
        """From its beginning to its last sign of life."""
        return max(0.0, self.seen - self.began)  # clocks are set back at times


class Session:
    """A process at work on a study: this one, until it leaves the `with` block."""

    def __init__(self, info: SessionInfo, lock: int) -> None:
        """See `start`, which makes them."""
        self._info, self._lock = info, lock
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"session {info.id}", daemon=True)

    @classmethod
    def start(cls, folder: Path, *, slots: int, workers: int, gpus: float) -> Session:
        """Begin a session; other sessions may be at work on the same study.

        Args:
            folder: the study's.
            slots: runs at once.
            workers: devices of a run.
            gpus: GPUs of a worker, may be a fraction or 0.

        Raises:
            InputError: the folder's file system has no locks.
            OSError: it cannot be written to.
        """
        where = folder.absolute()
        (where / "sessions").mkdir(parents=True, exist_ok=True)
        now = time.time()
        info = SessionInfo(
            id=secrets.token_hex(4), began=now, seen=now, slots=slots, workers=workers, gpus=gpus, ended=None,
            folder=where,
        )  # fmt: skip
        lock = _take(_lock_of(where, info.id))  # before the file: whoever reads that finds the session alive
        try:
            _write(info)
        except OSError:
            _release(lock)
            raise
        session = cls(info, lock)
        session._thread.start()
        return session

    @property
    def id(self) -> str:
        """What the session is called: eight hexadecimal digits."""
        return self._info.id

    def __enter__(self) -> Session:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Note how it ended, and let go of the lock. Where the disk is full until the last try, it looks killed."""
        self._over.set()
        try:
            self._thread.join()
            for pause in _PAUSES:
                time.sleep(pause)
                if self._sign(ended=_words(error)):
                    break
        finally:
            _release(self._lock)

    def _renew(self) -> None:
        while not self._over.wait(RENEWAL_SECONDS):
            self._sign(ended=None)

    def _sign(self, ended: str | None) -> bool:
        """Give a sign of life; whether the disk took it: one that is full for a while costs no run."""
        try:
            _write(dataclasses.replace(self._info, seen=time.time(), ended=ended))
        except OSError:
            return False
        return True


def sessions(folder: Path) -> list[SessionInfo]:
    """All sessions of a study, the oldest first; a file that cannot be read is left out."""
    found = []
    for path in (folder.absolute() / "sessions").glob("*.json"):
        try:
            found.append(SessionInfo(**json.loads(path.read_text()), folder=folder.absolute()))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda info: (info.began, info.id))


def alive(folder: Path, session_id: str) -> bool:
    """Whether a session's process lives, this one or another, on whatever machine; one that is not known does not.

    Raises:
        OSError: its lock may not be read.
    """
    try:
        probe = os.open(_lock_of(folder, session_id), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Shared: two that ask about a dead session at the same time do not take each other for it.
        fcntl.flock(probe, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(probe)  # gives back a lock that was had, and only that: locks belong to the opened file
    return False


# --- files and locks --------------------------------------------------------------------------------------------------

_held: set[int] = set()
"""Descriptors of this process's locks."""


def _lock_of(folder: Path, session_id: str) -> Path:
    return folder / "sessions" / f"{session_id}.lock"


def _take(path: Path) -> int:
    """Make a lock and hold it; returns its descriptor."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)  # over NFS only what may be written is locked
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        path.unlink(missing_ok=True)
        raise InputError(
            path.parent,
            found=f"a file system that locks no files ({error.strerror})",
            rule="by its lock a session is known to be at work",
            remedy="keep studies on a local disk, or on NFS mounted with locks (--results)",
        ) from error
    _held.add(lock)
    return lock


def _release(lock: int) -> None:
    _held.discard(lock)
    os.close(lock)


def _let_go() -> None:
    """In a forked child: what outlives a killed session must not keep its lock. Closing it there unlocks nothing."""
    while _held:
        with contextlib.suppress(OSError):
            os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


def _write(info: SessionInfo) -> None:
    names = ("id", "began", "seen", "slots", "workers", "gpus", "ended")
    path = info.folder / "sessions" / f"{info.id}.json"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({name: getattr(info, name) for name in names}, indent=2))
    os.replace(partial, path)


def _words(error: BaseException | None) -> str:
    """How it ended. Of an error only the class is told: its message may hold paths."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "finished"
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == _INTERRUPTED):
        return "interrupted"
    return f"failed: {type(error).__name__}"
