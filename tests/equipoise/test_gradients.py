"""How strongly terms pull: against gradients worked out term by term, and against those that training applies.

In float64, so that separate forward passes can be compared closely.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.batches import Cohort
from equipoise.checkpoint import State
from equipoise.config import NetConfig, RunConfig
from equipoise.config_base import Leaf
from equipoise.fused import fused
from equipoise.gradients import measure
from equipoise.nets import Sifa
from equipoise.players import Players
from equipoise.pool import ImagePool
from equipoise.ranks import Ranks
from equipoise.referee import Referee
from equipoise.step import Batch, Pools
from equipoise.train import fit

CPU = torch.device("cpu")
RUN = RunConfig(batch=2, net=NetConfig(width=0.0625, decoder_dropout=0.0)).having(
    {
        "loss.cycle": 7.0, "loss.adv_image": 1.3, "loss.identity": 2.0, "loss.segmentation": 0.5, "loss.seg_low": 0.3,
        "loss.adv_p": 0.4, "loss.adv_p_low_ratio": 0.6, "loss.aux": 0.7, "loss.image_in_encoder": 0.2, "loss.l2": 0.0,
    }
)  # fmt: skip


def make_net(run: RunConfig = RUN, total: Callable[[Tensor], Tensor] | None = None) -> Sifa:
    torch.manual_seed(0)
    net = Sifa(run.net).double().train()
    if total is not None:
        net.join_statistics(total)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            with torch.no_grad():
                for weight in module.parameters():
                    weight.mul_(5)  # away from the start, where gradients into the encoder are nearly nothing
    return net


def make_batch(run: RunConfig = RUN, count: int = 2) -> Batch:
    g = torch.Generator().manual_seed(1)
    shape = (count, run.net.channels, 32, 32)
    source, target = (torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1 for _ in range(2))
    label = torch.zeros(count, 32, 32, dtype=torch.int64)
    label[0, :3], label[1, :20] = 1, 1  # shares of foreground that differ
    return Batch(source, label, target)


def referee(run: RunConfig = RUN, ranks: Ranks | None = None) -> Referee:
    rules = Referee.of(run, ranks or Ranks(), CPU)
    rules.dials.noise.fill_(0.2)  # not read where a run has none
    return rules


def pulled(losses: Mapping[str, Tensor], network: nn.Module) -> dict[str, float]:
    """Norms of the gradients of losses, by plain automatic differentiation."""
    norms = {}
    for name, loss in losses.items():
        found = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
        norms[name] = math.sqrt(sum(float(g.square().sum()) for g in found if g is not None))
    return norms


def applied(network: nn.Module) -> float:
    """The norm of the gradient that a step has left."""
    return math.sqrt(sum(float(cast(Tensor, p.grad).square().sum()) for p in network.parameters()))


def stepped(run: RunConfig, rules: Referee) -> Sifa:
    """A network after one step of training, its gradients still there."""
    net, batch = make_net(run), make_batch(run)
    pools = Pools(ImagePool(0, 0), ImagePool(0, 0))
    fused(net, Players(net, run), pools, batch, run, Ranks(), rules)
    return net


# --- against gradients worked out term by term ------------------------------------------------------------------------


def fool(logits: Tensor) -> Tensor:
    return ((logits - 1) ** 2).mean()


def overlap(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy and Dice, written without the code under test."""
    p, g = logits.softmax(1), F.one_hot(label, logits.shape[1]).movedim(-1, 1).double()
    w = (1 - g.sum((0, 2, 3)) / g.sum()).view(1, -1, 1, 1)
    ce = (-w * g * p.clip(0.005, 1).log()).sum(1).mean()
    axes = (0, 2, 3)
    return ce + 1 - (2 * (p * g).sum(axes) / ((p**2).sum(axes) + g.sum(axes) + 1e-7)).mean()


