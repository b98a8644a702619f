"""Work spread over Ray tasks: results, mistakes and lost processes, on a real local Ray."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from equipoise.launch.cluster import connect
from equipoise.launch.spread import ray_tasks
from slicestore.errors import InputError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def square(number: int) -> tuple[int, str, str]:
    return number * number, os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"], os.environ["OMP_NUM_THREADS"]


def fail(number: int) -> int:
    if number == 3:
        raise InputError("c.nii.gz", found="3", rule="no threes", remedy="take 4")
    return number


def divide(number: int) -> float:
    return 1 / number


def count_and_die(folder: Path) -> int:
    """Die the first time that a folder is worked on; say then how often it was."""
    (folder / str(os.getpid())).touch()
    if len(list(folder.iterdir())) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return len(list(folder.iterdir()))


def die(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    os.kill(os.getpid(), signal.SIGKILL)


def die_of_nothing(folder: Path) -> str:
    if not folder.is_dir():
        os.kill(os.getpid(), signal.SIGKILL)
    return folder.name


def note(folder: Path) -> None:
    """Say that it runs, then take for ever; nothing where there is no folder."""
    if folder.is_dir():
        (folder / str(os.getpid())).touch()
        time.sleep(600)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with connect(None):
        yield


def test_every_item_is_worked_on_once_in_one_thread() -> None:
    assert sorted(ray_tasks(square, range(9))) == [(n * n, "1", "1") for n in range(9)]
    assert list(ray_tasks(square, [])) == []


def test_a_mistake_comes_back_as_it_was_raised() -> None:
    with pytest.raises(InputError) as caught:
        list(ray_tasks(fail, range(1, 50)))
    error = caught.value
    assert type(error) is InputError
    assert (error.where, error.found, error.rule, error.remedy) == ("c.nii.gz", "3", "no threes", "take 4")


def test_a_bug_comes_back_as_its_own_kind() -> None:
    with pytest.raises(ZeroDivisionError, match="return 1 / number"):
        list(ray_tasks(divide, [0]))


def test_a_piece_whose_process_is_lost_is_done_again(tmp_path: Path) -> None:
    assert list(ray_tasks(count_and_die, [tmp_path])) == [2]


def test_a_piece_that_kills_every_process_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found its process dead 3 times .*what is finished is kept") as caught:
        list(ray_tasks(die, [tmp_path]))
    assert caught.value.where == str(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_piece_that_kills_every_process_costs_no_other_where_something_stands_for_it(tmp_path: Path) -> None:
    items = [tmp_path / "nothing", tmp_path, tmp_path]
    found = ray_tasks(die_of_nothing, items, lost=lambda folder, error: f"{folder.name}: {error.found}")
    assert sorted(found) == sorted(
        [tmp_path.name, tmp_path.name, "nothing: its process dead 3 times (WorkerCrashedError)"]
    )


def test_closing_ends_the_work_under_way(tmp_path: Path) -> None:
    results = ray_tasks(note, [tmp_path / "nothing", tmp_path])
    next(results)
    deadline = time.monotonic() + 60
    while not (found := list(tmp_path.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    results.close()
    with contextlib.suppress(FileNotFoundError):
        while " Z " not in Path(f"/proc/{found[0].name}/stat").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
