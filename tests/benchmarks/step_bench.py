"""What a training step costs: the fused schedule against the published one, and against plain matrix products.

At 256 x 256 and width 1, on synthetic tensors and all cores; two slices of each domain a step, since batch norm refuses
one. `step_table.py` does the same for a GPU, and names the operators that are left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from measure import Result, seconds
from step_table import BF16, Changes, Stepper, flops

from equipoise.config import PUBLISHED
from equipoise.speed import bfloat16

REPEATS = 3
TRIALS = 2
SIZE = 256
SIDE = 2048
PRODUCTS = 4
CPU = torch.device("cpu")
BASE = PUBLISHED.at("batch", 2)
Work = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """One way to compute a step, and how long the schedules take in it."""

    changes: Changes

    def stepper(self, schedule: str) -> Stepper:
        """A fresh run, after its first step, which prepares much."""
        made = Stepper(BASE.having({**self.changes, "updates": schedule}), SIZE, CPU)
        made()
        return made

    def __str__(self) -> str:
        """What differs from the defaults."""
        told = [str(self.changes.get("speed.precision", "float32"))]
        return ", ".join(told + [name.removeprefix("speed.") for name, value in self.changes.items() if value is True])


def step(_: Path) -> Iterator[Result]:
    """Speed and FLOPs of both schedules, and the fused one's share of the rate of matrix products."""
    with all_cores() as cores:
        plain = quickest({})
        best = quickest(BF16) if bfloat16(CPU) else plain
        works: dict[str, Work] = {
            "as published": Setting({}).stepper("sequential"),
            "sequential": plain.stepper("sequential"),
            "fused": plain.stepper("fused"),
            "best": best.stepper("fused"),
            "float32": products(torch.float32),
            "bfloat16": products(torch.bfloat16),
        }
        taken = in_turns(works)
        counted = {schedule: flops(BASE.at("updates", schedule), SIZE, CPU) for schedule in ("fused", "sequential")}
    where = f"{SIZE} x {SIZE}, width 1, {BASE.batch} slices of each domain, {cores} threads"
    for ours, theirs, setting in (("fused", "sequential", plain), ("best", "as published", best)):
        against = "the same setting" if ours == "fused" else "eager float32"
        ratio, goal = taken[theirs] / taken[ours], "" if ours == "fused" else "goal >= 4; "
        detail = f"{taken[ours]:.2f} against {taken[theirs]:.2f} s; {goal}{setting}; {where}"
        yield Result("step.fused_speed_vs_sequential", ratio, "times the speed", f"sequential, {against}", detail)
    pair = {schedule: work / BASE.batch / 1e9 for schedule, work in counted.items()}
    detail = f"for a pair of slices; sequential {pair['sequential']:.0f}"
    yield Result("step.flops", pair["fused"], "GFLOP", "torch's formulae", detail)
    for ours, theirs, setting in (("fused", "float32", plain), ("best", "bfloat16", best)):
        if ours == "fused" or best.changes.get("speed.precision") == theirs:
            rate, peak = counted["fused"] / taken[ours], PRODUCTS * 2 * SIDE**3 / taken[theirs]
            detail = f"{rate / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s; goal >= .6 in float32; {setting}; {where}"
            yield Result("step.gemm_share", rate / peak, "of the rate", f"{SIDE}^3 matmul, {theirs}", detail)


@contextmanager
def all_cores() -> Iterator[int]:
    """Let torch use every core that this process may."""
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    try:
        yield cores
    finally:
        torch.set_num_threads(before)


def quickest(precision: Changes) -> Setting:
    """The setting of this precision in which a fused step is quickest here.

    Compiled ones are not tried: they take minutes to make, and were slower on CPUs.
    """
    settings = [Setting({**precision, "speed.channels_last": last}) for last in (False, True)]
    taken = in_turns({str(setting): setting.stepper("fused") for setting in settings}, TRIALS)
    return min(settings, key=lambda setting: taken[str(setting)])


def products(dtype: torch.dtype) -> Work:
    """Products of two random square matrices, several for a steady time."""
    a, b = torch.randn(2, SIDE, SIDE).to(dtype)

    def work() -> None:
        for _ in range(PRODUCTS):
            a @ b

    return work


def in_turns(works: Mapping[str, Work], repeats: int = REPEATS) -> dict[str, float]:
    """Median wall times of pieces of work, taken in turns."""
    times = [{name: seconds(work) for name, work in works.items()} for _ in range(repeats)]
    return {name: median(one[name] for one in times) for name in works}
