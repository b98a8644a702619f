"""A grid of runs: named conditions, each at several learning rates and with several seeds.

Knows how a grid becomes a study in which every point is given, and how such points are called; knows nothing of
records, nor of what a study tells of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from equipoise.config import RunConfig
from equipoise.config_base import Leaf
from equipoise.search import Choice, ObjectiveName, Point
from equipoise.study import Study

Changes = Mapping[str, Leaf]
"""Values of settings by their dotted paths: what a condition changes."""
RATE, SEED = "optim.lr", "seed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Every condition at every rate with every seed."""

    run: RunConfig
    """What all conditions depart from."""
    conditions: Mapping[str, Changes]
    """By name, in the order in which they are told."""
    rates: Sequence[float] = ()
    """Values of `optim.lr`; without any, conditions have their own."""
    seeds: Sequence[int] = (0,)
    """Values of `seed`."""

    def __post_init__(self) -> None:
        """Refuse what would ask for nothing, or for something else than it says.

        Raises:
            ValueError: there is no condition or no seed, or a condition sets what the grid varies.
        """
        if not self.conditions or not self.seeds:
            raise ValueError("a grid needs at least one condition and one seed")
        varied = {SEED, *([RATE] if self.rates else [])}
        for name, changes in self.conditions.items():
            if taken := varied & set(changes):
                raise ValueError(f"condition {name!r} sets {', '.join(sorted(taken))}, which the grid varies")

    def study(self, name: str, question: str, objective: ObjectiveName = "translated_dice") -> Study:
        """The study that runs all of it; a seed's runs come together, so that one cut short has all conditions.

        Raises:
            ValueError: a run breaks a rule, or two are the same.
            KeyError: a path names no setting.
        """
        paths = tuple(dict.fromkeys(path for changes in self.conditions.values() for path in changes))
        rates: list[Point] = [{RATE: rate} for rate in self.rates] or [{}]
        points, labels = [], []
        for seed, rate, (condition, changes) in product(self.seeds, rates, self.conditions.items()):
            run = self.run.having({**changes, **rate, SEED: seed})
            leaves = run.flat()
            points.append({path: leaves[path] for path in (*paths, *rate, SEED)})
            labels.append(label(condition, run))
        space = {path: Choice(tuple(dict.fromkeys(point[path] for point in points))) for path in points[0]}
        return Study(
            name=name,
            question=question,
            run=self.run,
            space=space,
            first=tuple(points),
            labels=tuple(labels),
            objective=objective,
            points=len(points),
        )


def label(condition: str, run: RunConfig) -> str:
    """What a run of a grid is called."""
    return f"{condition}, lr {run.optim.lr:g}, seed {run.seed}"


def condition_of(called: str, run: RunConfig) -> str:
    """The inverse of `label`.

    Raises:
        ValueError: the run is not called so.
    """
    condition = called.removesuffix(label("", run))
    if called != label(condition, run):
        raise ValueError(f"{called!r} is no label of a run at lr {run.optim.lr:g} with seed {run.seed}")
    return condition
