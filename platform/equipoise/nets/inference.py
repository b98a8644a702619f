"""C1(E(x_t)): the two networks that are left of SIFA when it is applied.

Knows what E and C1 are built with; must not know the other networks, or where weights come from.
"""

from __future__ import annotations

from torch import Tensor, nn

from equipoise.config import NetConfig
from equipoise.nets.encoder import Encoder
from equipoise.nets.segmenter import Segmenter


def encoder(config: NetConfig) -> Encoder:
    """E, with fresh weights."""
    return Encoder(
        channels=config.channels,
        width=config.width,
        norm=config.encoder_norm,
        statistics=config.batch_statistics,
        dropout=config.encoder_dropout,
        head_stride=config.head_stride,
    )


def segmenter(config: NetConfig) -> Segmenter:
    """C1, with fresh weights."""
    return Segmenter(classes=config.classes, width=config.width, head_stride=config.head_stride)


class Inference(nn.Module):
    """Segment target images; the names of its weights are those of `Sifa`.

    | symbol | attribute | maps                                |
    |--------|-----------|-------------------------------------|
    | E      | encoder   | x_t -> Features                     |
    | C1     | segmenter | Features, (H, W) -> logits          |
    """

    PARTS = ("encoder", "segmenter")

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.encoder, self.segmenter = encoder(config), segmenter(config)

    def forward(self, image: Tensor) -> Tensor:
        """Target images (B, channels, H, W) in [-1, 1] -> logits (B, classes, H, W); H and W are multiples of 8."""
        logits: Tensor = self.segmenter(self.encoder(image), (image.shape[-2], image.shape[-1]))
        return logits
