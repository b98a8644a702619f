"""How learning rates and weights change while a run trains.

Knows the published schedules as pure functions of the step; must not know optimisers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from equipoise.config import RunConfig


class Rates(NamedTuple):
    """Factors at one step."""

    images: float
    """On the learning rate of generator, decoder and critics."""
    segmenter: float
    """On that of encoder and segmenters."""
    predictions: float
    """On the weight of the games of predictions, in [0, 1]."""
    noise: float
    """Standard deviation of instance noise."""


def rates(config: RunConfig, number: int, epoch_steps: int) -> Rates:
    """The factors at step `number`, counted from 1, with epochs of so many steps, counted from 0."""
    optim, loss = config.optim, config.loss
    epoch = (number - 1) // epoch_steps
    images = 1.0
    if optim.schedule == "linear_half":
        images = min(1.0, (config.steps - number + 1) / (config.steps / 2))
    elif optim.schedule == "cosine":
        images = (1 + math.cos(math.pi * (number - 1) / config.steps)) / 2
    decay = optim.segmenter_decay ** (epoch // optim.segmenter_decay_epochs)
    rise = (epoch - loss.adv_p_from_epoch + 1) / (loss.adv_p_full_epoch - loss.adv_p_from_epoch + 1)
    predictions = min(1.0, max(0.0, rise))
    if loss.adv_p_warmup:
        predictions = min(1.0, number / (loss.adv_p_warmup * config.steps))
    return Rates(images, images * decay, predictions, _noise(config, number))


def _noise(config: RunConfig, number: int) -> float:
    """Instance noise falls linearly, from its full strength at the first step to 0."""
    critic = config.critic
    until = critic.noise_until * config.steps
    return critic.noise * max(0.0, 1 - (number - 1) / until) if until else 0.0


def idle_steps(config: RunConfig, epoch_steps: int) -> int:
    """Steps at the beginning in which the games of predictions have not reached their weight."""
    return max(config.loss.adv_p_from_epoch * epoch_steps, round(config.loss.adv_p_warmup * config.steps))
