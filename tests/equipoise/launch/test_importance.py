"""What decides how good a run is stands first, and too little is not told as much."""

from __future__ import annotations

import math
import random

import pytest

from equipoise.config import PUBLISHED
from equipoise.figures import Run
from equipoise.launch.importance import LEAST, importance
from equipoise.search import Choice, Fixed, Range
from equipoise.verdict import Verdict

SPACE = {
    "optim.lr": Range(1e-5, 1e-2),
    "loss.cycle": Range(1.0, 30.0),
    "loss.adversarial": (Fixed("rp", when={"critic.penalty": ("r1r2",)}), Choice(("lsgan", "ns", "hinge"))),
    "loss.identity": Range(0.1, 5.0),
}


def runs(count: int) -> list[Run]:
    rng, made = random.Random(0), []
    for number in range(count):
        point = {
            "optim.lr": 10 ** rng.uniform(-5, -2),
            "loss.cycle": rng.uniform(1, 30),
            "loss.adversarial": rng.choice(("lsgan", "ns", "hinge")),
        }
        made.append(Run(f"{number:04d}", PUBLISHED.having(point), Verdict("stable", 4, 4, 1.0), [{"step": 4}], None))
    return made


@pytest.mark.filterwarnings("error")
def test_the_setting_that_decides_has_the_largest_share() -> None:
    found = importance(runs(120), SPACE, lambda run: -abs(math.log10(run.config.optim.lr) + 3))
    assert found is not None
    assert max(found, key=found.__getitem__) == "optim.lr"
    assert found["optim.lr"] > 0.5
    assert sum(found.values()) == pytest.approx(1)
    assert "loss.identity" not in found  # which was the same in all


def test_a_choice_may_decide_too() -> None:
    games = {"lsgan": 0.2, "ns": 0.4, "hinge": 0.9}
    jitter = random.Random(1)
    found = importance(runs(120), SPACE, lambda run: games[run.config.loss.adversarial] + jitter.gauss(0, 0.05))
    assert found is not None
    assert max(found, key=found.__getitem__) == "loss.adversarial"


@pytest.mark.parametrize("value", [1.0, math.nan, None])
def test_values_that_tell_nothing_tell_nothing(value: float | None) -> None:
    assert importance(runs(40), SPACE, lambda _: value) is None


def test_of_few_runs_nothing_is_said() -> None:
    assert importance(runs(LEAST - 1), SPACE, lambda run: run.config.optim.lr) is None
    assert importance(runs(LEAST), SPACE, lambda run: run.config.optim.lr) is not None
