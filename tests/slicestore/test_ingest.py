"""From raw files to a store: what is refused, what is kept, and what a crash leaves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.ingest import ingest
from slicestore.inputs import Input, check, inputs_from_folder, inputs_from_table
from slicestore.preprocess import restore
from slicestore.settings import Preprocessing
from slicestore.spread import processes
from slicestore.store import Store
from slicestore.verify import verify
from slicestore.volume import Volume, read, write

Cohort = Callable[..., list[Input]]
SmallDisk = Callable[[Path, str], AbstractContextManager[Path]]


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a store and the hash of its bytes."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def steps(inputs: list[Input], store: Path, config: Preprocessing, **how: int) -> list[str]:
    """Ingest, and say what happened to each volume."""
    said: list[str] = []
    ingest(inputs, store, config, progress=lambda done, total, what: said.append(f"{done}/{total} {what}"), **how)
    return said


# --- what comes of it -------------------------------------------------------------------------------------------------


def test_a_cohort_becomes_a_store(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    store = ingest(make_cohort(tmp_path / "raw", sources=3, targets=2), tmp_path / "c.zarr", small)
    assert [(e.domain, e.subject) for e in store.entries] == [
        ("source", "s000"),
        ("source", "s001"),
        ("source", "s002"),
        ("target", "t000"),
        ("target", "t001"),
    ]
    assert sorted(e.split for e in store.select("source")) == ["test", "train", "val"]
    assert sorted(e.split for e in store.select("target")) == ["train", "val"]
    assert (store.classes, store.size, store.seed, store.preprocessing) == (2, 16, 0, small)
    assert all(e.labelled == (e.domain == "source") for e in store.entries)


def test_one_volume_in_each_domain_can_be_trained_on(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    store = ingest(make_cohort(tmp_path / "raw", sources=1, targets=1), tmp_path / "c.zarr", small)
    assert [e.split for e in store.entries] == ["train", "train"]
    assert store.select("source", "val") == store.select("target", "test") == []


def test_ingesting_again_does_nothing(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs, path = make_cohort(tmp_path / "raw"), tmp_path / "c.zarr"
    assert steps(inputs, path, small) == ["1/4 s000 made", "2/4 s001 made", "3/4 t000 made", "4/4 t001 made"]
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in path.rglob("*")}
    assert steps(inputs[::-1], path, small) == ["1/4 s000 kept", "2/4 s001 kept", "3/4 t000 kept", "4/4 t001 kept"]
    assert before == {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in path.rglob("*")}


def test_only_what_changed_is_made_anew(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs, path = make_cohort(tmp_path / "raw"), tmp_path / "c.zarr"
    first = ingest(inputs, path, small)
    label = read(inputs[1].label or "")
    label.voxels[1, 6, 6] = 1 - label.voxels[1, 6, 6]
    write(label, inputs[1].label or "")
    assert steps(inputs, path, small) == ["1/4 s000 kept", "2/4 t000 kept", "3/4 t001 kept", "4/4 s001 made"]
    second = Store.open(path)
    assert second.fingerprint != first.fingerprint
    assert len(list((path / "source").glob("s001-*"))) == 1  # the old version is gone
    assert hashes(path) == hashes(ingest(inputs, tmp_path / "fresh.zarr", small).path)


def test_other_settings_make_every_volume_anew_and_another_seed_makes_none(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs, path = make_cohort(tmp_path / "raw", sources=4), tmp_path / "c.zarr"
    first = ingest(inputs, path, small)
    assert all(step.endswith("kept") for step in steps(inputs, path, small, seed=1))
    assert Store.open(path).fingerprint != first.fingerprint  # other splits
    assert all(step.endswith("made") for step in steps(inputs, path, replace(small, spacing_mm=0.8), seed=1))


def test_an_added_subject_leaves_the_pseudonyms_of_the_others(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs, path = make_cohort(tmp_path / "raw", sources=3, targets=1), tmp_path / "c.zarr"
    ingest(inputs[1:], path, small)
    assert steps(inputs, path, small) == ["1/4 s000 kept", "2/4 s001 kept", "3/4 t000 kept", "4/4 s002 made"]


def test_a_subject_that_left_leaves_no_trace(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs, path = make_cohort(tmp_path / "raw", sources=3), tmp_path / "c.zarr"
    ingest(inputs, path, small)
    ingest(inputs[:2] + inputs[3:], path, small)
    assert [e.subject for e in Store.open(path).select("source")] == ["s000", "s001"]
    assert not list(path.rglob("*s002*"))
    assert "patient-source-2" not in (tmp_path / "c.zarr.key.json").read_text()


def test_the_number_of_one_who_left_is_given_to_nobody_else(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs, path = make_cohort(tmp_path / "raw", sources=3), tmp_path / "c.zarr"
    ingest(inputs[:2] + inputs[3:], path, small)
    ingest(inputs[:1] + inputs[3:], path, small)
    ingest(inputs[:1] + inputs[2:], path, small)
    assert [e.subject for e in Store.open(path).select("source")] == ["s000", "s002"]


def test_an_update_that_breaks_off_leaves_the_names_of_the_old_manifest(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs, path = make_cohort(tmp_path / "raw", sources=3), tmp_path / "c.zarr"
    ingest(inputs[:2] + inputs[3:], path, small)

    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(inputs[:1] + inputs[2:], path, small, progress=stop)
    key = json.loads((tmp_path / "c.zarr.key.json").read_text())
    assert [key[e.subject]["subject"] for e in Store.open(path).select("source")] == [
        "patient-source-0",
        "patient-source-1",
    ]


def test_a_key_file_inside_the_store_is_refused(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    with pytest.raises(InputError, match="names never lie with slices"):
        ingest(make_cohort(tmp_path / "raw"), tmp_path / "c.zarr", small, key_file=tmp_path / "c.zarr" / "key.json")
    assert not (tmp_path / "c.zarr").exists()


def test_a_target_label_chooses_no_slices(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    config = replace(small, slices="foreground")
    store = ingest(make_cohort(tmp_path / "raw", target_labels=True), tmp_path / "c.zarr", config)
    assert {tuple(e.record["slices"]) for e in store.select("source")} == {(1, 2, 3)}
    bare = ingest(make_cohort(tmp_path / "bare"), tmp_path / "b.zarr", config)
    assert [e.record["slices"] for e in store.select("target")] == [e.record["slices"] for e in bare.select("target")]


def test_a_class_that_no_source_label_shows_is_refused(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs = make_cohort(tmp_path / "raw", sources=1)
    label = inputs[0].label
    assert label is not None
    raw = read(label)
    write(Volume(raw.voxels * np.uint8(4), raw.geometry), label)
    with pytest.raises(InputError, match=r"class 4, but no voxel of class 1, 2, 3.*renumber"):
        ingest(inputs, tmp_path / "c.zarr", small)


def test_a_store_updated_while_it_was_read_says_so(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs, path = make_cohort(tmp_path / "raw"), tmp_path / "c.zarr"
    old = ingest(inputs, path, small)
    ingest(inputs, path, replace(small, pad="zero"))
    with pytest.raises(InputError, match="updated while it was read"):
        old.read(old.entries[0], "image")


def test_the_store_holds_no_name_and_the_key_beside_it_is_private(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs, path = make_cohort(tmp_path / "raw"), tmp_path / "c.zarr"
    ingest(inputs, path, small)
    for file in path.rglob("*"):
        assert "patient-" not in str(file.relative_to(path))
        assert not file.is_file() or b"patient-" not in file.read_bytes()
    key = tmp_path / "c.zarr.key.json"
    assert key.stat().st_mode & 0o777 == 0o600
    assert json.loads(key.read_text())["t001"] == {
        "domain": "target",
        "subject": "patient-target-1",
        "image": str(inputs[3].image),
        "label": None,
        "brain": None,
    }


def test_a_patient_named_alike_in_both_domains_is_in_the_same_split_of_both(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs = make_cohort(tmp_path / "raw", sources=4, targets=4)
    paired = [replace(item, subject=item.subject.rpartition("-")[2]) for item in inputs]
    store = ingest(paired, tmp_path / "c.zarr", small)
    assert [e.split for e in store.select("source")] == [e.split for e in store.select("target")]


# --- crashes ----------------------------------------------------------------------------------------------------------


def test_a_volume_that_cannot_be_read_leaves_nothing_of_any_volume(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs, path = make_cohort(tmp_path / "raw"), tmp_path / "c.zarr"
    good = read(inputs[2].image)
    broken = good.voxels.astype(np.float32)
    broken[0, 0, 0] = np.nan
    write(Volume(broken, good.geometry), inputs[2].image)
    with pytest.raises(InputError, match=r"patient-target-0\.nii\.gz: found 1 NaN"):
        ingest(inputs, path, small)
    assert not path.exists()


def test_a_volume_that_cannot_be_prepared_leaves_no_store_and_nothing_of_itself(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs, path = make_cohort(tmp_path / "raw"), tmp_path / "c.zarr"
    good = read(inputs[2].image)
    write(Volume(np.ones_like(good.voxels), good.geometry), inputs[2].image)  # constant: it has no contrast to scale
    with pytest.raises(InputError, match=r"patient-target-0\.nii\.gz"):
        ingest(inputs, path, small)
    with pytest.raises(InputError, match=r"no manifest\.json"):
        Store.open(path)
    assert not list((path / "target").glob("t*"))
    write(good, inputs[2].image)
    assert steps(inputs, path, small) == ["1/4 s000 kept", "2/4 s001 kept", "3/4 t000 made", "4/4 t001 made"]
    assert hashes(path) == hashes(ingest(inputs, tmp_path / "fresh.zarr", small).path)


@pytest.mark.parametrize("damage", ["flip", "delete", "truncate", "record"])
def test_a_damaged_volume_is_mended_by_ingesting_again(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing, damage: str
) -> None:
    inputs, path = make_cohort(tmp_path / "raw"), tmp_path / "c.zarr"
    ingest(inputs, path, small)
    whole = hashes(path)
    shard = next(path.glob("target/t000-*/image/c/0/0/0"))
    data = shard.read_bytes()
    if damage == "delete":
        shard.unlink()
    elif damage == "record":
        next((path / "commits").glob("target-t000*")).write_text("{")
    else:
        shard.write_bytes(data[:-9] if damage == "truncate" else data[:99] + bytes([data[99] ^ 1]) + data[100:])
    assert steps(inputs, path, small) == ["1/4 s000 kept", "2/4 s001 kept", "3/4 t001 kept", "4/4 t000 made"]
    assert hashes(path) == whole


AT_WORK = """
import sys
from pathlib import Path
from slicestore.ingest import ingest
from slicestore.inputs import inputs_from_table
from slicestore.settings import Preprocessing
def wait(done, total, what):
    print("at work", flush=True)
    sys.stdin.readline()
