"""Copies of a run elsewhere: a lost disk costs at most what lies between two checkpoints, a lost copy nothing."""

from __future__ import annotations

import getpass
import itertools
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from poisoned import poison

from equipoise import checkpoint, copies
from equipoise.batches import Cohort
from equipoise.checkpoint import State
from equipoise.config import RunConfig
from equipoise.copies import Copies, Extent
from equipoise.keeping import Keeping
from equipoise.monitor import Finding, Verdict
from equipoise.ranks import Ranks
from equipoise.record import Record, Row
from equipoise.sitting import recorded
from equipoise.train import Progress
from slicestore.errors import InputError
from slicestore.place import Folder, Place

CPU = torch.device("cpu")
BUCKET = "runs"
SmallDisk = Callable[[Path, str], AbstractContextManager[Path]]


class Server:
    """A real S3 server on loopback that can be stopped and started again; what it holds stays."""

    def __init__(self) -> None:
        self.port = 0
        self.start()
        client = boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for every request
    made = Server()
    yield made
    made.stop()


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Give URLs of empty prefixes; the environment leads there."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (
        ("AWS_ENDPOINT_URL", server.url),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
    ):
        monkeypatch.setenv(name, value)
    return lambda: f"s3://{BUCKET}/{next(_NUMBERS)}"


_NUMBERS = itertools.count()


def numbers(record: Record) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "time/block"} for row in record.rows()]


def contents(place: Place) -> dict[str, bytes]:
    return {name: bytes(place.get(name)) for name in place.sizes()}


def files(folder: Path) -> dict[str, bytes]:
    """All that a run's folder has a copy of."""
    found = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: p.read_bytes() for name, p in found.items() if name not in (".lock", "copies.json")}


def same_run(one: Record, other: Record) -> None:
    assert numbers(one) == numbers(other)
    assert one.verdict is not None
    assert other.verdict is not None
    assert one.verdict.to_dict() == other.verdict.to_dict()  # in which NaN equals itself
    ours, theirs = (checkpoint.load(r.folder / "checkpoints" / "step-000008", 0).shared["net"] for r in (one, other))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert [p.read_bytes() for p in one.pictures()] == [p.read_bytes() for p in other.pictures()]


def stopped(folder: Path, config: RunConfig, cohort: Cohort, keeping: Keeping, step: int) -> Record:
    """A run that was killed after the block that ended with `step`."""
    for progress in recorded(folder, config, cohort, keeping=keeping):
        if progress.step == step:
            break
    return Record(folder)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == copies.__name__]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: RunConfig, cohort: Cohort) -> Record:
    torch.set_num_threads(1)  # a fixture of a module comes before that of a test which does so
    folder = tmp_path_factory.mktemp("runs") / "whole"
    list(recorded(folder, tiny, cohort))
    return Record(folder)


def test_a_verdict_that_the_study_gave_later_is_copied_by_whoever_asks(
    tiny: RunConfig, cohort: Cohort, tmp_path: Path
) -> None:
    url = str(tmp_path / "copies")
    record = stopped(tmp_path / "run", tiny, cohort, Keeping(copies=url), 4)
    record.close(Verdict("censored", 4, tiny.steps, None))
    for _ in range(2):  # the second time there is nothing to do
        Copies.of(record.folder, url).end()
        assert contents(Place.at(f"{url}/run"))["verdict.json"] == (record.folder / "verdict.json").read_bytes()


# --- a folder that is lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_run_whose_folder_is_lost_goes_on_from_its_copy_bit_for_bit(
    tmp_path: Path,
    tiny: RunConfig,
    cohort: Cohort,
    undisturbed: Record,
    s3: Callable[[], str],
    kind: str,
) -> None:
    url = s3() if kind == "bucket" else str(tmp_path / "nfs")
    keeping = Keeping(every=3, copies=url, session="a")
    record = stopped(tmp_path / "run", tiny, cohort, keeping, 7)
    shutil.rmtree(record.folder)
    assert [p.step for p in recorded(record.folder, tiny, cohort, keeping=keeping)] == [7, 8]
    same_run(record, undisturbed)
    assert [(attempt.step, attempt.session) for attempt in record.attempts] == [(0, "a"), (6, "a")]
    # What the copy is in the end: the folder, and the one object that says so.
    copy = contents(Place.at(f"{url}/run"))
    assert json.loads(copy.pop("copied.json"))["ended"]
    assert copy == files(record.folder)
    # And a run that has ended comes back whole.
    shutil.rmtree(record.folder)
    assert list(recorded(record.folder, tiny, cohort, keeping=keeping)) == []
    same_run(record, undisturbed)


