"""Which run to keep, and at which of its evaluations: protocols side by side, and what scores without labels are worth.

Knows runs' signals at their evaluations; must not know weights, how runs are made, or how anything is told (`report`).

A run is wanted for its masks on target images. Whoever has target masks to validate on may choose by them, the oracle;
without, there are the last step, the Dice on translated source slices, and scores that need no label. How far these
fall short of the oracle, and how well they rank runs, is told where target masks are known, for users who have none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from equipoise import search

if TYPE_CHECKING:
    from equipoise.figures import Run
    from equipoise.study import Study

Protocol = Literal["last", "source", "composite", "entropy", "information", "nuclear", "volume", "oracle"]
"""What chooses an evaluation: a key of `PROTOCOLS`."""
PROTOCOLS: Mapping[str, str] = {
    "last": "",
    "source": "quality/translated_dice",
    "composite": "quality/composite",
    "entropy": "validator/entropy",
    "information": "validator/information",
    "nuclear": "validator/nuclear",
    "volume": "validator/volume",
    "oracle": "quality/target_dice",
}
"""By each protocol's name the signal whose highest value chooses; "last" takes no signal, but the last evaluation."""
TARGET = PROTOCOLS["oracle"]
SCORES = tuple(name for name in PROTOCOLS if name not in ("last", "oracle"))
"""Protocols by scores that need no target label."""
FEWEST = 3
"""Pairs from which on a correlation is told."""
Row = Mapping[str, float]
"""Signals at a step, and `step`."""
_SIGNALS = frozenset(PROTOCOLS.values()) - {""}
"""A row with any of these is an evaluation."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a protocol keeps."""

    protocol: str
    """A key of `PROTOCOLS`."""
    run: str
    step: int
    dice: float | None
    """Target Dice on validation subjects there; None where it was not measured."""
    regret: float | None
    """By how much that is less than the oracle's; None where one of the two is not known."""
    each: tuple[float, ...]
    """Target Dice where the protocol stops each eligible run, as far as measured: for those who have one run alone."""

    @property
    def mean(self) -> float | None:
        """Of `each`; None of none, NaN if one is."""
        return float(np.mean(self.each)) if self.each else None

    @property
    def sd(self) -> float | None:
        """Standard deviation of `each`; None of fewer than two, NaN if one is NaN."""
        return float(np.std(self.each, ddof=1)) if len(self.each) > 1 else None


@dataclass(frozen=True, slots=True)
class Correlation:
    """How well a score ranks target Dice."""

    protocol: str
    """One of `SCORES`."""
    over: Literal["runs", "evaluations"]
    """Whether of each run the last evaluation counts, or all of them do."""
    pairs: int
    """Of a score and a Dice, both finite."""
    rho: float | None
    """Spearman's rank correlation, in [-1, 1]; None where it is not told."""
    reason: str
    """Why it is not told; empty where it is."""


def best_step(rows: Iterable[Row], protocol: str) -> int | None:
    """The evaluation of one run at which a protocol stops it: of equals the later one.

    Args:
        rows: of the run; those that are no evaluations do not count.
        protocol: a key of `PROTOCOLS`.

    Returns:
        The step; None where there is no evaluation, or none with a finite value of the protocol's signal.

    Raises:
        KeyError: there is no such protocol.
    """
    found = _best(rows, protocol)
    return None if found is None else found[1]