def terms(net: Any, b: Batch) -> dict[str, Tensor]:
    """Every term of the published objective with least squares."""
    size = (32, 32)
    x_st = net.generator(b.source)
    seen_st, seen_t = net.encoder(x_st), net.encoder(b.target)
    x_sts, x_ts = net.decoder(seen_st.high, x_st), net.decoder(seen_t.high, b.target)
    cycle_s, cycle_t = (b.source - x_sts).abs().mean(), (b.target - net.generator(x_ts)).abs().mean()
    return {
        "cycle_s": cycle_s,
        "cycle_t": cycle_t,
        "cycles": cycle_s + cycle_t,
        "adv_t": fool(net.critic_t(x_st)),
        "adv_s": fool(net.critic_s(x_ts)[:, :1]),
        "identity": (b.target - net.generator(b.target)).abs().mean(),
        "segmentation": overlap(net.segmenter(seen_st, size), b.label),
        "seg_low": overlap(net.segmenter_low(seen_st, size), b.label),
        "adv_p": fool(net.critic_p(net.segmenter(seen_t, size))),
        "adv_p_low": fool(net.critic_p_low(net.segmenter_low(seen_t, size))),
        "adv_aux": fool(net.critic_s(x_ts)[:, 1:]),
    }


MOVED = {
    "generator": {"cycle_s", "cycle_t", "cycles", "adv_t", "identity"},
    "decoder": {"cycle_s", "cycle_t", "cycles", "adv_s"},
    "encoder": {
        "cycle_s", "cycle_t", "cycles", "adv_s", "segmentation", "seg_low", "adv_p", "adv_p_low", "adv_aux",
    },
}  # fmt: skip


def test_norms_are_those_of_every_terms_gradient_by_each_network_that_it_may_move() -> None:
    found, twin = measure(make_net(), make_batch(), referee()), make_net()
    losses = terms(twin, make_batch())
    assert {network: set(norms) for network, norms in found.items()} == MOVED
    for network, norms in found.items():
        want = pulled({name: losses[name] for name in MOVED[network]}, getattr(twin, network))
        assert norms == pytest.approx(want, rel=1e-5)
        assert min(want.values()) > 1e-6, "a comparison of nothings proves nothing"


def test_both_cycles_together_pull_less_than_the_sum_of_their_pulls() -> None:
    """Else their norm could be worked out from theirs, and need not be measured."""
    for norms in measure(make_net(), make_batch(), referee()).values():
        assert norms["cycles"] < 0.99 * (norms["cycle_s"] + norms["cycle_t"])


# --- against the gradients that training applies ----------------------------------------------------------------------

