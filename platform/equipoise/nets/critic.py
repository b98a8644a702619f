"""D, the critics: an image or a segmentation -> patch by patch, how real it looks.

Knows its own layers (a PatchGAN whose patches are 70 pixels wide, or 34); must not know which game is played with its
logits, what holds it back or which of the four critics it is.
"""

from __future__ import annotations

from torch import Tensor, nn

from equipoise.config import CriticLayers, ImageNorm
from equipoise.nets.layers import Conv, Unit, scaled
from equipoise.nets.norms import image_norm

SIGMA = 0.02
SLOPE = 0.2  # of the leaky ReLU


class Critic(nn.Module):
    """Tell real from fake.

    | symbol     | attribute | maps                                                               |
    |------------|-----------|--------------------------------------------------------------------|
    | D_t        | self      | target-style image -> 1 map of logits                              |
    | D_s        | self      | source-style image -> 2 maps: real or fake, and the auxiliary game |
    | D_p1, D_p2 | self      | raw logits of C1 or C2 at full size -> 1 map                       |

    No convolution has a bias, unless told; the first and the last have no norm. A critic with two halvings lacks the
    unit that halves a third time, and all channels after it are half as many.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int = 1,
        *,
        width: float = 1.0,
        stack: int | None = None,
        norm: ImageNorm = "instance",
        bias: bool = False,
        layers: CriticLayers = 3,
        channels: int = 64,
    ) -> None:
        """`stack` is the number of slices in an image, `inputs` unless told; its `inputs` middle ones are judged."""
        super().__init__()
        self.first, self.inputs = ((stack or inputs) - inputs) // 2, inputs
        norms = image_norm(norm)
        widths = [scaled(channels * 2**n, width) for n in range(layers + 1)]  # 64, 128, 256, 512

        def conv(inputs: int, outputs: int, *, stride: int) -> Conv:
            return Conv(inputs, outputs, 4, sigma=SIGMA, stride=stride, padding=2, bias=bias)

        # Sides of 256 become 129, 65, 33, 34, 35; with two halvings 129, 65, 66, 67.
        units = [Unit(conv(inputs, widths[0], stride=2), None, slope=SLOPE)]
        for n in range(1, layers + 1):
            between = conv(widths[n - 1], widths[n], stride=2 if n < layers else 1)
            units.append(Unit(between, norms(widths[n]), slope=SLOPE))
        self.body = nn.Sequential(*units, conv(widths[layers], outputs, stride=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs or stack, H, W) -> (B, outputs, H/8 + 3, W/8 + 3), unbounded logits: no sigmoid.

        With two halvings H/4 + 3 and W/4 + 3.
        """
        logits: Tensor = self.body(x[:, self.first : self.first + self.inputs] if self.first else x)
        return logits
