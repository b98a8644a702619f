"""A record's files, written whole or not at all, and what is told where a disk refuses.

Knows names, bytes and what disks answer; must not know what the files hold.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from slicestore.errors import StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSALS = (*_FULL, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM)
"""What a disk answers that refuses whatever it is asked."""


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Say what to do where a disk refuses to read or write `path`.

    Raises:
        StorageError: no room, no right, a stale mount, a broken disk.
    """
    try:
        yield
    except OSError as error:
        raise refusal(path, error) from error


def refusal(path: Path, error: OSError) -> StorageError:
    """What to tell of a disk that refused: the file, its answer, the rule, the remedy."""
    answer = error.strerror or type(error).__name__
    if error.errno in _FULL:
        with suppress(OSError):
            there = next(folder for folder in path.parents if folder.exists())
            answer = f"{shutil.disk_usage(there).free / 1e6:.1f} MB free: {answer}"
        return StorageError(
            path,
            found=f"no room ({answer})",
            rule="a run writes its record as it trains",
            remedy="make room and resume: nothing written is lost",
        )
    return StorageError(
        path,
        found=f"a disk that refuses ({answer})",
        rule="a run reads and writes its record as it trains",
        remedy="mend the disk, its mount or the right to write, and resume: nothing written is lost",
    )


def write(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write or replace a file in one step; once this returns it survives a power cut.

    Raises:
        StorageError: the disk refused; the file is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    with told(path):
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync(path.parent)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)  # what fills the disk helps nobody
            raise


def append(path: Path, line: str) -> None:
    """Put a line behind the last whole one; flushed, so that a kill costs nothing that was written.

    Raises:
        StorageError: the disk refused; no part of the line stays, unless the disk refuses that too.
    """
    with told(path), open(path, "a+b", buffering=0) as file:
        length = _whole(file)
        file.truncate(length)
        try:
            data = memoryview(line.encode())
            while data:
                data = data[file.write(data) :]
        except OSError:
            with suppress(OSError):
                file.truncate(length)
            raise


def _whole(file: BinaryIO) -> int:
    """Bytes up to the end of the last whole line: a kill may have torn the one after it."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if file.read(1) in (b"\n", b""):
        return end
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def sync(path: Path) -> None:
    """Have a file or a folder's names survive a power cut; what is not there needs nothing."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
