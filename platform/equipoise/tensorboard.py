"""Records as TensorBoard's event files.

Knows how a run's record becomes a folder that `tensorboard --logdir` reads; knows nothing of Ray or of studies. Nothing
leaves the machine, so panels are among them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.monitor import Verdict
from equipoise.record import Record, Row
from equipoise.wandb_row import named

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


class TensorBoardTracker:
    """A `Tracker` that writes a folder of event files a run; one that is seen anew is written anew, from its record."""

    def __init__(self, folder: Path) -> None:
        """Args: where the runs' folders are made."""
        self._folder = folder
        self._open: dict[str, SummaryWriter] = {}

    def rows(self, record: Record, rows: Sequence[Row]) -> None:
        """Write blocks, each with the panels drawn at it. TensorBoard shows a value that is not finite as such."""
        run = self._run(record)
        for row in rows:
            step = int(row["step"])
            for signal, value in row.items():
                if signal != "step":
                    run.add_scalar(named(signal), value, step)
            if (picture := record.picture(step)).is_file():
                run.add_image("panels", _pixels(picture), step, dataformats="HWC")

    def ended(self, record: Record, verdict: Verdict) -> None:
        """Write the verdict and the settings, and close the run's files."""
        run = self._run(record)
        run.add_text("verdict", verdict.sentence(), verdict.step)
        if verdict.onset is not None:
            run.add_scalar("divergence/onset", verdict.onset, verdict.step)
        run.add_hparams(_settings(record), {"hparam/stability": verdict.stability or math.nan}, name="settings")
        run.close()
        _nameless(self._folder / record.name)
        del self._open[record.name]

    def close(self) -> None:
        """Close what has not ended."""
        for run in self._open.values():
            run.close()
        self._open.clear()

    def _run(self, record: Record) -> SummaryWriter:
        from tensorboardX import SummaryWriter

        if record.name not in self._open:
            folder = self._folder / record.name
            shutil.rmtree(folder, ignore_errors=True)
            self._open[record.name] = SummaryWriter(str(folder), flush_secs=5)
            _nameless(folder)
        return self._open[record.name]


def _nameless(folder: Path) -> None:
    """Rename event files, which are named after the machine; one that is being written to goes on like that."""
    for path in folder.rglob("events.out.tfevents.*"):
        path.rename(path.with_name("events.out.tfevents.0.equipoise"))


def _pixels(picture: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))


def _settings(record: Record) -> dict[str, Any]:
    return dict(record.config.flat())
