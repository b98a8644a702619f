"""A study, started as a user starts it: real Ray, real W&B files, a real kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from equipoise.account import Cost
from equipoise.launch.journal import journal
from equipoise.record import Record
from equipoise.study import StudyFolder
from equipoise.uploading import parts
from equipoise.wandb_file import history, records, summary
from equipoise.wandb_row import ONSET, named
from slicestore.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
IMAGES = ("x_s", "x_st", "x_sts", "x_t", "x_ts", "x_tst")
SCRIPT = Path(__file__).with_name("tiny_study.py")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
ENVIRONMENT |= {"NO_COLOR": "1", "COLUMNS": "200", "RAY_AUTH_MODE": "disabled"}


def command(store: Path, results: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--store", str(store), "--results", str(results), "--wandb", "offline", *more]


def finished(store: Path, results: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(store, results, *more), env=ENVIRONMENT, capture_output=True, text=True, check=False)


def started(line: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def undisturbed(store: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFolder, str]:
    """A whole study with its confirmation over two workers, and what it printed."""
    results = tmp_path_factory.mktemp("results")
    done = finished(store, results, "--wandb-images", "--address", cluster)
    assert done.returncode == 0, done.stderr[-3000:]
    return StudyFolder.open(results / "tiny"), done.stdout


def trials(folder: StudyFolder) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="tiny", storage=journal(folder.journal)).trials


def check_accounts(folder: StudyFolder) -> None:
    """Every point has one trial in a final state and one run with a whole record; nothing is there twice."""
    told = {t.user_attrs["run"]: t for t in trials(folder)}
    points = [r for r in folder.records() if not r.confirms]
    assert sorted(told) == [r.name for r in points]
    assert len(points) == folder.study.points
    for record in points:
        verdict = record.verdict
        assert verdict is not None
        steps = [int(row["step"]) for row in record.rows()]
        assert steps == list(range(1, verdict.step + 1))
        assert told[record.name].state.name == ("PRUNED" if verdict.kind == "censored" else "COMPLETE")
        assert record.pictures()


def test_a_study_ends_with_every_point_told_and_every_run_recorded(undisturbed: tuple[StudyFolder, str]) -> None:
    folder, said = undisturbed
    check_accounts(folder)
    assert folder.report.is_file()
    assert str(folder.report) in said
    assert f"equipoise dashboard {folder.folder}" in said
    assert Path(said.split("dashboard: ")[1].split()[0]).is_file()


def naming(folder: StudyFolder) -> list[Path]:
    """What of a study says where it lies."""
    place = str(folder.folder.parent).encode()
    return [path for path in folder.folder.rglob("*") if path.is_file() and place in path.read_bytes()]


def test_one_file_alone_says_where_a_study_lies(undisturbed: tuple[StudyFolder, str]) -> None:
    folder, _ = undisturbed
    assert naming(folder) == [folder.folder / "local.json"]


def test_the_best_point_is_confirmed_by_two_workers_with_another_seed(undisturbed: tuple[StudyFolder, str]) -> None:
    folder, _ = undisturbed
    (confirmation,) = (r for r in folder.records() if r.confirms)
    assert (confirmation.config.workers, confirmation.config.seed) == (2, 1)
    assert confirmation.verdict is not None
    (checkpoint,) = sorted((confirmation.folder / "checkpoints").iterdir())[-1:]
    assert sorted(f.name for f in checkpoint.iterdir()) == ["rank-0.pt", "rank-1.pt", "shared.pt"]


def test_w_and_b_s_offline_runs_read_back_as_the_records(undisturbed: tuple[StudyFolder, str]) -> None:
    folder, said = undisturbed
    files = {p.stem.removeprefix(f"run-{folder.id}-"): p for p in folder.wandb.glob("wandb/offline-run-*/*.wandb")}
    assert sorted(files) == [*(r.name for r in folder.records()), "study"]
    for record in folder.records():
        path, rows, verdict = files[record.name], record.rows(), record.verdict
        logged = [row for row in history(path) if ONSET not in row]
        assert [row["step"] for row in logged] == [row["step"] for row in rows]
        for told, row in zip(logged, rows, strict=True):
            for key, value in row.items():
                assert told[named(key)] == pytest.approx(value, nan_ok=True)
        cost, ended = Cost.of(record), summary(path)
        assert verdict is not None
        assert cost is not None
        assert (ended["verdict"], ended["steps"], ended["onset"]) == (verdict.kind, verdict.step, verdict.onset)
        assert ended["dice"] == rows[-1]["quality/translated_dice"]
        assert ended["device_hours"] == pytest.approx(cost.seconds / 3600)
        begun = next(r.run for r in records(path) if r.WhichOneof("record_type") == "run")
        config = {u.key: json.loads(u.value_json) for u in begun.config.update if u.key != "_wandb"}
        assert config == json.loads(json.dumps(record.config.to_dict()))
        pictured = [row for row in logged if "panels/x_s.count" in row]
        assert [record.picture(row["step"]) for row in pictured] == record.pictures()
        files_of = [name for row in pictured for kind in IMAGES for name in row[f"panels/{kind}.filenames"]]
        assert len(files_of) == len(pictured) * len(IMAGES) * pictured[0]["panels/x_s.count"] > 0
        assert all((path.parent / "files" / name).is_file() for name in files_of)
    told = summary(files["study"])
    assert (told["points"], told["best"]) == (5, said.split("best point: ")[1].split()[0])
    assert {r.artifact.type for r in records(files["study"]) if r.WhichOneof("record_type") == "artifact"} == {
        "model", "dataset"
    }  # fmt: skip


def test_a_study_killed_half_way_resumes_and_accounts_for_every_run_once(
    store: Path, tmp_path: Path, undisturbed: tuple[StudyFolder, str]
) -> None:
    process = started(command(store, tmp_path, "--confirm-workers", "0"))
    runs = tmp_path / "tiny" / "runs"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:  # until one run has ended and another is at work, and W&B has heard of it
        records = [Record(f) for f in runs.glob("*")] if runs.is_dir() else []
        heard = [id_.partition("-")[2] for id_ in parts(tmp_path / "tiny" / "wandb")]
        at_work = [r for r in records if r.verdict is None and len(r.rows()) > 2 and r.name in heard]
        if at_work and any(r.verdict for r in records):
            break
        time.sleep(0.05)
    assert at_work, "no run was met at work"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # Its worker lives for a moment longer, and may bring a run to its end in it.
    before = {r.name: r.verdict for r in StudyFolder.open(tmp_path / "tiny").records()}
    assert any(before.values())

    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--results", str(tmp_path), "--resume"],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    folder = StudyFolder.open(tmp_path / "tiny")
    check_accounts(folder)
    # What had ended is as it was; the first point, wherever the kill met it, has the undisturbed study's numbers.
    for record in folder.records():
        assert before.get(record.name) in (None, record.verdict)
    whole = next(r for r in undisturbed[0].records() if r.name.startswith("0000-"))
    again = Record(folder.runs / whole.name)
    drop = ("time/block",)
    n = min(len(whole.rows()), len(again.rows()))
    assert [{k: v for k, v in row.items() if k not in drop} for row in again.rows()[:n]] == [
        {k: v for k, v in row.items() if k not in drop} for row in whole.rows()[:n]
    ]
    assert naming(folder) == [folder.folder / "local.json"]
    # At W&B the run that the kill met is one as well: its parts, one after the other, have every step once.
    told = parts(folder.wandb)
    assert len(told) == len(folder.records()) + 1
    assert all(len(told[f"{folder.id}-{r.name}"]) > 1 for r in at_work)
    for record in folder.records():
        logged = [row["step"] for path in told[f"{folder.id}-{record.name}"] for row in history(path)
                  if ONSET not in row]  # fmt: skip
        assert logged == [row["step"] for row in record.rows()]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--points", "0"], "points: found 0; a study judges at least one. Remedy: give 1 or more."),
        (["--resume"], "found no study; --resume continues one"),
        (["--address", "127.0.0.1:1"], "a Ray cluster listens at the address"),
        (["--workers-per-run", "2", "--cpus-per-worker", "400"], "a run of 2 workers takes 2 times 400 CPU"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_without_a_traceback(
    store: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    done = finished(store, tmp_path, *more)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_damaged_store_is_told_before_anything_is_started(make_store: Callable[..., Store], tmp_path: Path) -> None:
    # Of its own content: a copy of another test's store would be taken from memory while a worker of that still lives.
    damaged = make_store(tmp_path, slices=7).path
    for shard in damaged.glob("source/*/image/c/0/0/0"):  # those of test subjects would not be read
        content = bytearray(shard.read_bytes())
        content[300] ^= 1
        shard.write_bytes(content)
    done = finished(damaged, tmp_path / "results")
    assert done.returncode == 2
    assert "every chunk matches its checksum" in " ".join(done.stderr.split())
    assert not (tmp_path / "results").exists()


def test_a_grid_runs_every_point_tells_its_own_table_and_is_not_confirmed(tmp_path: Path, cluster: str) -> None:
    script = str(SCRIPT.with_name("tiny_grid.py"))
    line = [sys.executable, script, "--results", str(tmp_path), "--wandb", "disabled", "--address", cluster]
    told = [f"told: lr {rate} at seed 1 was stable" for rate in ("0.0001", "0.002", "0.01")]
    for more in (["--rates", "1e-4", "2e-3", "1e-2"], ["--resume"]):  # the second finds nothing left to do
        done = subprocess.run([*line, *more], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert [said for said in done.stdout.splitlines() if said.startswith("told: ")] == told
    folder = StudyFolder.open(tmp_path / "grid")
    assert [record.config.optim.lr for record in folder.records()] == [1e-4, 2e-3, 1e-2]
    assert (tmp_path / "phantoms" / "heads-brain-32.zarr").is_dir()


def test_online_without_a_key_falls_back_to_offline_and_says_so(store: Path, tmp_path: Path, cluster: str) -> None:
    line = [*command(store, tmp_path, "--points", "1", "--steps", "4", "--confirm-workers", "0"), "--wandb", "online"]
    line += ["--address", cluster]
    done = subprocess.run(line, env=ENVIRONMENT | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "W&B offline: online was asked for but there is no API key" in done.stdout
    assert list((tmp_path / "tiny" / "wandb").glob("wandb/offline-run-*/*.wandb"))
