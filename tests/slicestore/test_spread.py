"""Work in processes: results, errors, deaths and interrupts, with real processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slicestore.errors import InputError
from slicestore.spread import Spread, here, processes


def square(number: int) -> int:
    return number * number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise InputError("c.nii.gz", found="3", rule="no threes", remedy="take 4")
    return number


class Awkward(Exception):
    """One that pickles but does not come back: its argument is not its message."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def fail_awkwardly(number: int) -> int:
    raise Awkward(number, 2)


def divide(number: int) -> float:
    return 1 / number


def die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def leave(number: int) -> int:
    os._exit(7)


def settings(_: int) -> tuple[int, str, bool, bool]:
    import SimpleITK as sitk

    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    return threads, os.environ["OMP_NUM_THREADS"], "torch" in sys.modules, hasattr(sys.modules["__main__"], "__file__")


def identity(_: int) -> int:
    return os.getpid()


def note(folder: Path) -> Path:
    """Say that it runs, then take for ever."""
    (folder / str(os.getpid())).touch()
    time.sleep(600)
    return folder


def note_or_wait(path: Path) -> Path:
    """The same where the path is a folder; otherwise make it a file, and done."""
    if path.is_dir():
        note(path)
    path.touch()
    return path


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def noted(folder: Path, count: int) -> list[str]:
    deadline = time.monotonic() + 60
    while len(found := list(folder.iterdir())) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [file.name for file in found]


@pytest.mark.parametrize("spread", [here, processes(1), processes(3)])
def test_every_item_is_worked_on_once(spread: Spread) -> None:
    assert sorted(spread(square, range(8))) == [0, 1, 4, 9, 16, 25, 36, 49]
    assert list(spread(square, [])) == []


@pytest.mark.parametrize("spread", [here, processes(2)])
def test_the_first_mistake_is_raised_with_its_parts(spread: Spread) -> None:
    with pytest.raises(InputError) as caught:
        list(spread(fail_at_three, range(1, 100)))
    error = caught.value
    assert (error.where, error.found, error.rule, error.remedy) == ("c.nii.gz", "3", "no threes", "take 4")


def test_a_bug_comes_back_with_the_line_that_it_is_in() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        list(processes(1)(divide, [0]))
    assert "return 1 / number" in caught.value.__notes__[0]


def test_an_exception_that_cannot_travel_is_told_as_text() -> None:
    with pytest.raises(RuntimeError, match="Awkward: 5 and 2"):
        list(processes(1)(fail_awkwardly, [5]))


def test_a_process_that_dies_is_told_with_its_item_and_the_remedy() -> None:
    with pytest.raises(InputError, match=r"^2: found its process dead \(killed by SIGKILL\).*fewer processes"):
        list(processes(2)(die, [1, 2, 3]))
    with pytest.raises(InputError, match="exit status 7"):
        list(processes(1)(leave, [1]))


def test_no_processes_at_all_are_refused() -> None:
    with pytest.raises(InputError, match="found 0"):
        processes(0)


def test_children_have_one_thread_and_import_nothing_of_their_parent() -> None:
    assert next(processes(1)(settings, [0])) == (1, "1", False, False)


def test_no_more_items_are_under_way_than_there_are_processes(tmp_path: Path) -> None:
    with contextlib.closing(processes(2)(note_or_wait, [tmp_path / str(i) for i in range(20)])) as results:
        next(results)
        time.sleep(0.5)
        # The one that was given, what its process took next, and the other process's, finished or not.
        assert len(list(tmp_path.iterdir())) <= 3


def test_processes_stay_for_the_next_call_and_end_with_their_owner() -> None:
    spread = processes(2)
    first = set(spread(identity, range(8)))
    assert set(spread(identity, range(8))) <= first
    assert os.getpid() not in first
    assert all(map(alive, first))
    del spread
    assert not any(map(alive, first))


def test_processes_of_a_call_that_broke_off_are_replaced() -> None:
    spread = processes(1)
    (first,) = spread(identity, [0])
    with pytest.raises(ZeroDivisionError):
        list(spread(divide, [0]))
    assert not alive(first)
    (second,) = spread(identity, [0])
    assert second != first


def test_closing_ends_the_work_under_way(tmp_path: Path) -> None:
    results = processes(2)(note_or_wait, [tmp_path / "quick", tmp_path])
    assert next(results) == tmp_path / "quick"
    (child,) = (int(name) for name in noted(tmp_path, 2) if name != "quick")
    results.close()
    assert not alive(child)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_children_end_with_their_parent_however_it_dies(tmp_path: Path, end: signal.Signals) -> None:
    script = (
        "import pathlib, signal, sys\nfrom tests.slicestore.test_spread import note\n"
        "from slicestore.spread import processes\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored by jobs in the background
        "next(processes(2)(note, [pathlib.Path(sys.argv[1])] * 3))\n"
    )
    line = [sys.executable, "-c", script, tmp_path]
    parent = subprocess.Popen(line, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    children = [int(name) for name in noted(tmp_path, 2)]
    assert all(map(alive, children))
    parent.send_signal(end)
    assert parent.wait(20) == -end
    deadline = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, children))
