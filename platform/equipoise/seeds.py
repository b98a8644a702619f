"""Several seeds of a point, judged as one.

Knows how verdicts and Dice of runs that differ in their seed alone are joined; knows nothing of records, nor of who
chooses points.

A point is as stable as its worst seed, or as the 20 % quantile of its seeds; its Dice is the mean. A seed that failed
counts with the Dice of a failure, so that no mean is taken over the survivors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from equipoise import search
from equipoise.verdict import Verdict

OverSeeds = Literal["worst", "q20"]
QUANTILES: dict[OverSeeds, float] = {"worst": 0.0, "q20": 0.2}
"""Which quantile of the seeds' stability is the point's."""
Ended = tuple[Verdict, float]
"""How a seed's run ended, and its last Dice; NaN where that could not be measured."""


def joined(ended: Sequence[Ended], over: OverSeeds = "worst") -> Ended:
    """The verdict on a point, and its Dice.

    S is the quantile, interpolated between seeds; kind, findings and step are those of the run next to it, ordered from
    those that failed and those that had to be recovered to the most stable. None may be censored: that has no S.

    Args:
        ended: at least one run.
        over: by what S is joined.
    """
    quantile = QUANTILES[over]
    ranked = sorted((verdict for verdict, _ in ended), key=_grade)
    shown = ranked[round(quantile * (len(ranked) - 1))]
    stability = float(np.quantile([v.stability or 0.0 for v in ranked], quantile))
    dice = float(np.mean([search.value(verdict, quality) for verdict, quality in ended]))
    return dataclasses.replace(shown, stability=stability), dice


def undecided(ended: Sequence[Ended], seeds: int, feasible: float, over: OverSeeds = "worst") -> bool:
    """Whether seeds that have not run yet could still make a feasible point of it: were they all perfectly stable.

    Args:
        ended: the runs so far, at least one.
        seeds: of the point in all.
        feasible: the S that it must reach.
        over: by what S is joined.
    """
    left = seeds - len(ended)
    perfect = Verdict("stable", ended[0][0].planned, ended[0][0].planned, 1.0)
    verdict, _ = joined([*ended, *[(perfect, 1.0)] * left], over)
    return left > 0 and search.violation(verdict, feasible) <= 0


def _grade(verdict: Verdict) -> tuple[int, float]:
    """The better, the larger."""
    kind = 0 if verdict.kind in search.FAILED else 1 if verdict.kind == "recovered" else 2
    return kind, verdict.stability or 0.0
