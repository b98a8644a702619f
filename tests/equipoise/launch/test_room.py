"""How many runs a cluster holds: shares of cards, and whole shares on single machines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from equipoise.launch.cluster import Share, room
from slicestore.errors import InputError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def machines() -> Iterator[None]:
    """A head that computes nothing; two machines of 4 cores, one of them with two cards (as Ray counts them)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        cluster.add_node(num_cpus=4, num_gpus=2)
        cluster.add_node(num_cpus=4)
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.mark.parametrize(
    ("share", "workers", "runs"),
    [
        (Share(1.0), 1, 8),
        (Share(3.0), 1, 2),  # of 8 cores two are left over: no worker lies on two machines
        (Share(1.0), 3, 2),
        (Share(0.5, 0.25), 1, 8),  # four on each card
        (Share(0.5, 0.4), 1, 4),  # 2 / .4 would be 5, but the fifth would lie on two cards
        (Share(1.0, 1.0), 2, 1),
    ],
)
def test_runs_are_counted_by_whole_shares_on_single_machines(
    machines: None, share: Share, workers: int, runs: int
) -> None:
    assert room(share, workers) == runs


@pytest.mark.parametrize(
    ("share", "workers", "message"),
    [
        (Share(5.0), 1, "found 8 CPU on 3 machines; a run of 1 workers takes 1 times 5 CPU"),
        (Share(1.0, 1.0), 3, "found 8 CPU, 2 GPU on 3 machines; a run of 3 workers takes 3 times 1 CPU, 1 GPU"),
    ],
)
def test_a_run_that_the_cluster_cannot_give_is_refused_with_what_there_is(
    machines: None, share: Share, workers: int, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        room(share, workers)
    assert "--concurrent" in caught.value.remedy
