"""One run over several data-parallel workers, by Ray Train.

Knows how a worker group is asked for and restarted; the training itself is `local.launch` in every worker. gloo joins
CPU workers, NCCL joins GPU workers.

Checkpoints are the run folder's own: every rank finds its part there, whichever launcher wrote it, so a restarted group
continues and Train's checkpoint manager has nothing to keep. The run folder must therefore lie on storage that all
workers see. Ray Train takes the run's name for its own resume key, so each attempt gets a fresh one.
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
from equipoise.launch.cluster import Share
from equipoise.launch.local import launch
from equipoise.ranks import Ranks

RESTARTS = 2
"""Times that a group is restarted after losing a worker."""


def train(
    folder: Path,
    config: RunConfig,
    store: str | Path,
    share: Share,
    *,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> None:
    """Train one run over `config.workers` workers; returns when its record is complete.

    Raises:
        ray.train.TrainingFailedError: workers kept failing; the record keeps what was reached, a later call continues.
    """
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"folder": str(folder), "config": config.to_dict(), "store": str(store), "share": share},
        torch_config=TorchConfig(backend="nccl" if share.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers, use_gpu=share.gpus > 0, resources_per_worker=share.resources()
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


def _worker(job: dict[str, Any]) -> None:
    """What each rank runs, inside the process group that Ray Train has formed."""
    torch.set_num_threads(max(1, int(job["share"].cpus)))
    config = RunConfig.from_dict(job["config"])
    for progress in launch(Path(job["folder"]), config, job["store"], device=get_device(), ranks=Ranks()):
        if progress.looked:
            ray.train.report(report(progress.step, progress.signals, progress.stability))


def report(step: int, signals: dict[str, float], stability: float) -> dict[str, Any]:
    """What a study hears of a run while it trains: rank 0's row counts, the others have no `quality/*`."""
    quality = {key: value for key, value in signals.items() if key.startswith("quality/")}
    return {"step": step, "stability": stability, **quality}
