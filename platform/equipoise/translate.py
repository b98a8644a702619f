"""From a raw volume of one modality to what it would look like in the other, in the volume's own grid.

Knows G and U and on which scale their images lie; must not know files, folders or where networks come from.
"""

from __future__ import annotations

import numpy as np
import torch

from equipoise.intake import Intake
from equipoise.nets import Sifa
from equipoise.predict import batches
from equipoise.shelf import unframed
from slicestore.errors import InputError
from slicestore.preprocess import prepare, restore
from slicestore.settings import Prepared
from slicestore.store import Domain
from slicestore.volume import Volume


def translate(
    net: Sifa,
    intake: Intake,
    volume: Volume,
    *,
    of: Domain,
    brain: Volume | None = None,
    batch: int = 8,
    where: object = "volume",
) -> tuple[Volume, list[str]]:
    """x_st of a source volume or x_ts of a target volume; also say in what the volume is unlike its domain's.

    Values are standard deviations from the mean of an image of the other domain, as its stores hold them: raw units
    cannot be known. What the networks do not see gets the darkest value that they can make. The decoder draws
    dropout; the same volume gives the same image every time.

    Args:
        net: all networks, in evaluation mode.
        intake: what they expect.
        volume: raw.
        of: its domain.
        brain: a mask of the brain on its grid, for preprocessing that needs one.
        batch: slices at a time.
        where: what to call the volume in complaints.

    Raises:
        InputError: what preprocessing refuses; or images that are not finite.
    """
    prepared = prepare(volume, None, intake.preprocessing, brain=brain, where=where)
    made = images(net, intake, prepared, of, batch)
    _check(made, where)
    low, high = intake.limits["target" if of == "source" else "source"]
    above = (made + 1) * ((high - low) / 2)  # over the darkest, so that what `restore` leaves 0 is that
    shown = restore(above, prepared.record, linear=True)
    return Volume(shown.voxels + np.float32(low), shown.geometry), intake.oddities(prepared.record, of)


def images(net: Sifa, intake: Intake, prepared: Prepared, of: Domain, batch: int = 8) -> np.ndarray:
    """All slices of a prepared volume, translated: float32 (n, size, size) in [-1, 1]."""
    device = next(net.parameters()).device
    made = []
    with torch.inference_mode(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for x in batches(intake, prepared, device, batch, of):
            out = net.generator(x) if of == "source" else net.decoder(net.encoder(x, "target").high, x)
            made.append(unframed(out[:, intake.channels // 2], intake.frame).float().cpu().numpy())
    return np.concatenate(made)


def _check(made: np.ndarray, where: object) -> None:
    if not np.isfinite(made).all():
        raise InputError(
            where,
            found=f"{np.count_nonzero(~np.isfinite(made))} translated pixels that are not finite",
            rule="an image is made of numbers",
            remedy="choose another run or an earlier checkpoint with --step: this one's networks have diverged",
        )
