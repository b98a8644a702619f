"""A study's trials, each read until it has ended and then kept: late in a study there are thousands.

Knows Optuna's storage and that what has ended does not change; knows nothing of samplers or runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial


class Trials:
    """All trials of a study, of this session and of others."""

    def __init__(self, study: optuna.Study) -> None:
        """Read nothing yet."""
        self._storage, self._study = study._storage, study._study_id
        self.known: list[FrozenTrial] = []
        """All, in order, as they were read last; not to be changed."""
        self._open: list[int] = []
        self.ended: list[int] = []
        """Numbers of those that had ended when they were read last, in the order in which that was noticed."""

    def read(self) -> list[FrozenTrial]:
        """All trials in order as they are now; not to be changed."""
        still: list[int] = []
        for number in self._open:
            self.known[number] = self._storage.get_trial(self.known[number]._trial_id)
            (self.ended if self.known[number].state.is_finished() else still).append(number)
        while (trial := self._at(len(self.known))) is not None:
            (self.ended if trial.state.is_finished() else still).append(trial.number)
            self.known.append(trial)
        self._open = still
        return self.known

    def open(self) -> list[FrozenTrial]:
        """Those that have not ended, in order, as they are now."""
        self.read()
        return [self.known[number] for number in self._open]

    def _at(self, number: int) -> FrozenTrial | None:
        try:
            return self._storage.get_trial(self._storage.get_trial_id_from_study_id_trial_number(self._study, number))
        except KeyError:
            return None


class Seen:
    """A study with some of its trials only; all else as it is. For what Optuna hands a study to."""

    def __init__(self, study: optuna.Study, shown: Sequence[FrozenTrial]) -> None:
        """Args: the study, and its trials that are seen, in order."""
        self._study, self._shown = study, shown

    def __getattr__(self, name: str) -> Any:
        """All else as it is."""
        return getattr(self._study, name)

    def get_trials(self, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        """Those that are seen, in these states."""
        return [trial for trial in self._shown if states is None or trial.state in states]

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        return self.get_trials(deepcopy, states)
