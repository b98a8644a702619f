"""Who proposes points: Optuna's samplers by name, seeded and held to a bounded memory.

Knows how a sampler is made for one proposal; knows nothing of runs.

A sampler is made anew for every point, seeded by the study's seed and the point's number, so that what it proposes
depends on these and on what it has been told, and not on how often the study was killed and resumed in between.
"""

from __future__ import annotations

import heapq
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from equipoise import search
from equipoise.study import Study
from slicestore.errors import InputError

STARTUP = 16
"""Points drawn at random before TPE has its say; at most half of the study."""
MEMORY = 400
"""Points that a sampler learns from: half of them the best, half the newest. TPE's time for a proposal grows with
their number, and would soon be what a study of thousands of points waits for."""


def names() -> list[str]:
    """The samplers that can be had by their name alone."""
    found = ((name, getattr(optuna.samplers, name)) for name in optuna.samplers.__all__ if name.endswith("Sampler"))
    return sorted(
        name for name, kind in found if inspect.isclass(kind) and not inspect.isabstract(kind) and not _needs(kind)
    )


def check(study: Study) -> None:
    """Refuse a sampler that there is not, or that cannot serve the study's space, before anything is written.

    Raises:
        InputError: Optuna has none of the name, it needs a package that is missing, or it cannot draw from the space.
    """
    if study.sampler not in names():
        raise InputError(
            "sampler",
            found=study.sampler,
            rule=f"Optuna's samplers that need no more than a name are {', '.join(names())}",
            remedy="give one of these",
        )
    quiet()
    rehearsed = optuna.create_study(directions=["maximize"] * (1 + study.pareto))
    try:
        for number in range(
            2 if study.searches else 0
        ):  # some find fault with a space only when they have seen a point
            rehearsed.sampler = sampler(study.sampler, seed=study.seed, number=number, points=2)
            trial = rehearsed.ask()
            search.draw(trial, study.space, study.run)
            rehearsed.tell(trial, [0.0] * (1 + study.pareto))
    except ImportError as error:
        raise InputError(
            "sampler",
            found=f"{study.sampler}, which needs the package {error.name}",
            rule="a sampler's packages are installed where the study is started",
            remedy=f"pip install {error.name}, or take TPESampler",
        ) from error
    except ValueError as error:
        raise InputError(
            "sampler", found=study.sampler, rule=str(error).rstrip("."), remedy="take TPESampler, or another space"
        ) from error


def quiet() -> None:
    """Have Optuna say nothing but errors: some samplers warn of every point that is conditional, all of being new."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


Merits = dict[int, tuple[bool, float]]
"""How good points are, by their numbers, as far as that has been worked out."""


def sampler(name: str, *, seed: int, number: int, points: int, merits: Merits | None = None) -> BaseSampler:
    """The sampler that proposes one point.

    Args:
        name: of its class.
        seed: of the study.
        number: of the point.
        points: of the study in all.
        merits: what earlier proposals of the same study worked out.
    """
    kind = getattr(optuna.samplers, name)
    known = inspect.signature(kind).parameters
    # A sequence goes on where it was, by its seed: Optuna keeps its place in the study.
    each = seed if kind is optuna.samplers.QMCSampler else (seed * 1_000_003 + number) % 2**32
    settings: dict[str, Any] = {"seed": each} if "seed" in known else {}
    if kind is optuna.samplers.TPESampler:
        settings |= {"multivariate": True, "group": True, "constant_liar": True}
    if "n_startup_trials" in known:
        settings["n_startup_trials"] = max(1, min(STARTUP, points // 2))
    return Remembering(kind(**settings), merits=merits)


class Remembering(BaseSampler):
    """A sampler that is shown at most `MEMORY` points of a study."""

    def __init__(self, inner: BaseSampler, memory: int = MEMORY, merits: Merits | None = None) -> None:
        """Args: the sampler that is asked, how many points it may see, and what is known of them."""
        self.inner, self._memory = inner, memory
        self._merits = {} if merits is None else merits
        self._shown: _Memory | None = None

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> Any:
        """See Optuna."""
        return self.inner.infer_relative_search_space(self._seen(study), trial)

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> Any:
        """See Optuna."""
        return self.inner.sample_relative(self._seen(study), trial, search_space)

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        """See Optuna."""
        return self.inner.sample_independent(self._seen(study), trial, param_name, param_distribution)

    def before_trial(self, study: Any, trial: FrozenTrial) -> None:
        """See Optuna."""
        self.inner.before_trial(study, trial)

    def after_trial(self, study: Any, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """See Optuna."""
        self.inner.after_trial(study, trial, state, values)

    def _seen(self, study: Any) -> Any:
        """What is seen of the study: the same for a whole proposal."""
        if self._shown is None or self._shown.study is not study:
            self._shown = _Memory(study, self._memory, self._merits)
        return self._shown


class _Memory:
    """A study with its best and its newest trials only, looked up once; all else as it is."""

    def __init__(self, study: optuna.Study, memory: int, merits: Merits) -> None:
        self.study, self._memory, self._merits = study, memory, merits
        self._found: dict[Any, list[FrozenTrial]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.study, name)

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        asked = deepcopy, tuple(states) if states else None, use_cache
        if asked not in self._found:
            self._found[asked] = self._chosen(self.study._get_trials(deepcopy, states, use_cache))
        return self._found[asked]

    def _chosen(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        if len(trials) <= self._memory:
            return trials
        older, newest = trials[: -self._memory // 2], trials[-self._memory // 2 :]
        best = heapq.nlargest(self._memory // 2, older, key=self._merit)
        return [*sorted(best, key=lambda trial: trial.number), *newest]

    def _merit(self, trial: FrozenTrial) -> tuple[bool, float]:
        """Feasible points by their value before all others; of one that has ended it is worked out once."""
        if trial.number in self._merits:
            return self._merits[trial.number]
        met = trial.state is TrialState.COMPLETE and all(value <= 0 for value in trial.constraints.values())
        merit = met, trial.values[0] if trial.values else float("-inf")
        if trial.state.is_finished():
            self._merits[trial.number] = merit
        return merit


def _needs(kind: type) -> list[str]:
    """What must be given beside its name."""
    parameters = list(inspect.signature(kind).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
