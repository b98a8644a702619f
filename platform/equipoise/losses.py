"""Losses as pure functions, and one number about a critic.

Knows formulas; must not know networks, weights of terms, which pass is running or how many processes there are: sums
over the whole batch pass through a hook, `total`.

Logits may be half precision: every mean is taken in float32 (float64 stays float64).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""A hook for sums over the batch: takes a tensor of this process's sums, gives those over all processes.

Under data parallelism two ranks then equal one process on the joined batch. A loss that needs the gradient of its sums
(`dice_loss`) needs a hook whose backward pass adds the ranks' gradients, as that of
`torch.distributed.nn.functional.all_reduce` does: each rank then holds the gradient by its own images times the number
of ranks, and DDP's mean over the ranks takes that factor away.
"""


def here(sums: Tensor) -> Tensor:
    """Give the sums as they are: the hook for one process."""
    return sums


class Game(NamedTuple):
    """The two sides of an adversarial loss, on logits of any shape; each gives a scalar to minimise."""

    critic: Callable[[Tensor, Tensor], Tensor]
    """(real, fake) -> what the critic minimises."""

    generator: Callable[[Tensor], Tensor]
    """fake -> what the network that made it minimises."""


def lsgan_critic(real: Tensor, fake: Tensor) -> Tensor:
    """Least squares (Mao et al., ICCV 2017): real patches to 1, fake ones to 0, halved."""
    return 0.5 * ((_wide(real) - 1).square().mean() + _wide(fake).square().mean())


def lsgan_generator(fake: Tensor) -> Tensor:
    """Fake patches to 1; not halved, as in the reference, so this side weighs twice the critic's."""
    return (_wide(fake) - 1).square().mean()


def ns_critic(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross-entropy (Goodfellow et al., NeurIPS 2014), from logits: -log s(real) - log(1 - s(fake))."""
    return F.softplus(-_wide(real)).mean() + F.softplus(_wide(fake)).mean()


def ns_generator(fake: Tensor) -> Tensor:
    """Maximise log s(fake), which unlike log(1 - s(fake)) has a gradient where the critic wins: -log s(fake)."""
    return F.softplus(-_wide(fake)).mean()


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge (Lim and Ye, 2017): no reward beyond a margin of 1 on either side of 0."""
    return F.relu(1 - _wide(real)).mean() + F.relu(1 + _wide(fake)).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-D(fake): unbounded below."""
    return -_wide(fake).mean()


ADVERSARIAL: Mapping[str, Game] = MappingProxyType(
    {
        "lsgan": Game(lsgan_critic, lsgan_generator),
        "ns": Game(ns_critic, ns_generator),
        "hinge": Game(hinge_critic, hinge_generator),
    }
)
"""Every game the critics can play, by name."""


def cycle(image: Tensor, cycled: Tensor) -> Tensor:
    """Mean absolute difference between an image and its round trip, two tensors of one shape."""
    return (_wide(image) - _wide(cycled)).abs().mean()


def cross_entropy(logits: Tensor, labels: Tensor, *, clip: float = 0.005, total: Total = here) -> Tensor:
    """Weigh classes as the reference does: mean over all pixels of -w_c log(max(p_c, clip)), c the pixel's class.

    w_c = 1 - the share of class c among the batch's pixels. This is not `F.cross_entropy(weight=w)`, which divides by
    the sum of the pixels' weights: with two classes and a foreground share f it is 1 / (2 f (1 - f)) times larger, 167
    times at 0.3 %. A pixel whose class has p < clip gives exactly no gradient: confident mistakes are left to Dice.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64 in [0, K); no value means "not labelled".
        clip: the probability below which the loss is flat.
        total: passes the K pixel counts, which carry no gradient. The mean itself stays this process's own.

    Returns:
        A scalar in [0, -log(clip)]; NaN if a logit is.
    """
    p = _probabilities(logits)
    counts = total(_one_hot(labels, logits.shape[1]).sum((0, 2, 3), dtype=p.dtype))  # (K,)
    weight = 1 - counts / counts.sum()
    own = p.gather(1, labels.unsqueeze(1)).squeeze(1)  # (B, H, W): probability of the pixel's own class
    return -(weight[labels] * own.clamp(clip, 1).log()).mean()


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


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _probabilities(logits: Tensor) -> Tensor:
    return _wide(logits).softmax(1)


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B, H, W) -> (B, K, H, W) bool; unlike `bincount` it does not wait for the device to find the largest label."""
    return labels.unsqueeze(1) == torch.arange(classes, device=labels.device).view(1, -1, 1, 1)
