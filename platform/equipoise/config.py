"""What a run is: one frozen, total, nameable object.

Knows every setting of a run, its default and where that comes from; knows nothing of torch, Ray, W&B or paths.
Defaults: Chen et al., "Unsupervised Bidirectional Cross-Modality Adaptation via Deeply Synergistic Image and Feature
Alignment", IEEE TMI 2020, and its authors' public settings ("v2").
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from slicestore.settings import LEVELS

AdversarialName = Literal["lsgan", "ns", "hinge"]
ScheduleName = Literal["constant", "linear_half"]
LimitsName = Literal["domain", "pooled", "fixed"]
SplitName = Literal["subject", "slice"]
Leaf = float | int | bool | str


class Config:
    """A frozen dataclass whose leaves can be reached by dotted paths."""

    def __post_init__(self) -> None:
        """Hold every leaf to its declared type.

        Raises:
            ValueError: a leaf is of another type, is not finite, or is not among its choices.
        """
        for name, kind in _hints(type(self)).items():
            object.__setattr__(self, name, _held(f"{type(self).__name__}.{name}", getattr(self, name), kind))

    def at(self, path: str, value: Leaf) -> Self:
        """A copy with one leaf changed.

        Raises:
            KeyError: no leaf is called `path`; the message lists those that are.
            ValueError: the value breaks the leaf's rule.
        """
        head, _, rest = path.partition(".")
        names = [f.name for f in dataclasses.fields(typing.cast(Any, self))]
        if head not in names:
            raise KeyError(f"{type(self).__name__} has no setting {head!r}; it has {', '.join(names)}")
        old = getattr(self, head)
        if isinstance(old, Config) != bool(rest):
            raise KeyError(
                f"{path!r} does not end at a setting: {head!r} is {'a group' if isinstance(old, Config) else 'a leaf'}"
            )
        changed: Self = dataclasses.replace(typing.cast(Any, self), **{head: old.at(rest, value) if rest else value})
        return changed

    def flat(self) -> dict[str, Leaf]:
        """Every leaf by its dotted path, in declaration order."""
        return dict(self._leaves())

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data, for JSON."""
        return dataclasses.asdict(typing.cast(Any, self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            KeyError: a key is unknown, as in a record of another version.
        """
        hints = _hints(cls)
        if unknown := set(data) - set(hints):
            raise KeyError(f"{cls.__name__} has no setting {', '.join(sorted(unknown))}; it has {', '.join(hints)}")
        return cls(**{k: hints[k].from_dict(v) if _is_group(hints[k]) else v for k, v in data.items()})

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that name these settings on any machine."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    def _leaves(self, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
        for name in _hints(type(self)):
            value = getattr(self, name)
            if isinstance(value, Config):
                yield from value._leaves(f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Config)


def _hints(cls: type[Config]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(typing.cast(Any, cls))}


def _held(where: str, value: Any, kind: Any) -> Any:
    """The value, as its declared type; an int where a float is declared becomes one, so that names agree."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if choices:
        if value not in choices:
            raise ValueError(f"{where} = {value!r}: must be one of {', '.join(map(repr, choices))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(kind, types.GenericAlias) or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} = {value!r}: must be of type {getattr(kind, '__name__', kind)}")
    if kind is float and not abs(value) < float("inf"):
        raise ValueError(f"{where} = {value!r}: must be finite")
    return value


def _require(where: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{where} = {value!r}: {rule}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig(Config):
    """How far training slices are changed at random; 0 is not at all, and off. See `augment` for the formulae."""

    rotation_degrees: float = 0.0
    """Largest angle in the plane, either way."""

    scale: float = 0.0
    """Largest growth as a share: .2 makes a slice up to 1.2 times as large, or as much smaller."""

    flip: float = 0.0
    """Probability that left and right change sides."""

    gamma: float = 0.0
    """Largest change of the grey curve as a share: .3 raises [0, 1] to a power between 1 / 1.3 and 1.3."""

    gain: float = 0.0
    """Largest change of contrast as a share: .1 multiplies [0, 1] by a factor between .9 and 1.1."""

    shift: float = 0.0
    """Largest change of brightness, either way, in units of the range from -1 to 1."""

    def __post_init__(self) -> None:
        """Check ranges."""
        Config.__post_init__(self)
        for name, most in (
            ("rotation_degrees", 180),
            ("flip", 1),
            ("gain", 1),
            ("shift", 2),
            ("scale", 4),
            ("gamma", 4),
        ):
            value = getattr(self, name)
            _require(f"data.augment.{name}", value, 0 <= value <= most, f"must lie in [0, {most}]")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Config):
    """Which slices a run sees, in which order, and on which scale."""

    cohort: str = ""
    """Fingerprint of the store's content; filled in when a run is bound to a store, so that a swap is noticed."""

    split: SplitName = "subject"
    """What is dealt to training, validation and test: subjects (default), or the slices of all subjects, as the 2022
    study did. By slice, neighbouring slices of one subject train and validate, and the Dice is one of memory."""

    limits: LimitsName = "domain"
    """Where the minimum and maximum that map to -1 and 1 come from: each domain's training subjects (default), both
    domains pooled, as the 2022 study did, or `source_low` to `target_high` (`fixed`)."""

    source_low: float = -1.8
    """Of `limits="fixed"`: the standardised value that becomes -1 in the source domain. The four defaults are those of
    SIFA's published cardiac MR (source) and CT (target), from its data loader."""

    source_high: float = 4.4
    """The standardised value that becomes 1 in the source domain."""

    target_low: float = -2.8
    """As `source_low`, in the target domain."""

    target_high: float = 3.2
    """As `source_high`, in the target domain."""

    percentile: float = 0.0
    """Percentage of the training subjects' values beyond either limit, which are clipped to -1 and 1; 0 takes minimum
    and maximum, and clips nothing."""

    foreground: float = 0.0
    """Share of a batch's source slices that are drawn from slices with foreground, the others from those without; 0
    takes them as they come."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        """Check ranges and what only holds between settings."""
        Config.__post_init__(self)
        _require(
            "data.percentile",
            self.percentile,
            self.percentile in (0, *LEVELS),
            f"must be one of {', '.join(map(str, (0, *LEVELS)))}",
        )
        _require("data.foreground", self.foreground, 0 <= self.foreground <= 1, "must lie in [0, 1]")
        _require(
            "data.percentile",
            self.percentile,
            self.percentile == 0 or self.limits != "fixed",
            'must be 0 where data.limits is "fixed", which measures nothing',
        )
        for domain in ("source", "target"):
            low, high = getattr(self, f"{domain}_low"), getattr(self, f"{domain}_high")
            _require(f"data.{domain}_low", low, low < high, f"must be less than data.{domain}_high ({high})")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetConfig(Config):
    """Shapes of the networks."""

    classes: int = 2
    """Classes of the segmenters, background included."""

    width: float = 1.0
    """Factor on every hidden channel count; 1 is the published network, 0.125 trains on two CPU cores."""

    skip: bool = True
    """Whether generator and decoder add their input image before the last tanh."""

    channels: int = 1
    """Slices in an image: 3 shows the networks each slice between its two neighbours (2.5D), as published; masks and
    pictures are of the middle one."""

    def __post_init__(self) -> None:
        """Check ranges."""
        Config.__post_init__(self)
        odd = self.channels >= 1 and self.channels % 2 == 1
        _require("net.channels", self.channels, odd, "must be odd, so that there is a middle slice: 1 or 3")
        _require("net.classes", self.classes, self.classes >= 2, "must be at least 2: background and one structure")
        _require("net.width", self.width, 0 < self.width <= 4, "must lie in (0, 4]")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(Config):
    """Weights of the SIFA objective."""

    adversarial: AdversarialName = "lsgan"
    """The game that all critics play; a key of `losses.ADVERSARIAL`."""

    cycle: float = 10.0
    """L1 cycle term, both directions."""

    adv_image: float = 1.0
    """Adversarial term of the images x_st (critic D_t) and x_ts (critic D_s)."""

    segmentation: float = 1.0
    """Factor on every segmentation loss: cross-entropy and Dice, both segmenters' games, the auxiliary game. 0 is
    CycleGAN, the 2022 study's "segmentation parameter 0"."""

    seg_low: float = 0.1
    """Cross-entropy and Dice of the auxiliary segmenter C2."""

    adv_p: float = 0.1
    """Adversarial term of C1's predictions on target images (critic D_p1)."""

    adv_p_low_ratio: float = 0.1
    """The same for C2 (critic D_p2), as a multiple of `adv_p`."""

    aux: float = 0.1
    """Adversarial term that aligns the encoder through D_s's second output."""

    image_in_encoder: float = 0.1
    """Share of the image terms (cycles, x_ts's game) that reaches the encoder."""

    l2: float = 1e-4
    """Weight decay of encoder and segmenters: l2 / 2 |w|^2, norms and biases included."""

    def __post_init__(self) -> None:
        """Check ranges."""
        Config.__post_init__(self)
        for name, value in self.flat().items():
            if isinstance(value, float):
                _require(f"loss.{name}", value, value >= 0, "must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(Config):
    """Step sizes. All players use Adam."""

    lr: float = 2e-4
    """Learning rate of generator and decoder."""

    lr_critic_ratio: float = 1.0
    """The critics' rate as a multiple of `lr`."""

    lr_segmenter_ratio: float = 1.0
    """The encoder's and segmenters' rate as a multiple of `lr`; the published code runs them at the image rate."""

    beta1: float = 0.5
    """First-moment decay of generator, decoder and critics; encoder and segmenters use 0.9."""

    beta2: float = 0.999
    """Second-moment decay of every player."""

    schedule: ScheduleName = "constant"
    """`constant` (v2), or `linear_half`: constant for half of the steps, then linearly to 0 (v1's option)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        Config.__post_init__(self)
        for name in ("lr", "lr_critic_ratio", "lr_segmenter_ratio"):
            _require(f"optim.{name}", getattr(self, name), getattr(self, name) > 0, "must be positive")
        for name in ("beta1", "beta2"):
            _require(f"optim.{name}", getattr(self, name), 0 <= getattr(self, name) < 1, "must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig(Config):
    """When a loss counts as exploded and a critic as winning."""

    block_steps: int = 50
    """Steps whose signals are averaged before they are judged, at 20 000 steps or more; see `monitor.Horizon`."""

    win_auc: float = 0.99
    """Patch AUC at which a critic tells all real from all fake patches."""

    cycle_growth: float = 1.5
    """Growth factor of a cycle loss that counts as an explosion."""

    loss_growth: float = 2.0
    """The same for the segmentation and the generator's total loss."""

    gap_growth: float = 3.0
    """The same for 1 + E D(real) - E D(fake), which stands in for a generator loss that may be negative."""

    def __post_init__(self) -> None:
        """Check ranges."""
        Config.__post_init__(self)
        _require("monitor.block_steps", self.block_steps, self.block_steps >= 1, "must be at least 1")
        _require("monitor.win_auc", self.win_auc, 0.5 < self.win_auc <= 1, "must lie in (0.5, 1]")
        for name in ("cycle_growth", "loss_growth", "gap_growth"):
            _require(f"monitor.{name}", getattr(self, name), getattr(self, name) > 1, "must exceed 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Config):
    """A run, totally: the same object on the same store gives the same numbers."""

    data: DataConfig = field(default_factory=DataConfig)
    net: NetConfig = field(default_factory=NetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    steps: int = 20_000
    """Optimisations of the whole network, each on one batch of both domains."""

    batch: int = 8
    """Slices of each domain in a step, over all workers."""

    pool: int = 50
    """Batches of earlier translations that D_t and D_s are shown; 0 shows them the newest only."""

    workers: int = 1
    """Data-parallel processes; each takes `batch / workers` slices."""

    seed: int = 0
    """Seed of initial weights, order of slices, dropout and pools."""

    evaluations: int = 20
    """How often in a run Dice is measured, panels are drawn and a checkpoint is written, evenly spaced."""

    def __post_init__(self) -> None:
        """Check ranges and what only holds between settings."""
        Config.__post_init__(self)
        for name in ("steps", "batch", "workers", "evaluations"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "must be at least 1")
        _require("pool", self.pool, self.pool >= 0, "must not be negative")
        _require("seed", self.seed, self.seed >= 0, "must not be negative")
        _require(
            "batch",
            self.batch,
            self.batch % self.workers == 0,
            f"must be a multiple of workers ({self.workers}), so that every worker takes the same share",
        )


PUBLISHED = RunConfig()
"""SIFA v2 as its authors run it."""

STUDY_2022 = (
    RunConfig()
    .at("steps", 40_000)
    .at("batch", 4)
    .at("optim.lr", 2e-3)
    .at("data.limits", "pooled")
    .at("data.split", "slice")
)
"""The settings of the 2022 study that blew up; its port's defects (no instance norm, ...) are not among them."""
