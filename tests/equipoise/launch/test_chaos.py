"""Workers, machines and drivers are killed at random: the study ends as if nothing had happened. `make soak` runs it.

The machines are Ray nodes on this one. A worker is killed in its run, a raylet with all that it started (another takes
its place), the driver at whatever it does; then it is resumed by the command that a user would type.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from equipoise.launch.journal import journal
from equipoise.record import Record, Row
from equipoise.study import StudyFolder

KILLS = int(os.environ.get("EQUIPOISE_CHAOS", "0"))
"""How many; 0 leaves the test out."""
SCRIPT = Path(__file__).with_name("chaos_study.py")
HEALTH = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 5,
}
"""A machine that is gone is noticed within seconds."""

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not KILLS, reason="too long for every change: `make soak` sets EQUIPOISE_CHAOS"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


class Machines:
    """A Ray head without a core, and two machines of one core each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 18265 + os.getpid() % 500}
        self.cluster = Cluster(initialize_head=True, head_node_args=head | {"_system_config": HEALTH})
        self.nodes: list[Any] = [self.cluster.add_node(num_cpus=1) for _ in range(2)]

    def raylets(self) -> list[int]:
        return [node.all_processes["raylet"][0].process.pid for node in self.nodes]

    def workers(self) -> list[int]:
        """Processes that the machines run trials in."""
        found, raylets = [], set(self.raylets())
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended while we looked
                line = (path / "cmdline").read_bytes()
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent in raylets and b"ImplicitFunc" in line:
                    found.append(int(path.name))
        return found

    def lose(self, which: int) -> None:
        """Kill a machine's raylet, and put another machine in its place."""
        node = self.nodes.pop(which)
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        time.sleep(1)
        with contextlib.suppress(Exception):  # Ray asserts that a node it removes has not died before
            self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1))


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        made = Machines()
        try:
            yield made
        finally:
            made.cluster.shutdown()


def driver(machines: Machines, results: Path, *words: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, str(SCRIPT), "--address", machines.cluster.address, "--results", str(results), *words]
    log = (results / "driver.log").open("ab")
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "NO_COLOR": "1"}
    return subprocess.Popen(line, stdout=log, stderr=log, env=environment)


def numbers(record: Record) -> list[Row]:
    """The record's rows without the wall time, which no two runs share."""
    return [{k: v for k, v in row.items() if k != "time/block"} for row in record.rows()]


def check_accounts(folder: StudyFolder) -> None:
    """Every point has one trial, in a final state, and one run, whole."""
    told = optuna.load_study(study_name="chaos", storage=journal(folder.journal)).trials
    assert [trial.number for trial in told] == list(range(folder.study.points))
    assert {trial.state.name for trial in told} == {"COMPLETE"}
    records = folder.records()
    assert sorted(trial.user_attrs["run"] for trial in told) == [record.name for record in records]
    for record in records:
        assert record.verdict is not None
        steps = [int(row["step"]) for row in record.rows()]
        assert steps == sorted(set(steps))
        assert steps[-1] == record.verdict.step


def test_thirty_kills_of_workers_machines_and_drivers_change_no_number(
    machines: Machines, store: Path, tmp_path: Path
) -> None:
    words = ["--store", str(store), "--wandb", "disabled", "--confirm-workers", "0", "--checkpoint-every", "20"]
    folders = []
    for name in ("whole", "harmed"):
        (tmp_path / name).mkdir()
        folders.append(tmp_path / name / "chaos")
    whole, harmed = folders
    assert driver(machines, whole.parent, *words).wait(timeout=1500) == 0, (whole.parent / "driver.log").read_text()
    check_accounts(StudyFolder.open(whole))

    rng = random.Random(KILLS)
    plan = [kind for kind in ("worker", "worker", "machine", "driver") for _ in range(-(-KILLS // 4))]
    rng.shuffle(plan)
    done: Counter[str] = Counter()
    process = driver(machines, harmed.parent, *words)
    for kind in plan:
        resting = time.monotonic() + rng.uniform(2, 8)
        while time.monotonic() < resting or (kind == "worker" and not machines.workers()):
            time.sleep(0.1)
            if process.poll() is not None:
                break
        if process.poll() is not None:
            assert process.returncode == 0, (harmed.parent / "driver.log").read_text()[-3000:]
            break
        if kind == "worker":
            with contextlib.suppress(ProcessLookupError, IndexError):  # it ended meanwhile
                os.kill(rng.choice(machines.workers()), signal.SIGKILL)
                done[kind] += 1
        elif kind == "machine":
            machines.lose(rng.randrange(2))
            done[kind] += 1
        else:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done[kind] += 1
            again = ["--resume"] if (harmed / "study.json").is_file() else words
            process = driver(machines, harmed.parent, *again)
    assert process.wait(timeout=1500) == 0, (harmed.parent / "driver.log").read_text()[-3000:]
    print(f"kills: {dict(done)}; attempts: {sum(len(r.attempts) for r in StudyFolder.open(harmed).records())}")
    assert sum(done.values()) >= KILLS
    assert set(done) == {"worker", "machine", "driver"}

    check_accounts(StudyFolder.open(harmed))
    before, after = StudyFolder.open(whole).records(), StudyFolder.open(harmed).records()
    assert [record.name for record in after] == [record.name for record in before]
    for one, other in zip(before, after, strict=True):
        assert numbers(one) == numbers(other)
        assert one.verdict is not None
        assert other.verdict is not None
        assert one.verdict.to_dict() == other.verdict.to_dict()
