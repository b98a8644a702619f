"""What stops runs that fall behind: Optuna's pruners by name, held to a bounded memory.

Knows when runs are compared, and with which; knows nothing of what becomes of one that is stopped.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial

from equipoise.config import RunConfig
from equipoise.launch.trials import Seen, Trials
from equipoise.monitor import Horizon
from equipoise.study import Study

REDUCTION = 2
"""Of the runs that reach a rung, the better half goes on."""
COMPARED = 4
"""Points that must be complete before one is stopped for falling behind their median."""
MEMORY = 400
"""Newest points with which one is compared: the search moves on, and the time for a comparison is bounded."""


def pruner(study: Study, trials: Trials) -> BasePruner:
    """What compares a study's runs, by Dice x S.

    Args:
        study: its declaration.
        trials: its points so far.
    """
    first = first_rung(study.run)
    if study.pareto or study.pruner == "none":
        return NopPruner()
    if study.pruner == "median":
        return Comparing(MedianPruner(n_startup_trials=COMPARED, n_warmup_steps=first), trials)
    return Comparing(SuccessiveHalvingPruner(min_resource=first, reduction_factor=REDUCTION), trials)


def first_rung(run: RunConfig) -> int:
    """The first step at which a run may be stopped for its Dice: half of the run, past the monitor's warm-up.

    At a quarter a Dice says too little of the last one: `studies/search_quality.py` measured what that costs.
    """
    horizon = Horizon.of(run.monitor, run.steps)
    return max(run.steps // 2, horizon.warm_up * horizon.block)


class Comparing(BasePruner):
    """A pruner that compares a trial with the newest ones only."""

    def __init__(self, inner: BasePruner, trials: Trials, memory: int = MEMORY) -> None:
        """Args: what compares, the trials, and with how many."""
        self._inner, self._trials, self._memory = inner, trials, memory

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """See Optuna."""
        seen: Any = Seen(study, self._trials.read()[-self._memory :])
        return self._inner.prune(seen, trial)
