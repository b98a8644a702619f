"""A study of any number of runs that are played from made-up curves: searcher, scheduler and accounts, and no training.

    python tests/benchmarks/simulated_study.py FOLDER RUNS

Prints a line of JSON: the driver's peak memory, and seconds a run for each tenth of the study. Ray, Tune, Optuna's
journal, run folders and the account are those of a real study; so is the work of a trial, but that it reads a script.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

from equipoise.account import Account
from equipoise.config import PUBLISHED, RunConfig
from equipoise.keeping import Keeping
from equipoise.launch.cluster import Share, connect
from equipoise.launch.ray_tune import Terms, search_points
from equipoise.rehearsal import Look, Script, rehearse
from equipoise.search import Choice, Range
from equipoise.sessions import Session, sessions
from equipoise.study import Study, StudyFolder
from equipoise.verdict import Finding, Verdict

STEPS = 400
SLOTS = 2


def curves(config: RunConfig) -> Script:
    """A run's: the larger its rate, the sooner it learns, and the sooner and the more likely it blows up."""
    rng = random.Random(config.fingerprint)
    heat = math.log10(config.optim.lr / 1e-5) / 3 + rng.gauss(0, 0.1)
    best = 0.9 - 0.3 * abs(math.log10(config.loss.cycle / 10)) - 0.4 * abs(heat - 0.5)
    bursts = heat > (0.9 if config.critic.penalty == "r1" else 0.7)
    last = rng.randrange(20, STEPS) if bursts else STEPS
    steps = [step for step in range(50, STEPS + 1, 50) if step < last] + [last]
    dice = [max(0.0, best * (1 - math.exp(-step / 120)) + rng.gauss(0, 0.02)) for step in steps]
    looks = tuple(Look(step, value, 1.0) for step, value in zip(steps, dice, strict=True))
    found = (Finding("explosion", "loss/cycle_t", max(1, last - 15), last, 13.0, 1.0),) if bursts else ()
    kind, stability = ("diverged", last / STEPS) if bursts else ("stable", 1.0)
    verdict = Verdict(kind, last, STEPS, stability, found)  # type: ignore[arg-type]
    return Script(looks=looks, verdict=verdict, step_seconds=0.5)


def simulate(folder: Path, runs: int) -> dict[str, object]:
    """Put so many runs through a study; what it took."""
    study = Study(
        name="simulated",
        question="What does a run cost whose training costs nothing?",
        run=PUBLISHED.having({"steps": STEPS, "evaluations": 8}),
        space={
            "optim.lr": Range(1e-5, 1e-2),
            "loss.cycle": Range(1.0, 30.0),
            "critic.penalty": Choice(("none", "r1")),
            "critic.gamma": Range(1e-3, 1e1, when={"critic.penalty": ("r1",)}),
        },
        points=runs,
    )
    made = StudyFolder.create(folder, study, "simulated_study", {})
    began = time.time()
    with connect(None), Session.start(folder, slots=SLOTS, workers=1, gpus=0) as session:
        keeping, work = Keeping(session=session.id), partial(rehearse, book=curves)
        share = Share(cpus=2 / SLOTS)
        began = time.time()
        search_points(made, study, "nowhere", Terms(share=share, slots=SLOTS, keeping=keeping, work=work))
    counted = time.time()
    account = Account.of(made.records(), sessions(folder))
    accounted = time.time() - counted
    ends = sorted(path.stat().st_mtime for path in made.runs.glob("*/verdict.json"))
    marks = [began, *(ends[len(ends) * tenth // 10 - 1] for tenth in range(1, 11))]
    return {
        "runs": sum(account.verdicts.values()),
        "verdicts": account.verdicts,
        "driver_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "seconds_a_run": [(b - a) / (runs / 10) for a, b in pairwise(marks)],
        "account_seconds": accounted,
        "saved_alarm": account.steps_saved_alarm,
        "saved_pruner": account.steps_saved_pruner,
    }


if __name__ == "__main__":
    print(json.dumps(simulate(Path(sys.argv[1]), int(sys.argv[2]))))
