"""One step: which loss moves which network, checked against gradients that are worked out term by term.

Everything is in float64 and the decoder's dropout is off, so that separate forward passes can be compared closely.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.config import LossConfig, NetConfig, OptimConfig, RunConfig
from equipoise.nets import Sifa
from equipoise.players import Players
from equipoise.pool import ImagePool
from equipoise.ranks import Ranks
from equipoise.referee import Referee
from equipoise.step import Batch, Pools, Signals, forward
from equipoise.train import UPDATES, Run

# Weights all different and none at its default, so that a term that takes another's weight is seen.
WEIGHTS = LossConfig(
    cycle=7.0, adv_image=1.3, segmentation=0.9, seg_low=0.3, adv_p=0.4, adv_p_low_ratio=0.6, aux=0.7,
    image_in_encoder=0.2, l2=0.0,
)  # fmt: skip
SEGMENTATION_SIGNALS = {
    "loss/ce", "loss/overlap", "loss/seg_low", "loss/adv_p", "loss/adv_p_low", "loss/adv_aux", "loss/segmentation",
}  # fmt: skip


def shape(classes: int = 2) -> NetConfig:
    return NetConfig(classes=classes, width=0.0625, decoder_dropout=0.0)


def make_net(classes: int = 2) -> Sifa:
    torch.manual_seed(0)
    net = Sifa(shape(classes)).double().train()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data *= 5  # away from the start, where gradients into the encoder are nearly nothing
    return net


def make_batch(classes: int = 2, seed: int = 1) -> Batch:
    g = torch.Generator().manual_seed(seed)
    source, target = (torch.rand(2, 1, 32, 32, generator=g, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return Batch(source, torch.randint(0, classes, (2, 32, 32), generator=g), target)


class Swap:
    """A pool that gives back a batch of its own, and notes what it was given."""

    def __init__(self, given_back: Tensor) -> None:
        self.given_back, self.seen = given_back, list[Tensor]()

    def turn(self, batch: int, device: torch.device) -> None:
        pass

    def __call__(self, batch: Tensor) -> Tensor:
        self.seen.append(batch)
        return self.given_back


def no_pools() -> Pools:
    return Pools(ImagePool(0, 0), ImagePool(0, 0))


def do(net: Sifa, config: RunConfig, batch: Batch, pools: Pools | None = None) -> tuple[Players, Signals]:
    players, pools = Players(net, config), pools or no_pools()
    pools.turn(batch)
    return players, UPDATES[config.updates](
        net, players, pools, batch, config, Ranks(), Referee.of(config, Ranks(), batch.source.device)
    )


def run(loss: LossConfig = WEIGHTS, classes: int = 2, lr: float = 2e-4) -> RunConfig:
    return RunConfig(loss=loss, net=shape(classes), optim=OptimConfig(lr=lr))


def gradients(loss: Tensor, net: nn.Module) -> list[Tensor]:
    parameters = list(net.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def applied(net: nn.Module) -> list[Tensor]:
    return [cast(Tensor, p.grad) for p in net.parameters()]


def assert_same(got: Iterable[Tensor], want: Iterable[Tensor]) -> None:
    """Equal to 1e-5, and somewhere not zero: a comparison of nothings proves nothing."""
    pairs = list(zip(got, want, strict=True))
    largest = max(float(w.abs().max()) for _, w in pairs)
    assert largest > 1e-6
    for g, w in pairs:  # a bias before an instance norm has gradient 0, but for rounding
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-12 * largest)


# --- the losses of the guide's table, each from a forward pass of its own ---------------------------------------------


def fool(logits: Tensor) -> Tensor:
    return ((logits - 1) ** 2).mean()


def tell(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (((real - 1) ** 2).mean() + (fake**2).mean())


def x_st(net: Sifa, b: Batch) -> Tensor:
    made: Tensor = net.generator(b.source)
    return made


def x_ts(net: Sifa, b: Batch) -> Tensor:
    made: Tensor = net.decoder(net.encoder(b.target).high, b.target)
    return made


def x_sts(net: Sifa, b: Batch) -> Tensor:
    st = x_st(net, b)
    made: Tensor = net.decoder(net.encoder(st).high, st)
    return made


def cycles(net: Sifa, b: Batch) -> Tensor:
    x_tst = net.generator(x_ts(net, b))
    loss: Tensor = 7.0 * ((b.source - x_sts(net, b)).abs().mean() + (b.target - x_tst).abs().mean())
    return loss


def overlap(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy and Dice as in the guide, written without the code under test."""
    p, g = logits.softmax(1), F.one_hot(label, logits.shape[1]).movedim(-1, 1).double()
    w = (1 - g.sum((0, 2, 3)) / g.sum()).view(1, -1, 1, 1)
    ce = (-w * g * p.clip(0.005, 1).log()).sum(1).mean()
    axes = (0, 2, 3)
    return ce + 1 - (2 * (p * g).sum(axes) / ((p**2).sum(axes) + g.sum(axes) + 1e-7)).mean()


