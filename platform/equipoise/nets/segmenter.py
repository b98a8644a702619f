"""C1 and C2, the segmenters: the encoder's features -> a class for every pixel.

Knows its one layer; must not know the loss. It gives logits: softmax belongs to the losses, and the critics of
segmentations see logits.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.nets.layers import Conv, scaled


class Segmenter(nn.Module):
    """Classify every pixel.

    | symbol | attribute | maps                                               |
    |--------|-----------|----------------------------------------------------|
    |        | classify  | features -> logits at H/8 x W/8                    |
    | C1, C2 | self      | Features.high (C1) or .low (C2) -> logits at H x W |
    """

    def __init__(self, *, classes: int = 2, width: float = 1.0) -> None:
        super().__init__()
        self.classify = Conv(scaled(512, width), classes, 1, sigma=0.01)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, 512, H/8, W/8) and (H, W) -> (B, classes, H, W), bilinear between the centres of the 8 x 8 cells."""
        logits: Tensor = self.classify(features)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
