"""The store: what is staged, what it refuses, and what it never hands out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from slicestore.errors import InputError
from slicestore.ingest import ingest
from slicestore.preprocess import Preprocessing, prepare, restore
from slicestore.store import SCHEMA, Entry, Staged, Store, normalise
from slicestore.volume import read


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, make_cohort, small: Preprocessing) -> Store:  # type: ignore[no-untyped-def]
    """Three labelled subjects in each domain: one to train, one to validate, one to test."""
    folder = tmp_path_factory.mktemp("store")
    inputs = make_cohort(folder / "raw", sources=3, targets=3, target_labels=True)
    return ingest(inputs, folder / "cohort.zarr", small)


@pytest.fixture
def store(original: Store, tmp_path: Path) -> Store:
    """A copy to damage."""
    shutil.copytree(original.path, tmp_path / "cohort.zarr")
    return Store.open(tmp_path / "cohort.zarr")


def shard(store: Store, entry: Entry, name: str = "image") -> Path:
    return store.path / entry.group / name / "c" / "0" / "0" / "0"


def chunks(file: Path, count: int) -> np.ndarray:
    """Offset and length of every chunk, from the index at the shard's end."""
    return np.frombuffer(file.read_bytes()[-16 * count - 4 : -4], dtype="<u8").reshape(count, 2)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def parts() -> Iterator[tuple[str, str]]:
    yield from ((domain, split) for domain in ("source", "target") for split in ("train", "val", "test"))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_what_is_staged_is_what_was_prepared(original: Store, small: Preprocessing) -> None:
    staged, raw = original.stage("source", "train"), original.path.parent / "raw"
    key = json.loads((original.path.parent / "cohort.zarr.key.json").read_text())
    subject = key[staged.entries[0].subject]["subject"]
    made = prepare(read(raw / f"{subject}.nii.gz"), read(raw / f"{subject}_label.nii.gz"), small)
    assert staged.image.dtype == np.float16
    assert np.array_equal(staged.image, made.image)
    assert staged.label is not None
    assert made.label is not None
    assert np.array_equal(staged.label, made.label)
    assert staged.subject.tolist() == [0] * 5
    assert staged.position.tolist() == [0, 1, 2, 3, 4]
    fraction = original.read(staged.entries[0], "fraction")
    assert np.array_equal(fraction, made.fraction)


def test_staged_subjects_follow_each_other(original: Store) -> None:
    together = Store(
        original.path,
        tuple(replace(entry, split="train") for entry in original.entries),
        original.preprocessing,
        original.classes,
        original.seed,
        original.fingerprint,
    )
    staged = together.stage("source", "train")
    assert staged.subject.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert staged.position.tolist() == [0, 1, 2, 3, 4] * 3
    assert [entry.subject for entry in staged.entries] == ["s000", "s001", "s002"]
    for index, entry in enumerate(staged.entries):
        assert np.array_equal(staged.image[staged.subject == index], original.read(entry, "image"))


def test_labels_of_the_target_domain_judge_and_never_teach(original: Store) -> None:
    assert original.stage("target", "train").label is None
    assert all(entry.labelled and entry.evaluation_only for entry in original.select("target"))
    for split in ("val", "test"):
        label = original.stage("target", split).label  # type: ignore[arg-type]
        assert label is not None
        assert set(np.unique(label)) == {0, 1}
    assert not any(entry.evaluation_only for entry in original.select("source"))


def test_a_split_without_subjects_is_empty(original: Store) -> None:
    alone = Store(
        original.path,
        tuple(e for e in original.entries if e.split == "train"),
        original.preprocessing,
        original.classes,
        original.seed,
        original.fingerprint,
    )
    staged = alone.stage("source", "val")
    assert staged.image.shape == (0, 16, 16)
    assert staged.label is None
    assert staged.limits == alone.limits("source")


def test_limits_come_from_training_subjects_alone(original: Store) -> None:
    shifted = tuple(
        replace(entry, minimum=low, maximum=high)
        for entry in original.entries
        for low, high in [
            {("source", "train"): (-2.0, 5.0), ("target", "train"): (-3.0, 4.0)}.get(
                (entry.domain, entry.split), (-99.0, 99.0)
            )
        ]
    )
    store = Store(original.path, shifted, original.preprocessing, 2, 0, "")
    assert store.limits("source") == (-2.0, 5.0)
    assert store.limits("target") == (-3.0, 4.0)
    assert store.limits("source", pooled=True) == store.limits("target", pooled=True) == (-3.0, 5.0)
    assert store.stage("source", "val").limits == (-2.0, 5.0)
    assert store.stage("target", "test", pooled=True).limits == (-3.0, 5.0)


def test_training_values_fill_the_range_and_others_are_not_clipped(original: Store) -> None:
    image = np.array([-1.0, 1.0, 3.0, 5.0], dtype=np.float16)
    assert normalise(image, (-1.0, 3.0)).tolist() == [-1, 0, 1, 2]
    assert normalise(image, (-1.0, 3.0)).dtype == np.float32
    for domain in ("source", "target"):
        staged = original.stage(domain, "train")  # type: ignore[arg-type]
        values = normalise(staged.image, staged.limits)
        assert values.min() == pytest.approx(-1, abs=1e-6)
        assert values.max() == pytest.approx(1, abs=1e-6)