def meaning(net: Sifa, b: Batch) -> Tensor:
    size = (32, 32)
    main = overlap(net.segmenter(net.encoder(x_st(net, b)), size), b.label)
    low = overlap(net.segmenter_low(net.encoder(x_st(net, b)), size), b.label)
    p = fool(net.critic_p(net.segmenter(net.encoder(b.target), size)))
    p_low = fool(net.critic_p_low(net.segmenter_low(net.encoder(b.target), size)))
    aux = fool(net.critic_s(x_ts(net, b))[:, 1:])
    return 0.9 * (main + 0.3 * low + 0.4 * p + 0.4 * 0.6 * p_low + 0.7 * aux)


@pytest.mark.parametrize("classes", [2, 3])
class TestWhoMovesWhom:
    def test_the_generator_follows_both_cycles_and_its_own_critic_and_nothing_else(self, classes: int) -> None:
        net, batch = make_net(classes), make_batch(classes)
        before = copy.deepcopy(net)
        do(net, run(classes=classes), batch)
        want = [
            a + b
            for a, b in zip(
                gradients(cycles(before, batch), before.generator),
                gradients(1.3 * fool(before.critic_t(x_st(before, batch))), before.generator),
                strict=True,
            )
        ]
        assert_same(applied(net.generator), want)

    def test_the_decoder_follows_both_cycles_and_the_first_output_of_d_s(self, classes: int) -> None:
        net, batch = make_net(classes), make_batch(classes)
        before = copy.deepcopy(net)
        do(net, run(classes=classes), batch)
        loss = cycles(before, batch) + 1.3 * fool(before.critic_s(x_ts(before, batch))[:, :1])
        assert_same(applied(net.decoder), gradients(loss, before.decoder))

    def test_the_encoder_follows_the_segmentation_losses_and_a_share_of_the_image_losses(self, classes: int) -> None:
        net, batch = make_net(classes), make_batch(classes)
        before = copy.deepcopy(net)
        do(net, run(classes=classes), batch)
        image = cycles(before, batch) + 1.3 * fool(before.critic_s(x_ts(before, batch))[:, :1])
        want = [
            a + 0.2 * b
            for a, b in zip(
                gradients(meaning(before, batch), before.encoder), gradients(image, before.encoder), strict=True
            )
        ]
        assert_same(applied(net.encoder), want)

    def test_each_segmenter_follows_its_own_losses(self, classes: int) -> None:
        net, batch = make_net(classes), make_batch(classes)
        before = copy.deepcopy(net)
        do(net, run(classes=classes), batch)
        loss = meaning(before, batch)
        want = [*gradients(loss, before.segmenter), *gradients(meaning(before, batch), before.segmenter_low)]
        assert_same([*applied(net.segmenter), *applied(net.segmenter_low)], want)

    def test_critics_follow_their_own_games_on_the_images_that_the_step_began_with(self, classes: int) -> None:
        net, batch = make_net(classes), make_batch(classes)
        before = copy.deepcopy(net)
        do(net, run(classes=classes), batch)
        with torch.no_grad():
            images = forward(copy.deepcopy(before), batch.source, batch.target)
        games = {
            "critic_t": tell(before.critic_t(batch.target), before.critic_t(images.st)),
            "critic_s": tell(before.critic_s(batch.source)[:, :1], before.critic_s(images.ts)[:, :1])
            + tell(before.critic_s(images.sts)[:, 1:], before.critic_s(images.ts)[:, 1:]),
            "critic_p": tell(before.critic_p(images.logits_st), before.critic_p(images.logits_t)),
            "critic_p_low": tell(before.critic_p_low(images.low_st), before.critic_p_low(images.low_t)),
        }
        for name, loss in games.items():
            assert_same(applied(getattr(net, name)), gradients(loss, getattr(before, name)))


