"""Records are mirrored to whoever watches, completely and once, whatever happens to the watcher."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.config import PUBLISHED
from equipoise.monitor import Finding, Verdict
from equipoise.panels import Panels
from equipoise.record import Record, Row
from equipoise.tracking import Logged, WandbTracker, Watcher, logged, wandb_mode
from equipoise.wandb_file import history, records, summary
from slicestore.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
NAN = float("nan")


class Notes:
    """A tracker that writes down what it hears."""

    def __init__(self, fails: bool = False) -> None:
        self.steps: list[int] = []
        self.verdicts: list[str] = []
        self.closed = False
        self.fails = fails

    def rows(self, record: Record, rows: Sequence[Row]) -> None:
        self.steps += [int(row["step"]) for row in rows]
        if self.fails:
            raise RuntimeError("the network is gone")

    def ended(self, record: Record, verdict: Verdict) -> None:
        self.verdicts.append(verdict.kind)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def record(tmp_path: Path) -> Record:
    made = Record(tmp_path / "runs" / "000-abc")
    made.open(PUBLISHED.at("steps", 4), torch.device("cpu"))
    return made


def write(record: Record, *rows: Row) -> None:
    with open(record.folder / "signals.jsonl", "a") as file:
        for row in rows:
            file.write(json.dumps({k: str(v) if v != v else v for k, v in row.items()}) + "\n")


def tracker(tmp_path: Path, *, images: bool = False) -> WandbTracker:
    return WandbTracker(tmp_path / "wandb", group="g", prefix="id", mode="offline", images=images)


def watch(record: Record, *trackers: object) -> None:
    with Watcher(lambda: [record], trackers, every=60):  # type: ignore[arg-type]
        pass
    files(record.folder.parents[1])  # W&B's process has written what it was told


def files(tmp_path: Path) -> list[Path]:
    """W&B's files once its own process has written their last record, shortly after it says that it has."""
    found = sorted((tmp_path / "wandb").glob("wandb/offline-run-*/*.wandb"))
    deadline = time.monotonic() + 10
    while not all("exit" in {r.WhichOneof("record_type") for r in records(p)} for p in found):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


STABLE = Verdict("stable", 4, 4, 1.0)
DIVERGED = Verdict("diverged", 2, 4, 0.25, (Finding("non_finite", "loss/ce", 2, 2, NAN, float("inf")),))


def test_every_row_is_told_once_and_in_order(record: Record) -> None:
    notes = Notes()
    watcher = Watcher(lambda: [record], [notes], every=60)
    write(record, {"step": 1}, {"step": 2})
    watcher.look()
    watcher.look()
    write(record, {"step": 3})
    record.close(STABLE)
    watcher.look()
    watcher.look()
    assert (notes.steps, notes.verdicts) == ([1, 2, 3], ["stable"])


def test_a_line_that_is_half_written_is_told_when_it_is_whole(record: Record) -> None:
    notes = Notes()
    watcher = Watcher(lambda: [record], [notes], every=60)
    signals = record.folder / "signals.jsonl"
    signals.write_text('{"step": 1}\n{"st')
    watcher.look()
    assert notes.steps == [1]
    signals.write_text('{"step": 1}\n{"step": 2}\n')
    watcher.look()
    assert notes.steps == [1, 2]


def test_a_run_that_went_back_is_followed_from_there(record: Record) -> None:
    notes = Notes()
    watcher = Watcher(lambda: [record], [notes], every=60)
    write(record, {"step": 1}, {"step": 2}, {"step": 3})
    watcher.look()
    record.rewind(1)
    watcher.look()
    write(record, {"step": 2}, {"step": 3}, {"step": 4})
    watcher.look()
    assert notes.steps == [1, 2, 3, 2, 3, 4]


def test_leaving_the_watcher_tells_the_rest_and_closes(record: Record) -> None:
    notes = Notes()
    write(record, {"step": 1})
    record.close(STABLE)
    watch(record, notes)
    assert (notes.steps, notes.verdicts, notes.closed) == ([1], ["stable"], True)


def test_a_tracker_that_fails_keeps_nothing_from_the_others(record: Record, caplog: pytest.LogCaptureFixture) -> None:
    notes = Notes()
    write(record, {"step": 1})
    record.close(STABLE)
    watch(record, Notes(fails=True), notes)
    assert (notes.steps, notes.verdicts) == ([1], ["stable"])
    assert "a tracker failed; the local record is complete" in caplog.text


