"""G, the generator: a source image -> the same anatomy in the target's style.

Knows its own layers (a nine-block ResNet); must not know the critic that judges it or where images come from.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equipoise.config import ImageNorm
from equipoise.nets.layers import Conv, Residual, ToMap, Unit, Upsample, check_size, scaled
from equipoise.nets.norms import image_norm

SIGMA = 0.02


class Generator(nn.Module):
    """Translate source images into the target's style.

    | symbol | attribute | maps                                                 |
    |--------|-----------|------------------------------------------------------|
    |        | body      | image -> one map of what to add, at the image's size |
    | G      | self      | x_s -> x_st; x_ts -> x_tst                           |

    With `skip` the output is tanh(image + body), so a fresh network is close to tanh of its input; else tanh(body).
    Every convolution has a bias, though those before an instance norm change nothing: so has the reference.
    """

    def __init__(
        self, *, channels: int = 1, width: float = 1.0, skip: bool = True, norm: ImageNorm = "instance"
    ) -> None:
        super().__init__()
        self.skip, norms = skip, image_norm(norm)
        c32, c64, c128 = (scaled(c, width) for c in (32, 64, 128))
        self.body = nn.Sequential(
            Unit(Conv(channels, c32, 7, sigma=SIGMA, bias=True), norms(c32)),  # (B, 32, H, W)
            Unit(Conv(c32, c64, 3, sigma=SIGMA, bias=True, stride=2), norms(c64)),  # (B, 64, H/2, W/2)
            Unit(Conv(c64, c128, 3, sigma=SIGMA, bias=True, stride=2), norms(c128)),  # (B, 128, H/4, W/4)
            *(Residual(c128, c128, norms, sigma=SIGMA, bias=True) for _ in range(9)),
            Unit(Upsample(c128, c64, sigma=SIGMA), norms(c64)),  # (B, 64, H/2, W/2)
            Unit(Upsample(c64, c32, sigma=SIGMA), norms(c32)),  # (B, 32, H, W)
            ToMap(c32, 7, sigma=SIGMA, bias=True),  # (B, 1, H, W)
        )

    def forward(self, image: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape, in (-1, 1), float32 under autocast too.

        The one output map serves all channels of a stack of neighbouring slices.

        Raises:
            ValueError: H or W is not a multiple of 8.
        """
        check_size(image)
        out: Tensor = self.body(image).to(image.dtype)  # (B, 1, H, W)
        return torch.tanh(image + out) if self.skip else torch.tanh(out).expand_as(image)
