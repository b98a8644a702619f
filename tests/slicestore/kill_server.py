"""Runs ingests to be killed: imports everything once, then forks a child for each line of standard input.

A line is JSON: `table`, `store`, `config` (of `Preprocessing`), `processes` (0 for none), and the number of the fsync
before which to die (0 for none). The child's number is printed at once; once it has ended, its exit status.

It never runs a filter itself: the threads that one starts do not survive a fork, and its children would wait for them.
"""

import json
import os
import signal
import sys
from pathlib import Path

import SimpleITK  # noqa: F401  # warm before the fork
import zarr  # noqa: F401

from slicestore.ingest import ingest
from slicestore.inputs import inputs_from_table
from slicestore.settings import Preprocessing
from slicestore.spread import here, processes


def die_at(count: int) -> None:
    """Die by SIGKILL where the `count`-th fsync would be."""
    left, sync = count, os.fsync

    def fsync(handle: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(handle)

    os.fsync = fsync


def run(told: dict[str, object]) -> None:
    count = int(str(told["processes"]))
    if told["fsync"]:
        die_at(int(str(told["fsync"])))
    ingest(
        inputs_from_table(Path(str(told["table"]))),
        str(told["store"]),
        Preprocessing(**told["config"]),  # type: ignore[arg-type]
        spread=processes(count) if count else here,
    )


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.setsid()  # a group of its own, with all that it starts
            code = 1
            try:
                run(json.loads(line))
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


main()
