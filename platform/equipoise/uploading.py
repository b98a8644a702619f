"""W&B runs carried to W&B by processes of their own, which may fail, hang or be killed without harm.

Knows W&B's command that uploads a run's file, and the mark that it leaves; knows nothing of records or of training. A
run's file is complete without it: what could not be uploaded at the time, `equipoise sync` uploads later.

    <folder>/wandb/offline-run-*/run-ID.wandb            a sitting's part of a run; a run that was resumed has several
    <folder>/wandb/offline-run-*/run-ID.wandb.synced     W&B has it
"""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from equipoise.wandb_run import no_key
from slicestore.errors import InputError

PATIENCE_S = 5.0
"""So long the end of a study waits for what is still being uploaded."""
UPLOAD_S = 600.0
"""So long the upload of one run may take."""
REACH_S = 5.0
"""So long W&B may take to answer at all."""
_QUIET = {"WANDB_PROGRAM": "equipoise", "WANDB_ERROR_REPORTING": "false"}
"""W&B would be told the path of the program, and its makers of every mistake."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What an upload came to, in runs."""

    now: int
    """Uploaded by it."""
    before: int
    """Had been uploaded."""
    left: int
    """Could not be uploaded in full."""


def parts(folder: Path) -> dict[str, list[Path]]:
    """The files of each run, by its id, in the order in which they were written."""
    found = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name)
    runs: dict[str, list[Path]] = {}
    for path in found:
        runs.setdefault(path.stem.removeprefix("run-"), []).append(path)
    return runs


def is_uploaded(path: Path) -> bool:
    """Whether W&B has all of a file."""
    return path.with_name(f"{path.name}.synced").exists()


def upload(
    folder: Path, told: Callable[[str, bool], None] = lambda name, whole: None, patience: float = UPLOAD_S
) -> Uploaded:
    """Upload what W&B does not have yet, run by run; what it has is left alone.

    Args:
        folder: where W&B keeps its files.
        told: called with each run's id, and whether it is uploaded now.
        patience: seconds for one run; W&B's command tries again for very long.

    Raises:
        InputError: there is no key, or W&B does not answer.
    """
    runs = parts(folder)
    open_runs = {name: paths for name, paths in runs.items() if not all(map(is_uploaded, paths))}
    if open_runs:
        reach()
    now = 0
    for name, paths in open_runs.items():
        _wait(_started([path for path in paths if not is_uploaded(path)], live=False), patience)
        whole = all(map(is_uploaded, paths))
        told(name, whole)
        now += whole
    tidy(folder)
    return Uploaded(now, len(runs) - len(open_runs), len(open_runs) - now)


def reach() -> None:
    """Ask whether W&B answers, before anything is tried for long.

    Raises:
        InputError: there is no key, or nobody answers at its address.
    """
    import wandb

    if (found := no_key()) is not None:
        raise InputError(
            "W&B", found=found, rule="runs are uploaded to an account", remedy="run `wandb login`, or set WANDB_API_KEY"
        )
    address = str(wandb.setup().settings.base_url)
    try:
        urllib.request.urlopen(f"{address}/healthz", timeout=REACH_S).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:  # that there is no such page is an answer
            raise _unreachable(address, f"HTTP {error.code}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(address, str(getattr(error, "reason", error)) or type(error).__name__) from error


def _unreachable(address: str, found: str) -> InputError:
    return InputError(
        address,
        found=f"no answer ({found})",
        rule="W&B is reached there, or where WANDB_BASE_URL says",
        remedy="try again when it is; nothing is lost meanwhile",
    )


class Uploader:
    """Uploads runs while they are written."""

    def __init__(self, folder: Path) -> None:
        """Args: where W&B keeps its files."""
        self._folder = folder
        self._at_work: list[subprocess.Popen[bytes]] = []

    def follow(self, run_id: str) -> None:
        """Upload a run that has just been begun, and what earlier sittings wrote of it, until it is finished."""
        self._at_work = [process for process in self._at_work if process.poll() is None]
        paths = [path for path in parts(self._folder).get(run_id, []) if not is_uploaded(path)]
        if paths:
            self._at_work.append(_started(paths, live=True))

    def close(self, patience: float = PATIENCE_S) -> int:
        """Wait for what is under way, but no longer than this; how many runs W&B does not have in full."""
        until = time.monotonic() + patience
        for process in self._at_work:
            _wait(process, max(0.0, until - time.monotonic()))
        self._at_work.clear()
        return sum(not all(map(is_uploaded, paths)) for paths in parts(self._folder).values())


def tidy(folder: Path) -> None:
    """Remove W&B's notes on runs and uploads, which name folders of this machine and its user.

    Also those of processes that were killed. One that is at work writes on without them.
    """
    for notes in (folder / "logs", *folder.glob("wandb/offline-run-*/logs")):
        shutil.rmtree(notes, ignore_errors=True)
    for path in folder.glob("debug-cli.*.log"):
        path.unlink(missing_ok=True)


# --- the process ------------------------------------------------------------------------------------------------------


def _started(paths: Sequence[Path], *, live: bool) -> subprocess.Popen[bytes]:
    """Start a process that uploads a run's files in turn; the last may still be written to. It ends with this one.

    It works in the folder that holds W&B's, from which artifacts are named, with a service of W&B's that is its own.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    paths = [path.absolute() for path in paths]
    line = [sys.executable, "-P", "-m", __name__, *(["--live"] if live else []), *map(str, paths)]
    return subprocess.Popen(
        line,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=paths[0].parents[3],
        env=inherited | _QUIET,
        start_new_session=True,  # Ctrl-C is for the study
    )


def _wait(process: subprocess.Popen[bytes], patience: float) -> None:
    """Wait for a process, and kill it when it takes longer; also when we are interrupted."""
    with process:
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()


def _main(words: Sequence[str]) -> None:
    """Upload files until whoever started this has gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from wandb.cli.cli import cli

    live, paths = "--live" in words, [word for word in words if word != "--live"]
    for path in paths:
        following = ["--live"] if live and path == paths[-1] else []
        cli.main(["beta", "sync", "--yes", *following, path], standalone_mode=False)


def _end_with_parent() -> None:
    while os.read(0, 1024):  # until the other end is closed; unbuffered, so that the interpreter can end meanwhile
        pass
    os._exit(1)  # W&B's own process ends with this one


if __name__ == "__main__":
    _main(sys.argv[1:])
