"""Staging: which slices, where they lie, who shares them, and what is left behind."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slicestore.errors import InputError
from slicestore.ingest import ingest
from slicestore.inputs import Input
from slicestore.segment import HEADER, MARK, PREFIX
from slicestore.settings import Preprocessing
from slicestore.splits import PARTS, Part
from slicestore.staging import Staged, stage
from slicestore.store import DOMAINS, UNLABELLED, Domain, Store, normalise

WAYS: dict[str, dict[str, Any]] = {"shared": {}, "memory": {"share": False}, "stream": {"share": False, "memory": 0}}
Stage = Callable[..., Staged]
MakeCohort = Callable[..., list[Input]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, make_cohort: MakeCohort, small: Preprocessing) -> Store:
    """Three labelled subjects in each domain: one to train, one to validate, one to test."""
    folder = tmp_path_factory.mktemp("store")
    inputs = make_cohort(folder / "raw", sources=3, targets=3, target_labels=True)
    return ingest(inputs, folder / "cohort.zarr", small)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder of shared memory of the test's own."""
    folder = Path(f"/dev/shm/test-{os.getpid()}-{tmp_path.name}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def copy(original: Store, tmp_path: Path) -> Store:
    """A copy to damage."""
    shutil.copytree(original.path, tmp_path / "cohort.zarr")
    return Store.open(tmp_path / "cohort.zarr")


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*"))


def shard(store: Store) -> Path:
    return Path(store.path) / store.select("source", "train")[0].group / "image" / "c" / "0" / "0" / "0"


def together(store: Store) -> Store:
    """All subjects train."""
    return replace(store, entries=tuple(replace(entry, split="train") for entry in store.entries))


# --- which slices -----------------------------------------------------------------------------------------------------


class TestContent:
    """The same whatever holds it."""

    @pytest.fixture(params=WAYS)
    def staged(self, request: pytest.FixtureRequest, folder: Path) -> Stage:
        def of(store: Store, domain: Domain, part: Part, **settings: Any) -> Staged:
            staged = stage(store, domain, part, folder=folder, **WAYS[request.param], **settings)
            assert staged.where == request.param or not len(staged), "nothing needs no room"
            return staged

        return of

    def test_volumes_follow_each_other_and_are_what_the_store_reads(self, original: Store, staged: Stage) -> None:
        got = staged(together(original), "source", "train")
        assert got.subject.tolist() == [0] * 5 + [1] * 5 + [2] * 5
        assert got.position.tolist() == [0, 1, 2, 3, 4] * 3
        assert [entry.subject for entry in got.entries] == ["s000", "s001", "s002"]
        assert got.image.dtype == np.float16
        assert got.label is not None
        assert got.area is not None
        for index, entry in enumerate(got.entries):
            assert np.array_equal(got.image[got.subject == index], original.read(entry, "image"))
            label = original.read(entry, "label")
            assert np.array_equal(got.label[got.subject == index], label)
            assert got.area[got.subject == index].tolist() == [int((one > 0).sum()) for one in label]

    def test_some_slices_come_in_the_order_asked_for(self, original: Store, staged: Stage) -> None:
        got = staged(together(original), "source", "train")
        index = [14, 0, 7, 7]
        assert got.label is not None
        assert np.array_equal(got.take("image", index), got.image[index])
        assert np.array_equal(got.take("label", index), got.label[index])
        out = np.zeros((4, 16, 16), dtype=np.float16)
        assert got.take("image", index, out) is out
        assert np.array_equal(out, got.image[index])
        assert got.take("image", []).shape == (0, 16, 16)
        for beyond in (15, -1):
            with pytest.raises(IndexError, match="of 15"):
                got.take("image", [beyond])

    def test_labels_of_the_target_domain_judge_and_never_teach(self, original: Store, staged: Stage) -> None:
        train = staged(original, "target", "train")
        assert train.label is None
        assert train.area is None
        with pytest.raises(KeyError):
            train.take("label", [0])
        for part in ("val", "test"):
            label = staged(original, "target", part).label
            assert label is not None
            assert set(np.unique(label)) == {0, 1}

    def test_slices_of_an_unlabelled_volume_among_labelled_ones_say_so(
        self,
        tmp_path: Path,
        make_cohort: MakeCohort,
        small: Preprocessing,
        staged: Stage,
    ) -> None:
        inputs = make_cohort(tmp_path / "raw", sources=1, targets=3, target_labels=True)
        store = ingest([*inputs[:-1], replace(inputs[-1], label=None)], tmp_path / "cohort.zarr", small)
        mixed = replace(store, entries=tuple(replace(entry, split="val") for entry in store.entries))
        got = staged(mixed, "target", "val", fixed=(-2.0, 4.0))
        assert got.label is not None
        assert got.area is not None
        (bare,) = (index for index, entry in enumerate(got.entries) if not entry.labelled)
        assert (got.label[got.subject == bare] == UNLABELLED).all()
        assert not got.area[got.subject == bare].any()
        assert got.label[got.subject != bare].max() == 1

    def test_a_split_without_subjects_is_empty(self, original: Store, staged: Stage) -> None:
        alone = replace(original, entries=tuple(e for e in original.entries if e.split == "train"))
        got = staged(alone, "source", "val")
        assert got.image.shape == (0, 16, 16)
        assert got.label is None
        assert got.limits == alone.limits("source")

    def test_a_zero_frame_is_zero_after_normalisation(
        self, tmp_path: Path, make_cohort: MakeCohort, staged: Stage
    ) -> None:
        inputs = make_cohort(tmp_path / "raw", sources=1, targets=1)
        made = {
            pad: ingest(
                inputs, tmp_path / f"{pad}.zarr", Preprocessing(size=24, spacing_mm=1.0, pad=pad, centre="grid")
            )
            for pad in ("zero", "background")
        }
        for limits in ({"pooled": False}, {"pooled": True}, {"fixed": (-2.0, 2.0)}, {"fixed": (-4.0, 5.0)}):
            zero, air = (staged(made[pad], "source", "train", **limits) for pad in ("zero", "background"))
            values = normalise(zero.image, zero.limits)
            assert np.abs(values[:, :6]).max() < 1e-3  # 12 rows of image in 24
            assert np.abs(values[:, :, :7]).max() < 1e-3  # 10 columns
            assert np.array_equal(zero.image[:, 6:18, 7:17], air.image[:, 6:18, 7:17])
            assert np.abs(normalise(air.image, air.limits)[:, :6]).max() > 0.05

    def test_damage_is_told_with_the_subject_wherever_it_is_met(self, copy: Store, staged: Stage) -> None:
        file = shard(copy)
        data = bytearray(file.read_bytes())
        data[40] ^= 1
        file.write_bytes(data)
        with pytest.raises(InputError, match="image of source subject s00"):
            _ = staged(copy, "source", "train").image
        assert staged(copy, "target", "train").image.shape == (5, 16, 16)


def test_limits_are_measured_on_training_subjects_or_given(original: Store) -> None:
    assert stage(original, "source", "val").limits == original.limits("source")
    assert stage(original, "target", "test", pooled=True).limits == original.limits("target", pooled=True)
    assert stage(original, "target", "test", percentile=5.0).limits == original.limits("target", percentile=5.0)
    assert stage(original, "source", "train", fixed=(-1.8, 4.4)).limits == (-1.8, 4.4)


def test_by_slice_every_slice_is_in_one_part_and_every_subject_in_several(original: Store) -> None:
    for domain in DOMAINS:
        parts = {part: stage(original, domain, part, by="slice") for part in PARTS}
        taken = {
            part: {(got.entries[s].subject, int(p)) for s, p in zip(got.subject, got.position, strict=True)}
            for part, got in parts.items()
        }
        assert [len(taken[part]) for part in PARTS] == [9, 3, 3]  # 60, 20 and 20 % of 15
        assert len(set.union(*taken.values())) == 15
        assert {subject for subject, _ in taken["train"]} & {subject for subject, _ in taken["val"] | taken["test"]}
        for got in parts.values():
            for row, (subject, position) in enumerate(zip(got.subject, got.position, strict=True)):
                assert np.array_equal(got.image[row], original.read(got.entries[subject], "image")[position])
        assert parts["train"].limits == together(original).limits(domain), "all subjects train"
    assert stage(original, "target", "train", by="slice").label is None


# --- where they lie ---------------------------------------------------------------------------------------------------

CHILD = """
import json, os, sys
from pathlib import Path
from slicestore.staging import stage
from slicestore.store import Store
staged = stage(Store.open(sys.argv[1]), "source", "train", folder=Path(sys.argv[2]))
print(json.dumps([staged.where, float(staged.image.astype("f8").sum())]), flush=True)
sys.stdin.readline()
"""


@contextmanager
def child(store: Store, folder: Path, script: str = CHILD) -> Iterator[subprocess.Popen[str]]:
    """Another process that stages, says what it got, and waits for a line or its death."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(store.path), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def told(process: subprocess.Popen[str]) -> list[object]:
    assert process.stdout is not None
    answer: list[object] = json.loads(process.stdout.readline())
    return answer


def mapped(process: int, folder: Path) -> set[str]:
    """Inodes of the segments that a process maps."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if str(folder / PREFIX) in line}


class TestSharing:
    def test_two_processes_share_one_copy_and_the_second_reads_no_shard(self, copy: Store, folder: Path) -> None:
        first = stage(copy, "source", "train", folder=folder)
        assert first.where == "shared"
        assert not first.image.flags.writeable
        for file in Path(copy.path).rglob("c/0/0/0"):  # as long as before, so that the store still opens
            file.write_bytes(bytes(file.stat().st_size))
        with child(copy, folder) as second:
            assert told(second) == ["shared", float(first.image.astype(np.float64).sum())]
            (inode,) = mapped(os.getpid(), folder)
            assert mapped(second.pid, folder) == {inode}
            assert [str(path.stat().st_ino) for path in segments(folder)] == [inode]
        with pytest.raises(InputError, match="damaged"):
            stage(copy, "source", "train", folder=folder, share=False)

    def test_it_is_readable_by_its_owner_alone(self, original: Store, folder: Path) -> None:
        staged = stage(original, "source", "train", folder=folder)
        assert len(staged) == 5
        (path,) = segments(folder)
        assert path.stat().st_mode & 0o777 == 0o600

    def test_it_goes_with_its_last_user(self, original: Store, folder: Path) -> None:
        first = stage(original, "source", "train", folder=folder)
        second = stage(original, "source", "train", folder=folder)
        view = first.image[2:3]
        del first
        gc.collect()
        assert len(segments(folder)) == 1
        del second
        gc.collect()
        assert len(segments(folder)) == 1, "a view of a slice is a user too"
        assert np.isfinite(view).all()
        del view
        gc.collect()
        assert segments(folder) == []

    def test_a_process_that_ends_leaves_nothing(self, original: Store, folder: Path) -> None:
        with child(original, folder) as other:
            told(other)
            assert len(segments(folder)) == 1
            other.communicate("\n")
            assert other.returncode == 0
        assert segments(folder) == []

    def test_what_killed_users_left_is_removed_by_the_next_comer_whatever_that_wants(
        self, original: Store, folder: Path
    ) -> None:
        with child(original, folder) as other:
            told(other)
        (left,) = segments(folder)
        staged = stage(original, "target", "train", folder=folder)
        assert staged.where == "shared"
        assert len(segments(folder)) == 1
        assert not left.exists()

    def test_a_killed_user_does_not_take_it_from_those_who_live(self, original: Store, folder: Path) -> None:
        staged = stage(original, "source", "train", folder=folder)
        (path,) = segments(folder)
        with child(original, folder) as other:
            told(other)
        stage(original, "target", "train", folder=folder)
        assert path.exists()
        assert np.array_equal(staged.image, stage(original, "source", "train", share=False).image)

    def test_other_choices_have_segments_of_their_own(self, original: Store, folder: Path) -> None:
        held = [stage(original, "source", "train", folder=folder)]
        held.append(stage(original, "source", "train", pooled=True, folder=folder))
        assert len(segments(folder)) == 1, "limits are applied later, and change no stored value"
        held.append(stage(original, "source", "train", by="slice", folder=folder))
        held.append(stage(original, "source", "val", folder=folder))
        held.append(stage(together(original), "source", "train", folder=folder))
        assert len(segments(folder)) == 4
        assert [len(staged) for staged in held] == [5, 5, 9, 5, 15]

    def test_a_child_by_fork_does_not_end_it_for_its_parent(self, original: Store, folder: Path) -> None:
        staged = stage(original, "source", "train", folder=folder)
        process = os.fork()
        if not process:
            del staged
            gc.collect()
            os._exit(0)
        os.waitpid(process, 0)
        with child(original, folder) as other:
            told(other)
            assert len(segments(folder)) == 1
            assert mapped(other.pid, folder) == mapped(os.getpid(), folder)
        assert len(staged) == 5


HALF = """
import os, signal, sys
from pathlib import Path
from slicestore.selection import Selection
from slicestore.staging import stage
from slicestore.store import Store
whole = Selection.read_image
def half(self, rows, out):
    whole(self, rows, out)
    print("null", flush=True)
    sys.stdin.readline()
Selection.read_image = half
stage(Store.open(sys.argv[1]), "source", "train", folder=Path(sys.argv[2]), threads=1)
"""
"""Stops in the middle of filling, labels still to come, and says so."""


class TestFilling:
    def test_a_killed_filler_leaves_nothing_that_a_later_one_trusts(self, original: Store, folder: Path) -> None:
        with child(original, folder, HALF) as filler:
            told(filler)
            (path,) = segments(folder)
            assert path.read_bytes()[: len(MARK)] == bytes(len(MARK))
            os.kill(filler.pid, signal.SIGKILL)
            filler.wait()
        assert len(segments(folder)) == 1
        staged = stage(original, "source", "train", folder=folder)
        want = stage(original, "source", "train", share=False)
        assert staged.where == "shared"
        assert np.array_equal(staged.image, want.image)
        assert staged.label is not None
        assert want.label is not None
        assert np.array_equal(staged.label, want.label)

    def test_others_wait_for_the_filler_and_take_over_when_it_is_killed(self, original: Store, folder: Path) -> None:
        want = ["shared", float(stage(original, "source", "train", share=False).image.astype(np.float64).sum())]
        with child(original, folder, HALF) as filler:
            told(filler)
            (unfinished,) = segments(folder)
            size = unfinished.stat().st_size
            with child(original, folder) as one, child(original, folder) as two:
                time.sleep(1.5)  # both come to the lock; were they not waiting, they would have made or told something
                assert [path.stat().st_size for path in segments(folder)] == [size]
                filler.kill()
                assert told(one) == told(two) == want
                assert mapped(one.pid, folder) == mapped(two.pid, folder) != set()

    def test_an_error_while_filling_leaves_no_segment(self, copy: Store, folder: Path) -> None:
        file = shard(copy)
        whole = file.read_bytes()
        file.write_bytes(bytes(len(whole)))
        with pytest.raises(InputError, match="damaged") as error:
            stage(copy, "source", "train", folder=folder)
        assert segments(folder) == []
        file.write_bytes(whole)
        assert stage(copy, "source", "train", folder=folder).where == "shared", "though the error is still held"
        assert error.value.found


class TestRoom:
    def test_without_the_folder_memory_is_private(self, original: Store, tmp_path: Path) -> None:
        assert stage(original, "source", "train", folder=tmp_path / "none").where == "memory"

    def test_with_too_little_memory_slices_are_streamed(self, original: Store, folder: Path) -> None:
        size = 5 * 16 * 16 * 3 + 5 * 12  # image, label, three whole numbers a slice
        assert stage(original, "source", "train", memory=size, share=False).where == "memory"
        assert stage(original, "source", "train", memory=size - 1, share=False).where == "stream"
        assert stage(original, "source", "train", memory=size - 1, folder=folder).where == "stream"
        assert segments(folder) == []

    def test_what_is_shared_already_takes_no_memory(self, original: Store, folder: Path) -> None:
        first = stage(original, "source", "train", folder=folder)
        assert stage(original, "source", "train", folder=folder, memory=0).where == first.where == "shared"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
    def test_a_file_system_that_is_too_small_is_left_alone(self, original: Store, tmp_path: Path) -> None:
        want = float(stage(original, "source", "train", share=False).image.astype(np.float64).sum())
        script = f"""
import subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", sys.argv[2]], check=True)
{CHILD}
"""
        unshared = ["unshare", "-m", sys.executable, "-c", script, str(original.path), str(tmp_path)]
        try:
            found = subprocess.run(unshared, input="\n", capture_output=True, text=True, check=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no mount in a namespace here: {error}")
        assert json.loads(found.stdout) == ["memory", want]

    def test_a_file_of_that_name_that_someone_else_put_there_is_not_trusted(
        self, original: Store, folder: Path, tmp_path: Path
    ) -> None:
        staged = stage(original, "source", "train", folder=folder)
        (path,) = segments(folder)
        name = path.name
        del staged
        gc.collect()
        (folder / name).symlink_to(tmp_path / "elsewhere")
        assert stage(original, "source", "train", folder=folder).where == "memory"
        assert not (tmp_path / "elsewhere").exists()
        if os.geteuid() == 0:
            (folder / name).unlink()
            (folder / name).write_bytes(MARK.ljust(HEADER, b"\0"))
            os.chown(folder / name, 12345, -1)
            assert stage(original, "source", "train", folder=folder).where == "memory"