NO_GAMES: dict[str, Leaf] = {"loss.adv_image": 0.0, "loss.adv_p": 0.0, "loss.aux": 0.0}
ALONE: dict[str, tuple[dict[str, Leaf], dict[str, tuple[str, float]]]] = {
    "cycles": (
        NO_GAMES | {"loss.identity": 0.0, "loss.segmentation": 0.0},
        {"generator": ("cycles", 7.0), "decoder": ("cycles", 7.0), "encoder": ("cycles", 1.4)},
    ),
    "games of images": (
        {"loss.cycle": 0.0, "loss.identity": 0.0, "loss.segmentation": 0.0},
        {"generator": ("adv_t", 1.3), "decoder": ("adv_s", 1.3), "encoder": ("adv_s", 0.26)},
    ),
    "identity": (NO_GAMES | {"loss.cycle": 0.0, "loss.segmentation": 0.0}, {"generator": ("identity", 2.0)}),
    "segmentation": (
        NO_GAMES | {"loss.cycle": 0.0, "loss.seg_low": 0.0},
        {"encoder": ("segmentation", 0.5)},
    ),
    "game of predictions": (
        {
            "loss.cycle": 0.0, "loss.adv_image": 0.0, "loss.aux": 0.0, "loss.ce": 0.0, "loss.dice": 0.0,
            "loss.adv_p_low_ratio": 0.0,
        },
        {"encoder": ("adv_p", 0.2)},
    ),
    "auxiliary game": (
        {"loss.cycle": 0.0, "loss.adv_image": 0.0, "loss.adv_p": 0.0, "loss.ce": 0.0, "loss.dice": 0.0},
        {"encoder": ("adv_aux", 0.35)},
    ),
}  # fmt: skip
"""Settings that leave one term, and what moves each network then, with which weight."""
KINDS: dict[str, dict[str, Leaf]] = {
    "least squares": {},
    "relative": {"loss.adversarial": "ra_lsgan"},
    "paired": {"loss.adversarial": "rp", "critic.penalty": "r1r2"},
    "stacks of three": {"net.channels": 3},
    "dropout and noise": {"net.decoder_dropout": 0.25, "critic.noise": 0.2, "critic.translation": 0.2},
    "spectral norm": {"net.critic_norm": "both"},
    "softmax seen": {"loss.critic_p_sees": "softmax"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("term", ALONE)
def test_a_term_alone_moves_networks_by_its_weight_times_what_was_measured(kind: str, term: str) -> None:
    settings, movers = ALONE[term]
    run = RUN.having(KINDS[kind])
    alone = run.having(settings)
    norms = measure(make_net(run), make_batch(run), referee(run))  # random numbers of make_net's seed, there as here
    trained = stepped(alone, referee(alone))
    for network, (name, weight) in movers.items():
        got = applied(getattr(trained, network))
        assert got == pytest.approx(weight * norms[network][name], rel=1e-4), network
        assert got > 1e-7, "a comparison of nothings proves nothing"


@pytest.mark.parametrize("name", ["adv_image", "adv_p", "aux"])
def test_after_calibration_a_term_of_weight_1_pulls_as_strongly_as_its_anchor_in_training(name: str) -> None:
    run = RUN.having({"loss.adv_image": 1.0, "loss.adv_p": 1.0, "loss.aux": 1.0})
    run = run.having({"balance.mode": "calibrated", "balance.every": 1, "balance.calibration_steps": 1})
    rules = referee(run)
    norms = measure(make_net(run), make_batch(run), rules)
    rules.balance.take(norms, 1)
    assert float(getattr(rules.balance, name)) != 1
    if name == "adv_image":
        adversarial, anchor, networks = "games of images", "cycles", ["generator", "decoder"]
    else:
        adversarial = {"adv_p": "game of predictions", "aux": "auxiliary game"}[name]
        anchor, networks = "segmentation", ["encoder"]
    pulls = []
    for term in (adversarial, anchor):
        alone = run.having({**ALONE[term][0], "balance.mode": "static", "balance.calibration_steps": 500})
        rules_of_alone = referee(alone)
        rules_of_alone.balance.load_state_dict(rules.balance.state_dict())
        trained = stepped(alone, rules_of_alone)
        pulls.append(math.hypot(*(applied(getattr(trained, network)) for network in networks)))
    assert pulls[0] == pytest.approx(pulls[1], rel=1e-4)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_without_segmentation_only_the_terms_of_images_are_measured() -> None:
    run = RUN.having({"loss.segmentation": 0.0, "loss.identity": 0.0})
    images = {"cycle_s", "cycle_t", "cycles"}
    assert {
        network: set(norms) for network, norms in measure(make_net(run), make_batch(run), referee(run)).items()
    } == {
        "generator": images | {"adv_t"},
        "decoder": images | {"adv_s"},
        "encoder": images | {"adv_s"},
    }


def test_without_c2_its_terms_are_missing_and_the_others_are_there() -> None:
    run = RunConfig(batch=2, net=NetConfig(width=0.0625, low=False))
    found = measure(make_net(run), make_batch(run), referee(run))
    assert set(found["encoder"]) == MOVED["encoder"] - {"seg_low", "adv_p_low"}


def test_an_objective_without_terms_gives_nothing() -> None:
    run = RUN.having(NO_GAMES | {"loss.cycle": 0.0, "loss.identity": 0.0, "loss.segmentation": 0.0})
    assert measure(make_net(run), make_batch(run), referee(run)) == {}


def test_a_weight_that_is_no_number_is_not_hidden() -> None:
    net = make_net()
    next(net.critic_p.parameters()).data.fill_(math.nan)
    found = measure(net, make_batch(), referee())
    assert math.isnan(found["encoder"].pop("adv_p"))
    assert all(math.isfinite(norm) for norms in found.values() for norm in norms.values())


# --- training is not disturbed ----------------------------------------------------------------------------------------


def all_of(net: Sifa, rules: Referee) -> list[Tensor]:
    assert all(p.grad is None for p in net.parameters())
    assert all(module.training for module in net.modules())
    return [x.detach().clone() for x in (*net.parameters(), *net.buffers(), *rules.tensors(), torch.get_rng_state())]


@pytest.fixture
def restless() -> tuple[Sifa, Batch, Referee]:
    """Everything that a step changes in passing: statistics, vectors of spectral norms, LeCam's means, dropout."""
    run = RUN.having({"net.critic_norm": "both", "net.decoder_dropout": 0.25, "critic.lecam": 0.1, "critic.noise": 0.2})
    return make_net(run), make_batch(run), referee(run)


def test_weights_statistics_random_numbers_and_running_means_stay_as_they_are(
    restless: tuple[Sifa, Batch, Referee],
) -> None:
    net, batch, rules = restless
    before = all_of(net, rules)
    first = measure(net, batch, rules)
    assert all(torch.equal(a, b) for a, b in zip(before, all_of(net, rules), strict=True))
    assert measure(net, batch, rules) == first


def test_the_same_forward_by_itself_would_have_changed_them(restless: tuple[Sifa, Batch, Referee]) -> None:
    net, batch, rules = restless
    buffers, random = [x.clone() for x in net.buffers()], torch.get_rng_state()
    terms(net, batch)
    net.critic_t(rules.shown(batch.source))
    assert not all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))
    assert not torch.equal(random, torch.get_rng_state())


