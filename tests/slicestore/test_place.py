"""Places: what a folder and a bucket both promise, and what is the folder's own."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from slicestore.errors import InputError
from slicestore.place import PARTIAL, Folder, Place

Nobody = Callable[[], AbstractContextManager[Path]]
SmallDisk = Callable[[Path, str], AbstractContextManager[Path]]


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "s3":
        return Place.at(request.getfixturevalue("s3")())
    return Place.at(tmp_path / "cohort.zarr")


class TestEveryPlace:
    def test_what_is_put_is_what_one_gets(self, place: Place) -> None:
        place.put("a/b/c", b"first")
        place.put("a/b/c", b"second, and longer")
        assert bytes(place.get("a/b/c")) == b"second, and longer"
        assert bytes(place.get_range("a/b/c", 8, 3)) == b"and"

    def test_a_range_ends_where_the_object_does(self, place: Place) -> None:
        place.put("x", b"0123456789")
        assert bytes(place.get_range("x", 7, 100)) == b"789"

    def test_what_is_not_there_is_told_as_such(self, place: Place) -> None:
        for read in (lambda: place.get("a/x"), lambda: place.get_range("a/x", 0, 1)):
            with pytest.raises(FileNotFoundError, match=r"cohort\.zarr/a/x"):
                read()
        assert place.sizes() == place.sizes("a") == {}
        assert place.kind() == "nothing there"
        place.put("a", b"")
        with pytest.raises(FileNotFoundError):  # an object is no folder
            place.get("a/x")

    def test_names_and_sizes_are_listed_by_folder_and_in_order(self, place: Place) -> None:
        for name in ("b/2", "b/10/x", "bb/1", "a"):
            place.put(name, name.encode())
        assert list(place.sizes().items()) == [("a", 1), ("b/10/x", 6), ("b/2", 3), ("bb/1", 4)]
        assert place.sizes("b") == {"b/10/x": 6, "b/2": 3}
        assert place.kind() not in ("nothing there", "an empty folder")

    def test_what_is_deleted_is_gone_and_what_never_was_is_no_error(self, place: Place) -> None:
        place.put("a/x", b"1")
        place.put("a/y", b"2")
        place.delete(["a/x", "a/never"])
        place.delete([])
        assert place.sizes() == {"a/y": 1}
        place.tidy()
        assert place.sizes() == {"a/y": 1}

    def test_a_second_writer_is_refused_until_the_first_has_finished(self, place: Place) -> None:
        other = Place.at(place.url)
        with place.lock():
            with (
                pytest.raises(InputError, match=r"another ingest at work on it.*wait until it has finished"),
                other.lock(),
            ):
                pass
            place.put("x", b"1")
        with other.lock():
            other.put("x", b"2")
        with place.lock():
            assert bytes(place.get("x")) == b"2"
        assert list(place.sizes()) == ["x"]  # the lock is no object of the store

    def test_a_failure_under_the_lock_gives_it_back(self, place: Place) -> None:
        with pytest.raises(ZeroDivisionError), place.lock():
            _ = 1 / 0
        with place.lock():
            pass

    def test_a_place_travels_to_another_process(self, place: Place) -> None:
        place.put("x", b"1")
        copy = pickle.loads(pickle.dumps(place))
        assert copy.url == place.url == str(place)
        assert bytes(copy.get("x")) == b"1"
        assert place.name == "cohort.zarr"


def test_only_folders_and_buckets_are_places(tmp_path: Path) -> None:
    assert isinstance(Place.at(tmp_path), Folder)
    with pytest.raises(InputError, match=r"gs://b/c: found a gs URL; stores and copies are folders or lie under s3://"):
        Place.at("gs://b/c")
    for url in ("s3://bucket", "s3://bucket/", "s3://"):
        with pytest.raises(InputError, match="no bucket or no prefix"):
            Place.at(url)
    assert Place.at("s3://bucket/a/b/").url == Place.at(Path("s3://bucket/a/b")).url == "s3://bucket/a/b"


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_private_object_is_its_owner_s_alone(tmp_path: Path) -> None:
    Folder(tmp_path).put("key", b"", private=True)
    Folder(tmp_path).put("open", b"")
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("key", "open")] == [0o600, 0o644]


def test_what_a_killed_writer_leaves_is_recognised_and_swept(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from slicestore.place import Folder; from pathlib import Path\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Folder(Path(sys.argv[1])).put('a/b/c', b'new')"
    )
    place = Folder(tmp_path / "s")
    place.put("a/b/c", b"old")
    (tmp_path / "s" / "empty" / "folders").mkdir(parents=True)
    child = subprocess.run(
        [sys.executable, "-c", script, place.url],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    assert bytes(place.get("a/b/c")) == b"old"
    torn = [name for name in place.sizes() if PARTIAL.match(name)]
    assert len(torn) == 1
    place.tidy()
    assert [str(path.relative_to(tmp_path / "s")) for path in sorted((tmp_path / "s").rglob("*"))] == [
        "a",
        "a/b",
        "a/b/c",
    ]


def test_a_lock_ends_with_the_life_of_its_process(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from slicestore.place import Folder\n"
        "with Folder(Path(sys.argv[1])).lock(): print('held', flush=True); sys.stdin.read()"
    )
    place = Folder(tmp_path / "s")
    child = subprocess.Popen(
        [sys.executable, "-c", script, place.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=rf"another ingest at work on it \(process {child.pid}\)"), place.lock():
            pass
        child.kill()
    with place.lock():
        pass


def test_a_file_that_may_not_be_read_is_named_with_the_remedy(as_nobody: Nobody) -> None:
    with as_nobody() as folder:
        place = Folder(folder / "s")
        place.put("a/x", b"1")
        (folder / "s" / "a" / "x").chmod(0)
        for read in (lambda: place.get("a/x"), lambda: place.get_range("a/x", 0, 1)):
            with pytest.raises(InputError, match=r"s/a/x: found Permission denied; .* Remedy: .*chmod"):
                read()
        (folder / "s" / "a").chmod(0)
        with pytest.raises(InputError, match="found Permission denied"):
            place.sizes()
        (folder / "s" / "a").chmod(0o755)


def test_a_folder_that_may_not_be_written_to_is_named(as_nobody: Nobody) -> None:
    with as_nobody() as folder:
        place = Folder(folder / "s")
        place.put("x", b"old")
        (folder / "s").chmod(0o555)
        with pytest.raises(InputError, match=r"/s: found no way to write \(Permission denied\)"):
            place.put("x", b"new")
        assert bytes(place.get("x")) == b"old"
        (folder / "s").chmod(0o755)


def test_a_full_disk_is_told_and_leaves_the_object_as_it_was(tmp_path: Path, small_disk: SmallDisk) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        place = Folder(disk / "s")
        place.put("x", b"old")
        with pytest.raises(
            InputError, match=r"disk/s: found no room for 0\.1 MB \(0\.\d MB free: No space left"
        ) as told:
            place.put("x", bytes(100_000))
        assert "make room and run the same command again" in told.value.remedy
        assert place.sizes() == {"x": 3}
        assert bytes(place.get("x")) == b"old"
