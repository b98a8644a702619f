"""The published schedule: seven updates, one network after another, each on images made anew.

Knows the order and what each update must compute; must not know precision's or devices' details beyond the context it
calls networks in. `fused` says what is equal in both.

Each update computes what its own loss needs and no more, as the published code's graph does; what its player does not
move is made without a gradient. Of x_st and x_ts the pools get those that were made on the way to the updates of G and
U, before these moved. Batch norm's running statistics take in every pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.config import RunConfig
from equipoise.losses import cycle
from equipoise.nets import Critic, Segmenter, Sifa
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
from equipoise.players import Players, norms_of_sides
from equipoise.ranks import Ranks
from equipoise.referee import Matches, Referee
from equipoise.speed import autocast
from equipoise.step import Batch, Pools, Signals, extents, forward


def sequential(
    net: Sifa, players: Players, pools: Pools, batch: Batch, config: RunConfig, ranks: Ranks, referee: Referee
) -> Signals:
    """Update every network once, in the paper's order; returns this step's signals as scalars on the device."""
    seven = _Updates(net, players, batch, config, ranks, referee)
    st = seven.generator()
    seven.critic_t(pools.st(st))
    seven.segmenter()
    ts = seven.decoder()
    seven.critic_s(pools.ts(ts))
    seven.critic_p("p", net.segmenter, net.critic_p)
    if net.segmenter_low is not None and net.critic_p_low is not None:
        seven.critic_p("p_low", net.segmenter_low, net.critic_p_low)
    return {name: value.detach() for name, value in seven.told().items()}


class _Updates:
    """The updates of one step, and what they tell."""

    def __init__(
        self, net: Sifa, players: Players, batch: Batch, config: RunConfig, ranks: Ranks, referee: Referee
    ) -> None:
        self.net, self.players, self.batch, self.ranks = net, players, batch, ranks
        self.config, self.weight, self.referee = config, config.loss, referee
        self.size = (batch.source.shape[-2], batch.source.shape[-1])
        self.signals: Signals = {}
        self.norms: dict[str, Tensor] = {}

    def generator(self) -> Tensor:
        """G: both cycles, and D_t's opinion of x_st; returns x_st."""
        net, batch = self.net, self.batch
        with torch.no_grad(), self.amp():
            ts = net.decoder(net.encoder(batch.target, "target").high, batch.target)
        with self.amp():
            st: Tensor = net.generator(batch.source)
            sts = net.decoder(net.encoder(st, "translated").high, st)
            tst = net.generator(ts)
            see = self.referee.shown
            fooled = self.referee.fool(net.critic_t(see(st)), lambda: net.critic_t(see(batch.target)))
            terms = cycle_terms(batch, sts, tst) | {"loss/adv_t": fooled}
            if self.weight.identity:
                terms["loss/identity"] = cycle(batch.target, net.generator(batch.target))
        self.move("generator", image_loss(terms, self.weight, self.referee.balance))
        self.signals |= terms | extents(batch, {"st": st, "ts": ts, "sts": sts, "tst": tst})
        return st.detach()

    def critic_t(self, shown_st: Tensor) -> None:
        """D_t: target images from translated ones."""
        with self.amp():
            see = self.referee.shown
            matches = {"t": match(self.net.critic_t, see(self.batch.target), see(shown_st))}
        self.judge("critic_t", matches)

    def segmenter(self) -> None:
        """E, C1, C2: segment x_st, make predictions and features alike, and a share of the image losses."""
        net, batch, weight, referee = self.net, self.batch, self.weight, self.referee
        with self.amp():
            made = forward(net, batch.source, batch.target)
            on_ts = net.critic_s(referee.shown(made.ts))
            image = cycle_terms(batch, made.sts, made.tst)
            image["loss/adv_s"] = self.fool_s(on_ts)
        loss = weight.image_in_encoder * image_loss(image, weight, referee.balance)
        if weight.segmentation > 0:  # 0 is CycleGAN
            terms = segmentation_terms(made.logits_st, made.low_st, batch.label, weight, self.ranks.total)
            with self.amp():
                terms["loss/adv_p"] = fool_predictions(net.critic_p, made.logits_t, made.logits_st, referee)
                if net.critic_p_low is not None and made.low_t is not None and made.low_st is not None:
                    terms["loss/adv_p_low"] = fool_predictions(net.critic_p_low, made.low_t, made.low_st, referee)
                terms["loss/adv_aux"] = referee.fool(on_ts[:, 1:], lambda: net.critic_s(referee.shown(made.sts))[:, 1:])
            loss = loss + meaning_loss(terms, weight, referee.balance, referee.dials.predictions)
            self.signals |= terms
        self.move("segmenter", loss)

    def decoder(self) -> Tensor:
        """U: both cycles, and D_s's opinion of x_ts; returns x_ts."""
        net, batch = self.net, self.batch
        with torch.no_grad(), self.amp():
            st = net.generator(batch.source)
            high_st, high_t = net.encoder(st, "translated").high, net.encoder(batch.target, "target").high
        with self.amp():
            ts: Tensor = net.decoder(high_t, batch.target)
            sts = net.decoder(high_st, st)
            tst = net.generator(ts)
            fooled = self.fool_s(net.critic_s(self.referee.shown(ts)))
        terms = cycle_terms(batch, sts, tst) | {"loss/adv_s": fooled}
        self.move("decoder", image_loss(terms, self.weight, self.referee.balance))
        self.signals["loss/adv_s"] = terms["loss/adv_s"]
        return ts.detach()

    def critic_s(self, shown_ts: Tensor) -> None:
        """D_s: source images from translated ones, and, by its second output, round trips from translations."""
        net, batch = self.net, self.batch
        with torch.no_grad(), self.amp():
            st = net.generator(batch.source)
            sts = net.decoder(net.encoder(st, "translated").high, st)
        with self.amp():
            see = self.referee.shown
            matches = matches_s(net.critic_s, see(batch.source), see(shown_ts), see(sts))
        self.judge("critic_s", matches)

    def critic_p(self, name: str, segmenter: Segmenter, critic: Critic) -> None:
        """D_p1 or D_p2: a segmenter's predictions on translated source images from those on target images."""
        net, batch, weight = self.net, self.batch, self.weight
        with torch.no_grad(), self.amp():
            st = net.generator(batch.source)
            logits_st = segmenter(net.encoder(st, "translated"), self.size)
            logits_t = segmenter(net.encoder(batch.target, "target"), self.size)
        with self.amp():
            matches = {name: match(critic, shown(logits_st, weight), shown(logits_t, weight))}
        self.judge(f"critic_{name}", matches)

    def fool_s(self, on_ts: Tensor) -> Tensor:
        """What makes x_ts pass for a source image."""
        net, source = self.net, self.batch.source
        return self.referee.fool(on_ts[:, :1], lambda: net.critic_s(self.referee.shown(source))[:, :1])

    def judge(self, name: str, matches: Matches) -> None:
        """Update a critic by its games."""
        loss, signals = self.referee.judge(matches)
        self.move(name, loss)
        self.signals |= signals

    def move(self, name: str, loss: Tensor) -> None:
        """Update one player by its loss; what the loss does not reach stands still."""
        own = self.players[name]
        found = torch.autograd.grad(loss, own, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)]
        self.norms |= self.players.move({name: gradients}, self.ranks)

    def amp(self) -> torch.autocast:
        """The context in which networks are called."""
        return autocast(self.config.speed, self.batch.source.device)

    def told(self) -> Signals:
        """All signals of the step."""
        terms = self.signals
        total = image_loss(terms, self.weight, self.referee.balance)
        return terms | {"loss/generator": total} | norms_of_sides(self.norms)