def test_a_zero_frame_is_zero_after_normalisation(tmp_path: Path, make_cohort) -> None:  # type: ignore[no-untyped-def]
    inputs = make_cohort(tmp_path / "raw", sources=1, targets=1)
    made = {
        pad: ingest(inputs, tmp_path / f"{pad}.zarr", Preprocessing(size=24, spacing_mm=1.0, pad=pad))
        for pad in ("zero", "background")
    }
    for pooled in (False, True):
        zero, air = (made[pad].stage("source", "train", pooled=pooled) for pad in ("zero", "background"))
        values = normalise(zero.image, zero.limits)
        assert np.abs(values[:, :6]).max() < 1e-3  # 12 rows of image in 24
        assert np.abs(values[:, :, :7]).max() < 1e-3  # 10 columns
        assert np.array_equal(zero.image[:, 6:18, 7:17], air.image[:, 6:18, 7:17])
        assert normalise(air.image, air.limits)[:, :6].max() < -0.5


def test_a_prediction_on_staged_slices_finds_its_way_home(original: Store) -> None:
    staged = original.stage("target", "test")
    entry = staged.entries[0]
    assert staged.label is not None
    back = restore(staged.label, original.record(entry))
    key = json.loads((original.path.parent / "cohort.zarr.key.json").read_text())
    raw = read(key[entry.subject]["label"])
    assert not back.geometry.differences(raw.geometry)
    assert np.count_nonzero(back.voxels & raw.voxels) > 0.8 * np.count_nonzero(raw.voxels)


def test_a_store_is_plain_zarr(original: Store) -> None:
    group = zarr.open_group(original.path / original.entries[0].group, mode="r")
    image = group["image"]
    assert isinstance(image, zarr.Array)
    assert (image.chunks, image.shards) == ((1, 16, 16), (5, 16, 16))
    assert image.metadata.dimension_names == ("slice", "y", "x")  # type: ignore[union-attr]
    assert group.attrs["subject"] == "s000"
    assert group.attrs["preprocessing"] == original.preprocessing.fingerprint


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["image", "label"])
def test_a_flipped_bit_is_reported_with_subject_and_slice(store: Store, name: str) -> None:
    entry = store.select("source", "train")[0]
    file = shard(store, entry, name)
    start, length = chunks(file, 5)[3]
    flip(file, int(start + length // 2))
    with pytest.raises(InputError, match=rf"{name} of source subject {entry.subject}: found damaged data \(slice 3\)"):
        store.stage("source", "train")
    assert store.stage("target", "train").image.shape == (5, 16, 16)


def test_every_flipped_bit_is_noticed(store: Store) -> None:
    entry = store.select("source", "train")[0]
    file = shard(store, entry)
    whole = file.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 25):
        flip(file, int(at))
        with pytest.raises(InputError, match=f"subject {entry.subject}"):
            store.read(entry, "image")
        file.write_bytes(whole)


def test_a_flipped_bit_in_the_index_is_reported_with_the_subject(store: Store) -> None:
    entry = store.select("source", "train")[0]
    flip(shard(store, entry), -20)
    with pytest.raises(
        InputError, match=rf"subject {entry.subject}: found damaged data \(the whole shard or its index\)"
    ):
        store.stage("source", "train")


@pytest.mark.parametrize("name", ["image", "label"])
def test_a_chunk_that_was_never_written_is_not_taken_for_data(store: Store, name: str) -> None:
    entry = store.select("source", "train")[0]
    file = shard(store, entry, name)
    index = chunks(file, 5).copy()
    index[2] = 2**64 - 1  # how a shard says that a chunk is missing
    payload = file.read_bytes()[: -16 * 5 - 4]
    file.write_bytes(payload + index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little"))
    with pytest.raises(InputError, match=rf"{name} of source subject {entry.subject}: found no data for slice 2"):
        store.stage("source", "train")


def test_a_deleted_and_a_truncated_shard_are_found_on_opening(store: Store) -> None:
    entry = store.select("target", "val")[0]
    file = shard(store, entry)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(
        InputError, match=rf"subject {entry.subject} with {len(whole) - 1} bytes.*promises {len(whole)}"
    ):
        Store.open(store.path)
    file.unlink()
    with pytest.raises(InputError, match=rf"image/c/0/0/0 of subject {entry.subject} missing.*prepare` again"):
        Store.open(store.path)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_no_store_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, found in (("gone", "nothing there"), ("file", "a file"), ("folder", "a folder that is no store")):
        with pytest.raises(InputError, match=f"{name}: found {found}"):
            Store.open(tmp_path / name)


def test_an_unfinished_store_says_so(store: Store) -> None:
    (store.path / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no manifest\.json.*interrupted"):
        Store.open(store.path)
    (store.path / "manifest.json").write_text('{"schema": 1')
    with pytest.raises(InputError, match="damaged JSON"):
        Store.open(store.path)


def test_a_store_of_another_schema_is_refused_with_both_numbers(store: Store) -> None:
    root = json.loads((store.path / "zarr.json").read_text())
    root["attributes"]["slicestore"] = SCHEMA + 1
    (store.path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(InputError, match=rf"schema {SCHEMA + 1}.*uses schema {SCHEMA}.*new folder"):
        Store.open(store.path)


def test_an_opened_store_is_equal_on_every_machine_with_the_same_content(store: Store, original: Store) -> None:
    assert store.path != original.path
    assert store.fingerprint == original.fingerprint
    assert store.entries == original.entries
    assert [(domain, split, len(store.select(domain, split))) for domain, split in parts()] == [  # type: ignore[arg-type]
        (domain, split, 1) for domain, split in parts()
    ]
    assert isinstance(store.stage("source", "test"), Staged)
