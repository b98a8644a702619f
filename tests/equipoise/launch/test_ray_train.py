"""One run over two workers: it survives the loss of one, and a study of such runs stops and closes them."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from equipoise import checkpoint
from equipoise.config import PUBLISHED
from equipoise.launch.cluster import Share, connect
from equipoise.launch.ray_train import train
from equipoise.record import Record, Row
from equipoise.study import StudyFolder
from slicestore.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).with_name("tiny_study.py")


def workers() -> list[int]:
    """Process ids of Ray Train's workers that belong to the Ray of this process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended while we looked
            line, number = path.read_bytes(), int(path.parent.name)
            if b"ray::" in line and b"TrainWorker" in line and os.getpid() in (parent(number), parent(parent(number))):
                found.append(number)
    return found


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def numbers(record: Record) -> list[Row]:
    """The record's rows without the wall time, which no two runs share."""
    return [{k: v for k, v in row.items() if k != "time/block"} for row in record.rows()]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.long
def test_a_run_that_loses_a_worker_goes_on_from_its_checkpoint_to_the_same_numbers(store: Path, tmp_path: Path) -> None:
    config = PUBLISHED.at("net.width", 0.0625).at("batch", 4).at("pool", 3).at("steps", 30).at("evaluations", 3)
    config = config.at("workers", 2).at("data.cohort", Store.open(store).fingerprint)
    whole, harmed = (Record(tmp_path / "runs" / name) for name in ("whole", "harmed"))
    with connect(None):
        train(whole.folder, config, store, Share())
        before = set(workers())
        thread = threading.Thread(target=train, args=(harmed.folder, config, store, Share()))
        thread.start()
        while checkpoint.latest(harmed.folder / "checkpoints") is None:
            assert thread.is_alive()
            time.sleep(0.05)
        victims = sorted(set(workers()) - before)
        assert len(victims) == 2
        os.kill(victims[1], signal.SIGKILL)
        thread.join()
    assert whole.verdict is not None
    assert whole.verdict == harmed.verdict
    assert [row["step"] for row in harmed.rows()] == list(range(1, 31))
    assert numbers(harmed) == numbers(whole)


@pytest.mark.long
def test_a_study_of_two_worker_runs_stops_the_worse_and_closes_every_record(store: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(SCRIPT), "--store", str(store), "--results", str(tmp_path), "--wandb", "disabled"]
    more = ["--workers-per-run", "2", "--points", "3", "--steps", "16", "--confirm-workers", "0"]
    done = subprocess.run(
        [*line, *more], capture_output=True, text=True, check=False, env=os.environ | {"NO_COLOR": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = StudyFolder.open(tmp_path / "tiny").records()
    assert len(records) == 3
    for record in records:
        assert record.config.workers == 2
        assert record.verdict is not None
        assert [row["step"] for row in record.rows()] == list(range(1, record.verdict.step + 1))
