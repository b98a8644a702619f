"""A record becomes one W&B run, told in sections by which runs can be compared."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from handwritten import opened, write
from PIL import Image

from equipoise import checkpoint
from equipoise.batches import Cohort
from equipoise.config import PRESETS, PUBLISHED, RunConfig, nearest_preset
from equipoise.monitor import Finding, Verdict
from equipoise.panels import Panels
from equipoise.ranks import Ranks
from equipoise.record import Record
from equipoise.search import Range
from equipoise.study import Study, StudyFolder
from equipoise.tracking import Watcher
from equipoise.train import fit
from equipoise.wandb_file import history, records, summary
from equipoise.wandb_row import ONSET, SECTIONS, named
from equipoise.wandb_run import wandb_mode
from equipoise.wandb_tracker import Logged, WandbTracker, logged
from slicestore.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
NAN = float("nan")


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return opened(tmp_path, steps=4)


def tracker(tmp_path: Path, **more: Any) -> WandbTracker:
    return WandbTracker(tmp_path / "wandb", group="g", prefix="id", mode="offline", **{"images": False, **more})


def watch(record: Record, *trackers: WandbTracker) -> None:
    with Watcher(lambda: [record], trackers, every=60):
        pass
    files(record.folder.parents[1])  # W&B's process has written what it was told


def files(tmp_path: Path) -> list[Path]:
    """W&B's files once its own process has written their last record, shortly after it says that it has."""
    found = sorted((tmp_path / "wandb").glob("wandb/offline-run-*/*.wandb"))
    deadline = time.monotonic() + 10
    while not all("exit" in {r.WhichOneof("record_type") for r in records(p)} for p in found):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def told_rows(path: Path) -> list[dict[str, Any]]:
    """Blocks, without the point that marks an onset."""
    return [row for row in history(path) if ONSET not in row]


STABLE = Verdict("stable", 4, 4, 1.0)
DIVERGED = Verdict("diverged", 2, 4, 0.25, (Finding("non_finite", "loss/ce", 2, 2, NAN, float("inf")),))


