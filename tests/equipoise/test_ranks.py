"""Two real processes against one: what ranks agree on equals what one process computes on the joined batch.

This file is also the program that each rank runs (`python test_ranks.py RANK FOLDER STORE`): all cases in one pair of
processes, because starting them costs more than the cases. Each rank leaves what it found in `rank-R.pt`.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise import checkpoint, losses, train
from equipoise.batches import Cohort
from equipoise.config import NetConfig, OptimConfig, RunConfig
from equipoise.keeping import Keeping
from equipoise.monitor import Verdict
from equipoise.nets import Sifa
from equipoise.players import Players
from equipoise.pool import ImagePool
from equipoise.ranks import Ranks
from equipoise.record import Record, Row
from equipoise.referee import Referee
from equipoise.sitting import recorded
from equipoise.step import Batch, Pools, Signals
from equipoise.train import Run, fit
from slicestore.errors import InputError
from slicestore.store import Store

CONFIG = RunConfig(
    steps=4, batch=4, workers=2, pool=1, evaluations=2, net=NetConfig(width=0.0625), optim=OptimConfig(lr=1e-3)
)
OWN = CONFIG.at("net.batch_norm_over", "worker")
STEP = CONFIG.at("net.decoder_dropout", 0.0)
CASES = {
    "float64": STEP,
    "float32": STEP,
    "sequential": STEP.at("updates", "sequential"),
    "vessel losses": (
        STEP.at("loss.overlap", "focal_tversky").at("loss.cross_entropy", "balanced").at("loss.cldice", 0.5)
    ),
    "relativistic": STEP.having({"loss.adversarial": "ra_lsgan", "critic.lecam": 0.3, "loss.identity": 2.0}),
    "penalised": STEP.having({"critic.penalty": "r1r2", "critic.gamma": 1e-3, "optim.clip": 0.5}),
}
"""One step of two ranks each, in float64 but for `float32`."""
TOLERANCE = {"float32": 1e-5}
LONG = CONFIG.at("steps", 1200)  # blocks of 3 steps, so that a finding can begin inside one
POISONED = 5


# --- what both the ranks and the test compute -------------------------------------------------------------------------


def predictions(classes: int = 3) -> tuple[Tensor, Tensor]:
    """Logits and labels of a joint batch of four whose halves hold very different shares of each class."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(4, classes, 6, 5, generator=g, dtype=torch.float64) * 2
    labels = torch.zeros(4, 6, 5, dtype=torch.int64)
    labels[0, :2], labels[1, 0, 0], labels[3, 3:], labels[2, 1:3, 2] = 1, 2, 2, 1
    return logits, labels


def small_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))


def inputs() -> Tensor:
    return torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(5))