PLAYERS = {
    "generator": ("generator",),
    "decoder": ("decoder",),
    "segmenter": ("encoder", "segmenter", "segmenter_low"),
    "critic_t": ("critic_t",),
    "critic_s": ("critic_s",),
    "critic_p": ("critic_p",),
    "critic_p_low": ("critic_p_low",),
}


def test_every_weight_belongs_to_exactly_one_player() -> None:
    net = make_net()
    players = Players(net, run())
    owned = [id(p) for name in PLAYERS for p in players[name]]
    assert sorted(owned) == sorted(id(p) for p in net.parameters())
    for name, parts in PLAYERS.items():
        assert {id(p) for p in players[name]} == {id(p) for part in parts for p in getattr(net, part).parameters()}


def test_rates_and_momenta_are_those_of_the_paper() -> None:
    settings = OptimConfig(lr=1e-3, lr_critic_ratio=4.0, lr_segmenter_ratio=0.5, beta1=0.3, beta2=0.99)
    players = Players(make_net(), RunConfig(optim=settings, loss=LossConfig(l2=0.25)))
    groups = {name: players.optimiser(name).param_groups[0] for name in PLAYERS}
    rates = {"generator": 1e-3, "decoder": 1e-3, "segmenter": 5e-4} | dict.fromkeys(list(PLAYERS)[3:], 4e-3)
    assert {n: g["lr"] for n, g in groups.items()} == pytest.approx(rates)
    assert {n for n, g in groups.items() if g["betas"] == (0.9, 0.99)} == {"segmenter"}
    assert {g["betas"] for n, g in groups.items() if n != "segmenter"} == {(0.3, 0.99)}
    assert {n: g["weight_decay"] for n, g in groups.items() if g["weight_decay"]} == {"segmenter": 0.25}
    players.set_rates(0.5, 0.25)
    players.set_rates(0.1, 0.2)  # of the initial rates, not of the last
    wanted = {n: rate * (0.2 if n == "segmenter" else 0.1) for n, rate in rates.items()}
    assert {n: g["lr"] for n, g in groups.items()} == pytest.approx(wanted)


def test_a_critic_at_rest_stays_at_rest_while_generators_and_segmenters_move() -> None:
    net = make_net()
    before = copy.deepcopy(net)
    config = run().at("optim.lr_critic_ratio", 1e-12)
    do(net, config, make_batch())
    for name in ("critic_t", "critic_s", "critic_p", "critic_p_low"):
        for old, new in zip(getattr(before, name).parameters(), getattr(net, name).parameters(), strict=True):
            torch.testing.assert_close(old, new, rtol=0, atol=1e-15)
    for name in ("generator", "decoder", "encoder", "segmenter", "segmenter_low"):
        old, new = (torch.cat([p.flatten() for p in getattr(n, name).parameters()]) for n in (before, net))
        assert (old != new).any(), name


