"""A record's row as W&B gets it: under names that make its sections, with what a person compares runs by.

Knows W&B's sections, which are what stands before a name's first slash, and its images; knows nothing of how a run
gets there.

    loss/       what networks minimise
    critic/     critics' losses, AUC and gaps
    balance/    each term's share, and the gradients' norms
    divergence/ S so far, saturation, the weights' norm, and where the run began to fail
    quality/    Dice, the composite, and what the probe says of translations
    validator/  what target masks are worth, as far as that can be told without labels
    system/     speed, device-hours
    panels/     slices with masks over them, where they are asked for
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.panels import tiles
from equipoise.record import Row

if TYPE_CHECKING:
    import wandb

SECTIONS = {
    "auc": "critic",
    "grad": "balance",
    "probe": "quality",
    "saturation": "divergence",
    "time": "system",
    "weights": "divergence",
}
"""Where signals go whose own first word is no section of W&B's."""
ONSET = "divergence/onset"
"""The target cycle loss at the step at which a run began to fail: one point, over the curve of `loss/cycle_t`."""
_MASKS = {"x_s": {"truth": "y_s"}, "x_st": {"predicted": "mask_st", "truth": "y_s"}, "x_t": {"predicted": "mask_t"}}
"""Which masks lie over which image; a translation keeps its source's anatomy, and so its mask."""


def named(signal: str) -> str:
    """W&B's name of a signal, such as `critic/auc_t` of `auc/t`."""
    group, slash, name = signal.partition("/")
    return f"{SECTIONS[group]}/{group}_{name}" if slash and group in SECTIONS else signal


def row(signals: Row, before: int, hours: float) -> dict[str, float]:
    """A block's row; values are as recorded, also those that are not finite.

    Args:
        signals: of the block.
        before: step at which it began.
        hours: device-hours of training up to its end.
    """
    told = {named(signal): value for signal, value in signals.items()}
    seconds = signals.get("time/block")
    if seconds:
        told["system/steps_per_second"] = (signals["step"] - before) / seconds
    return told | {"system/device_hours": hours}


def onset_row(rows: list[Row], onset: int) -> dict[str, float]:
    """The point that marks an onset; nothing where no row holds a target cycle loss at it or before."""
    held = [row["loss/cycle_t"] for row in rows if "loss/cycle_t" in row and row["step"] <= max(onset, rows[0]["step"])]
    return {"step": onset, ONSET: held[-1]} if held else {}


def panels(picture: Path, step: int) -> dict[str, list[wandb.Image]]:
    """The panels in a picture as W&B's images, by their names; a mask can be shown and hidden there."""
    import wandb

    found = tiles(picture)
    if found is None:
        return {"panels/all": [wandb.Image(str(picture), caption=f"step {step}")]}
    told: dict[str, list[wandb.Image]] = {}
    for name, slices in found.images.items():
        over = {word: found.masks[mask] for word, mask in _MASKS.get(name, {}).items() if mask in found.masks}
        told[f"panels/{name}"] = [
            wandb.Image(np.ascontiguousarray(tile), caption=f"slice {k}", masks=_overlays(over, k) or None)
            for k, tile in enumerate(slices)
        ]
    return told


def _overlays(over: Mapping[str, np.ndarray], k: int) -> dict[str, Any]:
    labels = {0: "background"} | {n: f"structure {n}" for n in range(1, 256)}
    return {
        word: {"mask_data": mask[k], "class_labels": {n: labels[n] for n in range(int(mask.max()) + 1)}}
        for word, mask in over.items()
    }
