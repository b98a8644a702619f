"""D, the critics: an image or a segmentation -> patch by patch, how real it looks.

Knows its own layers (a PatchGAN whose patches are 70 pixels wide); must not know which game is played with its logits
or which of the four critics it is.
"""

from __future__ import annotations

from torch import Tensor, nn

from equipoise.config import ImageNorm
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

    No convolution has a bias, unless told; the first and the last have no norm.
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
    ) -> None:
        """`stack` is the number of slices in an image, `inputs` unless told; its `inputs` middle ones are judged."""
        super().__init__()
        self.first, self.inputs = ((stack or inputs) - inputs) // 2, inputs
        norms = image_norm(norm)
        c64, c128, c256, c512 = (scaled(c, width) for c in (64, 128, 256, 512))

        def conv(inputs: int, outputs: int, *, stride: int) -> Conv:
            return Conv(inputs, outputs, 4, sigma=SIGMA, stride=stride, padding=2, bias=bias)

        self.body = nn.Sequential(  # sides at 256 x 256, and at 64 x 64
            Unit(conv(inputs, c64, stride=2), None, slope=SLOPE),  # 129, 33
            Unit(conv(c64, c128, stride=2), norms(c128), slope=SLOPE),  # 65, 17
            Unit(conv(c128, c256, stride=2), norms(c256), slope=SLOPE),  # 33, 9
            Unit(conv(c256, c512, stride=1), norms(c512), slope=SLOPE),  # 34, 10
            conv(c512, outputs, stride=1),  # 35, 11
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs or stack, H, W) -> (B, outputs, H/8 + 3, W/8 + 3), unbounded logits: no sigmoid."""
        logits: Tensor = self.body(x[:, self.first : self.first + self.inputs] if self.first else x)
        return logits
