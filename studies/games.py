"""Which adversarial game, with which penalty and which norm of the critics, stays stable at the largest learning rate?

    python studies/games.py                                       # synthetic heads, two CPU cores
    python studies/games.py --store cohort.zarr                   # the real size: 256 x 256, batch 4, 40 000 steps
    python studies/games.py --resume                              # go on where it was stopped

Least squares, non-saturating, hinge and relativistic average games, each without a penalty and with r1, r1r2 and a
zero-centred penalty on mixtures, each with instance norm, spectral norm and both; relativistic pairs, which converge
with r1r2 alone; and, as a control that need not converge, Wasserstein's game with its gradient penalty. All at several
learning rates, the same for all players; nothing is stopped for its Dice, the monitor ends what diverges.

Penalties have gamma 1 with spectral norm alone and a thousandth of it with instance norm, by which a fresh critic is
some thousand times as steep (`--gamma` scales both; Wasserstein's is 10, on critics without a norm), and act at every
fourth step with four times the weight, Wasserstein's at every step. Relativistic pairs have Adam's beta1 at 0, as
published. Nothing else is tuned for any of them: the table says which one forgives a rate, not which one is best at its
own.

A condition is stable at a rate where S reaches .9 with every seed. Told is the largest such rate of the grid, with the
smaller ones, if any, that are not, and the Dice at it. What is stable at the grid's end may be so beyond.

Budget: built in 42 runs, 14 conditions at 3 rates with one seed, of 400 steps at 32 x 32, width .25; some 20 minutes on
two CPU cores. Real: 52 conditions at 5 rates with 3 seeds, 780 runs of 40 000 steps.

Finding: none yet.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
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
from equipoise.outcomes import NOTHING, Cell, Outcome, Told
from equipoise.study import Study, StudyFolder

STEEP = 1e-3
"""Of the weight of penalties on critics with instance norm: they are that much steeper, squared."""
SIDE = 32
"""Pixels of a synthetic slice."""
GAMES = ("lsgan", "ns", "hinge", "ra_lsgan")
"""Games that may have any penalty, or none."""
PENALTIES = ("none", "r1", "r1r2", "gp0_mix")
NORMS = ("instance", "spectral", "both")
FEW = (("none", "instance"), ("none", "spectral"), ("r1r2", "instance"))
"""Penalties with norms that the built-in size tries."""
RATES = (2e-5, 6.3e-5, 2e-4, 6.3e-4, 2e-3)
"""Of the real size; the built-in one, too short to tell the smaller ones apart, takes the last three."""


@dataclass(frozen=True, kw_only=True)
class Options(conduct.Options):
    """What the command line says. Without any, small networks on synthetic heads."""

    seeds: int | None = None
    """Runs of every condition at every rate; 1 on synthetic heads, else 3."""
    rates: tuple[float, ...] = ()
    """Learning rates; by default 2e-4, 6.3e-4 and 2e-3 on synthetic heads, else 2e-5 and 6.3e-5 too."""
    gamma: float = 1.0
    """Weight of every penalty but Wasserstein's; of critics with instance norm a thousandth of it."""
    full: bool = False
    """Every condition on synthetic heads too."""


def declare(options: Options) -> Study:
    """The grid that the options ask for, as a study."""
    small = options.store is None
    run = PUBLISHED.having({"batch": 4, "workers": options.workers_per_run})
    run = run.at("steps", options.steps or (400 if small else 40_000))
    if small:
        run = run.having({"net.width": 0.25, "evaluations": 5, "balance.every": 0})
    grid = Grid(
        run=run,
        conditions=conditions(options.gamma, full=options.full or not small),
        rates=options.rates or (RATES[2:] if small else RATES),
        seeds=range(options.seed, options.seed + (options.seeds or (1 if small else 3))),
    )
    return grid.study("games", "Which adversarial game stays stable at the largest learning rate?")


