"""Training as an iterator.

Knows the loop: batches, steps, blocks of signals, evaluations, the verdict. Knows nothing of disks, Ray, W&B or
printing: whoever iterates writes, reports, prints; whoever stops iterating prunes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from equipoise.average import Average
from equipoise.batches import Cohort
from equipoise.checkpoint import State
from equipoise.config import RunConfig
from equipoise.fused import fused
from equipoise.gradients import measure
from equipoise.graphs import Recording
from equipoise.metrics import evaluate
from equipoise.monitor import Finding, Horizon, Monitor, Verdict, counted, watched
from equipoise.nets import Sifa
from equipoise.panels import Panels, draw
from equipoise.players import Players
from equipoise.pool import ImagePool
from equipoise.probe import probe
from equipoise.ranks import Ranks
from equipoise.referee import Referee
from equipoise.schedules import idle_steps, rates
from equipoise.sequential import sequential
from equipoise.speed import arrange, check, out_of_memory
from equipoise.step import Batch, Pools, Signals
from slicestore.errors import InputError


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run has to say at the end of a block of steps."""

    step: int
    """Steps done."""
    signals: dict[str, float]
    """Means over the block; at an evaluation also `quality/*`, `validator/*` and `probe/*`. Non-finite values stay what
    they are. Empty when a run is resumed at its very end, where there is no block left to train."""
    seconds: float
    """Wall time of the block's steps, evaluation excluded."""
    looked: bool
    """Whether the block ended with an evaluation, on all ranks: a moment to checkpoint."""
    panels: Panels | None
    """Images of the probe slices, at evaluations on rank 0."""
    stability: float
    """S so far: the factor by which schedulers weigh a Dice."""
    verdict: Verdict | None
    """Set on the last one."""
    state: Callable[[], State]
    """The state from which `fit(resume=...)` continues exactly; copied when called."""


UPDATES = {"fused": fused, "sequential": sequential}
"""The orders in which networks are updated; see `RunConfig.updates`."""


