"""Losses as pure functions, and one number about a critic.

Knows formulas, and which of them a `LossConfig` names; must not know networks, weights of terms, which pass is running
or how many processes there are: sums over the whole batch pass through a hook, `total`. The mean over processes of what
each returns is then the joined batch's loss, and the mean of their gradients its gradient.

None waits for the device, and no branch looks at data: all may run in a CUDA graph and compile without a break.

Logits may be half precision: every mean is taken in float32 (float64 stays float64).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from equipoise.centrelines import soft_skeleton
from equipoise.config import CrossEntropyName, LossConfig

Total = Callable[[Tensor], Tensor]
"""A hook for sums over the batch: takes a tensor of this process's sums, gives those over all processes.

Under data parallelism two ranks then equal one process on the joined batch. A loss that needs the gradient of its sums
(all but `cross_entropy` by pixel) needs a hook whose backward pass adds the ranks' gradients, as that of
`torch.distributed.nn.functional.all_reduce` does: each rank then holds the gradient by its own images times the number
of ranks, and DDP's mean over the ranks takes that factor away.
"""


def here(sums: Tensor) -> Tensor:
    """Give the sums as they are: the hook for one process."""
    return sums


def wide(x: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cycle(image: Tensor, cycled: Tensor) -> Tensor:
    """Mean absolute difference between an image and its round trip, two tensors of one shape."""
    return (wide(image) - wide(cycled)).abs().mean()


def segmentation_loss(logits: Tensor, labels: Tensor, config: LossConfig, *, total: Total = here) -> dict[str, Tensor]:
    """Give the terms that `config` names, unweighted: "ce", "overlap" and, where `config.cldice` is not 0, "cldice".

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64 in [0, K).
        config: which formulas, and their parameters.
        total: passes one tensor of sums a term.

    Returns:
        A scalar each; see `cross_entropy`, `dice_loss`, `tversky_loss`, `focal_tversky_loss` and `cldice_loss`.
    """
    terms = {
        "ce": cross_entropy(logits, labels, weighing=config.cross_entropy, clip=config.ce_clip, total=total),
        "overlap": _overlap(logits, labels, config, total),
    }
    if config.cldice:
        terms["cldice"] = cldice_loss(logits, labels, iterations=config.cldice_iterations, total=total)
    return terms


def cross_entropy(
    logits: Tensor, labels: Tensor, *, weighing: CrossEntropyName = "pixel", clip: float = 0.005, total: Total = here
) -> Tensor:
    """-log(max(p_c, clip)) of each pixel, c its class, in one of three means.

    * `pixel`, as the reference does: weighed by w_c = 1 - the share of class c among the batch's pixels, mean over
      **all pixels**. With two classes and a foreground share f it is bounded by -2 log(clip) f (1 - f), and a class of
      few pixels all but vanishes.
    * `weight`: the same divided by the mean of the pixels' weights, which is `F.cross_entropy(weight=w)`: with two
      classes 1 / (2 f (1 - f)) times `pixel`, 167 times at 0.3 %.
    * `balanced`: the mean over the classes present in the batch of each class's own mean. With two it is `weight`; with
      more, `weight` still lets a class pull by f_c (1 - f_c).

    A pixel whose class has p < clip gives exactly no gradient: confident mistakes are left to the overlap term. A batch
    of a single class has loss 0 by `pixel` and `weight` (where PyTorch's is 0 / 0), its plain mean by `balanced`.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64 in [0, K); no value means "not labelled".
        weighing: how pixels count.
        clip: the probability below which the loss is flat; 0 clips nothing.
        total: by `pixel`, passes the K pixel counts, which carry no gradient: the mean itself stays this process's own.
            Otherwise 2 K sums, of which those of -log p do.

    Returns:
        A scalar in [0, -log(clip)], with clip 0 in [0, inf); NaN if a logit is.
    """
    log_p = _log_of_own(logits, labels, clip)
    g = _one_hot(labels, logits.shape[1])
    counts = g.sum((0, 2, 3), dtype=log_p.dtype)  # (K,)
    if weighing == "pixel":
        counts = total(counts)
        weight = 1 - counts / counts.sum()
        return -(weight[labels] * log_p).mean()
    surprise, counts = total(torch.stack([-(g * log_p.unsqueeze(1)).sum((0, 2, 3)), counts])).unbind()
    if weighing == "weight":
        weight = 1 - counts / counts.sum()
        # Of two classes or more the pixels' weights add up to at least 1, those of one class to 0.
        return (weight * surprise).sum() / (weight * counts).sum().clamp(min=1)
    return (surprise / counts.clamp(min=1)).sum() / (counts > 0).sum()


def dice_loss(logits: Tensor, labels: Tensor, *, total: Total = here) -> Tensor:
    """1 - mean over classes of 2 sum(p g) / (sum p^2 + sum g + 1e-7), sums over the whole batch, background included.

    With two classes a value parked near 0.5 means that the foreground is never predicted. Where a class is absent from
    labels and prediction its Dice is 0, not 1, as in the reference.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64 in [0, K); no value means "not labelled".
        total: passes 3 K sums; two of the three carry gradient.

    Returns:
        A scalar in [0, 1]; NaN if a logit is.
    """
    p = _probabilities(logits)
    g = _one_hot(labels, logits.shape[1]).to(p.dtype)
    sums = [(p * g).sum((0, 2, 3)), p.square().sum((0, 2, 3)), g.sum((0, 2, 3))]
    overlap, predicted, labelled = total(torch.stack(sums)).unbind()  # (K,) each
    return 1 - (2 * overlap / (predicted + labelled + 1e-7)).mean()


def tversky_loss(logits: Tensor, labels: Tensor, *, missed: float = 0.7, total: Total = here) -> Tensor:
    """1 - mean over classes of T = hit / (hit + missed * FN + (1 - missed) * FP) (Salehi et al., MLMI 2017).

    hit = sum(p g), FN = sum((1 - p) g), FP = sum(p (1 - g)), sums over the whole batch, background included; `missed`
    is the paper's beta, and Abraham and Khan's alpha. With .5 it is exactly the Dice loss with unsquared denominators,
    1 - mean of 2 sum(p g) / (sum p + sum g + 1e-7), and that is `dice_loss` where every p is 0 or 1. As there, a class
    absent from labels and prediction has T = 0.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64 in [0, K); no value means "not labelled".
        missed: weight of missed pixels in [0, 1]; falsely found ones have the rest.
        total: passes 3 K sums, all of which carry gradient.

    Returns:
        A scalar in [0, 1]; NaN if a logit is.
    """
    return _tversky_gaps(logits, labels, missed, total).mean()


def focal_tversky_loss(
    logits: Tensor, labels: Tensor, *, missed: float = 0.7, exponent: float = 0.75, total: Total = here
) -> Tensor:
    """Mean over classes of (1 - T)^exponent (Abraham and Khan, ISBI 2019, who sum it, with exponent 3/4).

    See `tversky_loss`, which it is with exponent 1. Its gradient stays finite where T comes close to 1.
    """
    return _tversky_gaps(logits, labels, missed, total).pow(exponent).mean()


def cldice_loss(
    logits: Tensor, labels: Tensor, *, iterations: int = 3, structure: int = 1, total: Total = here
) -> Tensor:
    """1 - clDice of one class's masks, the overlap of their centrelines in the slice's plane (Shit et al., CVPR 2021).

    With S a mask's soft skeleton, p the predicted mask and g the labelled one, sums over the whole batch:
    precision = (sum(S(p) g) + 1) / (sum S(p) + 1), sensitivity = (sum(S(g) p) + 1) / (sum S(g) + 1), and clDice is
    their harmonic mean. The ones are the authors' own: they make the loss 0 where neither has the structure, and close
    to 1 where a prediction stands against an empty label.

    Every pixel of centreline counts the same, so a gap in a thin vessel costs as much as one in a wide vessel, and a
    ragged edge next to nothing. Only a tree has centrelines that mean something: background and brain are left out.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64 in [0, K); no value means "not labelled".
        iterations: see `soft_skeleton`.
        structure: the class that is a tree. Class 1 is the vessel, also where a store labels the brain beside it.
        total: passes 4 sums; three carry gradient.

    Returns:
        A scalar in [0, 1]; NaN if a logit is.
    """
    p = _probabilities(logits)[:, structure : structure + 1]
    g = (labels == structure).to(p.dtype).unsqueeze(1)
    along_p, along_g = soft_skeleton(p, iterations), soft_skeleton(g, iterations)
    sums = [(along_p * g).sum(), along_p.sum(), (along_g * p).sum(), along_g.sum()]
    right, predicted, found, labelled = total(torch.stack(sums)).unbind()
    precision, sensitivity = (right + 1) / (predicted + 1), (found + 1) / (labelled + 1)
    return 1 - 2 * precision * sensitivity / (precision + sensitivity)


def patch_auc(real: Tensor, fake: Tensor) -> Tensor:
    """Give the share of pairs in which a critic rates the real patch above the fake one; ties count half.

    The Mann-Whitney statistic: 0.5 is a critic that cannot tell, 1 one that is never wrong. It sees ranks only, so it
    compares games whose logits live on different scales.

    Args:
        real: logits of any shape.
        fake: logits of any shape and number.

    Returns:
        A float32 scalar in [0, 1] on the logits' device, without gradient and without a wait for the device. NaN if
        any logit is, or if either side is empty: a broken critic must not look like an undecided one.
    """
    with torch.no_grad():
        r = real.detach().reshape(-1).float().contiguous()
        f = fake.detach().reshape(-1).float().sort().values
        below = torch.searchsorted(f, r) + torch.searchsorted(f, r, right=True)  # twice the wins, ties once
        auc = (below.sum().double() / (2 * r.numel() * f.numel() or float("nan"))).float()
        return auc.masked_fill(r.isnan().any() | f.isnan().any(), float("nan"))


def _overlap(logits: Tensor, labels: Tensor, config: LossConfig, total: Total) -> Tensor:
    if config.overlap == "dice":
        return dice_loss(logits, labels, total=total)
    missed = config.tversky_missed
    if config.overlap == "tversky":
        return tversky_loss(logits, labels, missed=missed, total=total)
    return focal_tversky_loss(logits, labels, missed=missed, exponent=config.focal_exponent, total=total)


def _tversky_gaps(logits: Tensor, labels: Tensor, missed: float, total: Total) -> Tensor:
    """1 - T of each class (K,), from its mistakes rather than by subtraction.

    A rounded T may pass 1, and a fractional power of what is then below 0 is NaN; this is never below 0, nor 0.
    """
    p = _probabilities(logits)
    g = _one_hot(labels, logits.shape[1]).to(p.dtype)
    sums = [(p * g).sum((0, 2, 3)), ((1 - p) * g).sum((0, 2, 3)), (p * (1 - g)).sum((0, 2, 3))]
    hit, lost, false = total(torch.stack(sums)).unbind()  # (K,) each
    mistakes = 2 * (missed * lost + (1 - missed) * false) + 1e-7
    return mistakes / (2 * hit + mistakes)


def _log_of_own(logits: Tensor, labels: Tensor, clip: float) -> Tensor:
    """Log of the clipped probability of each pixel's own class, (B, H, W)."""
    own = labels.unsqueeze(1)
    if clip == 0:
        return wide(logits).log_softmax(1).gather(1, own).squeeze(1)
    return _probabilities(logits).gather(1, own).squeeze(1).clamp(clip, 1).log()


def _probabilities(logits: Tensor) -> Tensor:
    return wide(logits).softmax(1)


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B, H, W) -> (B, K, H, W) bool; unlike `bincount` it does not wait for the device to find the largest label."""
    return labels.unsqueeze(1) == torch.arange(classes, device=labels.device).view(1, -1, 1, 1)
