"""Does it help when all terms of the objective matter the same, and which rule brings that about?

    python studies/balance.py                                     # synthetic heads, two CPU cores
    python studies/balance.py --store cohort.zarr                 # the real size: 256 x 256, batch 4, 40 000 steps
    python studies/balance.py --resume                            # go on where it was stopped

Three rules (`balance.mode`): weights as they are set, calibrated once in the run's first steps, or adjusted throughout
(VQGAN). Each with the adversarial weights of images, predictions and the auxiliary game at .3, 1 and 3 times the
published ones (at the real size .1 too), and with all three at 1: under the two rules that adjust, every adversarial
term then pulls as strongly as its anchor, the cycles or the segmentation. A weight means a multiple of the anchor's
pull there, and a multiple of the loss under fixed weights, so that rows of one rule compare, and the best of each.

"The same importance" is measured by how evenly the norms of the terms' gradients share what moves a network: their
entropy over that of equal shares, 1 where all matter the same. Nothing is stopped for its Dice, the monitor ends what
diverges.

Budget: built in 36 runs, 12 conditions with 3 seeds, of 500 steps at 32 x 32, width .25; some 20 minutes on two CPU
cores. Real: 15 conditions with 3 seeds, 45 runs of 40 000 steps.

Finding: none yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from rich.console import Console

from equipoise import outcomes
from equipoise.config import PUBLISHED
from equipoise.config_base import Leaf
from equipoise.grid import Changes, Grid
from equipoise.heads import Heads
from equipoise.launch import conduct
from equipoise.launch.conduct import main
from equipoise.outcomes import Column, Outcome, Told
from equipoise.study import Study, StudyFolder

SIDE = 32
"""Pixels of a synthetic slice."""
MODES = ("static", "calibrated", "grad_ratio")
ADVERSARIAL = ("loss.adv_image", "loss.adv_p", "loss.aux")
"""The weights that the rules adjust."""
FACTORS = (0.1, 0.3, 1.0, 3.0)
"""On all three; the built-in size leaves the first out."""
EVEN = "all at 1"
NETWORKS = {"generator": "G", "decoder": "U", "encoder": "E"}


@dataclass(frozen=True, kw_only=True)
class Options(conduct.Options):
    """What the command line says. Without any, small networks on synthetic heads."""

    seeds: int = 3
    """Runs of every condition."""


def declare(options: Options) -> Study:
    """The grid that the options ask for, as a study."""
    small = options.store is None
    run = PUBLISHED.having({"batch": 4, "workers": options.workers_per_run})
    run = run.at("steps", options.steps or (500 if small else 40_000))
    if small:
        run = run.having({"net.width": 0.25, "evaluations": 5, "balance.every": max(1, run.steps // 20)})
    calibration = max(run.balance.every, run.steps // 10) if small else run.balance.calibration_steps
    grid = Grid(
        run=run,
        conditions=conditions(FACTORS[1:] if small else FACTORS, calibration),
        seeds=range(options.seed, options.seed + options.seeds),
    )
    return grid.study("balance", "Does it help when all terms of the objective matter the same?")


def conditions(factors: Sequence[float], calibration: int) -> dict[str, Changes]:
    """What is changed of the published settings, with so many steps to calibrate in."""
    weights: dict[str, dict[str, Leaf]] = {
        f"x {factor:g}": {path: factor * float(PUBLISHED.flat()[path]) for path in ADVERSARIAL} for factor in factors
    }
    weights[EVEN] = dict.fromkeys(ADVERSARIAL, 1.0)
    rules: dict[str, dict[str, Leaf]] = {mode: {"balance.mode": mode} for mode in MODES}
    rules["calibrated"]["balance.calibration_steps"] = calibration
    return {f"{mode}, {name}": {**rules[mode], **weights[name]} for mode, name in product(rules, weights)}


def columns(found: Sequence[Outcome]) -> list[Column]:
    """What is told of a condition."""
    return [
        outcomes.CONDITION,
        outcomes.VERDICTS,
        outcomes.ONSETS,
        outcomes.WORST,
        *(outcomes.end(f"balance/{network}", f"evenness, {symbol}") for network, symbol in NETWORKS.items()),
        *map(outcomes.quality, outcomes.measured(found)),
    ]


def tell(folder: StudyFolder, console: Console) -> None:
    """The table of rules and weights."""
    found = outcomes.read(folder)
    told = Told.of(folder.study.question, outcomes.cells(found), columns(found))
    outcomes.tell(folder, console, told, found)


if __name__ == "__main__":
    main(declare, __doc__, options=Options, tell=tell, heads=Heads(SIDE, "brain"))
