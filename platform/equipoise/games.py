"""The games that critics and generators play, as pure functions of a critic's logits.

Knows formulas, and which of them a configuration names; must not know networks, penalties on gradients, weights of
terms or which critic plays. x is real, y is fake, D(x) and D(y) are the logits of both, of one shape.

| name     | the critic minimises                                      | the other side minimises      |
|----------|-----------------------------------------------------------|-------------------------------|
| lsgan    | E (D(x) - b)^2 / 2 + E (D(y) - a)^2 / 2                   | E (D(y) - c)^2                |
| ns       | E sp(-D(x)) + E sp(D(y))                                  | E sp(-D(y))                   |
| hinge    | E relu(1 - D(x)) + E relu(1 + D(y))                       | -E D(y)                       |
| ra_lsgan | E (D(x) - E D(y) - 1)^2 / 2 + E (D(y) - E D(x) + 1)^2 / 2 | the same with both 1 reversed |
| rp       | E sp(D(y) - D(x)), patch by patch                         | E sp(D(x) - D(y))             |
| wgan_gp  | E D(y) - E D(x)                                           | -E D(y)                       |

E is the mean over images and patches, sp(z) = log(1 + exp(z)). Not all are bounded below: hinge's and wgan_gp's values
may be negative. rp and wgan_gp converge only with the penalties that the configuration demands of them.

As in `losses`: none waits for the device, no branch looks at data, and means are taken in float32 at least. A NaN among
the logits that a side reads gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.config import AdversarialName, LossConfig
from equipoise.config_game import CriticConfig
from equipoise.losses import Total, here, wide

Side = Callable[[Tensor, Tensor], Tensor]
"""(logits of real, logits of fake), of one shape -> a scalar to minimise."""


class Game(NamedTuple):
    """The two sides of an adversarial loss."""

    critic: Side
    """What the critic minimises."""

    generator: Side
    """What the network that made the fake minimises. Real logits are constants here: no gradient goes to them."""

    relative: bool = False
    """Whether `generator` reads the real logits; where it does not, anything may stand for them."""


def lsgan(*, fake: float = 0.0, real: float = 1.0, wanted: float = 1.0) -> Game:
    """Least squares (Mao et al., ICCV 2017), the critic's targets `fake` and `real`, the other side's `wanted`.

    They are the paper's a, b and c; -1, 1 and 0 make the game a Pearson chi-squared divergence. As in SIFA's reference
    only the critic's side is halved, so the other weighs twice as much.
    """

    def critic(on_real: Tensor, on_fake: Tensor) -> Tensor:
        return 0.5 * ((wide(on_real) - real).square().mean() + (wide(on_fake) - fake).square().mean())

    def generator(on_real: Tensor, on_fake: Tensor) -> Tensor:
        return (wide(on_fake) - wanted).square().mean()

    return Game(critic, generator)


def ns(*, smoothing: float = 0.0) -> Game:
    """Binary cross-entropy (Goodfellow et al., NeurIPS 2014), from logits.

    The other side maximises log s(D(y)), which unlike log(1 - s(D(y))) has a gradient where the critic wins.
    With `smoothing` the critic is to call real patches real with 1 - this, and fake ones fake with 1 as before
    (Salimans et al., NeurIPS 2016).
    """

    def critic(on_real: Tensor, on_fake: Tensor) -> Tensor:
        called_real = F.softplus(-wide(on_real)) + smoothing * wide(on_real)  # (1 - smoothing) sp(-z) + smoothing sp(z)
        return called_real.mean() + F.softplus(wide(on_fake)).mean()

    def generator(on_real: Tensor, on_fake: Tensor) -> Tensor:
        return F.softplus(-wide(on_fake)).mean()

    return Game(critic, generator)


def hinge() -> Game:
    """Hinge (Lim and Ye, 2017): no reward for the critic beyond a margin of 1 on either side of 0."""

    def critic(on_real: Tensor, on_fake: Tensor) -> Tensor:
        return F.relu(1 - wide(on_real)).mean() + F.relu(1 + wide(on_fake)).mean()

    return Game(critic, _less_mean_of_fake)


def ra_lsgan(total: Total = here) -> Game:
    """Relativistic average least squares (Jolicoeur-Martineau, ICLR 2019): each side against the mean of the other.

    Args:
        total: passes the sums of real and of fake logits and their number, in one tensor, twice a step and game: once
            for each side. All but the number carry gradient.
    """

    def distance(on_real: Tensor, on_fake: Tensor, margin: float) -> Tensor:
        real, fake = wide(on_real), wide(on_fake)
        count = real.new_full((), real.numel())
        sum_real, sum_fake, count = total(torch.stack([real.sum(), fake.sum(), count])).unbind()
        above, below = real - sum_fake / count - margin, fake - sum_real / count + margin
        return 0.5 * (above.square().mean() + below.square().mean())

    def critic(on_real: Tensor, on_fake: Tensor) -> Tensor:
        return distance(on_real, on_fake, 1.0)

    def generator(on_real: Tensor, on_fake: Tensor) -> Tensor:
        return distance(on_real.detach(), on_fake, -1.0)

    return Game(critic, generator, relative=True)


def rp() -> Game:
    """Relativistic pairing (R3GAN; Huang et al., NeurIPS 2024): each fake patch against the real one at its place."""

    def critic(on_real: Tensor, on_fake: Tensor) -> Tensor:
        return F.softplus(wide(on_fake) - wide(on_real)).mean()

    def generator(on_real: Tensor, on_fake: Tensor) -> Tensor:
        return F.softplus(wide(on_real.detach()) - wide(on_fake)).mean()

    return Game(critic, generator, relative=True)


def wgan_gp() -> Game:
    """Wasserstein distance (Gulrajani et al., NeurIPS 2017), as far as its penalty keeps the critic's slope at 1.

    A control: it need not converge.
    """

    def critic(on_real: Tensor, on_fake: Tensor) -> Tensor:
        return wide(on_fake).mean() - wide(on_real).mean()

    return Game(critic, _less_mean_of_fake)


Maker = Callable[[LossConfig, CriticConfig, Total], Game]
"""Makes a game with what the configuration sets of it."""

GAMES: Mapping[AdversarialName, Maker] = MappingProxyType(
    {
        "lsgan": lambda loss, critic, total: lsgan(
            fake=loss.lsgan_fake, real=loss.lsgan_real, wanted=loss.lsgan_wanted
        ),
        "ns": lambda loss, critic, total: ns(smoothing=critic.smoothing),
        "hinge": lambda loss, critic, total: hinge(),
        "ra_lsgan": lambda loss, critic, total: ra_lsgan(total),
        "rp": lambda loss, critic, total: rp(),
        "wgan_gp": lambda loss, critic, total: wgan_gp(),
    }
)
"""Every game the critics can play, by the name of `loss.adversarial`."""


def game(loss: LossConfig, critic: CriticConfig, total: Total = here) -> Game:
    """Give the game that `loss.adversarial` names, as it and `critic.smoothing` set it.

    Args:
        loss: the name, and the least-squares targets.
        critic: the smoothing.
        total: sums over all workers, forth and back; see `losses.Total`. Only `ra_lsgan` calls it.
    """
    return GAMES[loss.adversarial](loss, critic, total)


def _less_mean_of_fake(on_real: Tensor, on_fake: Tensor) -> Tensor:
    return -wide(on_fake).mean()
