"""Which tests may run at the same time, and a small disk: `make test` has a process more than two cores have.

Files go to processes whole, so that what a file shares is made once. All that starts Ray goes to two of them, what
shares a Ray and what starts its own: more at once would be slower. What is marked `long` is left to `make soak`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "studies"))  # scripts, some of which tests import
RAY = ("a Ray each", "a Ray for all")
SmallDisk = Callable[[Path, str], AbstractContextManager[Path]]


class Groups(LoadScopeScheduling):
    """Hands out groups of files. (xdist 3.8's own marks for groups do nothing with pytest 9.)"""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid.partition("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups:
    """Take the place of xdist's schedulers."""
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is too long, and put those that start Ray first.

    A process that had another long test before them would be the last to end.
    """
    if not os.environ.get("EQUIPOISE_LONG"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: `make soak` runs it"))
    items.sort(key=lambda item: group(item.nodeid.partition("::")[0]) not in RAY)


@cache
def group(path: str) -> str:
    """The group of a file, by its path from the root: its own, or one of all which start Ray."""
    text = (ROOT / path).read_text()
    return RAY["cluster: str" in text] if "mark.ray" in text and "mark.cluster" not in text else path


@pytest.fixture
def small_disk() -> SmallDisk:
    """Mount a file system of a given size on a new folder; needs the right to."""

    @contextmanager
    def mounted(folder: Path, size: str) -> Iterator[Path]:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small disk needs the right to mount one: {done.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)

    return mounted