ingest(inputs_from_table(Path(sys.argv[1])), sys.argv[2], Preprocessing(size=16, spacing_mm=1.0), progress=wait)
"""


def test_two_ingests_do_not_write_one_store(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs, path = make_cohort(tmp_path / "raw"), tmp_path / "c.zarr"
    lines = [f"{item.subject},{item.domain},{item.image},{item.label or ''}" for item in inputs]
    (tmp_path / "t.csv").write_text("\n".join(["subject,domain,image,label", *lines]))
    first = subprocess.Popen(
        [sys.executable, "-c", AT_WORK, tmp_path / "t.csv", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"at work\n"
        before = hashes(path)
        with pytest.raises(InputError, match=rf"another ingest at work on it \(process {first.pid}\).*Remedy: wait"):
            ingest(inputs, path, small)
        assert hashes(path) == before
        first.communicate(b"\n" * len(inputs))
    assert first.returncode == 0
    assert all(step.endswith("kept") for step in steps(inputs, path, small))


def test_a_full_disk_is_told_and_the_ingest_resumes_when_there_is_room(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing, small_disk: SmallDisk
) -> None:
    inputs = make_cohort(tmp_path / "raw")
    whole = hashes(ingest(inputs, tmp_path / "whole.zarr", small).path)
    with small_disk(tmp_path / "disk", "120k") as disk:
        path = disk / "c.zarr"
        with pytest.raises(
            InputError, match=r"c\.zarr: found no room for .* MB free: No space left on device\)"
        ) as told:
            ingest(inputs, path, small)
        assert "make room and run the same command again: what is finished is kept" in told.value.remedy
        report = verify(path)
        assert report.intact
        assert not report.finished
        assert 1 <= report.volumes < 4
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        kept = [step for step in steps(inputs, path, small) if step.endswith("kept")]
        assert len(kept) == report.volumes
        assert hashes(path) == whole


def test_processes_make_the_same_store(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs, said = make_cohort(tmp_path / "raw"), list[str]()
    path = tmp_path / "c.zarr"
    ingest(inputs, path, small, spread=processes(2), progress=lambda done, total, what: said.append(f"{done} {what}"))
    assert sorted(step.split()[1] for step in said) == ["s000", "s001", "t000", "t001"]
    assert [step.split()[0] for step in said] == ["1", "2", "3", "4"]
    assert hashes(path) == hashes(ingest(inputs, tmp_path / "alone.zarr", small).path)


def test_an_error_in_another_process_names_the_file(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs = make_cohort(tmp_path / "raw")
    good = read(inputs[2].image)
    write(Volume(np.ones_like(good.voxels), good.geometry), inputs[2].image)
    with pytest.raises(InputError, match=r"patient-target-0\.nii\.gz: found the one value"):
        ingest(inputs, tmp_path / "c.zarr", small, spread=processes(2))


def test_the_key_file_may_lie_elsewhere(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs = make_cohort(tmp_path / "raw")
    ingest(inputs, tmp_path / "out" / "c.zarr", small, key_file=tmp_path / "safe" / "names.json")
    assert json.loads((tmp_path / "safe" / "names.json").read_text())["s000"]["subject"] == "patient-source-0"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["c.zarr", "c.zarr.lock"]


def test_a_brain_mask_counts_where_the_settings_use_it_and_not_elsewhere(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    bare = make_cohort(tmp_path / "raw")
    masked = [replace(item, brain=tmp_path / "raw" / f"{item.subject}_brain.nii.gz") for item in bare]
    for item in masked:
        grid = read(item.image).geometry
        mask = np.zeros(grid.size[::-1], dtype=np.uint8)
        mask[:, 4:20, 3:18] = 1
        write(Volume(mask, grid), item.brain or "")
    path, other = tmp_path / "c.zarr", replace(small, strip=True)
    ingest(bare, path, small)
    assert all(step.endswith("kept") for step in steps(masked, path, small))
    assert json.loads((tmp_path / "c.zarr.key.json").read_text())["s000"]["brain"] == str(masked[0].brain)
    assert all(step.endswith("made") for step in steps(masked, path, other))
    mask[1, 5, 5] = 0
    write(Volume(mask, grid), masked[3].brain or "")
    assert steps(masked, path, other) == ["1/4 s000 kept", "2/4 s001 kept", "3/4 t000 kept", "4/4 t001 made"]


def test_two_components_of_one_file_are_two_volumes(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs = make_cohort(tmp_path / "raw")
    rng = np.random.default_rng(0)
    both = sitk.JoinSeries([sitk.GetImageFromArray(rng.normal(100, 10, (5, 24, 20)).astype(np.float32)) for _ in "ab"])
    sitk.WriteImage(both, str(tmp_path / "echoes.nii.gz"))
    echoes = [Input("target", f"echo-{n}", tmp_path / "echoes.nii.gz", component=n) for n in (0, 1)]
    store = ingest([*inputs[:2], *echoes], tmp_path / "c.zarr", small)
    key = json.loads((tmp_path / "c.zarr.key.json").read_text())
    assert [key[name]["component"] for name in ("t000", "t001")] == ["0", "1"]
    first, second = (store.read(entry, "image") for entry in store.select("target"))
    assert not np.array_equal(first, second)
    with pytest.raises(InputError, match="the same bytes as"):
        ingest([*inputs[:2], *echoes, replace(echoes[0], subject="twin")], tmp_path / "c.zarr", small)


def test_an_oblique_volume_is_taken_and_told(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs = make_cohort(tmp_path / "raw")
    volume = read(inputs[2].image)
    c, s = np.cos(np.radians(17)), np.sin(np.radians(17))
    turned = replace(volume.geometry, direction=(1.0, 0.0, 0.0, 0.0, c, -s, 0.0, s, c))
    write(Volume(volume.voxels, turned), inputs[2].image)
    said = steps(inputs, tmp_path / "c.zarr", small)
    assert said[2] == "3/4 t000 made; its axes are 17 degrees off the patient's"
    assert said[3] == "4/4 t001 made"


def test_an_image_that_may_not_be_read_is_named(
    make_cohort: Cohort, small: Preprocessing, as_nobody: Callable[[], AbstractContextManager[Path]]
) -> None:
    with as_nobody() as folder:
        inputs = make_cohort(folder / "raw")
        inputs[1].image.chmod(0)
        with pytest.raises(InputError, match=r"patient-source-1\.nii\.gz: found .*[Pp]ermission"):
            ingest(inputs, folder / "c.zarr", small)
        assert not (folder / "c.zarr").exists()


# --- refusals: nothing is written -------------------------------------------------------------------------------------


def refused(inputs: list[Input], tmp_path: Path, config: Preprocessing, match: str) -> None:
    with pytest.raises(InputError, match=match):
        ingest(inputs, tmp_path / "out" / "c.zarr", config)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs = make_cohort(tmp_path / "raw")
    refused([*inputs, Input("target", "x", tmp_path / "gone.nii")], tmp_path, small, r"gone\.nii: found no such file")
    refused([*inputs, Input("source", "x", inputs[0].image, tmp_path / "l.nii")], tmp_path, small, r"l\.nii: found no")


def test_a_2d_and_a_4d_file_are_named(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs = make_cohort(tmp_path / "raw")
    for axes in ((8, 8), (3, 4, 8, 8)):
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros(axes, np.int16), isVector=False), str(tmp_path / "odd.nii"))
        refused(
            [*inputs, Input("target", "x", tmp_path / "odd.nii")], tmp_path, small, rf"odd\.nii: .*{len(axes)}D image"
        )


def test_a_label_on_another_grid_is_named(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs = make_cohort(tmp_path / "raw")
    label = inputs[1].label
    assert label is not None
    write(Volume(np.ones((5, 24, 20), np.uint8), Geometry((20, 24, 5), (0.5, 0.5, 2.1), (1.0, 2.0, 4.0))), label)
    refused(inputs, tmp_path, small, r"patient-source-1_label\.nii\.gz: found spacing .* resample the label")


def test_a_cohort_needs_both_domains_and_labels_in_the_source(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs = make_cohort(tmp_path / "raw")
    refused(inputs[:2], tmp_path, small, "no target volume among 2")
    refused(inputs[2:], tmp_path, small, "no source volume among 2")
    refused([], tmp_path, small, "no source volume among 0")
    bare = [replace(item, label=None) for item in inputs]
    refused(bare, tmp_path, small, "no label for 2 of 2 source volumes")
    refused([inputs[0], *bare[1:]], tmp_path, small, r"patient-source-1\.nii\.gz: found no label for 1 of 2")


def test_unknown_domains_and_repeated_subjects_are_refused(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs = make_cohort(tmp_path / "raw")
    refused([*inputs, replace(inputs[0], domain="tof")], tmp_path, small, "domain 'tof'")  # type: ignore[arg-type]
    refused([*inputs, inputs[0]], tmp_path, small, "a second source volume of subject 'patient-source-0'")
    refused([*inputs, replace(inputs[0], subject="twin")], tmp_path, small, "the same bytes as .*patient-source-0")


def test_checking_alone_writes_nothing_and_accepts_what_is_right(tmp_path: Path, make_cohort: Cohort) -> None:
    inputs = make_cohort(tmp_path / "raw")
    before = hashes(tmp_path)
    check(inputs)
    assert hashes(tmp_path) == before


def test_source_labels_of_background_alone_are_refused(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs = make_cohort(tmp_path / "raw", sources=1)
    label = read(inputs[0].label or "")
    write(Volume(np.zeros_like(label.voxels), label.geometry), inputs[0].label or "")
    with pytest.raises(InputError, match=r"_label\.nii\.gz: found nothing but background in any source label"):
        ingest(inputs, tmp_path / "c.zarr", small)
    with pytest.raises(InputError, match=r"no manifest\.json"):
        Store.open(tmp_path / "c.zarr")


def test_a_target_label_with_a_class_that_the_source_lacks_is_refused(
    tmp_path: Path, make_cohort: Cohort, small: Preprocessing
) -> None:
    inputs = make_cohort(tmp_path / "raw", target_labels=True)
    label = read(inputs[3].label or "")
    write(Volume(label.voxels * 2, label.geometry), inputs[3].label or "")
    with pytest.raises(InputError, match=r"target-1_label\.nii\.gz: found class 2; .* 0 to 1"):
        ingest(inputs, tmp_path / "c.zarr", small)


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs = make_cohort(tmp_path / "raw")
    before = hashes(tmp_path / "raw")
    with pytest.raises(InputError, match="a folder that is no store"):
        ingest(inputs, tmp_path / "raw", small)
    assert hashes(tmp_path / "raw") == before
    (tmp_path / "empty").mkdir()
    assert ingest(inputs, tmp_path / "empty", small).entries


def test_a_store_of_another_schema_is_left_alone(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs, path = make_cohort(tmp_path / "raw"), tmp_path / "c.zarr"
    ingest(inputs, path, small)
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["slicestore"] = 99
    (path / "zarr.json").write_text(json.dumps(root))
    before = hashes(path)
    with pytest.raises(InputError, match="schema 99"):
        ingest(inputs, path, small)
    assert hashes(path) == before


def test_a_damaged_key_file_is_not_overwritten(tmp_path: Path, make_cohort: Cohort, small: Preprocessing) -> None:
    inputs, path = make_cohort(tmp_path / "raw"), tmp_path / "c.zarr"
    ingest(inputs, path, small)
    (tmp_path / "c.zarr.key.json").write_text("{")
    with pytest.raises(InputError, match="a damaged key file"):
        ingest(inputs, path, small)
    assert (tmp_path / "c.zarr.key.json").read_text() == "{"


# --- tables -----------------------------------------------------------------------------------------------------------

HEAD = "subject,domain,image,label,brain"


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_a_table_names_subjects_domains_images_and_one_kind_of_label(tmp_path: Path, name: str, delimiter: str) -> None:
    text = f"\ufeff{HEAD}\r\np1, source ,a.nii,v.nii,b.nii\r\n\r\np1,Target,/abs/c.nii,,\r\n".replace(",", delimiter)
    (tmp_path / name).write_text(text)
    assert inputs_from_table(tmp_path / name) == [
        Input("source", "p1", tmp_path / "a.nii", tmp_path / "v.nii"),
        Input("target", "p1", Path("/abs/c.nii"), None),
    ]
    assert inputs_from_table(tmp_path / name, "brain")[0].label == tmp_path / "b.nii"


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (["subject,domain,label"], r"columns subject, domain, label; .*image missing"),
        ([HEAD], "no row"),
        ([HEAD, "a,source,a.nii,l.nii,", "b,swi,b.nii,,"], "line 3: found domain 'swi'"),
        (
            [HEAD, "a,source,a.nii,l.nii,", "a,source,b.nii,,"],
            "line 3: found subject 'a' a second time in domain source",
        ),
        ([HEAD, "a,source"], "line 2: found an empty image"),
        ([HEAD, ",source,a.nii,,"], "line 2: found an empty subject"),
    ],
)
def test_a_table_that_breaks_a_rule_is_refused_with_the_line(tmp_path: Path, rows: list[str], match: str) -> None:
    (tmp_path / "t.csv").write_text("\n".join(rows))
    with pytest.raises(InputError, match=match):
        inputs_from_table(tmp_path / "t.csv")


def test_a_table_without_the_wanted_kind_of_label_says_which_columns_it_has(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"{HEAD}\na,source,a.nii,,")
    with pytest.raises(InputError, match=r"columns subject, domain, image, label, brain; .*vessel missing"):
        inputs_from_table(tmp_path / "t.csv", "vessel")


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(InputError, match="no readable text"):
        inputs_from_table(tmp_path / "t.csv")
    with pytest.raises(InputError, match="no readable text"):
        inputs_from_table(tmp_path / "gone.csv")


# --- folders ----------------------------------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_a_folder_pairs_images_with_labels_by_the_ending(tmp_path: Path) -> None:
    folder = touch(tmp_path / "f", "b_1.nii", "a.nii.gz", "a_seg.nii.gz", "b_1_mask.mha", "notes.txt", ".a.partial.nii")
    assert inputs_from_folder(folder, "source") == [
        Input("source", "a", folder / "a.nii.gz", folder / "a_seg.nii.gz"),
        Input("source", "b_1", folder / "b_1.nii", folder / "b_1_mask.mha"),
    ]


def test_the_wanted_mask_goes_before_the_usual_endings(tmp_path: Path) -> None:
    folder = touch(tmp_path / "f", "a.nii", "a_label.nii", "a_big_vessels.nii", "b.nii", "b_label.nii")
    assert inputs_from_folder(folder, "source", mask="big_vessels") == [
        Input("source", "a", folder / "a.nii", folder / "a_big_vessels.nii"),
        Input("source", "b", folder / "b.nii"),
    ]


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ((), "no image"),
        (("readme.md",), "no image"),
        (("a.nii", "a.mha"), r"a\.nii: found also a\.mha"),
        (("a.nii", "b_seg.nii"), r"b_seg\.nii: found no image 'b'"),
        (("a.nii", "a_seg.nii", "a_mask.nii"), r"the labels a_mask\.nii, a_seg\.nii"),
    ],
)
def test_a_folder_that_leaves_a_doubt_is_refused(tmp_path: Path, names: tuple[str, ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        inputs_from_folder(touch(tmp_path / "f", *names), "source")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone: found no such folder"):
        inputs_from_folder(tmp_path / "gone", "target")


# --- real volumes -----------------------------------------------------------------------------------------------------


def test_one_real_tof_and_one_real_swi_make_a_store(tmp_path: Path, real: Path) -> None:
    for name, to in (("topcow_tof.mha", "tof"), ("topcow_tof_vessels.nii.gz", "tof"), ("romeo_swi.nii.gz", "swi")):
        (tmp_path / to).mkdir(exist_ok=True)
        shutil.copy(real / name, tmp_path / to / name)
    inputs = [
        *inputs_from_folder(tmp_path / "tof", "source", mask="vessels"),
        *inputs_from_folder(tmp_path / "swi", "target"),
    ]
    store = ingest(inputs, tmp_path / "real.zarr", Preprocessing(size=128, spacing_mm=0.45))
    (source,), (target,) = store.select("source"), store.select("target")
    assert store.read(source, "image").shape == (34, 128, 128)
    assert store.read(target, "image").shape == (41, 128, 128)
    assert (source.labelled, target.labelled) == (True, False)
    assert verify(store.path).intact
    raw = read(real / "topcow_tof_vessels.nii.gz")
    back = restore(store.read(source, "label"), store.record(source))
    assert not back.geometry.differences(raw.geometry)
    assert 2 * np.count_nonzero(back.voxels & raw.voxels) > 0.92 * (back.voxels.sum() + raw.voxels.sum())
