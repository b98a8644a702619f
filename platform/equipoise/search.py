"""Where a study searches, and what it calls good.

Knows ranges of settings and how a finished run is scored; knows nothing of Optuna: whatever has `suggest_*` can draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from equipoise.config import RunConfig
from equipoise.config_base import Leaf
from equipoise.monitor import Verdict

ObjectiveName = Literal["translated_dice", "target_dice"]
Point = dict[str, Leaf]
"""Values of the searched settings by their dotted paths."""
FLOOR = 0.0
"""Value of a diverged run: the worst Dice there is, and finite, because a search learns nothing from NaN."""


class Suggests(Protocol):
    """The part of an Optuna trial that drawing a point needs."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Draw a number."""

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        """Draw one of some names."""


@dataclass(frozen=True, slots=True)
class Range:
    """A number between two bounds, both included."""

    low: float
    high: float
    log: bool = True
    """Whether equal ratios, rather than equal differences, are equally likely."""

    def draw(self, trial: Suggests, path: str) -> Leaf:
        """A value for the setting at `path`."""
        return trial.suggest_float(path, self.low, self.high, log=self.log)

    def holds(self, value: Leaf) -> bool:
        """Whether `value` lies in the range."""
        return not isinstance(value, str) and self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some names."""

    options: tuple[str, ...]

    def draw(self, trial: Suggests, path: str) -> Leaf:
        """A value for the setting at `path`."""
        return trial.suggest_categorical(path, list(self.options))

    def holds(self, value: Leaf) -> bool:
        """Whether `value` is an option."""
        return value in self.options


Space = Mapping[str, Range | Choice]
"""Searched settings by their dotted paths in `RunConfig`."""


def check(space: Space, run: RunConfig) -> None:
    """Hold a space to the settings that exist, when a study is declared rather than an hour into it.

    Raises:
        KeyError: a path names no setting.
        ValueError: an end of a range breaks the setting's own rule, or the range or choice is empty.
    """
    for path, dimension in space.items():
        if isinstance(dimension, Range):
            if not dimension.low < dimension.high or (dimension.log and dimension.low <= 0):
                raise ValueError(
                    f"{path}: {dimension.low}..{dimension.high} is no {'logarithmic ' if dimension.log else ''}range"
                )
            run.at(path, dimension.low).at(path, dimension.high)
        else:
            if not dimension.options:
                raise ValueError(f"{path}: a choice needs at least one option")
            for option in dimension.options:
                run.at(path, option)


def draw(trial: Suggests, space: Space) -> Point:
    """A point of the space."""
    return {path: dimension.draw(trial, path) for path, dimension in space.items()}


def coordinates(run: RunConfig, space: Space) -> Point:
    """Where known settings lie in a space, for studies that try them first.

    Raises:
        ValueError: they lie outside.
    """
    leaves = run.flat()
    outside = {path: leaves[path] for path, dimension in space.items() if not dimension.holds(leaves[path])}
    if outside:
        raise ValueError(f"outside the space: {outside}; widen it, or leave these settings out of the study")
    return {path: leaves[path] for path in space}


def value(verdict: Verdict, quality: float) -> float:
    """What a search maximises: the last Dice of a run that lived, `FLOOR` of one that diverged. Always finite."""
    return FLOOR if verdict.kind == "diverged" or not quality >= 0 else quality


def rank(verdict: Verdict, quality: float, feasible: float) -> tuple[bool, float]:
    """By which points are compared in the end: feasible ones by their Dice, before all others by Dice x S."""
    met = violation(verdict, feasible) <= 0
    scored = value(verdict, quality)
    return met, scored if met else scored * (verdict.stability or 0.0)


def violation(verdict: Verdict, feasible: float) -> float:
    """The stability constraint: at most 0 where S reaches `feasible`."""
    return feasible - (verdict.stability if verdict.stability is not None else 0.0)
