"""How good a run's masks are.

Knows overlap measures, what is scored with and without labels (`validators`), and which images a SIFA may be asked to
segment; knows nothing of training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import pairwise
from operator import add

import torch
from torch import Tensor

from equipoise.batches import Cohort
from equipoise.nets import Sifa
from equipoise.shelf import Shelf, Slices
from equipoise.validators import Sums, validators
from slicestore.store import DOMAINS


def dice(prediction: Tensor, label: Tensor, structures: Sequence[int]) -> float:
    """Mean Dice over structures of one subject.

    Args:
        prediction: class indices, any shape.
        label: class indices of the same shape.
        structures: the classes that count.

    Returns:
        2 |P and L| / (|P| + |L|), averaged over the structures, in [0, 1]. A structure that is in neither counts 1.
    """
    scores = []
    for k in structures:
        p, g = prediction == k, label == k
        total = int(p.sum()) + int(g.sum())
        scores.append(2 * int((p & g).sum()) / total if total else 1.0)
    return sum(scores) / len(scores)


def subject_dice(prediction: Tensor, slices: Shelf | Slices, structures: Sequence[int]) -> float | None:
    """Mean over subjects of each subject's Dice over all of its slices; None without labels."""
    label = slices.label
    if label is None or not len(slices):
        return None
    scores = []
    for subject in sorted(set(slices.subject)):
        mine = [i for i, s in enumerate(slices.subject) if s == subject]
        scores.append(dice(prediction[mine], label[mine], structures))
    return sum(scores) / len(scores)


@torch.no_grad()
def evaluate(net: Sifa, cohort: Cohort, *, batch: int = 8) -> dict[str, float]:
    """Scores of what is segmented on validation subjects, in evaluation mode.

    Returns:
        `quality/translated_dice`: C1(E(G(x_s))) against y_s, which needs no target label; `quality/target_dice`:
        C1(E(x_t)) against target masks. Each is left out where there are no such masks. A brain class, which is there
        to help the others, does not count in these; it has its own, `quality/translated_brain_dice` and
        `quality/target_brain_dice`.

        Where there are target slices, with masks or without: `validator/*` of C1(E(x_t)), see
        `validators.validators`; and `quality/composite` where the translated Dice is known too, see `composite`.
    """
    net.eval()
    source, target = (cohort.val[domain] for domain in DOMAINS)
    labelled = source.area is not None
    translated = [_classes(x) for x in _logits(net, source, batch, translate=True)] if labelled else []
    seen = [(_classes(x), Sums.of(x, cohort.brain_class)) for x in _logits(net, target, batch, translate=False)]
    net.train()
    scores = _dice("translated", translated, source, cohort) | _dice("target", [m for m, _ in seen], target, cohort)
    if seen:
        area = cohort.train["source"].area
        sums = reduce(add, (part for _, part in seen))
        scores |= validators(sums, None if area is None else float(area.mean()))
    if "quality/translated_dice" in scores and "validator/volume" in scores:
        scores["quality/composite"] = composite(scores["quality/translated_dice"], scores["validator/volume"])
    return scores


def composite(translated_dice: float, volume: float) -> float:
    """Geometric mean of the translated Dice and `validator/volume`, in [0, 1]; NaN if one of them is.

    It needs no target label, as the translated Dice does not; but that says nothing of target images, and stays high
    when masks vanish on them. This falls to 0.
    """
    return math.sqrt(translated_dice * volume)


def _classes(logits: Tensor) -> Tensor:
    """Of logits (N, C, H, W) the likeliest class of each pixel, (N, H, W) uint8."""
    return logits.argmax(1).to(torch.uint8)


def _dice(name: str, masks: Sequence[Tensor], slices: Shelf | Slices, cohort: Cohort) -> dict[str, float]:
    """Dice of the structures and, where there is a class of it, of the brain; nothing without labels."""
    if not masks:
        return {}
    brain, predicted = cohort.brain_class, torch.cat(list(masks))
    kinds = {"dice": [k for k in range(1, cohort.classes) if k != brain]} | ({"brain_dice": [brain]} if brain else {})
    found = {f"quality/{name}_{kind}": subject_dice(predicted, slices, kinds[kind]) for kind in kinds}
    return {kind: score for kind, score in found.items() if score is not None}


def _logits(net: Sifa, slices: Shelf | Slices, batch: int, *, translate: bool) -> Iterator[Tensor]:
    """Logits (N, C, H, W) of a batch of slices after the other; images are brought to the device a batch at a time."""
    numbers = [range(len(slices))[start : start + batch] for start in range(0, len(slices), batch)]
    for now, then in pairwise([*numbers, None]):
        assert now is not None
        image = slices.take(now, then).image
        seen = net.encoder(net.generator(image), "translated") if translate else net.encoder(image, "target")
        yield net.segmenter(seen, (image.shape[-2], image.shape[-1]))
