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
from equipoise.launch.trials import Seen, Trials
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


def sampler(name: str, *, seed: int, number: int, points: int, memory: Memory | None = None) -> BaseSampler:
    """The sampler that proposes one point.

    Args:
        name: of its class.
        seed: of the study.
        number: of the point.
        points: of the study in all.
        memory: what it may see of the study; all of it by default.
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
    return kind(**settings) if memory is None else Remembering(kind(**settings), memory)


class Memory:
    """The trials of a study that a sampler is shown: the newest, and of the older ones the best."""

    def __init__(self, trials: Trials, size: int = MEMORY) -> None:
        """Args: of which study, and how many at most, half of them the newest."""
        self._trials, self._size = trials, size
        self._best: list[tuple[bool, float, int]] = []
        """A heap of the best that have ended: feasible or not, value, number below 0 (the first of equals is best)."""
        self._weighed = 0

    def recall(self) -> list[FrozenTrial]:
        """What is shown now, in order."""
        known = self._trials.read()
        for number in self._trials.ended[self._weighed :]:
            heapq.heappush(self._best, (*_merit(known[number]), -number))
            if len(self._best) > self._size:
                heapq.heappop(self._best)
        self._weighed = len(self._trials.ended)
        if len(known) <= self._size:
            return list(known)
        newest = len(known) - self._size // 2
        best = heapq.nlargest(self._size // 2, (entry for entry in self._best if -entry[2] < newest))
        return [*(known[number] for number in sorted(-entry[2] for entry in best)), *known[newest:]]


def _merit(trial: FrozenTrial) -> tuple[bool, float]:
    """Feasible points by their value before all others."""
    met = trial.state is TrialState.COMPLETE and all(value <= 0 for value in trial.constraints.values())
    return met, trial.values[0] if trial.values else float("-inf")


class Remembering(BaseSampler):
    """A sampler that sees no more of a study than a memory recalls when it is first asked."""

    def __init__(self, inner: BaseSampler, memory: Memory) -> None:
        """Args: the sampler that is asked, and what it may see."""
        self.inner, self._memory = inner, memory
        self._shown: list[FrozenTrial] | None = None

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
        if self._shown is None:
            self._shown = self._memory.recall()
        return Seen(study, self._shown)


def _needs(kind: type) -> list[str]:
    """What must be given beside its name."""
    parameters = list(inspect.signature(kind).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
