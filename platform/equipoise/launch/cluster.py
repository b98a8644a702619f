"""The machines: joining or starting Ray, and what fits on them.

Knows Ray's start-up and resources; knows nothing of studies.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from slicestore.errors import InputError


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker of a run gets."""

    cpus: float = 1.0
    gpus: float = 0.0
    """Cards; a fraction packs several runs on one."""

    def resources(self) -> dict[str, float]:
        """As Ray counts them."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    @classmethod
    def here(cls, cpus: float, gpus: float | None) -> Share:
        """A share on the cluster that is joined: without a word on GPUs, one a worker where there are any."""
        return cls(cpus, gpus if gpus is not None else float(ray.cluster_resources().get("GPU", 0) >= 1))


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Join the cluster, or start Ray on this machine's loopback; let go of it afterwards.

    Raises:
        InputError: no cluster answers at the address.
    """
    environment = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also the period in which a worker group's reports are fetched
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves the machine unasked
    }
    os.environ.update(environment)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # Train's cleaner of worker groups asks the dashboard whether their leader lives: without it groups leak.
        # "local", because without an address Ray would join one that somebody has started on this machine.
        ray.init("local", include_dashboard=True, dashboard_host="127.0.0.1", _node_ip_address="127.0.0.1", **quiet)
    else:
        _reach(address)
        try:
            ray.init(address=address, runtime_env={"env_vars": environment}, **quiet)
        except (ConnectionError, RuntimeError) as error:
            raise _unreachable(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def room(share: Share, workers: int) -> int:
    """Runs of `workers` workers that the cluster holds at once. A worker has its whole share on one machine.

    Raises:
        InputError: not one.
    """
    wants = share.resources()
    machines: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    held = sum(
        min(_times(machine.get(resource, 0), resource, amount) for resource, amount in wants.items())
        for machine in machines
    )
    if held < workers:
        total = {resource: sum(machine.get(resource, 0) for machine in machines) for resource in wants}
        raise InputError(
            "cluster",
            found=", ".join(f"{amount:g} {resource}" for resource, amount in total.items())
            + (f" on {len(machines)} machines" if len(machines) > 1 else ""),
            rule=f"a run of {workers} workers takes {workers} times "
            + ", ".join(f"{amount:g} {resource}" for resource, amount in wants.items()),
            remedy="ask for fewer workers a run, for less a worker, or add machines; where they are started on demand, "
            "say with --concurrent how many runs there may be",
        )
    return held // workers


def _times(there: float, resource: str, amount: float) -> int:
    """How often an amount of a resource can be had on one machine: a share of a card lies on a single card."""
    if resource == "GPU" and amount < 1:
        return int(there) * math.floor(1 / amount + 1e-9)
    return math.floor(there / amount + 1e-9)


def _reach(address: str) -> None:
    """Fail in seconds where Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return  # "auto"
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> InputError:
    return InputError(
        "--address",
        found=f"{address}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        rule="a Ray cluster listens at the address",
        remedy="start it with `ray up ray_cluster.yaml`, or leave --address out to use this machine",
    )