def test_they_stay_after_an_error_too(restless: tuple[Sifa, Batch, Referee], monkeypatch: pytest.MonkeyPatch) -> None:
    net, batch, rules = restless
    before = all_of(net, rules)

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(net.critic_p, "forward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        measure(net, batch, rules)
    assert all(torch.equal(a, b) for a, b in zip(before, all_of(net, rules), strict=True))


def test_a_run_that_is_measured_at_every_step_trains_as_one_that_never_is(tiny: RunConfig, cohort: Cohort) -> None:
    def trained(every: int) -> tuple[list[dict[str, float]], State]:
        progress = list(fit(tiny.having({"steps": 4, "balance.every": every}), cohort))
        return [p.signals for p in progress], progress[-1].state()

    (measured, state), (plain, plain_state) = trained(1), trained(0)
    assert all(any(name.startswith("balance/") for name in block) for block in measured)
    assert [{n: v for n, v in block.items() if not n.startswith("balance/")} for block in measured] == plain
    for name, weight in plain_state.shared["net"].items():
        assert torch.equal(weight, state.shared["net"][name]), name
    assert torch.equal(plain_state.own["rng"], state.own["rng"])
    for one, other in zip(plain_state.own["pools"], state.own["pools"], strict=True):
        assert torch.equal(one["images"], other["images"])
        assert torch.equal(one["generator"], other["generator"])


# --- two ranks --------------------------------------------------------------------------------------------------------

TWO = RUN.having({"batch": 4, "workers": 2})


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        ranks = Ranks()
        found = {}
        for game in ("lsgan", "ra_lsgan"):
            run = TWO.at("loss.adversarial", game)
            batch = Batch(*(x[2 * rank : 2 * rank + 2] for x in make_batch(run, 4)))
            found[game] = measure(make_net(run, ranks.total), batch, referee(run, ranks))
        torch.save(found, folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))


def test_two_ranks_measure_what_one_process_does_on_the_joint_batch(
    tmp_path: Path, two_ranks: Callable[..., None]
) -> None:
    two_ranks(__file__, tmp_path)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    for game, found in first.items():
        run = TWO.at("loss.adversarial", game)
        want = measure(make_net(run), make_batch(run, 4), referee(run))
        assert found.keys() == want.keys()
        for network in want:
            assert found[network] == pytest.approx(want[network], rel=1e-6)
