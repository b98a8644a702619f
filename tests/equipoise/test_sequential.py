"""The published order of updates, held against the fused one and against forward passes of its own.

Everything is in float64 without dropout, as in `test_step`; batch norm normalises by the batch's own statistics in both
schedules, so its running statistics, which they gather differently, play no part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from equipoise.config import LossConfig, NetConfig, OptimConfig, RunConfig
from equipoise.config_base import Leaf
from equipoise.nets import Sifa
from equipoise.players import Players
from equipoise.pool import ImagePool
from equipoise.ranks import Ranks
from equipoise.referee import Referee
from equipoise.step import Batch, Pools, Signals
from equipoise.train import UPDATES

ORDER = ["generator", "critic_t", "segmenter", "decoder", "critic_s", "critic_p", "critic_p_low"]
OWNS = {"segmenter": {"encoder", "segmenter", "segmenter_low"}}
WEIGHTS = LossConfig(
    cycle=7.0, adv_image=1.3, segmentation=0.9, seg_low=0.3, adv_p=0.4, adv_p_low_ratio=0.6, aux=0.7,
    image_in_encoder=0.2,
)  # fmt: skip


def make_net(net: NetConfig) -> Sifa:
    torch.manual_seed(0)
    made = Sifa(net).double().train()
    for module in made.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data *= 5
    return made


def run(lr: float, *, low: bool = True) -> RunConfig:
    net = NetConfig(width=0.0625, decoder_dropout=0.0)
    weights = WEIGHTS if low else WEIGHTS.at("seg_low", 0.1).at("adv_p_low_ratio", 0.1)  # they have nothing to weigh
    return RunConfig(net=net, loss=weights, optim=OptimConfig(lr=lr))


def make_batch(config: RunConfig = RunConfig()) -> Batch:  # noqa: B008 - frozen
    g = torch.Generator().manual_seed(1)
    shape = (2, config.net.channels, 32, 32)
    source, target = (torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return Batch(source, torch.randint(0, config.net.classes, (2, 32, 32), generator=g), target)


class Watched(Players):
    """Players that call back after every move."""

    after: Callable[[Sequence[str]], None]

    def move(self, gradients: Mapping[str, Sequence[Tensor]], ranks: Ranks) -> dict[str, Tensor]:
        norms = super().move(gradients, ranks)
        self.after(list(gradients))
        return norms


class Noted:
    """A pool of size 0 that keeps what it was given."""

    def __init__(self) -> None:
        self.given = list[Tensor]()

    def turn(self, batch: int, device: torch.device) -> None:
        pass

    def __call__(self, batch: Tensor) -> Tensor:
        self.given.append(batch)
        return batch


def step(
    net: Sifa,
    config: RunConfig,
    *,
    updates: str = "sequential",
    pools: Pools | None = None,
    players: Players | None = None,
) -> Signals:
    players = players or Players(net, config)
    pools = pools or Pools(ImagePool(0, 0), ImagePool(0, 0))
    referee = Referee.of(config, Ranks(), torch.device("cpu"))
    referee.dials.predictions.fill_(0.5)
    referee.penalise = config.critic.penalty != "none"
    return UPDATES[updates](net, players, pools, make_batch(config), config, Ranks(), referee)


def weights_of(net: Sifa) -> dict[str, Tensor]:
    return {name: torch.cat([p.detach().flatten() for p in part.parameters()]) for name, part in net.named_children()}


OTHERWISE: list[dict[str, Leaf]] = [
    {},
    {"loss.segmentation": 0.0},
    {"net.low": False},
    {"net.low": False, "loss.segmentation": 0.0, "net.head_stride": 4},
    {"loss.critic_p_sees": "softmax", "net.encoder_norm": "group"},
    {"net.head_stride": 2, "net.classes": 4, "loss.overlap": "focal_tversky", "loss.cross_entropy": "balanced"},
    {"net.channels": 3, "loss.image_in_encoder": 0.0, "net.skip": False},
    {"net.encoder_norm": "batch_per_domain", "loss.cycle": 0.0, "loss.adversarial": "hinge"},
    {"loss.adversarial": "ra_lsgan", "loss.identity": 2.0, "optim.clip": 0.1},
    {"loss.adversarial": "rp", "critic.penalty": "r1r2", "critic.gamma": 0.3},
    {"critic.penalty": "r1", "critic.penalty_every": 4, "critic.lecam": 0.5, "net.critic_norm": "none"},
]


@pytest.mark.parametrize("switches", OTHERWISE, ids=str)
def test_where_nobody_moves_both_schedules_find_the_same_gradients_and_signals(switches: dict[str, Leaf]) -> None:
    config = run(1e-30, low="net.low" not in switches).having(switches)
    nets = [make_net(config.net) for _ in range(2)]
    told = [step(net, config, updates=updates) for net, updates in zip(nets, ("fused", "sequential"), strict=True)]
    for (name, ours), theirs in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        a, b = cast(Tensor, ours.grad), cast(Tensor, theirs.grad)
        scale = float(max(p.grad.abs().max() for p in nets[1].parameters() if p.grad is not None))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-13 * scale, msg=name)
    assert set(told[0]) == set(told[1])
    for name in told[0]:
        torch.testing.assert_close(told[0][name], told[1][name], rtol=1e-9, atol=1e-12, msg=name)
    assert scale > 1e-3, "a comparison of nothings proves nothing"


def test_each_update_moves_its_own_networks_only_and_they_come_in_the_paper_s_order() -> None:
    config = run(1e-3)
    net = make_net(config.net)
    players, moved = Watched(net, config), list[tuple[list[str], set[str]]]()
    was = weights_of(net)

    def look(names: Sequence[str]) -> None:
        nonlocal was
        now = weights_of(net)
        moved.append((list(names), {part for part in now if not torch.equal(now[part], was[part])}))
        was = now

    players.after = look
    step(net, config, players=players)
    assert moved == [([name], OWNS.get(name, {name})) for name in ORDER]


def test_the_fused_schedule_moves_all_players_at_once() -> None:
    config = run(1e-3)
    net = make_net(config.net)
    players, moved = Watched(net, config), list[list[str]]()
    players.after = lambda names: moved.append(sorted(names))
    step(net, config, updates="fused", players=players)
    assert moved == [sorted(ORDER)]


def test_of_one_step_the_updates_of_g_and_d_t_are_the_fused_ones_and_later_ones_are_not() -> None:
    config = run(1e-3)
    nets = [make_net(config.net) for _ in range(2)]
    for net, updates in zip(nets, ("fused", "sequential"), strict=True):
        step(net, config, updates=updates)
    fused, sequential = (weights_of(net) for net in nets)
    for part in ("generator", "critic_t"):
        # Adam's first step has the size of the rate whatever the gradient's: rounding moves only what has none
        close = (fused[part] - sequential[part]).abs() < 1e-6
        assert close.double().mean() > 0.99, part
    for part in ("encoder", "decoder", "critic_s", "critic_p", "critic_p_low"):
        assert ((fused[part] - sequential[part]).abs() > 1e-5).double().mean() > 0.01, part


def test_a_later_update_sees_the_weights_that_earlier_ones_left() -> None:
    config = run(1e-3)
    net = make_net(config.net)
    players, copies = Watched(net, config), dict[str, Sifa]()
    players.after = lambda names: copies.update({names[0]: copy.deepcopy(net)})
    step(net, config, players=players)
    before, batch = copies["segmenter"], make_batch()  # as it was when U's turn came
    before.zero_grad()
    st = before.generator(batch.source)
    ts, sts = (before.decoder(before.encoder(x).high, x) for x in (batch.target, st))
    cycles = (batch.source - sts).abs().mean() + (batch.target - before.generator(ts)).abs().mean()
    loss = 7.0 * cycles + 1.3 * (before.critic_s(ts)[:, :1] - 1).square().mean()
    wanted = torch.autograd.grad(loss, list(before.decoder.parameters()))
    for got, want in zip(net.decoder.parameters(), wanted, strict=True):
        torch.testing.assert_close(cast(Tensor, got.grad), want, rtol=1e-6, atol=1e-12)


def test_the_pools_get_what_was_made_on_the_way_to_the_updates_of_g_and_u() -> None:
    config = run(1e-3)
    net = make_net(config.net)
    start, batch = copy.deepcopy(net), make_batch()
    players, copies = Watched(net, config), dict[str, Sifa]()
    players.after = lambda names: copies.update({names[0]: copy.deepcopy(net)})
    pools = Noted(), Noted()
    step(net, config, players=players, pools=Pools(*(cast(ImagePool, pool) for pool in pools)))
    with torch.no_grad():
        st = start.generator(batch.source)
        seen = copies["segmenter"]
        ts = seen.decoder(seen.encoder(batch.target).high, batch.target)
    for pool, want in zip(pools, (st, ts), strict=True):
        (given,) = pool.given
        torch.testing.assert_close(given, want)
        assert not given.requires_grad
