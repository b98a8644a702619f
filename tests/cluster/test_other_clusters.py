"""The other clusters' files pass their own validators, keep what they promise, and agree with the project."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "clusters"
PATIENCE = 120.0
"""Seconds to wait for what takes one on an idle machine."""
Json = dict[str, Any]


def project() -> Json:
    found: Json = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def wheel() -> str:
    return f"{project()['name']}-{project()['version']}-py3-none-any.whl"


# AWS


@pytest.fixture
def aws() -> Json:
    found: Json = yaml.safe_load((FOLDER / "aws.yaml").read_text())
    return found


def test_ray_accepts_the_file_for_aws(aws: Json) -> None:
    full = prepare_config(copy.deepcopy(aws))
    validate_config(full)
    assert full["head_node_type"] == "head"


def test_the_file_for_aws_starts_no_gpu_machine_before_a_run_waits_for_one(aws: Json) -> None:
    workers = {name: kind for name, kind in aws["available_node_types"].items() if name != aws["head_node_type"]}
    assert len(workers) >= 2
    for kind in workers.values():
        assert kind["min_workers"] == 0
        assert kind["resources"]["GPU"] == 1
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    head = aws["available_node_types"][aws["head_node_type"]]
    assert "GPU" not in head["resources"]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert 0 < aws["idle_timeout_minutes"] <= 10


def test_in_aws_nothing_is_open_or_unencrypted(aws: Json) -> None:
    for kind in aws["available_node_types"].values():
        config = kind["node_config"]
        assert config["SecurityGroupIds"]  # without, Ray makes a group that anybody may reach by SSH
        assert config["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(disk["Ebs"]["Encrypted"] for disk in config["BlockDeviceMappings"])
    (mount,) = [command for command in aws["setup_commands"] if "mount -t efs" in command]
    assert "-o tls" in mount
    starts = [c for c in aws["head_start_ray_commands"] + aws["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "0.0.0.0" not in (FOLDER / "aws.yaml").read_text()


def test_in_aws_the_wheel_of_this_version_is_installed_with_the_pinned_versions(aws: Json) -> None:
    assert aws["file_mounts"][f"~/equipoise/dist/{wheel()}"] == f"dist/{wheel()}"
    installs = [c for c in aws["setup_commands"] + aws["head_setup_commands"] if "pip install" in c]
    assert installs
    assert all("--constraint ~/equipoise/constraints.txt" in command for command in installs)


def test_every_block_of_the_file_for_aws_is_preceded_by_its_reason() -> None:
    lines = (FOLDER / "aws.yaml").read_text().splitlines()
    blocks = [i for i, line in enumerate(lines) if line[:1].isalpha()]
    assert len(blocks) >= 12
    assert all(lines[i - 1].startswith("# ") for i in blocks)


# Kubernetes

TEXT, NUMBER, TRUTH, OBJECT = ({"type": kind} for kind in ("string", "integer", "boolean", "object"))
WORDS = {"type": "object", "additionalProperties": {"type": "string"}}


def one_of(*names: str) -> Json:
    return {"enum": list(names)}


def only(required: str = "", /, **fields: Json) -> Json:
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


GROUP = {"rayStartParams": WORDS, "template": OBJECT, "resources": WORDS, "labels": WORDS}
AUTOSCALER = only(
    version=one_of("v1", "v2"),
    idleTimeoutSeconds=NUMBER,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    image=TEXT,
    imagePullPolicy=TEXT,
    resources=OBJECT,
    securityContext=OBJECT,
    env={"type": "array"},
    envFrom={"type": "array"},
    volumeMounts={"type": "array"},
)
CLUSTER = only(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=only(mode=one_of("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=TRUTH),
    enableInTreeAutoscaling=TRUTH,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=WORDS,
    gcsFaultToleranceOptions=OBJECT,
    upgradeStrategy=OBJECT,
    managedBy=TEXT,
    suspend=TRUTH,
    headGroupSpec=only("template", serviceType=TEXT, headService=OBJECT, enableIngress=TRUTH, **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": only(
            "groupName template maxReplicas minReplicas",
            groupName=TEXT,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            numOfHosts=NUMBER,
            idleTimeoutSeconds=NUMBER,
            scaleStrategy=OBJECT,
            suspend=TRUTH,
            **GROUP,
        ),
    },
)
RAY_JOB = only(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=OBJECT,
    spec=only(
        entrypoint=TEXT,
        rayClusterSpec=CLUSTER,
        submitterPodTemplate=OBJECT,
        submitterConfig=only(backoffLimit=NUMBER),
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        backoffLimit=NUMBER,
        activeDeadlineSeconds=NUMBER,
        preRunningDeadlineSeconds=NUMBER,
        shutdownAfterJobFinishes=TRUTH,
        ttlSecondsAfterFinished=NUMBER,
        deletionStrategy=OBJECT,
        runtimeEnvYAML=TEXT,
        jobId=TEXT,
        metadata=WORDS,
        clusterSelector=WORDS,
        managedBy=TEXT,
        suspend=TRUTH,
        entrypointResources=TEXT,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
    ),
)
"""The fields of KubeRay 1.6's RayJob, from its API reference. What Kubernetes knows is left to its own schemas."""


