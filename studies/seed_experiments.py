"""Do the 2022 study's three experiments blow up again, as they were run, and does SIFA as published?

    python studies/seed_experiments.py                            # synthetic heads, two CPU cores
    python studies/seed_experiments.py --mask brain --store brain.zarr       # the real size: 256 x 256
    python studies/seed_experiments.py --resume                   # go on where it was stopped

| experiment | masks  | steps  | lr   | segmentation parameter | what its slides show                        |
|------------|--------|--------|------|------------------------|---------------------------------------------|
| 1          | vessel | 40 000 | 2e-3 | 1                      | blows up after 15 000, a jump at about 15.3k |
| 2          | brain  | 40 000 | 2e-3 | 1                      | blows up after 5 000, a jump at about 5.7k   |
| 3          | brain  | 10 000 | 1e-4 | 1                      | no jump; blurred, small parts missed         |

As run means with `STUDY_2022` and all of the port's `DEFECTS`: no instance norm, stale batch norm, Glorot weights, grey
frame, pooled limits, slices instead of subjects dealt out. The control is SIFA as published, at the same batch of 4 and
for as many steps. Vessel and brain masks are two stores, and so two studies, each in a folder of its own.

Experiment 3 ended at a step at which experiment 1 was still healthy: it was censored, not cured. So S is taken at that
step in all runs (`monitor.horizon_steps`), where they compare, steps lived are counted to the end of the longest, and
experiment 3 is also continued to that. A run of a quarter of the steps is judged by shorter rules: see `Horizon`.

The built-in size has 40 000 / 600 = 67 times fewer steps, 600 and 150, and changes no rate: what a step does stays what
it was, and there are fewer of them. Its frame takes the same share of an image as 64 pixels of 256.

Budget: built in 18 runs at 32 x 32 (with a frame 48 x 48), width .25, three seeds; some 15 minutes on two CPU cores.
Real: the same runs at 256 x 256.

Finding: none yet.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import tyro
from rich.console import Console

from equipoise import outcomes
from equipoise.config import DEFECTS, PUBLISHED, STUDY_2022
from equipoise.grid import Changes, Grid
from equipoise.heads import Heads
from equipoise.launch import conduct
from equipoise.outcomes import Told
from equipoise.study import Study, StudyFolder
from slicestore.errors import InputError
from slicestore.store import Store

Mask = Literal["vessel", "brain"]
CONTROL = "as published"
SIDE = 32
"""Pixels of a synthetic slice."""
PORTED = ("no instance norm", "stale batch norm", "glorot", "grey frame", "pooled limits", "split by slice")
"""The defects that all three experiments had; the rate was their own."""
SHORTER = 4
"""Experiments 1 and 2 ran so many times longer than experiment 3."""


@dataclass(frozen=True, kw_only=True)
class Options(conduct.Options):
    """What the command line says. Without any, both masks of synthetic heads."""

    mask: Mask | None = None
    """The experiments of one mask only, of which --store then has to hold masks; else of both, one after another."""
    seeds: int = 3
    """Runs of every experiment."""


def declare(mask: Mask, options: Options) -> Study:
    """The experiments of one mask, as a study."""
    small = options.store is None
    side = SIDE if options.store is None else Store.open(options.store).preprocessing.size
    steps = options.steps or (600 if small else STUDY_2022.steps)
    run = PUBLISHED.having({"batch": STUDY_2022.batch, "steps": steps, "workers": options.workers_per_run})
    run = run.at("monitor.horizon_steps", steps // SHORTER)
    if small:
        run = run.having({"net.width": 0.25, "evaluations": 6, "balance.every": 0})
    seeds = range(options.seed, options.seed + options.seeds)
    grid = Grid(run=run, conditions=conditions(mask, side, steps), seeds=seeds)
    return grid.study(named(mask), f"Do the 2022 study's experiments with {mask} masks blow up again?")


def named(mask: Mask) -> str:
    """The study of one mask."""
    return f"seed_experiments_{mask}"


def conditions(mask: Mask, side: int, steps: int) -> dict[str, Changes]:
    """What is changed of the published settings, for slices of `side` pixels."""
    seed = ported(side)
    tenfold: Changes = {**seed, "optim.lr": STUDY_2022.optim.lr}
    lower: Changes = {**seed, "optim.lr": 1e-4}
    if mask == "vessel":
        return {"experiment 1": tenfold, CONTROL: {}}
    return {
        "experiment 2": tenfold,
        "experiment 3": {**lower, "steps": steps // SHORTER},
        "experiment 3, continued": lower,
        CONTROL: {},
    }


def ported(side: int) -> dict[str, bool | int | float | str]:
    """What all experiments did otherwise than the published code, but for the rate."""
    made = {path: value for name in PORTED for path, value in DEFECTS[name].items()}
    made["loss.segmentation"] = 1.0
    made["data.frame"] = int(made["data.frame"]) * side // 256 // 4 * 4
    return made


def tell(folder: StudyFolder, console: Console) -> None:
    """The table of experiments."""
    found = outcomes.read(folder)
    run = folder.study.run
    columns = (
        outcomes.CONDITION,
        outcomes.LR,
        outcomes.VERDICTS,
        outcomes.ONSETS,
        outcomes.lived(run.steps),
        (f"S at {run.monitor.horizon_steps}, worst", outcomes.WORST[1]),
        outcomes.end("loss/cycle_t", "cycle t, end"),
        outcomes.end("critic/loss_t", "D_t's loss, end"),
        outcomes.SATURATED,
        *map(outcomes.quality, outcomes.measured(found)),
    )
    outcomes.tell(folder, console, Told.of(folder.study.question, outcomes.cells(found), columns), found)


def main(options: Options) -> None:
    """One study a mask; resuming begins those that had not begun.

    Raises:
        InputError: a store is given, but not the mask that it holds.
    """
    if options.store and options.mask is None:
        raise InputError(
            options.store, found="no --mask", rule="a store holds one kind of mask", remedy="say which: vessel or brain"
        )
    for mask in (options.mask,) if options.mask else get_args(Mask):
        name = options.name and f"{options.name}_{mask}"
        begun = any(options.results.glob(f"{name or named(mask)}*/study.json"))
        one = dataclasses.replace(options, name=name, resume=options.resume and begun)
        conduct.conduct(partial(declare, mask), one, tell=tell, heads=Heads(SIDE, mask))


if __name__ == "__main__":
    with conduct.mistakes_told():
        main(tyro.cli(Options, description=__doc__))