def protocols(runs: Sequence[Run], study: Study, best: Run | None) -> list[Chosen]:
    """What each protocol keeps of a study, in the order of `PROTOCOLS`; left out where its signal was never measured.

    "last" keeps the study's best point as its last step left it. The others take the highest value at any evaluation of
    an eligible run; of equals the later step, then the run that comes first. Eligible are points that did not fail and
    are feasible; if there are none, those that did not fail; if there are none, all.

    Args:
        runs: of the study; confirmations do not count.
        study: says what is feasible.
        best: `report.best_point`.
    """
    among = _eligible(runs, study)
    made = []
    for protocol in PROTOCOLS:
        candidates = among if protocol != "last" else [(best, evaluations(best))] if best is not None else []
        scored = [(found, run, rows) for run, rows in candidates if (found := _best(rows, protocol)) is not None]
        if scored:
            (_, step), run, rows = max(scored, key=lambda one: one[0])
            made.append(Chosen(protocol, run.name, step, _at(rows, step), None, _within(among, protocol)))
    oracle = next((choice.dice for choice in made if choice.protocol == "oracle"), None)
    return [
        dataclasses.replace(choice, regret=None if oracle is None or choice.dice is None else oracle - choice.dice)
        for choice in made
    ]


def correlations(runs: Iterable[Run]) -> list[Correlation]:
    """How well each score ranks target Dice, over runs and over all their evaluations; empty without any target Dice.

    Failed runs count too, as far as their values are finite: a score should tell them. Confirmations do not.
    """
    looks = [found for run in runs if not run.confirms and (found := evaluations(run))]
    last, every = [found[-1] for found in looks], [row for found in looks for row in found]
    if not any(TARGET in row for row in every):
        return []
    return [
        made
        for protocol in SCORES
        for made in (_correlation(last, protocol, "runs"), _correlation(every, protocol, "evaluations"))
    ]


def evaluations(run: Run) -> list[Row]:
    """A run's rows at its evaluations, in the order of their steps, as far as protocols need them."""
    rows: dict[int, dict[str, float]] = {}
    for signal in _SIGNALS:
        for step, value in zip(*run.curve(signal), strict=True):
            rows.setdefault(int(step), {"step": float(step)})[signal] = float(value)
    return [rows[step] for step in sorted(rows)]


_Looks = tuple["Run", Sequence[Row]]
"""A run and its evaluations."""


def _eligible(runs: Iterable[Run], study: Study) -> Sequence[_Looks]:
    def feasible(run: Run) -> bool:
        return run.verdict is not None and search.violation(run.verdict, study.feasible) <= 0

    every = [(run, rows) for run in runs if not run.confirms and (rows := evaluations(run))]
    lived = [looks for looks in every if looks[0].kind not in search.FAILED]
    return [looks for looks in lived if feasible(looks[0])] or lived or every


def _best(rows: Iterable[Row], protocol: str) -> tuple[float, int] | None:
    """The highest finite value, and its step: the last one that has it."""
    signal = PROTOCOLS[protocol] or "step"
    scored = [(row.get(signal, math.nan), int(row["step"])) for row in rows if not _SIGNALS.isdisjoint(row)]
    return max((one for one in scored if math.isfinite(one[0])), default=None)


def _at(rows: Iterable[Row], step: int) -> float | None:
    """Target Dice at a step."""
    return next((row.get(TARGET) for row in rows if row["step"] == step), None)


def _within(among: Iterable[_Looks], protocol: str) -> tuple[float, ...]:
    """Target Dice where a protocol stops each run."""
    stops = [(rows, best_step(rows, protocol)) for _, rows in among]
    found = [_at(rows, step) for rows, step in stops if step is not None]
    return tuple(dice for dice in found if dice is not None)


def _correlation(rows: Iterable[Row], protocol: str, over: Literal["runs", "evaluations"]) -> Correlation:
    from scipy.stats import spearmanr

    told = [(row.get(PROTOCOLS[protocol], math.nan), row.get(TARGET, math.nan)) for row in rows]
    pairs = [(score, dice) for score, dice in told if math.isfinite(score) and math.isfinite(dice)]
    rho, reason = None, ""
    if len(pairs) < FEWEST:
        reason = f"fewer than {FEWEST}"
    elif len({score for score, _ in pairs}) == 1:
        reason = "the score is always the same"
    elif len({dice for _, dice in pairs}) == 1:
        reason = "the Dice is always the same"
    else:
        rho = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return Correlation(protocol, over, len(pairs), rho, reason)
