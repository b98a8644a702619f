"""What a run is: one frozen, total, nameable object.

Knows every setting of a run, its default and where that comes from; knows nothing of torch, Ray, W&B or paths.
Defaults: Chen et al., "Unsupervised Bidirectional Cross-Modality Adaptation via Deeply Synergistic Image and Feature
Alignment", IEEE TMI 2020, and its authors' public settings ("v2").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Literal

from equipoise.config_base import Config, Leaf, require
from equipoise.config_game import BalanceConfig, CriticConfig, RecoveryConfig
from slicestore.settings import LEVELS

AdversarialName = Literal["lsgan", "ns", "hinge", "ra_lsgan", "rp", "wgan_gp"]
ScheduleName = Literal["constant", "linear_half", "cosine"]
LimitsName = Literal["domain", "pooled", "fixed"]
SplitName = Literal["subject", "slice"]
EncoderNorm = Literal["batch", "batch_per_domain", "instance", "group"]
BatchStatistics = Literal["running", "stale", "fixed"]
BatchNormOver = Literal["batch", "worker"]
ImageNorm = Literal["instance", "none"]
CriticNorm = Literal["instance", "spectral", "both", "none"]
CriticLayers = Literal[2, 3]
Initial = Literal["truncated_normal", "glorot"]
HeadStride = Literal[8, 4, 2]
CriticInput = Literal["logits", "softmax"]
CrossEntropyName = Literal["pixel", "weight", "balanced"]
OverlapName = Literal["dice", "tversky", "focal_tversky"]
Updates = Literal["fused", "sequential"]
PoolBy = Literal["batch", "image"]
Precision = Literal["float32", "tf32", "bfloat16"]


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
            require(f"data.augment.{name}", value, 0 <= value <= most, f"must lie in [0, {most}]")


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

    frame: int = 0
    """Pixels of 0, a mid-grey, put round every slice on each side: what the 2022 study's zero padding made of its
    images, on any store. Its slices of about 224 pixels in 352 had 64."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        """Check ranges and what only holds between settings."""
        Config.__post_init__(self)
        require(
            "data.percentile",
            self.percentile,
            self.percentile in (0, *LEVELS),
            f"must be one of {', '.join(map(str, (0, *LEVELS)))}",
        )
        require("data.foreground", self.foreground, 0 <= self.foreground <= 1, "must lie in [0, 1]")
        framed = self.frame >= 0 and self.frame % 4 == 0
        require("data.frame", self.frame, framed, "must be a multiple of 4, so that sides stay multiples of 8")
        require(
            "data.percentile",
            self.percentile,
            self.percentile == 0 or self.limits != "fixed",
            'must be 0 where data.limits is "fixed", which measures nothing',
        )
        for domain in ("source", "target"):
            low, high = getattr(self, f"{domain}_low"), getattr(self, f"{domain}_high")
            require(f"data.{domain}_low", low, low < high, f"must be less than data.{domain}_high ({high})")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetConfig(Config):
    """Shapes of the networks. Where v1 (AAAI 2019) and v2 (TMI 2020) differ, the default is v2."""

    classes: int = 2
    """Classes of the segmenters, background included."""

    width: float = 1.0
    """Factor on every hidden channel count; 1 is the published network, 0.125 trains on two CPU cores."""

    skip: bool = True
    """Whether generator and decoder add their input image before the last tanh."""

    channels: int = 1
    """Slices in an image: 3 shows the networks each slice between its two neighbours (2.5D), as published; masks and
    pictures are of the middle one."""

    low: bool = True
    """Whether there are an auxiliary segmenter C2 on the encoder's low tap, which supervises it deeply, and its critic
    D_p2; v1 has neither."""

    head_stride: HeadStride = 8
    """Pixels from one value to the next where C1 decides: 8 as published; 4 and 2 add units that read the encoder's
    finer maps, so that structures a few pixels wide can be drawn."""

    encoder_dropout: float = 0.0
    """Probability of the encoder's dropout after each convolution, in training; 0.25 in v1."""

    decoder_dropout: float = 0.25
    """The same in the decoder's residual units."""

    decoder_dropout_always: bool = True
    """Whether the decoder's dropout acts in evaluation too, as in the published code."""

    encoder_norm: EncoderNorm = "batch"
    """What normalises the encoder: `batch` norm shared by both domains, as published; the same with statistics of their
    own for translated and target images (`batch_per_domain`; scale and shift stay shared); `instance`; or `group`, with
    up to 16 channels a group. The last two treat training and evaluation alike."""

    batch_statistics: BatchStatistics = "running"
    """What batch norm normalises by: a batch's own statistics in training and their `running` mean in evaluation. Two
    defects of ports: `stale`, where the running mean is never updated, so that evaluation sees means of 0 and variances
    of 1; and `fixed`, where training sees these too."""

    batch_norm_over: BatchNormOver = "batch"
    """Whose slices make a batch's statistics: all of the `batch`, so that the number of workers changes no loss, or
    each `worker`'s own, which saves the exchange."""

    image_norm: ImageNorm = "instance"
    """What normalises generator and decoder; `none` is a defect of the 2022 port, which lost it."""

    critic_norm: CriticNorm = "instance"
    """What holds the critics: `instance` norm, as published; `spectral`, every convolution divided by its largest
    singular value (Miyato et al., ICLR 2018), instead of it; `both`; or `none`, the 2022 port's defect."""

    critic_bias: bool = False
    """Whether the critics' convolutions have biases."""

    critic_layers: CriticLayers = 3
    """Halvings in a critic: 3 as published, which sees patches of 70 pixels; 2 sees 34."""

    critic_channels: int = 64
    """Channels of a critic's first layer before `width`; the others follow by doubling."""

    initial: Initial = "truncated_normal"
    """How weights start: normal, cut at two sigma, as published, or `glorot` (Glorot and Bengio, 2010, uniform), the
    default of the framework that the 2022 study was ported to."""

    def __post_init__(self) -> None:
        """Check ranges."""
        Config.__post_init__(self)
        odd = self.channels >= 1 and self.channels % 2 == 1
        require("net.channels", self.channels, odd, "must be odd, so that there is a middle slice: 1 or 3")
        require("net.classes", self.classes, self.classes >= 2, "must be at least 2: background and one structure")
        require("net.width", self.width, 0 < self.width <= 4, "must lie in (0, 4]")
        require("net.critic_channels", self.critic_channels, self.critic_channels >= 1, "must be at least 1")
        for name in ("encoder_dropout", "decoder_dropout"):
            require(f"net.{name}", getattr(self, name), 0 <= getattr(self, name) < 1, "must lie in [0, 1)")
        require(
            "net.batch_statistics",
            self.batch_statistics,
            self.batch_statistics == "running" or self.encoder_norm.startswith("batch"),
            f'must be "running" where net.encoder_norm is {self.encoder_norm!r}, which has no such statistics',
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(Config):
    """Weights of the SIFA objective."""

    adversarial: AdversarialName = "lsgan"
    """The game that all critics play; see `games`. `rp` needs critic.penalty r1r2, `wgan_gp` needs gp."""

    lsgan_fake: float = 0.0
    """What a least-squares critic is to say of fakes (a of Mao et al., ICCV 2017)."""

    lsgan_real: float = 1.0
    """What it is to say of real images (b)."""

    lsgan_wanted: float = 1.0
    """What the other side wants it to say of fakes (c)."""

    critic_p_sees: CriticInput = "logits"
    """Whether D_p1 and D_p2 see the segmenters' `logits`, as published, or their `softmax`."""

    cycle: float = 10.0
    """L1 cycle term, both directions."""

    adv_image: float = 1.0
    """Adversarial term of the images x_st (critic D_t) and x_ts (critic D_s)."""

    identity: float = 0.0
    """L1 distance of G's translation of a target image from that image (CycleGAN); 0 leaves it out. The decoder has no
    such term, since the encoder never sees source images."""

    segmentation: float = 1.0
    """Factor on every segmentation loss: cross-entropy and Dice, both segmenters' games, the auxiliary game. 0 is
    CycleGAN, the 2022 study's "segmentation parameter 0"."""

    seg_low: float = 0.1
    """Cross-entropy and Dice of the auxiliary segmenter C2: how strongly the encoder is supervised deeply."""

    ce: float = 1.0
    """Cross-entropy."""

    cross_entropy: CrossEntropyName = "pixel"
    """How pixels count. Published: classes weighed by 1 - their share of the batch, mean over all pixels (`pixel`), by
    which a class of few pixels all but vanishes. `weight` divides by the sum of the pixels' weights instead, as
    PyTorch's weighted loss does; `balanced` lets every class of the batch count the same."""

    ce_clip: float = 0.005
    """Probability below which the cross-entropy is flat, as in the published code; 0 clips nothing."""

    dice: float = 1.0
    """The overlap term (alpha)."""

    overlap: OverlapName = "dice"
    """Which overlap: `dice` as published, `tversky` (Salehi 2017), or `focal_tversky` (Abraham 2019)."""

    tversky_missed: float = 0.7
    """Of both Tversky terms: weight of missed pixels; falsely found ones weigh 1 - this. 0.5 weighs both as Dice."""

    focal_exponent: float = 0.75
    """Of `focal_tversky`: each class's 1 - T is raised to this; below 1 it presses on what is nearly right."""

    cldice: float = 0.0
    """Soft-clDice (Shit 2021): overlap of centrelines, in the slice's plane; 0 leaves it out. A prediction of vessel
    everywhere has no centreline and costs nothing either: fresh networks fell for that (`studies/vessels.py`)."""

    cldice_iterations: int = 3
    """Erosions of its soft skeleton: at least the radius of the widest vessel in pixels."""

    adv_p: float = 0.1
    """Adversarial term of C1's predictions on target images (critic D_p1)."""

    adv_p_low_ratio: float = 0.1
    """The same for C2 (critic D_p2), as a multiple of `adv_p`."""

    adv_p_from_epoch: int = 0
    """First epoch, from 0, with a game of predictions; 5 in v1. See `optim.epoch_steps`."""

    adv_p_full_epoch: int = 0
    """Epoch from which the game of predictions has its whole weight, in equal rises; 7 in v1."""

    adv_p_warmup: float = 0.0
    """Share of the run in which the game of predictions gains its weight, linearly from 0; instead of the epochs."""

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
                signless = name.startswith("lsgan_")
                require(f"loss.{name}", value, signless or value >= 0, "must not be negative")
        require("loss.ce_clip", self.ce_clip, self.ce_clip < 1, "must lie in [0, 1)")
        require("loss.tversky_missed", self.tversky_missed, self.tversky_missed <= 1, "must lie in [0, 1]")
        require("loss.focal_exponent", self.focal_exponent, self.focal_exponent > 0, "must be positive")
        require("loss.cldice_iterations", self.cldice_iterations, self.cldice_iterations >= 1, "must be at least 1")
        require(
            "loss.lsgan_fake",
            self.lsgan_fake,
            self.lsgan_fake != self.lsgan_real,
            "must differ from loss.lsgan_real, or the critic has nothing to tell",
        )
        require(
            "loss.adv_p_full_epoch",
            self.adv_p_full_epoch,
            self.adv_p_full_epoch >= self.adv_p_from_epoch >= 0,
            f"must not come before loss.adv_p_from_epoch ({self.adv_p_from_epoch}), nor that before 0",
        )
        require("loss.adv_p_warmup", self.adv_p_warmup, self.adv_p_warmup <= 1, "must lie in [0, 1]")
        require(
            "loss.adv_p_warmup",
            self.adv_p_warmup,
            not (self.adv_p_warmup and self.adv_p_full_epoch),
            f"must be 0 where loss.adv_p_full_epoch ({self.adv_p_full_epoch}) says when the game is whole",
        )
        defaults = {leaf.name: leaf.default for leaf in fields(self)}
        tversky = self.overlap != "dice"
        for names, acts, where in (
            (("lsgan_fake", "lsgan_real", "lsgan_wanted"), self.adversarial == "lsgan", 'loss.adversarial is "lsgan"'),
            (("tversky_missed",), tversky, "loss.overlap is one of the Tversky losses"),
            (("focal_exponent",), self.overlap == "focal_tversky", 'loss.overlap is "focal_tversky"'),
            (("cldice_iterations",), self.cldice > 0, "loss.cldice is above 0"),
        ):
            for name in names:
                value, default = getattr(self, name), defaults[name]
                require(f"loss.{name}", value, acts or value == default, f"has no effect but where {where}")


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
    """`constant` (v2); `linear_half`: constant for half of the steps, then linearly to 0 (v1's option); or `cosine`:
    half a wave from the whole rate to 0 over the run."""

    clip: float = 0.0
    """Largest norm of a player's gradient, beyond which it is scaled down; 0 clips nothing."""

    ema: float = 0.999
    """Decay of the running mean of all weights but the critics'; both it and the raw weights are scored at every
    evaluation. It starts lower, at step n (1 + n) / (10 + n); 0 keeps none."""

    segmenter_decay: float = 1.0
    """Factor on the encoder's and segmenters' rate every `segmenter_decay_epochs`; 0.9 in v1."""

    segmenter_decay_epochs: int = 2
    """See `segmenter_decay`."""

    epoch_steps: int = 0
    """Steps in what schedules call an epoch; 0 takes the published count, the larger domain's training slices divided
    by the batch."""

    def __post_init__(self) -> None:
        """Check ranges."""
        Config.__post_init__(self)
        for name in ("lr", "lr_critic_ratio", "lr_segmenter_ratio", "segmenter_decay"):
            require(f"optim.{name}", getattr(self, name), getattr(self, name) > 0, "must be positive")
        require(
            "optim.segmenter_decay_epochs",
            self.segmenter_decay_epochs,
            self.segmenter_decay_epochs >= 1,
            "must be at least 1",
        )
        require("optim.clip", self.clip, self.clip >= 0, "must not be negative")
        require("optim.ema", self.ema, 0 <= self.ema < 1, "must lie in [0, 1)")
        require("optim.epoch_steps", self.epoch_steps, self.epoch_steps >= 0, "must not be negative")
        for name in ("beta1", "beta2"):
            require(f"optim.{name}", getattr(self, name), 0 <= getattr(self, name) < 1, "must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig(Config):
    """When a run counts as exploded, saturated, collapsed or blurry, and a critic as winning."""

    horizon_steps: int = 0
    """Steps over which the stability S is measured, so that runs of different lengths compare; 0 is the whole run."""

    block_steps: int = 50
    """Steps whose signals are averaged before they are judged, at 20 000 steps or more; see `monitor.Horizon`."""

    win_auc: float = 0.99
    """Patch AUC at which a critic tells all real from all fake patches."""

    cycle_growth: float = 1.5
    """Growth factor of a cycle loss that counts as an explosion."""

    loss_growth: float = 2.0
    """The same for the segmentation and the generator's total loss."""

    gap_growth: float = 3.0
    """The same for 1 + (E D(real) - E D(fake)) / scale, which stands in for a generator loss that may be negative."""

    saturation: float = 0.3
    """Share of pixels at the ends of tanh, beyond that of real images, at which a generator counts as saturated."""

    diversity: float = 0.2
    """Mean distance between translations, as a share of that between real images, below which they have collapsed."""

    foreground_factor: float = 10.0
    """A predicted foreground this many times larger, or smaller, than the source masks' counts as collapsed."""

    sharpness: float = 0.6
    """Energy of a translation's gradients, as a share of the real images', below which a run is blurry."""

    evaluations: int = 3
    """Evaluations in a row that must show a collapse, or blur."""

    def __post_init__(self) -> None:
        """Check ranges."""
        Config.__post_init__(self)
        require("monitor.horizon_steps", self.horizon_steps, self.horizon_steps >= 0, "must not be negative")
        for name in ("block_steps", "evaluations"):
            require(f"monitor.{name}", getattr(self, name), getattr(self, name) >= 1, "must be at least 1")
        require("monitor.win_auc", self.win_auc, 0.5 < self.win_auc <= 1, "must lie in (0.5, 1]")
        for name in ("cycle_growth", "loss_growth", "gap_growth", "foreground_factor"):
            require(f"monitor.{name}", getattr(self, name), getattr(self, name) > 1, "must exceed 1")
        require("monitor.saturation", self.saturation, 0 < self.saturation <= 1, "must lie in (0, 1]")
        for name in ("diversity", "sharpness"):
            require(f"monitor.{name}", getattr(self, name), 0 <= getattr(self, name) < 1, "must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedConfig(Config):
    """How a step is computed. Each choice changes numbers by rounding only: `tests/equipoise/test_speed.py`."""

    precision: Precision = "float32"
    """Of convolutions: `float32`; `tf32`, its faster cousin on NVIDIA cards since Ampere; or `bfloat16` autocast, with
    weights, norms' statistics, losses and images kept in float32."""

    channels_last: bool = False
    """Whether feature maps lie in memory with their channels together, as matrix units prefer."""

    compile: bool = False
    """Whether norms, activations and sums between convolutions are compiled into one kernel each; needs a C++
    compiler. For NVIDIA cards: on CPUs it is slower than not."""

    graphs: bool = False
    """Whether the whole step is recorded once and replayed as a CUDA graph, without the launches in between."""

    fused_adam: bool = False
    """Whether Adam moves all weights of a player in one kernel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Config):
    """A run, totally: the same object on the same store gives the same numbers; on cards but for rounding."""

    data: DataConfig = field(default_factory=DataConfig)
    net: NetConfig = field(default_factory=NetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)

    updates: Updates = "fused"
    """In which order networks are updated: `fused`, all on the images of one forward pass, several times cheaper; or
    `sequential`, one after another with the images made anew each time, as published. See `fused`, `sequential`."""

    steps: int = 20_000
    """Optimisations of the whole network, each on one batch of both domains."""

    batch: int = 8
    """Slices of each domain in a step, over all workers."""

    pool: int = 50
    """Batches of earlier translations that D_t and D_s are shown; 0 shows them the newest only."""

    pool_by: PoolBy = "batch"
    """What a pool stores and swaps: whole batches, as published, or single images, as CycleGAN does."""

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
            require(name, getattr(self, name), getattr(self, name) >= 1, "must be at least 1")
        require("pool", self.pool, self.pool >= 0, "must not be negative")
        require("seed", self.seed, self.seed >= 0, "must not be negative")
        require(
            "batch",
            self.batch,
            self.batch % self.workers == 0,
            f"must be a multiple of workers ({self.workers}), so that every worker takes the same share",
        )
        for path, value, plain, acts, where in (
            ("loss.seg_low", self.loss.seg_low, 0.1, self.net.low, "net.low"),
            ("loss.adv_p_low_ratio", self.loss.adv_p_low_ratio, 0.1, self.net.low, "net.low"),
            ("pool_by", self.pool_by, "batch", self.pool > 0, "a pool"),
            ("critic.smoothing", self.critic.smoothing, 0.0, self.loss.adversarial == "ns", 'loss.adversarial "ns"'),
        ):
            require(path, value, acts or value == plain, f"has no effect without {where}")
        require(
            "monitor.horizon_steps",
            self.monitor.horizon_steps,
            self.monitor.horizon_steps <= self.steps,
            f"must not exceed steps ({self.steps}): stability cannot be measured beyond the run's end",
        )
        self._check_penalty()
        balanced = self.balance.mode == "static" or self.loss.cycle > 0
        require("balance.mode", self.balance.mode, balanced, "needs loss.cycle above 0, by which it weighs the games")
        together = self.batch if self.net.batch_norm_over == "batch" else self.batch // self.workers
        alone = self.net.encoder_norm.startswith("batch") and self.net.batch_statistics != "fixed" and together == 1
        require(
            "batch",
            self.batch,
            not alone,
            "batch norm needs at least 2 slices a step (a worker, with net.batch_norm_over worker); take more, or set "
            "net.encoder_norm to instance or group",
        )

    def _check_penalty(self) -> None:
        """A game's penalty is the one that it needs, or one that it can have."""
        game, penalty = self.loss.adversarial, self.critic.penalty
        needed = {"rp": "r1r2", "wgan_gp": "gp"}.get(game)
        require(
            "critic.penalty",
            penalty,
            needed in (None, penalty),
            f"must be {needed!r} where loss.adversarial is {game!r}, which does not converge without it",
        )
        require(
            "critic.penalty",
            penalty,
            penalty != "gp" or game == "wgan_gp",
            f"belongs to loss.adversarial 'wgan_gp'; with {game!r} take none, r1, r1r2 or gp0_mix",
        )
        free = self.recovery.times == 0 or self.recovery.remedy != "penalty" or penalty == "none"
        require(
            "recovery.remedy",
            self.recovery.remedy,
            free,
            f"turns a penalty on, but critic.penalty is {penalty!r} already; take halve_rate",
        )


PUBLISHED = RunConfig()
"""SIFA v2 with its authors' settings; but for `updates`, where theirs is `sequential`."""

V1 = PUBLISHED.having(
    {
        "net.low": False,
        "net.encoder_dropout": 0.25,
        "loss.adv_p_full_epoch": 7,
        "loss.adv_p_from_epoch": 5,
        "optim.lr_segmenter_ratio": 5.0,
        "optim.segmenter_decay": 0.9,
    }
)
"""SIFA v1 (Chen et al., AAAI 2019): no auxiliary segmenter, dropout in the encoder, the critic of predictions joins
late, and the segmenters' rate of 1e-3 decays."""

STUDY_2022 = PUBLISHED.having(
    {"steps": 40_000, "batch": 4, "optim.lr": 2e-3, "data.limits": "pooled", "data.split": "slice"}
)
"""The settings of the 2022 study that blew up; its port's defects are not among them: see `DEFECTS`."""

DEFECTS: Mapping[str, Mapping[str, Leaf]] = MappingProxyType(
    {
        "no instance norm": {"net.image_norm": "none", "net.critic_norm": "none"},
        "stale batch norm": {"net.batch_statistics": "stale"},
        "fixed batch norm": {"net.batch_statistics": "fixed"},
        "glorot": {"net.initial": "glorot"},
        "grey frame": {"data.frame": 64},
        "pooled limits": {"data.limits": "pooled"},
        "split by slice": {"data.split": "slice"},
        "tenfold rate": {"optim.lr": 2e-3},
    }
)
"""What the 2022 port did otherwise than the published code, each as the settings that regenerate it alone. A store with
its very padding, crop and size is made by `equipoise prepare --preset seed2022`."""

VESSEL = PUBLISHED.having({"net.head_stride": 2, "loss.cross_entropy": "balanced"})
"""For structures a few pixels wide: the switches that helped in `studies/vessels.py`, and no others."""

PRESETS: Mapping[str, RunConfig] = MappingProxyType(
    {"published": PUBLISHED, "v1": V1, "study2022": STUDY_2022, "vessel": VESSEL}
)
"""Named runs."""


def nearest_preset(run: RunConfig) -> str:
    """Name of the preset from which a run differs in the fewest settings; of several, the first."""
    flat = run.flat()
    return min(PRESETS, key=lambda name: sum(flat[path] != leaf for path, leaf in PRESETS[name].flat().items()))
