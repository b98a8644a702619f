"""The networks of SIFA, v2 (Chen et al., IEEE TMI 2020) and v1 (AAAI 2019), one a file, and `Sifa`, which owns them.

Knows which networks there are and what each is built with; must not know how they are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from equipoise.config import NetConfig
from equipoise.nets.critic import Critic
from equipoise.nets.decoder import Decoder
from equipoise.nets.encoder import Encoder, Features
from equipoise.nets.generator import Generator
from equipoise.nets.inference import Inference, encoder, segmenter
from equipoise.nets.layers import compile_tails, initialise_glorot
from equipoise.nets.norms import BatchNorm, Domain, hold_spectrally
from equipoise.nets.segmenter import Segmenter

__all__ = ["Critic", "Decoder", "Domain", "Encoder", "Features", "Generator", "Inference", "Segmenter", "Sifa"]


class Sifa(nn.Module):
    """All networks of a run; s is the source (labelled), t the target.

    | symbol | attribute     | maps                                                              |
    |--------|---------------|-------------------------------------------------------------------|
    | G      | generator     | x_s -> x_st; x_ts -> x_tst                                         |
    | E      | encoder       | x_t, x_st -> Features(high, low, fine)                             |
    | U      | decoder       | E(x_t).high, x_t -> x_ts; E(x_st).high, x_st -> x_sts              |
    | C1     | segmenter     | Features, (H, W) -> logits; reads .high, and .fine if told         |
    | C2     | segmenter_low | Features, (H, W) -> logits; reads .low. None in v1                 |
    | D_t    | critic_t      | x_t, x_st -> patch logits                                          |
    | D_s    | critic_s      | x_s, x_ts, x_sts -> patch logits: [:, :1] source or translated, [:, 1:] auxiliary |
    | D_p1   | critic_p      | logits of C1 -> patch logits                                       |
    | D_p2   | critic_p_low  | logits of C2 -> patch logits. None in v1                           |

    Images are (B, channels, H, W) in [-1, 1]. Three channels are neighbouring slices: G and U add one map to all of
    them, and D_t and D_s judge the middle one.
    """

    def __init__(self, config: NetConfig = NetConfig()) -> None:  # noqa: B008 - frozen
        """Draw initial weights from torch's global generator."""
        super().__init__()
        classes, channels, width = config.classes, config.channels, config.width
        norm = config.image_norm
        self.batch_norm_over = config.batch_norm_over
        self.generator = Generator(channels=channels, width=width, skip=config.skip, norm=norm)
        self.encoder = encoder(config)
        self.decoder = Decoder(
            width=width,
            skip=config.skip,
            norm=norm,
            dropout=config.decoder_dropout,
            dropout_always=config.decoder_dropout_always,
        )
        self.segmenter = segmenter(config)
        self.segmenter_low = Segmenter(classes=classes, width=width, tap="low") if config.low else None
        critic = partial(
            Critic,
            width=width,
            norm="instance" if config.critic_norm in ("instance", "both") else "none",
            bias=config.critic_bias,
            layers=config.critic_layers,
            channels=config.critic_channels,
        )
        self.critic_t = critic(1, 1, stack=channels)
        self.critic_s = critic(1, 2, stack=channels)
        self.critic_p = critic(classes, 1)
        self.critic_p_low = critic(classes, 1) if config.low else None
        if config.initial == "glorot":
            initialise_glorot(self)
        if config.critic_norm in ("spectral", "both"):  # last: it stands between a kernel and whoever sets it
            for name, part in self.named_children():
                if name.startswith("critic"):
                    hold_spectrally(part)

    def forward(self, image: Tensor) -> Tensor:
        """Inference, C1(E(x_t)): target images (B, channels, H, W) -> logits (B, classes, H, W)."""
        height, width = image.shape[-2:]
        logits: Tensor = self.segmenter(self.encoder(image), (height, width))
        return logits

    def join_statistics(self, total: Callable[[Tensor], Tensor]) -> None:
        """Take batch norm's statistics over all workers' slices, unless the configuration wants each worker's own.

        Args:
            total: the sum of a tensor over all workers; on the way back it sums gradients over them too.
        """
        if self.batch_norm_over == "batch":
            eager = torch.compiler.disable(total)  # an exchange between processes is no part of a compiled tail
            for module in self.modules():
                if isinstance(module, BatchNorm):
                    module.total = eager

    def compile_tails(self) -> None:
        """Compile what lies between convolutions; see `layers.compile_tails`."""
        compile_tails(self)
