"""Random changes of training slices: pure functions of slices and numbers.

Knows geometry and grey values; must not know where slices come from. What is drawn depends on seed, step, domain and
a slice's place in the joined batch, on nothing else: neither on the number of ranks nor on what is switched on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from equipoise.config import AugmentConfig
from equipoise.shelf import sent

DRAWS = 6


class Changes(NamedTuple):
    """One set of numbers a slice."""

    inverse: np.ndarray
    """(B, 2, 2): from a pixel's (x, y) about the centre to where its value is taken from."""
    gamma: np.ndarray
    """(B,): exponent of the grey values in [0, 1]."""
    gain: np.ndarray
    """(B,): their factor after that."""
    shift: np.ndarray
    """(B,): added at last, in units of [-1, 1]."""


def draw(key: tuple[int, ...], batch: int) -> np.ndarray:
    """Uniform numbers in [0, 1), `(batch, DRAWS)`, from whole numbers that say what they are for."""
    return np.random.default_rng(key).random((batch, DRAWS))


def changes(config: AugmentConfig, uniform: np.ndarray) -> Changes:
    """Turn uniform numbers `(B, DRAWS)` into changes.

    Scale and gamma are drawn evenly on a logarithmic axis, so that growth and shrinkage are alike; the rest evenly.
    """
    angle = np.deg2rad(config.rotation_degrees) * (2 * uniform[:, 0] - 1)
    scale = (1 + config.scale) ** (2 * uniform[:, 1] - 1)
    side = np.where(uniform[:, 2] < config.flip, -1.0, 1.0)
    gamma = (1 + config.gamma) ** (2 * uniform[:, 3] - 1)
    gain = 1 + config.gain * (2 * uniform[:, 4] - 1)
    shift = config.shift * (2 * uniform[:, 5] - 1)
    return Changes(inverse(angle, scale, side), gamma, gain, shift)


def inverse(angle: np.ndarray, scale: np.ndarray, side: np.ndarray) -> np.ndarray:
    """The way back from a slice that was flipped, then turned, then scaled about its centre.

    Args:
        angle: radians, anticlockwise as a picture shows it, whose rows run downwards.
        scale: above 1 the content grows.
        side: -1 where left and right change sides, else 1.

    Returns:
        (B, 2, 2), on columns (x, y).
    """
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    return np.stack([np.stack([side * cos, -side * sin], -1), np.stack([sin, cos], -1)], -2)


def move(image: Tensor, label: Tensor | None, inverse: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Turn, scale and flip slices together with their labels.

    Args:
        image: `(B, C, H, W)` float32; bilinear. The border's values go on beyond it: what surrounds a head is its own
            background, not a new grey.
        label: `(B, H, W)` class indices of any whole type; nearest neighbour, border as the image's.
        inverse: as of the function of this name.
    """
    height, width = image.shape[-2:]
    y = torch.arange(height, device=image.device, dtype=torch.float32) - (height - 1) / 2
    x = torch.arange(width, device=image.device, dtype=torch.float32) - (width - 1) / 2
    # Sums of products, element by element: a matrix product may round differently for another number of slices.
    to_grid = inverse * (2 / np.array([[width], [height]]))
    m = sent(to_grid.astype(np.float32), image.device)[:, :, :, None, None]
    grid = torch.stack([m[:, k, 0] * x + m[:, k, 1] * y[:, None] for k in range(2)], -1)
    moved = grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if label is None:
        return moved, None
    wide = label[:, None].to(torch.float32)
    return moved, grid_sample(wide, grid, mode="nearest", padding_mode="border", align_corners=False)[:, 0].to(label)


def recolour(image: Tensor, gamma: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> Tensor:
    """Change grey values: with h = (x + 1) / 2 in [0, 1], x becomes 2 gain h^gamma - 1 + shift; both are clipped."""
    g, k, b = (sent(v.astype(np.float32), image.device)[:, None, None, None] for v in (gamma, gain, shift))
    height = ((image + 1) / 2).clamp(0, 1)
    return (height**g * (2 * k) - 1 + b).clamp(-1, 1)


def augment(
    image: Tensor, label: Tensor | None, config: AugmentConfig, uniform: np.ndarray
) -> tuple[Tensor, Tensor | None]:
    """Change each slice by its own row of uniform numbers `(B, DRAWS)`; what is switched off touches no value."""
    how = changes(config, uniform)
    if config.rotation_degrees or config.scale or config.flip:
        image, label = move(image, label, how.inverse)
    if config.gamma or config.gain or config.shift:
        image = recolour(image, how.gamma, how.gain, how.shift)
    return image, label
