"""Norms that the networks share: instance, group and batch norm, the ways in which a port can get them wrong, and the
spectral norm of kernels.

Knows how features and kernels are normalised, in any memory format and precision; must not know which network does it.
Feature maps are (batch, channel, y, x). Statistics are taken in float32 at least; the result has the input's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from equipoise.config import BatchStatistics, EncoderNorm, ImageNorm

Domain = Literal["translated", "target"]
"""Whose images the encoder sees: translated source images, or target images."""

Maker = Callable[[int], nn.Module | None]
"""Makes the norm of so many channels, or none."""

GROUP = 16
"""Most channels in a group of the encoder's group norm."""


def encoder_norm(name: EncoderNorm, statistics: BatchStatistics = "running") -> Maker:
    """What `net.encoder_norm` and `net.batch_statistics` name."""
    makers: dict[EncoderNorm, Maker] = {
        "batch": lambda channels: BatchNorm(channels, statistics=statistics),
        "batch_per_domain": lambda channels: BatchNorm(channels, statistics=statistics, per_domain=True),
        "instance": InstanceNorm,
        "group": GroupNorm,
    }
    return makers[name]


def image_norm(name: ImageNorm) -> Maker:
    """What `net.image_norm` names."""
    makers: dict[ImageNorm, Maker] = {"instance": InstanceNorm, "none": lambda channels: None}
    return makers[name]


def is_channels_last(x: Tensor) -> bool:
    """Whether a map's channels lie together in memory, and not only because it has one channel or one pixel."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class GroupNorm(nn.Module):
    """Affine norm over an image's pixels and a group of its channels, the same in training and evaluation.

    A group has as many channels as divide the map's evenly, `most` at the utmost.
    """

    def __init__(self, channels: int, most: int = GROUP) -> None:
        super().__init__()
        self.size = max(n for n in range(1, most + 1) if channels % n == 0)
        self.groups = channels // self.size
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, domain: Domain = "target") -> Tensor:
        """Normalise, scale and shift; `domain` changes nothing."""
        if torch.compiler.is_compiling():  # fuses what is spelt out, in any format
            return self._spelt_out(x)
        widens = x.is_cuda and x.dtype.itemsize < 4  # CUDA's autocast turns this one norm to float32
        if not is_channels_last(x) and not widens:
            return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        return self._spelt_out(x) if self.size > 1 else self._by_batch_norm(x)

    def _by_batch_norm(self, x: Tensor) -> Tensor:
        """The batch norm of one image is its instance norm; it keeps type and format.

        In channels-last torch's group norm of one channel a group goes back one value at a time on CPUs, many times
        slower, and leaves the format on CUDA.
        """
        batch, channels = x.shape[:2]
        if is_channels_last(x):
            parts = [F.batch_norm(y, None, None, self.weight, self.bias, True, 0.0, self.eps) for y in x.split(1)]
            return torch.cat(parts)
        weight, bias = self.weight.repeat(batch), self.bias.repeat(batch)  # all images' channels side by side
        wide = x.reshape(1, batch * channels, *x.shape[2:])
        return F.batch_norm(wide, None, None, weight, bias, True, 0.0, self.eps).view(x.shape)

    def _spelt_out(self, x: Tensor) -> Tensor:
        grouped = _widened(x).unflatten(1, (self.groups, self.size))
        var, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0, keepdim=True)
        normal = ((grouped - mean) * torch.rsqrt(var + self.eps)).flatten(1, 2)
        out: Tensor = normal * _column(self.weight) + _column(self.bias)
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """Show the groups in `print(net)`."""
        return f"{self.groups} x {self.size}, eps={self.eps}"


class InstanceNorm(GroupNorm):
    """Affine instance norm: a group norm of one channel a group."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, most=1)


def _alone(x: Tensor) -> Tensor:
    """The sum over all workers where there is one."""
    return x


