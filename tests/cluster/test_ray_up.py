"""The cluster file as it is, on machines of its own: up, a study over two hosts, one of them cut off, and down again.

Nothing in the file is replaced. The hosts have the addresses, the account, the key, the interface and the shared folder
that it names. They say to have one core each, so that the two workers of a run must lie on two of them, and the head to
have none.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hosts import SHARED, UID, Host, furnish_python, laboratory, obstacle, wait_until

from equipoise import checkpoint
from equipoise.heads import synthetic_store
from equipoise.record import Record

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
FILE = "ray_cluster.yaml"
STEPS = 60
PATIENCE = 300.0
"""Seconds to wait for what takes a few on an idle machine."""
STUDY = f"""ray submit {FILE} studies/stability_sweep.py -- --address auto --results {SHARED}/results \
--workers-per-run 2 --points 1 --steps {STEPS} --confirm-workers 0 --wandb disabled"""


def test_a_study_on_a_laboratorys_own_machines_outlives_the_loss_of_one(tmp_path: Path) -> None:
    if why := obstacle():
        pytest.skip(why)
    provider = yaml.safe_load((ROOT / FILE).read_text())["provider"]
    addresses = {"head": provider["head_ip"]}
    addresses |= {f"worker{n}": address for n, address in enumerate(provider["worker_ips"], 1)}
    addresses["desk"] = f"{provider['head_ip'].rpartition('.')[0]}.254"
    with laboratory(tmp_path, addresses) as hosts, logs_told(tmp_path):
        head, *workers, desk = hosts.values()
        for host in (head, *workers):
            furnish_python(host)
            tell_cores(host, cores=0 if host is head else 1)
        furnish_desk(desk)

        desk.run(f"ray up -y {FILE}")
        desk.run(f"ray rsync-up {FILE} results/ {SHARED}/results/")
        await_nodes(desk, {host.address: "ALIVE" for host in (head, *workers)})
        with open(tmp_path / "study.log", "wb") as log:
            study = subprocess.Popen(desk.line(STUDY), stdin=subprocess.DEVNULL, stdout=log, stderr=log)

        assert (tmp_path / "shared/results/phantoms/heads.zarr/manifest.json").is_file()
        record = first_run(tmp_path / "shared/results", study)
        wait_until(lambda: ended(study) or kept(record), PATIENCE, "a checkpoint")
        assert {host.name: ranks(host) for host in hosts.values()} == {"head": 0, "worker1": 1, "worker2": 1, "desk": 0}
        (writer,) = [
            host for host in workers if f"{SHARED}/results/stability_sweep/runs/{record.name}/.lock" in host.opened()
        ]
        writer.cut()
        step = kept(record)
        before = record.rows()[:step]
        await_nodes(desk, {writer.address: "DEAD"})
        assert study.poll() is None
        writer.mend()
        assert study.wait(PATIENCE) == 0

        verdict = record.verdict
        assert verdict is not None
        assert [row["step"] for row in record.rows()] == list(range(1, verdict.step + 1))
        assert 0 < step < verdict.step
        assert record.rows()[:step] == before  # with the time that each step took: it was not done again
        await_nodes(desk, {host.address: "ALIVE" for host in workers})

        desk.run(f"ray down -y {FILE}")
        wait_until(lambda: not any(map(ray_runs, hosts.values())), PATIENCE, "every host's Ray has ended", every=1)


def tell_cores(host: Host, cores: int) -> None:
    """What the host says to have, and that it reaches no package index; its Ray's workers are as urgent as others."""
    lines = ["export PIP_NO_INDEX=1 RAY_worker_niceness=0", f"export RAY_OVERRIDE_RESOURCES='{{\"CPU\": {cores}}}'", ""]
    (host.home / ".bashrc").write_text("\n".join(lines))
    os.chown(host.home / ".bashrc", UID, UID)


def furnish_desk(desk: Host) -> None:
    """A checkout with its wheel, the token, and the store of synthetic heads that the study would make for itself."""
    for name in ("README.md", "LICENSE", "pyproject.toml", "constraints.txt", FILE, "platform", "storage", "studies"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, desk.home / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, desk.home / name)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", "dist", "."]
    subprocess.run(wheel, cwd=desk.home, check=True)
    synthetic_store(desk.home / "results")
    for path in (desk.home, *desk.home.rglob("*")):
        os.chown(path, UID, UID)
    desk.environment["PATH"] = f"{sys.prefix}/bin:/usr/bin:/bin"
    desk.environment |= {"RAY_AUTH_MODE": "token", "RAY_UP_enable_autoscaler_v2": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    desk.run("ray get-auth-token --generate > /dev/null; chmod 600 ~/.ray/auth_token")


def await_nodes(desk: Host, wanted: dict[str, str]) -> None:
    """Wait until the head says that the nodes at these addresses are in these states; of several lives, the best."""

    def there() -> bool:
        said = desk.run(f"ray exec {FILE} 'ray list nodes' 2>&1 || true")
        found = dict(
            sorted(re.findall(r"\s(\d+\.\d+\.\d+\.\d+)\s+\w+\s+(DEAD|ALIVE)\s", said), key=lambda n: n[1] == "ALIVE")
        )
        return wanted.items() <= found.items()

    wait_until(there, PATIENCE, f"nodes {wanted}", every=1)


def first_run(results: Path, study: subprocess.Popen[bytes]) -> Record:
    """The record of the study's first run, when there is one."""

    def found() -> list[Path]:
        return list(results.glob("stability_sweep/runs/*/config.json"))

    wait_until(lambda: ended(study) or found(), PATIENCE, "a run")
    return Record(found()[0].parent)


def ended(study: subprocess.Popen[bytes]) -> bool:
    """False; a study that has ended before its time fails the test."""
    assert study.poll() is None, "the study has ended"
    return False


def kept(record: Record) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    found = checkpoint.latest(record.folder / "checkpoints")
    return checkpoint.step_of(found) if found else 0


def ranks(host: Host) -> int:
    """Ray Train's workers that run on the host."""
    return sum(line.startswith("ray::RayTrainWorker") for line in host.processes())


def ray_runs(host: Host) -> bool:
    """Whether a Ray is at work on the host."""
    return any(word in line for line in host.processes() for word in ("/raylet/raylet", "gcs_server"))


@contextmanager
def logs_told(folder: Path) -> Iterator[None]:
    """Add the end of what the study and the autoscaler said to whatever goes wrong."""
    try:
        yield
    except BaseException as error:
        for path in (folder / "study.log", *folder.glob("head/tmp/ray/session_2*/logs/monitor.log")):
            if path.is_file():
                error.add_note(f"{path.name}:\n{path.read_text(errors='replace')[-4000:]}")
        raise
