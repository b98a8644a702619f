"""One run over several data-parallel workers, by Ray Train.

Knows how a worker group is asked for and restarted; the training itself is `local.launch` in every worker. gloo joins
CPU workers, NCCL joins GPU workers.

Checkpoints are the run folder's own: every rank finds its part there, whichever launcher wrote it, so a restarted group
continues and Train's checkpoint manager has nothing to keep. The run folder must therefore lie on storage that all
workers see. Ray Train takes the run's name for its own resume key, so each attempt gets a fresh one.

An elastic run goes on with fewer workers where a machine is lost, and with more once there is room again: the group is
started anew at its newest checkpoint, and shares out the same batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from equipoise.config import RunConfig
from equipoise.keeping import Keeping
from equipoise.launch.cluster import Share
from equipoise.launch.local import launch
from equipoise.ranks import Ranks
from slicestore.errors import InputError

RESTARTS = 2
"""Times that a group is restarted after losing a worker."""


def train(
    folder: Path,
    config: RunConfig,
    store: str | Path,
    share: Share,
    *,
    least: int | None = None,
    keeping: Keeping | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> None:
    """Train one run over `config.workers` workers; returns when its record is complete.

    Args:
        folder: of the run, where all workers see it.
        config: the run.
        store: its cohort.
        share: what each worker gets.
        least: workers that are enough to start or go on with; None asks for exactly `config.workers`.
        keeping: how states are kept.
        callbacks: what Ray Train tells as the run goes on.

    Raises:
        InputError: see `check_elastic`.
        ray.train.TrainingFailedError: workers kept failing; the record keeps what was reached, a later call continues.
    """
    elastic = least is not None and least != config.workers
    if least is not None:
        check_elastic(config, least)
    job = {"folder": str(folder), "config": config.to_dict(), "store": str(store), "share": share}
    trainer = TorchTrainer(
        _worker,
        train_loop_config=job | {"keeping": keeping or Keeping(), "elastic": elastic},
        torch_config=TorchConfig(backend="nccl" if share.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(least, config.workers) if elastic else config.workers,  # type: ignore[arg-type]
            use_gpu=share.gpus > 0,
            resources_per_worker=share.resources(),
        ),
        run_config=ray.train.RunConfig(
            name=f"{folder.name}-{int(time.time())}",
            storage_path=str(folder / "ray"),
            # Ray's types are those of Train's first version. Without a limit an infeasible request is retried for ever.
            failure_config=ray.train.FailureConfig(max_failures=RESTARTS, controller_failure_limit=3),  # type: ignore[call-arg]
            callbacks=list(callbacks),  # type: ignore[arg-type]
        ),
    )
    trainer.fit()


def check_elastic(config: RunConfig, least: int) -> None:
    """Refuse a range of workers of which one could not share out the batch: Ray Train takes any number in between.

    Raises:
        InputError: `least` is not between 1 and `config.workers`, or a number from there on does not divide the batch.
    """
    if not 1 <= least <= config.workers:
        raise InputError(
            "workers at least",
            found=least,
            rule=f"the run has {config.workers} workers, and may go on with fewer",
            remedy=f"give a number from 1 to {config.workers}",
        )
    for workers in range(least, config.workers):
        try:
            config.at("workers", workers)
        except ValueError as error:
            raise InputError(
                "workers at least",
                found=f"{least}, where {workers} workers cannot share out the run ({error})",
                rule="an elastic run may get any number of workers from the least on",
                remedy=f"give {config.workers}, or a batch that every number from {least} to {config.workers} divides",
            ) from error


def _worker(job: dict[str, Any]) -> None:
    """What each rank runs, inside the process group that Ray Train has formed."""
    torch.set_num_threads(max(1, int(job["share"].cpus)))
    config = RunConfig.from_dict(job["config"])
    wishes = {"keeping": job["keeping"], "elastic": job["elastic"]}
    for progress in launch(Path(job["folder"]), config, job["store"], device=get_device(), ranks=Ranks(), **wishes):
        if progress.looked:
            ray.train.report(report(progress.step, progress.signals, progress.stability))


def report(step: int, signals: dict[str, float], stability: float) -> dict[str, Any]:
    """What a study hears of a run while it trains: rank 0's row counts, the others have no `quality/*`."""
    quality = {key: value for key, value in signals.items() if key.startswith("quality/")}
    return {"step": step, "stability": stability, **quality}
