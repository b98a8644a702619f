"""Units that the networks share: convolutions, norms, dropout, the residual unit.

Knows how the reference's TensorFlow layers pad, normalise and start; must not know which network uses them or what for.
Feature maps are (batch, channel, y, x).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

DIVISOR = 8
"""Both sides of every image must be a multiple of this: the encoder halves them three times and nothing pads."""


def scaled(channels: int, width: float) -> int:
    """Scale a hidden channel count of the published network by `width`; never below 2."""
    return max(2, round(channels * width))


def check_size(image: Tensor) -> None:
    """Refuse an image whose sides the encoder cannot halve three times.

    Raises:
        ValueError: height or width is not a positive multiple of 8.
    """
    for name, side in zip(("height", "width"), image.shape[-2:], strict=True):
        if side < DIVISOR or side % DIVISOR:
            right = max(DIVISOR, math.ceil(side / DIVISOR) * DIVISOR)
            raise ValueError(f"image {name} {side} must be divisible by {DIVISOR}; crop or pad it, say to {right}")


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one side under TensorFlow's "SAME" rule: the output has ceil(side / stride) entries.

    An odd zero goes to the end, so a stride-2 kernel of 3 pads an even side at the bottom or right only. PyTorch's
    `padding=1` would put it at the top or left and shift every later feature by a pixel against the reference.
    """
    total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


def initialise(conv: nn.Conv2d | nn.ConvTranspose2d, sigma: float) -> None:
    """Set the reference's initial values: normal weights redrawn beyond two sigma, zero biases.

    As in TensorFlow, `sigma` is that of the normal before it is cut: the weights' own deviation is 0.88 sigma.
    """
    nn.init.trunc_normal_(conv.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class Conv(nn.Conv2d):
    """Convolution over zero padding, "SAME" as in TensorFlow unless `padding` says how many zeros each side gets."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        sigma: float,
        bias: bool = False,
        stride: int = 1,
        dilation: int = 1,
        padding: int | None = None,
    ) -> None:
        self.sigma = sigma  # before the base class, whose constructor calls `reset_parameters`
        self.pads_at_end = padding is None and stride > 1
        if padding is None:
            padding = 0 if stride > 1 else dilation * (kernel - 1) // 2
        super().__init__(inputs, outputs, kernel, stride=stride, dilation=dilation, padding=padding, bias=bias)

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        initialise(self, self.sigma)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, y, x) -> (B, outputs, ceil(y / stride), ceil(x / stride)) under "SAME"."""
        if self.pads_at_end:
            (kernel, _), (stride, _) = self.kernel_size, self.stride
            x = F.pad(x, (*same_padding(x.shape[3], kernel, stride), *same_padding(x.shape[2], kernel, stride)))
        return super().forward(x)


class Upsample(nn.ConvTranspose2d):
    """Transposed 3x3 convolution of stride 2, with bias: the adjoint of `Conv(..., 3, stride=2)`; hence the crop."""

    def __init__(self, inputs: int, outputs: int, *, sigma: float) -> None:
        self.sigma = sigma
        super().__init__(inputs, outputs, 3, stride=2)

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        initialise(self, self.sigma)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, inputs, y, x) -> (B, outputs, 2 y, 2 x)."""
        full = super().forward(x, output_size)  # (B, outputs, 2 y + 1, 2 x + 1)
        return full[:, :, :-1, :-1]


class InstanceNorm(nn.GroupNorm):
    """Affine instance norm, the same in training and evaluation.

    A group norm of one channel a group is the same function; on CPUs it takes under half of `nn.InstanceNorm2d`'s time.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, eps=1e-6)


class BatchNorm(nn.BatchNorm2d):
    """Affine batch norm as in the reference: decay 0.90, which is PyTorch's momentum 0.1, and a large epsilon."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.1)


def unit(conv: nn.Module, norm: nn.Module) -> tuple[nn.Module, ...]:
    """Follow a convolution by its norm and a ReLU, to be unpacked into a `Sequential`."""
    return conv, norm, nn.ReLU(inplace=True)


class AlwaysDropout(nn.Module):
    """Dropout that ignores `eval()`.

    The reference feeds its decoder a constant keep probability, so x_ts, x_sts and x_tst are noisy at test time too.
    `nn.Dropout` would fall silent there, and the probe's images would come from another decoder than the critic met.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Zero each value with `probability`, from torch's global generator; scale the rest so that the mean stays."""
        return F.dropout(x, self.probability, training=True)

    def extra_repr(self) -> str:
        """Show the probability in `print(net)`."""
        return f"probability={self.probability}"


class Residual(nn.Module):
    """relu(shortcut + norm(conv(relu(norm(conv(x)))))), 3x3 kernels; always-on dropout after each convolution if asked.

    Where the unit adds channels its shortcut is padded with zero channels, equally before and after (an odd one
    after): the reference has no 1x1 projection.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        norm: Callable[[int], nn.Module],
        *,
        sigma: float,
        bias: bool = False,
        dilation: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if outputs < inputs:
            raise ValueError(f"residual unit has {outputs} output channels: must be at least its {inputs} inputs")

        def drop() -> list[nn.Module]:
            return [AlwaysDropout(dropout)] if dropout else []

        self.body = nn.Sequential(
            *(Conv(inputs, outputs, 3, sigma=sigma, bias=bias, dilation=dilation), *drop(), norm(outputs)),
            nn.ReLU(inplace=True),
            *(Conv(outputs, outputs, 3, sigma=sigma, bias=bias, dilation=dilation), *drop(), norm(outputs)),
        )
        extra = outputs - inputs
        self.zeros = (extra // 2, extra - extra // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, y, x) -> (B, outputs, y, x)."""
        out: Tensor = self.body(x)
        shortcut = F.pad(x, (0, 0, 0, 0, *self.zeros)) if any(self.zeros) else x
        return F.relu_(out + shortcut)