def test_l2_pulls_on_every_weight_of_encoder_and_segmenters_norms_included_and_on_no_other() -> None:
    # Adam's first step is lr * g / (|g| + eps) with g the gradient of all that a weight is held to: here it is the
    # applied gradient plus l2 * w.
    l2, lr = 0.5, 1e-2
    net = make_net()
    before = copy.deepcopy(net)
    do(net, run(LossConfig(l2=l2), lr=lr), make_batch())
    decayed = {f"{part}.{n}" for part in ("encoder", "segmenter", "segmenter_low")
               for n, _ in getattr(net, part).named_parameters()}  # fmt: skip
    assert any("weight" in n and before.get_parameter(n).ndim == 1 for n in decayed), "norms are among them"
    for name, new in net.named_parameters():
        old = before.get_parameter(name)
        g = cast(Tensor, new.grad) + (l2 * old if name in decayed else 0)
        torch.testing.assert_close(new.detach(), (old - lr * g / (g.abs() + 1e-8)).detach(), rtol=1e-6, atol=1e-9)


def test_the_pools_are_shown_to_d_t_and_d_s_and_to_no_other_critic() -> None:
    net, batch = make_net(), make_batch()
    before = copy.deepcopy(net)
    old_st, old_ts = make_batch(seed=5).source, make_batch(seed=6).source
    pools = Pools(cast(ImagePool, Swap(old_st)), cast(ImagePool, Swap(old_ts)))
    do(net, run(), batch, pools)
    with torch.no_grad():
        images = forward(copy.deepcopy(before), batch.source, batch.target)
    for pool, new in zip(pools, (images.st, images.ts), strict=True):
        (seen,) = cast(Swap, pool).seen
        assert not seen.requires_grad
        torch.testing.assert_close(seen, new)
    assert_same(
        applied(net.critic_t),
        gradients(tell(before.critic_t(batch.target), before.critic_t(old_st)), before.critic_t),
    )
    game = tell(before.critic_s(batch.source)[:, :1], before.critic_s(old_ts)[:, :1])
    aux = tell(before.critic_s(images.sts)[:, 1:], before.critic_s(old_ts)[:, 1:])
    assert_same(applied(net.critic_s), gradients(game + aux, before.critic_s))
    game = tell(before.critic_p(images.logits_st), before.critic_p(images.logits_t))
    assert_same(applied(net.critic_p), gradients(game, before.critic_p))


def test_the_generators_are_judged_on_their_newest_images_whatever_the_pools_hold() -> None:
    batch, other = make_batch(), make_batch(seed=9)
    nets = [make_net(), make_net()]
    do(nets[0], run(), batch)
    do(nets[1], run(), batch, Pools(*(cast(ImagePool, Swap(x)) for x in (other.source, other.target))))
    for name in ("generator", "decoder", "encoder"):
        assert_same(applied(getattr(nets[1], name)), applied(getattr(nets[0], name)))


