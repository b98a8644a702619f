"""How good a run's masks are.

Knows overlap measures and which images a SIFA may be asked to segment; knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.batches import Cohort
from equipoise.nets import Sifa
from equipoise.shelf import Shelf, Slices
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
    """Dice on validation subjects, in evaluation mode.

    Returns:
        `quality/translated_dice`: C1(E(G(x_s))) against y_s, which needs no target label; `quality/target_dice`:
        C1(E(x_t)) against target masks. Each is left out where there are no such masks. A brain class, which is there
        to help the others, does not count in these; it has its own, `quality/translated_brain_dice` and
        `quality/target_brain_dice`.
    """
    net.eval()
    brain = cohort.brain_class
    kinds = {"dice": [k for k in range(1, cohort.classes) if k != brain]} | ({"brain_dice": [brain]} if brain else {})
    scores = {}
    for name, domain in zip(("translated", "target"), DOMAINS, strict=True):
        slices = cohort.val[domain]
        predicted = _segment(net, slices, batch, translate=domain == "source")
        for kind, structures in kinds.items():
            scores[f"quality/{name}_{kind}"] = subject_dice(predicted, slices, structures)
    net.train()
    return {name: score for name, score in scores.items() if score is not None}


def _segment(net: Sifa, slices: Shelf | Slices, batch: int, *, translate: bool) -> Tensor:
    """Class indices (N, H, W) uint8 on the device; images are brought there a batch at a time."""
    parts = [torch.empty(0, dtype=torch.uint8)]
    if slices.area is not None and len(slices):
        numbers = [range(len(slices))[start : start + batch] for start in range(0, len(slices), batch)]
        for now, then in zip(numbers, [*numbers[1:], None], strict=True):
            image = slices.take(now, then).image
            seen = net.encoder(net.generator(image), "translated") if translate else net.encoder(image, "target")
            logits = net.segmenter(seen, (image.shape[-2], image.shape[-1]))
            parts.append(logits.argmax(1).to(torch.uint8))
    return torch.cat(parts[1:] or parts)
