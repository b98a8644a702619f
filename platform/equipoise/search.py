"""Where a study searches, and what it calls good.

Knows ranges of settings, what they depend on, and how a finished run is scored; knows nothing of Optuna: whatever has
`suggest_*` can draw.

A setting may be searched, or implied, only `when` others have certain values: those are looked up in the point drawn so
far, else in the run that the study departs from. Where a setting has several cases the first that applies counts; where
none does, the setting keeps the run's own value.

    "loss.adversarial": Choice(("lsgan", "rp")),
    "critic.penalty": (Fixed("r1r2", when={"loss.adversarial": ("rp",)}), Choice(("none", "r1"))),
    "critic.gamma": Range(1e-2, 1e2, when={"critic.penalty": ("r1", "r1r2")}),
"""

from __future__ import annotations

import dataclasses
import random
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter
from typing import Any, ClassVar, Literal, Protocol

from equipoise.config import RunConfig
from equipoise.config_base import Leaf
from equipoise.monitor import Verdict

ObjectiveName = Literal["translated_dice", "target_dice", "composite"]
"""What may be maximised; see `metrics.evaluate`. Of these only `target_dice` needs masks of the target."""
Point = dict[str, Leaf]
"""Values of settings by their dotted paths."""
When = Mapping[str, Sequence[Leaf]]
"""Values that other settings, by their paths, must have; all of them."""
FLOOR = 0.0
"""Value of a failed run: the worst Dice there is, and finite, because a search learns nothing from NaN."""
FAILED = ("diverged", "saturated", "collapsed")
"""Verdicts on runs that lived to nothing of use, whatever their last Dice."""
MISSED = 0.05
"""The least by which a run that failed, or had to be recovered, misses the stability that is wanted. One that did so
near its end may have an S that reaches it."""
COMBINATIONS = 5000
"""Combinations of a space's values that are all tried when it is declared; of a larger space, `SAMPLE` are."""
SAMPLE = 1000
"""As many that any two or three values which cannot be had together are all but certain to meet in one of them."""


class Suggests(Protocol):
    """The part of an Optuna trial that drawing a point needs."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Draw a number."""

    def suggest_categorical(self, name: str, choices: Sequence[Leaf]) -> Any:
        """Draw one of some values."""


@dataclass(frozen=True, slots=True)
class Range:
    """A number between two bounds, both included."""

    kind: ClassVar[str] = "range"
    low: float
    high: float
    log: bool = True
    """Whether equal ratios, rather than equal differences, are equally likely."""
    off: float | None = None
    """A value that the setting may have instead, such as 0 for a term left out; a switch of its own draws it."""
    when: When = field(default_factory=dict)
    """See the module."""

    def draw(self, trial: Suggests, name: str) -> Leaf:
        """A value; `name` is the journal's."""
        if self.off is not None and not trial.suggest_categorical(_switch(name), [False, True]):
            return self.off
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def kept(self, value: Leaf, name: str) -> Point | None:
        """What a journal keeps of a value; None where it lies outside."""
        if self.off is not None and value == self.off:
            return {_switch(name): False}
        if isinstance(value, str | bool) or not self.low <= value <= self.high:
            return None
        kept: Point = {name: value}
        return kept if self.off is None else kept | {_switch(name): True}

    @property
    def ends(self) -> tuple[Leaf, ...]:
        """The values among which any that cannot be had would show."""
        return (self.low, self.high) if self.off is None else (self.low, self.high, self.off)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some values of any type that settings have."""

    kind: ClassVar[str] = "choice"
    options: Sequence[Leaf]
    when: When = field(default_factory=dict)
    """See the module."""

    def draw(self, trial: Suggests, name: str) -> Leaf:
        """A value; `name` is the journal's."""
        drawn: Leaf = trial.suggest_categorical(name, list(self.options))
        return drawn

    def kept(self, value: Leaf, name: str) -> Point | None:
        """What a journal keeps of a value; None where it is no option."""
        return next(({name: option} for option in self.options if option == value), None)

    @property
    def ends(self) -> tuple[Leaf, ...]:
        """All options."""
        return tuple(self.options)


@dataclass(frozen=True, slots=True)
class Fixed:
    """A value that follows from others: a point has it, and nothing is searched."""

    kind: ClassVar[str] = "fixed"
    value: Leaf
    when: When = field(default_factory=dict)
    """See the module."""

    def draw(self, _trial: Suggests, _name: str) -> Leaf:
        """The value."""
        return self.value

    def kept(self, value: Leaf, _name: str) -> Point | None:
        """Nothing; None where the value is another."""
        return {} if value == self.value else None

    @property
    def ends(self) -> tuple[Leaf, ...]:
        """The value."""
        return (self.value,)


