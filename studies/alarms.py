"""How often does the monitor cry wolf, and how late is it?

    python studies/alarms.py                 # under two minutes on one core: traces alone, no network is trained
    python studies/alarms.py --traces 2000   # of each kind, for rarer alarms

The monitor sees one made-up loss, block by block, as in a run: it settles from five times its plateau within a fifth of
the run, with noise on its logarithm. sigma .15 a block is nominal: in two dozen real runs of 120 to 400 steps at width
1/8, where a block is a single step, losses had .02 to .33, and next to no memory from one step to the next. First come
traces in which nothing happens, then traces that blow up at some time between 30 % and 80 % of the run and stay up. One
alarm in a hundred quiet runs was the goal.

Finding (23 November 2026, working tree on 793ee9d, one Xeon core, 107 s; `python studies/alarms.py`).

False alarms in 500 quiet traces, per cent, by planned steps:

                                     120    500   2000   20 000
    nominal noise, sigma .15          .0     .0     .0      .0
    2.3 times the noise               .0     .0     .0      .0
    noise that drifts, AR(1) .9       .0     .0     .0      .0
    ... with twice the noise          .4    2.4    2.8     3.2
    falls to the end                  .0     .0     .0      .0
    spikes of x8, 1 block in 50       .0     .0     .0      .0
    creeps to twice its best          .0     .0     .0      .0
    ... and drifts                   6.2    1.6    2.4     2.6

Of 50 traces that blow up: per cent found; error of the onset, its median and what nine in ten do not exceed; steps from
the planted onset to the alarm, all in steps of a run of 20 000. No alarm came before its blow-up:

                        nominal, 20 000         drifting, 20 000         nominal, 500           nominal, 120
    x3 at once          100   +0   50   750     100   +0  105   750     100   +0    4   760      72   +0  167  2500
    x10 at once         100   +0    0   700     100   +0    0   700     100   +0    0   760     100   +0    0  2333
    x100 at once        100   +0    0   700     100   +0    0   700     100   +0    0   760     100   +0    0  2333
    x3 over 500         100  +50  100   950      96  +50  165  1050     100  +80  160  1000      58   +0  167  2667
    x10 over 500        100  +50  100   800     100  +50  100   850     100  +40   80   880     100   +0    0  2500
    x100 over 500       100  +50   50   750     100  +50   50   800     100  +40   80   800     100   +0    0  2417
    x3 over 2000        100 +550  805  1825      92 +775 1625  2275     100 +480  724  1880      56 +500  833  3667
    x10 over 2000       100 +200  300  1200     100 +150  355  1400     100 +200  284  1240     100 +167  333  3167
    x100 over 2000      100 +100  150   950     100  +75  200  1000     100  +80  160  1000     100 +167  167  2667

At 2000 steps it is as at 20 000, but of x3 over 2000 steps 90 are found. So: at the noise that runs have it does not
cry wolf, and what rises tenfold is found 700 to 1400 steps after its onset, which is told within 355. Noise that both
drifts and is twice nominal, or drifts on a loss that doubles, costs three alarms in a hundred. In a run of 120 steps a
window is a twelfth of it: x3 is missed in two of five, and a loss that creeps and drifts is called a blow-up in one of
sixteen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from equipoise.config import MonitorConfig
from equipoise.horizon import Horizon
from equipoise.monitor import Finding, Monitor

CONFIG = MonitorConfig()
LOSS = "loss/cycle_t"
LENGTHS = (120, 500, 2000, 20_000)
"""Planned steps."""
SIGMA = 0.15
RAMPS = (0, 500, 2000)
RISES = (3, 10, 100)
Noise = Callable[[np.random.Generator, int], np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Where to stop."""

    traces: int = 500
    """Quiet traces of each kind and length."""

    blow_ups: int = 50
    """Traces of each rise and ramp."""

    lengths: tuple[int, ...] = LENGTHS
    """Planned steps."""


def independent(sigma: float) -> Noise:
    """Normal noise without memory."""
    return lambda rng, blocks: sigma * rng.standard_normal(blocks)


def drifting(sigma: float, memory: float = 0.9) -> Noise:
    """Noise that remembers: AR(1) of standard deviation `sigma`."""

    def noise(rng: np.random.Generator, blocks: int) -> np.ndarray:
        fresh = rng.standard_normal(blocks)
        values = [fresh[0]]
        for new in fresh[1:]:
            values.append(memory * values[-1] + math.sqrt(1 - memory**2) * new)
        return sigma * np.array(values)

    return noise


