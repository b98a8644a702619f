"""The terms of SIFA's objective, put together with their weights.

Knows which terms there are and how a run weighs them; must not know which network made an image, nor in which order
networks are updated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from equipoise import losses
from equipoise.balance import Balance
from equipoise.config import LossConfig
from equipoise.losses import Total
from equipoise.nets import Critic
from equipoise.referee import Match, Matches, Referee
from equipoise.step import Batch, Signals


def cycle_terms(batch: Batch, sts: Tensor, tst: Tensor) -> Signals:
    """Both round trips, unweighted."""
    return {"loss/cycle_s": losses.cycle(batch.source, sts), "loss/cycle_t": losses.cycle(batch.target, tst)}


def image_loss(terms: Signals, weight: LossConfig, balance: Balance) -> Tensor:
    """Cycles, games of the images and G's identity, as far as `terms` holds them.

    Of the published losses of G and U each lacks a game that it does not move (x_ts does not depend on G, x_st not on
    U), so that their sum serves both.
    """
    games = [terms[name] for name in ("loss/adv_t", "loss/adv_s") if name in terms]
    cycles = weight.cycle * (terms["loss/cycle_s"] + terms["loss/cycle_t"])
    loss = cycles + weight.adv_image * (balance.adv_image * torch.stack(games).sum())
    return loss + weight.identity * terms["loss/identity"] if "loss/identity" in terms else loss


def segmentation_terms(logits: Tensor, low: Tensor | None, label: Tensor, weight: LossConfig, total: Total) -> Signals:
    """What both segmenters' predictions on x_st lack: C1's terms unweighted, and each segmenter's weighted sum."""
    own = losses.segmentation_loss(logits, label, weight, total=total)
    signals = {f"loss/{name}": value for name, value in own.items()} | {"loss/segmentation": _weighed(own, weight)}
    if low is not None:
        signals["loss/seg_low"] = _weighed(losses.segmentation_loss(low, label, weight, total=total), weight)
    return signals


def meaning_loss(terms: Signals, weight: LossConfig, balance: Balance, ramp: Tensor) -> Tensor:
    """Every segmentation loss and the games that align predictions and features.

    Args:
        terms: those of `segmentation_terms`, and `loss/adv_p`, `loss/adv_aux` and, with C2, `loss/adv_p_low`.
        weight: the weights.
        balance: what they are multiplied by.
        ramp: how much of their weight the games of predictions have reached, in [0, 1].
    """
    games = balance.adv_p * ramp
    loss = terms["loss/segmentation"] + weight.aux * (balance.aux * terms["loss/adv_aux"])
    loss = loss + weight.adv_p * (games * terms["loss/adv_p"])
    if "loss/seg_low" in terms:
        loss = loss + weight.seg_low * terms["loss/seg_low"]
        loss = loss + weight.adv_p * weight.adv_p_low_ratio * (games * terms["loss/adv_p_low"])
    return weight.segmentation * loss


def match(critic: Critic, real: Tensor, fake: Tensor) -> Match:
    """A critic's game, both sides in one call: it judges every image by itself."""
    on_real, on_fake = critic(torch.cat([real, fake])).chunk(2)
    return Match(critic, real, fake, on_real, on_fake)


def matches_s(critic: Critic, source: Tensor, ts: Tensor, sts: Tensor) -> Matches:
    """D_s: source images from translated ones, and, by its second output, round trips from translations."""
    real, fake, round_trip = critic(torch.cat([source, ts, sts])).chunk(3)
    return {
        "s": Match(lambda x: critic(x)[:, :1], source, ts, real[:, :1], fake[:, :1]),
        "aux": Match(lambda x: critic(x)[:, 1:], sts, ts, round_trip[:, 1:], fake[:, 1:]),
    }


def shown(logits: Tensor, weight: LossConfig) -> Tensor:
    """What the critics of predictions see of them."""
    if weight.critic_p_sees == "logits":
        return logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)


def fool_predictions(critic: Critic, fake: Tensor, real: Tensor, referee: Referee) -> Tensor:
    """What a segmenter minimises to make its logits on target images pass for those on translated ones."""
    weight = referee.config.loss
    return referee.fool(critic(shown(fake, weight)), lambda: critic(shown(real, weight)))


def _weighed(terms: Mapping[str, Tensor], weight: LossConfig) -> Tensor:
    loss = weight.ce * terms["ce"] + weight.dice * terms["overlap"]
    return loss + weight.cldice * terms["cldice"] if "cldice" in terms else loss
