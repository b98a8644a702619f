"""The command `equipoise evaluate`: masks against masks, or networks against the subjects that a store holds back.

Knows what a user types and reads; knows nothing that `evaluation` and `held_out` do not offer to a script too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from tyro.conf import Positional

from equipoise.applying import Device, device_of
from equipoise.evaluation import Evaluation, Row, average, judge, pairs, told
from equipoise.evaluation import evaluate as compare
from equipoise.figures import Run
from equipoise.held_out import Held, check, labelled, masks, tell, touch
from equipoise.model import LAST, Model, Which, load, run_of
from equipoise.package import FACTS
from equipoise.predict import PLAIN, Manner
from equipoise.report import best_point
from equipoise.selection import protocols
from equipoise.store_cli import Unprefixed, say, shown, warn
from equipoise.study import StudyFolder
from slicestore.errors import InputError
from slicestore.layout import MANIFEST
from slicestore.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """What is asked where networks are judged against a store."""

    part: Held = "val"
    """Target subjects of which part: those that validate, or those of the test, who are looked at once. A study is
    judged by the choice of every protocol, unless one is named."""
    again: bool = False
    """Look at test subjects once more; it is counted, and the study's report tells it."""
    device: Device = "auto"
    """cpu, cuda, or whichever there is."""


PLAINLY = Against()


def evaluate(
    predicted: Positional[Path],
    reference: Positional[str],
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    mask: str | None = None,
    structures: tuple[int, ...] = (),
    against: Annotated[Against, Unprefixed] = PLAINLY,
    choice: Annotated[Which, Unprefixed] = LAST,
    manner: Annotated[Manner, Unprefixed] = PLAIN,
) -> None:
    """Say how well masks agree with their references, in their own grids: overlap, centrelines, volume, surfaces.

    Args:
        predicted: a mask, or a folder of masks; or, where the reference is a store, a model's, run's or study's folder.
        reference: a mask, or a folder of masks of the same names; or a store with masks of target subjects.
        out: folder of subjects.csv, summary.json and agreement.png.
        mask: with files: an ending of their names that is no part of a subject's name, beside mask, seg and label.
        structures: classes that count; by default all but background and, with a store, brain.
        against: with a store.
        choice: with a store: which of a run's weights.
        manner: with a store: how networks are applied.
    """
    if out.exists() and not out.is_dir():
        raise InputError(out, found="a file", rule="results go into a folder", remedy="name another place")
    console = Console()
    of_store = reference.startswith("s3://") or (Path(reference) / MANIFEST).is_file()
    _refuse_idle(of_store, mask, (against, choice, manner) != (PLAINLY, LAST, PLAIN))
    if not of_store:
        _masks(console, predicted, Path(reference), out, mask, structures)
        return
    held = _Held(Store.open(reference), against, manner, structures)
    folder, counts = predicted, predicted
    if not (predicted / FACTS).is_file():
        record, study = run_of(predicted)
        folder, counts = record.folder, study.folder if study else record.folder
    whole = (predicted / "study.json").is_file() and choice == LAST
    chosen = _choices(StudyFolder.open(predicted)) if whole else [((folder, choice), ["chosen"])]
    rows = held.judged(console, counts, chosen, out)
    for row in rows:
        say(console, f"{row['run'] or folder.name}, step {row['step']} ({', '.join(row['protocols'])}): Dice "
               f"{row['dice']:.3f} over {row['subjects']} {against.part} subjects")  # fmt: skip


def _refuse_idle(of_store: bool, mask: str | None, told: bool) -> None:
    """Options that could take no effect are mistakes."""
    if (of_store and mask) or (told and not of_store):
        raise InputError(
            "evaluate",
            found="--mask, with a store" if of_store else "options of networks, with files of masks",
            rule="--mask goes with files; --part, --again, --device, and what chooses and applies weights, with stores",
            remedy="leave it out" if of_store else "leave them out, or name a store",
        )


