"""Where Optuna keeps a study: a journal in the study's folder, or a database that several machines share.

Knows storages and how a killed writer leaves them; knows nothing of runs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, ProgrammingError, SQLAlchemyError

from equipoise.study import StudyFolder
from slicestore.errors import InputError


def journal(path: Path) -> JournalStorage:
    """The journal as Optuna's storage. Its lock lapses after 30 s, should a killed process have held it."""
    mend(path)
    return JournalStorage(JournalFileBackend(str(path)))


def mend(path: Path) -> None:
    """Cut off a last line that a kill or a full disk left unfinished: what was written after it could not be read.

    Nothing is lost by that: Optuna had not been told that it was written.
    """
    if not path.is_file() or _whole(path):
        return
    with get_lock_file(JournalFileSymlinkLock(str(path))):
        if not _whole(path):
            text = path.read_bytes()
            os.truncate(path, text.rfind(b"\n") + 1)


def storage(folder: StudyFolder, url: str | None = None) -> BaseStorage:
    """The storage of a study: its folder's journal, or the database at `url`.

    Raises:
        InputError: the URL is none that SQLAlchemy takes, holds a password, or nothing answers there.
    """
    return journal(folder.journal) if url is None else database(url)


def database(url: str) -> RDBStorage:
    """A database as Optuna's storage.

    Raises:
        InputError: as `storage`.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise _wrong("--storage", "no database URL", "give one such as postgresql+psycopg://user@host/name") from error
    if parsed.password is not None:
        raise _wrong("--storage", "a URL with a password", "leave it out, and set PGPASSWORD or write ~/.pgpass")
    shown = parsed.render_as_string(hide_password=True)
    try:
        return _connected(url)
    except (ImportError, NoSuchModuleError) as error:
        raise _wrong(shown, f"no driver for it ({error})", "pip install 'equipoise[postgresql]'") from error
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise _wrong(shown, cause, "start the database, or leave --storage out to use the study's folder") from error


def _connected(url: str) -> RDBStorage:
    """Optuna's storage; its tables are made by whoever comes first, and whoever came at the same time tries again."""
    for pause in (0.5, 2.0, None):
        try:
            # A connection that idled through a night may be gone: it is tried before it is used.
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except (IntegrityError, ProgrammingError):
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def name_in(folder: StudyFolder, url: str | None) -> str:
    """What the study is called there: its name; in a database that it shares with others also its own id."""
    name = folder.study.name
    return name if url is None else f"{name}-{folder.id}"


def _whole(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _wrong(where: str, found: str, remedy: str) -> InputError:
    return InputError(where, found=found, rule="points are kept in a database that answers", remedy=remedy)
