"""What a recorded step asks of a run: rehearsals leave no trace, and nothing is made in passing.

A graph itself needs a CUDA device; what it relies on can be held here.
"""

from __future__ import annotations

import copy

import pytest
import torch

from equipoise.config import NetConfig, RunConfig
from equipoise.ranks import Ranks
from equipoise.step import Batch
from equipoise.train import Run

CPU = torch.device("cpu")
CONFIG = RunConfig(batch=2, pool=2, net=NetConfig(width=0.0625))


def make_batch(seed: int, device: torch.device = CPU) -> Batch:
    g = torch.Generator().manual_seed(seed)
    source, target = (torch.rand(2, 1, 32, 32, generator=g) * 2 - 1 for _ in range(2))
    label = torch.randint(0, 2, (2, 32, 32), generator=g)
    return Batch(source.to(device), label.to(device), target.to(device))


def trained(before: int, *, rehearse: bool) -> Run:
    """Some steps, perhaps a rehearsal as `Recording` does it, and more steps; random numbers included."""
    run = Run.start(CONFIG, CPU, Ranks())
    for number in range(1, before + 1):
        run.advance(make_batch(number), number)
    run.pools.turn(make_batch(9))  # as `advance` does before it records
    if rehearse:
        restore = run.undo()
        for seed in range(3):
            run.update(make_batch(100 + seed))
        restore()
    run.update(make_batch(9))
    for number in range(before + 2, before + 6):
        run.advance(make_batch(number), number)
    return run


@pytest.mark.parametrize("before", [0, 4])
def test_rehearsals_leave_no_trace_in_the_steps_that_follow(before: int) -> None:
    rehearsed, plain = (trained(before, rehearse=rehearse).net.state_dict() for rehearse in (True, False))
    assert [name for name in plain if not torch.equal(rehearsed[name], plain[name])] == []


def test_after_the_first_step_weights_moments_statistics_and_pools_keep_their_place() -> None:
    run = Run.start(CONFIG, CPU, Ranks())
    run.advance(make_batch(1), 1)

    def places() -> list[int]:
        held = [
            *run.net.parameters(),
            *run.net.buffers(),
            *run.players.moments(),
            *run.pools.slots(),
            *run.referee.dials,
        ]
        return [x.data_ptr() for x in held]

    first = places()
    for number in range(2, 6):
        run.advance(make_batch(number), number)
    assert places() == first


def test_moments_are_there_before_the_first_step_as_adam_would_make_them() -> None:
    run = Run.start(CONFIG, CPU, Ranks())
    lazy = copy.deepcopy(run)
    for name in ("generator", "segmenter"):
        lazy.players.optimiser(name).state.clear()
    for each in (run, lazy):
        torch.manual_seed(3)
        each.advance(make_batch(1), 1)
    for a, b in zip(run.net.parameters(), lazy.net.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("updates", ["fused", "sequential"])
@pytest.mark.parametrize("trained", [0, 30])
def test_a_replayed_step_is_the_unrecorded_one(updates: str, trained: int) -> None:
    """From the same state with the same dropout; before training at a rate at which nobody moves."""
    device = torch.device("cuda")
    config = CONFIG.at("updates", updates).at("optim.lr", 2e-4 if trained else 1e-12)
    begun = Run.start(config, device, Ranks())
    for number in range(1, trained + 1):
        begun.advance(make_batch(number, device), number)
    state, told = begun.state(), []
    for graphs in (False, True):
        run = Run.start(config.at("speed.graphs", graphs), device, Ranks())
        for _ in range(2):  # the second load comes after the recording, which must go on from it
            run.load(state)
            signals = run.advance(make_batch(99, device), trained + 1)
        told.append(signals)
    for name in told[0]:
        if not name.startswith("auc/"):
            torch.testing.assert_close(told[0][name], told[1][name], rtol=1e-3, atol=1e-4, msg=name)
