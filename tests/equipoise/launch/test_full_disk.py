"""A disk that fills up stops a study with a word, and costs nothing that was written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import optuna
import pytest

from equipoise.launch.journal import journal
from equipoise.record import Record
from equipoise.study import StudyFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).with_name("tiny_study.py")
SMALL, LARGE = "3m", "300m"
SmallDisk = Callable[[Path, str], AbstractContextManager[Path]]


@pytest.mark.long
def test_a_study_on_a_full_disk_stops_and_goes_on_when_there_is_room(
    store: Path, tmp_path: Path, small_disk: SmallDisk
) -> None:
    with small_disk(tmp_path / "disk", SMALL) as disk:
        line = [sys.executable, str(SCRIPT), "--results", str(disk), "--confirm-workers", "0"]
        environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "200"}
        more = ["--store", str(store), "--wandb", "disabled"]
        full = subprocess.run([*line, *more], capture_output=True, text=True, check=False, env=environment)
        assert full.returncode == 2, full.stdout[-2000:] + full.stderr[-2000:]
        told = " ".join(full.stderr.split())
        assert "error: " in told
        assert "nothing written is lost" in told
        folder = StudyFolder.open(disk / "tiny")
        before = {record.name: record.rows() for record in folder.records() if record.verdict}

        subprocess.run(["mount", "-o", f"remount,size={LARGE}", disk], check=True)
        again = subprocess.run([*line, "--resume"], capture_output=True, text=True, check=False, env=environment)
        assert again.returncode == 0, again.stderr[-3000:]
        trials = optuna.load_study(study_name="tiny", storage=journal(folder.journal)).trials
        assert [trial.number for trial in trials] == list(range(folder.study.points))
        assert {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED"}
        for trial in trials:
            record = Record(folder.runs / trial.user_attrs["run"])
            assert record.verdict is not None
            assert [row["step"] for row in record.rows()] == list(range(1, record.verdict.step + 1))
            assert before.get(record.name, record.rows()) == record.rows()
