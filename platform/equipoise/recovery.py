"""Going back to before a divergence, and on with a remedy.

Knows which remedy a run has, and what is remembered of each return; must not know how a run trains, nor its files.

A return cures the run, not its record: the divergence is kept, the verdict is at best "recovered", and S counts the
first onset.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from equipoise.config import RunConfig
from equipoise.monitor import Finding, Verdict

KINDS = ("diverged", "saturated")
"""Verdicts that a run goes back from: those that end it."""


@dataclass(frozen=True, slots=True)
class Return:
    """One return: from what, to which step, and on with what."""

    verdict: Verdict
    """What it would have ended with."""
    step: int
    """Of the checkpoint that the run went on from; 0 is its beginning."""
    remedy: str
    """In words."""

    @property
    def divergence(self) -> Finding:
        """The finding that ended it."""
        return next(f for f in self.verdict.findings if f.diverged)


def remedied(config: RunConfig, times: int) -> RunConfig:
    """The run with its remedy applied so many times; the run itself for 0."""
    if times == 0:
        return config
    if config.recovery.remedy == "halve_rate":
        return config.at("optim.lr", config.optim.lr / 2**times)
    return config.having({"recovery.times": 0, "recovery.remedy": "halve_rate"}).having(
        {"critic.penalty": "r1r2", "critic.gamma": 2.0 ** (times - 1)}
    )


def words(config: RunConfig, times: int) -> str:
    """What is different the so-manieth time."""
    now = remedied(config, times)
    if config.recovery.remedy == "halve_rate":
        return f"learning rate {now.optim.lr:g}"
    return f"penalty r1r2, gamma {now.critic.gamma:g}"


def kept(config: RunConfig) -> int:
    """Checkpoints at evaluations that a run must keep to reach back to before an onset, noticed up to a sixth later."""
    return 2 + (math.ceil(config.evaluations / 6) if config.recovery.times else 0)


def held(config: RunConfig, step: int, looks: Collection[int]) -> Collection[int]:
    """Steps up to `step` whose checkpoints the run may go back to; none without recovery.

    Args:
        config: the run.
        step: that it has reached.
        looks: steps of its evaluations. It goes back to these alone, so that checkpoints in between change no number.
    """
    return sorted(look for look in looks if look <= step)[-kept(config) :] if config.recovery.times else ()


def goal(onset: int, looks: Collection[int]) -> int:
    """The step to go back to from a divergence that began at `onset`; 0 is the run's beginning.

    Args:
        onset: step at which it began.
        looks: evaluations of which there are checkpoints.
    """
    return max((look for look in looks if look <= onset), default=0)
