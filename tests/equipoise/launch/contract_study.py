"""A study whose runs end in every way there is, played from scripts on real Ray: by our searcher, or by Ray's own.

    python contract_study.py FOLDER ours|stock [SECONDS [URL]]     # or goes on with what is there

What Tune and Optuna then say of it is read from FOLDER by `test_contract.py`. With SECONDS every look takes as long, so
that there is a moment at which to kill it; with URL points are kept in that database.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from equipoise.config import PUBLISHED, RunConfig
from equipoise.keeping import Keeping
from equipoise.launch.cluster import Share, connect
from equipoise.launch.conduct import mistakes_told
from equipoise.launch.journal import journal
from equipoise.launch.ray_tune import Terms, search_points
from equipoise.rehearsal import Look, Script, rehearse
from equipoise.search import Range
from equipoise.sessions import Session
from equipoise.study import Study, StudyFolder
from equipoise.train import Progress
from equipoise.verdict import Finding, Verdict

STEPS = 400
CASES = ("completed", "nan_at_once", "diverged_late", "as_good", "stopped", "killed_once", "always_killed", "last")
"""What becomes of each point, by its number."""
RATES = tuple(1e-5 * 2**number for number in range(len(CASES)))
"""By which Ray's searcher is told the points: it gives them no numbers."""
STUDY = Study(
    name="contract",
    question="Is every end told as what it was?",
    run=PUBLISHED.having({"steps": STEPS, "evaluations": 4}),
    space={"optim.lr": Range(1e-5, 1e-2)},
    points=len(CASES),
)


def diverged(step: int, value: float) -> Verdict:
    finding = Finding("non_finite" if math.isnan(value) else "explosion", "loss/cycle_t", step, step, value, 1.0)
    return Verdict("diverged", step, STEPS, step / STEPS, (finding,))


def script(case: str, pause: float) -> Script:
    """The run of a case."""
    stable = Verdict("stable", STEPS, STEPS, 1.0)
    dice = 0.1 if case == "stopped" else 0.8  # all others alike, so that in no order one of them is stopped
    looks = tuple(Look(step, dice, 1.0) for step in (100, 200, 300, 400))
    if case == "nan_at_once":
        return Script(looks=(Look(1, math.nan, 0.0),), verdict=diverged(1, math.nan), pause=pause)
    if case == "diverged_late":
        looks = (*looks[:2], Look(250, 0.6, 0.6))
        return Script(looks=looks, verdict=diverged(250, 13.0), pause=pause)
    return Script(looks=looks, verdict=stable, pause=pause)


def play(folder: Path, config: RunConfig, store: str, *, keeping: Keeping, pause: float) -> Iterator[Progress]:
    """Play the case of the point's number; some kill their own process before their second look."""
    case = CASES[int(folder.name[:4])]
    for progress in rehearse(folder, config, store, keeping=keeping, book=lambda _: script(case, pause)):
        dies = case == "always_killed" or (case == "killed_once" and not (folder / "killed").exists())
        if dies and progress.step == 200:
            (folder / "killed").touch()
            (folder / "signals.jsonl").write_text((folder / "signals.jsonl").read_text().splitlines()[0] + "\n")
            os.kill(os.getpid(), signal.SIGKILL)
        yield progress


def ours(folder: Path, pause: float, url: str | None = None) -> None:
    """The study as `conduct` runs it."""
    made = StudyFolder(folder)
    if not (folder / "study.json").is_file():
        made = StudyFolder.create(folder, STUDY, "contract", {})
    with connect(None), Session.start(folder, slots=2, workers=1, gpus=0) as session:
        keeping, work = Keeping(session=session.id), partial(play, pause=pause)
        terms = Terms(share=Share(), slots=2, keeping=keeping, work=work, url=url, chapter=5)
        search_points(made, STUDY, "nowhere", terms)


def played(config: dict[str, Any]) -> None:
    """The same runs for Ray's own searcher, which is told Dice x S, and nothing of verdicts."""
    folder = Path(config["runs"]) / f"{RATES.index(config['lr']):04d}"
    run = STUDY.run.at("optim.lr", config["lr"])
    for progress in play(folder, run, "", keeping=Keeping(), pause=config["pause"]):
        tune.report({"step": progress.step, "score": progress.signals["quality/translated_dice"] * progress.stability})


def space(trial: optuna.Trial) -> None:
    trial.suggest_float("lr", 1e-5, 1e-2, log=True)


def stock(folder: Path, pause: float) -> None:
    """Ray's OptunaSearch with ASHA, as its documentation has them, on the same storage."""
    folder.mkdir(parents=True, exist_ok=True)
    storage = journal(folder / "journal.log")
    points = [{"lr": rate} for rate in RATES]
    searcher = OptunaSearch(
        space, metric="score", mode="max", storage=storage, study_name="contract", seed=0, points_to_evaluate=points
    )
    with connect(None):
        trainable = tune.with_resources(played, {"cpu": 1})
        if (folder / "ray" / "tune-stock" / "tuner.pkl").is_file():
            tuner = tune.Tuner.restore(str(folder / "ray" / "tune-stock"), trainable, resume_unfinished=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space={"runs": str(folder / "runs"), "pause": pause},
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=ASHAScheduler("step", "score", "max", max_t=STEPS, grace_period=100, reduction_factor=2),
                    num_samples=len(CASES),
                    max_concurrent_trials=2,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="tune-stock",
                    storage_path=str(folder / "ray"),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=2),
                ),
            )
        tuner.fit()


if __name__ == "__main__":
    where, who, *more = sys.argv[1:]
    with mistakes_told():
        {"ours": ours, "stock": stock}[who](Path(where), *map(float, more[:1] or ("0",)), *more[1:])
