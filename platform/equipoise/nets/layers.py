"""Units that the networks share: convolutions, dropout, what follows a convolution, the residual unit.

Knows how the reference's TensorFlow layers pad, start and follow one another; must not know which network uses them or
what for. Feature maps are (batch, channel, y, x).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.nets.norms import Domain, Maker, is_channels_last

DIVISOR = 8
"""Both sides of every image must be a multiple of this: the encoder halves them three times and nothing pads."""

MOST_VARIANTS = 256
"""Compiled variants of a tail: shapes, training or evaluation, with or without gradients. Torch's own limit is 8."""


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


def initialise_glorot(net: nn.Module) -> None:
    """Draw all weights of `net`'s convolutions anew, uniform within sqrt(6 / (fan in + fan out)), and zero the biases.

    Glorot and Bengio, AISTATS 2010; the default of Keras.
    """
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(conv.weight)
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


class ToMap(Conv):
    """Wide convolution to a single channel, on sides that 4 divides.

    As it stands this starves matrix units, which want 8 output channels or more. Here every 4 x 4 block of output
    pixels is one pixel of 16 channels, each with the kernel at its own offset: the same sum for each pixel, and
    much quicker on CPUs.
    """

    BLOCK = 4

    def __init__(self, inputs: int, kernel: int, *, sigma: float, bias: bool = False) -> None:
        super().__init__(inputs, 1, kernel, sigma=sigma, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, y, x) -> (B, 1, y, x)."""
        n = self.BLOCK
        offsets = [(row, column) for row in range(n) for column in range(n)]
        kernels = [F.pad(self.weight[0], (c, n - 1 - c, r, n - 1 - r)) for r, c in offsets]
        bias = None if self.bias is None else self.bias.expand(n * n)
        blocks = F.conv2d(x, torch.stack(kernels), bias, stride=n, padding=self.kernel_size[0] // 2)
        return F.pixel_shuffle(blocks, n)


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
        if is_channels_last(x):
            # A row and a column of zeros before the kernel shift the output by a pixel, so that `padding` crops it.
            # The view below has gaps, from which every later layer would make a copy.
            kernel = F.pad(self.weight, (1, 0, 1, 0))
            return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)
        full = super().forward(x, output_size)  # (B, outputs, 2 y + 1, 2 x + 1)
        return full[:, :, :-1, :-1]


class Dropout(nn.Module):
    """Zero each value with `probability`, in training, from torch's global generator; scale the rest up for it."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """The same shape, type and memory format. What is dropped depends on the shape and the random state alone."""
        return self._dropped(x) if self.training else x

    def _dropped(self, x: Tensor) -> Tensor:
        # As `F.dropout` does on a CPU in float32. In channels-last that would drop other values; in bfloat16 it would
        # draw much slower, and round the scale of 4/3 to 1.336.
        keep, wide = 1 - self.probability, torch.promote_types(x.dtype, torch.float32)
        noise = torch.empty(x.shape, dtype=wide, device=x.device).bernoulli_(keep).div_(keep)
        return (x * noise).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the probability in `print(net)`."""
        return f"probability={self.probability}"


class AlwaysDropout(Dropout):
    """Dropout that ignores `eval()`.

    The reference feeds its decoder a constant keep probability, so x_ts, x_sts and x_tst are noisy at test time too.
    Plain dropout would fall silent there, and the probe's images would come from another decoder than the critic met.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As in training, always."""
        return self._dropped(x)


class Tail(nn.Module):
    """What follows a convolution: norm, sum with a shortcut, leaky ReLU; one kernel where it is compiled.

    Convolutions stay outside, so that autograd sees them one by one: the step asks for some of their gradients at a
    time, and the backward of a compiled network would compute all of them each time. So does dropout, which compiled
    code would draw from another stream.
    """

    def __init__(self, norm: nn.Module | None, slope: float = 0.0) -> None:
        super().__init__()
        self.norm, self.slope = norm, slope

    def forward(self, x: Tensor, domain: Domain = "target", shortcut: Tensor | None = None) -> Tensor:
        """Normalise (B, C, y, x), add a shortcut of as many channels or fewer, and rectify; may overwrite `x`.

        A narrower shortcut is padded with zero channels, equally before and after (an odd one after).
        """
        if self.norm is not None:
            x = self.norm(x, domain)
        if shortcut is not None:
            missing = x.shape[1] - shortcut.shape[1]
            x = x + (F.pad(shortcut, (0, 0, 0, 0, missing // 2, missing - missing // 2)) if missing else shortcut)
        return F.leaky_relu_(x, self.slope) if self.slope else F.relu_(x)


def compile_tails(net: nn.Module) -> None:
    """Compile every tail of `net`; each shape is compiled when it is first met. Numbers change by rounding only.

    Needs a C++ compiler.
    """
    import torch._dynamo  # a second of processor time, which others need not spend
    import torch._functorch.config

    # Compiled backwards else overwrite what they saved, and the step goes twice through some of its graph.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = MOST_VARIANTS
    for module in net.modules():
        if isinstance(module, Tail):
            module.compile(dynamic=False)


class Unit(nn.Module):
    """Convolution, dropout if any, norm, activation: the reference's order. `slope` is that of a leaky ReLU."""

    def __init__(
        self, conv: Conv | Upsample, norm: nn.Module | None, *, dropout: Dropout | None = None, slope: float = 0.0
    ) -> None:
        super().__init__()
        self.conv, self.dropout, self.tail = conv, dropout, Tail(norm, slope)

    def forward(self, x: Tensor, domain: Domain = "target", shortcut: Tensor | None = None) -> Tensor:
        """(B, inputs, y, x) -> (B, outputs, y, x) over the convolution's stride; a shortcut is added after the norm."""
        x = self.conv(x)
        if self.dropout is not None:
            x = self.dropout(x)
        out: Tensor = self.tail(x, domain, shortcut)
        return out


class Residual(nn.Module):
    """relu(shortcut + norm(conv(relu(norm(conv(x)))))), 3x3 kernels; dropout after each convolution if asked.

    Where the unit adds channels its shortcut is padded with zero channels: the reference has no 1x1 projection.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        norm: Maker,
        *,
        sigma: float,
        bias: bool = False,
        dilation: int = 1,
        dropout: Dropout | None = None,
    ) -> None:
        super().__init__()
        if outputs < inputs:
            raise ValueError(f"residual unit has {outputs} output channels: must be at least its {inputs} inputs")

        def unit(inputs: int) -> Unit:
            conv = Conv(inputs, outputs, 3, sigma=sigma, bias=bias, dilation=dilation)
            return Unit(conv, norm(outputs), dropout=dropout)

        self.first, self.second = unit(inputs), unit(outputs)

    def forward(self, x: Tensor, domain: Domain = "target") -> Tensor:
        """(B, inputs, y, x) -> (B, outputs, y, x)."""
        out: Tensor = self.second(self.first(x, domain), domain, x)
        return out