def spiked(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Nominal noise, and in one block of fifty eight times the loss."""
    return independent(SIGMA)(rng, blocks) + math.log(8) * (rng.random(blocks) < 0.02)


def settling(blocks: int, share: float = 0.06) -> np.ndarray:
    """Log of a loss that falls from 5 to its plateau at 1, by e within `share` of the run."""
    return np.asarray(np.log1p(4 * np.exp(-np.arange(blocks) / (share * blocks))))


def creeping(blocks: int) -> np.ndarray:
    """Log of a loss that settles, then doubles from 30 % to 90 % of the run."""
    return settling(blocks) + math.log(2) * np.clip((np.arange(blocks) / blocks - 0.3) / 0.6, 0, 1)


class Kind(NamedTuple):
    """What a quiet loss does, as logarithms of blocks, and its noise."""

    course: Callable[[int], np.ndarray]
    noise: Noise


QUIET: Mapping[str, Kind] = {
    "nominal noise, sigma .15": Kind(settling, independent(SIGMA)),
    "2.3 times the noise": Kind(settling, independent(2.3 * SIGMA)),
    "noise that drifts, AR(1) .9": Kind(settling, drifting(SIGMA)),
    "... with twice the noise": Kind(settling, drifting(2 * SIGMA)),
    "falls to the end": Kind(lambda blocks: settling(blocks, 0.5), drifting(SIGMA)),
    "spikes of x8, 1 block in 50": Kind(settling, spiked),
    "creeps to twice its best": Kind(creeping, independent(SIGMA)),
    "... and drifts": Kind(creeping, drifting(SIGMA)),
}
BLOWN: Mapping[str, tuple[Noise, tuple[int, ...]]] = {
    "nominal noise": (independent(SIGMA), LENGTHS[::-1]),
    "noise that drifts": (drifting(SIGMA), LENGTHS[-1:]),
}
"""Noise, and the lengths at which blow-ups are planted in it."""


class Met(NamedTuple):
    """What became of planted blow-ups of one kind, in shares and in steps of a run of 20 000."""

    found: float
    early: float
    onset_median: float
    onset_90: float
    """Nine in ten onsets are no further off."""
    delay: float
    """Median from the planted onset to the alarm."""


def alarm(logs: np.ndarray, steps: int) -> Finding | None:
    """What the monitor says of a loss."""
    monitor = Monitor(CONFIG, steps, {LOSS: CONFIG.cycle_growth}, ())
    for number, row in enumerate(np.exp(logs)[:, None, None]):
        monitor.observe((number + 1) * monitor.horizon.block, [LOSS], row)
        if monitor.diverged:
            return monitor.diverged
    return None


def blocks(steps: int) -> int:
    """Whole blocks in a run."""
    return steps // Horizon.of(CONFIG, steps).block


def false_alarms(kind: Kind, steps: int, traces: int) -> float:
    """Share of quiet traces with an alarm."""
    count = blocks(steps)
    seeds = (np.random.default_rng((seed, steps)) for seed in range(traces))
    return sum(alarm(kind.course(count) + kind.noise(rng, count), steps) is not None for rng in seeds) / traces


def blow_ups(noise: Noise, steps: int, rise: float, ramp: int, traces: int) -> Met:
    """What became of planted ones."""
    count, block = blocks(steps), Horizon.of(CONFIG, steps).block
    unit = 20_000 / steps
    found: list[tuple[float, float]] = []
    early = 0
    for seed in range(traces):
        rng = np.random.default_rng((seed, steps, ramp))
        at = int(count * rng.uniform(0.3, 0.8))
        risen = np.clip((np.arange(count) + 1 - at) / max(1, ramp / unit / block), 0, 1)
        finding = alarm(settling(count) + noise(rng, count) + math.log(rise) * risen, steps)
        if finding is not None and finding.alarm <= at * block:
            early += 1
        elif finding is not None:
            found.append(((finding.onset - at * block) * unit, (finding.alarm - at * block) * unit))
    onset, delay = np.array(found).T if found else np.full((2, 1), np.nan)
    return Met(
        len(found) / traces,
        early / traces,
        float(np.median(onset)),
        float(np.quantile(abs(onset), 0.9)),
        float(np.median(delay)),
    )


def quiet_table(options: Options) -> Table:
    """False alarms by kind and length."""
    heads = (f"{steps} steps" for steps in options.lengths)
    table = Table("nothing happens", *heads, title=f"false alarms in {options.traces} traces, per cent")
    for name, kind in QUIET.items():
        table.add_row(name, *(f"{100 * false_alarms(kind, n, options.traces):.1f}" for n in options.lengths))
    return table


def blown_rows(options: Options) -> Iterator[tuple[str, ...]]:
    """What is told of planted blow-ups, a row a kind and length."""
    cells = ((name, n, ramp, rise) for name in BLOWN for n in BLOWN[name][1] for ramp in RAMPS for rise in RISES)
    for name, steps, ramp, rise in cells:
        if steps in options.lengths:
            met = blow_ups(BLOWN[name][0], steps, rise, ramp, options.blow_ups)
            kind = f"x{rise} " + (f"over {ramp}" if ramp else "at once")
            numbers = (f"{met.onset_median:+.0f}", f"{met.onset_90:.0f}", f"{met.delay:.0f}")
            yield f"{name}, {steps}", kind, f"{100 * met.found:.0f}", f"{100 * met.early:.0f}", *numbers


def main(options: Options) -> None:
    """Print both tables."""
    console = Console(width=110)
    console.print(quiet_table(options))
    table = Table(
        "run", "blow-up", "found %", "early %", "onset", "90 % within", "delay", title="steps of a run of 20 000"
    )
    for row in blown_rows(options):
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
