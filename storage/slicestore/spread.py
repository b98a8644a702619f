"""How independent pieces of work are spread: one after another here, or over processes of this machine.

Knows processes and pipes; knows nothing of what the work is. Over a cluster: `equipoise.launch.spread`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

from slicestore.errors import InputError
from slicestore.memory import available

T = TypeVar("T")
R = TypeVar("R")

ONE_THREAD = dict.fromkeys(
    (
        "BLOSC_NTHREADS",
        "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
        "MKL_NUM_THREADS",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
    ),
    "1",
)
"""Environment of a child: one thread each, or they would fight for the cores."""
DEATH_OF_PARENT = 1
"""Linux's PR_SET_PDEATHSIG."""


class Spread(Protocol):
    """Does the work on every item and gives the results as they finish, in any order.

    The first exception of a piece ends the others and is raised. Nothing starts before the first result is asked for.
    Closing the generator ends what is under way: hold it in `contextlib.closing` where a loop over it may break off.
    Work and items can be pickled: functions of a module, plain data. `str(item)` names an item in errors.
    """

    def __call__(self, work: Callable[[T], R], items: Sequence[T], /) -> Generator[R, None, None]:
        """Give the results as they finish."""
        ...


def here(work: Callable[[T], R], items: Sequence[T], /) -> Generator[R, None, None]:
    """Do one piece after another, in this process and in the items' order."""
    return (work(item) for item in items)


def processes(count: int) -> Spread:
    """Spread work over up to `count` processes of one thread each.

    Each holds one item at a time, so memory does not grow with the number of items. They are fresh interpreters that
    import what the work needs and nothing of the caller's main script, so threads, SimpleITK and torch here are no
    danger to them. They stay for the next call, and end when a call breaks off (an error, an interrupt, `close`), with
    the last reference to what this gives, and on Linux with this process however it dies.

    Raises:
        InputError: `count` below 1; when iterated, a process that died (of want of memory, as a rule), with its item.
    """
    if count < 1:
        raise InputError("processes", found=count, rule="at least one does the work", remedy="give 1 or more")
    resting: list[_Child] = []

    def spread(work: Callable[[T], R], items: Sequence[T], /) -> Generator[R, None, None]:
        waiting, children, under_way = list(reversed(items)), list[_Child](), dict[Connection, tuple[_Child, T]]()

        def hand_on(child: _Child) -> None:
            if waiting:
                item = waiting.pop()
                under_way[child.pipe] = child, item
                child.take(work, item)

        try:
            for _ in range(min(count, len(items))):
                children.append(resting.pop() if resting else _Child())
                hand_on(children[-1])
            while under_way:
                for pipe in wait(list(under_way)):
                    child, item = under_way.pop(pipe)  # type: ignore[call-overload]  # it waits on other things too
                    result = child.result(item)
                    hand_on(child)
                    yield result
            if threading.current_thread() is threading.main_thread():  # a child ends with the thread that made it
                resting.extend(children)
                children.clear()
        finally:
            _end(children)

    weakref.finalize(spread, _end, resting)
    return spread


def fitting(items: int, bytes_each: int) -> int:
    """How many processes are worth starting here: as many as items, cores, and free memory by `bytes_each` allow."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(items, available() // bytes_each, cores))


# --- the parent's side ------------------------------------------------------------------------------------------------


class _Child:
    """One process and the pipe to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        script = (
            f"import sys; sys.path[:] = {sys.path!r}; from slicestore.spread import _serve; "
            f"_serve({theirs.fileno()}, {os.getpid()})"
        )
        # A child inherits the block: an interrupt of the whole group is for the parent to handle, once.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", script],
                env=os.environ | ONE_THREAD,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        self.pipe = Connection(ours.detach())

    def take(self, work: Callable[[Any], object], item: object) -> None:
        """Start on an item."""
        data = pickle.dumps((work, item))
        with contextlib.suppress(ConnectionError):  # it is dead: `result` finds that, and tells it with the item
            self.pipe.send_bytes(data)

    def result(self, item: object) -> Any:
        """What came of the item that it is on; its exception is raised."""
        try:
            good, value = self.pipe.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            raise _died(
                item, f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            ) from None
        if good:
            return value
        raise value

    def kill(self) -> None:
        """Kill it, whatever it is at."""
        self._process.kill()

    def end(self) -> None:
        """Wait until it is dead."""
        self._process.wait()
        self.pipe.close()


def _end(children: list[_Child]) -> None:
    """Kill all, then wait for all."""
    for child in children:
        child.kill()
    for child in children:
        child.end()
    children.clear()


def _died(item: object, how: str) -> InputError:
    return InputError(
        item,
        found=f"its process dead ({how})",
        rule="a process has the memory that its volume takes",
        remedy="run again with fewer processes, or on a machine with more memory; what is finished is kept",
    )


# --- the child's side -------------------------------------------------------------------------------------------------


def _serve(handle: int, parent: int) -> None:
    """Work on items until there are no more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_OF_PARENT, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            return
    pipe = Connection(handle)
    while True:
        try:
            told = pipe.recv_bytes()
        except EOFError:
            return
        try:
            work, item = pickle.loads(told)
            answer = pickle.dumps((True, work(item)))
        except Exception as error:
            answer = _told(error)
        pipe.send_bytes(answer)


def _told(error: Exception) -> bytes:
    """An exception as bytes, with the traceback as a note; of one that does not survive pickling, the text."""
    text = traceback.format_exc()
    try:
        if not isinstance(error, InputError):
            error.add_note(text)
        data = pickle.dumps((False, error))
        pickle.loads(data)
    except Exception:
        return pickle.dumps((False, RuntimeError(text)))
    return data
