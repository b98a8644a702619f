"""Every end of a run is told to Optuna as what it was, on real Ray, whatever is killed: the contract of a searcher.

The same clauses are put to our searcher and to Ray's own `OptunaSearch`. Those that the latter breaks are marked: they
are why there is one of ours. Should Ray mend them, the marks fail.
"""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pytest

from equipoise.launch.journal import journal
from equipoise.record import Record
from equipoise.search import FLOOR

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
SCRIPT = Path(__file__).with_name("contract_study.py")
CASES: tuple[str, ...] = runpy.run_path(str(SCRIPT))["CASES"]


class Outcome(NamedTuple):
    """What is on record of a study."""

    points: dict[str, optuna.trial.FrozenTrial]
    """Optuna's trials by case, the first of each."""
    trials: int
    """How many there are."""
    tune: list[dict[str, Any]]
    """Tune's: status, last result and settings."""
    folder: Path


def command(folder: Path, who: str, *pause: str) -> list[str]:
    return [sys.executable, str(SCRIPT), str(folder), who, *pause]


def finish(folder: Path, who: str) -> Outcome:
    """Play the study to its end, and read what is said of it."""
    done = subprocess.run(command(folder, who), capture_output=True, text=True, check=False)
    study = optuna.load_study(study_name="contract", storage=journal(folder / "journal.log"))
    assert done.returncode == 0 or who == "stock", done.stderr[-3000:]
    points: dict[str, optuna.trial.FrozenTrial] = {}
    for trial in study.trials:
        points.setdefault(CASES[trial.number % len(CASES)], trial)
    return Outcome(points, len(study.trials), tunes(folder), folder)


def tunes(folder: Path) -> list[dict[str, Any]]:
    """Tune's trials in all its snapshots of the study: status, settings and last result."""
    found = []
    for path in sorted(folder.glob("ray/tune-*/experiment_state-*.json")):
        for about, state in json.loads(path.read_text())["trial_data"]:
            told, now = json.loads(about), json.loads(state)
            found.append({"status": told["status"], "config": told["config"], "last": now["last_result"]})
    return found


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return finish(tmp_path_factory.mktemp("contract") / "ours", "ours")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return finish(tmp_path_factory.mktemp("contract") / "stock", "stock")


def completed(outcome: Outcome) -> None:
    for case in ("completed", "as_good", "last"):
        assert (outcome.points[case].state.name, outcome.points[case].values) == ("COMPLETE", [0.8])


def nan_at_once(outcome: Outcome) -> None:
    trial = outcome.points["nan_at_once"]
    assert (trial.state.name, trial.values) == ("COMPLETE", [FLOOR])
    assert trial.constraints["stability"] > 0


def diverged_late(outcome: Outcome) -> None:
    trial = outcome.points["diverged_late"]
    assert (trial.state.name, trial.values) == ("COMPLETE", [FLOOR])
    assert trial.constraints["stability"] == pytest.approx(0.9 - 250 / 400)


def stopped(outcome: Outcome) -> None:
    trial = outcome.points["stopped"]
    assert (trial.state.name, trial.intermediate_values) == ("PRUNED", {100: 0.1, 200: 0.1})


def killed_once(outcome: Outcome) -> None:
    trial = outcome.points["killed_once"]
    assert (trial.state.name, trial.values) == ("COMPLETE", [0.8])
    assert trial.intermediate_values == {100: 0.8, 200: 0.8, 300: 0.8}


def always_killed(outcome: Outcome) -> None:
    trial = outcome.points["always_killed"]
    assert (trial.state.name, trial.values) == ("FAIL", None)
    assert not trial.constraints


def nothing_is_left_running(outcome: Outcome) -> None:
    assert {trial.state.name for trial in outcome.points.values()} <= {"COMPLETE", "PRUNED", "FAIL"}


def nothing_is_lost_or_twice(outcome: Outcome) -> None:
    assert (sorted(outcome.points), outcome.trials) == (sorted(CASES), len(CASES))


