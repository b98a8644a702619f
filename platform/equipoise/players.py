"""The players of the game, one for each update of the paper: networks and the Adam that moves them.

Knows which networks move together and at which rate; must not know losses or schedules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam

from equipoise.config import RunConfig
from equipoise.nets import Sifa
from equipoise.ranks import Ranks

Gradients = Mapping[str, Sequence[Tensor]]
"""A player's name -> the gradients of its weights, in their order."""

SIDES = {
    "generator": ("generator", "decoder"),
    "segmenter": ("segmenter",),
    "critic": ("critic_t", "critic_s", "critic_p", "critic_p_low"),
}
"""The three sides of the game; the norms of their gradients are watched."""


class Player(NamedTuple):
    """Networks that one optimiser moves."""

    parameters: list[nn.Parameter]
    optimiser: Adam
    rate: float
    """Its initial learning rate."""


class Players:
    """Everybody who is updated in a step, by name.

    | player                        | networks  | Adam                                                      |
    |-------------------------------|-----------|-----------------------------------------------------------|
    | generator, decoder            | G; U      | `optim.lr`, betas `beta1`, `beta2`                        |
    | segmenter                     | E, C1, C2 | `lr x lr_segmenter_ratio`, betas .9, `beta2`, decay by l2 |
    | critic_t, critic_s,           | D_t; D_s; | `lr x lr_critic_ratio`, betas `beta1`, `beta2`            |
    | critic_p, critic_p_low        | D_p1; D_p2|                                                           |

    C2 and D_p2 are missing where the networks have none.
    """

    def __init__(self, net: Sifa, config: RunConfig) -> None:
        """Give every player its weights, and an optimiser that has seen nothing yet."""
        optim = config.optim
        images = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2)}
        critics = images | {"lr": optim.lr * optim.lr_critic_ratio}
        # Adam's weight_decay adds l2 * w to the gradient: exactly the gradient of l2 / 2 |w|^2 over all these weights.
        meaning = {
            "lr": optim.lr * optim.lr_segmenter_ratio,
            "betas": (0.9, optim.beta2),
            "weight_decay": config.loss.l2,
        }
        owned: dict[str, tuple[Sequence[nn.Module | None], dict[str, Any]]] = {
            "generator": ([net.generator], images),
            "decoder": ([net.decoder], images),
            "segmenter": ([net.encoder, net.segmenter, net.segmenter_low], meaning),
            "critic_t": ([net.critic_t], critics),
            "critic_s": ([net.critic_s], critics),
            "critic_p": ([net.critic_p], critics),
            "critic_p_low": ([net.critic_p_low], critics),
        }
        self._clip = optim.clip
        self._all = {
            name: _player([n for n in nets if n is not None], config, settings)
            for name, (nets, settings) in owned.items()
            if any(n is not None for n in nets)
        }

    def __getitem__(self, name: str) -> list[nn.Parameter]:
        """The weights of a player."""
        return self._all[name].parameters

    def __contains__(self, name: str) -> bool:
        """Whether there is such a player."""
        return name in self._all

    def optimiser(self, name: str) -> Adam:
        """The optimiser of a player."""
        return self._all[name].optimiser

    def moments(self) -> list[Tensor]:
        """What the optimisers remember of every weight."""
        return [x for player in self._all.values() for state in player.optimiser.state.values() for x in state.values()]

    def set_rates(self, images: float, segmenter: float) -> None:
        """Set learning rates to these factors times their initial values: the segmenter's, and everybody else's."""
        for name, (_, optimiser, rate) in self._all.items():
            group = optimiser.param_groups[0]
            now = rate * (segmenter if name == "segmenter" else images)
            if isinstance(group["lr"], Tensor):  # where a recorded step reads it
                group["lr"].fill_(now)
            else:
                group["lr"] = now

    def move(self, gradients: Gradients, ranks: Ranks) -> dict[str, Tensor]:
        """Step along the mean gradients over ranks, exchanged at once; each player's is cut to `optim.clip`.

        Returns:
            The norm of each player's mean gradient before it was cut, so that one that is not finite is seen.
        """
        mean = iter(ranks.average([g for own in gradients.values() for g in own]))
        norms = {}
        for name in gradients:
            parameters, optimiser, _ = self._all[name]
            own = [_laid_out(next(mean), parameter) for parameter in parameters]
            norms[name] = torch.stack(torch._foreach_norm(own)).norm()
            if self._clip:
                torch._foreach_mul_(own, (self._clip / norms[name]).clamp(max=1.0))
            for parameter, gradient in zip(parameters, own, strict=True):
                parameter.grad = gradient
            optimiser.step()
        return norms

    def state_dict(self) -> dict[str, Any]:
        """The optimisers' states."""
        return {name: player.optimiser.state_dict() for name, player in self._all.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`: moments in place, since a recorded step reads there; rates are set anew.

        Torch's own would take over the saved settings too, and put the counts of steps where the moments are.
        """
        for name, player in self._all.items():
            for number, weight in enumerate(player.parameters):
                for key, mine in player.optimiser.state[weight].items():
                    mine.copy_(state[name]["state"][number][key])


def norms_of_sides(norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`grad/generator`, `grad/segmenter`, `grad/critic`: a side's norm over all weights of its players."""
    return {
        f"grad/{side}": torch.stack([norms[name] for name in names if name in norms]).norm()
        for side, names in SIDES.items()
    }


def _laid_out(gradient: Tensor, weight: Tensor) -> Tensor:
    """A gradient in its weight's memory format, which fused kernels insist on and `torch.autograd.grad` does not."""
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


def _player(nets: Sequence[nn.Module], config: RunConfig, settings: dict[str, Any]) -> Player:
    parameters = [p for net in nets for p in net.parameters()]
    rate, graphs = settings["lr"], config.speed.graphs
    settings = settings | {"lr": torch.tensor(rate, device=parameters[0].device) if graphs else rate}
    optimiser = Adam(parameters, **settings, fused=config.speed.fused_adam or None, capturable=graphs)
    for p in parameters:  # as Adam itself would, but now: what a recorded step makes anew it would make in every replay
        step = torch.zeros((), device=p.device if graphs or config.speed.fused_adam else "cpu")
        optimiser.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return Player(parameters, optimiser, rate)