Dimension = Range | Choice | Fixed
Space = Mapping[str, Dimension | Sequence[Dimension]]
"""Searched and implied settings by their dotted paths in `RunConfig`, each after those it depends on."""


def cases(dimension: Dimension | Sequence[Dimension]) -> tuple[Dimension, ...]:
    """A setting's cases, in the order in which they are tried."""
    return (dimension,) if isinstance(dimension, Dimension) else tuple(dimension)


def plain(space: Space) -> dict[str, list[dict[str, Any]]]:
    """Plain data, for JSON."""
    return {path: [{"kind": c.kind} | dataclasses.asdict(c) for c in cases(d)] for path, d in space.items()}


def parsed(data: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Dimension | Sequence[Dimension]]:
    """The inverse of `plain`.

    Raises:
        KeyError, TypeError: it is no such data.
    """
    space: dict[str, Dimension | Sequence[Dimension]] = {}
    for path, found in data.items():
        several = tuple(_parsed(case) for case in found)
        space[path] = several[0] if len(several) == 1 else several
    return space


def draw(trial: Suggests, space: Space, run: RunConfig) -> Point:
    """A point of the space: every setting that is searched or implied there.

    Args:
        trial: gives the values.
        space: where.
        run: the run that the study departs from.
    """
    point: Point = {}
    at = ChainMap(point, run.flat())
    for path, named in _named(space).items():
        if found := _applying(named, at):
            name, case = found
            point[path] = case.draw(trial, name)
    return point


def coordinates(point: Mapping[str, Leaf], space: Space, run: RunConfig) -> Point | None:
    """What a journal keeps of a point that is known beforehand, as `draw` would ask for it.

    None where the space does not hold the point, or where the point sets more than the space does: a search would take
    the effect of one for that of the other.

    Args:
        point: changes to `run`.
        space: where.
        run: the run that the study departs from.
    """
    leaves = run.having(point).flat()
    kept, reached = Point(), run.flat()
    for path, named in _named(space).items():
        if found := _applying(named, leaves):
            name, case = found
            told = case.kept(leaves[path], name)
            if told is None:
                return None
            kept, reached[path] = kept | told, leaves[path]
    return kept if reached == leaves else None


def check(space: Space, run: RunConfig) -> None:
    """Hold a space to the settings that exist and to their rules, when a study is declared and not an hour into it.

    Every combination of options, with ranges at either end, must make a run; of more than `COMBINATIONS` a seeded
    sample is tried.

    Raises:
        KeyError: a path names no setting.
        ValueError: a range or choice is empty; a condition can never hold, or comes after what depends on it; or a
            combination breaks a rule of the settings: the message names both.
    """
    leaves, before = run.flat(), list[str]()
    for path, dimension in space.items():
        _check_path(path, run, leaves)
        several = cases(dimension)
        for place, case in enumerate(several, start=1):
            _check_values(path, case)
            for other, allowed in case.when.items():
                _check_path(other, run, leaves)
                if other in space and other not in before:
                    raise ValueError(f"{path} depends on {other}, which must come before it in the space")
                _check_condition(path, other, allowed, space, run)
            if not case.when and place < len(several):
                raise ValueError(f"{path}: case {place} always applies, so that those after it never do")
        before.append(path)
    for point in _tried(space, leaves):
        if rule := _broken(point, run):
            raise ValueError(f"the space holds a run that cannot be: {_culprits(point, rule, run)}: {rule}")


def value(verdict: Verdict, quality: float) -> float:
    """What a search maximises: the last Dice of a run that lived, `FLOOR` of one that failed. Always finite."""
    return FLOOR if verdict.kind in FAILED or not quality >= 0 else quality


def rank(verdict: Verdict, quality: float, feasible: float) -> tuple[bool, float]:
    """By which points are compared in the end: feasible ones by their Dice, before all others by Dice x S."""
    met = violation(verdict, feasible) <= 0
    scored = value(verdict, quality)
    return met, scored if met else scored * (verdict.stability or 0.0)


def violation(verdict: Verdict, feasible: float) -> float:
    """The stability constraint: at most 0 where S reaches `feasible`, and never for what failed or was recovered."""
    missed = feasible - (verdict.stability if verdict.stability is not None else 0.0)
    return max(missed, MISSED) if verdict.kind in (*FAILED, "recovered") else missed


def called(objective: str) -> str:
    """What the values of an objective are called where runs are told: Dice, or its own name."""
    return "Dice" if objective.endswith("_dice") else objective.replace("_", " ")


def _switch(name: str) -> str:
    return f"{name} on"


def _parsed(data: Mapping[str, Any]) -> Dimension:
    kind = {c.kind: c for c in (Range, Choice, Fixed)}[data["kind"]]
    rest = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "kind"}
    made: Dimension = kind(**rest | {"when": {path: tuple(allowed) for path, allowed in data["when"].items()}})
    return made