Candidate = tuple[tuple[Path, Which], list[str]]
"""A run's folder, which of its weights, and the protocols that chose them."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Subjects that are held back, and how networks are judged by them."""

    store: Store
    against: Against
    manner: Manner
    structures: tuple[int, ...]

    def judged(self, console: Console, folder: Path, chosen: Sequence[Candidate], out: Path) -> list[dict[str, Any]]:
        """Judge each choice; count the look, where test subjects are looked at, before it is taken."""
        labelled(self.store, self.against.part)
        models = [(load(*one, device_of(self.against.device)), names) for one, names in chosen]
        for model, _ in models:
            self.check(model)
            for said in model.warnings():
                warn(console, said)
        tests = self.against.part == "test"
        if tests:
            touch(folder, again=self.against.again)
        rows = []
        for model, names in models:
            found = self.evaluation(console, model)
            found.write(out if len(models) == 1 else out / f"{model.about['run']}-step-{model.about['step']}")
            told(console, found)
            rows.append(self.row(model, names, found))
        if tests:
            tell(folder, rows)
        return rows

    def evaluation(self, console: Console, model: Model) -> Evaluation:
        """All subjects, one in memory at a time."""
        brain = self.store.preprocessing.brain_class
        wanted = self.structures or [k for k in range(1, self.store.classes) if k != brain]
        entries, rows = labelled(self.store, self.against.part), list[Row]()
        with shown(console, "predicting") as progress:
            for number, one in enumerate(masks(model.net, model.intake, self.store, self.against.part, self.manner), 1):
                rows += judge(one.subject, one.predicted, one.reference, wanted, one.subject)
                progress(number, len(entries), one.subject)
        return Evaluation(tuple(rows))

    def check(self, model: Model) -> None:
        """Refuse a network by which nobody was held back, and classes that it cannot find."""
        check(model.intake, self.store)
        if model.config.data.split != "subject":
            raise InputError(
                model.place,
                found=f"data.split {model.config.data.split!r}",
                rule="subjects are held back where training was split by subject",
                remedy="predict subjects that it was not trained on, and compare files of masks",
            )
        for structure in self.structures:
            if not 0 < structure < self.store.classes:
                raise InputError(
                    "--structures",
                    found=structure,
                    rule=f"the store's classes are 1 to {self.store.classes - 1}",
                    remedy="name some of these",
                )

    def row(self, model: Model, names: Sequence[str], found: Evaluation) -> dict[str, Any]:
        """What `test.json` says of a choice: Dice over subjects, of each the mean over structures."""
        dice = average(np.mean([found.values(k, "dice") for k in found.structures], axis=0))
        manner = {"ema": model.about["ema"], "flips": self.manner.flips, "structures": self.structures}
        usual = {"ema": False, "flips": "none", "structures": ()}
        return {
            "protocols": list(names),
            "run": model.about["run"],
            "step": model.about["step"],
            "manner": ", ".join(f"{k} {v}" for k, v in manner.items() if v != usual[k]),
            "dice": dice.mean,
            "interval": list(dice.interval) if dice.interval else None,
            "subjects": len(found.subjects),
        }


def _choices(study: StudyFolder) -> list[Candidate]:
    """What each protocol chooses of a study, those together that choose alike."""
    runs = [Run.read(record) for record in study.records()]
    found: dict[tuple[Path, Which], list[str]] = {}
    for one in protocols(runs, study.study, best_point(runs, study.study)):
        found.setdefault((study.runs / one.run, Which(step=one.step)), []).append(one.protocol)
    return list(found.items())


def _masks(
    console: Console, predicted: Path, reference: Path, out: Path, mask: str | None, structures: Sequence[int]
) -> None:
    """Compare files; nothing is written where one is wrong."""
    matched = pairs(predicted, reference, mask)
    with shown(console) as progress:
        found = compare(matched, structures or None, progress)
    found.write(out)
    told(console, found)
    say(console, f"{out}: subjects.csv, summary.json, agreement.png")
