"""What W&B is told of a study as a whole, and of each run when it ends.

Knows verdicts, costs and the files that are worth keeping; knows nothing of how W&B gets them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from equipoise import checkpoint
from equipoise.account import Account, Cost
from equipoise.record import Record
from equipoise.study import Study, StudyFolder

if TYPE_CHECKING:
    import wandb


def about(study: Study) -> dict[str, Any]:
    """The declaration as a run's settings."""
    return study.to_dict()


def judged(record: Record, objective: str) -> dict[str, Any]:
    """How a run ended; values are as recorded, also those that are not finite.

    Args:
        record: with a verdict.
        objective: by what runs are compared; it becomes their `dice`.
    """
    verdict, quality = record.verdict, f"quality/{objective}"
    assert verdict is not None
    return {
        "verdict": verdict.kind,
        "onset": verdict.onset,
        "stability": verdict.stability,
        "dice": next((row[quality] for row in reversed(record.rows()) if quality in row), None),
        "steps": verdict.step,
        "sentence": verdict.sentence(),
    }


def cost(record: Record, gpus: float) -> dict[str, float]:
    """Hours of devices and of GPUs that a run took, and that stopping it early saved.

    Args:
        record: of the run.
        gpus: of a device.
    """
    spent = Cost.of(record)
    return {} if spent is None else _hours(spent, gpus)


def tell(run: wandb.Run, folder: StudyFolder, best: str | None, gpus: float, *, model: bool) -> None:
    """Summarise a study, and keep its store's fingerprint as an artifact, and its best checkpoint if that is wanted.

    Args:
        run: the study's own.
        folder: the study, at its end.
        best: name of the best point's run, if there is one.
        gpus: of a device.
        model: whether the checkpoint is given.
    """
    study, account = folder.study, Account.of(folder.records())
    run.summary.update({f"runs/{kind}": count for kind, count in account.verdicts.items()})
    run.summary.update({"points": account.points, "steps": account.steps, **_hours(account, gpus)})
    if best is not None:
        record = Record(folder.runs / best)
        told = judged(record, study.objective)  # under names of their own: in comparisons of runs this is none
        run.summary.update({"best": best} | {f"best/{name}": value for name, value in told.items()})
        if model:
            _give_checkpoint(run, study, record)
    _give_store(run, study)


def _hours(spent: Account | Cost, gpus: float) -> dict[str, float]:
    hours = {"hours": spent.seconds / 3600, "hours_saved": spent.seconds_saved / 3600}
    return {
        f"{of}_{name}": value * per for of, per in (("device", 1.0), ("gpu", gpus)) for name, value in hours.items()
    }


def _give_checkpoint(run: wandb.Run, study: Study, record: Record) -> None:
    """The newest weights of the best point, uploaded from where they lie."""
    import wandb

    found = checkpoint.latest(record.folder / "checkpoints")
    if found is None:
        return
    config = record.config
    told = judged(record, study.objective) | {"step": checkpoint.step_of(found), "config": config.to_dict()}
    model = wandb.Artifact(f"{study.name}-model", type="model", metadata=told)
    entry = model.add_file(str(found / "shared.pt"), name="shared.pt", skip_cache=True, policy="immutable")
    # W&B's file shall name no folders of the user's: whoever uploads it does so from the study's folder.
    entry.local_path = os.path.relpath(found / "shared.pt", record.folder.parents[1])
    run.log_artifact(model, aliases=["best", record.name])


def _give_store(run: wandb.Run, study: Study) -> None:
    """That a store was used, and which: its fingerprint, and nothing of what is in it."""
    import wandb

    if study.run.data.cohort:
        told = {"fingerprint": study.run.data.cohort, "classes": study.run.net.classes}
        run.log_artifact(wandb.Artifact("store", type="dataset", metadata=told), aliases=[study.run.data.cohort[:12]])
