"""Networks ready to be applied: from a study's, a run's or a model's folder.

Knows where weights, settings and the account of preprocessing lie in each; must not know what is done with an image.
Nothing is unpickled beyond what `torch.load(weights_only=True)` allows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equipoise import checkpoint, package, weights
from equipoise.config import RunConfig, SpeedConfig
from equipoise.intake import Intake
from equipoise.nets import Inference, Sifa
from equipoise.record import Record, Row
from equipoise.selection import Protocol, best_step
from equipoise.speed import arrange
from equipoise.study import StudyFolder
from slicestore.errors import InputError
from slicestore.place import Place
from slicestore.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Which:
    """Which of a run's weights are meant."""

    choose: Protocol = "last"
    """Which evaluation of a run: its last; or the best by translated Dice (`source`), by a label-free validator, or by
    target masks (`oracle`); see `selection.PROTOCOLS`."""
    step: int | None = None
    """Instead, the evaluation after this step."""
    ema: bool = False
    """The running mean of the weights instead of the weights (of runs with --optim.ema)."""
    store: str | None = None
    """The store that a run was trained on; needed for runs of versions that did not note what predicting needs."""


LAST = Which()


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """E and C1, and all that goes with them."""

    net: Inference
    """In evaluation mode, on its device."""
    intake: Intake
    config: RunConfig
    """Of the run that trained it."""
    about: Mapping[str, Any]
    """Study, run, step, protocol, verdict, S, Dice: plain data, without a name of a place."""
    place: Path = Path()
    """Folder of the run, or of the model."""
    choice: Which = LAST
    """By which `load` gives these very weights from there again, though the run trains on."""

    def warnings(self) -> list[str]:
        """What a user should know before trusting it, in sentences."""
        return told_of(self.about)


def load(where: Path, choice: Which = LAST, device: torch.device | None = None) -> Model:
    """Networks from a folder.

    Args:
        where: a study's folder (then of its best point), a run's, or one that `equipoise export` wrote.
        choice: which of a run's weights.
        device: where to; by default an accelerator, if there is one.

    Raises:
        InputError: no such folder, weights that were not kept, a damaged file, or a choice where a model leaves none.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arrange(SpeedConfig())  # float32 is float32, as where the run was scored
    pinned, place = LAST, where
    if (where / package.FACTS).is_file():
        if choice != LAST:
            raise InputError(
                where,
                found="a choice of weights, for a model",
                rule="a model holds the weights that were exported",
                remedy="leave --choose, --step, --ema and --store out, or name the run's folder",
            )
        packed = package.read(where)
        config, intake, found, about = packed
    else:
        record, study = run_of(where)
        config, intake, about = record.config, _intake(record, choice), facts(record, study, choice)
        found = weights.choose(_tensors(record, about["step"]), ema=choice.ema, where=record.folder)
        pinned, place = Which(step=about["step"], ema=choice.ema, store=_absolute(choice.store)), record.folder
    net = Inference(config.net)
    weights.fill(net, found, where)
    return Model(net.to(device).eval().requires_grad_(False), intake, config, about, place.absolute(), pinned)


def told_of(about: Mapping[str, Any]) -> list[str]:
    """What a user of a run's networks should know of the run, in sentences."""
    calm = ("stable", "d wins", None)
    return [] if about.get("verdict") in calm else [f"the run that trained it: {about['sentence']}"]


def run_of(where: Path) -> tuple[Record, StudyFolder | None]:
    """The run that a folder means, and its study, if it is known.

    Raises:
        InputError: the folder is neither a run's nor a study's, or the study has no point that has ended.
    """
    if (where / "config.json").is_file():
        above = where.absolute().parent.parent
        return Record(where), StudyFolder.open(above) if (above / "study.json").is_file() else None
    if not (where / "study.json").is_file():
        raise InputError(
            where,
            found="no folder of a run, a study or a model" if where.is_dir() else "no such folder",
            rule="a run's folder holds config.json, a study's study.json, and a model's model.json",
            remedy="give the folder that `equipoise train`, a study or `equipoise export` wrote",
        )
    from equipoise.figures import Run
    from equipoise.report import best_point

    study = StudyFolder.open(where)
    best = best_point([Run.read(record) for record in study.records()], study.study)
    if best is None:
        raise InputError(
            where,
            found="no point that has ended with a Dice",
            rule="a study's model is its best point",
            remedy="resume the study, or name the folder of one of its runs",
        )
    return Record(study.runs / best.name), study


