"""A study is told to people, to programs, to W&B in any state and to a browser; its numbers are the same for all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from wandb_server import WandbServer

from equipoise.study import StudyFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).with_name("tiny_study.py")
SMALL = ("--points", "2", "--confirm-workers", "0")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
ENVIRONMENT |= {"NO_COLOR": "1", "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def small(store: Path, cluster: str) -> list[str]:
    """The command of a study of two points, but for where its results go."""
    return [sys.executable, str(SCRIPT), "--store", str(store), "--address", cluster, *SMALL]


def study(command: list[str], results: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [*command, "--results", str(results), "--steps", "8", *more]
    done = subprocess.run(line, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def numbers(results: Path) -> dict[str, Any]:
    """All that the study's runs came to, but for wall times."""
    records = StudyFolder.open(results / "tiny").records()
    told = {
        r.name: ([{k: v for k, v in row.items() if k != "time/block"} for row in r.rows()], r.verdict) for r in records
    }
    assert len(told) == 2
    return told


@contextmanager
def w_and_b(manner: str) -> Iterator[str]:
    """The address of a W&B in that state."""
    if manner == "refuses":
        with socket.socket() as held:  # bound, and never listened on
            held.bind(("127.0.0.1", 0))
            yield f"http://127.0.0.1:{held.getsockname()[1]}"
        return
    server = WandbServer(manner)  # type: ignore[arg-type]
    yield server.url
    assert server.sent
    server.close()


@pytest.fixture(scope="module")
def alone(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """What a study comes to without W&B, and the seconds it takes."""
    results = tmp_path_factory.mktemp("disabled")
    began = time.monotonic()
    study(small, results, "--wandb", "disabled")
    return numbers(results), time.monotonic() - began


@pytest.mark.parametrize(
    "manner",
    ["hangs", *(pytest.param(manner, marks=pytest.mark.long) for manner in ("dies", "refuses", "500"))],
)
def test_w_and_b_in_any_state_changes_no_number_and_costs_seconds_at_most(
    manner: str, small: list[str], alone: tuple[dict[str, Any], float], tmp_path: Path
) -> None:
    with w_and_b(manner) as url:
        key = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url, "HOME": str(tmp_path)}
        began = time.monotonic()
        study(small, tmp_path, "--wandb", "online", **key)
        took = time.monotonic() - began
    print(f"{manner}: {took:.1f} s, without W&B {alone[1]:.1f} s")
    assert numbers(tmp_path) == alone[0]
    assert took < alone[1] + 60  # W&B alone would try for long


def test_a_program_is_told_an_object_a_line_while_a_browser_and_tensorboard_see_it_too(
    small: list[str], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--json", "--tensorboard", "--dashboard", "--dashboard-port", str(port), "--wandb", "disabled")
    command = [*small, "--results", str(tmp_path), "--steps", "80", *flags]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        seen = None
        while process.poll() is None and seen is None:
            seen = _get(f"http://127.0.0.1:{port}/api/studies")
            time.sleep(0.2)
        out, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert seen is not None
    assert [one["study_name"] for one in json.loads(seen)["study_summaries"]] == ["tiny"]
    assert _get(f"http://127.0.0.1:{port}/api/studies") is None  # it ended with the study
    said = [json.loads(each) for each in out.decode().splitlines()]
    assert {one["event"] for one in said[1:-1]} == {"block", "ended"}
    assert (said[0]["event"], said[0]["points"], said[0]["steps"]) == ("study", 2, 80)
    records = StudyFolder.open(tmp_path / "tiny").records()
    for record in records:
        blocks = [one for one in said if one["event"] == "block" and one["run"] == record.name]
        assert [{"step": one["step"], **one["signals"]} for one in blocks] == record.rows()
        (ended,) = (one for one in said if one["event"] == "ended" and one["run"] == record.name)
        assert record.verdict is not None
        assert (ended["verdict"], ended["stability"]) == (record.verdict.kind, record.verdict.stability)
    assert said[-1]["event"] == "finished"
    assert said[-1]["report"] == str(tmp_path / "tiny" / "report.html")
    assert sorted(path.name for path in (tmp_path / "tiny" / "tensorboard").iterdir()) == [r.name for r in records]


def test_a_quiet_study_says_where_its_report_is_and_nothing_else(small: list[str], tmp_path: Path) -> None:
    said = study(small, tmp_path, "--quiet", "--wandb", "disabled").stdout
    assert said == f"{tmp_path / 'tiny' / 'report.html'}\n"


def test_a_busy_port_is_told_before_anything_is_started(small: list[str], tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [*small, "--results", str(tmp_path / "results"), "--dashboard", "--dashboard-port", str(port)]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"--dashboard-port {port}: found a port that cannot be had" in " ".join(done.stderr.split())
    assert not (tmp_path / "results").exists()


def _get(url: str) -> bytes | None:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            content: bytes = answer.read()
            return content
    except (urllib.error.URLError, ConnectionError):
        return None