CLAUSES: tuple[Callable[[Outcome], None], ...] = (
    completed,
    nan_at_once,
    diverged_late,
    stopped,
    killed_once,
    always_killed,
    nothing_is_left_running,
    nothing_is_lost_or_twice,
)
BROKEN = {
    nan_at_once: "its trial stays RUNNING: Optuna refuses NaN, and the refusal is but a warning",
    diverged_late: "it cannot tell a constraint, and tells the Dice of a run that diverged as any other",
    stopped: "a run that the scheduler stops is told COMPLETE, and its last Dice is not kept",
    killed_once: "it counts reports by a number that begins anew with the process",
    nothing_is_left_running: "see nan_at_once",
}
"""Clauses that Ray 2.60's OptunaSearch breaks with Optuna 5.0."""


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_our_searcher_keeps_every_clause(ours: Outcome, clause: Callable[[Outcome], None]) -> None:
    clause(ours)


@pytest.mark.long
@pytest.mark.parametrize(
    "clause",
    [
        pytest.param(c, id=c.__name__, marks=[pytest.mark.xfail(reason=BROKEN[c], strict=True)] if c in BROKEN else [])
        for c in CLAUSES
    ],
)
def test_ray_s_own_searcher_keeps_those_that_are_not_marked(stock: Outcome, clause: Callable[[Outcome], None]) -> None:
    clause(stock)


def agree(outcome: Outcome) -> set[str]:
    """Every trial that ended for Tune, in its last word, ended for Optuna in the same way, at the same step.

    Gives the names of their runs: of a study that was killed Tune's snapshot lags behind.
    """
    ended = [trial for trial in outcome.tune if trial["status"] in ("TERMINATED", "ERROR")]
    by_name = {trial.user_attrs["run"]: trial for trial in outcome.points.values()}
    assert {trial["config"]["name"] for trial in ended} <= set(by_name)
    told = {trial["config"]["name"]: trial for trial in ended}  # the last snapshot's word counts
    for name, tuned in told.items():
        trial, last = by_name[name], tuned["last"]
        state = "FAIL" if last.get("spent") else "COMPLETE" if last.get("ended") else "PRUNED"
        assert trial.state.name == state
        if state == "COMPLETE":
            assert trial.user_attrs["steps"] == last["step"]
    return set(told)


def test_tune_s_record_and_optuna_s_agree(ours: Outcome) -> None:
    assert [trial["status"] for trial in ours.tune] == ["TERMINATED"] * len(CASES)
    assert agree(ours) == {trial.user_attrs["run"] for trial in ours.points.values()}


def test_every_run_s_record_agrees_too(ours: Outcome) -> None:
    for trial in ours.points.values():
        verdict = Record(ours.folder / "runs" / trial.user_attrs["run"]).verdict
        if trial.state.name == "FAIL":
            assert verdict is None
        else:
            assert verdict is not None
            assert verdict.kind == trial.user_attrs["verdict"]


def end(folder: Path, log: Path, how: signal.Signals) -> None:
    """Play the study on until another of its runs has ended and one is at work, and end it then."""
    before = {record.name for record in map(Record, folder.glob("runs/*")) if record.verdict}
    with log.open("w") as said:
        process = subprocess.Popen(
            command(folder, "ours", "0.4"), stdout=said, stderr=said,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore it
        )  # fmt: skip
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        records = [Record(path) for path in folder.glob("runs/*")]
        ended = {record.name for record in records if record.verdict}
        if ended - before and any(record.verdict is None and record.rows() for record in records):
            break
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(timeout=240)


@pytest.mark.long
def test_a_study_that_is_ended_by_ctrl_c_and_by_a_kill_goes_on_to_the_same_states(
    tmp_path: Path, ours: Outcome
) -> None:
    folder = tmp_path / "study"
    for how in (signal.SIGINT, signal.SIGKILL):
        end(folder, tmp_path / "log", how)
        study = optuna.load_study(study_name="contract", storage=journal(folder / "journal.log"))
        told = {trial.user_attrs["run"] for trial in study.trials if trial.state.is_finished()}
        before = {r.name: r.verdict.to_dict() for r in map(Record, folder.glob("runs/*")) if r.verdict}
        assert before
    after = finish(folder, "ours")
    for clause in CLAUSES:
        clause(after)
    assert {c: (t.state, t.values) for c, t in after.points.items()} == {
        c: (t.state, t.values) for c, t in ours.points.items()
    }
    for name, verdict in before.items():
        again = Record(folder / "runs" / name).verdict
        assert again is not None
        assert again.to_dict() == verdict  # NaN by its name
    left = {trial.user_attrs["run"] for trial in after.points.values()} - told
    assert left  # it did stop before its end
    assert agree(after) >= left
