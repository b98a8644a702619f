"""The command on a study's view at W&B, `equipoise workspace`.

Knows what a user types and reads; knows nothing that `workspace` does not offer to a script too.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from equipoise.study import StudyFolder, latest_study
from equipoise.study_cli import AsJson, Folder
from equipoise.workspace import create, specification


def workspace(folder: Folder = None, /, results: Path = Path("results"), as_json: AsJson = False) -> None:
    """Save to W&B a view that compares a study's runs, and say its address; asked again, it is written anew.

    Args:
        folder: the study's folder; the latest one by default.
        results: where studies are kept.
        as_json: print what W&B would be given instead; nothing is sent, and no account is needed.
    """
    study = (StudyFolder.open(folder) if folder else latest_study(results)).study
    if as_json:
        print(json.dumps(specification(study), allow_nan=False, indent=2))
        return
    Console().print(create(study), markup=False, highlight=False, soft_wrap=True)
