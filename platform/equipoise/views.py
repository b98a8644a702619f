"""What critics of images are shown of them: noise, shifts and holes that make telling real from fake harder.

Knows how an image is disturbed; must not know which side it belongs to, which critic looks, or how noise falls over a
run. Grey values that stay visible are those of the image plus noise: contrast is what tells the domains apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.config_game import CriticConfig

EMPTY = -1.0
"""Fills what a shift uncovers and what is cut out: air, the darkest of our [-1, 1]. DiffAugment's 0 is black in its own
pictures, but a mid-grey in ours; and an edge drawn out would smear tissue that reaches it."""


def view(image: Tensor, sigma: Tensor, critic: CriticConfig) -> Tensor:
    """Add instance noise (Sonderby et al., ICLR 2017), then shift and cut as DiffAugment does (Zhao, NeurIPS 2020).

    Every image is disturbed in its own way, anew at each call, from torch's global generator on the image's device;
    the slices of an image, in its channels, move together. A shift is a whole number of pixels along each axis, either
    way and up to `translation` of the side, all equally likely. The square's centre is equally likely everywhere, so
    that part of it may lie outside. Nothing waits for the device.

    Args:
        image: (B, C, H, W) in [-1, 1].
        sigma: the noise's standard deviation now, a scalar on the image's device; not read where `critic.noise` is 0.
        critic: what is asked for; `noise`, the deviation at the start, says only whether there is any.

    Returns:
        The same shape and type, differentiable by `image`; the image itself where all is off. Noise exceeds [-1, 1].
        NaN where the image is and nothing hides it.
    """
    if critic.noise:
        image = image + sigma * torch.randn_like(image)
    if not (critic.translation or critic.cutout):
        return image
    height, width = image.shape[-2:]
    u = torch.rand(4, len(image), 1, device=image.device)  # in [0, 1), whose products below never round up to the end
    rows, seen_rows = _shifted(height, u[0], critic.translation)
    columns, seen_columns = _shifted(width, u[1], critic.translation)
    seen = seen_rows[:, :, None] & seen_columns[:, None, :]
    seen &= ~(_hole(height, u[2], critic.cutout)[:, :, None] & _hole(width, u[3], critic.cutout)[:, None, :])
    if critic.translation:
        place = (rows[:, :, None] * width + columns[:, None, :]).flatten(1).unsqueeze(1)  # (B, 1, H W)
        image = image.flatten(2).gather(2, place.expand(-1, image.shape[1], -1)).view(image.shape)
    return torch.where(seen.unsqueeze(1), image, EMPTY)


def _shifted(side: int, u: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Where each pixel of one axis comes from, and whether from inside: (B, side) both, `u` (B, 1) in [0, 1).

    What would come from outside comes from the other end, so that each place is read once.
    """
    most = round(share * side)
    shift = (u * (2 * most + 1)).long() - most
    origin = torch.arange(side, device=u.device) - shift
    return origin % side, (origin >= 0) & (origin < side)


def _hole(side: int, u: Tensor, share: float) -> Tensor:
    """Which pixels of one axis the square covers: (B, side), `u` (B, 1) in [0, 1)."""
    length = round(share * side)
    first = (u * (side + 1 - length % 2)).long() - length // 2
    offset = torch.arange(side, device=u.device) - first
    return (offset >= 0) & (offset < length)
