"""W&B gets every row of a run once, whatever it does meanwhile; a study waits for none of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import handwritten
import pytest
import torch
import wandb
from wandb_server import Manner, WandbServer, serving

from equipoise import checkpoint
from equipoise.config import PUBLISHED
from equipoise.monitor import Verdict
from equipoise.ranks import Ranks
from equipoise.record import Record
from equipoise.search import Range
from equipoise.sessions import Session
from equipoise.study import Study, StudyFolder
from equipoise.tracking import Watcher
from equipoise.uploading import Uploaded, is_uploaded, parts, upload
from equipoise.wandb_tracker import WandbTracker
from slicestore.errors import InputError

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]
Command = Callable[..., subprocess.CompletedProcess[str]]
STABLE = Verdict("stable", 6, 6, 1.0)
RUN = "id-000-abc"


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A key that no server but ours would take, and nobody's settings."""
    wandb.teardown()  # its address is one of these: given back afterwards, it would be nobody's
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    wandb.teardown()


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return handwritten.opened(tmp_path, steps=6)


def advance(record: Record, *steps: int) -> None:
    handwritten.write(record, *({"step": step, "loss/cycle_t": 1 / step} for step in steps))


def watched(record: Record, tmp_path: Path, mode: str) -> None:
    """Mirror what is written."""
    tracker = WandbTracker(tmp_path / "wandb", group="g", prefix="id", mode=mode, images=False)  # type: ignore[arg-type]
    with Watcher(lambda: [record], [tracker], every=60):
        pass


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", url)
    wandb.teardown()  # it reads the environment once