@contextmanager
def numbers_of(case: str) -> Iterator[None]:
    """The type of number of a case."""
    torch.set_default_dtype(torch.float32 if case == "float32" else torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def half(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def still_net(seed: int, total: losses.Total | None = None) -> Sifa:
    """A SIFA without dropout; its batch statistics are joined over ranks by `total`.

    In float64 it is away from its start, where gradients into the encoder are nearly nothing. In float32 that would
    blow rounding up: one process alone is then 7e-5 off its float64 self, at the start 1.6e-5.
    """
    torch.manual_seed(seed)
    net = Sifa(STEP.net).to(torch.get_default_dtype()).train()
    if total is not None:
        net.join_statistics(total)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data *= 5 if module.weight.dtype == torch.float64 else 1
    return net


def one_step(net: Sifa, part: slice, ranks: Ranks, config: RunConfig) -> Signals:
    """Step on a part of a joint batch of four slices with very different shares of foreground."""
    g = torch.Generator().manual_seed(7)
    source, target = (torch.rand(4, 1, 32, 32, generator=g) * 2 - 1 for _ in range(2))
    label = torch.zeros(4, 32, 32, dtype=torch.int64)
    label[0, :2], label[1, :20], label[3, 5:10] = 1, 1, 1
    batch = Batch(source[part], label[part], target[part])
    players, pools = Players(net, config), Pools(ImagePool(0, 0), ImagePool(0, 0))
    referee = Referee.of(config, ranks, torch.device("cpu"))
    referee.penalise = config.critic.penalty != "none"
    return train.UPDATES[config.updates](net, players, pools, batch, config, ranks, referee)


def poison_rank_1(ranks: Ranks) -> None:
    """Let rank 1's images, and nobody else's, turn into NaN at step `POISONED`."""
    steps = iter(range(1, 10_000))

    update = Run.update

    def poisoned(run: Run, batch: Batch) -> Signals:
        if next(steps) == POISONED and ranks.rank == 1:
            batch = batch._replace(source=batch.source * math.nan)
        return update(run, batch)

    setattr(Run, "update", poisoned)  # noqa: B010 - plainly assigned it would be another type


# --- a rank -----------------------------------------------------------------------------------------------------------


def interrupted(folder: Path, cohort: Cohort, ranks: Ranks) -> None:
    """Runs that are stopped between evaluations, and continued by as many ranks, by fewer or by more."""
    # Each rank's own running statistics: they differ between evaluations, which are after steps 2 and 4.
    list(recorded(folder / "own", OWN, cohort, ranks=ranks))
    sitting: Iterator[Any] = recorded(folder / "own-sittings", OWN, cohort, ranks=ranks, keeping=Keeping(every=1))
    for progress in sitting:
        if progress.step == 3:
            break
    sitting.close()  # type: ignore[attr-defined]
    ranks.wait()
    if ranks.rank == 0:
        for name in ("fewer", "again"):
            shutil.copytree(folder / "own-sittings", folder / name)
    ranks.wait()
    list(recorded(folder / "own-sittings", OWN, cohort, ranks=ranks))

    # Two go on where one was alone.
    if ranks.rank == 0:
        for progress in recorded(folder / "more", OWN, cohort, ranks=Ranks(alone=True), elastic=True):
            if progress.step == 2:
                break
    ranks.wait()
    list(recorded(folder / "more", OWN, cohort, ranks=ranks, elastic=True))


def rank_main(rank: int, folder: Path, store: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        ranks = Ranks()
        out: dict[str, Any] = {"rank": ranks.rank, "world": ranks.world}

        # average: mixed shapes in one exchange.
        out["average"] = ranks.average([torch.full((2, 3), float(rank)), torch.tensor(10.0 * rank), torch.ones(0)])

        # total: sums, and gradients once they are averaged.
        logits, labels = predictions()
        for name, loss in (("ce", losses.cross_entropy), ("dice", losses.dice_loss)):
            mine = logits[half(rank)].clone().requires_grad_()
            weight = torch.ones((), dtype=torch.float64, requires_grad=True)  # a parameter that all ranks share
            value = loss(mine * weight, labels[half(rank)], total=ranks.total)
            own, shared = torch.autograd.grad(value, [mine, weight])
            out[name] = {"value": value.detach(), "own": own, "shared": ranks.average([shared])[0]}

        # share_weights, then gradients of a network on halves.
        net = small_net(seed=rank)
        net[1].running_mean.fill_(rank + 1.0)  # type: ignore[index]
        ranks.share_weights(net)
        out["shared_weights"] = {k: v.clone() for k, v in net.state_dict().items()}
        net.eval()
        loss_here = net(inputs()[half(rank)]).square().mean()
        out["mean_gradients"] = ranks.average(torch.autograd.grad(loss_here, list(net.parameters())))

        # average_buffers after each rank followed its own batches.
        net.train()
        net(inputs()[half(rank)])
        out["own_mean"] = net[1].running_mean.clone()  # type: ignore[index]
        ranks.average_buffers(net)
        out["buffers"] = {k: v.clone() for k, v in net.named_buffers()}

        # One step of the whole network, which differs between the ranks until they share it.
        for name, config in CASES.items():
            with numbers_of(name):
                sifa = still_net(seed=rank, total=ranks.total)
                ranks.share_weights(sifa)
                signals = one_step(sifa, half(rank), ranks, config)
            out[name] = {
                "gradients": {k: v.grad for k, v in sifa.named_parameters()},
                "stepped": {k: v.clone() for k, v in sifa.named_parameters()},
                "statistics": {k: v.clone() for k, v in sifa.named_buffers()},
                "losses": dict(zip(signals, ranks.average(list(signals.values())), strict=True)),
            }

        cohort = Cohort(Store.open(store), CONFIG, torch.device("cpu"))

        # A whole run, written down; then the same in two sittings.
        list(recorded(folder / "whole", CONFIG, cohort, ranks=ranks))
        sitting: Iterator[Any] = recorded(folder / "sittings", CONFIG, cohort, ranks=ranks)
        for progress in sitting:
            if progress.step == 2:
                break
        sitting.close()  # type: ignore[attr-defined]
        ranks.wait()
        last = None
        for progress in recorded(folder / "sittings", CONFIG, cohort, ranks=ranks):
            last = progress
        assert last is not None
        out["drawn"] = last.panels is not None
        out["weights_after"] = last.state().shared["net"]

        interrupted(folder, cohort, ranks)

        # NaN on rank 1 alone.
        poison_rank_1(ranks)
        *_, last = fit(LONG, cohort, ranks=ranks)
        assert last.verdict is not None
        out["verdict"] = last.verdict.to_dict()
        torch.save(out, folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))


# --- the tests --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pair:
    """What the two ranks found."""

    folder: Path
    found: tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, store: Store, two_ranks: Callable[..., None]) -> Pair:
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks(__file__, folder, str(store.path))
    first, second = (torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1))
    return Pair(folder, (first, second))