class TestSignals:
    def test_losses_are_reported_without_their_weights(self) -> None:
        net, batch = make_net(), make_batch()
        before = copy.deepcopy(net)
        _, signals = do(net, run(), batch)
        with torch.no_grad():
            st, ts = x_st(before, batch), x_ts(before, batch)
            cycle_s = (batch.source - x_sts(before, batch)).abs().mean()
            cycle_t = (batch.target - before.generator(ts)).abs().mean()
            adv_t, adv_s = fool(before.critic_t(st)), fool(before.critic_s(ts)[:, :1])
            want = {
                "loss/cycle_s": cycle_s,
                "loss/cycle_t": cycle_t,
                "loss/adv_t": adv_t,
                "loss/adv_s": adv_s,
                "loss/generator": 7.0 * (cycle_s + cycle_t) + 1.3 * (adv_t + adv_s),
                "loss/segmentation": overlap(before.segmenter(before.encoder(st), (32, 32)), batch.label),
                "loss/seg_low": overlap(before.segmenter_low(before.encoder(st), (32, 32)), batch.label),
                "loss/adv_aux": fool(before.critic_s(ts)[:, 1:]),
                "critic/loss_t": tell(before.critic_t(batch.target), before.critic_t(st)),
            }
        for name, value in want.items():
            torch.testing.assert_close(signals[name], value, rtol=1e-6, atol=1e-9, msg=name)

    def test_auc_and_gap_set_real_against_fake_patches(self) -> None:
        net, batch = make_net(), make_batch()
        before = copy.deepcopy(net)
        _, signals = do(net, run(), batch)
        with torch.no_grad():
            real = before.critic_t(batch.target).flatten()
            fake = before.critic_t(x_st(before, batch)).flatten()
        assert signals["auc/t"].item() == pytest.approx((real[:, None] > fake[None]).double().mean().item(), abs=1e-6)
        assert signals["critic/gap_t"].item() == pytest.approx((real.mean() - fake.mean()).item(), rel=1e-5)

    def test_a_critic_that_has_it_the_wrong_way_round_has_a_negative_margin(self) -> None:
        net, batch = make_net(), make_batch()
        _, signals = do(copy.deepcopy(net), run(), batch)
        last = [module for module in net.critic_t.modules() if isinstance(module, nn.Conv2d)][-1]
        last.weight.data *= -1
        _, turned = do(net, run(), batch)
        gaps = [s["critic/gap_t"].item() for s in (signals, turned)]
        assert min(gaps) < 0 < max(gaps)
        assert sum(gaps) == pytest.approx(0, abs=1e-9)
        assert signals["auc/t"].item() == pytest.approx(1 - turned["auc/t"].item(), abs=1e-6)

    def test_saturation_is_the_share_of_dead_pixels_in_what_is_made_beyond_that_of_the_real_images(self) -> None:
        net, batch = make_net(), make_batch()
        dark = batch._replace(target=batch.target.clone())
        dark.target[:, :, :8] = -1.0  # a quarter of the real target is at the end of the range
        for part in (net.generator, net.decoder):  # and G and U drive some pixels to the other
            last = [module for module in part.modules() if isinstance(module, nn.Conv2d)][-1]
            last.register_forward_hook(lambda module, given, made: made + 2.0)
        with torch.no_grad():
            images = forward(copy.deepcopy(net), dark.source, dark.target)
        _, signals = do(net, run(), dark)
        share = {name: (x.abs() > 0.99).double().mean().item() for name, x in images._asdict().items()}
        assert len({round(share[name], 3) for name in ("st", "ts", "sts", "tst")}) == 4
        real_s, real_t = ((x.abs() > 0.99).double().mean().item() for x in (dark.source, dark.target))
        assert 0.25 <= real_t < 0.3
        for name, real in (("st", real_t), ("tst", real_t), ("ts", real_s), ("sts", real_s)):
            assert signals[f"saturation/{name}"].item() == pytest.approx(share[name] - real, abs=1e-6)

    def test_gradient_norms_are_those_of_all_weights_of_a_side(self) -> None:
        net = make_net()
        players, signals = do(net, run(), make_batch())
        sides = {"generator": ("generator", "decoder"), "segmenter": ("segmenter",), "critic": tuple(PLAYERS)[3:]}
        for side, names in sides.items():
            squares = sum(float(cast(Tensor, p.grad).square().sum()) for name in names for p in players[name])
            assert signals[f"grad/{side}"].item() == pytest.approx(math.sqrt(squares), rel=1e-6)

    def test_a_nan_in_one_gradient_shows_in_its_players_norm(self) -> None:
        net = make_net()
        next(iter(net.critic_p.parameters())).data[0] = math.nan
        _, signals = do(net, run(), make_batch())
        assert signals["grad/critic"].isnan()
        assert signals["auc/p"].isnan()
        assert signals["loss/generator"].isfinite()

    def test_they_are_scalars_without_a_graph(self) -> None:
        _, signals = do(make_net(), run(), make_batch())
        assert {(v.shape, v.requires_grad) for v in signals.values()} == {(torch.Size([]), False)}