def test_a_run_reads_back_from_w_and_b_s_file_with_its_numbers_and_verdict(record: Record, tmp_path: Path) -> None:
    write(record, {"step": 1, "loss/ce": 0.5}, {"step": 2, "loss/ce": NAN})
    record.close(DIVERGED)
    watch(record, tracker(tmp_path))
    (path,) = files(tmp_path)
    rows = told_rows(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss/ce"] == 0.5
    assert rows[1]["loss/ce"] in ("NaN", "nan") or np.isnan(rows[1]["loss/ce"])
    told = summary(path)
    assert (told["verdict"], told["onset"], told["stability"], told["steps"]) == ("diverged", 2, 0.25, 2)
    assert "loss/ce became nan at step 2" in told["sentence"]
    (alert,) = (r.alert for r in records(path) if r.WhichOneof("record_type") == "alert")
    assert alert.title == "diverged"


@pytest.mark.parametrize(
    ("kind", "failed"),
    [
        ("saturated", True),
        ("collapsed", True),
        ("recovered", False),
        ("d_wins", False),
        ("blurry", False),
        ("censored", False),
    ],
)
def test_every_verdict_is_a_tag_and_failures_raise_an_alert(
    record: Record, tmp_path: Path, kind: Any, failed: bool
) -> None:
    write(record, {"step": 1})
    record.close(Verdict(kind, 4, 4, 0.9))
    watch(record, tracker(tmp_path))
    (path,) = files(tmp_path)
    tags = [list(r.run.tags) for r in records(path) if r.WhichOneof("record_type") == "run"]
    assert tags[-1] == ["lsgan", "published", kind]
    titles = [r.alert.title for r in records(path) if r.WhichOneof("record_type") == "alert"]
    assert titles == [kind] * failed


def test_what_a_control_is_called_is_noted(record: Record, tmp_path: Path) -> None:
    write(record, {"step": 1})
    record.close(STABLE)
    names = {record.config: "as published"}
    watch(record, tracker(tmp_path, names=names))
    (path,) = files(tmp_path)
    assert {r.run.notes for r in records(path) if r.WhichOneof("record_type") == "run"} == {"as published"}


def test_a_resumed_run_goes_on_under_its_id_and_repeats_no_row(record: Record, tmp_path: Path) -> None:
    write(record, {"step": 1}, {"step": 2})
    watch(record, tracker(tmp_path))
    assert logged(tmp_path / "wandb") == {"id-000-abc": Logged(2, ended=False)}
    write(record, {"step": 3}, {"step": 4})
    record.close(STABLE)
    watch(record, tracker(tmp_path))
    first, second = files(tmp_path)
    assert first.name == second.name
    assert [[row["step"] for row in history(path)] for path in (first, second)] == [[1, 2], [3, 4]]


def test_a_run_that_was_logged_to_its_end_is_left_alone(record: Record, tmp_path: Path) -> None:
    write(record, {"step": 1})
    record.close(STABLE)
    for _ in range(2):
        watch(record, tracker(tmp_path))
    assert len(files(tmp_path)) == 1
    assert logged(tmp_path / "wandb") == {"id-000-abc": Logged(1, ended=True)}


@pytest.mark.parametrize("images", [False, True])
def test_panels_reach_w_and_b_only_when_asked_for(record: Record, tmp_path: Path, images: bool) -> None:
    image = np.zeros((1, 8, 8), np.float32)
    Panels({"x_s": image}, {}).save(record.picture(2))
    write(record, {"step": 1}, {"step": 2}, {"step": 3})
    record.close(STABLE)
    watch(record, tracker(tmp_path, images=images))
    (path,) = files(tmp_path)
    assert [("panels/x_s._type" in row) for row in history(path)] == [False, images, False]
    assert len(list(path.parent.rglob("*.png"))) == int(images)


def test_slices_have_their_masks_over_them(record: Record, tmp_path: Path) -> None:
    image, mask = np.zeros((2, 8, 8), np.float32), np.zeros((2, 8, 8), np.uint8)
    mask[1, 2:4] = 1
    images = dict.fromkeys(("x_s", "x_st", "x_sts", "x_t", "x_ts", "x_tst"), image)
    Panels(images, {"y_s": mask, "mask_st": mask, "mask_t": 2 * mask}).save(record.picture(1))
    write(record, {"step": 1})
    record.close(STABLE)
    watch(record, tracker(tmp_path, images=True))
    (path,) = files(tmp_path)
    (row,) = history(path)
    assert {key.partition(".")[0] for key in row if key.startswith("panels/")} == {f"panels/{name}" for name in images}
    assert row["panels/x_sts.count"] == 2
    assert "panels/x_sts.all_masks" not in row
    assert [set(over) for over in row["panels/x_st.all_masks"]] == [{"predicted", "truth"}] * 2
    assert [set(over) for over in row["panels/x_t.all_masks"]] == [{"predicted"}] * 2
    drawn = np.asarray(Image.open(path.parent / "files" / row["panels/x_t.all_masks"][1]["predicted"]["path"]))
    assert np.array_equal(drawn, 2 * mask[1])


def test_an_onset_is_a_point_on_the_curve_that_tells_it_best(record: Record, tmp_path: Path) -> None:
    write(record, *({"step": step, "loss/cycle_t": 0.1 * step} for step in (1, 2, 3)))
    record.close(DIVERGED)
    watch(record, tracker(tmp_path))
    (path,) = files(tmp_path)
    (mark,) = (row for row in history(path) if "divergence/onset" in row)
    assert (mark["step"], mark["divergence/onset"]) == (2, 0.2)


def test_names_make_w_and_b_s_sections() -> None:
    sections = {"loss", "critic", "balance", "divergence", "quality", "validator", "system"}
    assert set(SECTIONS.values()) < sections
    told = {named(signal) for signal in ("auc/t", "loss/cycle_t", "saturation/st", "probe/foreground", "time/block")}
    assert told == {
        "critic/auc_t", "loss/cycle_t", "divergence/saturation_st", "quality/probe_foreground", "system/time_block"
    }  # fmt: skip
    assert named("step") == "step"


def test_every_signal_of_a_real_run_has_a_section(cohort: Cohort, tiny: RunConfig) -> None:
    run = tiny.having({"steps": 2, "balance.every": 1})
    signals = {name for progress in fit(run, cohort) for name in progress.signals}
    sections = {named(signal).partition("/")[0] for signal in signals}
    assert sections == {"loss", "critic", "balance", "divergence", "quality", "validator"}


def test_a_run_tells_its_speed_and_what_it_cost_and_saved(record: Record, tmp_path: Path) -> None:
    write(record, {"step": 1, "time/block": 1800.0, "loss/cycle_t": 0.1}, {"step": 2, "time/block": 1800.0})
    record.close(DIVERGED)  # after 2 of 4 steps
    watch(record, tracker(tmp_path, gpus=0.5))
    (path,) = files(tmp_path)
    rows, told = told_rows(path), summary(path)
    assert [row["system/steps_per_second"] for row in rows] == [1 / 1800, 1 / 1800]
    assert [row["system/device_hours"] for row in rows] == [0.5, 1.0]
    cost = ("device_hours", "device_hours_saved", "gpu_hours", "gpu_hours_saved")
    assert [told[name] for name in cost] == [1.0, 1.0, 0.5, 0.5]


def test_a_run_is_summarised_by_the_study_s_dice(record: Record, tmp_path: Path) -> None:
    write(record, {"step": 1, "quality/target_dice": 0.4, "quality/translated_dice": 0.9}, {"step": 2})
    record.close(STABLE)
    watch(record, tracker(tmp_path, objective="target_dice"))
    assert summary(files(tmp_path)[0])["dice"] == 0.4


def artifacts(path: Path) -> list[Any]:
    return [r.artifact for r in records(path) if r.WhichOneof("record_type") == "artifact"]


@pytest.fixture
def ended(tmp_path: Path) -> StudyFolder:
    """A study of one run that took two hours, with a checkpoint."""
    run = PUBLISHED.having({"steps": 4, "data.cohort": "f00dfeedbeefcafe"})
    study = Study(name="s", question="Which?", run=run, space={"optim.lr": Range(1e-5, 1e-2)}, points=1)
    folder = StudyFolder.create(tmp_path / "s", study, "typed", {})
    best = Record(folder.runs / "0000-abc")
    best.open(run, torch.device("cpu"))
    write(best, {"step": 4, "time/block": 7200.0, "quality/translated_dice": 0.75, "loss/cycle_t": 0.1})
    checkpoint.save(best.folder / "checkpoints", 4, checkpoint.State({"net": torch.zeros(2)}, {}), Ranks())
    best.close(STABLE)
    return folder


def concluded(folder: StudyFolder, **more: Any) -> Path:
    """W&B's file of a study's own run."""
    made = WandbTracker(folder.wandb, group="s", prefix="id", mode="offline", images=False, gpus=1, **more)
    made.conclude(folder, "0000-abc")
    made.close()
    (path,) = files(folder.folder)
    return path


def test_a_study_is_told_with_its_cost_its_best_checkpoint_and_its_store(ended: StudyFolder, tmp_path: Path) -> None:
    path = concluded(ended)
    told = summary(path)
    assert (told["best"], told["best/dice"], told["runs/stable"], told["gpu_hours"]) == ("0000-abc", 0.75, 1, 2.0)
    begun = next(r.run for r in records(path) if r.WhichOneof("record_type") == "run")
    assert (begun.job_type, begun.run_group) == ("study", "s")
    config = {u.key: json.loads(u.value_json) for u in begun.config.update}
    assert (config["question"], config["points"]) == ("Which?", 1)
    model, store = artifacts(path)
    (kept,) = model.manifest.contents
    assert (model.type, model.name, {*model.aliases} >= {"best", "0000-abc"}) == ("model", "s-model", True)
    newest = checkpoint.latest(ended.runs / "0000-abc" / "checkpoints")
    assert newest is not None
    assert (ended.folder / kept.local_path) == newest / "shared.pt"
    assert json.loads(model.metadata)["verdict"] == "stable"
    assert (store.type, json.loads(store.metadata)["fingerprint"]) == ("dataset", "f00dfeedbeefcafe")
    assert str(tmp_path).encode() not in path.read_bytes()


def test_a_study_s_weights_stay_where_they_are_if_asked_to(ended: StudyFolder) -> None:
    (store,) = artifacts(concluded(ended, model=False))
    assert store.type == "dataset"


def test_settings_go_to_w_and_b_and_nothing_of_the_machine_does(record: Record, tmp_path: Path) -> None:
    write(record, {"step": 1})
    record.close(STABLE)
    watch(record, tracker(tmp_path))
    (path,) = files(tmp_path)
    configs = {u.key: u.value_json for r in records(path) if r.WhichOneof("record_type") == "run"
               for u in r.run.config.update}  # fmt: skip
    assert json.loads(configs["optim"])["lr"] == 0.0002
    assert str(tmp_path).encode() not in path.read_bytes()
    assert {r.run.host for r in records(path) if r.WhichOneof("record_type") == "run"} == {""}


def test_without_a_key_the_mode_is_offline_and_the_sentence_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(None)[0] == "offline"
    mode, sentence = wandb_mode("online")
    assert mode == "offline"
    assert "online was asked for but there is no API key" in sentence
    assert wandb_mode("disabled")[0] == "disabled"


def test_a_key_that_can_be_none_is_told_and_the_mode_is_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "short")
    wandb.teardown()
    try:
        mode, sentence = wandb_mode("online")
    finally:
        wandb.teardown()
    assert mode == "offline"
    assert "an API key that can be none" in sentence


def test_a_file_that_is_no_w_and_b_log_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run-x.wandb"
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match=r"run-x\.wandb: found 14 bytes without W&B's header"):
        history(path)


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_is_known_by_the_preset_it_departs_from(name: str) -> None:
    assert nearest_preset(PRESETS[name]) == name
    assert nearest_preset(PRESETS[name].having({"optim.beta2": 0.9, "seed": 3})) == name