def test_ranks_know_their_number_and_how_many_there_are(pair: Pair) -> None:
    assert [(f["rank"], f["world"]) for f in pair.found] == [(0, 2), (1, 2)]


def test_the_mean_of_tensors_of_any_shape_is_the_same_on_all_ranks(pair: Pair) -> None:
    for found in pair.found:
        twos, ten, nothing = found["average"]
        assert torch.equal(twos, torch.full((2, 3), 0.5))
        assert torch.equal(ten, torch.tensor(5.0))
        assert nothing.shape == (0,)


def test_averaged_gradients_are_the_mean_of_each_halfs_gradients_computed_alone(pair: Pair) -> None:
    net = small_net(seed=0).eval()
    net.load_state_dict(pair.found[0]["shared_weights"])
    alone = [torch.autograd.grad(net(inputs()[half(r)]).square().mean(), list(net.parameters())) for r in (0, 1)]
    for found in pair.found:
        for got, a, b in zip(found["mean_gradients"], *alone, strict=True):
            torch.testing.assert_close(got, (a + b) / 2)


@pytest.mark.parametrize(("name", "loss"), [("ce", losses.cross_entropy), ("dice", losses.dice_loss)])
class TestJointBatch:
    def test_the_mean_of_the_ranks_losses_is_the_loss_of_the_joint_batch(
        self, pair: Pair, name: str, loss: Any
    ) -> None:
        logits, labels = predictions()
        want = loss(logits, labels)
        halves = torch.stack([loss(logits[half(r)], labels[half(r)]) for r in (0, 1)]).mean()
        assert abs(want - halves) > 0.01, "the joint value must differ from the mean of the halves in this test"
        torch.testing.assert_close(torch.stack([f[name]["value"] for f in pair.found]).mean(), want)

    def test_averaged_gradients_are_those_of_the_joint_batch(self, pair: Pair, name: str, loss: Any) -> None:
        logits, labels = predictions()
        logits.requires_grad_()
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        own, shared = torch.autograd.grad(loss(logits * weight, labels), [logits, weight])
        for rank, found in enumerate(pair.found):
            torch.testing.assert_close(found[name]["own"] / 2, own[half(rank)])  # / 2: the mean over ranks
            torch.testing.assert_close(found[name]["shared"], shared)


