"""Soft centrelines: a skeleton by erosion and dilation that gradients pass through.

Knows maps of values in [0, 1]; must not know logits, labels or losses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_skeleton(maps: Tensor, iterations: int) -> Tensor:
    """Add up what an opening takes away, at each of `iterations` erosions (Shit et al., CVPR 2021, algorithm 1).

    As in its authors' code an erosion takes the least of a pixel and its four neighbours, a dilation the greatest of
    its 3 x 3. Beyond the map's edge lies nothing, so a vessel that leaves the slice keeps its centreline up to there.
    A line one pixel wide is its own skeleton and so is one of two; of 2 r + 1 pixels only the middle is left, after r
    erosions: with fewer iterations a wider line has no skeleton but its ends.

    Args:
        maps: (B, C, H, W) in [0, 1], each map on its own.
        iterations: erosions, at least the radius of the widest structure in pixels.

    Returns:
        (B, C, H, W), nowhere above `maps`; NaN around a NaN.
    """
    eroded = _erode(maps)
    skeleton = F.relu(maps - _dilate(eroded))
    for _ in range(iterations):
        maps, eroded = eroded, _erode(eroded)
        ridge = F.relu(maps - _dilate(eroded))
        skeleton = skeleton + (1 - skeleton) * ridge  # the union of two fuzzy sets
    return skeleton


def _erode(maps: Tensor) -> Tensor:
    down = -F.max_pool2d(-maps, (3, 1), 1, (1, 0))  # padded with what no minimum takes
    across = -F.max_pool2d(-maps, (1, 3), 1, (0, 1))
    return torch.minimum(down, across)


def _dilate(maps: Tensor) -> Tensor:
    return F.max_pool2d(maps, 3, 1, 1)
