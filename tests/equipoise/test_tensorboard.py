"""TensorBoard reads of a run what its record holds, and nothing of the machine."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from equipoise.config import PUBLISHED
from equipoise.monitor import Finding, Verdict
from equipoise.panels import Panels
from equipoise.record import Record
from equipoise.tensorboard import TensorBoardTracker
from equipoise.tracking import Watcher
from slicestore.tfrecord import records

DIVERGED = Verdict("diverged", 2, 4, 0.25, (Finding("non_finite", "loss/ce", 2, 2, math.nan, math.inf),))


@pytest.fixture
def record(tmp_path: Path) -> Record:
    made = Record(tmp_path / "runs" / "000-abc")
    made.open(PUBLISHED.at("steps", 4), torch.device("cpu"))
    Panels({"x_s": np.zeros((1, 8, 8), np.float32)}, {}).save(made.picture(2))
    rows = [{"step": 1, "auc/t": 0.5, "time/block": 1.0}, {"step": 2, "auc/t": "nan", "time/block": 1.0}]
    (made.folder / "signals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def watch(record: Record, folder: Path) -> None:
    with Watcher(lambda: [record], [TensorBoardTracker(folder)], every=60):
        pass


def values(folder: Path) -> list[tuple[int, Summary.Value]]:
    """All that a run's own file says, in order, with its step."""
    (path,) = folder.glob("events.*")
    events = [Event.FromString(payload) for payload in records(path)]
    return [(event.step, value) for event in events for value in event.summary.value]


def test_signals_panels_and_verdict_are_told_under_the_names_that_w_and_b_has_too(
    record: Record, tmp_path: Path
) -> None:
    record.close(DIVERGED)
    watch(record, tmp_path / "tb")
    told = values(tmp_path / "tb" / "000-abc")
    auc = [(step, value.simple_value) for step, value in told if value.tag == "critic/auc_t"]
    assert auc[0] == (1, 0.5)
    assert auc[1][0] == 2
    assert math.isnan(auc[1][1])
    assert [(step, value.image.height) for step, value in told if value.tag == "panels"] == [(2, 128)]
    (text,) = (value for _, value in told if value.tag.startswith("verdict"))
    assert b"loss/ce became nan at step 2" in text.tensor.string_val[0]


def test_a_resumed_run_is_written_anew_from_its_record(record: Record, tmp_path: Path) -> None:
    watch(record, tmp_path / "tb")
    record.close(DIVERGED)
    watch(record, tmp_path / "tb")
    steps = [step for step, value in values(tmp_path / "tb" / "000-abc") if value.tag == "critic/auc_t"]
    assert steps == [1, 2]


def test_neither_file_names_nor_content_tell_the_machine(record: Record, tmp_path: Path) -> None:
    record.close(DIVERGED)
    watch(record, tmp_path / "tb")
    found = [path for path in (tmp_path / "tb").rglob("*") if path.is_file()]
    assert len(found) == 2
    for word in (socket.gethostname(), str(tmp_path)):
        assert not any(word in str(path.relative_to(tmp_path / "tb")) for path in found)
        assert not any(word.encode() in path.read_bytes() for path in found)