class TestCycleGan:
    """The segmentation parameter at 0."""

    def test_segmenters_feel_no_loss(self) -> None:
        net = make_net()
        before = copy.deepcopy(net)
        do(net, run(LossConfig(segmentation=0.0, l2=0.0)), make_batch())
        for part in ("segmenter", "segmenter_low"):
            for old, new in zip(getattr(before, part).parameters(), getattr(net, part).parameters(), strict=True):
                assert (cast(Tensor, new.grad) == 0).all()
                assert torch.equal(old, new)

    def test_weight_decay_still_shrinks_them(self) -> None:
        net = make_net()
        before = copy.deepcopy(net)
        do(net, run(LossConfig(segmentation=0.0)), make_batch())
        old, new = before.segmenter.classify.weight, net.segmenter.classify.weight
        assert ((new - old).sign() == -old.sign()).all()

    def test_the_encoder_follows_the_image_losses_alone(self) -> None:
        net, batch = make_net(), make_batch()
        before = copy.deepcopy(net)
        do(net, run(LossConfig(segmentation=0.0, cycle=7.0, adv_image=1.3, image_in_encoder=0.2, l2=0.0)), batch)
        image = cycles(before, batch) + 1.3 * fool(before.critic_s(x_ts(before, batch))[:, :1])
        assert_same(applied(net.encoder), [0.2 * g for g in gradients(image, before.encoder)])

    def test_no_segmentation_loss_is_reported(self) -> None:
        _, with_masks = do(make_net(), run(), make_batch())
        _, without = do(make_net(), run(LossConfig(segmentation=0.0)), make_batch())
        assert set(with_masks) - set(without) == SEGMENTATION_SIGNALS


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("game", ["lsgan", "ns", "hinge"])
def test_every_game_trains_with_finite_signals(game: str, classes: int) -> None:
    config = run(LossConfig().at("adversarial", game), classes).at("pool", 1)
    trained = Run.start(config, torch.device("cpu"), Ranks())
    net = trained.net
    for number in range(1, 4):
        source, label, target = make_batch(classes, number)
        signals = trained.advance(Batch(source.float(), label, target.float()), number)
        assert [n for n, v in signals.items() if not v.isfinite()] == []
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("game", "generator", "critic"),
    [
        ("lsgan", fool, tell),
        ("ns", lambda y: F.softplus(-y).mean(), lambda x, y: F.softplus(-x).mean() + F.softplus(y).mean()),
        ("hinge", lambda y: -y.mean(), lambda x, y: F.relu(1 - x).mean() + F.relu(1 + y).mean()),
    ],
)
def test_both_sides_play_the_game_that_is_asked_for(
    game: str, generator: Callable[[Tensor], Tensor], critic: Callable[[Tensor, Tensor], Tensor]
) -> None:
    net, batch = make_net(), make_batch()
    before = copy.deepcopy(net)
    _, signals = do(net, run(LossConfig().at("adversarial", game)), batch)
    with torch.no_grad():
        st, ts = x_st(before, batch), x_ts(before, batch)
        logits_t = before.segmenter(before.encoder(batch.target), (32, 32))
        want = {
            "loss/adv_t": generator(before.critic_t(st)),
            "loss/adv_s": generator(before.critic_s(ts)[:, :1]),
            "loss/adv_aux": generator(before.critic_s(ts)[:, 1:]),
            "loss/adv_p": generator(before.critic_p(logits_t)),
            "critic/loss_t": critic(before.critic_t(batch.target), before.critic_t(st)),
            "critic/loss_s": critic(before.critic_s(batch.source)[:, :1], before.critic_s(ts)[:, :1]),
        }
    for name, value in want.items():
        torch.testing.assert_close(signals[name], value, rtol=1e-6, atol=1e-9, msg=name)
