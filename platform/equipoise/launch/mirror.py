"""A copy, in memory, of a study's points in a database: a dashboard writes its notes there, and not to the database.

Knows Optuna's storages; knows nothing of runs or of dashboards.
"""

from __future__ import annotations

from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState


class Mirror:
    """Follows a study; numbers and ids of its trials are from 0 on, in their order."""

    def __init__(self, source: BaseStorage, name: str, shown: str) -> None:
        """Copy the study as it is now.

        Args:
            source: where the study is.
            name: what it is called there.
            shown: what its copy is called.

        Raises:
            KeyError: there is no such study.
        """
        self._source, self._study = source, source.get_study_id_from_name(name)
        self.storage = InMemoryStorage()
        self._copy = self.storage.create_new_study(source.get_study_directions(self._study), shown)
        self._open: dict[int, int] = {}
        """Ids here of trials that had not ended, by their number."""
        self._count = 0
        self.follow()

    def follow(self) -> None:
        """Copy what has changed since."""
        for key, value in self._source.get_study_user_attrs(self._study).items():
            self.storage.set_study_user_attr(self._copy, key, value)
        for trial in self._source.get_all_trials(self._study, deepcopy=False):
            if trial.number in self._open:
                self._update(self._open[trial.number], trial)
            elif trial.number >= self._count:
                made = self.storage.create_new_trial(self._copy, trial)
                self._count += 1
                self._open[trial.number] = made
            if trial.state.is_finished():
                self._open.pop(trial.number, None)

    def _update(self, made: int, trial: FrozenTrial) -> None:
        """What a trial at work has said since, and how it ended."""
        known = self.storage.get_trial(made)
        for name, value in trial.params.items() - known.params.items():
            kind = trial.distributions[name]
            self.storage.set_trial_param(made, name, kind.to_internal_repr(value), kind)
        for key in trial.user_attrs.keys() - known.user_attrs.keys():
            self.storage.set_trial_user_attr(made, key, trial.user_attrs[key])
        for key in trial.system_attrs.keys() - known.system_attrs.keys():
            self.storage.set_trial_system_attr(made, key, trial.system_attrs[key])
        for step in trial.intermediate_values.keys() - known.intermediate_values.keys():
            self.storage.set_trial_intermediate_value(made, step, trial.intermediate_values[step])
        if trial.state != known.state and known.state == TrialState.WAITING:
            self.storage.set_trial_state_values(made, TrialState.RUNNING)
        if trial.state.is_finished():
            self.storage.set_trial_state_values(made, trial.state, trial.values)