@dataclass(slots=True)
class Run:
    """What changes while a run trains."""

    config: RunConfig
    net: Sifa
    players: Players
    pools: Pools
    monitor: Monitor
    ranks: Ranks
    referee: Referee
    average: Average | None
    """Running mean of the weights."""
    epoch_steps: int
    done: int = 0
    recordings: dict[bool, Recording] = field(default_factory=dict)
    """The step as a CUDA graph, with and without a penalty, once the first of its kind has been asked for."""

    @classmethod
    def start(cls, config: RunConfig, device: torch.device, ranks: Ranks, *, epoch_steps: int = 1) -> Run:
        """Fresh networks from the config's seed, the same on all ranks; then each rank its own random numbers.

        Args:
            config: the run.
            device: what to train on.
            ranks: the data-parallel group.
            epoch_steps: steps in an epoch, where `config.optim.epoch_steps` leaves that to the cohort.

        Raises:
            InputError: a setting of `config.speed` that this machine does not support.
        """
        check(config, device)
        arrange(config.speed)
        torch.manual_seed(config.seed)
        net = Sifa(config.net).to(device).train()
        if config.speed.channels_last:
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.speed.compile:
            net.compile_tails()
        ranks.share_weights(net)
        if ranks.world > 1:
            net.join_statistics(ranks.total)
        torch.manual_seed(config.seed * 1009 + ranks.rank + 1)
        seeds = (config.seed * 1009 + 2 * ranks.rank + i for i in range(2))
        epoch_steps = config.optim.epoch_steps or epoch_steps
        idle = dict.fromkeys(("p", "p_low"), idle_steps(config, epoch_steps))
        return cls(
            config,
            net,
            Players(net, config),
            Pools(*(ImagePool(config.pool, seed, config.pool_by) for seed in seeds)),
            Monitor(config.monitor, config.steps, watched(config), counted(config), idle),
            ranks,
            Referee.of(config, ranks, device),
            Average(net, config.optim.ema) if config.optim.ema else None,
            epoch_steps,
        )

    @property
    def device(self) -> torch.device:
        """Where the run trains."""
        return self.referee.dials.noise.device

    def advance(self, batch: Batch, number: int) -> Signals:
        """Do step `number`, counted from 1, on a batch; the device is not waited for."""
        now = rates(self.config, number, self.epoch_steps)
        self.players.set_rates(now.images, now.segmenter)
        self.referee.set(now, number)
        if self.config.speed.channels_last:
            batch = batch._replace(source=_channels_last(batch.source), target=_channels_last(batch.target))
        self.pools.turn(batch)
        if self.config.speed.graphs:
            kind = self.referee.penalise
            if kind not in self.recordings:
                self.recordings[kind] = Recording(self.update, self.undo, batch)
            signals = self.recordings[kind].replay(batch)
        else:
            signals = self.update(batch)
        if self.average is not None:
            self.average.follow(number)
        self.done = number
        return signals

    def update(self, batch: Batch) -> Signals:
        """Update every network once, at the rates that are set."""
        schedule = UPDATES[self.config.updates]
        return schedule(self.net, self.players, self.pools, batch, self.config, self.ranks, self.referee)

    def weigh(self, batch: Batch) -> dict[str, float]:
        """Measure what each term moves, and even the terms out if the run is told to; the device is waited for."""
        balance, norms = self.referee.balance, measure(self.net, batch, self.referee)
        balance.take(norms, self.done)
        return balance.signals(norms, float(self.referee.dials.predictions))

    def undo(self) -> Callable[[], None]:
        """Remember all that a step changes on the device; what is returned restores it in place."""
        held = [*self.net.parameters(), *self.net.buffers(), *self.players.moments(), *self.pools.slots()]
        held += self.referee.tensors()
        kept = [x.detach().clone() for x in held]
        device = self.device
        random = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

        @torch.no_grad()
        def restore() -> None:
            for x, was in zip(held, kept, strict=True):
                x.copy_(was)
            if device.type == "cuda":
                torch.cuda.set_rng_state(random, device)
            else:
                torch.set_rng_state(random)

        return restore

    def state(self) -> State:
        """Everything that `load` needs, for this rank."""
        shared = {
            "step": self.done,  # and the sampler's position: what a batch holds depends on seed and step alone
            "net": copy.deepcopy(self.net.state_dict()),  # torch hands out the live tensors
            "players": copy.deepcopy(self.players.state_dict()),
            "monitor": self.monitor.state_dict(),
            "referee": copy.deepcopy(self.referee.state_dict()),
            "average": self.average.state_dict() if self.average is not None else {},
        }
        own: dict[str, Any] = {"pools": [pool.state_dict() for pool in self.pools], "rng": torch.get_rng_state()}
        if self.ranks.world > 1:  # between evaluations each rank's running statistics are its own
            own["buffers"] = {name: buffer.clone() for name, buffer in self.net.named_buffers()}
        if torch.cuda.is_available():
            own["cuda_rng"] = torch.cuda.get_rng_state()
        return State(shared, own)

    def load(self, state: State) -> None:
        """Continue from `state`; one without a part of this rank's own lets that begin afresh, see `_part_anew`."""
        shared, own = state
        self.done = shared["step"]
        self.net.load_state_dict(shared["net"])
        self.players.load_state_dict(shared["players"])
        self.monitor.load_state_dict(shared["monitor"])
        self.referee.load_state_dict(shared["referee"])
        if self.average is not None:
            self.average.load_state_dict(shared["average"])
        if not own:
            self._part_anew()
            return
        for name, buffer in self.net.named_buffers():
            if "buffers" in own:
                buffer.copy_(own["buffers"][name])
        for pool, pooled in zip(self.pools, own["pools"], strict=True):
            pool.load_state_dict(pooled, self.config.batch // self.config.workers, self.device)
        torch.set_rng_state(own["rng"].cpu())
        if "cuda_rng" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda_rng"].cpu())

    def _part_anew(self) -> None:
        """Begin pools and random numbers from seed, step and rank: another number of ranks wrote the checkpoint.

        The pools fill again as they did when the run began; running statistics are those of rank 0.
        """
        seeds = np.random.SeedSequence((self.config.seed, self.done, self.ranks.rank)).generate_state(3)
        pools = (ImagePool(self.config.pool, int(seed), self.config.pool_by) for seed in seeds[1:])
        self.pools = Pools(*pools)
        torch.manual_seed(int(seeds[0]))


def fit(
    config: RunConfig,
    cohort: Cohort,
    *,
    ranks: Ranks | None = None,
    resume: State | None = None,
    past: Sequence[Finding] = (),
) -> Iterator[Progress]:
    """Train one run; the last `Progress` carries the verdict.

    Stops early on a divergence, which is a result and no exception. Every rank of the group iterates in step:
    signals and verdict are the same on all of them.

    Args:
        config: the run.
        cohort: its slices, staged on the device to train on.
        ranks: the data-parallel group; alone by default.
        resume: a state of the same run and rank, from `Progress.state`.
        past: divergences that the run went back from; see `recovery`.
    """
    ranks = ranks or Ranks()
    torch.set_flush_denormal(True)  # small initial weights make denormals, which CPUs compute several times slower
    run = Run.start(config, cohort.device, ranks, epoch_steps=cohort.epoch_steps(config))
    if resume is not None:
        run.load(resume)
    run.monitor.past = tuple(past)
    if run.done == config.steps or run.monitor.diverged:  # resumed at its very end: the verdict alone is wanting
        verdict = run.monitor.verdict(run.done)
        yield Progress(run.done, {}, 0.0, False, None, run.monitor.stability(), verdict, run.state)
    due = evaluations(config)
    while run.done < config.steps and not run.monitor.diverged:
        began = time.perf_counter()
        signals = _block_or_none(run, config, cohort, ranks)
        if signals is None:
            del run  # and with it what fills the memory
            raise too_large(config, cohort)
        seconds = time.perf_counter() - began
        ended = run.done == config.steps or run.monitor.diverged is not None
        looked, panels = ended or run.done in due, None
        if looked:
            found, panels = _evaluate(run, cohort)
            signals |= found
        ending = run.monitor.verdict(run.done) if ended else None
        yield Progress(run.done, signals, seconds, looked, panels, run.monitor.stability(), ending, run.state)


def _evaluate(run: Run, cohort: Cohort) -> tuple[dict[str, float], Panels | None]:
    """Score the raw weights and their running mean, draw, and let every rank's monitor look; rank 0 does the work."""
    run.ranks.average_buffers(run.net)
    signals: dict[str, float] = {}
    panels = None
    if run.ranks.rank == 0:
        signals, panels = look(run.net, cohort)
        signals |= undisturbed(probe, run.net, cohort)
        if run.average is not None:
            with run.average.shown():
                mean = undisturbed(evaluate, run.net, cohort)
            scored = {name: value for name, value in mean.items() if name.startswith("quality/")}
            signals |= {name.replace("quality/", "quality/ema_"): value for name, value in scored.items()}
    seen = run.ranks.tell({name: value for name, value in signals.items() if name.startswith("probe/")})
    run.monitor.look(run.done, seen)
    return signals, panels


def _block_or_none(run: Run, config: RunConfig, cohort: Cohort, ranks: Ranks) -> dict[str, float] | None:
    """`_block`; None where the memory is too small. The error is let go, since its frames hold on to memory."""
    try:
        return _block(run, config, cohort, ranks)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    return None


def too_large(config: RunConfig, cohort: Cohort) -> InputError:
    """What to tell when a batch needs more memory than there is; tries smaller ones, so that one that fits is named."""
    share = config.batch // config.workers
    smaller = (share >> shift for shift in range(1, share.bit_length()))
    fits = next((slices for slices in smaller if _fits(config, cohort, slices)), None)
    remedies = [f"set batch to {fits * config.workers}" if fits else "take a device with more memory"]
    if config.speed.precision != "bfloat16":
        remedies.append("set speed.precision to bfloat16")
    return InputError(
        "batch",
        found=f"{share} slices of each domain a worker, which need more memory than {cohort.device} has free",
        rule="a step's images, gradients and networks are in memory at once",
        remedy=", or ".join([*remedies, f"set net.width below {config.net.width:g}"]),
    )


def _fits(config: RunConfig, cohort: Cohort, slices: int) -> bool:
    """Whether a step on so many slices of each domain fits into the memory; nothing of the trial is left."""
    try:
        smaller = config.at("workers", 1).at("batch", slices)
        Run.start(smaller, cohort.device, Ranks(alone=True)).advance(cohort.batch(smaller, 1), 1)
    except ValueError:  # batch norm of a single slice
        return False
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def _block(run: Run, config: RunConfig, cohort: Cohort, ranks: Ranks) -> dict[str, float]:
    """Train one block and judge it; the device is waited for once, at its end."""
    first = run.done + 1
    rows: list[Signals] = []
    weighed: dict[str, float] = {}
    for number in range(first, min(run.done + run.monitor.horizon.block, config.steps) + 1):
        batch = cohort.batch(config, number, ranks.rank)
        rows.append(run.advance(batch, number))
        if run.referee.balance.due(number):
            weighed = run.weigh(batch)
    names = list(rows[0])
    table = torch.stack([torch.stack([row[name] for name in names]) for row in rows])
    (table,) = ranks.average([table])
    judged = np.column_stack([table.cpu().numpy(), _weights(run.net, len(rows))])
    means = run.monitor.observe(first, [*names, "weights/norm"], judged)
    return means | weighed


def _weights(net: Sifa, steps: int) -> np.ndarray:
    """The norm of all weights at the end of a block, a column of `steps` rows.

    Had they not been finite before the last step, losses would have told so: only the last row may say it.
    """
    norm = float(torch.stack(torch._foreach_norm([p.detach() for p in net.parameters()])).norm())
    column = np.full(steps, norm if np.isfinite(norm) else 0.0, dtype=np.float32)
    column[-1] = norm
    return column


def evaluations(config: RunConfig) -> set[int]:
    """Steps at which a run looks: evenly spaced, each at the end of a block. One that diverges looks then, too."""
    block = Horizon.of(config.monitor, config.steps).block
    wanted = {round(config.steps * k / config.evaluations) for k in range(1, config.evaluations + 1)}
    return {min(config.steps, -(-step // block) * block) for step in wanted}


def look(net: Sifa, cohort: Cohort) -> tuple[dict[str, float], Panels]:
    """Measure and draw without disturbing the random numbers of the training."""
    return undisturbed(evaluate, net, cohort), undisturbed(draw, net, cohort)


Found = TypeVar("Found")


def undisturbed(work: Callable[[Sifa, Cohort], Found], net: Sifa, cohort: Cohort) -> Found:
    """What `work` finds, with random numbers of its own, the same every time."""
    devices = [cohort.device] if cohort.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return work(net, cohort)


def _channels_last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)
