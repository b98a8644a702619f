"""The store of the tests that start Ray, and a Ray that short studies share: each of its own takes it some seconds."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slicestore.store import Store


@pytest.fixture(scope="session")
def store(store: Store) -> Path:
    """Where the tiny store of the other tests lies: workers open it for themselves."""
    return store.path


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Ray of two cores, on loopback; a study joins it with `--address`, and RAY_AUTH_MODE=disabled."""
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    ports = [_unused() for _ in range(3)]
    flags = ("--port", "--dashboard-port", "--ray-client-server-port")
    line = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", "2"]
    line += ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--include-dashboard", "true"]
    line += [word for pair in zip(flags, map(str, ports), strict=True) for word in pair]
    log = tmp_path_factory.mktemp("ray") / "head.log"
    with log.open("w") as file:
        head = subprocess.Popen(
            line, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + 60
    while "Ray runtime started" not in log.read_text():
        assert head.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
    yield f"127.0.0.1:{ports[0]}"
    os.killpg(head.pid, signal.SIGTERM)  # all that it has started is in its group
    try:
        head.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def _unused() -> int:
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
