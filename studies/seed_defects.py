"""Which of the 2022 port's defects alone regenerates its blow-up, and which settings survive them all?

    python studies/seed_defects.py                                # synthetic heads, one seed, two CPU cores
    python studies/seed_defects.py --full                         # also all defects but one, for each
    python studies/seed_defects.py --cures                        # two that fail at once, with a cure each
    python studies/seed_defects.py --store cohort.zarr            # the real size: 256 x 256, batch 4, 40 000 steps
    python studies/seed_defects.py --resume                       # go on where it was stopped; with --cures for those

One run a condition, learning rate and seed; nothing is stopped for its Dice, the monitor ends what diverges. The
conditions are the published settings; each switch of `equipoise.config.DEFECTS` alone; two and three of them that are
suspected together; and all, with stale batch norm as in the port (fixed batch norm excludes it). `--full` adds all but
one for each, the two halves of the missing instance norm, and all with fixed instead of stale batch norm. A defect that
does it alone is sufficient; one without which the others do not is necessary. The tenfold rate is the other axis: 2e-4,
as published, and 2e-3; on synthetic heads, where few steps see few blow-ups, 6e-3 too.

A blow-up is a divergence or a saturation: onsets, steps lived and p-values (log-rank, against the published settings at
the same rate) are of these. Verdicts and S count collapses too, of masks alone among them.

The grey frame keeps its share of an image: a quarter of the slice's side on each side, of which 44 % are content, where
the 2022 study had 40. The Dice of runs with stale batch norm is that of an evaluation without statistics, as it was.

`--cures` runs what fails at once, no instance norm with pooled limits at 2e-3, with what might survive it. A running
mean of the weights is no cure of its own: every row tells its Dice beside that of the raw weights.

Budget: built in 36 runs of 500 steps at 32 x 32 (with a frame 48 x 48), width .25, batch 4, a third of which end early;
some 25 minutes on two CPU cores, 8 with `--rates .002`. `--full` adds 27 runs, `--cures` has 17. Real: the same runs
with 3 seeds and without 6e-3, of 40 000 steps at 256 x 256.

Finding (2026-11-23, commit 97ecef4, two CPU cores, 42 minutes; `--seeds 3 --rates .002 .006`, 72 runs): **it is the
missing instance norm.** Runs that blew up, of 3, with the onsets:

                                             lr 2e-3             lr 6e-3
    as published                             0                   1: 196
    stale batch norm (trains as published)   0                   1: 196
    fixed batch norm; glorot; pooled limits  0, 0, 0             0, 0, 0
    grey frame                               1: 105              0
    split by slice                           0                   1: 156
    no instance norm                         2: 283 370          3: 2 2 17
    no instance norm, glorot                 1: 8                3: 1 7 172
    no instance norm, pooled limits          3: 4 4 7            3: 2 2 179
    no instance norm, glorot, pooled limits  2: 287 323          3: 1 11 78
    all together                             2: 327 344, and a   3: 98 156 435
                                             collapsed mask

Without instance norm 10 of 15 runs blew up at 2e-3 and 15 of 15 at 6e-3; with it 1 and 3 of 21, and those four only
doubled their target cycle loss (.05 to .1). Pooled limits bring it on: p = .02 against the published settings at 2e-3,
where no other condition comes below .1 with 3 seeds. Seed 0 of the three together is the 2022 picture: target cycle
loss (x10) from .4 to 10.1 within 20 steps of 323 and flat, x_tst saturated at one end, generator total x 1e4 in
between, D_t's loss falling only afterwards (the same run with the monitor's limits out of reach): there the critic won
because G had died, not the other way round. Others saturate from the first steps on, as the 2022 vessel run seems to
have done before it came back near step 1900. So the blow-up is the port's, made worse by rate and limits; SIFA as
published held at 2e-3 for these 500 steps. Stopping at the alarm saved 26 % of all steps. The running mean of the
weights had the higher target Dice in most stable conditions (as published at 2e-3 .66 against .56; pooled limits .76
and .46).

`--cures` (commit 26fe1bb, 5 minutes, seed 0): of 17 settings one survived 500 steps at 2e-3, instance norm back in
images and critics (S 1, target Dice .32, of the running mean .86; with 3 seeds above, "pooled limits": S 1, .46 +- .31
and .76 +- .11). In images alone it lasted to step 200; domains' own limits to 370 and Glorot weights to 323. Whatever
holds the critics (spectral norm, r1r2 at gamma 1 and .01, relativistic pairs, instance noise, a tenth of their rate),
clipping, falling rates and three returns at half the rate each changed nothing: G saturates within 4 steps, before a
critic matters.

By eye the verdicts agree with the curves in 66 of 72 runs. Not in the four with instance norm above: a loss that
doubles is no blow-up to the eye, and like rises in runs that went on came back. Nor in two "stable" ones whose
segmentation loss had risen for good: one 35 steps before the end, where 52 must pass (S .41), one to three times its
noisy level, which is below the limit. At 2e-4 only seed 0 of the published settings and of the first six switches has
been run: none of the 7 blew up (stale batch norm's masks collapsed). The real size has not been run: there was no GPU.
Width 1/4 at 32 x 32 with 500 steps is not the 2022 study; that a blow-up takes thousands of steps there, the small size
cannot show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.console import Console

from equipoise import outcomes
from equipoise.config import DEFECTS, PUBLISHED
from equipoise.grid import Changes, Grid
from equipoise.heads import Heads
from equipoise.launch import conduct
from equipoise.launch.conduct import main
from equipoise.outcomes import Cell, Column, Told
from equipoise.study import Study, StudyFolder
from equipoise.survival_sheet import write_survival_sheet
from slicestore.store import Store

PAIR = ("no instance norm", "glorot")
UNITS = ("no instance norm", "pooled limits")
TRIO = ("no instance norm", "glorot", "pooled limits")
"""Defects that are tried together: the pair that a toy check of the blow-up had suspected, and with pooled limits."""
CURED = "seed_cures"
"""Name of the study of cures."""
CONTROL, TOGETHER = "as published", "all together"
TENFOLD = 2e-3
RATES = (2e-4, TENFOLD)
HASTE = 6e-3
"""A third rate of the built-in size, whose few steps see few blow-ups at the second."""
SIDE = 32
"""Pixels of a synthetic slice."""
AXIS, VARIANT = "tenfold rate", "fixed batch norm"
"""Of the defects, the one that is the grid's other axis, and the one that excludes another."""
HALVES: dict[str, Changes] = {
    "no instance norm in images": {"net.image_norm": "none"},
    "no instance norm in critics": {"net.critic_norm": "none"},
}
CURES: dict[str, Changes] = {
    "none": {},
    "instance norm back": {"net.image_norm": "instance", "net.critic_norm": "instance"},
    "instance norm back in images": {"net.image_norm": "instance"},
    "instance norm back in critics": {"net.critic_norm": "instance"},
    "limits of each domain": {"data.limits": "domain"},
    "glorot": {"net.initial": "glorot"},
    "spectral norm": {"net.critic_norm": "spectral"},
    "r1r2": {"critic.penalty": "r1r2", "critic.penalty_every": 4},
    "r1r2, gamma .01": {"critic.penalty": "r1r2", "critic.penalty_every": 4, "critic.gamma": 0.01},
    "spectral norm, r1r2": {"net.critic_norm": "spectral", "critic.penalty": "r1r2", "critic.penalty_every": 4},
    "clipping": {"optim.clip": 1.0},
    "rates fall over the second half": {"optim.schedule": "linear_half"},
    "rates fall as a cosine": {"optim.schedule": "cosine"},
    "critics at a tenth of the rate": {"optim.lr_critic_ratio": 0.1},
    "instance noise": {"critic.noise": 0.1},
    "relativistic pairs": {"loss.adversarial": "rp", "critic.penalty": "r1r2", "optim.beta1": 0.0},
    "halved rates after a divergence": {"recovery.times": 3},
}
"""What is changed of the defects that fail at once together."""


