"""What a study script is told, what it keeps for a resume, and what it trains on without a store."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from equipoise.config import PUBLISHED
from equipoise.config_base import Leaf
from equipoise.heads import synthetic_store
from equipoise.launch.conduct import _bound, conduct, mistakes_told
from equipoise.launch.options import Options, declared, resumed, saved
from equipoise.search import Choice, ObjectiveName, Range, Space
from equipoise.study import Study, StudyFolder
from slicestore.errors import InputError
from slicestore.store import Store


@dataclass(frozen=True, kw_only=True)
class Own(Options):
    """Flags of a script's own."""

    rates: tuple[float, ...] = (1e-4,)
    sifa: bool = False
    size: int = 64


def declare(options: Options) -> Study:
    return Study(
        name="own", question="?", run=PUBLISHED, space={"optim.lr": Range(1e-5, 1e-3)}, points=options.points or 4
    )


def test_a_resumed_study_has_the_script_s_own_flags_again_but_for_those_given_anew(tmp_path: Path) -> None:
    started = Own(results=tmp_path, rates=(1e-4, 1e-3), sifa=True, points=6, confirm_workers=0)
    made = StudyFolder.create(tmp_path / "own", declare(started), "", saved(started))
    assert json.loads((tmp_path / "own" / "local.json").read_text())["options"]["rates"] == [1e-4, 1e-3]
    folder, options = resumed(declare, Own(results=tmp_path, resume=True, size=32))
    assert folder is not None
    assert folder.folder == made.folder
    assert options == dataclasses.replace(started, resume=True, size=32)


def test_a_study_that_is_not_resumed_has_the_options_it_was_given(tmp_path: Path) -> None:
    options = Own(results=tmp_path, size=32)
    assert resumed(declare, options) == (None, options)


def test_points_that_a_study_does_not_take_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    given = dataclasses.replace(declare(Options()), space={}, first=({}, {"seed": 1}), points=2)
    with pytest.raises(InputError) as error:
        conduct(lambda _: given, Options(points=5, results=tmp_path))
    assert (error.value.found, error.value.rule) == ("5", "own has 2 points")
    assert not list(tmp_path.iterdir())


def test_a_study_cannot_be_quiet_and_tell_a_program_everything(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--quiet: found --json beside it"):
        conduct(declare, Options(quiet=True, json=True, results=tmp_path))
    assert not list(tmp_path.iterdir())


def test_synthetic_heads_fill_slices_of_any_size_and_each_size_has_its_store(tmp_path: Path) -> None:
    plain, small = synthetic_store(tmp_path), synthetic_store(tmp_path, size=32, mask="vessel")
    assert (plain.name, small.name) == ("heads.zarr", "heads-vessel-32.zarr")
    for path, size, spacing_mm in ((plain, 64, 3.0), (small, 32, 6.0)):
        settings = Store.open(path).preprocessing
        assert (settings.size, settings.spacing_mm) == (size, spacing_mm)
    assert synthetic_store(tmp_path, 32, "vessel") == small


@pytest.mark.parametrize(
    ("changes", "space", "rule"),
    [
        ({"loss.adversarial": "rp"}, {}, "must be 'r1r2' where loss.adversarial is 'rp'"),
        ({"loss.adversarial": "hinge", "critic.penalty": "gp"}, {}, "belongs to loss.adversarial 'wgan_gp'"),
        ({"loss.cycle": -1.0}, {}, "loss.cycle = -1.0: must not be negative"),
        ({"monitor.horizon_steps": 20_001}, {}, "must not exceed steps"),
        ({}, {"loss.adversarial": Choice(("lsgan", "rp"))}, "must be 'r1r2' where loss.adversarial is 'rp'"),
        ({}, {"loss.cycle": Range(-1.0, 1.0, log=False)}, "must not be negative"),
        ({}, {"loss.cicle": Range(1.0, 2.0)}, "no setting 'cicle'"),
    ],
)
def test_a_study_with_a_run_that_cannot_be_is_refused_when_it_is_declared_and_nothing_is_made(
    changes: dict[str, Leaf], space: Space, rule: str, tmp_path: Path
) -> None:
    def wrong(options: Options) -> Study:
        base = {"optim.lr": Range(1e-5, 1e-3)}
        return Study(name="own", question="?", run=PUBLISHED.having(changes), space={**base, **space})

    with pytest.raises(InputError, match=re.escape(rule)):
        conduct(wrong, Options(results=tmp_path / "results"))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"sampler": "TSPSampler"}, "sampler: found TSPSampler; Optuna's samplers that need no more than a name are "),
        ({"storage": "postgresql+psycopg://me@127.0.0.1:1/x"}, "Remedy: start the database"),
        ({"least_workers_per_run": 3}, "workers at least: found 3; the run has 1 workers"),
        ({"concurrent": 0}, "--concurrent: found 0; runs are done"),
        ({"checkpoints_kept": 1}, "kept: found 1; "),
        ({"copies": "ftp://somewhere"}, "found a ftp URL"),
        ({"seeds": 0}, "seeds: found 0; a point is run at least once"),
        ({"pareto": True, "sampler": "CmaEsSampler"}, "multi-objective"),
    ],
)
def test_what_a_study_is_told_of_its_search_and_its_runs_is_checked_before_anything_is_made(
    given: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(rule)):
        conduct(declare, Options(results=tmp_path / "results", **given))
    assert not (tmp_path / "results").exists()


