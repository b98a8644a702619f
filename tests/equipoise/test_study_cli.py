"""`equipoise study status` and `cost`: of a study that runs, one that was killed, one that has ended."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.checkpoint import State
from equipoise.config import PUBLISHED, RunConfig
from equipoise.record import Record
from equipoise.report import write_report
from equipoise.search import Choice, Range
from equipoise.sessions import Session, sessions
from equipoise.status import Reader
from equipoise.study import Study, StudyFolder
from equipoise.train import Progress
from equipoise.verdict import Finding, Verdict

Command = Callable[..., subprocess.CompletedProcess[str]]
STUDY = Study(
    name="sweep",
    question="Which [rates] keep SIFA stable?",
    run=PUBLISHED.at("steps", 400).at("evaluations", 4),
    space={"optim.lr": Range(1e-5, 1e-2), "loss.adversarial": Choice(("lsgan", "hinge"))},
    first=({},),
    labels=("published",),
    points=6,
)
EXPLODED = Finding("explosion", "loss/cycle_t", onset=200, alarm=260, value=1.5, limit=0.4)
DRIVER = """
import sys, time
from pathlib import Path
from equipoise.sessions import Session
with Session.start(Path(sys.argv[1]), slots=2, workers=1, gpus=0) as session:
    print(session.id, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """Three points that have ended, one that has not, and one that has only just got its folder."""
    made = create(tmp_path / "results" / "sweep", STUDY)
    base = STUDY.run
    record(made, "0000-aaaa", base, 400, 0.7, Verdict("stable", 400, 400, 0.98))
    record(made, "0001-bbbb", base.at("optim.lr", 8e-3), 260, 0.9, Verdict("diverged", 260, 400, 0.4, (EXPLODED,)))
    record(made, "0002-cccc", base.at("loss.adversarial", "hinge"), 100, 0.1, Verdict("censored", 100, 400, None))
    run = record(made, "0003-dddd", base.at("optim.lr", 1e-3), 160, 0.3, None)
    run.take_up(100, "second", workers=1)
    run.add(block(110))
    with open(run.folder / "signals.jsonl", "a") as file:
        file.write('{"step": 120, "time/bl')
    (made.runs / "0004-eeee").mkdir()
    return made


def create(folder: Path, study: Study) -> StudyFolder:
    return StudyFolder.create(folder, study, "python studies/my_sweep.py --address auto --points 6", {"store": None})


def block(step: int, dice: float | None = None) -> Progress:
    signals = {"loss/cycle_t": 1.0} | ({} if dice is None else {"quality/translated_dice": dice})
    return Progress(step, signals, 0.5, dice is not None, None, 0.97, None, lambda: State({}, {}))


def record(
    folder: StudyFolder, name: str, config: RunConfig, steps: int, dice: float, verdict: Verdict | None
) -> Record:
    """Leave a run behind, as a worker would: half a second for ten steps."""
    run = Record(folder.runs / name)
    run.open(config, torch.device("cpu"))
    run.take_up(0, "first", config.workers)
    for step in range(10, steps + 1, 10):
        run.add(block(step, dice if step % 100 == 0 else None))
    if verdict:
        run.close(verdict)
    return run


@contextmanager
def driver(folder: StudyFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process that works on a study."""
    line = [sys.executable, "-c", DRIVER, str(folder.folder)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def told(done: subprocess.CompletedProcess[str]) -> str:
    """What a command printed, its white space evened out."""
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


def data(done: subprocess.CompletedProcess[str]) -> Any:
    """What a command printed as strict JSON."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout, parse_constant=refuse)


# --- status -----------------------------------------------------------------------------------------------------------


def test_status_tells_who_is_at_work_on_what(folder: StudyFolder, command: Command) -> None:
    with driver(folder):
        (session,) = sessions(folder.folder)
        run = record(folder, "0005-ffff", STUDY.run.at("optim.lr", 2e-3), 0, 0.0, None)
        run.take_up(0, session.id, workers=1)
        said = told(command("study", "status", folder.folder))
    for part in (
        "sweep: Which [rates] keep SIFA stable?",
        f"session {session.id} has been at work for ",
        "2 runs at once, 1 worker a run, CPU a worker",
        "3 of 6 points done, 2 more begun",
        "runs: 1 stable, 1 diverged, 1 censored, 2 unfinished",
        # ten steps in half a second; 290 of 400 are left
        "0003-dddd 110/400 20 14 s 0.300 0.970 1 cut off",  # by a session that has ended
        f"0005-ffff 0/400 – – – – 1 {session.id}",
        "best point so far: 0000-aaaa published, Dice 0.700, S 0.980",
        "next: nothing; a session is at work",
    ):
        assert part in said


def test_of_a_study_that_was_killed_status_tells_the_command_that_continues_it(
    folder: StudyFolder, command: Command
) -> None:
    with driver(folder) as process:
        process.kill()
        process.wait()
    (session,) = sessions(folder.folder)
    said = told(command("study", "status", folder.folder))
    assert f"no session is at work; the last, {session.id}, was killed or lost its machine" in said
    assert "0.970 1 cut off" in said
    line = data(command("study", "status", folder.folder, "--json"))["next"]["command"]
    results = str(folder.folder.parent)
    assert shlex.split(line) == [
        *("python", "studies/my_sweep.py", "--resume", "--name", "sweep", "--results", results, "--address", "auto")
    ]
    assert said.endswith(line)


def test_where_studies_are_kept_is_told_only_where_it_is_not_the_usual_folder(
    folder: StudyFolder, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.folder.parent.parent)
    said = told(command("study", "status"))
    assert said.endswith("python studies/my_sweep.py --resume --name sweep --address auto")


@pytest.mark.parametrize(
    ("error", "words"), [(KeyboardInterrupt(), "was interrupted"), (OSError("/home/jane"), "failed: OSError")]
)
def test_how_the_last_session_ended_is_told(
    folder: StudyFolder, command: Command, error: BaseException, words: str
) -> None:
    with pytest.raises(type(error)), Session.start(folder.folder, slots=1, workers=1, gpus=0):
        raise error
    said = told(command("study", "status", folder.folder))
    assert f", {words} 0 s ago" in said
    assert "next: continue with: python" in said


def test_of_a_study_that_has_ended_the_report_is_what_to_read(tmp_path: Path, command: Command) -> None:
    study = dataclasses.replace(STUDY, points=1)
    made = create(tmp_path / "sweep", study)
    record(made, "0000-aaaa", study.run, 400, 0.7, Verdict("stable", 400, 400, 0.98))
    with Session.start(made.folder, slots=1, workers=1, gpus=0):
        write_report(made)
    said = told(command("study", "status", made.folder))
    assert "1 of 1 points done" in said
    assert said.endswith(f"next: read {made.report}")


def test_runs_that_failed_on_every_try_are_told_when_a_study_has_ended(tmp_path: Path, command: Command) -> None:
    study = dataclasses.replace(STUDY, points=1)
    made = create(tmp_path / "sweep", study)
    record(made, "0000-aaaa", study.run, 30, 0.7, None)
    with Session.start(made.folder, slots=1, workers=1, gpus=0):
        write_report(made)
    assert "1 run failed on every try: see error.txt under" in told(command("study", "status", made.folder))


def test_a_study_that_has_only_just_been_declared_has_a_status(tmp_path: Path, command: Command) -> None:
    made = create(tmp_path / "sweep", STUDY)
    said = told(command("study", "status", made.folder))
    assert "no session is known" in said
    assert "0 of 6 points done, 0 more begun" in said
    assert "best point so far: none" in said
    assert data(command("study", "status", made.folder, "--json"))["best"] is None


def test_status_for_programs_is_strict_json_and_names_what_is_not_finite(folder: StudyFolder, command: Command) -> None:
    Record(folder.runs / "0003-dddd").add(block(120, math.nan))
    found = data(command("study", "status", folder.folder, "--json"))
    assert found["points"] == {"planned": 6, "begun": 4, "done": 3, "seeds": 1}
    assert found["runs"] == {"stable": 1, "diverged": 1, "censored": 1, "unfinished": 1}
    assert found["going"] == [
        {"run": "0003-dddd", "label": None, "session": "second", "step": 120, "steps": 400, "steps_per_second": 20.0,
         "seconds_left": 14.0, "dice": "nan", "stability": 0.97, "restarts": 1}
    ]  # fmt: skip
    assert found["best"] == {
        "run": "0000-aaaa", "label": "published", "dice": 0.7, "stability": 0.98, "settings": {}
    }  # fmt: skip
    assert found["sessions"] == []


def test_a_point_of_several_seeds_is_done_when_no_seed_could_change_what_it_is(
    tmp_path: Path, command: Command
) -> None:
    study = dataclasses.replace(STUDY, seeds=2, points=4, first=(), labels=())
    made = create(tmp_path / "sweep", study)
    points = [study.runs({"optim.lr": lr}) for lr in (1e-3, 2e-3, 3e-3, 4e-3)]
    for nth, (dice, stability) in enumerate(((0.6, 1.0), (0.8, 0.94))):  # of the first point, both seeds
        verdict = Verdict("stable", 400, 400, stability)
        record(made, f"0000-{'ba'[nth]}", points[0][nth], 400, dice, verdict)
    record(made, "0001-a", points[1][0], 400, 0.9, Verdict("stable", 400, 400, 1.0))  # its second seed is to come
    record(made, "0002-a", points[2][0], 260, 0.9, Verdict("diverged", 260, 400, 0.4, (EXPLODED,)))  # hopeless
    record(made, "0003-a", points[3][0], 100, 0.1, Verdict("censored", 100, 400, None))
    found = data(command("study", "status", made.folder, "--json"))
    assert found["points"] == {"planned": 4, "begun": 4, "done": 3, "seeds": 2}
    best = found["best"]
    assert (best["run"], best["settings"]) == ("0000-b", {"optim.lr": 1e-3}), "the first seed's run"
    assert (best["dice"], best["stability"]) == (pytest.approx(0.7), pytest.approx(0.94)), "the mean, and the worst"
    page = write_report(made).read_text()
    assert "3 of 4 points of 2 seeds have ended: 3 stable, 1 diverged, 1 censored." in page
    assert "Best point: <b>0000-b</b>, Dice 0.700, S 0.940 over 2 seeds." in page


def test_what_has_ended_is_read_once(folder: StudyFolder) -> None:
    reader = Reader(folder)
    before = reader.read()
    for name in ("0000-aaaa", "0001-bbbb", "0002-cccc"):
        (folder.runs / name / "signals.jsonl").unlink()
    after = reader.read()
    assert before.best
    assert after.best == before.best
    assert (after.done, after.verdicts) == (before.done, before.verdicts)


def test_the_last_row_of_a_long_record_is_found(folder: StudyFolder) -> None:
    run = Record(folder.runs / "0000-aaaa")
    lines = (run.folder / "signals.jsonl").read_text()
    (run.folder / "signals.jsonl").write_text(50 * lines)
    assert (run.folder / "signals.jsonl").stat().st_size > 1 << 16
    best = Reader(folder).read().best
    assert best
    assert best.run.rows == run.rows()[-1:]


def test_watching_goes_on_as_long_as_a_session_does(folder: StudyFolder) -> None:
    line = [sys.executable, "-m", "equipoise.cli", "study", "status", str(folder.folder), "--watch", "0.05", "--json"]
    with driver(folder) as process, subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout
        first = json.loads(watching.stdout.readline())
        assert first["sessions"][0]["alive"]
        process.kill()
        *_, last = watching.stdout
        assert watching.wait() == 0
    assert not json.loads(last)["sessions"][0]["alive"]


def test_a_study_that_is_not_there_is_told_with_a_remedy(tmp_path: Path, command: Command) -> None:
    for what in ("status", "cost"):
        for words in ((tmp_path,), ("--results", tmp_path)):
            done = command("study", what, *words)
            assert done.returncode == 2
            assert done.stderr.startswith(f"error: {tmp_path}: found no ")
            assert "Remedy: " in done.stderr
    done = command("study", "status", tmp_path, "--watch", 0)
    assert done.returncode == 2
    assert "give a number above 0" in done.stderr


# --- cost -------------------------------------------------------------------------------------------------------------


def test_cost_tells_by_verdict_and_in_all_what_was_spent_saved_and_lost(folder: StudyFolder, command: Command) -> None:
    said = told(command("study", "cost", folder.folder))
    # runs, steps; saved by the alarm, the scheduler, lost; the same at .05 s a step; restarts
    assert "stable 1 400 0 0 0 20.0 0.0 0.0 0.0 0" in said
    assert "diverged 1 260 140 0 0 13.0 7.0 0.0 0.0 0" in said
    assert "censored 1 100 0 300 0 5.0 0.0 15.0 0.0 0" in said
    assert "unfinished 1 110 0 0 60 5.5 0.0 0.0 3.0 1" in said
    assert "all 4 870 140 300 60 43.5 7.0 15.0 3.0 1" in said
    assert "sweep: 4 points" in said
    assert "device-seconds" in said
    assert f"{140 / (870 + 440):.1%} of all steps were saved by stopping at the alarm" in said
    assert "no session is known, so neither is the overhead" in said


def test_cost_tells_the_overhead_of_sessions_and_gpu_hours(folder: StudyFolder, command: Command) -> None:
    (folder.folder / "sessions").mkdir()
    about = {"id": "c0ffee00", "began": 1e9, "seen": 1e9 + 7200, "slots": 4, "workers": 1, "gpus": 0.25, "ended": None}
    (folder.folder / "sessions" / "c0ffee00.json").write_text(json.dumps(about))
    said = told(command("study", "cost", folder.folder))
    assert "GPU-hours" in said
    assert "sessions had 2.0 GPU-hours; 100% of them are overhead" in said
    found = data(command("study", "cost", folder.folder, "--json"))
    assert (found["unit_of_hours"], found["gpus_per_worker"], found["hours_had"]) == ("GPU-hours", 0.25, 2.0)
    assert found["overhead_share"] == pytest.approx(1 - 43.5 / (4 * 7200))
    assert found["all"]["hours"] == pytest.approx(43.5 / 3600 / 4)
    assert found["all"]["seconds_lost"] == pytest.approx(3.0)
    assert found["all"]["hours_lost"] == pytest.approx(3.0 / 3600 / 4)
    assert list(found["by_verdict"]) == ["stable", "diverged", "censored", "unfinished"]
    assert sum(part["steps"] for part in found["by_verdict"].values()) == found["all"]["steps"]


def test_cost_of_a_study_without_runs_is_nothing(tmp_path: Path, command: Command) -> None:
    made = create(tmp_path / "sweep", STUDY)
    assert "all 0 0 0 0 0 0.0 0.0 0.0 0.0 0" in told(command("study", "cost", made.folder))
    assert data(command("study", "cost", made.folder, "--json"))["by_verdict"] == {}


def test_both_commands_leave_a_study_as_it_is(folder: StudyFolder, command: Command) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {
            str(path): (path.stat().st_size, path.stat().st_mtime_ns)
            for root, _, files in os.walk(folder.folder)
            for path in (Path(root, name) for name in files)
        }

    before = state()
    for words in (("status",), ("status", "--json"), ("cost",), ("cost", "--json")):
        assert command("study", *words, folder.folder).returncode == 0
    assert state() == before
