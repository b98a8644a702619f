"""Records of runs that nobody trained: opened as a run opens its own, with rows that a test writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from equipoise.config import PUBLISHED
from equipoise.record import Record, Row


def opened(tmp_path: Path, steps: int) -> Record:
    """A record of the published settings and so many planned steps, without rows."""
    made = Record(tmp_path / "runs" / "000-abc")
    made.open(PUBLISHED.at("steps", steps), torch.device("cpu"))
    return made


def write(record: Record, *rows: Row) -> None:
    """Append rows as they are kept: a number that is none is a word."""
    with open(record.folder / "signals.jsonl", "a") as file:
        for row in rows:
            file.write(json.dumps({k: str(v) if v != v else v for k, v in row.items()}) + "\n")
