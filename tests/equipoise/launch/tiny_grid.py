"""A grid of seconds with a flag and a table of its own, for tests that start and resume the real thing."""

from dataclasses import dataclass

from rich.console import Console

from equipoise.config import PUBLISHED
from equipoise.heads import Heads
from equipoise.launch.conduct import main
from equipoise.launch.options import Options
from equipoise.study import Study, StudyFolder


@dataclass(frozen=True, kw_only=True)
class GridOptions(Options):
    """The usual ones, and which rates."""

    rates: tuple[float, ...] = (1e-4, 1e-3)
    """Learning rates."""


def declare(options: GridOptions) -> Study:
    """A run a rate, on whatever store there is."""
    run = PUBLISHED.having({"net.width": 0.0625, "batch": 2, "pool": 4, "steps": 8, "evaluations": 2})
    return Study(
        name="grid",
        question="Does a grid hold?",
        run=run,
        space={},
        first=tuple({"optim.lr": rate, "seed": 1} for rate in options.rates),
        labels=tuple(f"lr {rate:g}" for rate in options.rates),
        points=len(options.rates),
    )


def tell(folder: StudyFolder, console: Console) -> None:
    """One line a run."""
    names = folder.study.names()
    for record in folder.records():
        verdict = record.verdict
        assert verdict is not None
        console.print(f"told: {names[record.config]} at seed {record.config.seed} was {verdict.kind}")


if __name__ == "__main__":
    main(declare, __doc__, options=GridOptions, tell=tell, heads=Heads(size=32))
