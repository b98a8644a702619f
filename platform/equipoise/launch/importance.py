"""Which searched settings tell good runs from others.

Knows runs and where a study searched; knows nothing of pages. The measure is Optuna's PED-ANOVA (Watanabe et al., IJCAI
2023).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from equipoise.figures import Run
from equipoise.search import Choice, Dimension, Fixed, Space, cases

LEAST = 16
"""Runs below which nothing is said."""


def importance(runs: Sequence[Run], space: Space, value: Callable[[Run], float | None]) -> Mapping[str, float] | None:
    """How much each searched setting has to do with a run's being among the best tenth, the largest first.

    Settings count as they were in the run, also where another setting made them idle. Shares add up to 1; they describe
    the points that were tried, which a search has chosen.

    Args:
        runs: of points; those without a finite value are left out.
        space: where the study searched.
        value: by which runs are ranked; the larger the better.

    Returns:
        None of fewer than `LEAST` runs, or of values that are the same in nine tenths of them or more.
    """
    told = [(run.config.flat(), v) for run in runs if (v := value(run)) is not None and math.isfinite(v)]
    varied = {path: kind for path in space if (kind := _kind(path, space[path], [flat for flat, _ in told]))}
    values = sorted(v for _, v in told)
    if len(told) < LEAST or values[0] == values[len(values) * 9 // 10] or not varied:
        return None  # also where as many are as good that the best tenth is all of them
    trials = [
        optuna.trial.create_trial(params={path: flat[path] for path in varied}, distributions=varied, value=v)
        for flat, v in told
    ]
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize")
        study.add_trials(trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is experimental is pinned
            return optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
            )
    finally:
        optuna.logging.set_verbosity(level)


def _kind(
    path: str, dimension: Dimension | Sequence[Dimension], flats: Sequence[Mapping[str, object]]
) -> BaseDistribution | None:
    """How a setting varies over some runs; None where it does not."""
    values = {flat[path] for flat in flats}
    if len(values) < 2:
        return None
    ranges = [case for case in cases(dimension) if not isinstance(case, Choice | Fixed)]
    if ranges and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        numbers = [float(v) for v in values]  # type: ignore[arg-type]
        log = all(case.log for case in ranges) and min(numbers) > 0
        return FloatDistribution(min(numbers), max(numbers), log=log)
    return CategoricalDistribution(sorted(values, key=str))  # type: ignore[arg-type]
