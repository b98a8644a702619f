"""Records are mirrored to whoever watches, completely and once, whatever happens to the watcher."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from handwritten import opened, write

from equipoise.monitor import Verdict
from equipoise.record import Record, Row
from equipoise.tracking import Watcher

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
    return opened(tmp_path, steps=4)


def watch(record: Record, *trackers: object) -> None:
    with Watcher(lambda: [record], trackers, every=60):  # type: ignore[arg-type]
        pass


STABLE = Verdict("stable", 4, 4, 1.0)


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