def facts(record: Record, study: StudyFolder | None, choice: Which) -> dict[str, Any]:
    """What is known of a run's weights: plain data.

    Raises:
        InputError: nothing was kept of the step that is meant.
    """
    rows = record.rows()
    step = _step(record, rows, choice)
    row = next((row for row in rows if row["step"] == step), {})
    scored = {n: v for n, v in row.items() if n.startswith(("quality/", "validator/"))}
    if choice.ema:
        scored = {n.replace("ema_", ""): v for n, v in scored.items() if n.startswith("quality/ema_")}
    else:
        scored = {n: v for n, v in scored.items() if not n.startswith("quality/ema_")}
    verdict = record.verdict
    return {
        "study": study.study.name if study else "",
        "question": study.study.question if study else "",
        "run": record.name if study else "",
        "step": step,
        "protocol": "a step that was named" if choice.step is not None else choice.choose,
        "ema": choice.ema,
        "verdict": verdict.kind if verdict else None,
        "sentence": verdict.sentence() if verdict else "it has not ended",
        "stability": verdict.stability if verdict else None,
        "quality": scored,
        "environment": _environment(record),
    }


def _step(record: Record, rows: Sequence[Row], choice: Which) -> int:
    """The step after which the weights are meant.

    Raises:
        InputError: nothing was kept of it.
    """
    there = sorted({*record.weights.steps(), *map(checkpoint.step_of, _checkpoints(record))})
    if choice.step is not None:
        step, found = choice.step, f"neither weights nor a checkpoint of step {choice.step}"
    elif choice.choose == "last":  # evaluation, of which there may be newer checkpoints
        kept = record.weights.steps() or [step for step in there if step == best_step(rows, "last")] or there
        step, found = (kept or [-1])[-1], "neither weights nor a checkpoint"
    else:
        best = best_step(rows, choice.choose)
        step = -1 if best is None else best
        found = f"nothing kept that {choice.choose!r} would choose"
    if step not in there:
        raise InputError(
            record.folder,
            found=found,
            rule="a run keeps its newest checkpoints, and the weights of evaluations that a protocol would choose",
            remedy=f"choose one of the steps {', '.join(map(str, there))} with --step" if there else "train it first",
        )
    return step


class Translators(NamedTuple):
    """All networks of a run, in evaluation mode."""

    net: Sifa
    intake: Intake
    about: Mapping[str, Any]
    """See `Model.about`."""
    place: Path
    choice: Which
    """See `Model.choice`."""


def translators(where: Path, choice: Which, device: torch.device) -> Translators:
    """All networks of a run, from the newest checkpoint or that of `choice.step`.

    Raises:
        InputError: a model's folder, which has no generator; or no checkpoint of that step.
    """
    if (where / package.FACTS).is_file():
        raise InputError(
            where,
            found="a model, which holds E and C1 alone",
            rule="G and U translate, and are in a run's checkpoints",
            remedy="name the run's folder",
        )
    record, study = run_of(where)
    arrange(SpeedConfig())
    net = Sifa(record.config.net)
    found = _shared(record, choice.step)
    pinned = Which(step=found["step"], ema=choice.ema, store=_absolute(choice.store))
    if choice.ema and not found["average"]:
        weights.choose({}, ema=True, where=record.folder)  # refuses
    net.load_state_dict({**found["net"], **(found["average"] if choice.ema else {})})
    about = facts(record, study, pinned)
    net = net.to(device).eval().requires_grad_(False)
    return Translators(net, _intake(record, choice), about, record.folder.absolute(), pinned)


def _intake(record: Record, choice: Which) -> Intake:
    if choice.store is None:
        return record.intake
    store = Store.open(choice.store)
    if store.fingerprint != record.config.data.cohort:
        raise InputError(
            store.path,
            found=f"cohort {store.fingerprint[:12]}",
            rule=f"the run was trained on cohort {record.config.data.cohort[:12]}",
            remedy="name that store, or leave --store out",
        )
    return Intake.of(store, record.config)


def _tensors(record: Record, step: int) -> dict[str, Tensor]:
    """E and C1 after a step: as they were kept, else from a checkpoint."""
    if record.weights.path(step).is_file():
        return weights.read(record.weights.path(step))
    found = _shared(record, step)
    return weights.of(found["net"], found["average"])


def _shared(record: Record, step: int | None) -> dict[str, Any]:
    """What all ranks share in the newest checkpoint, or in that of a step.

    Raises:
        InputError: there is none.
    """
    there = {checkpoint.step_of(found): found for found in _checkpoints(record)}
    if step is None and there:
        step = max(there)
    if step not in there:
        raise InputError(
            record.folder,
            found="no checkpoint" if step is None else f"no checkpoint of step {step}",
            rule="a run keeps its newest checkpoints",
            remedy=f"choose one of the steps {', '.join(map(str, there))} with --step" if there else "train it first",
        )
    return checkpoint.load_shared(there[step]).shared


def _checkpoints(record: Record) -> list[Path]:
    return checkpoint.complete(record.folder / "checkpoints")


def _absolute(store: str | None) -> str | None:
    """A store as every machine finds it."""
    return None if store is None else Place.at(store).url


def _environment(record: Record) -> dict[str, Any]:
    path = record.folder / "environment.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
