"""What data-parallel processes must agree on: gradients, batch-level sums, signals, running statistics.

Knows torch.distributed collectives; knows nothing of Ray or of what is trained.

Why not `DistributedDataParallel`: its reducer serves one backward per forward. SIFA takes several gradients of one
shared graph, with respect to different networks and with different weights, so the mean over ranks is taken here,
explicitly and once for all players that move together: the same mean, one flat all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks:
    """The group of processes that train one run; a group of one needs no torch.distributed."""

    def __init__(self, *, alone: bool = False) -> None:
        """Take this process's place in its group, if there is one and it is not to be left `alone`."""
        joined = not alone and dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if joined else 0
        self.world: int = dist.get_world_size() if joined else 1

    def total(self, x: Tensor) -> Tensor:
        """Sum over ranks, in the forward pass and in the backward pass, on all ranks alike.

        A loss by such sums then has the gradient of the joined batch once gradients are averaged over the ranks.
        """
        if self.world == 1:
            return x
        summed: Tensor = _Total.apply(x)  # type: ignore[no-untyped-call]
        return summed

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean over ranks of each tensor, in one exchange."""
        if self.world == 1:
            return list(tensors)
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        parts = (flat / self.world).split([t.numel() for t in tensors])
        return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]

    def share_weights(self, net: nn.Module) -> None:
        """Give every rank the weights and buffers of rank 0."""
        if self.world > 1:
            for tensor in _tensors(net):
                dist.broadcast(tensor.detach(), src=0)

    def average_buffers(self, net: nn.Module) -> None:
        """Give every rank the mean of all running statistics; between calls each rank follows its own batches."""
        if self.world > 1:
            buffers = [b for b in net.buffers() if b.is_floating_point()]
            for buffer, mean in zip(buffers, self.average(buffers), strict=True):
                buffer.copy_(mean)

    def tell(self, values: Mapping[str, float]) -> dict[str, float]:
        """Give every rank the values of rank 0."""
        told = [dict(values)]
        if self.world > 1:
            dist.broadcast_object_list(told, src=0)
        return told[0]

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world > 1:
            dist.barrier()


class _Total(torch.autograd.Function):
    """y = sum of all ranks' x; so the gradient of x is the sum of all ranks' gradients of y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        summed = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed: Tensor = _Total.apply(gradients[0])  # type: ignore[no-untyped-call]  # itself differentiable
        return summed


def _tensors(net: nn.Module) -> Iterable[Tensor]:
    yield from net.parameters()
    yield from net.buffers()
