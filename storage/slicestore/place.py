"""Where a store's objects lie: in a local folder, or in an S3 bucket.

Knows names, bytes, atomic replacement and one writer at a time; knows nothing of what the bytes mean.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

from slicestore.errors import InputError, StorageError

PARTIAL = re.compile(r"(^|.*/)\.[^/]+\.[0-9a-f]{8}\.tmp$")
"""Names of what a killed `put` leaves in a folder; no object's name is like that."""


class Place(ABC):
    """A flat set of named objects under one URL. Names are relative, with `/` between their parts.

    A place can be pickled and used from many threads; every object is there whole or not at all.
    """

    block: int = 1 << 18
    """Bytes worth fetching at once. So much stays in a core's cache from the disk to the last byte of its decoding; to
    read whole shards takes twice the time."""
    url: str
    """The path, or `s3://bucket/prefix`; `Place.at` takes it."""

    @staticmethod
    def at(url: str | Path) -> Place:
        """Find the kind of place that a path or URL names; nothing is read or made yet.

        Raises:
            InputError: a URL of another kind than `s3://bucket/prefix`.
        """
        text = str(url)
        if re.match(r"s3:/", text):  # a `Path` has lost one of the two slashes
            from slicestore.s3 import Bucket  # only here is an S3 client needed

            return Bucket.named(text)
        if re.match(r"[a-z0-9+]+://", text):
            raise InputError(
                text,
                found=f"a {text.partition(':')[0]} URL",
                rule="stores and copies are folders or lie under s3://bucket/prefix",
                remedy="give a path or an S3 URL",
            )
        return Folder(Path(text).resolve())

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    @abstractmethod
    def kind(self) -> str:
        """Say what is there, for errors: "nothing there", "a file", "a folder", ..."""

    @abstractmethod
    def get(self, name: str) -> memoryview:
        """Read one object whole.

        Raises:
            FileNotFoundError: there is none of the name.
            InputError: it may not be read, or the place cannot be reached.
        """

    @abstractmethod
    def get_range(self, name: str, start: int, length: int) -> memoryview:
        """Read some bytes of one object; fewer where it ends. Raises as `get`."""

    @abstractmethod
    def whole(self, name: str) -> Callable[[int, int], memoryview]:
        """Like `get_range`, for one who will read all of an object, piece by piece; in S3 that is one request."""

    @abstractmethod
    def put(self, name: str, data: bytes | memoryview, *, private: bool = False) -> None:
        """Write or replace one object in one step; once this returns it survives a power cut.

        `private` keeps other users of this machine from reading it, where the place knows users.

        Raises:
            InputError: no room, no right to write, or the place cannot be reached; the object is then as it was.
        """

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """List names, sorted, and sizes in bytes; all, or those below a folder. One request for a thousand in S3."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""

    @abstractmethod
    def tidy(self) -> None:
        """Remove what killed writers left that is no object."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """Be the only writer; the lock ends with the context, and with the process's life.

        Raises:
            InputError: another holds it, or the place cannot be written to.
        """


class Folder(Place):
    """A local or network file system's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)

    def kind(self) -> str:
        """See `Place.kind`."""
        if not self.path.exists():
            return "nothing there"
        if not self.path.is_dir():
            return "a file"
        files = (name for _, _, names in os.walk(self.path) for name in names)
        return "a folder" if any(not PARTIAL.match(name) for name in files) else "an empty folder"

    def get(self, name: str) -> memoryview:
        """See `Place.get`."""
        with self._readable(name), open(self.path / name, "rb", buffering=0) as file:
            # NumPy asks for large pages. The small ones of `bytes` cost threads a third of the time that a shard takes.
            view, done = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8).data, 0
            while done < len(view) and (more := file.readinto(view[done:])):
                done += more
            return view[:done]

    def get_range(self, name: str, start: int, length: int) -> memoryview:
        """See `Place.get_range`."""
        with self._readable(name):
            handle = os.open(self.path / name, os.O_RDONLY)
            try:
                return memoryview(os.pread(handle, length, start))
            finally:
                os.close(handle)

    def whole(self, name: str) -> Callable[[int, int], memoryview]:
        """See `Place.whole`."""
        return partial(self.get_range, name)

    def put(self, name: str, data: bytes | memoryview, *, private: bool = False) -> None:
        """See `Place.put`: a temporary file, fsync, rename, fsync of the folder.

        The temporary name is drawn, so that a writer left over from a killed run cannot tear another's file.
        """
        path = self.path / name
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            _make_folder(path.parent)
            with open(
                os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644), "wb"
            ) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync(path.parent)
        except OSError as error:
            raise self._unwritable(error, len(data)) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See `Place.sizes`."""
        found = {}
        with self._readable(prefix):
            for folder, _, names in os.walk(self.path / prefix, onerror=_raise_but_gone):
                for name in names:
                    with suppress(FileNotFoundError):  # an ingest at work has just renamed or removed it
                        file = os.path.join(folder, name)
                        found[os.path.relpath(file, self.path)] = os.stat(file).st_size
        return dict(sorted(found.items()))

    def delete(self, names: Iterable[str]) -> None:
        """See `Place.delete`."""
        try:
            for name in names:
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error, 0) from error

    def tidy(self) -> None:
        """See `Place.tidy`: temporary files, and folders that hold nothing."""
        self.delete([name for name in self.sizes() if PARTIAL.match(name)])
        for folder, _, _ in os.walk(self.path, topdown=False):
            if Path(folder) != self.path:
                with suppress(OSError):  # what holds something stays
                    os.rmdir(folder)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See `Place.lock`: a file beside the folder, locked by the system, which drops the lock with the process."""
        path = self.path.with_name(f"{self.path.name}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unwritable(error, 0) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 20, 0).decode().strip() or "unknown"
            os.close(handle)
            raise busy(self.url, f"process {holder}", "wait until it has finished") from None
        except OSError as error:
            os.close(handle)
            raise InputError(
                path,
                found=f"a file that cannot be locked ({error.strerror})",
                rule="one ingest writes a store at a time, and a lock beside the store tells",
                remedy="make the store on a file system that locks (of NFS: with its lock service), and copy it",
            ) from None
        try:
            with suppress(OSError):  # only the next one's error message needs it; a full disk has no room for it
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{self.path / name}") from None
        except OSError as error:
            raise InputError(
                self.path / name,
                found=error.strerror or type(error).__name__,
                rule="files can be read by whoever opens them",
                remedy="have its owner allow it (chmod -R u+rX), or check the disk",
            ) from error

    def _unwritable(self, error: OSError, size: int) -> StorageError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            parent = next(path for path in (self.path, *self.path.parents) if path.exists())
            free = shutil.disk_usage(parent).free
            return StorageError(
                self.path,
                found=f"no room for {size / 1e6:.1f} MB ({free / 1e6:.1f} MB free: {error.strerror})",
                rule="what is written needs room, and while it replaces something, beside its old form",
                remedy="make room and run the same command again: what is finished is kept",
            )
        return StorageError(
            self.path,
            found=f"no way to write ({error.strerror})",
            rule="stores and copies are made in a folder that one may write to",
            remedy="have its owner allow it, or give another",
        )


def busy(url: str, holder: str, remedy: str) -> InputError:
    """Say that a place has a writer already."""
    return InputError(
        url,
        found=f"another ingest at work on it ({holder})",
        rule="one ingest writes a store at a time",
        remedy=remedy,
    )


def _make_folder(path: Path) -> None:
    """Make a folder and its parents, each durable in the one above it."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _raise_but_gone(error: OSError) -> None:
    """`os.walk` passes over folders that cannot be read, unless it is told not to."""
    if not isinstance(error, FileNotFoundError):
        raise error
