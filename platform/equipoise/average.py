"""A running mean of the weights, which is scored beside the weights themselves.

Knows which of a run's tensors have a mean, how it follows them and how it takes their place for a while; must not know
what moves them or what is done with it.

Tarvainen and Valpola, NeurIPS 2017, score such a mean; Yazici et al., ICLR 2019, found it to steady adversarial games.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from equipoise.nets import Critic, Sifa


class Average:
    """Exponential mean of every weight and every floating-point buffer of all networks but the critics.

    After step n the mean m moves towards the weights w by m <- d m + (1 - d) w, d = min(decay, (1 + n) / (10 + n)):
    the start, which is far from anything good, is forgotten soon. Batch norm's running statistics have a mean too, as
    those that go with mean weights are neither the newest nor the first.

    With several workers all have the same weights, so each keeps the same mean. Running statistics differ between them
    where batch norm takes each worker's own (`net.batch_norm_over`); the mean of these is then each worker's own too.
    """

    def __init__(self, net: Sifa, decay: float) -> None:
        """Start at the weights as they are.

        Args:
            net: what is followed; its tensors must stay where they are in memory.
            decay: the share of the mean that stays from step to step, in the long run.

        Raises:
            ValueError: the decay is not between 0 and 1; 0 is no mean, and whoever wants none makes none.
        """
        if not 0 < decay < 1:
            raise ValueError(f"decay {decay} must lie between 0 and 1, both excluded; make no mean where it is 0")
        self.decay = decay
        self._names, self._weights = _followed(net)
        self._means = [x.clone() for x in self._weights]

    @torch.no_grad()
    def follow(self, number: int) -> None:
        """Take in the weights after step `number`, counted from 1; the device is not waited for."""
        decay = min(self.decay, (1 + number) / (10 + number))
        torch._foreach_lerp_(self._means, self._weights, 1 - decay)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let the network hold the mean; afterwards, and after an error too, it holds its weights again, bit for bit.

        Both happen in place. The mean itself does not change, whatever is done to the network meanwhile.
        """
        kept = [x.clone() for x in self._weights]
        _fill(self._weights, self._means)
        try:
            yield
        finally:
            _fill(self._weights, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the mean, by the tensors' names in the network."""
        return {name: mean.clone() for name, mean in zip(self._names, self._means, strict=True)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue exactly where the saved mean was, in place.

        Raises:
            KeyError: the state lacks a tensor.
        """
        _fill(self._means, [state[name] for name in self._names])


def _followed(net: Sifa) -> tuple[list[str], list[Tensor]]:
    """Names and live tensors, without gradient, of what has a mean."""
    found = {
        f"{part}.{name}": x.detach()
        for part, network in net.named_children()
        if not isinstance(network, Critic)
        for name, x in [*network.named_parameters(), *network.named_buffers()]
        if x.is_floating_point()
    }
    return list(found), list(found.values())


@torch.no_grad()
def _fill(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