@dataclass(frozen=True, kw_only=True)
class Options(conduct.Options):
    """What the command line says. Without any, small networks on synthetic heads."""

    seeds: int | None = None
    """Runs of every condition at every rate; 1 on synthetic heads, else 3."""
    rates: tuple[float, ...] = ()
    """Learning rates; by default 2e-4 and 2e-3, on synthetic heads 6e-3 too. The cures have 2e-3, or these."""
    full: bool = False
    """All but one for each defect too, and halves of the missing instance norm."""
    cures: bool = False
    """Look for settings that survive what fails at once at 2e-3 instead."""


def declare(options: Options) -> Study:
    """The grid that the options ask for, as a study."""
    small = options.store is None
    side = SIDE if options.store is None else Store.open(options.store).preprocessing.size
    run = PUBLISHED.having({"batch": 4, "workers": options.workers_per_run})
    run = run.at("steps", options.steps or (500 if small else 40_000))
    if small:
        run = run.having({"net.width": 0.25, "evaluations": 5, "balance.every": 0})
    seeds = range(options.seed, options.seed + (options.seeds or (1 if small else 3)))
    if options.cures:
        sick = merged(switches(side), UNITS)
        cured = {name: {**sick, **cure} for name, cure in CURES.items()}
        question = "Which settings survive the defects that fail at once, at their learning rate?"
        grid = Grid(run=run, conditions=cured, rates=options.rates or (TENFOLD,), seeds=seeds)
        return grid.study(CURED, question)
    question = "Which of the 2022 port's defects alone regenerates its blow-up?"
    rates = options.rates or ((*RATES, HASTE) if small else RATES)
    grid = Grid(run=run, conditions=conditions(side, options.full), rates=rates, seeds=seeds)
    return grid.study("seed_defects", question)


