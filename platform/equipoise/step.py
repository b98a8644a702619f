"""One optimisation of the whole network on one batch.

Knows the order of the updates and which loss moves which network; knows nothing of logging, devices or records.

The `fused` schedule: a shared forward serves generator, decoder, encoder and segmenters; then all critics are updated
on the same images. The published code re-runs the graph after every update, so that there a later player sees the
earlier one's new weights; here all players of a phase see the weights of its beginning. The losses are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam

from equipoise import losses
from equipoise.config import OptimConfig, RunConfig
from equipoise.nets import Sifa
from equipoise.pool import ImagePool
from equipoise.ranks import Ranks

Signals = dict[str, Tensor]


class Batch(NamedTuple):
    """Slices of both domains, unpaired."""

    source: Tensor
    """`(B, C, H, W)` in [-1, 1]; C slices, of which the middle one is labelled."""
    label: Tensor
    """Class indices of `source`, `(B, H, W)` int64."""
    target: Tensor
    """`(B, C, H, W)` in [-1, 1]."""


class Images(NamedTuple):
    """What one forward makes of a batch, named as in the paper."""

    st: Tensor
    ts: Tensor
    sts: Tensor
    tst: Tensor
    logits_st: Tensor
    logits_t: Tensor
    low_st: Tensor
    low_t: Tensor


def forward(net: Sifa, source: Tensor, target: Tensor) -> Images:
    """Translate both ways, there and back, and segment both target-style images."""
    size = (source.shape[-2], source.shape[-1])
    st = net.generator(source)
    features_st, features_t = net.encoder(st), net.encoder(target)
    ts = net.decoder(features_t.high, target)
    return Images(
        st=st,
        ts=ts,
        sts=net.decoder(features_st.high, st),
        tst=net.generator(ts),
        logits_st=net.segmenter(features_st.high, size),
        logits_t=net.segmenter(features_t.high, size),
        low_st=net.segmenter_low(features_st.low, size),
        low_t=net.segmenter_low(features_t.low, size),
    )


class Player(NamedTuple):
    """Networks that one optimiser moves."""

    parameters: list[nn.Parameter]
    optimiser: Adam

    @classmethod
    def of(cls, nets: Sequence[nn.Module], **settings: Any) -> Player:
        """A player that owns all weights of `nets`."""
        parameters = [p for net in nets for p in net.parameters()]
        return cls(parameters, Adam(parameters, **settings))

    def move(self, gradients: Sequence[Tensor], ranks: Ranks) -> Tensor:
        """Step along the mean gradient over ranks; returns its norm, so that a non-finite one is seen."""
        gradients = ranks.average(gradients)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimiser.step()
        norm: Tensor = torch.stack(torch._foreach_norm(gradients)).norm()
        return norm


class Players:
    """The three sides of the game: images (G, U), meaning (E, C1, C2), critics (all D)."""

    def __init__(self, net: Sifa, config: OptimConfig, l2: float) -> None:
        images = (config.beta1, config.beta2)
        self.generators = Player.of([net.generator, net.decoder], lr=config.lr, betas=images)
        # Adam's weight_decay adds l2 * w to the gradient: exactly the gradient of l2 / 2 |w|^2 over all these weights.
        self.segmenters = Player.of(
            [net.encoder, net.segmenter, net.segmenter_low],
            lr=config.lr * config.lr_segmenter_ratio,
            betas=(0.9, config.beta2),
            weight_decay=l2,
        )
        self.critics = Player.of(
            [net.critic_t, net.critic_s, net.critic_p, net.critic_p_low],
            lr=config.lr * config.lr_critic_ratio,
            betas=images,
        )
        self._all = {"generators": self.generators, "segmenters": self.segmenters, "critics": self.critics}
        self._rates = {name: player.optimiser.param_groups[0]["lr"] for name, player in self._all.items()}

    def scale_rates(self, factor: float) -> None:
        """Set every learning rate to `factor` times its initial value."""
        for name, player in self._all.items():
            player.optimiser.param_groups[0]["lr"] = self._rates[name] * factor

    def state_dict(self) -> dict[str, Any]:
        """The optimisers' states."""
        return {name: player.optimiser.state_dict() for name, player in self._all.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        for name, player in self._all.items():
            player.optimiser.load_state_dict(state[name])


class Pools(NamedTuple):
    """Earlier translations that D_t and D_s are shown."""

    st: ImagePool
    ts: ImagePool


def step(net: Sifa, players: Players, pools: Pools, batch: Batch, config: RunConfig, ranks: Ranks) -> Signals:
    """Update every network once; returns this step's signals as scalars on the device, without waiting for it."""
    images = forward(net, batch.source, batch.target)
    signals = _update_generators_and_segmenters(net, players, images, batch, config, ranks)
    signals |= _update_critics(net, players, pools, Images(*(x.detach() for x in images)), batch, config, ranks)
    with torch.no_grad():
        signals["saturation/t"] = _saturated(images.tst) - _saturated(batch.target)
        signals["saturation/s"] = _saturated(images.sts) - _saturated(batch.source)
    return {name: value.detach() for name, value in signals.items()}


def _update_generators_and_segmenters(
    net: Sifa, players: Players, images: Images, batch: Batch, config: RunConfig, ranks: Ranks
) -> Signals:
    weight, fool = config.loss, losses.ADVERSARIAL[config.loss.adversarial].generator
    on_ts = net.critic_s(images.ts)

    # G and U: both cycles, and each translation's critic. x_st's game does not reach U nor E, x_ts's does not reach G.
    signals = {
        "loss/cycle_s": losses.cycle(batch.source, images.sts),
        "loss/cycle_t": losses.cycle(batch.target, images.tst),
        "loss/adv_t": fool(net.critic_t(images.st)),
        "loss/adv_s": fool(on_ts[:, :1]),
    }
    image_loss = weight.cycle * (signals["loss/cycle_s"] + signals["loss/cycle_t"]) + weight.adv_image * (
        signals["loss/adv_t"] + signals["loss/adv_s"]
    )
    signals["loss/generator"] = image_loss

    # E, C1, C2: segment the translated source, make predictions and features alike, and a share of the image loss.
    meaning_loss, parts = _segmentation(net, images, batch, config, on_ts, fool, ranks)
    signals |= parts

    generators, segmenters = players.generators, players.segmenters
    image_grads = torch.autograd.grad(
        image_loss, [*generators.parameters, *net.encoder.parameters()], retain_graph=True
    )
    own, into_encoder = image_grads[: len(generators.parameters)], image_grads[len(generators.parameters) :]
    if meaning_loss is None:
        meaning_grads = [torch.zeros_like(p) for p in segmenters.parameters]
    else:
        meaning_grads = list(torch.autograd.grad(meaning_loss, segmenters.parameters))
    torch._foreach_add_(meaning_grads[: len(into_encoder)], list(into_encoder), alpha=weight.image_in_encoder)

    signals["grad/generator"] = generators.move(own, ranks)
    signals["grad/segmenter"] = segmenters.move(meaning_grads, ranks)
    return signals


def _segmentation(
    net: Sifa,
    images: Images,
    batch: Batch,
    config: RunConfig,
    on_ts: Tensor,
    fool: Callable[[Tensor], Tensor],
    ranks: Ranks,
) -> tuple[Tensor | None, Signals]:
    """Every segmentation loss, or None where all are 0 (CycleGAN)."""
    weight = config.loss
    if weight.segmentation == 0:
        return None, {}
    signals = {
        "loss/ce": losses.cross_entropy(images.logits_st, batch.label, total=ranks.total),
        "loss/dice": losses.dice_loss(images.logits_st, batch.label, total=ranks.total),
        "loss/seg_low": losses.cross_entropy(images.low_st, batch.label, total=ranks.total)
        + losses.dice_loss(images.low_st, batch.label, total=ranks.total),
        "loss/adv_p": fool(net.critic_p(images.logits_t)),
        "loss/adv_p_low": fool(net.critic_p_low(images.low_t)),
        "loss/adv_aux": fool(on_ts[:, 1:]),
    }
    signals["loss/segmentation"] = signals["loss/ce"] + signals["loss/dice"]
    loss = (
        signals["loss/segmentation"]
        + weight.seg_low * signals["loss/seg_low"]
        + weight.adv_p * signals["loss/adv_p"]
        + weight.adv_p * weight.adv_p_low_ratio * signals["loss/adv_p_low"]
        + weight.aux * signals["loss/adv_aux"]
    )
    return weight.segmentation * loss, signals


def _update_critics(
    net: Sifa, players: Players, pools: Pools, images: Images, batch: Batch, config: RunConfig, ranks: Ranks
) -> Signals:
    tell = losses.ADVERSARIAL[config.loss.adversarial].critic
    fake_s = net.critic_s(pools.ts(images.ts))
    seen = {
        # D_t: target images from translated ones.
        "t": (net.critic_t(batch.target), net.critic_t(pools.st(images.st))),
        # D_s: source images from translated ones, and, by its second output, round trips from translations.
        "s": (net.critic_s(batch.source)[:, :1], fake_s[:, :1]),
        "aux": (net.critic_s(images.sts)[:, 1:], fake_s[:, 1:]),
        # D_p1, D_p2: predictions on translated source images from those on target images.
        "p": (net.critic_p(images.logits_st), net.critic_p(images.logits_t)),
        "p_low": (net.critic_p_low(images.low_st), net.critic_p_low(images.low_t)),
    }
    signals = {f"critic/loss_{name}": tell(real, fake) for name, (real, fake) in seen.items()}
    gradients = torch.autograd.grad(torch.stack(list(signals.values())).sum(), players.critics.parameters)
    signals["grad/critic"] = players.critics.move(gradients, ranks)
    with torch.no_grad():
        for name, (real, fake) in seen.items():
            signals[f"auc/{name}"] = losses.patch_auc(real, fake)
            signals[f"critic/gap_{name}"] = 1 + (real.mean() - fake.mean()).clamp(min=0)
    return signals


def _saturated(image: Tensor) -> Tensor:
    """Share of pixels at the ends of tanh, where its gradient is dead."""
    return (image.abs() > 0.99).float().mean()
