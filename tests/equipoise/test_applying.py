"""Commands that apply networks: which files are done, where results go, and what one bad volume costs the others."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from equipoise import weights
from equipoise.agreement import agreement
from equipoise.applying import Segmenting, tasks
from equipoise.baselines import source_only
from equipoise.batches import Cohort
from equipoise.config import VESSEL, RunConfig
from equipoise.launch.local import launch
from equipoise.model import Model, load
from equipoise.nets import Inference
from equipoise.panels import _grey, _overlay
from equipoise.predict import PLAIN, predict
from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.ingest import ingest
from slicestore.inputs import inputs_from_folder
from slicestore.settings import Preprocessing
from slicestore.store import DOMAINS, Store
from slicestore.volume import Volume, read, write

CPU = torch.device("cpu")
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(store: Store, tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = tiny.having({"data.cohort": store.fingerprint, "net.head_stride": 4, "optim.ema": 0.5})
    for _ in launch(folder, config, store.path):
        pass
    return folder


@pytest.fixture(scope="module")
def raw(store: Store) -> Path:
    """The folder of the store's raw volumes: `target-0.nii.gz` with `target-0_label.nii.gz`, and so on."""
    return Path(store.path).parent


@pytest.fixture
def scans(raw: Path, tmp_path: Path) -> Path:
    """Two target volumes with their masks."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for file in [*raw.glob("target-0*.nii.gz"), *raw.glob("target-1*.nii.gz")]:
        shutil.copy(file, folder)
    return folder


def test_a_folder_is_segmented_each_volume_in_its_grid(
    run: Path, scans: Path, tmp_path: Path, command: Command
) -> None:
    done = command("predict", run, scans, "-o", tmp_path / "out", "--probability", "--flips", "x")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 volumes done" in done.stdout
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        f"target-{number}_{kind}.nii.gz" for number in (0, 1) for kind in ("mask", "probability")
    ]
    for number in (0, 1):
        mask, share = (read(tmp_path / "out" / f"target-{number}_{kind}.nii.gz") for kind in ("mask", "probability"))
        assert mask.geometry == share.geometry == read(scans / f"target-{number}.nii.gz").geometry
        assert mask.voxels.dtype == np.uint8
        assert share.voxels.dtype == np.float32
        assert np.array_equal(mask.voxels == 1, share.voxels > 0.5)


def test_masks_beside_their_probabilities_are_compared_with_those_by_hand(
    run: Path, scans: Path, tmp_path: Path, command: Command
) -> None:
    assert command("predict", run, scans, "-o", tmp_path / "out", "--probability").returncode == 0
    done = command("evaluate", tmp_path / "out", scans, "-o", tmp_path / "agreement")
    assert done.returncode == 0, done.stderr
    assert "2 subjects" in done.stdout


def test_what_a_script_predicts_is_what_the_command_writes_from_a_model_too(
    run: Path, scans: Path, tmp_path: Path, command: Command
) -> None:
    assert command("export", run, tmp_path / "model", "--ema").returncode == 0
    one = scans / "target-0.nii.gz"
    assert command("predict", tmp_path / "model", one, "-o", tmp_path / "out").returncode == 0
    found, _ = predict(load(tmp_path / "model", device=CPU), read(one))
    assert np.array_equal(read(tmp_path / "out" / "target-0_mask.nii.gz").voxels, found.label.voxels)


def test_images_are_told_from_masks_by_their_names(scans: Path, tmp_path: Path) -> None:
    shutil.copy(scans / "target-0_label.nii.gz", scans / "target-0_vessel.nii.gz")
    said: list[str] = []
    found = tasks([scans], tmp_path / "out", tell=said.append)
    assert [task.image.name for task in found] == ["target-0.nii.gz", "target-1.nii.gz"]
    names = "target-0_label.nii.gz, target-0_vessel.nii.gz, target-1_label.nii.gz"
    assert said == [f"left aside as masks: 3 files, such as {names}; name a file to have it done"]
    (named,) = tasks([scans / "target-0_vessel.nii.gz"], tmp_path / "out")
    assert named.stem.name == "target-0_vessel"


def test_a_folder_is_searched_for_images_whatever_masks_lie_in_it(scans: Path, tmp_path: Path) -> None:
    for name in ("target-0_mask", "target-0_seg", "lonely_mask"):
        shutil.copy(scans / "target-0_label.nii.gz", scans / f"{name}.nii.gz")
    found = tasks([scans], tmp_path / "out")
    assert [task.stem.name for task in found] == ["lonely_mask", "target-0", "target-1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found no volume"):
        tasks([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(InputError, match="found nothing"):
        tasks([tmp_path / "absent.nii.gz"], tmp_path / "out")


def test_a_brain_mask_beside_its_image_is_found(scans: Path, tmp_path: Path) -> None:
    shutil.copy(scans / "target-0_label.nii.gz", scans / "target-0_brain_mask.nii.gz")
    for place in (scans, scans / "target-0.nii.gz"):
        first, *_ = tasks([place], tmp_path / "out")
        assert first.brain == scans / "target-0_brain_mask.nii.gz"


def test_nothing_is_replaced_unasked_and_nothing_is_done_before_that_is_known(
    run: Path, scans: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "target-1_mask.nii.gz").write_bytes(b"by hand")
    done = command("predict", run, scans, "-o", out)
    assert done.returncode == 2
    assert "a result takes no file's place unasked" in done.stderr
    assert [file.read_bytes() for file in out.iterdir()] == [b"by hand"]
    assert command("predict", run, scans, "-o", out, "--existing", "replace").returncode == 0
    assert len(list(out.iterdir())) == 2


def test_what_was_not_done_is_done_when_it_is_asked_for_again(
    run: Path, scans: Path, tmp_path: Path, command: Command
) -> None:
    whole = (scans / "target-0.nii.gz").read_bytes()
    (scans / "target-0.nii.gz").write_bytes(b"")
    assert command("predict", run, scans, "-o", tmp_path / "out").returncode == 1
    first = (tmp_path / "out" / "target-1_mask.nii.gz").stat().st_mtime_ns
    (scans / "target-0.nii.gz").write_bytes(whole)
    done = command("predict", run, scans, "-o", tmp_path / "out", "--existing", "skip")
    assert "1 of 1 volumes done" in done.stdout
    assert (tmp_path / "out" / "target-1_mask.nii.gz").stat().st_mtime_ns == first
    assert "0 of 0 volumes done" in command("predict", run, scans, "-o", tmp_path / "out", "--existing", "skip").stdout


def test_a_folder_that_cannot_be_written_and_options_without_effect_are_told(
    run: Path, scans: Path, store: Store, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "file").touch()
    done = command("predict", run, scans, "-o", tmp_path / "file")
    assert done.returncode == 2
    assert "results go into a folder" in done.stderr
    done = command("predict", run, scans, "-o", tmp_path / "file" / "below")
    assert done.returncode == 1
    assert done.stdout.count("a disk that refuses") == 2
    done = command("predict", run, scans, "-o", tmp_path / "out", "--gpus-per-volume", "1")
    assert done.returncode == 2
    assert "a share of a cluster's cards" in done.stderr
    for words in ((scans, scans, "--part", "test"), (run, store.path, "--mask", "vessel")):
        done = command("evaluate", *words[:2], "-o", tmp_path / "out", *words[2:])
        assert done.returncode == 2
        assert "leave" in done.stderr


def test_all_volumes_of_a_call_get_the_same_weights_though_the_run_trains_on(run: Path, raw: Path) -> None:
    ready = load(run, device=CPU)
    assert (ready.place, ready.choice.step) == (run, 8)
    work = Segmenting(model=ready.place, choice=ready.choice, manner=PLAIN)
    assert pickle.loads(pickle.dumps(work)) == work


def test_a_damaged_volume_is_told_and_the_others_are_done(
    run: Path, scans: Path, tmp_path: Path, command: Command
) -> None:
    whole = (scans / "target-0.nii.gz").read_bytes()
    (scans / "target-0.nii.gz").write_bytes(whole[:-40])
    done = command("predict", run, scans, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "error: " in done.stdout
    assert "target-0.nii.gz" in done.stdout.partition("error: ")[2].partition("\n")[0]
    assert "1 of 2 volumes done" in done.stdout
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["target-1_mask.nii.gz"]


def of_four_axes(folder: Path) -> Path:
    image = sitk.JoinSeries(
        [sitk.GetImageFromArray(np.random.default_rng(n).normal(0, 1, (6, 32, 32))) for n in (0, 1)]
    )
    sitk.WriteImage(image, str(folder / "echoes.nii.gz"))
    return folder / "echoes.nii.gz"


def constant(folder: Path) -> Path:
    write(Volume(np.full((6, 32, 32), 7, np.int16), Geometry((32, 32, 6), (1.0, 1.0, 3.0))), folder / "c.nii.gz")
    return folder / "c.nii.gz"


def of_no_byte(folder: Path) -> Path:
    (folder / "nothing.nii.gz").touch()
    return folder / "nothing.nii.gz"


def not_finite(folder: Path) -> Path:
    voxels = np.random.default_rng(0).normal(0, 1, (6, 32, 32))
    voxels[3, 5, 5] = np.nan
    write(Volume(voxels, Geometry((32, 32, 6), (1.0, 1.0, 3.0))), folder / "nan.nrrd")
    return folder / "nan.nrrd"


def flat(folder: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((32, 32), np.int16)), str(folder / "flat.nii.gz"))
    return folder / "flat.nii.gz"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (of_four_axes, "2 volumes"),
        (constant, "the one value 7 in every voxel"),
        (of_no_byte, "nothing.nii.gz"),
        (not_finite, "1 NaN or infinite voxels"),
        (flat, "a 2D image"),
    ],
)
def test_a_volume_that_cannot_be_is_refused_by_name_with_a_remedy(
    make: Callable[[Path], Path], said: str, run: Path, tmp_path: Path, command: Command
) -> None:
    path = make(tmp_path)
    done = command("predict", run, path, "-o", tmp_path / "out")
    told = done.stdout + done.stderr
    assert done.returncode == 1
    assert said in told
    assert path.name in told
    assert "Remedy: " in told
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_one_of_several_volumes_in_a_file_is_done_when_it_is_chosen(
    run: Path, tmp_path: Path, command: Command
) -> None:
    path = of_four_axes(tmp_path)
    assert command("predict", run, path, "-o", tmp_path / "out", "--component", "1").returncode == 0
    assert read(tmp_path / "out" / "echoes_mask.nii.gz").geometry == read(path, 1).geometry


def test_a_volume_of_the_other_modality_is_done_with_a_warning_that_has_numbers(
    run: Path, raw: Path, tmp_path: Path, command: Command
) -> None:
    done = command("predict", run, raw / "source-0.nii.gz", "-o", tmp_path / "out")
    assert done.returncode == 0
    assert "warning: source-0.nii.gz: 99.9 % of its values lie below" in done.stdout
    assert "looks more like the source modality" in done.stdout
    assert (tmp_path / "out" / "source-0_mask.nii.gz").is_file()


def test_a_volume_of_another_spacing_is_segmented_in_its_own_grid(
    run: Path, raw: Path, tmp_path: Path, command: Command
) -> None:
    old = read(raw / "target-0.nii.gz")
    fine = Volume(old.voxels.repeat(2, axis=1).repeat(2, axis=2), Geometry((64, 64, 6), (0.5, 0.5, 3.0)))
    write(fine, tmp_path / "fine.mha")
    for path in (raw / "target-0.nii.gz", tmp_path / "fine.mha"):
        assert command("predict", run, path, "-o", tmp_path / "out", "--suffix", ".mha").returncode == 0
    coarse, found = (read(tmp_path / "out" / f"{name}_mask.mha") for name in ("target-0", "fine"))
    assert found.geometry == fine.geometry
    differ = found.voxels[:, ::2, ::2] != coarse.voxels
    assert differ.mean() < 0.05


def test_two_volumes_of_one_name_and_no_volume_are_refused(raw: Path, scans: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 volumes called 'target-0'"):
        tasks([raw / "target-0.nii.gz", scans / "target-0.nii.gz"], tmp_path)
    with pytest.raises(InputError, match="volumes: found none"):
        tasks([], tmp_path)


# --- translation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["source", "target"])
def test_a_volume_is_shown_in_the_other_modality_in_its_own_grid_the_same_every_time(
    of: str, run: Path, raw: Path, store: Store, tmp_path: Path, command: Command
) -> None:
    for out in ("one", "two"):
        done = command("translate", run, raw / f"{of}-0.nii.gz", "-o", tmp_path / out, "--of", of)
        assert done.returncode == 0, done.stderr
    one, two = (read(tmp_path / out / f"{of}-0_translated.nii.gz") for out in ("one", "two"))
    assert one.geometry == read(raw / f"{of}-0.nii.gz").geometry
    assert np.array_equal(one.voxels, two.voxels)
    low, high = store.limits("target" if of == "source" else "source")
    assert one.voxels.min() >= low - 1e-4
    assert one.voxels.max() <= high + 1e-4
    assert one.voxels.std() > 0


def test_a_model_cannot_translate_and_a_protocol_chooses_no_checkpoint(
    run: Path, raw: Path, tmp_path: Path, command: Command
) -> None:
    assert command("export", run, tmp_path / "model").returncode == 0
    words = ("-o", tmp_path / "out", "--of", "source")
    done = command("translate", tmp_path / "model", raw / "source-0.nii.gz", *words)
    assert done.returncode == 2
    assert "G and U translate" in done.stderr
    done = command("translate", run, raw / "source-0.nii.gz", *words, "--choose", "source")
    assert done.returncode == 2
    assert "which only checkpoints hold" in done.stderr


def picture(name: str, scan: Volume, mask: Volume) -> None:
    """Leave five slices of a scan, and below them with its mask, in the folder of pictures, if there is to be one."""
    if folder := os.environ.get("EQUIPOISE_SCREENSHOTS"):
        planes = np.linspace(0.15, 0.85, 5) * len(scan.voxels)
        grey = _grey(np.clip(scan.voxels / np.percentile(scan.voxels, 99.7), 0, 1) * 2 - 1)
        rows = [[grey[int(z)] for z in planes], [_overlay(grey[int(z)], mask.voxels[int(z)]) for z in planes]]
        Image.fromarray(np.vstack([np.hstack(row) for row in rows])).save(Path(folder) / f"predict-{name}.png")


# --- real scans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["topcow_tof.mha", "chris_tof.nii.gz", "romeo_swi.nii.gz"])
def test_real_scans_run_through_end_to_end(name: str, real: Path, run: Path, tmp_path: Path, command: Command) -> None:
    done = command("predict", run, real / name, "-o", tmp_path / "out", "--probability")
    assert done.returncode == 0, done.stderr
    stem = name.partition(".")[0]
    scan, mask = read(real / name), read(tmp_path / "out" / f"{stem}_mask.nii.gz")
    assert not mask.geometry.differences(scan.geometry, 1e-4)
    assert not name.endswith(".nii.gz") or mask.geometry == scan.geometry
    assert "its slices are" in done.stdout
    picture(stem, scan, mask)


def test_what_a_network_learned_of_a_real_angiography_lies_on_its_vessels(real: Path, tmp_path: Path) -> None:
    """Taught by parts of an oblique scan, on coarser pixels. Its mask is a threshold: this tells of geometry alone."""
    scan, mask = read(real / "topcow_tof.mha"), read(real / "topcow_tof_vessels.nii.gz")
    for part, kind in ((scan, ""), (mask, "_label")):
        for number, (first, end) in enumerate(((0, 12), (12, 23), (23, 34))):
            size, at = (*part.geometry.size[:2], end - first), part.geometry.point_mm((0, 0, first))
            grid = Geometry(size, part.geometry.spacing_mm, at, part.geometry.direction)
            write(Volume(part.voxels[first:end], grid), tmp_path / "raw" / f"{number}{kind}.nii.gz")
    inputs = [one for domain in DOMAINS for one in inputs_from_folder(tmp_path / "raw", domain)]
    store = ingest(inputs, tmp_path / "c.zarr", Preprocessing(size=72, spacing_mm=0.594))
    config = VESSEL.having({"net.width": 0.25, "batch": 4, "steps": 100, "evaluations": 1, "optim.lr": 1e-3})
    cohort = Cohort(store, config, CPU)
    *_, look = source_only(config, cohort)
    net = Inference(config.net).eval()
    weights.fill(net, weights.of(look.state(), {}), tmp_path)
    found, _ = predict(Model(net, cohort.intake, config, {}), scan)
    reached = agreement(found.label, mask, 1, "scan")
    assert reached.dice > 0.7
    assert reached.assd_mm < 2 * 0.594
    picture("vessels", scan, found.label)


def test_a_run_without_an_account_of_preprocessing_says_what_to_do(
    run: Path, raw: Path, tmp_path: Path, command: Command
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "intake.json").write_text(json.dumps({"cohort": 1}))
    done = command("predict", copy, raw / "target-0.nii.gz", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "name its store with --store" in done.stderr