def test_every_rank_starts_with_the_weights_and_buffers_of_rank_0(pair: Pair) -> None:
    want = small_net(seed=0).state_dict()
    want["1.running_mean"] = torch.ones(3)
    for found in pair.found:
        assert found["shared_weights"].keys() == want.keys()
        assert all(torch.equal(found["shared_weights"][k], v) for k, v in want.items())


def test_running_statistics_become_the_mean_over_ranks_and_counters_stay(pair: Pair) -> None:
    own = [found["own_mean"] for found in pair.found]
    assert not torch.equal(*own)
    for found in pair.found:
        torch.testing.assert_close(found["buffers"]["1.running_mean"], (own[0] + own[1]) / 2)
        assert found["buffers"]["1.num_batches_tracked"] == 1


@pytest.mark.parametrize("case", CASES)
class TestOneStep:
    """Of the whole network, batch norm included: two ranks with half of the batch each against one with all of it."""

    def test_after_it_all_ranks_hold_the_same_weights_and_not_those_they_began_with(
        self, pair: Pair, case: str
    ) -> None:
        first, second = (found[case]["stepped"] for found in pair.found)
        with numbers_of(case):
            begun = still_net(seed=0)
        assert all(torch.equal(first[k], second[k]) for k in first)
        assert all((first[k] != v).any() for k, v in begun.named_parameters() if v.ndim > 1)

    def test_gradients_losses_and_running_statistics_are_those_of_one_process_on_the_joint_batch(
        self, pair: Pair, case: str
    ) -> None:
        with numbers_of(case):
            net = still_net(seed=0)
            signals = one_step(net, slice(None), Ranks(), CASES[case])
        tolerance = TOLERANCE.get(case, 1e-9)
        for found in (f[case] for f in pair.found):
            for part, network in net.named_children():
                got, want = (
                    torch.cat([g.flatten() for g in gradients])
                    for gradients in (
                        [found["gradients"][f"{part}.{name}"] for name, _ in network.named_parameters()],
                        [cast(Tensor, p.grad) for p in network.parameters()],
                    )
                )
                own_rounding = 5 if case == "float32" and part in ("generator", "encoder", "decoder") else 1
                assert (got - want).norm() <= own_rounding * tolerance * want.norm(), part
                assert want.norm() > 1e-6, "a comparison of nothings proves nothing"
            for name, statistics in net.named_buffers():
                torch.testing.assert_close(found["statistics"][name], statistics, rtol=tolerance, atol=tolerance)
            for name, value in signals.items():
                if name.startswith(("loss/", "critic/loss", "critic/penalty", "critic/lecam")):
                    torch.testing.assert_close(found["losses"][name], value, rtol=tolerance, atol=tolerance, msg=name)


def test_a_run_of_two_ranks_ends_with_the_same_weights_on_both_and_pictures_on_rank_0(pair: Pair) -> None:
    first, second = (found["weights_after"] for found in pair.found)
    assert all(torch.equal(first[k], second[k]) for k in first)  # running statistics included
    assert [found["drawn"] for found in pair.found] == [True, False]


def test_two_ranks_continue_bit_for_bit(pair: Pair) -> None:
    whole, sittings = ([{k: v for k, v in row.items() if k != "time/block"} for row in Record(pair.folder / n).rows()]
                       for n in ("whole", "sittings"))  # fmt: skip
    assert [row["step"] for row in whole] == [1, 2, 3, 4]
    assert whole == sittings
    states = [checkpoint.load(pair.folder / n / "checkpoints" / "step-000004", 1)
              for n in ("whole", "sittings")]  # fmt: skip
    assert all(torch.equal(states[0].shared["net"][k], v) for k, v in states[1].shared["net"].items())
    assert torch.equal(states[0].own["rng"], states[1].own["rng"])


