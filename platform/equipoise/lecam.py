"""LeCam's regularisation: a critic's opinion of each side is held to what it has been saying of the other.

Knows running means of logits; must not know networks, which game is played or the term's weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from equipoise.losses import Total, wide

DECAY = 0.99
"""Of the running means, a step; the authors' own."""


class LeCam:
    """E (D(x) - m_fake)^2 + E (D(y) - m_real)^2 with running means m of each game's logits (Tseng et al., CVPR 2021).

    E is the mean over images and patches. The means start at the first step's own, which that step is held to.
    """

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        """Begin without having seen a step of any of the games `names`."""
        self._held = {name: torch.zeros(3, device=device) for name in names}
        """Mean of real logits, mean of fake ones, and 1 once a step has been seen."""

    def term(self, name: str, real: Tensor, fake: Tensor, total: Total) -> Tensor:
        """Give the term at weight 1, and only then move the means of the game `name`, in place.

        Args:
            name: the game.
            real: logits of any shape.
            fake: logits of any shape.
            total: passes both sums and both numbers of logits, none with gradient; see `losses.Total`.

        Returns:
            A scalar, not negative, differentiable by both. NaN once any logit has been.
        """
        real, fake = wide(real), wide(fake)
        held = self._held[name]
        now = _means(real, fake, total).to(held.dtype)
        past = torch.where(held[2:] > 0, held[:2], now)
        of_real, of_fake = past.unbind()
        with torch.no_grad():
            held[:2].copy_(past.lerp(now, 1 - DECAY))
            held[2:].fill_(1)
        return (real - of_fake).square().mean() + (fake - of_real).square().mean()

    def tensors(self) -> list[Tensor]:
        """All state, where it lies."""
        return list(self._held.values())

    def state_dict(self) -> dict[str, Tensor]:
        """All state by game, where it lies."""
        return dict(self._held)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`, in place.

        Raises:
            KeyError: it is of other games.
        """
        if state.keys() != self._held.keys():
            raise KeyError(f"state of the games {sorted(state)}: must be of {sorted(self._held)}")
        for name, held in self._held.items():
            held.copy_(state[name])


@torch.no_grad()
def _means(real: Tensor, fake: Tensor, total: Total) -> Tensor:
    """Of real and of fake logits over all workers, (2,)."""
    counts = [x.new_full((), x.numel()) for x in (real, fake)]
    sums = total(torch.stack([real.sum(), fake.sum(), *counts]))
    return sums[:2] / sums[2:]