Named = Mapping[str, Sequence[tuple[str, Dimension]]]
"""Of every setting its cases, each with its name in a journal."""


def _named(space: Space) -> Named:
    """The cases with their names.

    Optuna wants one distribution under a name, so that other cases of a setting have other names: the first is called
    by its path, the next "path (2)". Cases that differ in their condition alone share one.
    """
    named = {}
    for path, dimension in space.items():
        bare = [dataclasses.replace(case, when={}) for case in cases(dimension)]
        kinds = list(dict.fromkeys(map(repr, (case for case in bare if not isinstance(case, Fixed)))))
        nth = [kinds.index(repr(case)) if repr(case) in kinds else 0 for case in bare]
        names = (f"{path} ({n + 1})" if n else path for n in nth)
        named[path] = tuple(zip(names, cases(dimension), strict=True))
    return named


def _applying(named: Sequence[tuple[str, Dimension]], at: Mapping[str, Leaf]) -> tuple[str, Dimension] | None:
    """The first case whose condition holds, with its name."""
    for name, case in named:
        if all(at[other] in allowed for other, allowed in case.when.items()):
            return name, case
    return None


def _check_path(path: str, run: RunConfig, leaves: Mapping[str, Leaf]) -> None:
    if path not in leaves:
        run.at(path, 0)  # says which settings there are


def _check_values(path: str, case: Dimension) -> None:
    if isinstance(case, Range):
        if not case.low < case.high or (case.log and case.low <= 0):
            raise ValueError(f"{path}: {case.low}..{case.high} is no {'logarithmic ' if case.log else ''}range")
        if case.off is not None and case.low <= case.off <= case.high:
            raise ValueError(f"{path}: off ({case.off}) lies within {case.low}..{case.high}, where it is drawn anyway")
    if isinstance(case, Choice):
        different = not isinstance(case.options, str) and len(set(case.options)) == len(case.options) > 0
        if not different:
            raise ValueError(f"{path}: a choice takes a tuple of different options, at least one; got {case.options!r}")


def _check_condition(path: str, other: str, allowed: Sequence[Leaf], space: Space, run: RunConfig) -> None:
    """Hold a condition to values that there can be."""
    if isinstance(allowed, str) or not allowed:
        raise ValueError(f"{path}: what {other} must be is a tuple of values, at least one; got {allowed!r}")
    several = cases(space.get(other, ()))
    own = [] if any(not case.when for case in several) else [run.flat()[other]]
    possible = [*own, *(value for case in several for value in case.ends)]
    if several and (never := [value for value in allowed if value not in possible]):
        can = ", ".join(map(repr, dict.fromkeys(possible)))
        raise ValueError(f"{path} depends on {other} being {never[0]!r}, but it can be {can}")
    if not several:
        group, _, name = other.rpartition(".")
        for value in allowed:  # by the rules of its group: what a study never sets may be anything
            (attrgetter(group)(run) if group else run).at(name, value)
        if own[0] not in allowed:
            raise ValueError(f"{path} depends on {other}, which is {own[0]!r} and not searched: it never applies")


def _tried(space: Space, leaves: Mapping[str, Leaf]) -> Iterable[Point]:
    """Every combination of options, fixed values and ends of ranges; if they are too many, a sample."""
    named = _named(space)
    every = list(islice(_combinations(named, leaves, {}, tuple(space)), COMBINATIONS + 1))
    rng = random.Random(0)
    return every if len(every) <= COMBINATIONS else (_sampled(named, leaves, rng) for _ in range(SAMPLE))


def _combinations(named: Named, leaves: Mapping[str, Leaf], point: Point, paths: Sequence[str]) -> Iterator[Point]:
    if not paths:
        yield point
        return
    found = _applying(named[paths[0]], ChainMap(point, dict(leaves)))
    for more in [{paths[0]: value} for value in found[1].ends] if found else [{}]:
        yield from _combinations(named, leaves, point | more, paths[1:])


def _sampled(named: Named, leaves: Mapping[str, Leaf], rng: random.Random) -> Point:
    point: Point = {}
    at = ChainMap(point, dict(leaves))
    for path, several in named.items():
        if found := _applying(several, at):
            point[path] = rng.choice(found[1].ends)
    return point


def _broken(point: Mapping[str, Leaf], run: RunConfig) -> str | None:
    """The rule that a point breaks."""
    try:
        run.having(point)
    except ValueError as error:
        return str(error)
    return None


def _culprits(point: Point, rule: str, run: RunConfig) -> str:
    """Those settings of a point without which it would not break the rule."""
    for path in tuple(point):
        fewer = {k: v for k, v in point.items() if k != path}
        if _broken(fewer, run) == rule:
            point = fewer
    return ", ".join(f"{path} {value!r}" for path, value in point.items())