def test_two_ranks_continue_bit_for_bit_between_evaluations_where_each_has_statistics_of_its_own(pair: Pair) -> None:
    whole, sittings = (Record(pair.folder / name) for name in ("own", "own-sittings"))
    assert [attempt.step for attempt in sittings.attempts] == [0, 3]
    assert untimed(whole) == untimed(sittings)
    for rank in (0, 1):
        ours, theirs = (checkpoint.load(r.folder / "checkpoints" / "step-000004", rank) for r in (whole, sittings))
        assert all(torch.equal(ours.own["buffers"][k], v) for k, v in theirs.own["buffers"].items())
        assert all(torch.equal(ours.shared["net"][k], v) for k, v in theirs.shared["net"].items())


def test_a_checkpoint_of_two_ranks_is_continued_by_one_if_the_run_is_elastic_and_the_same_way_every_time(
    pair: Pair, store: Store
) -> None:
    cohort = Cohort(store, OWN, torch.device("cpu"))
    for name in ("fewer", "again"):
        told = list(recorded(pair.folder / name, OWN, cohort, keeping=Keeping(session="s"), elastic=True))
        assert [progress.step for progress in told] == [4]
    fewer, again, whole = (Record(pair.folder / name) for name in ("fewer", "again", "own"))
    assert untimed(fewer) == untimed(again)
    assert untimed(fewer)[:3] == untimed(whole)[:3]
    assert [(a.step, a.workers) for a in fewer.attempts] == [(0, 2), (3, 1)]
    assert [row.get("time/workers") for row in fewer.rows()] == [None, None, None, 1.0]
    found = pair.folder / "fewer" / "checkpoints" / "step-000004"
    assert checkpoint.workers_of(found) == 1
    pools = checkpoint.load(found, 0).own["pools"]
    assert [len(pool["images"]) for pool in pools] == [1, 1], "they fill again, with whole batches of four"
    assert [len(pool["images"][0]) for pool in pools] == [4, 4]


def test_a_checkpoint_of_one_rank_is_continued_by_two_with_random_numbers_of_their_own(pair: Pair) -> None:
    record = Record(pair.folder / "more")
    assert [(a.step, a.workers) for a in record.attempts] == [(0, 1), (2, 2)]
    assert [row.get("time/workers") for row in record.rows()] == [1.0, 1.0, None, None]
    found = record.folder / "checkpoints" / "step-000004"
    assert checkpoint.workers_of(found) == 2
    first, second = (checkpoint.load(found, rank).own["rng"] for rank in (0, 1))
    assert not torch.equal(first, second)


def untimed(record: Record) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "time/block"} for row in record.rows()]


def test_each_rank_has_pools_and_random_numbers_of_its_own(pair: Pair) -> None:
    states = [checkpoint.load(pair.folder / "whole" / "checkpoints" / "step-000004", rank).own
              for rank in (0, 1)]  # fmt: skip
    assert not torch.equal(states[0]["rng"], states[1]["rng"])
    drawn = [state["generator"] for own in states for state in own["pools"]]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_checkpoint_of_two_ranks_is_no_checkpoint_for_three(pair: Pair) -> None:
    with pytest.raises(InputError, match="number of workers") as error:
        checkpoint.load(pair.folder / "whole" / "checkpoints" / "step-000004", 2)
    assert "workers" in error.value.remedy


def test_a_nan_on_one_rank_stops_both_at_the_same_step_with_the_same_finding(pair: Pair) -> None:
    first, second = (Verdict.from_dict(found["verdict"]) for found in pair.found)
    assert str(first) == str(second)  # NaN is not equal to itself
    assert first.kind == "diverged"
    assert first.step == 6, "the end of the block in which it happened"
    (finding,) = first.findings
    assert (finding.kind, finding.onset) == ("non_finite", POISONED)


def test_alone_every_exchange_gives_back_what_it_was_given() -> None:
    ranks = Ranks()
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert (ranks.rank, ranks.world) == (0, 1)
    assert ranks.total(x) is x
    assert ranks.average([x])[0] is x
    net = small_net(0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    ranks.share_weights(net)
    ranks.average_buffers(net)
    ranks.wait()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
