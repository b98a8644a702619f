"""Penalties on the slope of a critic: how fast its logits change with what it is shown.

Knows formulas and how to take a gradient of a gradient; must not know which critic is judged, its game, or how a run
weighs the penalty.

One convention for all. The slope at a point, an image or a map of logits, is the norm of the gradient of the **sum** of
that point's patch logits by all of its pixels and channels; squares are averaged over the batch. Sums over patches and
pixels grow with the image: a published weight holds for its own size and patches only.

| name    | value                               | at                                       | source                  |
|---------|-------------------------------------|------------------------------------------|-------------------------|
| r1      | E slope(x)^2 / 2                    | real x                                   | Mescheder, ICML 2018    |
| r1r2    | E slope(x)^2 / 2 + E slope(y)^2 / 2 | real x and fake y                        | Huang, NeurIPS 2024     |
| gp0_mix | E slope(z)^2 / 2                    | z = e x + (1 - e) y, e uniform in [0, 1) | Thanh-Tung, ICLR 2019   |
| gp      | E (slope(z) - 1)^2                  | the same                                 | Gulrajani, NeurIPS 2017 |

As in `losses`: none waits for the device, and no branch looks at data. The mean over processes of the values, and of
the gradients, is that of the joined batch, since each process has the same share of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from equipoise.config_game import PenaltyName
from equipoise.losses import wide

Judge = Callable[[Tensor], Tensor]
"""A critic's logits (B, 1, h, w) of what it is shown (B, C, H, W), each image by itself."""


def penalty(name: PenaltyName, judge: Judge, real: Tensor, fake: Tensor) -> Tensor:
    """Give the penalty `name` at weight 1, differentiable by the critic's weights.

    Computed in float32 at least, also under autocast, and without compiled code, which has no second gradients.

    Args:
        name: a key of `PENALTIES`.
        judge: differentiable twice; called once, on both sides side by side where both are looked at.
        real: (B, C, H, W); no gradient goes to it.
        fake: the same shape, likewise.

    Returns:
        A scalar, not negative; NaN if a slope is. Its gradient is finite where the critic is flat.

    Raises:
        KeyError: `name` is none.
    """
    return PENALTIES[name](judge, wide(real.detach()), wide(fake.detach()))


def _r1(judge: Judge, real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * _slopes(judge, real).square().mean()


def _r1r2(judge: Judge, real: Tensor, fake: Tensor) -> Tensor:
    return _slopes(judge, torch.cat([real, fake])).square().mean()  # over 2 B: twice the half


def _gp0_mix(judge: Judge, real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * _slopes(judge, _mix(real, fake)).square().mean()


def _gp(judge: Judge, real: Tensor, fake: Tensor) -> Tensor:
    return (_slopes(judge, _mix(real, fake)) - 1).square().mean()


PENALTIES: Mapping[PenaltyName, Callable[[Judge, Tensor, Tensor], Tensor]] = MappingProxyType(
    {"r1": _r1, "r1r2": _r1r2, "gp0_mix": _gp0_mix, "gp": _gp}
)
"""Every penalty by the name of `critic.penalty`, of a judge, real and fake."""


def _slopes(judge: Judge, points: Tensor) -> Tensor:
    """Of the judge at each point, (B,)."""
    leaf = points.requires_grad_()
    with torch.autocast(leaf.device.type, enabled=False), torch.compiler.set_stance("force_eager"):
        logits = judge(leaf)
    (by_pixel,) = torch.autograd.grad(logits.sum(), leaf, create_graph=True)
    # Its gradient at 0 is 0, where that of a root of squares is not a number.
    slopes: Tensor = torch.linalg.vector_norm(by_pixel.flatten(1), dim=1)
    return slopes


def _mix(real: Tensor, fake: Tensor) -> Tensor:
    """One image between each pair; where is drawn from torch's global generator."""
    share = torch.rand(len(real), 1, 1, 1, dtype=real.dtype, device=real.device)
    return torch.lerp(fake, real, share)
