"""How the adversarial games are kept in balance: settings of a run that the published method does not have.

Knows these settings, their ranges and their sources; every default is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from equipoise.config_base import Config, require

PenaltyName = Literal["none", "r1", "r1r2", "gp0_mix", "gp"]
BalanceMode = Literal["static", "calibrated", "grad_ratio"]
Remedy = Literal["halve_rate", "penalty"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticConfig(Config):
    """What holds the critics back, and what they are shown."""

    penalty: PenaltyName = "none"
    """On the critics' gradients by their input; see `penalties`. `r1` on real input (Mescheder 2018), `r1r2` on real
    and fake input, `gp0_mix` on mixtures of both (UVCGANv2); `gp`, on mixtures too but centred at 1, is wgan_gp's."""

    gamma: float = 1.0
    """Weight of the penalty: gamma / 2 times the mean over the batch of the squared norm of the gradient of the sum of
    all patches; `gp` has no 1 / 2 and usually 10. That norm depends on the critic: at 256 x 256 a fresh one has about
    5000 with instance norm, 2 with spectral norm, so the first wants some thousandth of the second's weight."""

    penalty_every: int = 1
    """Steps from one penalty to the next; its weight is multiplied by this, so that its mean stays the same."""

    noise: float = 0.0
    """Instance noise (Sonderby 2017): standard deviation, at the start, of noise on all images that D_t and D_s see;
    images lie in [-1, 1]. It falls linearly to 0."""

    noise_until: float = 0.5
    """Share of the run after which there is no more noise."""

    translation: float = 0.0
    """DiffAugment (Zhao 2020): largest shift of images that D_t and D_s see, as a share of their side. 1/8 there."""

    cutout: float = 0.0
    """DiffAugment: side of a square cut out of those images, as a share of theirs. 1/2 there. Never colour: contrast
    tells the domains apart."""

    lecam: float = 0.0
    """Weight of LeCam's regularisation (Tseng 2021): logits of each kind are held to the mean of the other's."""

    smoothing: float = 0.0
    """One-sided label smoothing of the game `ns`: real input is to be called real with 1 - this; `lsgan` has
    loss.lsgan_real for it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        Config.__post_init__(self)
        for name in ("gamma", "noise", "lecam"):
            require(f"critic.{name}", getattr(self, name), getattr(self, name) >= 0, "must not be negative")
        for name, most in (("translation", 0.5), ("cutout", 1), ("smoothing", 0.5), ("noise_until", 1)):
            value = getattr(self, name)
            require(f"critic.{name}", value, 0 <= value <= most, f"must lie in [0, {most}]")
        require("critic.penalty_every", self.penalty_every, self.penalty_every >= 1, "must be at least 1")
        plain = {"gamma": 1.0, "penalty_every": 1}
        for name, usual in plain.items():
            acts = self.penalty != "none" or getattr(self, name) == usual
            require(f"critic.{name}", getattr(self, name), acts, "has no effect without a penalty")
        require("critic.gamma", self.gamma, self.penalty == "none" or self.gamma > 0, "must be positive")
        noisy = self.noise > 0 or self.noise_until == 0.5
        require("critic.noise_until", self.noise_until, noisy, "has no effect without critic.noise")


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig(Config):
    """How much each term of the objective moves the networks: measured always, evened out if told."""

    mode: BalanceMode = "static"
    """`static`: weights as they are set. `calibrated`: after `calibration_steps`, each adversarial weight is multiplied
    once, such that its term's gradient is that weight times its anchor's. `grad_ratio`: the same at every measurement
    (VQGAN, Esser 2021), held to [.1, 10] and averaged over time. See `balance`."""

    every: int = 250
    """Steps from one measurement of the terms' gradients to the next; 0 measures nothing. A measurement costs about as
    much as one step and a half."""

    calibration_steps: int = 500
    """Steps at the set weights, measured throughout, by which `calibrated` multiplies."""

    def __post_init__(self) -> None:
        """Check ranges."""
        Config.__post_init__(self)
        require("balance.every", self.every, self.every >= 0, "must not be negative")
        require("balance.every", self.every, self.mode == "static" or self.every > 0, f"{self.mode} must measure")
        calibrated = self.mode == "calibrated" or self.calibration_steps == 500
        rule = "has no effect where balance.mode is not calibrated"
        require("balance.calibration_steps", self.calibration_steps, calibrated, rule)
        enough = self.mode != "calibrated" or self.calibration_steps >= self.every
        rule = f"must not be less than balance.every ({self.every}): there would be nothing to calibrate by"
        require("balance.calibration_steps", self.calibration_steps, enough, rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryConfig(Config):
    """Going back to before a divergence and on with a remedy. Such a run is never called stable."""

    times: int = 0
    """How often at most; 0 lets a divergence end the run."""

    remedy: Remedy = "halve_rate"
    """What changes each time: `halve_rate` halves optim.lr, and with it every player's rate; `penalty` turns r1r2 on,
    the second time and after with its weight doubled."""

    def __post_init__(self) -> None:
        """Check ranges."""
        Config.__post_init__(self)
        require("recovery.times", self.times, self.times >= 0, "must not be negative")
        acts = self.times > 0 or self.remedy == "halve_rate"
        require("recovery.remedy", self.remedy, acts, "has no effect where recovery.times is 0")
