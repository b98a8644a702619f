"""A run that goes on with fewer workers where a machine is lost; on a real cluster of three nodes on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from equipoise import checkpoint
from equipoise.config import PUBLISHED, RunConfig
from equipoise.keeping import Keeping
from equipoise.launch.cluster import Share
from equipoise.launch.ray_train import check_elastic, train
from equipoise.record import Record
from slicestore.errors import InputError
from slicestore.store import Store

CONFIG = PUBLISHED.having({"net.width": 0.0625, "batch": 4, "pool": 3, "steps": 60, "evaluations": 2, "workers": 2})


@pytest.mark.parametrize(
    ("config", "least", "words"),
    [
        (CONFIG, 0, "workers at least: found 0"),
        (CONFIG, 3, "give a number from 1 to 2"),
        (CONFIG.having({"batch": 8, "workers": 4}), 2, "found 2, where 3 workers cannot share out the run"),
    ],
)
def test_a_range_of_workers_that_could_not_all_share_out_the_batch_is_refused(
    config: RunConfig, least: int, words: str
) -> None:
    with pytest.raises(InputError) as error:
        check_elastic(config, least)
    assert words in str(error.value)


def test_a_range_of_workers_that_all_divide_the_batch_is_taken() -> None:
    check_elastic(CONFIG, 1)
    check_elastic(CONFIG.having({"batch": 12, "workers": 4}), 1)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs; nodes are to be added. A node that is gone is noticed within seconds."""
    for name, value in (
        ("RAY_AUTH_MODE", "disabled"),
        ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5"),
        ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15"),
        ("RAY_TRAIN_METRICS_ENABLED", "0"),
        ("RAY_USAGE_STATS_ENABLED", "0"),
    ):
        monkeypatch.setenv(name, value)
    pulse = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 1000, "failure_threshold": 3}
    system = {f"health_check_{name}": value for name, value in pulse.items()}
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": system}
    )
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_run_that_loses_a_machine_goes_on_with_the_worker_that_is_left(
    cluster: Cluster, store: Path, tmp_path: Path
) -> None:
    config, record = CONFIG.at("data.cohort", Store.open(store).fingerprint), Record(tmp_path / "runs" / "run")
    cluster.add_node(num_cpus=1)
    lost = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    thread = threading.Thread(
        target=train,
        args=(record.folder, config, store, Share()),
        kwargs={"least": 1, "keeping": Keeping(every=5, session="s")},
    )
    thread.start()
    while checkpoint.latest(record.folder / "checkpoints") is None:
        assert thread.is_alive()
        time.sleep(0.05)
    cluster.remove_node(lost, allow_graceful=False)
    thread.join()
    rows = record.rows()
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert record.verdict is not None
    assert record.verdict.step == 60
    first, *_, last = record.attempts
    assert (first.step, first.workers, last.workers) == (0, 2, 1)
    assert last.step % 5 == 0
    assert last.step >= 5
    assert last.lost_steps <= 5
    assert ["time/workers" in row for row in rows] == [False] * last.step + [True] * (60 - last.step)
    assert record.config.workers == 2
    assert checkpoint.workers_of(record.folder / "checkpoints" / "step-000060") == 1
