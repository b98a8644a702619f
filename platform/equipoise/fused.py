"""The fused schedule: one forward pass, every gradient from it, then all players move at once.

Knows which gradient moves which network and how none is computed twice; must not know precision's or devices' details
beyond the context it calls networks in.

What is equal to the published order (`sequential`) and what is not. Every player's loss, as a function of the weights,
is the same, and so is its gradient at the weights and images that the step begins with: of one step the updates of G
and D_t are exactly those of `sequential`, given the same dropout. What differs is the point at which the others'
gradients are taken: here at the beginning of the step, there after the players before them have moved, by one learning
rate's worth. Dropout is drawn once here and anew for every update there; batch norm's running statistics take each
batch in once here and once for every pass there. Both are judged by `studies/schedules.py`.

Why the encoder is cut out of the graph. G and U follow the image losses, E follows the segmentation losses and a tenth
of the image losses. Two plain backward passes would go through the encoder, the dearest network, twice on both images.
Here each of its outputs is a leaf from which the rest of the graph starts; both losses leave their gradients there. The
encoder is then passed once for its own weights, with the sum that it is meant to follow, and once more for x_st alone,
without weights, to hand the image losses on to G. A backward pass is linear in what it is given, so this is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.config import RunConfig
from equipoise.losses import cycle
from equipoise.nets import Features, Sifa
from equipoise.objective import (
    cycle_terms,
    fool_predictions,
    image_loss,
    match,
    matches_s,
    meaning_loss,
    segmentation_terms,
    shown,
)
from equipoise.players import SIDES, Players, norms_of_sides
from equipoise.ranks import Ranks
from equipoise.referee import Matches, Referee
from equipoise.speed import autocast
from equipoise.step import Batch, Images, Pools, Signals, extents, images_of


class _Cut(NamedTuple):
    """The encoder's features of one batch: the ends of its graph, and the leaves from which all else starts."""

    ends: list[Tensor]
    leaves: list[Tensor]
    read: Features

    @classmethod
    def of(cls, features: Features) -> _Cut:
        ends = [features.high, features.low, *features.fine]
        leaves = [_leaf(end) for end in ends]
        return cls(ends, leaves, Features(high=leaves[0], low=leaves[1], fine=tuple(leaves[2:])))


class _Pass(NamedTuple):
    """One forward pass: what is made, what the critics say of it, and where the graph is cut."""

    images: Images
    leaf_st: Tensor
    cut_st: _Cut
    cut_t: _Cut
    on_st: Tensor
    on_ts: Tensor


def fused(
    net: Sifa, players: Players, pools: Pools, batch: Batch, config: RunConfig, ranks: Ranks, referee: Referee
) -> Signals:
    """Update every network once; returns this step's signals as scalars on the device, without waiting for it."""
    made = _forward(net, batch, config, referee)
    signals, of_images, into_leaves = _image_gradients(net, players, made, batch, config, referee)
    terms, of_heads, meaning = _meaning_gradients(net, players, made, batch, config, ranks, referee)
    to_st, image_st, image_t = into_leaves
    (through,) = torch.autograd.grad(made.cut_st.ends[0], made.leaf_st, image_st, retain_graph=True)
    of_encoder = _encoder_gradients(net, made, meaning, (image_st, image_t), config.loss.image_in_encoder)
    of_generator = torch.autograd.grad(made.images.st, players["generator"], to_st + through)
    torch._foreach_add_(of_images["generator"], of_generator)

    images = made.images.detached()
    signals = {name: value.detach() for name, value in (signals | terms).items()}
    del made, terms  # and the graph, before the critics build theirs
    told, of_critics = _critic_gradients(net, players, pools, images, batch, config, referee)
    signals |= told | extents(batch, images._asdict())
    norms = players.move({**of_images, "segmenter": [*of_encoder, *of_heads], **of_critics}, ranks)
    signals |= norms_of_sides(norms)
    return {name: value.detach() for name, value in signals.items()}


def _forward(net: Sifa, batch: Batch, config: RunConfig, referee: Referee) -> _Pass:
    """`step.forward`, cut at x_st and at the encoder's features."""
    with autocast(config.speed, batch.source.device):
        st = net.generator(batch.source)
        leaf_st = _leaf(st)
        cut_st = _Cut.of(net.encoder(leaf_st, "translated"))
        cut_t = _Cut.of(net.encoder(batch.target, "target"))
        images = images_of(net, leaf_st, cut_st.read, batch.target, cut_t.read)._replace(st=st)
        on_st, on_ts = net.critic_t(referee.shown(leaf_st)), net.critic_s(referee.shown(images.ts))
        return _Pass(images, leaf_st, cut_st, cut_t, on_st, on_ts)


