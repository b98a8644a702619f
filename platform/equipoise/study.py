"""A study: what is asked, of which runs, and the folder that answers.

Knows the declaration and the study's folder; knows nothing of Ray, Optuna or W&B.

    study.json   the declaration, the store's fingerprint
    local.json   what only this place needs to know: the command, where the store is; not to be handed on
    journal.log  Optuna's record of points: states, values, verdicts
    runs/        one folder a run (`record.py`)
    wandb/       offline W&B runs
    test.json    looks at test subjects, and what they found
    report.html  the comparison
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from equipoise import search
from equipoise.config import RunConfig
from equipoise.config_base import Leaf
from equipoise.record import Record
from equipoise.search import ObjectiveName, Space
from equipoise.seeds import OverSeeds
from equipoise.writing import write
from slicestore.errors import InputError

TESTED = "test.json"
"""Beside what was tested: a study, or a run or model of none."""
PrunerName = Literal["asha", "median", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A declaration; importing or making one starts nothing.

    Where all points are given (`points` is the number of `first`), there is no search: every point is a control, and
    `space` only says which settings they differ in, if it says anything.
    """

    name: str
    """Folder and W&B group."""
    question: str
    """What it answers, in one sentence."""
    run: RunConfig
    """The run that every point departs from."""
    space: Space
    """What is searched."""
    first: Sequence[Mapping[str, Leaf]] = ()
    """Controls: points that are tried before the search has its say, and never stopped for their Dice. They may set
    what the space does not hold; the search then does not learn from them."""
    labels: Sequence[str] = ()
    """What the controls are called, in their order; by default nothing."""
    objective: ObjectiveName = "translated_dice"
    """What is maximised: a Dice, or the composite of the translated Dice and the target masks' volume. Where we speak
    of a study's Dice, it is this."""
    feasible: float = 0.9
    """The stability S that a point must reach."""
    points: int = 32
    """Points to judge, `first` included."""
    seed: int = 0
    """Seed of the search."""
    seeds: int = 1
    """Runs of a point, which differ in their seed: `run.seed` and those that follow it."""
    over_seeds: OverSeeds = "worst"
    """By what several seeds' S are one: the worst, or the 20 % quantile. Dice is their mean."""
    sampler: str = "TPESampler"
    """Optuna's sampler that proposes points, by the name of its class."""
    pruner: PrunerName = "asha"
    """What stops a run that falls behind in Dice x S: asynchronous halving, the median of the others, or nothing."""
    pareto: bool = False
    """Whether Dice and S are two objectives, and runs are stopped by the monitor alone; else Dice is maximised among
    points with an S of `feasible`."""

    def __post_init__(self) -> None:
        """Find mistakes before an hour is spent.

        Raises:
            InputError: it judges no point, or has neither enough given points nor a space to find others in.
            ValueError, KeyError: the space or a first point breaks a setting's rule, two controls are the same run, or
                they are not as many as their labels.
        """
        if self.points < 1:
            raise InputError("points", found=self.points, rule="a study judges at least one", remedy="give 1 or more")
        if not 0 <= self.feasible <= 1:
            raise ValueError(f"feasible = {self.feasible}: the stability S lies in [0, 1]")
        if self.seeds < 1:
            raise InputError("seeds", found=self.seeds, rule="a point is run at least once", remedy="give 1 or more")
        if self.seeds > 1 and any("seed" in point for point in (self.space, *self.first)):
            raise ValueError(f"seeds = {self.seeds}: seeds are given or searched already, a run each")
        if self.labels and len(set(self.labels)) != len(self.first):
            raise ValueError(f"{len(self.first)} controls have {len(set(self.labels))} different labels")
        made: dict[RunConfig, int] = {}
        for number, point in enumerate(self.first):
            same = made.setdefault(self.run.having(point), number)
            if same != number:
                raise ValueError(f"controls {self._called(same)} and {self._called(number)} are the same run")
        if self.searches:
            if not self.space:
                raise InputError(
                    "points",
                    found=self.points,
                    rule=f"without a space to search, the points are the {len(self.first)} that are given",
                    remedy=f"ask for at most {len(self.first)}" if self.first else "give a space, or first points",
                )
            search.check(self.space, self.run)

    @property
    def searches(self) -> bool:
        """Whether there are more points than are given."""
        return self.points > len(self.first)

    def names(self) -> dict[RunConfig, str]:
        """What the runs of controls that have labels are called, by their settings."""
        named = zip(self.first, self.labels, strict=False)
        return {run: label for point, label in named for run in self.runs(point)}

    def runs(self, point: Mapping[str, Leaf]) -> list[RunConfig]:
        """The runs by which a point is judged, one a seed."""
        run = self.run.having(point)
        return [run.at("seed", run.seed + n) for n in range(self.seeds)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for study.json."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return data | {
            "run": self.run.to_dict(),
            "first": [dict(p) for p in self.first],
            "labels": list(self.labels),
            "space": search.plain(self.space),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Study:
        """The inverse of `to_dict`."""
        given = {name: tuple(data[name]) for name in ("first", "labels")}
        made = {"run": RunConfig.from_dict(data["run"]), "space": search.parsed(data["space"])}
        return cls(**{**data, **given, **made})

    def _called(self, number: int) -> str:
        return repr(self.labels[number]) if self.labels else str(number)


class StudyFolder:
    """Everything a study leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.journal, self.runs = self.folder / "journal.log", self.folder / "runs"
        self.report, self.wandb = self.folder / "report.html", self.folder / "wandb"

    @classmethod
    def create(cls, folder: Path, study: Study, command: str, options: Mapping[str, Any]) -> StudyFolder:
        """A new folder with the declaration in it.

        Raises:
            InputError: there is a study already.
        """
        made = cls(folder)
        if made._file.is_file():
            raise InputError(
                folder, found="a study", rule="a new study gets a new folder", remedy="resume it, or give another name"
            )
        made.runs.mkdir(parents=True, exist_ok=True)
        made._write_local({"command": command, "options": dict(options)})
        made._write({"id": secrets.token_hex(4), "study": study.to_dict()})
        return made

    @classmethod
    def open(cls, folder: Path) -> StudyFolder:
        """A study's folder.

        Raises:
            InputError: there is none, or its study.json cannot be read.
        """
        found = cls(folder)
        try:
            _ = found.study, found.options
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                folder,
                found=f"no readable study.json and local.json ({type(error).__name__})",
                rule="a study's folder holds its declaration",
                remedy="give the folder that a study printed when it started",
            ) from error
        return found

    @property
    def id(self) -> str:
        """What tells this study's W&B runs from another's of the same name."""
        return str(self._about()["id"])

    @property
    def command(self) -> str:
        """The command that started the study."""
        return str(self._local()["command"])

    @property
    def options(self) -> dict[str, Any]:
        """How it was started, beyond the declaration."""
        return dict(self._local()["options"])

    @property
    def study(self) -> Study:
        """The declaration."""
        return Study.from_dict(self._about()["study"])

    def agree(self, study: Study) -> None:
        """Hold a resumed study to its declaration, and note the points that are asked for in addition.

        Raises:
            InputError: it differs; the message says where.
        """
        kept = self.study
        old, new = dict(_leaves(kept.to_dict())), dict(_leaves(study.to_dict()))
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if study.points > kept.points:
            changed.remove("points")
        if changed:
            raise InputError(
                self.folder,
                found="another " + ", ".join(f"{key} ({old.get(key)!r}, now {new.get(key)!r})" for key in changed),
                rule="a resumed study keeps its declaration; only its number of points may grow",
                remedy="resume with the command in local.json, or start a new study",
            )
        about, local = self._about(), self._local()
        about["study"]["points"] = local["options"]["points"] = study.points
        self._write_local(local)
        self._write(about)

    def records(self) -> list[Record]:
        """The runs so far, in order of their names."""
        return (
            [Record(f) for f in sorted(self.runs.iterdir()) if (f / "config.json").is_file()]
            if self.runs.is_dir()
            else []
        )

    @property
    def _file(self) -> Path:
        return self.folder / "study.json"

    def _write(self, about: Mapping[str, Any]) -> None:
        write(self._file, json.dumps(about, indent=2))

    def _write_local(self, local: Mapping[str, Any]) -> None:
        write(self.folder / "local.json", json.dumps(local, indent=2))

    def _local(self) -> dict[str, Any]:
        """Of a folder that was handed on without it, nothing."""
        path = self.folder / "local.json"
        local: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"command": "", "options": {}}
        return local

    def _about(self) -> dict[str, Any]:
        about: dict[str, Any] = json.loads(self._file.read_text())
        return about


def _leaves(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value of nested data by its dotted path, as JSON would read it back."""
    children = (
        data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list | tuple) else None
    )
    if children is None:
        yield path, data
        return
    for key, value in children:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def latest_study(results: Path) -> StudyFolder:
    """The study that was started last.

    Raises:
        InputError: there is none.
    """
    found = sorted(results.glob("*/study.json"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise InputError(
            results,
            found="no study",
            rule="studies are kept in the folder that --results names",
            remedy="run `python studies/stability_sweep.py`, or give a study's folder",
        )
    return StudyFolder.open(found[-1].parent)
