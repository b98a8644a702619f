"""Training as an iterator.

Knows the loop: batches, steps, blocks of signals, evaluations, the verdict. Knows nothing of disks, Ray, W&B or
printing: whoever iterates writes, reports, prints; whoever stops iterating prunes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from equipoise.batches import Cohort
from equipoise.checkpoint import State
from equipoise.config import RunConfig
from equipoise.metrics import evaluate
from equipoise.monitor import Monitor, Verdict, counted, watched
from equipoise.nets import Sifa
from equipoise.panels import Panels, draw
from equipoise.pool import ImagePool
from equipoise.ranks import Ranks
from equipoise.step import Players, Pools, Signals, step


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run has to say at the end of a block of steps."""

    step: int
    """Steps done."""
    signals: dict[str, float]
    """Means over the block; at an evaluation also `quality/*`. Non-finite values stay what they are. Empty when a run
    is resumed at its very end, where there is no block left to train."""
    seconds: float
    """Wall time of the block's steps, evaluation excluded."""
    looked: bool
    """Whether the block ended with an evaluation, on all ranks: the moment to checkpoint."""
    panels: Panels | None
    """Images of the probe slices, at evaluations on rank 0."""
    stability: float
    """S so far: the factor by which schedulers weigh a Dice."""
    verdict: Verdict | None
    """Set on the last one."""
    state: Callable[[], State]
    """The state from which `fit(resume=...)` continues exactly; copied when called."""


@dataclass(slots=True)
class Run:
    """What changes while a run trains."""

    net: Sifa
    players: Players
    pools: Pools
    monitor: Monitor
    done: int = 0

    @classmethod
    def start(cls, config: RunConfig, device: torch.device, ranks: Ranks) -> Run:
        """Fresh networks from the config's seed, the same on all ranks; then each rank its own random numbers."""
        torch.manual_seed(config.seed)
        shape = config.net
        net = Sifa(classes=shape.classes, channels=shape.channels, width=shape.width, skip=shape.skip)
        net = net.to(device).train()
        ranks.share_weights(net)
        torch.manual_seed(config.seed * 1009 + ranks.rank + 1)
        pools = Pools(*(ImagePool(config.pool, seed=config.seed * 1009 + 2 * ranks.rank + i) for i in range(2)))
        monitor = Monitor(config.monitor, config.steps, watched(config), counted(config))
        return cls(net, Players(net, config.optim, config.loss.l2), pools, monitor)

    def state(self) -> State:
        """Everything that `load` needs, for this rank."""
        shared = {
            "step": self.done,  # and the sampler's position: what a batch holds depends on seed and step alone
            "net": copy.deepcopy(self.net.state_dict()),  # torch hands out the live tensors
            "players": copy.deepcopy(self.players.state_dict()),
            "monitor": self.monitor.state_dict(),
        }
        own = {"pools": [pool.state_dict() for pool in self.pools], "rng": torch.get_rng_state()}
        if torch.cuda.is_available():
            own["cuda_rng"] = torch.cuda.get_rng_state()
        return State(shared, own)

    def load(self, state: State) -> None:
        """Continue from `state`."""
        shared, own = state
        self.done = shared["step"]
        self.net.load_state_dict(shared["net"])
        self.players.load_state_dict(copy.deepcopy(shared["players"]))  # torch would train on the given tensors
        self.monitor.load_state_dict(shared["monitor"])
        for pool, pooled in zip(self.pools, own["pools"], strict=True):
            pool.load_state_dict(pooled)
        torch.set_rng_state(own["rng"].cpu())
        if "cuda_rng" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda_rng"].cpu())


def fit(
    config: RunConfig, cohort: Cohort, *, ranks: Ranks | None = None, resume: State | None = None
) -> Iterator[Progress]:
    """Train one run; the last `Progress` carries the verdict.

    Stops early on a divergence, which is a result and no exception. Every rank of the group iterates in step:
    signals and verdict are the same on all of them.

    Args:
        config: the run.
        cohort: its slices, staged on the device to train on.
        ranks: the data-parallel group; alone by default.
        resume: a state of the same run and rank, from `Progress.state`.
    """
    ranks = ranks or Ranks()
    torch.set_flush_denormal(True)  # small initial weights make denormals, which CPUs compute several times slower
    run = Run.start(config, cohort.device, ranks)
    if resume is not None:
        run.load(resume)
    if run.done == config.steps or run.monitor.diverged:  # resumed at its very end: the verdict alone is wanting
        verdict = run.monitor.verdict(run.done)
        yield Progress(run.done, {}, 0.0, False, None, run.monitor.stability(), verdict, run.state)
    due = _evaluations(config, run.monitor.horizon.block)
    while run.done < config.steps and not run.monitor.diverged:
        began = time.perf_counter()
        signals = _block(run, config, cohort, ranks)
        seconds = time.perf_counter() - began
        ended = run.done == config.steps or run.monitor.diverged is not None
        looked, panels = ended or run.done in due, None
        if looked:
            ranks.average_buffers(run.net)
            if ranks.rank == 0:
                quality, panels = _look(run.net, cohort)
                signals |= quality
        ending = run.monitor.verdict(run.done) if ended else None
        yield Progress(run.done, signals, seconds, looked, panels, run.monitor.stability(), ending, run.state)


def _block(run: Run, config: RunConfig, cohort: Cohort, ranks: Ranks) -> dict[str, float]:
    """Train one block and judge it; the device is waited for once, at its end."""
    first = run.done + 1
    rows: list[Signals] = []
    for number in range(first, min(run.done + run.monitor.horizon.block, config.steps) + 1):
        run.players.scale_rates(rate_factor(config, number))
        batch = cohort.batch(config, number, ranks.rank)
        rows.append(step(run.net, run.players, run.pools, batch, config, ranks))
        run.done = number
    names = list(rows[0])
    table = torch.stack([torch.stack([row[name] for name in names]) for row in rows])
    (table,) = ranks.average([table])
    return run.monitor.observe(first, names, table.cpu().numpy())


def rate_factor(config: RunConfig, number: int) -> float:
    """The factor on every learning rate at step `number`, counted from 1."""
    if config.optim.schedule == "constant":
        return 1.0
    half = config.steps / 2
    return min(1.0, (config.steps - number + 1) / half)


def _evaluations(config: RunConfig, block: int) -> set[int]:
    """Steps at which to look: evenly spaced, each at the end of a block."""
    wanted = {round(config.steps * k / config.evaluations) for k in range(1, config.evaluations + 1)}
    return {min(config.steps, -(-step // block) * block) for step in wanted}


def _look(net: Sifa, cohort: Cohort) -> tuple[dict[str, float], Panels]:
    """Measure and draw without disturbing the random numbers of the training."""
    devices = [cohort.device] if cohort.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return evaluate(net, cohort), draw(net, cohort)
