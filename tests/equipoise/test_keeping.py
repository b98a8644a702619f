"""Checkpoints between evaluations: how many, and that they change no number."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from poisoned import poison

from equipoise import checkpoint, recovery
from equipoise.batches import Cohort
from equipoise.checkpoint import State
from equipoise.config import PUBLISHED, RunConfig
from equipoise.keeping import Keeping
from equipoise.ranks import Ranks
from equipoise.record import Attempt, Record, Row
from equipoise.sitting import recorded
from equipoise.train import evaluations
from slicestore.errors import InputError


def numbers(record: Record) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "time/block"} for row in record.rows()]


def steps(record: Record) -> list[int]:
    return [checkpoint.step_of(found) for found in checkpoint.complete(record.folder / "checkpoints")]


def stopped(folder: Path, config: RunConfig, cohort: Cohort, keeping: Keeping, step: int) -> Record:
    """A run that was killed after the block that ended with `step`."""
    for progress in recorded(folder, config, cohort, keeping=keeping):
        if progress.step == step:
            break
    return Record(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: RunConfig, cohort: Cohort) -> Record:
    """A run of eight steps with checkpoints at its two evaluations."""
    torch.set_num_threads(1)  # a fixture of a module comes before that of a test which does so
    folder = tmp_path_factory.mktemp("runs") / "whole"
    list(recorded(folder, tiny, cohort))
    return Record(folder)


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"every": -1}, "every: found -1"),
        ({"kept": 1}, "kept: found 1; at least the newest checkpoint stays"),
        ({"copies": "gs://bucket/runs"}, "found a gs URL"),
        ({"copies": "s3://bucket"}, "found no bucket or no prefix"),
        ({"session": "/home/me"}, "no paths or host names"),
    ],
)
def test_what_cannot_be_is_refused_with_value_rule_and_remedy(given: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as error:
        Keeping(**given)  # type: ignore[arg-type]
    assert words in str(error.value)
    assert error.value.remedy


def test_a_folder_for_copies_is_the_same_wherever_workers_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Keeping(copies="nfs").copies == str(tmp_path / "nfs")
    assert Keeping(copies="s3://bucket/runs/").copies == "s3://bucket/runs"


def test_a_checkpoint_is_due_at_the_end_of_the_block_in_which_a_multiple_lies() -> None:
    blocks = list(itertools.pairwise(range(0, 31, 4)))  # of four steps
    assert [after for before, after in blocks if Keeping(every=5).due(before, after)] == [8, 12, 16, 20, 28]
    assert [after for before, after in blocks if Keeping(every=4).due(before, after)] == [4, 8, 12, 16, 20, 24, 28]
    assert not any(Keeping().due(before, after) for before, after in blocks)


# --- checkpoints between evaluations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("stop", "resumed"), [(1, 0), (3, 3), (5, 4), (7, 6)])
def test_a_run_with_a_checkpoint_every_third_step_killed_anywhere_continues_bit_for_bit(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, undisturbed: Record, stop: int, resumed: int
) -> None:
    keeping = Keeping(every=3)
    record = stopped(tmp_path / "run", tiny, cohort, keeping, stop)
    rest = list(recorded(record.folder, tiny, cohort, keeping=keeping))
    assert [p.step for p in rest] == list(range(resumed + 1, 9)), "evaluations are at 4 and 8"
    assert numbers(record) == numbers(undisturbed)
    assert record.verdict == undisturbed.verdict
    ours, theirs = (checkpoint.load(r.folder / "checkpoints" / "step-000008", 0) for r in (record, undisturbed))
    assert all(torch.equal(ours.shared["net"][name], weight) for name, weight in theirs.shared["net"].items())


def test_the_newest_stay_as_many_as_are_asked_for(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, undisturbed: Record
) -> None:
    list(recorded(tmp_path, tiny, cohort, keeping=Keeping(every=1, kept=3)))
    assert steps(Record(tmp_path)) == [6, 7, 8]
    assert numbers(Record(tmp_path)) == numbers(undisturbed)


def test_what_recovery_may_go_back_to_stays_beside_the_newest(tmp_path: Path) -> None:
    for step in range(1, 8):
        state = State({"step": step}, {})
        checkpoint.save(tmp_path, step, state, Ranks(), held=[look for look in (2, 4, 6) if look <= step])
    assert [checkpoint.step_of(found) for found in checkpoint.complete(tmp_path)] == [2, 4, 6, 7]


def test_a_run_may_go_back_to_evaluations_alone_and_only_with_recovery() -> None:
    config, looks = PUBLISHED.at("recovery.times", 1), evaluations(PUBLISHED)
    assert sorted(looks)[:3] == [1000, 2000, 3000]
    assert list(recovery.held(config, 7400, looks)) == [2000, 3000, 4000, 5000, 6000, 7000]
    assert list(recovery.held(PUBLISHED, 7400, looks)) == []
    assert [recovery.goal(onset, looks) for onset in (1, 999, 1000, 2500)] == [0, 0, 1000, 2000]


def test_a_run_goes_back_to_the_same_step_whatever_checkpoints_lie_in_between(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.having({"recovery.times": 1, "evaluations": 4})  # after 2, 4, 6, 8
    with monkeypatch.context() as patch:
        poison(patch, {6})
        list(recorded(tmp_path / "few", config, cohort))
    poison(monkeypatch, {6})
    list(recorded(tmp_path / "many", config, cohort, keeping=Keeping(every=1)))
    few, many = Record(tmp_path / "few"), Record(tmp_path / "many")
    assert [back.step for back in many.returns] == [4], "not 5"
    assert numbers(many) == numbers(few)
    assert many.attempts == [Attempt("", 0, 0, 0.0, 1)], "to go back is no attempt of its own"


# --- attempts ---------------------------------------------------------------------------------------------------------


def test_each_time_that_a_process_takes_up_a_run_is_noted_with_what_is_done_again(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort
) -> None:
    record = stopped(tmp_path / "run", tiny, cohort, Keeping(session="first"), 7)
    done = record.rows()
    with (tmp_path / "run" / "signals.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # torn by the kill
    list(recorded(record.folder, tiny, cohort, keeping=Keeping(session="second")))
    assert record.attempts == [
        Attempt("first", 0, 0, 0.0, 1),
        Attempt("second", 4, 3, sum(row["time/block"] for row in done[4:]), 1),
    ]
    list(recorded(record.folder, tiny, cohort, keeping=Keeping(session="third")))
    assert len(record.attempts) == 2, "a run that has ended is not taken up"


def test_a_run_of_two_workers_is_not_trained_by_one(tmp_path: Path, tiny: RunConfig, cohort: Cohort) -> None:
    with pytest.raises(InputError, match="found 1 where run has 2") as error:
        list(recorded(tmp_path / "run", tiny.at("workers", 2), cohort))
    assert "elastic" in error.value.rule
    assert not (tmp_path / "run").exists()


def test_an_elastic_run_of_two_workers_may_be_trained_by_one_on_the_whole_batch(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, undisturbed: Record
) -> None:
    list(recorded(tmp_path / "run", tiny.at("workers", 2), cohort, elastic=True))
    record = Record(tmp_path / "run")
    assert record.config.workers == 2
    rows = numbers(record)
    assert [row.pop("time/workers") for row in rows] == [1.0] * 8
    assert rows == numbers(undisturbed)
    assert record.attempts == [Attempt("", 0, 0, 0.0, 1)]
