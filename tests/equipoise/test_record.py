"""A run's folder: complete, resumable, private."""

from __future__ import annotations

import dataclasses
import getpass
import json
import math
import os
import platform
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise import checkpoint
from equipoise import environment as module
from equipoise.batches import Cohort
from equipoise.checkpoint import State
from equipoise.config import RunConfig
from equipoise.monitor import Finding, Verdict
from equipoise.record import Record, Row
from equipoise.sitting import recorded
from equipoise.step import Batch, Signals
from equipoise.train import Progress, Run, fit
from slicestore.errors import InputError

CPU = torch.device("cpu")
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="no git here")


def progress(step: int, **signals: float) -> Progress:
    return Progress(step, signals, 0.5, False, None, 0.75, None, lambda: State({}, {}))


def fresh(folder: Path, config: RunConfig) -> Record:
    record = Record(folder)
    record.open(config, CPU)
    return record


def untimed(record: Record) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "time/block"} for row in record.rows()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: RunConfig, cohort: Cohort) -> Record:
    """A run of eight steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    list(recorded(folder, tiny, cohort))
    return Record(folder)


class TestRows:
    def test_a_row_holds_step_signals_stability_and_time(self, tmp_path: Path, tiny: RunConfig) -> None:
        record = fresh(tmp_path, tiny)
        record.add(progress(3, **{"loss/x": 0.1}))
        assert record.rows() == [{"step": 3, "loss/x": 0.1, "divergence/stability": 0.75, "time/block": 0.5}]

    def test_numbers_come_back_to_the_last_bit_and_non_finite_ones_in_strict_json(
        self, tmp_path: Path, tiny: RunConfig
    ) -> None:
        def refuse(name: str) -> float:
            raise AssertionError(f"{name} is no JSON")

        record = fresh(tmp_path, tiny)
        values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1 + 0.2, "e": 1e-40, "f": -0.0}
        record.add(progress(1, **values))
        json.loads((tmp_path / "signals.jsonl").read_text(), parse_constant=refuse)
        (row,) = record.rows()
        assert math.isnan(row["a"])
        assert [row[k] for k in "bcdef"] == [values[k] for k in "bcdef"]

    def test_a_torn_last_line_is_dropped(self, tmp_path: Path, tiny: RunConfig) -> None:
        record = fresh(tmp_path, tiny)
        for number in (1, 2):
            record.add(progress(number, x=1.0))
        path = tmp_path / "signals.jsonl"
        whole = path.read_text()
        for cut in range(len(whole.split("\n")[0]) + 1, len(whole)):  # anywhere in the second line
            path.write_text(whole[:cut])
            assert [row["step"] for row in record.rows()] == [1], whole[:cut]

    def test_rows_can_be_read_from_a_number_on_and_before_there_are_any(self, tmp_path: Path, tiny: RunConfig) -> None:
        record = fresh(tmp_path, tiny)
        assert record.rows() == []
        for number in (10, 20, 30):
            record.add(progress(number))
        assert [row["step"] for row in record.rows(1)] == [20, 30]
        assert record.rows(3) == []

    def test_rewinding_drops_what_lies_after_the_step_and_what_is_torn(self, tmp_path: Path, tiny: RunConfig) -> None:
        record = fresh(tmp_path, tiny)
        for number in (10, 20, 30):
            record.add(progress(number, x=math.nan))
        with (tmp_path / "signals.jsonl").open("a") as file:
            file.write('{"step": 40, "x"')
        record.rewind(20)
        record.add(progress(30, x=2.0))
        assert [row["step"] for row in record.rows()] == [10, 20, 30]
        assert record.rows()[-1]["x"] == 2.0
        record.rewind(0)
        assert record.rows() == []


class TestSettings:
    def test_they_come_back_equal(self, tmp_path: Path, tiny: RunConfig) -> None:
        assert fresh(tmp_path, tiny).config == tiny

    def test_the_same_run_may_open_its_folder_again_and_changes_nothing(self, tmp_path: Path, tiny: RunConfig) -> None:
        fresh(tmp_path, tiny)
        before = contents(tmp_path)
        fresh(tmp_path, RunConfig.from_dict(json.loads(json.dumps(tiny.to_dict()))))
        assert contents(tmp_path) == before

    def test_other_settings_are_refused_and_named_with_both_values(self, tmp_path: Path, tiny: RunConfig) -> None:
        fresh(tmp_path, tiny)
        before = contents(tmp_path)
        with pytest.raises(InputError) as error:
            fresh(tmp_path, tiny.at("optim.lr", 0.25).at("steps", 9))
        assert "optim.lr was 0.001, is 0.25" in error.value.found
        assert "steps was 8, is 9" in error.value.found
        assert "batch" not in error.value.found
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("text", ["{", "{}x", '{"no_such_setting": 1}', '{"steps": "many"}'])
    def test_a_config_that_cannot_be_read_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json"):
            _ = Record(tmp_path).config

    def test_a_folder_without_a_config_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError):
            _ = Record(tmp_path / "nowhere").config


class TestVerdict:
    def test_it_comes_back_with_the_horizon_it_was_judged_by(self, tmp_path: Path, tiny: RunConfig) -> None:
        record = fresh(tmp_path, tiny.at("steps", 2000))
        finding = Finding("non_finite", "grad/critic", 7, 7, math.nan, math.inf)
        record.close(Verdict("diverged", 8, 2000, 0.0035, (finding,)))
        found = record.verdict
        assert found is not None
        assert (found.kind, found.onset, found.stability) == ("diverged", 7, 0.0035)
        told = json.loads((tmp_path / "verdict.json").read_text())
        assert told["horizon"] == {"steps": 2000, "block": 5, "warm_up": 20, "hold": 10}
        assert told["sentence"] == "diverged after 8 of 2000 steps: grad/critic became nan at step 7"


class TestLock:
    def test_a_folder_that_another_writes_is_refused_once_patience_ends(self, tmp_path: Path) -> None:
        with (
            Record(tmp_path).locked(),
            pytest.raises(InputError, match="another process") as error,
            Record(tmp_path).locked(patience=0.0),
        ):
            pass
        assert error.value.where == str(tmp_path)

    def test_it_is_let_go_of_at_the_end_and_after_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError), Record(tmp_path).locked():
            raise KeyError
        with Record(tmp_path).locked(patience=0.0):
            pass

    def test_a_running_run_holds_it_and_an_abandoned_one_does_not(
        self, tmp_path: Path, tiny: RunConfig, cohort: Cohort
    ) -> None:
        run = recorded(tmp_path, tiny, cohort)
        next(run)
        with pytest.raises(InputError), Record(tmp_path).locked(patience=0.0):
            pass
        run.close()  # type: ignore[attr-defined]
        with Record(tmp_path).locked(patience=0.0):
            pass


class TestRecorded:
    def test_every_progress_is_on_disk_before_it_is_handed_on(
        self, tmp_path: Path, tiny: RunConfig, cohort: Cohort
    ) -> None:
        record = Record(tmp_path)
        for number, p in enumerate(recorded(tmp_path, tiny, cohort), start=1):
            rows = record.rows()
            assert len(rows) == number
            assert rows[-1]["step"] == p.step
            assert {k: rows[-1][k] for k in p.signals} == p.signals
            assert record.picture(p.step).is_file() == p.looked
            found = checkpoint.latest(tmp_path / "checkpoints")
            assert (found is not None and found.name == f"step-{p.step:06d}") == p.looked
            assert (record.verdict is not None) == (p.step == 8)

    def test_it_is_fit_written_down(self, undisturbed: Record, tiny: RunConfig, cohort: Cohort) -> None:
        for p, row in zip(fit(tiny, cohort), undisturbed.rows(), strict=True):
            assert row.items() >= p.signals.items()
        assert [p.name for p in undisturbed.pictures()] == ["step-000004.png", "step-000008.png"]
        assert sorted(p.name for p in undisturbed.folder.iterdir() if not p.name.startswith(".")) == [
            "attempts.jsonl", "changes.diff", "checkpoints", "config.json", "environment.json", "intake.json",
            "panels", "signals.jsonl", "verdict.json", "weights",
        ]  # fmt: skip

    @pytest.mark.parametrize("stop", [1, 4, 6])
    def test_a_run_that_is_abandoned_and_continued_leaves_the_rows_of_an_undisturbed_one(
        self, tmp_path: Path, tiny: RunConfig, cohort: Cohort, undisturbed: Record, stop: int
    ) -> None:
        for p in recorded(tmp_path, tiny, cohort):
            if p.step == stop:
                break
        del p
        with (tmp_path / "signals.jsonl").open("a") as file:
            file.write('{"step": 7, "loss/cyc')  # and a kill tore a line
        steps = [p.step for p in recorded(tmp_path, tiny, cohort)]
        assert steps == list(range(1 if stop < 4 else 5, 9)), "from the last checkpoint on"
        record = Record(tmp_path)
        assert untimed(record) == untimed(undisturbed)
        assert record.verdict == undisturbed.verdict
        states = [checkpoint.load(r.folder / "checkpoints" / "step-000008", 0) for r in (record, undisturbed)]
        for name, weight in states[0].shared["net"].items():
            assert torch.equal(weight, states[1].shared["net"][name])
        for picture in undisturbed.pictures():
            assert record.picture(int(picture.stem[5:])).read_bytes() == picture.read_bytes()

    def test_an_ended_run_yields_nothing_and_changes_nothing(
        self, undisturbed: Record, tiny: RunConfig, cohort: Cohort
    ) -> None:
        before = contents(undisturbed.folder)
        assert list(recorded(undisturbed.folder, tiny, cohort)) == []
        assert contents(undisturbed.folder) == before

    def test_with_other_settings_it_is_refused_before_anything_is_written(
        self, undisturbed: Record, tiny: RunConfig, cohort: Cohort
    ) -> None:
        before = contents(undisturbed.folder)
        with pytest.raises(InputError, match="seed was 0, is 1"):
            list(recorded(undisturbed.folder, tiny.at("seed", 1), cohort))
        assert contents(undisturbed.folder) == before

    def test_a_damaged_newest_checkpoint_once_removed_lets_the_run_continue_from_the_one_before(
        self, tmp_path: Path, tiny: RunConfig, cohort: Cohort, undisturbed: Record
    ) -> None:
        config = tiny.at("evaluations", 4)  # checkpoints at 2, 4, 6, 8
        for p in recorded(tmp_path, config, cohort):
            if p.step == 7:
                break
        del p
        newest = tmp_path / "checkpoints" / "step-000006"
        (newest / "shared.pt").write_bytes(b"damaged")
        with pytest.raises(InputError) as error:
            list(recorded(tmp_path, config, cohort))
        assert "step-000006" in error.value.remedy
        shutil.rmtree(newest)
        assert [p.step for p in recorded(tmp_path, config, cohort)] == [5, 6, 7, 8]
        for mine, other in zip(untimed(Record(tmp_path)), untimed(undisturbed), strict=True):
            looks = ("quality/", "validator/", "probe/")
            assert {k: v for k, v in mine.items() if not k.startswith(looks)} == {
                k: v for k, v in other.items() if not k.startswith(looks)
            }

    def test_a_diverged_run_is_written_with_its_verdict(
        self, tmp_path: Path, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        update = Run.update

        def poisoned(run: Run, batch: Batch) -> Signals:
            signals = update(run, batch)
            return signals | {"loss/cycle_t": signals["loss/cycle_t"] * math.inf}

        monkeypatch.setattr(Run, "update", poisoned)
        list(recorded(tmp_path, tiny, cohort))
        record = Record(tmp_path)
        assert record.verdict is not None
        assert (record.verdict.kind, record.verdict.onset) == ("diverged", 1)
        assert [row["loss/cycle_t"] for row in record.rows()] == [math.inf]
        assert list(recorded(tmp_path, tiny, cohort)) == []

    def test_a_run_killed_between_its_last_checkpoint_and_its_verdict_still_gets_it(
        self, tmp_path: Path, tiny: RunConfig, cohort: Cohort, undisturbed: Record
    ) -> None:
        shutil.copytree(undisturbed.folder, tmp_path / "killed")
        record = Record(tmp_path / "killed")
        (record.folder / "verdict.json").unlink()
        list(recorded(record.folder, tiny, cohort))
        assert record.verdict == undisturbed.verdict
        assert untimed(record) == untimed(undisturbed)


class TestPrivacy:
    def test_nothing_in_the_record_tells_machine_user_or_paths(
        self, tmp_path: Path, tiny: RunConfig, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        secrets = {
            "secret-host", "secret-user", "/secret-home", socket.gethostname(), getpass.getuser(), str(Path.home()),
            str(tmp_path), str(Path.cwd()), str(Path(module.__file__).parent), str(os.getpid()),
        }  # fmt: skip
        monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
        monkeypatch.setattr(platform, "node", lambda: "secret-host")
        monkeypatch.setattr(getpass, "getuser", lambda: "secret-user")
        for name, value in (("USER", "secret-user"), ("LOGNAME", "secret-user"), ("HOME", "/secret-home")):
            monkeypatch.setenv(name, value)
        list(recorded(tmp_path / "run", tiny.at("steps", 2), cohort))
        for name in ("config.json", "environment.json", "signals.jsonl", "verdict.json"):
            text = (tmp_path / "run" / name).read_text()
            for secret in secrets:
                assert not re.search(rf"(?<![\w.]){re.escape(secret)}(?![\w.])", text), f"{secret} in {name}"

    def test_the_environment_names_versions_device_and_commit(self, undisturbed: Record) -> None:
        told = json.loads((undisturbed.folder / "environment.json").read_text())
        assert set(told) == {"python", "packages", "device", "threads", "commit"}
        assert told["packages"]["torch"] == torch.__version__
        assert told["device"] == "cpu"


class TestGit:
    @staticmethod
    def repository(folder: Path, file: str, first: bytes, then: bytes) -> Path:
        """A repository of one committed file that was changed since."""
        folder.mkdir(parents=True)
        (folder / file).write_bytes(first)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {
            f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
            subprocess.run(["git", *words], cwd=folder, env=environment, check=True, capture_output=True)
        (folder / file).write_bytes(then)
        return folder

    @needs_git
    def test_the_diff_is_what_the_working_tree_has_beyond_the_commit(
        self, tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = self.repository(tmp_path / "source", "environment.py", b"old\n", b"new\n")
        monkeypatch.setattr(module, "__file__", str(source / "environment.py"))
        fresh(tmp_path / "run", tiny)
        diff = (tmp_path / "run" / "changes.diff").read_text()
        assert "-old" in diff
        assert "+new" in diff
        assert re.fullmatch("[0-9a-f]{40}", json.loads((tmp_path / "run" / "environment.json").read_text())["commit"])

    def test_without_a_repository_or_git_the_record_is_written_all_the_same(
        self, tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module._source.cache_clear()
        monkeypatch.setenv("PATH", "/nowhere")
        fresh(tmp_path / "run", tiny)
        assert json.loads((tmp_path / "run" / "environment.json").read_text())["commit"] is None
        assert (tmp_path / "run" / "changes.diff").read_text() == ""
        module._source.cache_clear()

    @needs_git
    def test_a_changed_file_that_is_not_utf_8_does_not_stop_a_run(
        self, tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = self.repository(tmp_path / "source", "environment.py", b"gr\xfcn\n", b"gr\xfcner\n")
        monkeypatch.setattr(module, "__file__", str(source / "environment.py"))
        fresh(tmp_path / "run", tiny)
        assert (tmp_path / "run" / "changes.diff").read_text().count("gr\ufffdn") == 2

    def test_a_git_that_hangs_does_not_stop_a_run(
        self, tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def hang(*_: Any, **__: Any) -> None:
            raise subprocess.TimeoutExpired("git", 20)

        module._source.cache_clear()
        monkeypatch.setattr(subprocess, "run", hang)
        fresh(tmp_path / "run", tiny)
        module._source.cache_clear()

    @needs_git
    def test_a_package_installed_inside_a_users_repository_does_not_record_the_users_own_changes(
        self, tmp_path: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        users = self.repository(tmp_path / "thesis", "chapter.txt", b"draft\n", b"private\n")
        installed = users / ".venv" / "equipoise"
        installed.mkdir(parents=True)
        monkeypatch.setattr(module, "__file__", str(installed / "environment.py"))
        fresh(tmp_path / "run", tiny)
        assert "private" not in (tmp_path / "run" / "changes.diff").read_text()


def test_a_progress_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        progress(1).step = 2  # type: ignore[misc]


def test_a_line_that_is_damaged_is_named_with_its_file(tmp_path: Path) -> None:
    record = Record(tmp_path / "run")
    record.folder.mkdir()
    (record.folder / "signals.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"signals\.jsonl: found line 2 that is no JSON"):
        record.rows()
    with pytest.raises(InputError, match="line 2 that"):
        record.columns()
    assert record.rows(2) == [{"step": 3.0}]


@pytest.mark.parametrize("written", ["", '{"kind": "sta', '{"kind": "stable"}', "[]"])
def test_a_verdict_that_is_half_written_is_told(tmp_path: Path, written: str) -> None:
    record = Record(tmp_path / "run")
    record.folder.mkdir()
    (record.folder / "verdict.json").write_text(written)
    with pytest.raises(InputError, match=r"verdict\.json: found no readable verdict"):
        _ = record.verdict
