"""U, the decoder: the encoder's features -> an image in the source's style.

Knows its own layers; must not know the encoder beyond the shape of its features. Its dropout never stops: see
`layers.AlwaysDropout`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equipoise.nets.layers import Conv, InstanceNorm, Residual, Upsample, scaled, unit

SIGMA = 0.02
SIGMA_RESIDUAL = 0.01
DROPOUT = 0.25  # the reference keeps 0.75


class Decoder(nn.Module):
    """Decode features into source-style images.

    | symbol | attribute | maps                                                         |
    |--------|-----------|--------------------------------------------------------------|
    |        | body      | features.high -> one map of what to add, at 8 times the size |
    | U      | self      | E(x_t).high, x_t -> x_ts; E(x_st).high, x_st -> x_sts        |

    With `skip` the output is tanh(image + body), else tanh(body).
    """

    def __init__(self, *, width: float = 1.0, skip: bool = True) -> None:
        super().__init__()
        self.skip = skip
        c32, c64, c128, c512 = (scaled(c, width) for c in (32, 64, 128, 512))
        self.body = nn.Sequential(
            *unit(Conv(c512, c128, 3, sigma=SIGMA), InstanceNorm(c128)),  # (B, 128, H/8, W/8)
            *(Residual(c128, c128, InstanceNorm, sigma=SIGMA_RESIDUAL, dropout=DROPOUT) for _ in range(4)),
            *unit(Upsample(c128, c64, sigma=SIGMA), InstanceNorm(c64)),  # (B, 64, H/4, W/4)
            *unit(Upsample(c64, c64, sigma=SIGMA), InstanceNorm(c64)),  # (B, 64, H/2, W/2)
            *unit(Upsample(c64, c32, sigma=SIGMA), InstanceNorm(c32)),  # (B, 32, H, W)
            Conv(c32, 1, 7, sigma=SIGMA),  # (B, 1, H, W)
        )

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """Features.high (B, 512, H/8, W/8) and the image it was read from (B, channels, H, W) -> the latter's shape.

        Two calls differ by their dropout, in `eval()` too; fix torch's global seed to repeat one.
        """
        out: Tensor = self.body(features)  # (B, 1, H, W)
        return torch.tanh(image + out) if self.skip else torch.tanh(out).expand_as(image)
