"""Going back to before a divergence: what is kept, what changes, what such a run may be called."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from poisoned import poison

from equipoise import checkpoint
from equipoise.account import Account
from equipoise.batches import Cohort
from equipoise.config import PUBLISHED, RunConfig
from equipoise.record import Record
from equipoise.recovery import kept, remedied, words
from equipoise.sitting import recorded
from equipoise.train import fit


def test_halving_halves_every_rate_each_time_and_a_penalty_doubles() -> None:
    halving = PUBLISHED.at("recovery.times", 2)
    assert [remedied(halving, n).optim.lr for n in (0, 1, 2)] == [2e-4, 1e-4, 5e-5]
    assert remedied(halving, 0) == halving
    penalty = PUBLISHED.having({"recovery.times": 2, "recovery.remedy": "penalty"})
    assert [(c.critic.penalty, c.critic.gamma) for n in (0, 1, 2) if (c := remedied(penalty, n))] == [
        ("none", 1.0), ("r1r2", 1.0), ("r1r2", 2.0),
    ]  # fmt: skip
    assert words(halving, 2) == "learning rate 5e-05"
    assert words(penalty, 2) == "penalty r1r2, gamma 2"


def test_enough_checkpoints_are_kept_to_reach_back_a_sixth_of_the_run() -> None:
    assert kept(PUBLISHED) == checkpoint.KEPT
    assert kept(PUBLISHED.at("recovery.times", 1)) == 2 + 4  # of 20 evaluations


def test_a_run_goes_back_to_the_checkpoint_before_the_onset_and_on_with_its_remedy(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.having({"recovery.times": 1, "evaluations": 4})  # checkpoints after 2, 4, 6, 8
    rates = poison(monkeypatch, {6})
    told = list(recorded(tmp_path, config, cohort))
    record = Record(tmp_path)
    assert [p.step for p in told] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert rates == [1e-3] * 6 + [5e-4] * 4
    assert [p.verdict is not None for p in told] == [False] * 9 + [True]
    assert [row["step"] for row in record.rows()] == list(range(1, 9))
    assert all(math.isfinite(row["loss/generator"]) for row in record.rows())
    (back,) = record.returns
    assert (back.step, back.remedy, back.divergence.onset) == (4, "learning rate 0.0005", 6)
    taken = (tmp_path / "return-1.jsonl").read_text().splitlines()
    assert len(taken) == 2, "what was taken back is kept beside"
    assert [row["step"] for row in record.taken_back()] == [5, 6]
    assert Account.of([record]).steps == 8 + 2, "and paid for"
    assert '"NaN"' in taken[-1] or '"nan"' in taken[-1]


def test_such_a_run_is_recovered_and_never_stable_and_its_s_counts_the_first_onset(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {6})
    *_, last = recorded(tmp_path, tiny.having({"recovery.times": 1, "evaluations": 4}), cohort)
    verdict = Record(tmp_path).verdict
    assert verdict is not None
    assert last.verdict is not None
    assert verdict.to_dict() == last.verdict.to_dict()
    assert (verdict.kind, verdict.step) == ("recovered", 8)
    assert verdict.stability is not None
    assert verdict.stability <= 6 / 8
    assert "step 6" in verdict.sentence()


def test_after_its_last_return_a_divergence_ends_it(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {6, 8})
    *_, last = recorded(tmp_path, tiny.having({"recovery.times": 1, "evaluations": 4}), cohort)
    assert last.verdict is not None
    assert (last.verdict.kind, last.verdict.step) == ("diverged", 6)
    assert len(Record(tmp_path).returns) == 1


def test_without_a_checkpoint_before_the_onset_it_starts_again(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = poison(monkeypatch, {1})
    told = list(recorded(tmp_path, tiny.at("recovery.times", 1), cohort))
    assert [p.step for p in told] == [1, *range(1, 9)]
    assert rates == [1e-3] + [5e-4] * 8
    assert Record(tmp_path).returns[0].step == 0


def test_a_run_killed_after_it_went_back_goes_on_with_the_remedy_to_the_same_numbers(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.having({"recovery.times": 1, "evaluations": 4})
    poison(monkeypatch, {6})
    whole = list(recorded(tmp_path / "whole", config, cohort))
    monkeypatch.undo()
    poison(monkeypatch, {6})
    for progress in recorded(tmp_path / "killed", config, cohort):
        if progress.step == 7:
            break
    monkeypatch.undo()
    rates = poison(monkeypatch, set())
    rest = list(recorded(tmp_path / "killed", config, cohort))
    assert rates == [5e-4] * len(rest)
    ours, theirs = rest[-1].verdict, whole[-1].verdict
    assert ours is not None
    assert theirs is not None
    assert ours.to_dict() == theirs.to_dict()
    assert rest[-1].signals == whole[-1].signals


def test_without_recovery_nothing_of_it_is_written(
    tmp_path: Path, tiny: RunConfig, cohort: Cohort, monkeypatch: Any
) -> None:
    poison(monkeypatch, {6})
    *_, last = recorded(tmp_path, tiny, cohort)
    assert last.verdict is not None
    assert last.verdict.kind == "diverged"
    assert not list(tmp_path.glob("return*"))
    assert [p.signals for p in fit(tiny, cohort)][-1].keys() == last.signals.keys()
