"""E, the shared encoder: a target-style image -> features for the segmenters and the decoder.

Knows its own layers (a dilated ResNet of stride 8); must not know what is read from its features. It only ever sees
target-style images: x_t and x_st.
"""

from __future__ import annotations

import typing
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.config import BatchStatistics, EncoderNorm, HeadStride
from equipoise.nets.layers import Conv, Dropout, Residual, Unit, check_size, scaled
from equipoise.nets.norms import Domain, encoder_norm

SIGMA = 0.01


class Features(NamedTuple):
    """What the encoder sees in an image, at several depths; channels at width 1."""

    high: Tensor
    """Read by C1 and U, (B, 512, H/8, W/8)."""

    low: Tensor
    """Read by C2, of the same shape: the tap before the dilated units."""

    fine: tuple[Tensor, ...] = ()
    """Read by C1 where its head is finer than 8: (B, 64, H/4, W/4), then (B, 32, H/2, W/2) for a head of stride 2."""


class Encoder(nn.Module):
    """Encode target-style images.

    | symbol | attribute | maps                                                                        |
    |--------|-----------|-----------------------------------------------------------------------------|
    | E_low  | stages    | image -> features.low: twelve residual units at strides 1, 2, 4 and 8        |
    |        | head      | features.low -> features.high: dilated by 2, then plain                      |
    | E      | self      | x_t, x_st -> Features                                                        |

    No convolution has a bias. The reference counts 2048 more parameters: biases of the dilated layers, never added.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        width: float = 1.0,
        norm: EncoderNorm = "batch",
        statistics: BatchStatistics = "running",
        dropout: float = 0.0,
        head_stride: HeadStride = 8,
    ) -> None:
        """`dropout` follows each convolution, in training; `head_stride` says which finer maps are handed out."""
        super().__init__()
        self.finer = {8: 0, 4: 1, 2: 2}[head_stride]
        norms = encoder_norm(norm, statistics)
        c16, c32, c64, c128, c256, c512 = (scaled(c, width) for c in (16, 32, 64, 128, 256, 512))

        def drop() -> Dropout | None:
            return Dropout(dropout) if dropout else None

        def unit(inputs: int, outputs: int, kernel: int) -> Unit:
            return Unit(Conv(inputs, outputs, kernel, sigma=SIGMA), norms(outputs), dropout=drop())

        def residual(inputs: int, outputs: int, dilation: int = 1) -> Residual:
            return Residual(inputs, outputs, norms, sigma=SIGMA, dilation=dilation, dropout=drop())

        stages = (
            (unit(channels, c16, 7), residual(c16, c16)),  # (B, 16, H, W)
            (residual(c16, c32),),  # (B, 32, H/2, W/2)
            (residual(c32, c64), residual(c64, c64)),  # (B, 64, H/4, W/4)
            (
                *(residual(c64, c128), residual(c128, c128)),  # (B, 128, H/8, W/8)
                *(residual(c128, c256), *(residual(c256, c256) for _ in range(3))),  # (B, 256, H/8, W/8)
                *(residual(c256, c512), residual(c512, c512)),  # (B, 512, H/8, W/8)
            ),
        )
        self.stages = nn.ModuleList(nn.ModuleList(stage) for stage in stages)
        dilated = (residual(c512, c512, dilation=2), residual(c512, c512, dilation=2))
        self.head = nn.ModuleList((*dilated, unit(c512, c512, 3), unit(c512, c512, 3)))

    def forward(self, image: Tensor, domain: Domain = "target") -> Features:
        """(B, channels, H, W) -> features at H/8 x W/8, and finer ones if they are read.

        `domain` says whose running statistics a batch norm per domain follows and uses; other norms ignore it.

        Raises:
            ValueError: H or W is not a multiple of 8, or `domain` is neither "translated" nor "target".
        """
        check_size(image)
        if domain not in typing.get_args(Domain):
            raise ValueError(f"domain {domain!r} must be one of {', '.join(map(repr, typing.get_args(Domain)))}")
        x, maps = image, list[Tensor]()
        for stage in self.stages:
            x = F.max_pool2d(x, 2) if maps else x
            x = _through(stage, x, domain)
            maps.append(x)
        finer = (maps[2], maps[1])[: self.finer]
        return Features(high=_through(self.head, x, domain), low=x, fine=finer)


def _through(units: nn.Module, x: Tensor, domain: Domain) -> Tensor:
    for unit in units.children():
        x = unit(x, domain)
    return x
