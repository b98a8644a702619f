"""A study's, a run's and a model's folder each give networks; a model is one folder that needs torch alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from equipoise import package
from equipoise.config import RunConfig
from equipoise.launch.local import launch
from equipoise.model import Which, load, run_of, translators
from equipoise.record import Record
from equipoise.selection import PROTOCOLS, Protocol
from equipoise.study import Study, StudyFolder
from slicestore.errors import InputError
from slicestore.store import Store

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(store: Store, tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of one run."""
    run = tiny.having({"data.cohort": store.fingerprint, "net.head_stride": 4})
    study = Study(name="one", question="Does it?", run=run, space={}, first=({},), points=1)
    made = StudyFolder.create(tmp_path_factory.mktemp("study") / "one", study, "python study.py", {})
    for _ in launch(made.runs / f"0000-{run.fingerprint[:8]}", run, store.path):
        pass
    return made.folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return next((folder / "runs").iterdir())


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "model"
    model = load(run, device=CPU)
    package.write(made, model.net, model.config, model.intake, model.about, "CC BY-NC 4.0")
    return made


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


def test_protocols_are_those_of_selection() -> None:
    assert set(Protocol.__args__) == set(PROTOCOLS)


def test_a_study_a_run_and_a_model_give_the_same_networks(folder: Path, run: Path, exported: Path) -> None:
    image = torch.randn(3, 1, 32, 40, generator=torch.Generator().manual_seed(1))
    found = [load(place, device=CPU) for place in (folder, run, exported)]
    logits = [model.net(image) for model in found]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert found[0].intake == found[1].intake == found[2].intake
    assert found[0].config == found[2].config
    assert torch.equal(translators(run, Which(), CPU).net(image), logits[0])