class BatchNorm(nn.Module):
    """Affine batch norm as in the reference: decay 0.90, which is PyTorch's momentum 0.1, and a large epsilon.

    | `statistics` | in training         | moves the running ones | in evaluation                |
    |--------------|---------------------|------------------------|------------------------------|
    | running      | the batch's own     | yes                    | the running ones             |
    | stale        | the batch's own     | no                     | means of 0 and variances of 1 |
    | fixed        | means 0, variances 1 | no                     | the same                     |

    The last two are what becomes of ports from TensorFlow that forget its update operations, or its training flag.
    With `per_domain` translated images have running statistics of their own; scale and shift stay shared.
    """

    running_mean: Tensor
    running_var: Tensor
    translated_mean: Tensor
    translated_var: Tensor

    def __init__(self, channels: int, *, statistics: BatchStatistics = "running", per_domain: bool = False) -> None:
        super().__init__()
        self.statistics, self.per_domain = statistics, per_domain
        self.eps, self.momentum = 1e-3, 0.1
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        for name in ("running", "translated") if per_domain else ("running",):
            self.register_buffer(f"{name}_mean", torch.zeros(channels))
            self.register_buffer(f"{name}_var", torch.ones(channels))
        self.total: Callable[[Tensor], Tensor] = _alone
        """Sums over all workers, here and, on the way back, gradients too; see `Sifa.join_statistics`."""

    def forward(self, x: Tensor, domain: Domain = "target") -> Tensor:
        """Normalise by the batch's or by the running statistics of `domain`; then scale and shift.

        Raises:
            ValueError: in training, there is one value a channel.
        """
        mean, var = self.running_mean, self.running_var
        if self.per_domain and domain == "translated":
            mean, var = self.translated_mean, self.translated_var
        own = self.training and self.statistics != "fixed"
        if own and self.total is not _alone:
            return self._over_workers(x, mean, var)
        if own and self.statistics == "stale":
            return F.batch_norm(x, None, None, self.weight, self.bias, True, self.momentum, self.eps)
        return F.batch_norm(x, mean, var, self.weight, self.bias, own, self.momentum, self.eps)

    def _over_workers(self, x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        """Normalise by the statistics of all workers' slices together."""
        wide = _widened(x)
        count, mean, var = self._moments(wide)
        if self.statistics == "running":
            with torch.no_grad():
                running_mean.lerp_(mean, self.momentum)
                running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = torch.rsqrt(var + self.eps) * self.weight
        return ((wide - _column(mean)) * _column(scale) + _column(self.bias)).to(x.dtype)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Over all workers, in one exchange: values a channel, each channel's mean, and its variance.

        In float64, so that the variance, a difference of two large numbers, keeps what float32 knew of it.
        """
        count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
        var, mean = (m.double() for m in torch.var_mean(x, dim=(0, 2, 3), correction=0))
        sums = self.total(torch.cat([count, count * mean, count * (var + mean * mean)]))
        count, mean, square = sums[:1], *(sums[1:] / sums[0]).chunk(2)
        return count.to(x.dtype), mean.to(x.dtype), (square - mean * mean).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the settings in `print(net)`."""
        return f"{self.weight.numel()}, statistics={self.statistics}, per_domain={self.per_domain}"


class SpectralNorm(nn.Module):
    """Divide a kernel by its largest singular value, as a matrix of one row an output (Miyato et al., ICLR 2018).

    That value is estimated from a pair of vectors which every use of the kernel in training turns once towards the
    singular ones; use in evaluation leaves them. They follow the weights alone, so all workers hold the same pair.
    PyTorch's own does the same, but under CUDA's autocast it estimates in half precision: sigma then moves by jumps.
    """

    STARTS = 15
    """Turns at the start, as in PyTorch's."""

    left: Tensor
    right: Tensor

    def __init__(self, weight: Tensor) -> None:
        """Draw the vectors for a kernel (outputs, ...) from torch's global generator."""
        super().__init__()
        matrix = weight.detach().flatten(1)
        for name, side in (("left", 0), ("right", 1)):
            self.register_buffer(name, F.normalize(matrix.new_empty(matrix.shape[side]).normal_(), dim=0))
        for _ in range(self.STARTS):
            self._turn(matrix)

    def forward(self, weight: Tensor) -> Tensor:
        """The kernel over its largest singular value; twice differentiable, in the kernel's own precision."""
        matrix = weight.flatten(1)
        if self.training:
            self._turn(matrix)
        # A copy, since a later use turns the vectors in place before this one's gradients are asked for. And products
        # spelt out, as well as `out` below: autocast leaves both alone.
        direction = self.left.unsqueeze(1) * self.right
        return weight / (matrix * direction).sum()

    @torch.no_grad()
    def _turn(self, matrix: Tensor) -> None:
        for turned, kernel, other in ((self.left, matrix, self.right), (self.right, matrix.t(), self.left)):
            torch.mv(kernel, other, out=turned)
            F.normalize(turned, dim=0, out=turned)


def hold_spectrally(net: nn.Module) -> None:
    """Put all convolutions of `net` under spectral norm; its parameters stay the same objects.

    In the state they move to `...parametrizations.weight.original`. Afterwards an initialiser no longer reaches them.
    """
    for conv in [module for module in net.modules() if isinstance(module, nn.Conv2d)]:
        register_parametrization(conv, "weight", SpectralNorm(conv.weight))


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _column(values: Tensor) -> Tensor:
    """One value a channel, to be broadcast over a map."""
    return values.view(-1, 1, 1)
