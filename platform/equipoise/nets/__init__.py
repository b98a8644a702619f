"""The networks of SIFA v2 (Chen et al., IEEE TMI 2020), one a file, and `Sifa`, which owns one of each.

Knows which networks there are and what each is built with; must not know how they are trained.
"""

from __future__ import annotations

from torch import Tensor, nn

from equipoise.nets.critic import Critic
from equipoise.nets.decoder import Decoder
from equipoise.nets.encoder import Encoder, Features
from equipoise.nets.generator import Generator
from equipoise.nets.segmenter import Segmenter

__all__ = ["Critic", "Decoder", "Encoder", "Features", "Generator", "Segmenter", "Sifa"]


class Sifa(nn.Module):
    """All networks of a run; s is the source (labelled), t the target.

    | symbol | attribute     | maps                                                              |
    |--------|---------------|-------------------------------------------------------------------|
    | G      | generator     | x_s -> x_st; x_ts -> x_tst                                         |
    | E      | encoder       | x_t, x_st -> Features(high, low)                                   |
    | U      | decoder       | E(x_t).high, x_t -> x_ts; E(x_st).high, x_st -> x_sts              |
    | C1     | segmenter     | Features.high, (H, W) -> logits                                    |
    | C2     | segmenter_low | Features.low, (H, W) -> logits                                     |
    | D_t    | critic_t      | x_t, x_st -> patch logits                                          |
    | D_s    | critic_s      | x_s, x_ts, x_sts -> patch logits: [:, :1] source or translated, [:, 1:] auxiliary |
    | D_p1   | critic_p      | logits of C1 -> patch logits                                       |
    | D_p2   | critic_p_low  | logits of C2 -> patch logits                                       |

    Images are (B, channels, H, W) in [-1, 1]. Three channels are neighbouring slices: G and U add one map to all of
    them, and D_t and D_s judge the middle one.
    """

    def __init__(self, *, classes: int = 2, channels: int = 1, width: float = 1.0, skip: bool = True) -> None:
        """Draw initial weights from torch's global generator.

        Args:
            classes: classes of the segmenters, background included.
            channels: slices in an image, an odd number.
            width: factor on every hidden channel count; 1 is the published network.
            skip: whether G and U add their input image before the last tanh.

        Raises:
            ValueError: fewer than two classes, an even number of channels, or a width that is not positive.
        """
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes {classes} must be at least 2: background and one structure")
        if channels < 1 or channels % 2 == 0:
            raise ValueError(f"channels {channels} must be odd: critics judge the middle slice; 1 or 3, for example")
        if not width > 0:
            raise ValueError(f"width {width} must be positive; 1 is the published network")
        self.generator = Generator(channels=channels, width=width, skip=skip)
        self.encoder = Encoder(channels=channels, width=width)
        self.decoder = Decoder(width=width, skip=skip)
        self.segmenter = Segmenter(classes=classes, width=width)
        self.segmenter_low = Segmenter(classes=classes, width=width)
        self.critic_t = Critic(1, 1, width=width, stack=channels)
        self.critic_s = Critic(1, 2, width=width, stack=channels)
        self.critic_p = Critic(classes, 1, width=width)
        self.critic_p_low = Critic(classes, 1, width=width)

    def forward(self, image: Tensor) -> Tensor:
        """Inference, C1(E(x_t)): target images (B, channels, H, W) -> logits (B, classes, H, W)."""
        features: Features = self.encoder(image)
        height, width = image.shape[-2:]
        logits: Tensor = self.segmenter(features.high, (height, width))
        return logits