def test_a_run_reads_back_from_w_and_b_s_file_with_its_numbers_and_verdict(record: Record, tmp_path: Path) -> None:
    write(record, {"step": 1, "loss/ce": 0.5}, {"step": 2, "loss/ce": NAN})
    record.close(DIVERGED)
    watch(record, tracker(tmp_path))
    (path,) = files(tmp_path)
    rows = history(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss/ce"] == 0.5
    assert rows[1]["loss/ce"] in ("NaN", "nan") or np.isnan(rows[1]["loss/ce"])
    told = summary(path)
    assert (told["verdict"], told["onset"], told["stability"], told["steps"]) == ("diverged", 2, 0.25, 2)
    assert "loss/ce became nan at step 2" in told["sentence"]
    (alert,) = (r.alert for r in records(path) if r.WhichOneof("record_type") == "alert")
    assert alert.title == "diverged"


@pytest.mark.parametrize(
    ("kind", "failed"),
    [
        ("saturated", True),
        ("collapsed", True),
        ("recovered", False),
        ("d_wins", False),
        ("blurry", False),
        ("censored", False),
    ],
)
def test_every_verdict_is_a_tag_and_failures_raise_an_alert(
    record: Record, tmp_path: Path, kind: Any, failed: bool
) -> None:
    write(record, {"step": 1})
    record.close(Verdict(kind, 4, 4, 0.9))
    watch(record, tracker(tmp_path))
    (path,) = files(tmp_path)
    tags = [list(r.run.tags) for r in records(path) if r.WhichOneof("record_type") == "run"]
    assert tags[-1] == ["lsgan", kind]
    titles = [r.alert.title for r in records(path) if r.WhichOneof("record_type") == "alert"]
    assert titles == [kind] * failed


def test_what_a_control_is_called_is_noted(record: Record, tmp_path: Path) -> None:
    write(record, {"step": 1})
    record.close(STABLE)
    names = {record.config: "as published"}
    called = WandbTracker(tmp_path / "wandb", group="g", prefix="id", mode="offline", images=False, names=names)
    watch(record, called)
    (path,) = files(tmp_path)
    assert {r.run.notes for r in records(path) if r.WhichOneof("record_type") == "run"} == {"as published"}


def test_a_resumed_run_goes_on_under_its_id_and_repeats_no_row(record: Record, tmp_path: Path) -> None:
    write(record, {"step": 1}, {"step": 2})
    watch(record, tracker(tmp_path))
    assert logged(tmp_path / "wandb") == {"id-000-abc": Logged(2, ended=False)}
    write(record, {"step": 3}, {"step": 4})
    record.close(STABLE)
    watch(record, tracker(tmp_path))
    first, second = files(tmp_path)
    assert first.name == second.name
    assert [[row["step"] for row in history(path)] for path in (first, second)] == [[1, 2], [3, 4]]


def test_a_run_that_was_logged_to_its_end_is_left_alone(record: Record, tmp_path: Path) -> None:
    write(record, {"step": 1})
    record.close(STABLE)
    for _ in range(2):
        watch(record, tracker(tmp_path))
    assert len(files(tmp_path)) == 1
    assert logged(tmp_path / "wandb") == {"id-000-abc": Logged(1, ended=True)}


@pytest.mark.parametrize("images", [False, True])
def test_panels_reach_w_and_b_only_when_asked_for(record: Record, tmp_path: Path, images: bool) -> None:
    image = np.zeros((1, 8, 8), np.float32)
    Panels({"x_s": image}, {}).save(record.picture(2))
    write(record, {"step": 1}, {"step": 2}, {"step": 3})
    record.close(STABLE)
    watch(record, tracker(tmp_path, images=images))
    (path,) = files(tmp_path)
    assert [("panels._type" in row) for row in history(path)] == [False, images, False]
    assert len(list(path.parent.rglob("*.png"))) == int(images)


def test_settings_go_to_w_and_b_and_nothing_of_the_machine_does(record: Record, tmp_path: Path) -> None:
    write(record, {"step": 1})
    record.close(STABLE)
    watch(record, tracker(tmp_path))
    (path,) = files(tmp_path)
    configs = {u.key: u.value_json for r in records(path) if r.WhichOneof("record_type") == "run"
               for u in r.run.config.update}  # fmt: skip
    assert configs["optim.lr"] == "0.0002"
    assert str(tmp_path).encode() not in path.read_bytes()
    assert {r.run.host for r in records(path) if r.WhichOneof("record_type") == "run"} == {""}


def test_without_a_key_the_mode_is_offline_and_the_sentence_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(None)[0] == "offline"
    mode, sentence = wandb_mode("online")
    assert mode == "offline"
    assert "online was asked for but there is no API key" in sentence
    assert wandb_mode("disabled")[0] == "disabled"


def test_a_file_that_is_no_w_and_b_log_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run-x.wandb"
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match=r"run-x\.wandb: found 14 bytes without W&B's header"):
        history(path)
