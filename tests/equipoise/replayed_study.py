"""A study of any number of runs, written from the signals of a few that were trained: for reports and dashboards.

A replayed run has the rows of a recorded one, stretched over `ROWS` blocks of a run of the real length, and settings of
its own. What it came to is the recorded verdict at the new length.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

from equipoise.config import PUBLISHED, RunConfig
from equipoise.record import Record, _line
from equipoise.search import Choice, Range
from equipoise.study import Study, StudyFolder
from equipoise.verdict import Verdict

STEPS = 20_000
ROWS = 400
"""Blocks of a run: `STEPS` in blocks of 50."""
GAMES = ("lsgan", "ns", "hinge", "ra_lsgan")


def replayed(folder: Path, recorded: Sequence[Record], runs: int) -> StudyFolder:
    """Write the study, its runs in turn from the recorded ones, each of which has ended."""
    run = PUBLISHED.having({"steps": STEPS, "data.cohort": "f00dfeedbeefcafe"})
    space = {
        "optim.lr": Range(2e-5, 2e-3),
        "loss.cycle": Range(1.0, 30.0),
        "loss.adv_image": Range(0.1, 3.0),
        "loss.adversarial": Choice(GAMES),
    }
    study = Study(name="replayed", question="Which settings stay stable?", run=run, space=space, points=runs)
    made = StudyFolder.create(folder, study, "python studies/replayed.py", {"store": None})
    rng = random.Random(0)
    for number in range(runs):
        config = run.having(
            {
                "optim.lr": 10 ** rng.uniform(-4.6, -2.8),
                "loss.cycle": rng.uniform(1, 30),
                "loss.adv_image": rng.uniform(0.1, 3),
                "loss.adversarial": rng.choice(GAMES),
                "seed": number,
            }
        )
        _write(Record(made.runs / f"{number:04d}-{config.fingerprint[:8]}"), config, recorded[number % len(recorded)])
    return made


def _write(record: Record, config: RunConfig, of: Record) -> None:
    verdict, rows = of.verdict, of.rows()
    assert verdict is not None
    scale = STEPS / of.config.steps
    count = round(ROWS * verdict.step / of.config.steps)
    told = [_line({k: v for k, v in row.items() if k != "step"}).removeprefix("{") for row in rows]
    steps = [STEPS * (n + 1) / ROWS for n in range(count)]
    record.folder.mkdir(parents=True)
    (record.folder / "config.json").write_text(json.dumps(config.to_dict()))
    (record.folder / "environment.json").write_bytes((of.folder / "environment.json").read_bytes())
    lines = (f'{{"step": {step}, {told[n * len(rows) // count]}' for n, step in enumerate(steps))
    (record.folder / "signals.jsonl").write_text("".join(lines))
    for picture in of.pictures()[-1:]:
        record.picture(int(steps[-1])).parent.mkdir()
        record.picture(int(steps[-1])).write_bytes(picture.read_bytes())
    record.close(_longer(verdict, scale))


def _longer(verdict: Verdict, scale: float) -> Verdict:
    findings = tuple(
        dataclasses.replace(f, onset=round(f.onset * scale), alarm=round(f.alarm * scale)) for f in verdict.findings
    )
    return dataclasses.replace(verdict, step=round(verdict.step * scale), planned=STEPS, findings=findings)
