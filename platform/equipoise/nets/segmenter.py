"""C1 and C2, the segmenters: the encoder's features -> a class for every pixel.

Knows its own layers; must not know the loss. It gives logits: softmax belongs to the losses, and the critics of
segmentations see logits.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.config import HeadStride
from equipoise.nets.encoder import Features
from equipoise.nets.layers import Conv, Unit, scaled
from equipoise.nets.norms import GroupNorm

SIGMA = 0.01

Tap = Literal["high", "low"]
"""Which of the encoder's depths is read."""


class Segmenter(nn.Module):
    """Classify every pixel.

    | symbol | attribute | maps                                                                              |
    |--------|-----------|-----------------------------------------------------------------------------------|
    |        | refine    | one unit for each halving of the stride: coarser features, the encoder's finer map |
    |        | classify  | features -> logits at the head's stride                                           |
    | C1, C2 | self      | Features.high (C1) or .low (C2) -> logits at H x W                                 |

    At stride 8, the published one, there is nothing to refine; bilinear growth from cells of 8 x 8 pixels then draws no
    structure of 2 pixels, however good the features; at strides 4 and 2 it can (`tests/equipoise/test_nets.py`).
    """

    def __init__(self, *, classes: int = 2, width: float = 1.0, head_stride: HeadStride = 8, tap: Tap = "high") -> None:
        super().__init__()
        self.tap = tap
        c32, c64, c512 = (scaled(c, width) for c in (32, 64, 512))
        channels = {8: (c512,), 4: (c512, c64), 2: (c512, c64, c32)}[head_stride]
        self.refine = nn.ModuleList(Refine(coarse, fine) for coarse, fine in itertools.pairwise(channels))
        self.classify = Conv(channels[-1], classes, 1, sigma=SIGMA)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features and (H, W) -> logits (B, classes, H, W), bilinear between the centres of the head's cells.

        Float32 under autocast too.

        Raises:
            ValueError: the encoder was not built for a head this fine.
        """
        x = features.high if self.tap == "high" else features.low
        for refine, fine in zip(self.refine, features.fine[: len(self.refine)], strict=True):
            x = refine(x, fine)
        logits: Tensor = self.classify(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


class Refine(nn.Module):
    """Features at half the stride: projected, grown, and joined to the encoder's map there.

    Group norm, because the domain of the features is not told here, and instance norm would forget how much of an
    image is structure. Leaky ReLU, because background drives a plain one dead where the rare structures are: a head and
    its features, fitted to a line of 4 % of the pixels, then find nothing of it, and all of it with a leak.
    """

    def __init__(self, coarse: int, fine: int) -> None:
        super().__init__()
        self.project = Conv(coarse, fine, 1, sigma=SIGMA)
        self.merge = Unit(Conv(2 * fine, fine, 3, sigma=SIGMA), GroupNorm(fine), slope=0.2)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """(B, coarse, y, x) and (B, fine, 2 y, 2 x) -> (B, fine, 2 y, 2 x)."""
        grown = F.interpolate(self.project(coarse), scale_factor=2, mode="bilinear", align_corners=False)
        out: Tensor = self.merge(torch.cat([grown, fine], dim=1))
        return out