def conditions(side: int, full: bool) -> dict[str, Changes]:
    """What is changed of the published settings, for slices of `side` pixels."""
    alone = switches(side)
    made: dict[str, Changes] = {CONTROL: {}, **alone}
    for names in (PAIR, UNITS, TRIO):
        made[", ".join(names)] = merged(alone, names)
    made[TOGETHER] = together(side)
    if full:
        made |= HALVES
        made |= {f"all but {name}": together(side, without=name) for name in alone if name != VARIANT}
        made[f"all, {VARIANT}"] = {**together(side), **alone[VARIANT]}
    return made


def merged(alone: Mapping[str, Changes], names: Iterable[str]) -> Changes:
    """Several switches at once."""
    return {path: value for name in names for path, value in alone[name].items()}


def switches(side: int) -> dict[str, Changes]:
    """Each defect but the rate."""
    return {name: scaled(changes, side) for name, changes in DEFECTS.items() if name != AXIS}


def scaled(changes: Changes, side: int) -> Changes:
    """With a frame, if there is one, that takes the same share of slices of `side` pixels as of those of 256."""
    frame = changes.get("data.frame")
    return changes if frame is None else {**changes, "data.frame": int(frame) * side // 256 // 4 * 4}


def together(side: int, without: str = "") -> dict[str, bool | int | float | str]:
    """All defects at once, but the rate and one more."""
    kept = (changes for name, changes in switches(side).items() if name not in (VARIANT, without))
    return {path: value for changes in kept for path, value in changes.items()}


def columns(cells: list[Cell], control: str) -> list[Column]:
    """What is told of a condition at a rate."""
    first = cells[0].outcomes[0]
    return [
        outcomes.CONDITION,
        outcomes.LR,
        outcomes.VERDICTS,
        outcomes.ONSETS,
        outcomes.lived(first.run.config.steps),
        outcomes.against(control, cells),
        outcomes.WORST,
        outcomes.end("loss/cycle_t", "cycle t, end"),
        outcomes.SATURATED,
        outcomes.SPARED,
        *map(outcomes.quality, outcomes.measured(outcome for cell in cells for outcome in cell.outcomes)),
    ]


def tell(folder: StudyFolder, console: Console) -> None:
    """The table of conditions, and curves of survival."""
    found = outcomes.read(folder)
    cells = outcomes.cells(found)
    control = next(iter(CURES)) if folder.study.name == CURED else CONTROL
    told = Told.of(folder.study.question, cells, columns(cells, control))
    outcomes.tell(folder, console, told, found)
    write_survival_sheet(folder.folder / "survival.png", cells)
    console.print(f"survival: {folder.folder / 'survival.png'}", soft_wrap=True)


if __name__ == "__main__":
    main(declare, __doc__, options=Options, tell=tell, heads=Heads(SIDE, "brain"))
