"""The rules by which the critics' games are played: who sees what, and what each side is told to minimise.

Knows the game, what holds the critics back (penalties, LeCam, noise, augmentation) and the weights that change while a
run trains; must not know networks, nor the order in which they are updated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equipoise import losses
from equipoise.balance import Balance
from equipoise.config import RunConfig
from equipoise.games import game
from equipoise.lecam import LeCam
from equipoise.penalties import Judge, penalty
from equipoise.ranks import Ranks
from equipoise.schedules import Rates
from equipoise.step import Signals
from equipoise.views import view


class Match(NamedTuple):
    """One game in a critic's update."""

    judge: Judge
    real: Tensor
    """What the critic is shown as real, and as fake; without a graph."""
    fake: Tensor
    on_real: Tensor
    """What it says."""
    on_fake: Tensor


Matches = Mapping[str, Match]
"""By a game's name: t, s, aux, p, p_low."""


class Dials(NamedTuple):
    """What a schedule changes from step to step; numbers on the device, where a recorded step reads them."""

    predictions: Tensor
    """How much of their weight the games of predictions have reached."""
    noise: Tensor
    """Standard deviation of instance noise."""


@dataclass(slots=True)
class Referee:
    """The rules as they stand."""

    config: RunConfig
    ranks: Ranks
    dials: Dials
    balance: Balance
    lecam: LeCam | None
    penalise: bool = False
    """Whether the step at hand has a penalty on the critics."""

    @classmethod
    def of(cls, config: RunConfig, ranks: Ranks, device: torch.device) -> Referee:
        """The rules of a run's first step without schedules: every game at its whole weight, no noise, no penalty."""
        dials = Dials(torch.ones((), device=device), torch.zeros((), device=device))
        games = ("t", "s", "aux", "p", *(("p_low",) if config.net.low else ()))
        lecam = LeCam(games, device) if config.critic.lecam else None
        return cls(config, ranks, dials, Balance(config, device), lecam)

    def set(self, now: Rates, number: int) -> None:
        """Set what changes with the step, for step `number`."""
        critic = self.config.critic
        self.dials.predictions.fill_(now.predictions)
        self.dials.noise.fill_(now.noise)
        self.penalise = critic.penalty != "none" and number % critic.penalty_every == 0

    def tensors(self) -> list[Tensor]:
        """What a step changes here."""
        return self.lecam.tensors() if self.lecam is not None else []

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to continue: tensors and plain data."""
        return {
            "balance": self.balance.state_dict(),
            "lecam": self.lecam.state_dict() if self.lecam is not None else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, in place."""
        self.balance.load_state_dict(state["balance"])
        if self.lecam is not None:
            self.lecam.load_state_dict(state["lecam"])

    def shown(self, image: Tensor) -> Tensor:
        """What D_t and D_s see of images: noise, shifts and holes where the run has them."""
        return view(image, self.dials.noise, self.config.critic)

    def fool(self, on_fake: Tensor, on_real: Callable[[], Tensor]) -> Tensor:
        """What the network that made a fake minimises; real input is judged only for games that compare."""
        rules = game(self.config.loss, self.config.critic, self.ranks.total)
        if not rules.relative:
            return rules.generator(on_fake.detach(), on_fake)
        with torch.no_grad():
            real = on_real()
        return rules.generator(real, on_fake)

    def judge(self, matches: Matches) -> tuple[Tensor, Signals]:
        """What all critics minimise together, and how well each tells real from fake."""
        rules = game(self.config.loss, self.config.critic, self.ranks.total)
        signals = {f"critic/loss_{name}": rules.critic(m.on_real, m.on_fake) for name, m in matches.items()}
        if self.lecam is not None:
            for name, m in matches.items():
                term = self.lecam.term(name, m.on_real, m.on_fake, self.ranks.total)
                signals[f"critic/lecam_{name}"] = self.config.critic.lecam * term
        signals |= self._penalties(matches)
        loss = torch.stack(list(signals.values())).sum()
        with torch.no_grad():
            for name, m in matches.items():
                signals[f"auc/{name}"] = losses.patch_auc(m.on_real, m.on_fake)
                wide = torch.promote_types(m.on_real.dtype, torch.float32)
                signals[f"critic/gap_{name}"] = m.on_real.mean(dtype=wide) - m.on_fake.mean(dtype=wide)
        return loss, signals

    def _penalties(self, matches: Matches) -> Signals:
        """Weighted such that their mean over steps is that of a penalty at every step; 0 at steps without one."""
        critic = self.config.critic
        if critic.penalty == "none":
            return {}
        if not self.penalise:
            return {f"critic/penalty_{name}": torch.zeros((), device=m.real.device) for name, m in matches.items()}
        weight = critic.gamma * critic.penalty_every
        return {
            f"critic/penalty_{name}": weight * penalty(critic.penalty, m.judge, m.real, m.fake)
            for name, m in matches.items()
        }
