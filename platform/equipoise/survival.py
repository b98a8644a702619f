"""How long runs last: shares that have not begun to fail, and whether two groups differ in it.

Knows onsets and the steps that runs did; knows nothing of records, verdicts or figures. A run without an onset is
censored at the steps it did: it lasted at least that long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scipy.stats import CensoredData

Onsets = Sequence[float | None]
"""Step at which each run began to fail; None of one that did not as long as it was watched."""
Curve = list[tuple[float, float]]
"""Corners (step, share that lasts beyond it), beginning with (0, 1)."""


def survival(onsets: Onsets, steps: Sequence[int]) -> Curve:
    """The curve of Kaplan and Meier (1958).

    A run without an onset counts as watched up to the last step that it did, onsets at that very step included.

    Args:
        onsets: of some runs.
        steps: that each of them did.

    Raises:
        ValueError: there are no runs, or an onset lies beyond the steps done.
    """
    from scipy.stats import ecdf

    share = ecdf(_watched(onsets, steps)).sf
    curve: Curve = [(0.0, 1.0)]
    for step, lasting in zip(share.quantiles.tolist(), share.probabilities.tolist(), strict=True):
        if lasting < curve[-1][1]:
            curve.append((step, lasting))
    return curve


def restricted_mean(onsets: Onsets, steps: Sequence[int], horizon: float) -> float:
    """Mean number of the first `horizon` steps for which runs last: the area below the curve.

    Raises:
        ValueError: as `survival`; or some runs last, and none of them was watched up to the horizon.
    """
    curve = survival(onsets, steps)
    if curve[-1][1] > 0 and max(steps) < horizon:
        raise ValueError(f"no run was watched for {horizon:g} steps; the longest for {max(steps)}")
    corners = [(step, share) for step, share in curve if step < horizon]
    ends = [step for step, _ in corners[1:]] + [horizon]
    return sum(share * (end - step) for (step, share), end in zip(corners, ends, strict=True))


def log_rank(one: tuple[Onsets, Sequence[int]], other: tuple[Onsets, Sequence[int]]) -> float:
    """How likely two groups of runs, each its onsets and steps, differ by chance as much as they do (Mantel, 1966).

    The two-sided p-value in [0, 1], by a normal approximation that a handful of runs stretches; NaN where no run of
    either group failed while others were watched, so that nothing can be said.

    Raises:
        ValueError: as `survival`.
    """
    import numpy as np
    from scipy.stats import logrank

    with np.errstate(invalid="ignore"):
        p = float(logrank(_watched(*one), _watched(*other)).pvalue)
    return p if math.isfinite(p) else math.nan


def _watched(onsets: Onsets, steps: Sequence[int]) -> CensoredData:
    from scipy.stats import CensoredData

    if not onsets:
        raise ValueError("survival of no runs is not defined")
    ends, failed = [], []
    for onset, done in zip(onsets, steps, strict=True):
        if onset is not None and onset > done:
            raise ValueError(f"an onset at step {onset:g} of a run that did {done} steps: it cannot be known")
        ends.append(float(done if onset is None else onset))
        failed.append(onset is not None)
    return CensoredData.right_censored(ends, [not f for f in failed])
