"""U, the decoder: the encoder's features -> an image in the source's style.

Knows its own layers; must not know the encoder beyond the shape of its features. Its dropout never stops, unless told:
see `layers.AlwaysDropout`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equipoise.config import ImageNorm
from equipoise.nets.layers import AlwaysDropout, Conv, Dropout, Residual, ToMap, Unit, Upsample, scaled
from equipoise.nets.norms import image_norm

SIGMA = 0.02
SIGMA_RESIDUAL = 0.01


class Decoder(nn.Module):
    """Decode features into source-style images.

    | symbol | attribute | maps                                                         |
    |--------|-----------|--------------------------------------------------------------|
    |        | body      | features.high -> one map of what to add, at 8 times the size |
    | U      | self      | E(x_t).high, x_t -> x_ts; E(x_st).high, x_st -> x_sts        |

    With `skip` the output is tanh(image + body), else tanh(body).
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        skip: bool = True,
        norm: ImageNorm = "instance",
        dropout: float = 0.25,
        dropout_always: bool = True,
    ) -> None:
        super().__init__()
        self.skip, norms = skip, image_norm(norm)
        c32, c64, c128, c512 = (scaled(c, width) for c in (32, 64, 128, 512))
        kind = AlwaysDropout if dropout_always else Dropout

        def residual() -> Residual:
            return Residual(c128, c128, norms, sigma=SIGMA_RESIDUAL, dropout=kind(dropout) if dropout else None)

        self.body = nn.Sequential(
            Unit(Conv(c512, c128, 3, sigma=SIGMA), norms(c128)),  # (B, 128, H/8, W/8)
            *(residual() for _ in range(4)),
            Unit(Upsample(c128, c64, sigma=SIGMA), norms(c64)),  # (B, 64, H/4, W/4)
            Unit(Upsample(c64, c64, sigma=SIGMA), norms(c64)),  # (B, 64, H/2, W/2)
            Unit(Upsample(c64, c32, sigma=SIGMA), norms(c32)),  # (B, 32, H, W)
            ToMap(c32, 7, sigma=SIGMA),  # (B, 1, H, W)
        )

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """Features.high (B, 512, H/8, W/8) and the image it was read from (B, channels, H, W) -> the latter's shape.

        Float32 under autocast too. Two calls differ by their dropout, in `eval()` too where it acts always; fix torch's
        global seed to repeat one.
        """
        out: Tensor = self.body(features).to(image.dtype)  # (B, 1, H, W)
        return torch.tanh(image + out) if self.skip else torch.tanh(out).expand_as(image)