def test_weights_that_were_not_kept_come_from_a_checkpoint_and_other_steps_are_named(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    before = load(copy, device=CPU).net.state_dict()
    shutil.rmtree(copy / "weights")
    after = load(copy, device=CPU).net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(InputError, match=r"neither weights nor a checkpoint of step 5.*one of the steps 4, 8 with"):
        load(copy, Which(step=5), CPU)
    shutil.rmtree(copy / "checkpoints")
    for choice, found in (
        (Which(step=4), "neither weights nor a checkpoint of step 4"),
        (Which(), "neither weights nor a checkpoint; "),
        (Which(choose="oracle"), "nothing kept that 'oracle' would choose"),
    ):
        with pytest.raises(InputError, match=rf"{found}.*train it first"):
            load(copy, choice, CPU)
    with pytest.raises(InputError, match=r"no checkpoint; .*train it first"):
        translators(copy, Which(), CPU)


def test_a_run_without_subjects_to_validate_on_is_applied_after_its_last_step(
    make_store: Callable[..., Store], tiny: RunConfig, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "raw", subjects=1)
    for _ in launch(tmp_path / "run", tiny.at("data.cohort", store.fingerprint), store.path):
        pass
    assert load(tmp_path / "run", device=CPU).about["step"] == 8
    with pytest.raises(InputError, match="nothing kept that 'source' would choose"):
        load(tmp_path / "run", Which(choose="source"), CPU)


def test_a_run_of_an_earlier_version_takes_its_store_and_no_other(
    run: Path, store: Store, store_of_three: Store, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "intake.json").unlink()
    with pytest.raises(InputError, match="no readable account of preprocessing"):
        load(copy, device=CPU)
    assert load(copy, Which(store=str(store.path)), CPU).intake == load(run, device=CPU).intake
    with pytest.raises(InputError, match="the run was trained on cohort"):
        load(copy, Which(store=str(store_of_three.path)), CPU)


def test_a_newer_checkpoint_between_evaluations_is_not_the_last_evaluation(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    checkpoints = copy / "checkpoints"
    shutil.copytree(checkpoints / "step-000008", checkpoints / "step-000009")
    assert load(copy, device=CPU).about["step"] == 8
    assert load(copy, Which(step=9), CPU).about["quality"] == {}


def test_means_of_weights_are_told_with_their_own_dice(store: Store, tiny: RunConfig, tmp_path: Path) -> None:
    config = tiny.having({"data.cohort": store.fingerprint, "optim.ema": 0.5})
    for _ in launch(tmp_path / "run", config, store.path):
        pass
    row = Record(tmp_path / "run").rows()[-1]
    plain, mean = (load(tmp_path / "run", Which(ema=ema), CPU).about["quality"] for ema in (False, True))
    assert plain["quality/composite"] == row["quality/composite"]
    assert mean["quality/composite"] == row["quality/ema_composite"]
    assert not any("ema" in name for name in (*plain, *mean))
    assert "validator/entropy" in plain
    assert "validator/entropy" not in mean


def test_what_is_none_of_the_three_is_refused(tmp_path: Path, exported: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(InputError, match="no folder of a run, a study or a model"):
        load(tmp_path)
    with pytest.raises(InputError, match="a choice of weights, for a model"):
        load(exported, Which(step=4))
    with pytest.raises(InputError, match="a model, which holds E and C1 alone"):
        translators(exported, Which(), CPU)
    empty = StudyFolder.create(tmp_path / "empty", StudyFolder.open(folder).study, "", {})
    with pytest.raises(InputError, match="no point that has ended"):
        run_of(empty.folder)


def test_a_run_that_diverged_says_so_when_it_is_applied(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    assert load(copy, device=CPU).warnings() == []
    verdict = json.loads((copy / "verdict.json").read_text())
    (copy / "verdict.json").write_text(json.dumps({**verdict, "kind": "collapsed"}))
    (said,) = load(copy, device=CPU).warnings()
    assert said.startswith("the run that trained it: collapsed")


# --- the folder that is handed on -------------------------------------------------------------------------------------


def closure(name: str) -> Iterator[metadata.Distribution]:
    """A distribution and all that it cannot do without."""
    seen, waiting = set(), [name]
    while waiting:
        if (one := waiting.pop().lower()) not in seen:
            seen.add(one)
            found = metadata.distribution(one)
            yield found
            asked = [Requirement(line) for line in found.requires or ()]
            waiting += [r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which nothing is installed but torch and what torch demands."""
    place = tmp_path_factory.mktemp("torch") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    site = next((place / "lib").glob("python*/site-packages"))
    for found in closure("torch"):
        tops = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (site / top).exists():
                os.symlink(Path(str(found.locate_file(top))), site / top)
    return place / "bin" / "python"


def test_a_copied_model_gives_the_same_logits_where_nothing_but_torch_is_installed(
    run: Path, copied: Path, torch_alone: Path
) -> None:
    image = torch.randn(3, 1, 48, 32, generator=torch.Generator().manual_seed(1))
    expected = load(run, device=CPU).net(image)
    script = (
        "import importlib.util, sys, torch\n"
        "for absent in ('numpy', 'equipoise', 'slicestore', 'safetensors', 'ray', 'SimpleITK'):\n"
        "    assert importlib.util.find_spec(absent) is None, absent\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "image = torch.randn(3, 1, 48, 32, generator=torch.Generator().manual_seed(1))\n"
        "print(program(image).flatten().tolist())\n"
    )
    done = subprocess.run(
        [torch_alone, "-I", "-W", "ignore", "-c", script, copied / package.PROGRAM],
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=copied,
    )
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout)).view_as(expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0


def test_nothing_in_a_model_is_a_pickle(exported: Path) -> None:
    with zipfile.ZipFile(exported / package.PROGRAM) as archive:
        parts = {one: archive.read(one) for one in archive.namelist() if "/data/weights/weight_" not in one}
    assert not any(data[:1] == b"\x80" or data[:2] == b"PK" for data in parts.values())
    assert {file.name for file in exported.iterdir()} == {
        *(package.FACTS, package.WEIGHTS, package.INTAKE, package.CONFIG, package.PROGRAM, package.CARD)
    }


@pytest.mark.parametrize("name", [package.WEIGHTS, package.INTAKE, package.CONFIG])
def test_a_file_that_was_tampered_with_is_refused(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[-20] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}: found sha256 .*model\.json promises.*tampered with"):
        load(copied, device=CPU)
    (copied / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: found no readable file"):
        load(copied, device=CPU)


def test_a_pickle_is_refused_even_where_its_sum_is_right(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"encoder": torch.ones(1)}, copied / package.WEIGHTS)
    with pytest.raises(InputError, match="sha256"):
        load(copied, device=CPU)
    facts = json.loads((copied / package.FACTS).read_text())
    facts["sha256"][package.WEIGHTS] = hashlib.sha256((copied / package.WEIGHTS).read_bytes()).hexdigest()
    (copied / package.FACTS).write_text(json.dumps(facts))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("something was unpickled"))
    with pytest.raises(InputError, match="archive of pickles"):
        load(copied, device=CPU)


def test_a_model_of_another_schema_and_a_damaged_account_are_refused(copied: Path) -> None:
    facts = json.loads((copied / package.FACTS).read_text())
    (copied / package.FACTS).write_text(json.dumps({**facts, "schema": 99}))
    with pytest.raises(InputError, match=r"a model of schema 99; this version reads schema 1"):
        load(copied, device=CPU)
    config = json.loads((copied / package.CONFIG).read_text())
    config["net"]["novel"] = 1
    data = json.dumps(config).encode()
    (copied / package.CONFIG).write_bytes(data)
    sums = {**facts["sha256"], package.CONFIG: hashlib.sha256(data).hexdigest()}
    (copied / package.FACTS).write_text(json.dumps({**facts, "sha256": sums}))
    with pytest.raises(InputError, match=r"config\.json: found settings that this version does not know"):
        load(copied, device=CPU)
    (copied / package.FACTS).write_text("{")
    with pytest.raises(InputError, match="no readable account of a model"):
        load(copied, device=CPU)


def test_a_model_takes_no_folder_with_something_in_it(exported: Path, run: Path) -> None:
    model = load(run, device=CPU)
    with pytest.raises(InputError, match="found something there"):
        package.write(exported, model.net, model.config, model.intake, model.about, "")
    assert load(exported, device=CPU).intake == model.intake


def test_its_card_says_what_it_is_made_of_and_names_no_place(exported: Path, run: Path, store: Store) -> None:
    card, record = (exported / package.CARD).read_text(), Record(run)
    assert record.verdict is not None
    for said in (
        store.fingerprint,
        "Study one",
        record.verdict.sentence(),
        f"{record.rows()[-1]['quality/target_dice']:.3f}",
        "validation subjects",
        "CC BY-NC 4.0",
        "TOF angiography shows flowing arterial blood",
        "mainly veins",
        "no medical device",
    ):
        assert said in card
    everything = b"".join(file.read_bytes() for file in exported.iterdir())
    assert not any(place in everything for place in (str(run.parents[2]).encode(), str(store.path).encode()))
