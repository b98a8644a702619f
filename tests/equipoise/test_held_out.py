"""Networks are judged by subjects that a store holds back, in the scans' grids; those of the test once."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise import weights
from equipoise.baselines import supervised
from equipoise.batches import Cohort
from equipoise.config import RunConfig
from equipoise.held_out import check, labelled, masks, reference, tell, touch, touches
from equipoise.intake import Intake
from equipoise.launch.local import launch
from equipoise.nets import Inference
from equipoise.record import Record
from equipoise.study import Study, StudyFolder
from slicestore.errors import InputError
from slicestore.store import Store
from slicestore.volume import read

CPU = torch.device("cpu")
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(store: Store, tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two runs that have ended."""
    run = tiny.having({"data.cohort": store.fingerprint, "steps": 16, "evaluations": 4, "net.head_stride": 4})
    study = Study(name="two", question="Which?", run=run, space={}, first=({}, {"seed": 1}), points=2)
    made = StudyFolder.create(tmp_path_factory.mktemp("studies") / "two", study, "python study.py", {})
    for number, point in enumerate(study.first):
        config = run.having(point)
        for _ in launch(made.runs / f"{number:04d}-{config.fingerprint[:8]}", config, store.path):
            pass
    return made.folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "two"))


def test_parts_are_of_different_subjects(store: Store) -> None:
    parts = [{entry.subject for entry in store.select("target", part)} for part in ("train", "val", "test")]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_a_reference_is_the_raw_mask_where_pixels_are_voxels(store: Store, store_of_three: Store) -> None:
    for one in (store, store_of_three):
        for entry in labelled(one, "test"):
            raws = [read(path) for path in Path(one.path).parent.glob("target-*_label.nii.gz")]
            found = reference(one, entry)
            assert any(np.array_equal(found.voxels, raw.voxels) for raw in raws)


def test_what_is_compared_is_what_validation_measured(store: Store, tiny: RunConfig) -> None:
    from equipoise.evaluation import judge

    config = tiny.having({"steps": 40, "evaluations": 1, "net.head_stride": 2, "optim.lr_segmenter_ratio": 4.0})
    cohort = Cohort(store, config, CPU)
    *_, look = supervised(config, cohort, store)
    net = Inference(config.net).eval()
    weights.fill(net, weights.of(look.state(), {}), Path())
    (one,) = masks(net, cohort.intake, store, "val")
    (row,) = judge(one.subject, one.predicted, one.reference, [1], one.subject)
    assert row.agreement.dice == pytest.approx(look.quality["quality/target_dice"])
    assert 0 < row.agreement.dice < 1


def test_a_store_that_was_prepared_otherwise_or_has_no_masks_is_refused(
    store: Store, store_of_three: Store, tiny: RunConfig, make_store: Callable[..., Store], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="the network was trained on cohort"):
        check(Intake.of(store, tiny), store_of_three)
    bare = make_store(tmp_path, target_labels=False)
    with pytest.raises(InputError, match="no target mask in test"):
        labelled(bare, "test")


def test_looks_at_the_test_are_counted_and_a_second_one_has_to_be_asked_for(tmp_path: Path) -> None:
    assert touches(tmp_path) == 0
    touch(tmp_path, again=False)
    tell(tmp_path, [{"run": "a", "step": 8, "manner": "", "dice": 0.5}])
    assert touches(tmp_path) == 1
    with pytest.raises(InputError, match=r"test\.json: found 1 look at the test subjects already"):
        touch(tmp_path, again=False)
    touch(tmp_path, again=True)
    later = [
        {"run": "a", "step": 8, "manner": "", "dice": 0.7},
        {"run": "a", "step": 8, "manner": "flips x", "dice": 0.6},
    ]
    tell(tmp_path, later)
    assert json.loads((tmp_path / "test.json").read_text()) == {"touches": 2, "rows": later}


def test_a_study_is_tested_once_by_the_choice_of_every_protocol_and_its_report_tells(
    copied: Path, store: Store, tmp_path: Path, command: Command
) -> None:
    done = command("evaluate", copied, store.path, "-o", tmp_path / "out", "--part", "test")
    assert done.returncode == 0, done.stderr
    found = json.loads((copied / "test.json").read_text())
    assert found["touches"] == 1
    named = [name for row in found["rows"] for name in row["protocols"]]
    assert sorted(named) == sorted({*named})
    assert {"last", "source", "oracle", "entropy", "volume"} <= {*named}
    for row in found["rows"]:
        assert row["subjects"] == 1
        assert 0 <= row["dice"] <= 1
        assert row["step"] in Record(copied / "runs" / row["run"]).weights.steps()
        assert f"{row['dice']:.3f} over 1 test subjects" in done.stdout
    again = command("evaluate", copied, store.path, "-o", tmp_path / "out", "--part", "test")
    assert again.returncode == 2
    assert "1 look at the test subjects already" in again.stderr
    assert command("report", copied).returncode == 0
    assert "test Dice" in (copied / "report.html").read_text()
    assert command("evaluate", copied, store.path, "-o", tmp_path / "o", "--part", "test", "--again").returncode == 0
    assert touches(copied) == 2


def test_a_look_that_broke_off_is_counted_and_keeps_no_report_from_being_written(
    copied: Path, command: Command
) -> None:
    touch(copied, again=False)
    assert command("report", copied).returncode == 0
    assert "The test subjects were used 1 time" in (copied / "report.html").read_text()


def test_networks_by_which_nobody_was_held_back_and_classes_that_are_none_are_refused(
    copied: Path, store: Store, tiny: RunConfig, tmp_path: Path, command: Command
) -> None:
    by_slice = tiny.having({"data.cohort": store.fingerprint, "data.split": "slice"})
    for _ in launch(tmp_path / "run", by_slice, store.path):
        pass
    done = command("evaluate", tmp_path / "run", store.path, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "data.split 'slice'" in done.stderr
    for number in (0, 2):
        done = command("evaluate", copied, store.path, "-o", tmp_path / "out", "--structures", number)
        assert done.returncode == 2
        assert "the store's classes are 1 to 1" in done.stderr
    assert touches(copied) == 0


def test_a_look_by_a_run_of_a_study_is_a_look_of_the_study(
    copied: Path, store: Store, tmp_path: Path, command: Command
) -> None:
    one, other = sorted((copied / "runs").iterdir())
    assert command("evaluate", one, store.path, "-o", tmp_path / "a", "--part", "test").returncode == 0
    assert touches(copied) == 1
    done = command("evaluate", other, store.path, "-o", tmp_path / "b", "--part", "test")
    assert done.returncode == 2
    assert "1 look at the test subjects already" in done.stderr


def test_validation_subjects_are_no_test_and_a_run_is_judged_by_what_is_chosen(
    copied: Path, store: Store, tmp_path: Path, command: Command
) -> None:
    run = next((copied / "runs").iterdir())
    done = command("evaluate", run, store.path, "-o", tmp_path / "out", "--choose", "oracle")
    assert done.returncode == 0, done.stderr
    assert "over 1 val subjects" in done.stdout
    assert (tmp_path / "out" / "subjects.csv").is_file()
    assert not (run / "test.json").exists()
    assert not (copied / "test.json").exists()
