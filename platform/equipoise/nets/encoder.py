"""E, the shared encoder: a target-style image -> features for the segmenters and the decoder.

Knows its own layers (a dilated ResNet of stride 8); must not know what is read from its features. It only ever sees
target-style images: x_t and x_st.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from equipoise.nets.layers import BatchNorm, Conv, Residual, check_size, scaled, unit

SIGMA = 0.01


class Features(NamedTuple):
    """What the encoder sees in an image, at two depths; both (B, 512, H/8, W/8) at width 1."""

    high: Tensor
    """Read by C1 and U."""

    low: Tensor
    """Read by C2: the tap before the dilated units."""


class Encoder(nn.Module):
    """Encode target-style images.

    | symbol | attribute | maps                                                    |
    |--------|-----------|---------------------------------------------------------|
    | E_low  | trunk     | image -> features.low: twelve residual units, stride 8  |
    |        | head      | features.low -> features.high: dilated by 2, then plain |
    | E      | self      | x_t, x_st -> Features                                   |

    No convolution has a bias. The reference counts 2048 more parameters: biases of the dilated layers, never added.
    """

    def __init__(self, *, channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        c16, c32, c64, c128, c256, c512 = (scaled(c, width) for c in (16, 32, 64, 128, 256, 512))
        self.trunk = nn.Sequential(
            *_unit(channels, c16, 7),
            _residual(c16, c16),  # (B, 16, H, W)
            nn.MaxPool2d(2),
            _residual(c16, c32),  # (B, 32, H/2, W/2)
            nn.MaxPool2d(2),
            _residual(c32, c64),  # (B, 64, H/4, W/4)
            _residual(c64, c64),
            nn.MaxPool2d(2),
            _residual(c64, c128),  # (B, 128, H/8, W/8)
            _residual(c128, c128),
            _residual(c128, c256),  # (B, 256, H/8, W/8)
            *(_residual(c256, c256) for _ in range(3)),
            _residual(c256, c512),  # (B, 512, H/8, W/8)
            _residual(c512, c512),
        )
        self.head = nn.Sequential(
            _residual(c512, c512, dilation=2),
            _residual(c512, c512, dilation=2),
            *_unit(c512, c512, 3),
            *_unit(c512, c512, 3),
        )

    def forward(self, image: Tensor) -> Features:
        """(B, channels, H, W) -> features at H/8 x W/8.

        Raises:
            ValueError: H or W is not a multiple of 8.
        """
        check_size(image)
        low: Tensor = self.trunk(image)
        return Features(high=self.head(low), low=low)


def _residual(inputs: int, outputs: int, dilation: int = 1) -> Residual:
    return Residual(inputs, outputs, BatchNorm, sigma=SIGMA, dilation=dilation)


def _unit(inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, ...]:
    return unit(Conv(inputs, outputs, kernel, sigma=SIGMA), BatchNorm(outputs))