def test_a_study_is_as_its_script_declares_it_but_for_what_the_command_line_says() -> None:
    plain = declared(declare, Options())
    assert plain == declare(Options())
    other = declared(declare, Options(seeds=3, over_seeds="q20", sampler="QMCSampler", pruner="median", pareto=True))
    assert (other.seeds, other.over_seeds, other.sampler, other.pruner, other.pareto) == (
        3, "q20", "QMCSampler", "median", True,
    )  # fmt: skip
    assert declared(declare, Options(objective="composite")) == dataclasses.replace(plain, objective="composite")


def test_a_resumed_study_keeps_the_objective_that_it_was_told(tmp_path: Path) -> None:
    started = Options(results=tmp_path, objective="composite")
    made = StudyFolder.create(tmp_path / "own", declared(declare, started), "", saved(started))
    folder, options = resumed(declare, Options(results=tmp_path, resume=True))
    assert folder is not None
    folder.agree(declared(declare, options))
    assert made.study.objective == options.objective == "composite"


@pytest.mark.parametrize(
    ("objective", "lacking"),
    [("translated_dice", "source"), ("target_dice", "target"), ("composite", "source"), ("composite", "target")],
)
def test_an_objective_that_the_store_has_no_subjects_for_is_refused(
    objective: ObjectiveName, lacking: str, store: Path
) -> None:
    study, whole = declared(declare, Options(objective=objective)), Store.open(store)
    entries = tuple(entry for entry in whole.entries if (entry.domain, entry.split) != (lacking, "val"))
    bare = dataclasses.replace(whole, entries=entries)
    with pytest.raises(InputError, match=f"{lacking} subject to validate on; a study maximises {objective}"):
        _bound(study, bare)


def test_the_composite_needs_target_subjects_without_masks_and_the_target_dice_needs_their_masks(
    tmp_path: Path, make_store: Callable[..., Store]
) -> None:
    blind = make_store(tmp_path, target_labels=False)
    plain = declare(Options())
    small = dataclasses.replace(plain, run=plain.run.at("batch", 2))
    for objective in ("translated_dice", "composite"):
        asked = dataclasses.replace(small, objective=objective)
        assert _bound(asked, blind).run.data.cohort == blind.fingerprint
    with pytest.raises(InputError, match="no labelled target subject to validate on"):
        _bound(dataclasses.replace(small, objective="target_dice"), blind)


def test_a_study_that_is_resumed_with_another_space_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    folder = StudyFolder.create(tmp_path / "own", declare(Options()), "", saved(Options(results=tmp_path)))
    before = (folder.folder / "study.json").read_bytes()

    def other(options: Options) -> Study:
        return dataclasses.replace(declare(options), space={"optim.lr": Range(1e-5, 1e-2)})

    with pytest.raises(InputError, match=r"another space.optim.lr.0.high \(0.001, now 0.01\)") as caught:
        folder.agree(other(Options()))
    assert caught.value.rule == "a resumed study keeps its declaration; only its number of points may grow"
    assert (folder.folder / "study.json").read_bytes() == before


def test_a_study_s_exact_name_is_resumed_also_where_later_ones_are_numbered_after_it(tmp_path: Path) -> None:
    first = StudyFolder.create(tmp_path / "own", declare(Options()), "", saved(Options(results=tmp_path)))
    later = StudyFolder.create(tmp_path / "own-2", declare(Options()), "", saved(Options(results=tmp_path)))
    for name, want in ((None, later), ("own", first), ("own-2", later)):
        found, _ = resumed(declare, Options(results=tmp_path, resume=True, name=name))
        assert found is not None
        assert found.folder == want.folder


@pytest.fixture
def signals() -> Iterator[None]:
    """What signals do is as before after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def test_what_a_scheduler_sends_ends_a_study_as_ctrl_c_does(handler: Any, capsys: pytest.CaptureFixture[str]) -> None:
    signal.signal(signal.SIGINT, handler)
    with pytest.raises(SystemExit) as end, mistakes_told():
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 130
    assert "add --resume to continue" in capsys.readouterr().err
