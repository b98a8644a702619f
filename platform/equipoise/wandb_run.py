"""A W&B run as it is begun here: written to a file, and nothing in it that names the user or the machine.

Knows W&B's settings, and whether there is an account; knows nothing of records or studies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import wandb

WandbMode = Literal["online", "offline", "disabled"]
PROJECT = "equipoise"
"""W&B's project of all runs."""


def wandb_mode(wanted: WandbMode | None) -> tuple[WandbMode, str]:
    """The W&B mode that can be had, and a sentence that says so.

    Without a wish it is online with a key and offline without; online without a key falls back to offline.
    """
    if wanted in ("offline", "disabled"):
        return wanted, f"W&B {wanted}, as asked"
    found = no_key()
    if found is None:
        return "online", "W&B online"
    if wanted == "online":
        return (
            "offline",
            f"W&B offline: online was asked for but there is {found}; run `wandb login`, or set WANDB_API_KEY",
        )
    return "offline", f"W&B offline: there is {found}; `equipoise sync` uploads the runs later"


def no_key() -> str | None:
    """What there is instead of an API key; None where there is one."""
    import wandb
    from wandb.errors import AuthenticationError

    settings = wandb.setup().settings
    silent, settings.silent = settings.silent, True  # else W&B is asked for the account's name, for many seconds
    try:
        return None if wandb.login(prompt=False, verify=False) else "no API key"
    except AuthenticationError as error:
        return f"an API key that can be none ({error})"
    finally:
        settings.silent = silent


def begin(
    folder: Path,
    *,
    group: str,
    run_id: str,
    name: str,
    job: str,
    about: Mapping[str, Any],
    tags: Sequence[str],
    notes: str | None = None,
) -> wandb.Run:
    """Begin a run, or another part of one.

    Args:
        folder: where W&B keeps its files.
        group: of the study's runs.
        run_id: by which its parts are one.
        name: shown.
        job: what kind of run it is: point, confirmation, study.
        about: its settings.
        tags: by which runs are found.
        notes: shown beside the name.
    """
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=PROJECT,
        group=group,
        id=run_id,
        name=name,
        mode="offline",
        job_type=job,
        dir=str(folder),
        config=dict(about),
        tags=list(tags),
        notes=notes,
        resume="allow",
        reinit="create_new",
        settings=_settings(),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _settings() -> wandb.Settings:
    """Nothing that names the user, the machine or its folders is collected; records are flushed as they come."""
    import wandb

    return wandb.Settings(
        silent=True,
        host="",
        console="off",
        symlink=False,
        x_disable_stats=True,
        x_disable_meta=True,
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=1.0,
    )


# Else W&B's makers are told of mistakes and timings, and a program waits for them at its end for ten seconds and more.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
