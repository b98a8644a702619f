"""What a result depends on besides settings and data: versions, commit, device.

Knows packages and git; must not tell host names, users or paths.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("equipoise", "torch", "numpy", "ray", "optuna", "wandb", "zarr")


def environment(device: torch.device) -> tuple[dict[str, Any], str]:
    """What a result depends on besides settings and data, and the working tree's changes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    found = {
        "python": sys.version.split()[0],
        "packages": dict(_versions()),
        "device": name,
        "threads": torch.get_num_threads(),
    }
    commit, changes = _source(Path(__file__))
    return found | {"commit": commit}, changes


@cache
def _versions() -> dict[str, str]:
    """Versions of what is installed; read once, as metadata are slow to read."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def _source(file: Path) -> tuple[str | None, str]:
    """The commit of the code that runs, and what the working tree had beyond it; asked once, when it was imported."""
    if not _git(file, "ls-files", "--error-unmatch", file.name):  # installed in a repository of the user's own
        return None, ""
    return _git(file, "rev-parse", "HEAD").strip() or None, _git(file, "diff", "HEAD")


def _git(file: Path, *words: str) -> str:
    """What git says of a source file's tree; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=file.parent,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # a diff may hold files in other encodings
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