def test_a_folder_that_is_behind_is_brought_up_and_its_damaged_checkpoint_with_it(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, undisturbed: Record
) -> None:
    keeping = Keeping(every=1, copies=str(tmp_path / "nfs"))
    record = stopped(tmp_path / "run", tiny, cohort, keeping, 6)
    shutil.rmtree(record.folder / "checkpoints" / "step-000006")
    assert [p.step for p in recorded(record.folder, tiny, cohort, keeping=keeping)] == [7, 8]
    same_run(record, undisturbed)


def test_a_run_that_went_back_is_fetched_as_it_stands_and_goes_on_with_its_remedy(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.having({"recovery.times": 1, "evaluations": 4})  # checkpoints after 2, 4, 6, 8
    with monkeypatch.context() as patch:
        poison(patch, {6})
        list(recorded(tmp_path / "whole" / "run", config, cohort))
    whole = Record(tmp_path / "whole" / "run")
    keeping = Keeping(every=1, copies=str(tmp_path / "nfs"))
    with monkeypatch.context() as patch:
        poison(patch, {6})
        record = stopped(tmp_path / "run", config, cohort, keeping, 5)  # before it went back ...
        shutil.rmtree(record.folder)
    with monkeypatch.context() as patch:
        poison(patch, {1})
        seen: list[int] = []
        for progress in recorded(record.folder, config, cohort, keeping=keeping):
            seen.append(progress.step)
            if seen == [6, 5]:  # ... and after
                break
        shutil.rmtree(record.folder)
    rest = list(recorded(record.folder, config, cohort, keeping=keeping))
    assert [p.step for p in rest] == [6, 7, 8]
    same_run(record, whole)
    assert [back.step for back in record.returns] == [4]
    assert [row["step"] for row in record.taken_back()] == [5, 6]


# --- a place that is lost ---------------------------------------------------------------------------------------------


def test_a_server_that_dies_half_way_holds_up_nothing_is_told_once_and_gets_all_when_it_is_back(
    tmp_path: Path,
    tiny: RunConfig,
    cohort: Cohort,
    undisturbed: Record,
    server: Server,
    s3: Callable[[], str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    keeping, record = Keeping(every=1, copies=s3()), Record(tmp_path / "run")
    missed: list[int] = []
    for progress in recorded(record.folder, tiny, cohort, keeping=keeping):
        for thread in threading.enumerate():
            if thread.name == "copies":
                thread.join()  # what a copy comes to is noted at the next checkpoint
        missed.append(json.loads((record.folder / "copies.json").read_text())["missed"])
        if progress.step == 2:
            server.stop()
        elif progress.step == 6:
            server.start()
    assert missed == [0, 0, 0, 1, 2, 3, 4, 0]
    same_run(record, undisturbed)
    told = warnings(caplog)
    assert "run: no copy could be made" in told[0]
    assert told[1:] == ["run: copies are made again"]
    shutil.rmtree(record.folder)
    assert list(recorded(record.folder, tiny, cohort, keeping=keeping)) == []
    same_run(record, undisturbed)


def test_a_run_that_reached_its_place_before_goes_on_without_it_and_one_that_lost_its_folder_does_not(
    tmp_path: Path,
    tiny: RunConfig,
    cohort: Cohort,
    undisturbed: Record,
    server: Server,
    s3: Callable[[], str],
) -> None:
    keeping = Keeping(copies=s3())
    record = stopped(tmp_path / "run", tiny, cohort, keeping, 5)
    shutil.copytree(record.folder, tmp_path / "spare" / "run")
    server.stop()
    try:
        assert [p.step for p in recorded(record.folder, tiny, cohort, keeping=keeping)] == [5, 6, 7, 8]
        same_run(record, undisturbed)
        shutil.copytree(record.folder, tmp_path / "ended" / "run")
        shutil.rmtree(record.folder)
        with pytest.raises(InputError, match="no answer"):  # to begin anew would lose what was copied
            next(iter(recorded(record.folder, tiny, cohort, keeping=keeping)))
        assert not (record.folder / "config.json").exists()
        elsewhere = Keeping(copies=f"s3://{BUCKET}/misspelt")
        with pytest.raises(InputError, match="no answer"):
            next(iter(recorded(tmp_path / "spare" / "run", tiny, cohort, keeping=elsewhere)))
    finally:
        server.start()
    # The place is back: whoever takes up the run again, though it has ended, completes its copy.
    assert list(recorded(tmp_path / "ended" / "run", tiny, cohort, keeping=keeping)) == []
    assert list(recorded(record.folder, tiny, cohort, keeping=keeping)) == []
    same_run(record, undisturbed)


def test_what_is_wrong_with_a_place_is_told_before_anything_is_trained(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, s3: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(url: str) -> str:
        with pytest.raises(InputError) as error:
            next(iter(recorded(tmp_path / "run", tiny, cohort, keeping=Keeping(copies=url))))
        assert error.value.remedy
        assert not (tmp_path / "run" / "config.json").exists()
        return str(error.value)

    (tmp_path / "file").write_text("in the way")
    assert "Not a directory" in refused(str(tmp_path / "file"))
    assert "copies are for when that is lost" in refused(str(tmp_path))
    assert "no bucket 'nowhere'" in refused("s3://nowhere/runs")
    url = s3()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")  # where a machine of AWS would find some
    assert "no credentials in the environment" in refused(url)


def test_a_disk_for_copies_that_is_full_costs_the_run_nothing_and_the_copy_before_still_counts(
    tmp_path: Path,
    small_disk: SmallDisk,
    tiny: RunConfig,
    cohort: Cohort,
    undisturbed: Record,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with small_disk(tmp_path / "disk", "5m") as disk:  # a checkpoint is of 3 MB
        keeping, record = Keeping(copies=str(disk)), Record(tmp_path / "run")
        list(recorded(record.folder, tiny, cohort, keeping=keeping))
        same_run(record, undisturbed)
        assert "no room" in warnings(caplog)[0]
        assert json.loads((record.folder / "copies.json").read_text()) | {"place": ""} == {
            "place": "", "step": 4, "missed": 1,
        }  # fmt: skip
        shutil.rmtree(record.folder)
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        assert [p.step for p in recorded(record.folder, tiny, cohort, keeping=keeping)] == [5, 6, 7, 8]
        same_run(record, undisturbed)


def test_a_copy_that_takes_long_holds_up_no_step_and_there_is_one_at_a_time(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, undisturbed: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, at_work, most, put = threading.Event(), list[str](), list[int](), Folder.put

    def slow(place: Folder, name: str, data: Any, *, private: bool = False) -> None:
        if threading.current_thread().name == "copies":
            at_work.append(name)
            most.append(len(at_work))
            assert free.wait(60)
            at_work.remove(name)
        put(place, name, data, private=private)

    monkeypatch.setattr(Folder, "put", slow)
    keeping, record = Keeping(every=1, copies=str(tmp_path / "nfs")), Record(tmp_path / "run")
    for progress in recorded(record.folder, tiny, cohort, keeping=keeping):
        if progress.step == 7:  # long after the checkpoint that is being copied was let go of here
            assert at_work
            free.set()
    assert max(most) == 1
    same_run(record, undisturbed)
    shutil.rmtree(record.folder)
    assert list(recorded(record.folder, tiny, cohort, keeping=keeping)) == []
    same_run(record, undisturbed)


def test_a_place_that_hangs_for_ever_is_left_behind_at_the_end(
    tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    story, back, put = Story(tmp_path / "run", tiny), threading.Event(), Folder.put
    monkeypatch.setattr(copies, "PATIENCE_S", 0.1)
    made = Copies(story.record.folder, str(tmp_path / "nfs"))
    made.begin(story.config)
    story.open()
    story.block(1)
    monkeypatch.setattr(Folder, "put", lambda *words, **more: (back.wait(), put(*words, **more)))
    made.update()
    hanging = next(thread for thread in threading.enumerate() if thread.name == "copies")
    made.end()
    assert hanging.is_alive()
    assert warnings(caplog) == ["run: a copy hangs; it is left behind"]
    back.set()
    hanging.join()


# --- a copy that is cut off anywhere, without training ----------------------------------------------------------------


class Story:
    """A run's folder, told block by block: four steps, back from a divergence at 4 to 2, and on to 4 again."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.record = Record(folder)
        self.config = config.having({"recovery.times": 1, "evaluations": 4})
        self.generation = 0

    def open(self) -> None:
        self.record.open(self.config, CPU)
        self.record.take_up(0, "", 1)

    def block(self, step: int) -> None:
        value = step + 100 * self.generation
        progress = Progress(step, {"x": value}, 1.0, False, None, 1.0, None, lambda: State({}, {}))
        self.record.add(progress)
        (self.record.folder / "panels").mkdir(exist_ok=True)
        self.record.picture(step).write_bytes(b"%d" % value)
        held = [look for look in (2, 4, 6, 8) if look <= step]
        state = State({"step": value}, {"rng": torch.tensor(value)})
        checkpoint.save(self.record.folder / "checkpoints", step, state, Ranks(), held=held)

    def go_back(self) -> None:
        finding = Finding("non_finite", "x", 3, 3, math.nan, math.inf)
        self.record.go_back(Verdict("diverged", 4, 8, 0.3, (finding,)), self.config)
        self.generation = 1

    def chapters(self) -> list[Callable[[], None]]:
        blocks = [lambda step=step: self.block(step) for step in (1, 2, 3, 4)]
        more = [lambda step=step: self.block(step) for step in (3, 4)]
        return [self.open, *blocks, self.go_back, *more]


def stands_together(record: Record) -> tuple[int, int]:
    """Generation and step of a fetched folder, all of whose parts must be of one moment."""
    extent = Extent.of(record.folder)
    values = [int(row["x"]) for row in record.rows() if row["step"] <= extent.step]
    steps = list(range(1, extent.step + 1))
    assert values == [step + 100 * (extent.returns and step > 2) for step in steps]
    for name in extent.checkpoints:
        step = int(name.removeprefix("step-"))
        assert step <= extent.step
        assert checkpoint.load(record.folder / "checkpoints" / name, 0).shared["step"] == values[step - 1]
    for picture in record.pictures():
        step = int(picture.stem.removeprefix("step-"))
        assert step > extent.step or picture.read_bytes() == b"%d" % values[step - 1]
    assert len(record.taken_back()) == 2 * extent.returns
    return extent.returns, extent.step


def test_a_copy_that_is_cut_off_after_any_object_is_still_one_moment_of_the_run_and_loses_one_interval(
    tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, delete, left = Folder.put, Folder.delete, [0]

    def counted(act: Callable[..., None]) -> Callable[..., None]:
        def acting(*words: Any, **more: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise InputError("nfs", found="no answer", rule="it answers", remedy="wait")
            act(*words, **more)

        return acting

    monkeypatch.setattr(Folder, "put", counted(put))
    monkeypatch.setattr(Folder, "delete", counted(delete))
    reached = set()
    for allowed in itertools.count():
        left[0] = 10_000
        folder, url = tmp_path / str(allowed) / "run", str(tmp_path / str(allowed) / "nfs")
        story, made = Story(folder, tiny), Copies(folder, url)
        made.begin(story.config)
        left[0] = allowed
        before, now = (0, 0), (0, 0)
        for chapter in story.chapters():
            chapter()
            made.end()
            if left[0] < 0:
                break
            before, now = now, Extent.of(folder).order[1:]
        cut, left[0] = left[0] < 0, 10_000
        shutil.rmtree(folder)
        fetched = Copies(folder, url)
        fetched.begin(story.config)
        found = stands_together(Record(folder))
        reached.add(found)
        withdrawn = found == (0, 0)  # while a return is copied
        assert found >= before or (withdrawn and now == (0, 4))
        if not cut:
            assert found == (1, 4)
            break
    assert reached == {(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)}


def test_a_fetch_that_is_cut_off_after_any_object_is_made_good_by_the_next(
    tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    story, url = Story(tmp_path / "run", tiny), str(tmp_path / "nfs")
    made = Copies(story.record.folder, url)
    made.begin(story.config)
    get, left = Folder.get, [10_000]
    for number, chapter in enumerate(story.chapters()):
        chapter()
        if number == 4:  # a folder of before the return: on another machine, say
            shutil.copytree(story.record.folder, tmp_path / "old")
        made.end()

    def counted(place: Folder, name: str) -> memoryview:
        left[0] -= 1
        if left[0] < 0:
            raise InputError("nfs", found="no answer", rule="it answers", remedy="wait")
        return get(place, name)

    monkeypatch.setattr(Folder, "get", counted)
    for allowed in itertools.count(2):  # the two that tell what the place holds
        shutil.rmtree(story.record.folder)
        shutil.copytree(tmp_path / "old", story.record.folder)
        left[0] = allowed
        try:
            Copies(story.record.folder, url).begin(story.config)
            break
        except InputError:
            left[0] = 10_000
            Copies(story.record.folder, url).begin(story.config)
        assert stands_together(story.record) == (1, 4)
    assert allowed > 10
    assert stands_together(story.record) == (1, 4)


def test_what_killed_writers_left_and_old_checkpoints_do_not_pile_up(tmp_path: Path, tiny: RunConfig) -> None:
    story, url = Story(tmp_path / "run", tiny), tmp_path / "nfs"
    left = url / "run" / "checkpoints" / "step-000001"
    left.mkdir(parents=True)
    (left / ".shared.pt.0123abcd.tmp").write_bytes(b"cut off")
    (left / "rank-7.pt").write_bytes(b"of a larger group")
    made = Copies(story.record.folder, str(url))
    made.begin(story.config)
    for chapter in story.chapters()[:6]:
        chapter()
        made.end()
    there = sorted(p.name for p in (url / "run" / "checkpoints").iterdir())
    assert there == sorted(p.name for p in (story.record.folder / "checkpoints").iterdir())
    assert not left.exists()


# --- whose copy it is -------------------------------------------------------------------------------------------------


def test_a_copy_of_other_settings_is_neither_taken_nor_overwritten(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort
) -> None:
    keeping = Keeping(copies=str(tmp_path / "nfs"))
    stopped(tmp_path / "a" / "run", tiny, cohort, keeping, 4)
    before = contents(Place.at(tmp_path / "nfs"))
    with pytest.raises(InputError, match="the copy of a run with other settings"):
        next(iter(recorded(tmp_path / "b" / "run", tiny.at("seed", 1), cohort, keeping=keeping)))
    assert contents(Place.at(tmp_path / "nfs")) == before
    assert not (tmp_path / "b" / "run" / "config.json").exists()


@pytest.mark.parametrize("name", ["../../escaped", "step-000004/../../escaped", "/escaped"])
def test_a_copy_that_names_files_outside_the_run_is_refused(tmp_path: Path, tiny: RunConfig, name: str) -> None:
    place = Folder(tmp_path / "nfs" / "run")
    place.put("config.json", json.dumps(tiny.to_dict()).encode())
    extent = {"step": 4, "returns": 0, "ended": False, "checkpoints": {name: {"shared.pt": 1}}}
    place.put("copied.json", json.dumps(extent).encode())
    with pytest.raises(InputError, match=r"copied\.json: found no readable file"):
        Copies(tmp_path / "run", str(tmp_path / "nfs")).begin(tiny)


def test_a_copy_that_lacks_a_file_it_names_is_refused(tmp_path: Path, tiny: RunConfig) -> None:
    story, url = Story(tmp_path / "run", tiny), tmp_path / "nfs"
    made = Copies(story.record.folder, str(url))
    made.begin(story.config)
    for chapter in story.chapters()[:3]:
        chapter()
    made.end()
    (url / "run" / "checkpoints" / "step-000002" / "rank-0.pt").unlink()
    shutil.rmtree(story.record.folder)
    with pytest.raises(InputError, match=r"rank-0\.pt: found no readable file"):
        Copies(story.record.folder, str(url)).begin(story.config)


def test_nothing_that_is_written_tells_machine_user_or_paths(tmp_path: Path, tiny: RunConfig, cohort: Cohort) -> None:
    keeping = Keeping(copies=str(tmp_path / "nfs"), session="s1")
    list(recorded(tmp_path / "run", tiny.at("steps", 2), cohort, keeping=keeping))
    secrets = [str(tmp_path), socket.gethostname(), str(Path.home())]
    if getpass.getuser() != "root":  # which is a word
        secrets.append(getpass.getuser())
    texts = [
        (tmp_path / "run" / "copies.json").read_text(),
        (tmp_path / "run" / "attempts.jsonl").read_text(),
        (tmp_path / "nfs" / "run" / "copied.json").read_text(),
    ]
    assert not any(secret in text for secret in secrets for text in texts)