def test_runs_are_uploaded_once(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance(record, 1, 2, 3, 4, 5, 6)
    record.close(STABLE)
    watched(record, tmp_path, "offline")
    with serving() as server:
        point_at(server.url, monkeypatch)
        assert upload(tmp_path / "wandb") == Uploaded(now=1, before=0, left=0)
        assert server.steps(RUN) == [1, 2, 3, 4, 5, 6]
        assert server.summaries[RUN]["verdict"] == "stable"
        assert server.runs[RUN]["groupName"] == "g"
        assert json.loads(server.runs[RUN]["config"])["optim"]["value"]["lr"] == record.config.optim.lr
        before = len(server.sent)
        assert upload(tmp_path / "wandb") == Uploaded(now=0, before=1, left=0)
        assert len(server.sent) == before


def test_a_run_that_was_resumed_is_one_run_without_a_row_twice(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance(record, 1, 2)
    watched(record, tmp_path, "offline")
    advance(record, 3, 4, 5, 6)
    record.close(STABLE)
    watched(record, tmp_path, "offline")
    assert len(parts(tmp_path / "wandb")[RUN]) == 2
    with serving() as server:
        point_at(server.url, monkeypatch)
        assert upload(tmp_path / "wandb") == Uploaded(now=1, before=0, left=0)
        assert list(server.runs) == [RUN]
        assert server.steps(RUN) == [1, 2, 3, 4, 5, 6]


def test_a_study_s_best_checkpoint_goes_up_from_wherever_its_folder_lies_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PUBLISHED.having({"steps": 6, "data.cohort": "f00dfeedbeefcafe"})
    study = Study(name="s", question="Which?", run=run, space={"optim.lr": Range(1e-5, 1e-2)}, points=1)
    folder = StudyFolder.create(tmp_path / "s", study, "typed", {})
    best = Record(folder.runs / "0000-abc")
    best.open(run, torch.device("cpu"))
    advance(best, 6)
    state = checkpoint.State({"net": torch.full((9,), 7.5)}, {})
    checkpoint.save(best.folder / "checkpoints", 6, state, Ranks())
    best.close(STABLE)
    made = WandbTracker(folder.wandb, group="s", prefix="id", mode="offline", images=False)
    made.conclude(folder, best.name)
    made.close()
    folder.folder.rename(tmp_path / "elsewhere")
    weights = (tmp_path / "elsewhere/runs/0000-abc/checkpoints/step-000006/shared.pt").read_bytes()
    with serving() as server:
        point_at(server.url, monkeypatch)
        assert upload(tmp_path / "elsewhere" / "wandb") == Uploaded(now=1, before=0, left=0)
        model, store = server.artifacts.whole["s-model"], server.artifacts.whole["store"]
        assert model["metadata"]["verdict"] == "stable"
        assert {"best", "0000-abc"} <= set(model["aliases"])
        assert store["metadata"]["fingerprint"] == "f00dfeedbeefcafe"
        assert b"/artifact/s-model/shared.pt " + weights in server.sent
        assert str(tmp_path).encode() not in b"".join(server.sent)


def test_online_a_run_is_at_w_and_b_when_the_study_ends(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        point_at(server.url, monkeypatch)
        advance(record, 1, 2)
        watched(record, tmp_path, "online")
        assert server.steps(RUN) == [1, 2]
        advance(record, 3, 4, 5, 6)
        record.close(STABLE)
        watched(record, tmp_path, "online")
        assert server.steps(RUN) == [1, 2, 3, 4, 5, 6]
        assert all(map(is_uploaded, parts(tmp_path / "wandb")[RUN]))


def test_a_run_is_seen_while_it_trains(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        point_at(server.url, monkeypatch)
        tracker = WandbTracker(tmp_path / "wandb", group="g", prefix="id", mode="online", images=False)
        with Watcher(lambda: [record], [tracker], every=0.1):
            advance(record, 1, 2, 3)
            until(lambda: server.steps(RUN) == [1, 2, 3])


@pytest.mark.parametrize("manner", ["refuses", "hangs", "500", "dies"])
def test_w_and_b_out_of_reach_is_given_up_at_the_end_and_costs_no_row(
    manner: str, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = None if manner == "refuses" else WandbServer(manner)  # type: ignore[arg-type]
    point_at(server.url if server else f"http://127.0.0.1:{unused()}", monkeypatch)
    advance(record, 1, 2, 3, 4, 5, 6)
    record.close(STABLE)
    watched(record, tmp_path, "online")  # W&B alone would try until the test's time is over
    if server:
        server.close()
    assert "1 runs are not at W&B in full yet" in caplog.text
    with serving() as well:
        point_at(well.url, monkeypatch)
        well.rows.update(server.rows if server else {})  # what W&B had taken it still has
        well.runs.update(server.runs if server else {})
        assert upload(tmp_path / "wandb") == Uploaded(now=1, before=0, left=0)
        assert well.steps(RUN) == [1, 2, 3, 4, 5, 6]
        assert well.summaries[RUN]["verdict"] == "stable"


@pytest.mark.parametrize("manner", ["refuses", "hangs", "500"])
def test_an_upload_to_nobody_is_refused_at_once(
    manner: str, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance(record, 1)
    watched(record, tmp_path, "offline")
    kind: Manner = "well" if manner == "refuses" else manner  # type: ignore[assignment]
    with serving(kind) as server:
        point_at(server.url if manner != "refuses" else f"http://127.0.0.1:{unused()}", monkeypatch)
        with pytest.raises(InputError, match="found no answer"):
            upload(tmp_path / "wandb")


def test_without_a_key_nothing_is_tried(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance(record, 1)
    watched(record, tmp_path, "offline")
    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()
    with pytest.raises(InputError, match="no API key"):
        upload(tmp_path / "wandb")


def test_sync_says_what_it_did_and_what_it_cannot_do(
    record: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    none = command("sync", tmp_path)
    assert (none.returncode, "found no W&B runs" in none.stderr) == (2, True)
    advance(record, 1, 2)
    record.close(STABLE)
    watched(record, tmp_path, "offline")
    with Session.start(tmp_path, slots=1, workers=1, gpus=0):
        busy = command("sync", tmp_path)
        assert (busy.returncode, "found a study at work" in busy.stderr) == (2, True)
    with serving() as server:
        point_at(server.url, monkeypatch)
        for said in ("1 runs uploaded now, 0 had been before", "0 runs uploaded now, 1 had been before"):
            done = command("sync", tmp_path)
            assert done.returncode == 0
            assert said in done.stdout


def test_an_uploader_ends_with_the_process_that_started_it(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance(record, 1)
    watched(record, tmp_path, "offline")
    code = (
        "import sys, time; from pathlib import Path; from equipoise.uploading import Uploader\n"
        "made = Uploader(Path(sys.argv[1])); made.follow(sys.argv[2])\n"
        "print(made._at_work[0].pid, flush=True); time.sleep(600)"
    )
    with serving("hangs") as server:
        point_at(server.url, monkeypatch)
        line = [sys.executable, "-c", code, str(tmp_path / "wandb"), RUN]
        with subprocess.Popen(line, stdout=subprocess.PIPE) as process:
            assert process.stdout
            pid = int(process.stdout.readline())
            until(lambda: bool(server.sent))
            process.send_signal(signal.SIGKILL)
        until(lambda: not alive(pid))


def test_neither_host_nor_paths_are_sent(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "planted-host")
    advance(record, 1, 2)
    record.close(STABLE)
    watched(record, tmp_path, "offline")
    with serving() as server:
        point_at(server.url, monkeypatch)
        upload(tmp_path / "wandb")
        sent = b"\n".join(server.sent)
    assert sent
    assert "host" not in server.runs[RUN]
    for word in ("planted-host", str(tmp_path), str(Path(sys.prefix)), str(Path(__file__).parent)):
        assert word.encode() not in sent


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def unused() -> int:
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
