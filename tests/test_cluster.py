"""The cluster file is one that Ray accepts, says why it is as it is, and opens nothing to the outside."""

import copy
import inspect
import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from equipoise.record import Record

ROOT = Path(__file__).parents[1]
FILE = ROOT / "ray_cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return config


def started(cluster: dict[str, Any]) -> list[str]:
    """The commands that start Ray."""
    commands = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    return [command for command in commands if "ray start" in command]


def check(cluster: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does before it reaches for a machine."""
    full: dict[str, Any] = prepare_config(copy.deepcopy(cluster))
    validate_config(full)
    return full


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    full = check(cluster)
    assert full["max_workers"] == len(cluster["provider"]["worker_ips"]) == cluster["min_workers"]


def test_ray_refuses_it_with_a_misspelt_key(cluster: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        check(cluster | {"setup_comands": cluster.pop("setup_commands")})


def test_every_block_is_preceded_by_its_reason() -> None:
    lines = FILE.read_text().splitlines()
    blocks = [i for i, line in enumerate(lines) if line[:1].isalpha()]
    assert len(blocks) >= 8
    for i in blocks:
        above = lines[i - 1]
        pair = lines[i].startswith("max_workers") and above.startswith("min_workers")
        assert above.startswith("# ") or pair, lines[i]


def test_the_dashboard_listens_on_the_heads_loopback_only(cluster: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in started(cluster)[0]
    assert "0.0.0.0" not in FILE.read_text()


def test_every_start_asks_for_the_token_and_for_the_first_autoscaler(cluster: dict[str, Any]) -> None:
    assert len(started(cluster)) == 2
    for command in started(cluster):
        assert "RAY_AUTH_MODE=token" in command
        assert "RAY_enable_autoscaler_v2=0" in command
        assert "GLOO_SOCKET_IFNAME=" in command
        assert "NCCL_SOCKET_IFNAME=" in command
        assert "--num-gpus" not in command
        assert "--disable-usage-stats" in command
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_a_machine_that_is_gone_is_given_up_before_the_next_writer_loses_patience(
    cluster: dict[str, Any],
) -> None:
    head, worker = started(cluster)

    def setting(command: str, name: str) -> int:
        return int(re.findall(rf"\bRAY_{name}=(\d+) ", command)[0])

    checks = setting(head, "health_check_failure_threshold")
    seconds = checks * (setting(head, "health_check_timeout_ms") / 1000 + 3)  # Ray's period
    patience = inspect.signature(Record.locked).parameters["patience"].default
    assert seconds <= patience
    assert setting(worker, "gcs_rpc_server_reconnect_timeout_s") <= patience


def test_the_head_starts_at_the_address_by_which_it_is_reached(cluster: dict[str, Any]) -> None:
    assert f"--node-ip-address={cluster['provider']['head_ip']}" in started(cluster)[0]


def test_addresses_are_placeholders_that_reach_nobody(cluster: dict[str, Any]) -> None:
    reserved = ipaddress.ip_network("192.0.2.0/24")  # RFC 5737
    addresses = [cluster["provider"]["head_ip"], *cluster["provider"]["worker_ips"]]
    assert all(ipaddress.ip_address(a) in reserved for a in addresses)


def test_nodes_install_the_wheel_of_this_version_with_the_pinned_versions(cluster: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wheel = f"dist/{project['name']}-{project['version']}-py3-none-any.whl"
    mounts = cluster["file_mounts"]
    assert mounts[f"~/equipoise/{wheel}"] == wheel
    installs = [command for command in cluster["setup_commands"] if "pip install" in command]
    assert installs
    assert all(command.endswith(f"~/equipoise/{wheel}") for command in installs)
    assert "--constraint ~/equipoise/constraints.txt" in installs[0]


def test_what_is_mounted_lies_in_the_repository(cluster: dict[str, Any]) -> None:
    for local in cluster["file_mounts"].values():
        assert local.startswith(("~/.ray/", "dist/")) or (ROOT / local).exists(), local
