"""Disks that are full, read-only or torn: what is told, and that nothing written is lost. On real, tiny disks."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise import checkpoint
from equipoise.batches import Cohort
from equipoise.checkpoint import State
from equipoise.config import RunConfig
from equipoise.monitor import Verdict
from equipoise.panels import Panels
from equipoise.ranks import Ranks
from equipoise.record import Record, Row
from equipoise.sitting import recorded
from equipoise.train import Progress
from equipoise.writing import append, refusal, told, write
from slicestore.errors import InputError

SmallDisk = Callable[[Path, str], AbstractContextManager[Path]]


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


@contextmanager
def filled(folder: Path, left: int) -> Iterator[None]:
    """Leave so many bytes, in whole pages, on the disk."""
    filler, page = folder / "filler", b"x" * 4096
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                if file.write(page) < len(page):
                    break
            except OSError:
                break
        file.truncate(file.tell() // 4096 * 4096 - left)
    yield
    filler.unlink()


def progress(step: int, panels: Panels | None = None) -> Progress:
    return Progress(step, {"loss/x": 0.1 * step}, 0.5, False, panels, 1.0, None, lambda: State({}, {}))


def numbers(record: Record) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "time/block"} for row in record.rows()]


def explained(error: InputError, *words: str) -> None:
    assert error.rule
    for word in (*words, "resume: nothing written is lost"):
        assert word in str(error)


def test_a_full_disk_is_told_with_the_file_the_room_the_answer_and_the_remedy(tmp_path: Path) -> None:
    error = refusal(tmp_path / "signals.jsonl", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    explained(error, str(tmp_path / "signals.jsonl"), "MB free: No space left on device", "make room")


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EROFS, errno.EACCES])
def test_any_other_answer_of_a_disk_is_told_too(tmp_path: Path, number: int) -> None:
    with pytest.raises(InputError) as error, told(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    explained(error.value, str(tmp_path / "x"), os.strerror(number), "mend the disk, its mount or the right to write")


def test_a_line_never_joins_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for torn in ("", "whole\n", "whole\nto", "to"):
        path.write_text(torn)
        append(path, "new\n")
        assert path.read_text() == torn[: torn.rfind("\n") + 1] + "new\n"


def test_a_line_that_does_not_fit_leaves_those_before_and_nothing_of_itself(
    tmp_path: Path, small_disk: SmallDisk
) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        path = disk / "signals.jsonl"
        append(path, "first\n")
        with filled(disk, 0):
            with pytest.raises(InputError) as error:
                append(path, "x" * 6000 + "\n")
            explained(error.value, str(path), "no room")
            assert path.read_text() == "first\n"
        append(path, "second\n")
        assert path.read_text() == "first\nsecond\n"


def test_a_file_that_cannot_be_replaced_stays_as_it_was_and_no_half_of_another_fills_the_disk(
    small_disk: SmallDisk,
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        write(disk / "returns.json", "old")
        with filled(disk, 8192), pytest.raises(InputError, match="no room"):
            write(disk / "returns.json", "n" * 20_000)
        assert (disk / "returns.json").read_text() == "old"
        assert [path.name for path in disk.iterdir()] == ["returns.json"]


def test_a_checkpoint_that_does_not_fit_does_not_count_and_the_ones_before_stay(
    tmp_path: Path, small_disk: SmallDisk
) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        small, large = (State({"w": torch.randn(count)}, {"rng": torch.zeros(3)}) for count in (100, 100_000))
        for step in (1, 2):
            checkpoint.save(disk, step, small, Ranks())
        with pytest.raises(InputError) as error:
            checkpoint.save(disk, 3, large, Ranks())
        explained(error.value, "shared.pt", "No space left on device")
        assert [path.name for path in checkpoint.complete(disk)] == ["step-000001", "step-000002"]
        assert not list(disk.rglob("shared.pt"))[2:], "nor does it fill the disk"
        checkpoint.save(disk, 3, small, Ranks())
        assert torch.equal(checkpoint.load(disk / "step-000003", 0).shared["w"], small.shared["w"])


def test_panels_and_a_verdict_that_do_not_fit_are_told_by_name(
    tmp_path: Path, small_disk: SmallDisk, tiny: RunConfig
) -> None:
    noise = np.random.default_rng(0).random((2, 64, 64), dtype=np.float32)
    with small_disk(tmp_path / "disk", "512k") as disk:
        record = Record(disk / "run")
        record.open(tiny, torch.device("cpu"))
        with filled(disk, 0):
            with pytest.raises(InputError) as error:
                record.add(progress(1, Panels({"x_s": noise}, {})))
            explained(error.value, "panels", "no room")
            with pytest.raises(InputError) as error:
                record.close(Verdict("stable", 8, 8, 1.0))
            explained(error.value, "verdict.json")
        assert record.rows() == []
        assert record.pictures() == []
        assert record.verdict is None


def test_a_run_whose_disk_fills_up_goes_on_to_the_same_numbers_once_there_is_room(
    small_disk: SmallDisk, tmp_path: Path, tiny: RunConfig, cohort: Cohort
) -> None:
    config = tiny.at("evaluations", 4)  # checkpoints of 3 MB after 2, 4, 6, 8
    list(recorded(tmp_path / "whole", config, cohort))
    with small_disk(tmp_path / "disk", "5m") as disk:
        record = Record(disk / "run")
        with pytest.raises(InputError) as error:
            list(recorded(record.folder, config, cohort))
        explained(error.value, "step-000004", "No space left on device")
        assert [row["step"] for row in record.rows()] == [1, 2, 3, 4]
        found = checkpoint.latest(record.folder / "checkpoints")
        assert found is not None
        assert found.name == "step-000002"
        remount(disk, "size=30m")
        list(recorded(record.folder, config, cohort))
        assert numbers(record) == numbers(Record(tmp_path / "whole"))
        assert record.verdict == Record(tmp_path / "whole").verdict
        assert [(attempt.step, attempt.lost_steps) for attempt in record.attempts] == [(0, 0), (2, 2)]


def test_a_disk_that_became_read_only_is_told_and_the_record_stays_readable(
    small_disk: SmallDisk, tmp_path: Path, tiny: RunConfig, cohort: Cohort
) -> None:
    with small_disk(tmp_path / "disk", "20m") as disk:
        record = Record(disk / "run")
        record.open(tiny, torch.device("cpu"))
        record.add(progress(1))
        remount(disk, "ro")
        with pytest.raises(InputError) as error:
            record.add(progress(2))
        explained(error.value, "signals.jsonl", "Read-only file system")
        with pytest.raises(InputError, match="Read-only file system"):
            next(iter(recorded(record.folder, tiny, cohort)))
        assert [row["step"] for row in record.rows()] == [1]
