"""From a raw volume to a mask in the volume's own grid, by C1(E(x_t)).

Knows how prepared slices become logits, probabilities and, back in the volume's grid, classes; must not know files,
folders or where networks come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from equipoise.intake import Intake
from equipoise.model import Model
from equipoise.nets import Inference
from equipoise.shelf import framed, unframed
from slicestore.errors import InputError
from slicestore.preprocess import prepare, restore
from slicestore.settings import Prepared
from slicestore.store import Domain
from slicestore.volume import Volume

Flips = Literal["none", "x", "xy"]
FLIPS: dict[Flips, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "x": ((), (-1,)),
    "xy": ((), (-1,), (-2,), (-2, -1)),
}
"""Along which axes a slice is mirrored; probabilities are the mean over all of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How networks are applied."""

    flips: Flips = "none"
    """Test-time flips: mean probabilities over a slice and its mirror images, left and right (`x`), and upside down
    too (`xy`); twice and four times the work."""
    batch: int = 8
    """Slices at a time."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of convolutions; bfloat16 is faster where there are units for it, and changes masks in single voxels."""


PLAIN = Manner()


class Predicted(NamedTuple):
    """What a network finds in a volume."""

    label: Volume
    """uint8 class indices."""
    probabilities: tuple[Volume, ...]
    """Of each class but the background, float32 in [0, 1]; 0 where the network does not look."""


def predict(
    model: Model,
    volume: Volume,
    *,
    brain: Volume | None = None,
    manner: Manner = PLAIN,
    where: object = "volume",
) -> tuple[Predicted, list[str]]:
    """Segment a raw volume of the target modality; also say in what it is unlike those of the training.

    The grid of what is found equals the volume's. Voxels outside of what the network sees (the crop to its size, slices
    that the cohort's preprocessing leaves out) are background.

    Args:
        model: what segments.
        volume: raw.
        brain: a mask of the brain on its grid, for preprocessing that needs one.
        manner: how.
        where: what to call the volume in complaints.

    Raises:
        InputError: what preprocessing refuses (a constant image, a missing brain mask); or logits that are not finite.
    """
    prepared = prepare(volume, None, model.intake.preprocessing, brain=brain, where=where)
    found = probabilities(model.net, model.intake, prepared, manner=manner, where=where)
    return back(found, prepared), model.intake.oddities(prepared.record, "target")


def probabilities(
    net: Inference,
    intake: Intake,
    prepared: Prepared,
    *,
    manner: Manner = PLAIN,
    where: object = "volume",
) -> np.ndarray:
    """Probability of each class but the background, float32 (classes - 1, n, size, size).

    Raises:
        InputError: a logit is not finite.
    """
    device = next(net.parameters()).device
    out = np.empty((intake.classes - 1, *prepared.image.shape), dtype=np.float32)
    start = 0
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=manner.precision == "bfloat16"):
        for batch in batches(intake, prepared, device, manner.batch, "target"):
            share = unframed(_mean_softmax(net, batch, FLIPS[manner.flips]), intake.frame)[:, 1:]
            out[:, start : start + len(batch)] = share.transpose(0, 1).cpu().numpy()
            start += len(batch)
    if not np.isfinite(out).all():
        raise InputError(
            where,
            found=f"{np.count_nonzero(~np.isfinite(out))} probabilities that are not finite",
            rule="a mask is made of numbers",
            remedy="choose another run or an earlier evaluation: this network's weights overflow",
        )
    return out


def batches(intake: Intake, prepared: Prepared, device: torch.device, size: int, domain: Domain) -> Iterator[Tensor]:
    """A volume's slices as networks take them: (B, channels, H, W) float32 on the device, in their order."""
    images, stacks = intake.images(prepared, domain), intake.stacks(prepared)
    for start in range(0, len(stacks), size):
        yield framed(torch.from_numpy(images[stacks[start : start + size]]).to(device), intake.frame)


def back(found: np.ndarray, prepared: Prepared) -> Predicted:
    """Take probabilities to the volume's own grid, and there to classes: the likeliest, background if none is likelier.

    Between pixels they are interpolated, so that where voxels are finer than pixels an edge runs between pixels.
    """
    shares = [restore(share, prepared.record, linear=True) for share in found]
    rest, label = np.ones_like(shares[0].voxels), np.zeros(shares[0].voxels.shape, dtype=np.uint8)
    best = np.zeros_like(rest)
    for number, share in enumerate(shares, start=1):
        rest -= share.voxels
        label[share.voxels > best] = number
        np.maximum(best, share.voxels, out=best)
    label[best <= rest] = 0
    return Predicted(Volume(label, shares[0].geometry), tuple(shares))


def _mean_softmax(net: Inference, batch: Tensor, flips: tuple[tuple[int, ...], ...]) -> Tensor:
    """Mean over mirror images of the probabilities, (B, classes, H, W) float32."""
    shares = (net(batch.flip(axes)).float().softmax(1).flip(axes) for axes in flips)
    return sum(shares, start=batch.new_zeros(())) / len(flips)
