"""One copy of some bytes for all processes of a machine: a named piece of shared memory that is filled once.

Knows files, locks and mappings; must not know what the bytes mean.

A segment is a file in a memory file system (/dev/shm), readable by its owner alone. All of its states are told by locks
that the kernel lets go of when a process dies, however it dies:

- the one who fills it holds an exclusive lock, the others wait for that; the mark of completeness is written last, so
  that what a killed process left is filled again by the next one and trusted by nobody;
- who uses it holds a shared lock for as long as its mapping lives;
- who leaves asks for the exclusive lock, and gets it when nobody else is left: then the file is removed. What killed
  users left behind is removed in the same way by the next comer, whatever that comes for.

A file may be removed between its opening and its locking, so that after each lock the name is asked whether it still
means this file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

PREFIX = f"slicestore-{os.getuid()}-"
HEADER = 4096
"""Bytes before the content: the mark, then the facts as JSON; a page, so that the content is aligned."""
MARK = b"slicestore segment 1\n"
POPULATE: int = getattr(mmap, "MAP_POPULATE", 0)
"""Pages are mapped in one go where the system can, and not one by one as they are touched."""
PAUSE = 0.01
"""Seconds between two attempts to get a lock."""
PATIENCE = 600.0
"""Seconds to wait for one who fills; then this process goes without the segment."""
NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Content:
    """What a segment is to hold."""

    facts: Mapping[str, Any]
    """Plain data that tells a later comer how to read the bytes."""
    size: int
    """In bytes."""
    fill: Callable[[np.ndarray], None]
    """Writes all of them into a writable uint8 array of that size."""


def share(
    folder: Path, name: str, content: Callable[[], Content], *, room: int
) -> tuple[dict[str, Any], np.ndarray] | None:
    """Map the segment `name`, after filling it where nobody else has.

    Args:
        folder: of a memory file system.
        name: says all that the content depends on.
        content: asked only by the process that fills.
        room: bytes of memory that a new segment may take.

    Returns:
        The facts and a read-only uint8 array, on which the segment's life depends; None where the folder is absent, has
        no room, holds a file of that name that another user put there, or where filling takes longer than `PATIENCE`.

    Raises:
        Exception: what filling raised; the segment is gone then.
    """
    sweep(folder)
    path = folder / f"{PREFIX}{name}"
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return None
        try:
            if os.fstat(handle).st_uid != os.geteuid() or not (ready := _ready(handle, path, content, room)):
                return None
            if ready == "whole":
                return _mapped(handle, path)
        finally:
            os.close(handle)


def _ready(handle: int, path: Path, content: Callable[[], Content], room: int) -> Literal["whole", "again", ""]:
    """Hold the shared lock of a whole segment; "again" where the name must be looked up anew, "" without success."""
    try:
        if not _lock(handle, path):  # waits for one who fills
            return "again"
        if not _complete(handle):
            if not _try_alone(handle):
                time.sleep(PAUSE)
                return "again"
            if not _is(handle, path):
                return "again"
            if not _complete(handle) and not _filled(handle, path, content(), room):
                return ""
            if not _lock(handle, path):
                return "again"
    except _WaitedEnough:
        return ""
    return "whole"


def sweep(folder: Path) -> None:
    """Remove this user's segments that no living process uses."""
    with suppress(OSError):
        for path in folder.glob(f"{PREFIX}*"):
            with suppress(OSError):
                handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    if os.fstat(handle).st_uid == os.geteuid():
                        _remove_if_last(handle, path)
                finally:
                    os.close(handle)


def _try_alone(handle: int) -> bool:
    """Ask for the exclusive lock. To wait for it would be to wait for the users of what another fills meanwhile."""
    fcntl.flock(handle, fcntl.LOCK_UN)  # two who wait for the filler get the shared lock at once: neither may insist
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _WaitedEnough(Exception):
    """Another still has the exclusive lock after `PATIENCE`."""


def _lock(handle: int, path: Path) -> bool:
    """Wait for the shared lock; False where the name has come to mean another file or none.

    Raises:
        _WaitedEnough: whoever holds it is not to be waited for any longer, such as the forked child of a killed filler.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return _is(handle, path)
        except BlockingIOError:
            if time.monotonic() > end:
                raise _WaitedEnough from None
            time.sleep(PAUSE)


def _is(handle: int, path: Path) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), named)


def _complete(handle: int) -> bool:
    return os.pread(handle, len(MARK), 0) == MARK


def _filled(handle: int, path: Path, content: Content, room: int) -> bool:
    """Fill the segment; without success nothing of it stays. The caller holds the exclusive lock."""
    facts = json.dumps({**content.facts, "bytes": content.size}).encode()
    if len(MARK) + len(facts) >= HEADER:
        raise ValueError(f"facts of {len(facts)} bytes do not fit into a segment's header")
    done = False
    try:
        if content.size > room or content.size > _free(path.parent):
            return False
        os.ftruncate(handle, 0)  # what a killed process left
        os.posix_fallocate(handle, 0, HEADER + content.size)  # a full file system is told here, and not by SIGBUS
        mapping = mmap.mmap(handle, HEADER + content.size, flags=mmap.MAP_SHARED | POPULATE)
        content.fill(np.frombuffer(mapping, dtype=np.uint8)[HEADER:])
        os.pwrite(handle, facts, len(MARK))
        os.pwrite(handle, MARK, 0)
        done = True
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
    finally:
        if not done:
            path.unlink(missing_ok=True)
            fcntl.flock(handle, fcntl.LOCK_UN)  # a traceback may keep the mapping, and with it the lock, for long
    return done


def _free(folder: Path) -> int:
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize - HEADER


def _mapped(handle: int, path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Map a complete segment; the mapping keeps a descriptor of its own, and with that the shared lock."""
    facts: dict[str, Any] = json.loads(os.pread(handle, HEADER, 0)[len(MARK) :].rstrip(b"\0"))
    size: int = facts.pop("bytes")
    mapping = mmap.mmap(handle, HEADER + size, flags=mmap.MAP_SHARED | POPULATE, prot=mmap.PROT_READ)
    weakref.finalize(mapping, _leave, os.dup(handle), path, os.getpid())
    return facts, np.frombuffer(mapping, dtype=np.uint8)[HEADER:]


def _leave(handle: int, path: Path, process: int) -> None:
    """Give up the shared lock, and remove the segment if nobody else holds one."""
    try:
        if os.getpid() == process:  # a forked child has the same lock: it is not the child's to give up
            _remove_if_last(handle, path)
            fcntl.flock(handle, fcntl.LOCK_UN)  # or the child would keep it from those who wait
    finally:
        os.close(handle)


def _remove_if_last(handle: int, path: Path) -> None:
    if _try_alone(handle) and _is(handle, path):
        path.unlink(missing_ok=True)