@pytest.fixture
def kuberay() -> dict[str, Json]:
    """The file's objects by their kinds."""
    return {part["kind"]: part for part in yaml.safe_load_all((FOLDER / "kuberay.yaml").read_text())}


def pods(job: Json) -> dict[str, Json]:
    """Every pod's template, by whose it is."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"submitter": job["spec"]["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"], **groups}


def check_pod(template: Json) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_kubernetes_and_kuberay_accept_the_file(kuberay: dict[str, Json]) -> None:
    assert set(kuberay) == {"PersistentVolumeClaim", "ConfigMap", "RayJob"}
    for kind in ("PersistentVolumeClaim", "ConfigMap"):
        kubernetes_validate.validate(kuberay[kind], kubernetes_validate.latest_version(), strict=True)
    jsonschema.validate(kuberay["RayJob"], RAY_JOB)
    for template in pods(kuberay["RayJob"]).values():
        check_pod(template)


def test_they_refuse_it_with_misspelt_fields(kuberay: dict[str, Json]) -> None:
    job = kuberay["RayJob"]
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 0
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(job, RAY_JOB)
    template = pods(job)["head"]
    template["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        check_pod(template)


def test_in_kubernetes_nothing_runs_as_root_or_is_open_to_the_outside(kuberay: dict[str, Json]) -> None:
    job = kuberay["RayJob"]
    for template in pods(job).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not cluster["headGroupSpec"].get("enableIngress", False)


def test_in_kubernetes_gpu_machines_come_from_none_and_results_outlive_the_job(kuberay: dict[str, Json]) -> None:
    cluster = kuberay["RayJob"]["spec"]["rayClusterSpec"]
    (gpu,) = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"]
    assert gpu["minReplicas"] == gpu["replicas"] == 0
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    claim = kuberay["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for template in (cluster["headGroupSpec"]["template"], gpu["template"]):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        mounts = {mount["mountPath"]: mount["name"] for mount in template["spec"]["containers"][0]["volumeMounts"]}
        assert mounts["/srv/equipoise"] == "shared"
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_the_image_holds_this_version_on_the_ray_that_the_job_names(kuberay: dict[str, Json]) -> None:
    job = kuberay["RayJob"]
    images = {c["image"] for template in pods(job).values() for c in template["spec"]["containers"]}
    assert images == {f"registry.example.org/equipoise:{project()['version']}"}
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == metadata.version("ray")
    recipe = (FOLDER / "Dockerfile").read_text()
    assert f"dist/{wheel()}" in recipe
    assert "--constraint" in recipe
    assert "USER 1000" in recipe


def test_the_job_goes_on_with_the_study_that_it_finds(kuberay: dict[str, Json], tmp_path: Path) -> None:
    script = kuberay["ConfigMap"]["data"]["study.sh"].replace("/srv/equipoise", str(tmp_path))
    stand_in(tmp_path / "bin/python", 'echo "$@"')

    def start() -> list[str]:
        line = ["bash", "-c", script]
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        return subprocess.run(line, capture_output=True, text=True, check=True, env={"PATH": path}).stdout.split()

    first = start()
    (tmp_path / "results/kuberay").mkdir(parents=True)
    (tmp_path / "results/kuberay/study.json").touch()
    assert start() == [*first, "--resume"]


# Slurm


def stand_in(path: Path, script: str) -> None:
    """A command of that name that does this instead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A working folder in which Slurm's commands, Ray's and Python write down how they were called, in `calls`."""
    commands = {
        "srun": 'echo "srun $$ $*" >> calls; exec sleep 600',
        "scontrol": 'echo "scontrol $*" >> calls; [ "$1" != show ] || printf "node7\\nnode8\\n"',
        "ray": '[ "$1" != status ] || printf " 1 node_a\\n 1 node_b\\n"',
        "ip": 'if [ "$2" = route ]; then echo default via 192.0.2.1 dev eth9; else echo 2: eth9 inet 192.0.2.7/24; fi',
        "python": 'echo "python $*" >> calls; stat -c %a "$RAY_AUTH_TOKEN_PATH" >> calls; ./study',
    }
    for name, script in commands.items():
        stand_in(tmp_path / ".venv/bin" / name, script)
    return tmp_path


@contextmanager
def batch(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The script as job 4711 on two machines."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    line = ["bash", FOLDER / "slurm.sh", "studies/stability_sweep.py", "--points", "4"]
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(line, cwd=folder, env=os.environ | job, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def calls(folder: Path, command: str) -> list[list[str]]:
    """How a command was called."""
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").is_file() else []
    return [line.split()[1:] for line in lines if line.split()[0] == command]


def test_the_script_for_slurm_is_clean() -> None:
    subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("not installed: shellcheck")
    subprocess.run(["shellcheck", FOLDER / "slurm.sh"], check=True)


def test_a_slurm_job_is_a_head_workers_and_a_study_and_ends_as_the_study_does(slurm: Path) -> None:
    stand_in(slurm / "study", "exit 3")
    with batch(slurm) as job:
        assert job.wait(PATIENCE) == 3
    worker, head = sorted(calls(slurm, "srun"), key=lambda words: "--head" in words)
    (study,) = calls(slurm, "python")
    address = "192.0.2.7:27110"
    assert "--nodelist=node7" in head
    assert {"--head", "--node-ip-address=192.0.2.7", "--port=27110", "--dashboard-host=127.0.0.1"} <= set(head)
    assert {"--nodes=1", "--exclude=node7", f"--address={address}"} <= set(worker)
    asked = ["--address", address, "--results", f"{slurm}/results", "--name", "stability_sweep-4711", "--points", "4"]
    assert study == ["studies/stability_sweep.py", *asked]
    assert calls(slurm, "600") == [[]]  # the token's mode
    assert not list(slurm.glob(".equipoise-*"))
    wait_until(lambda: not any(Path("/proc", process).exists() for process in (head[0], worker[0])), "Ray has ended")


def test_a_slurm_job_whose_time_is_over_is_queued_again_and_goes_on(slurm: Path) -> None:
    stand_in(
        slurm / "study",
        "mkdir -p results/stability_sweep-4711; touch results/stability_sweep-4711/study.json; exec sleep 600",
    )
    with batch(slurm) as job:
        wait_until(lambda: list(slurm.glob("results/*/study.json")), "the study has begun")
        job.send_signal(signal.SIGUSR1)
        assert job.wait(PATIENCE) == 0
    assert ["requeue", "4711"] in calls(slurm, "scontrol")
    stand_in(slurm / "study", "exit 0")
    with batch(slurm) as job:
        assert job.wait(PATIENCE) == 0
    first, second = calls(slurm, "python")
    assert sorted(second) == sorted([*first, "--resume"])


def wait_until(there: Callable[[], object], what: str) -> None:
    """Look again and again."""
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