def conditions(gamma: float, full: bool) -> dict[str, Changes]:
    """What is changed of the published settings."""
    pairs = tuple(product(PENALTIES, NORMS)) if full else FEW
    made: dict[str, Changes] = {
        f"{game}, {penalty}, {norm}": changed(game, penalty, norm, gamma)
        for game, (penalty, norm) in product(GAMES, pairs)
    }
    for norm in NORMS if full else NORMS[:1]:
        made[f"rp, r1r2, {norm}"] = {**changed("rp", "r1r2", norm, gamma), "optim.beta1": 0.0}
    made["wgan_gp, gp, none"] = {**changed("wgan_gp", "gp", "none", 10.0), "critic.penalty_every": 1}
    return made


def changed(game: str, penalty: str, norm: str, gamma: float) -> dict[str, Leaf]:
    """One condition's settings."""
    made: dict[str, Leaf] = {"loss.adversarial": game, "critic.penalty": penalty, "net.critic_norm": norm}
    weight = gamma * (STEEP if norm in ("instance", "both") else 1)
    return made if penalty == "none" else made | {"critic.gamma": weight, "critic.penalty_every": 4}


@dataclass(frozen=True, slots=True)
class Limit:
    """How far up a condition stays stable."""

    condition: str
    cells: Sequence[Cell]
    """By rate."""
    feasible: float

    @property
    def largest(self) -> Cell | None:
        """The cell of the largest rate at which every seed is stable."""
        return next((cell for cell in reversed(self.cells) if self.stable(cell)), None)

    @property
    def gaps(self) -> list[float]:
        """Rates below that one at which some seed is not."""
        return [cell.lr for cell in self.cells if self.largest and cell.lr < self.largest.lr and not self.stable(cell)]

    def stable(self, cell: Cell) -> bool:
        """Whether every seed's S reaches what a point must; a run without S counts as one that does not."""
        return cell.worst is not None and cell.worst >= self.feasible

    def words(self) -> str:
        """The rate, and what it hides."""
        if self.largest is None:
            return "none"
        beyond = "at least " if self.largest is self.cells[-1] else ""
        gaps = f", but not {', '.join(f'{rate:.2g}' for rate in self.gaps)}" if self.gaps else ""
        return f"{beyond}{self.largest.lr:.2g}{gaps}"


def limits(cells: Sequence[Cell], feasible: float) -> list[Limit]:
    """Of every condition, the most forgiving first; of those that bear the same rate the one of the higher Dice."""

    def made() -> Iterator[Limit]:
        for condition in dict.fromkeys(cell.condition for cell in cells):
            mine = sorted((cell for cell in cells if cell.condition == condition), key=lambda cell: cell.lr)
            yield Limit(condition, mine, feasible)

    def merit(limit: Limit) -> tuple[float, float]:
        if limit.largest is None:
            return 0.0, 0.0
        dice = [outcome.quality("translated_dice") for outcome in limit.largest.outcomes]
        return limit.largest.lr, statistics.fmean(value or 0.0 for value in dice)

    return sorted(made(), key=merit, reverse=True)


def table(title: str, found: Sequence[Outcome], feasible: float) -> Told:
    """A row a condition: the worst S at every rate, the largest stable rate, the Dice at it."""
    rates = sorted({outcome.lr for outcome in found})
    names = outcomes.measured(found)
    rows = []
    for limit in limits(outcomes.cells(found), feasible):
        worst = {cell.lr: outcomes.WORST[1](cell) for cell in limit.cells}
        dice = [outcomes.quality(name)[1](limit.largest) if limit.largest else NOTHING for name in names]
        rows.append((limit.condition, limit.words(), *(worst.get(rate, NOTHING) for rate in rates), *dice))
    heads = ("condition", "largest stable lr", *(f"S at {rate:.2g}" for rate in rates))
    return Told(title, (*heads, *(outcomes.quality(name)[0] for name in names)), tuple(rows))


def tell(folder: StudyFolder, console: Console) -> None:
    """The table of limits."""
    found = outcomes.read(folder)
    outcomes.tell(folder, console, table(folder.study.question, found, folder.study.feasible), found)


if __name__ == "__main__":
    main(declare, __doc__, options=Options, tell=tell, heads=Heads(SIDE, "brain"))
