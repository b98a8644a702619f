"""Independent pieces of work over a cluster: Ray tasks, as `slicestore.spread` has processes.

Knows Ray's tasks and how they fail; knows nothing of what the work is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from slicestore.errors import InputError
from slicestore.spread import ONE_THREAD

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 2
"""Times that a piece is done again when its machine or process is lost; a mistake of the user's is never retried."""
AHEAD = 2
"""Tasks handed out for each core, so that none waits for the next; more would only sit in memory."""


def ray_tasks(
    work: Callable[[T], R],
    items: Sequence[T],
    /,
    gpus: float = 0.0,
    lost: Callable[[T, InputError], R] | None = None,
) -> Generator[R, None, None]:
    """Do the work in Ray tasks of one core and thread each on the cluster that is joined: a `slicestore.spread.Spread`.

    What the items name, such as paths, must mean the same on every node.

    Args:
        work: done on each item.
        items: what it is done on.
        gpus: what each task gets of a card.
        lost: gives the result of a piece whose process died `RETRIES` times more, so that the others go on.

    Raises:
        InputError: a piece's own, as it was raised; without `lost`, of such a piece, with its item.
    """
    task = ray.remote(
        num_cpus=1,
        num_gpus=gpus,
        max_retries=RETRIES,
        retry_exceptions=False,
        scheduling_strategy="SPREAD",
        runtime_env={"env_vars": ONE_THREAD},
    )(_piece)
    waiting = list(reversed(items))
    under_way: dict[Any, T] = {}
    try:
        while waiting or under_way:
            while waiting and len(under_way) < AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1))):
                item = waiting.pop()
                under_way[task.remote(work, item)] = item
            (done,), _ = ray.wait(list(under_way), num_returns=1)
            yield _result(done, under_way.pop(done), lost)
    finally:
        for left in under_way:
            ray.cancel(left, force=True)
        if under_way:  # whoever locked what they work on may let go only when they have ended
            ray.wait(list(under_way), num_returns=len(under_way), timeout=60)


def _piece(work: Callable[[Any], Any], item: object) -> Any:
    return work(item)


def _result(done: Any, item: Any, lost: Callable[[Any, InputError], Any] | None) -> Any:
    try:
        return ray.get(done)
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    except RayError as error:
        dead = InputError(
            item,
            found=f"its process dead {RETRIES + 1} times ({type(error).__name__})",
            rule="a node has the memory that its volumes take, and stays up",
            remedy="look at the cluster's dashboard, then run again: what is finished is kept",
        )
        if lost is None:
            raise dead from error
        return lost(item, dead)