def _image_gradients(
    net: Sifa, players: Players, made: _Pass, batch: Batch, config: RunConfig, referee: Referee
) -> tuple[Signals, dict[str, list[Tensor]], list[Tensor]]:
    """G and U: both cycles, and each translation's critic.

    Returns:
        Signals; the gradients of G, as far as it made x_tst, and U; those of x_st and of the features of x_st and x_t.
    """
    signals = cycle_terms(batch, made.images.sts, made.images.tst)
    with autocast(config.speed, batch.source.device):
        signals["loss/adv_t"] = referee.fool(made.on_st, lambda: net.critic_t(referee.shown(batch.target)))
        on_ts = made.on_ts[:, :1]
        signals["loss/adv_s"] = referee.fool(on_ts, lambda: net.critic_s(referee.shown(batch.source))[:, :1])
        if config.loss.identity:
            signals["loss/identity"] = cycle(batch.target, net.generator(batch.target))
    signals["loss/generator"] = image_loss(signals, config.loss, referee.balance)
    sides: list[list[Tensor]] = [
        [*players["generator"]],
        [*players["decoder"]],
        [made.leaf_st, made.cut_st.leaves[0], made.cut_t.leaves[0]],
    ]
    found = iter(torch.autograd.grad(signals["loss/generator"], [x for side in sides for x in side], retain_graph=True))
    of_generator, of_decoder, into_leaves = ([next(found) for _ in side] for side in sides)
    return signals, {"generator": of_generator, "decoder": of_decoder}, into_leaves


def _meaning_gradients(
    net: Sifa, players: Players, made: _Pass, batch: Batch, config: RunConfig, ranks: Ranks, referee: Referee
) -> tuple[Signals, list[Tensor], list[Tensor | None]]:
    """E, C1, C2: segment the translated source; make predictions and features alike.

    Returns:
        Signals; the gradients of C1 and C2; those of the encoder's features, None where no loss reads them.
    """
    heads = players["segmenter"][len(list(net.encoder.parameters())) :]
    leaves = [*made.cut_st.leaves, *made.cut_t.leaves]
    weight, images = config.loss, made.images
    if weight.segmentation == 0:  # CycleGAN
        return {}, [torch.zeros_like(p) for p in heads], [None for _ in leaves]
    signals = segmentation_terms(images.logits_st, images.low_st, batch.label, weight, ranks.total)
    with autocast(config.speed, batch.source.device):
        signals["loss/adv_p"] = fool_predictions(net.critic_p, images.logits_t, images.logits_st, referee)
        if net.critic_p_low is not None and images.low_t is not None and images.low_st is not None:
            signals["loss/adv_p_low"] = fool_predictions(net.critic_p_low, images.low_t, images.low_st, referee)
        on_aux = made.on_ts[:, 1:]
        signals["loss/adv_aux"] = referee.fool(on_aux, lambda: net.critic_s(referee.shown(images.sts))[:, 1:])
    found = torch.autograd.grad(
        meaning_loss(signals, weight, referee.balance, referee.dials.predictions), [*heads, *leaves], allow_unused=True
    )
    return signals, [*found[: len(heads)]], [*found[len(heads) :]]


def _encoder_gradients(
    net: Sifa, made: _Pass, meaning: list[Tensor | None], image: tuple[Tensor, Tensor], share: float
) -> list[Tensor]:
    """E: the segmentation losses and a share of the image losses, which reach it through U by its high features."""
    ends, into = [*made.cut_st.ends, *made.cut_t.ends], meaning.copy()
    for place, gradient in zip((0, len(made.cut_st.ends)), image, strict=True):
        mine = into[place]
        into[place] = share * gradient if mine is None else mine + share * gradient
    followed = [(end, gradient) for end, gradient in zip(ends, into, strict=True) if gradient is not None]
    outputs, gradients = zip(*followed, strict=True)
    return list(torch.autograd.grad(outputs, list(net.encoder.parameters()), gradients))


def _critic_gradients(
    net: Sifa,
    players: Players,
    pools: Pools,
    images: Images,
    batch: Batch,
    config: RunConfig,
    referee: Referee,
) -> tuple[Signals, dict[str, list[Tensor]]]:
    """All critics: tell real from fake, on the images that the others were moved by and on earlier ones."""
    weight, see = config.loss, referee.shown
    with autocast(config.speed, batch.source.device):
        matches: Matches = {
            "t": match(net.critic_t, see(batch.target), see(pools.st(images.st))),
            **matches_s(net.critic_s, see(batch.source), see(pools.ts(images.ts)), see(images.sts)),
            "p": match(net.critic_p, shown(images.logits_st, weight), shown(images.logits_t, weight)),
        }
        if net.critic_p_low is not None and images.low_st is not None and images.low_t is not None:
            low = match(net.critic_p_low, shown(images.low_st, weight), shown(images.low_t, weight))
            matches = {**matches, "p_low": low}
    loss, signals = referee.judge(matches)
    names = [name for name in SIDES["critic"] if name in players]
    found = iter(torch.autograd.grad(loss, [p for name in names for p in players[name]]))
    return signals, {name: [next(found) for _ in players[name]] for name in names}


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
