"""The store: what is read from it, what it says of itself, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from slicestore.errors import InputError
from slicestore.ingest import ingest
from slicestore.layout import GRIDS, volume_attributes
from slicestore.preprocess import prepare, restore
from slicestore.settings import LEVELS, Preprocessing
from slicestore.store import SCHEMA, Entry, Store, normalise
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


def test_what_is_read_is_what_was_prepared(original: Store, small: Preprocessing) -> None:
    raw, entry = original.path.parent / "raw", original.select("source", "train")[0]
    key = json.loads((original.path.parent / "cohort.zarr.key.json").read_text())
    subject = key[entry.subject]["subject"]
    made = prepare(read(raw / f"{subject}.nii.gz"), read(raw / f"{subject}_label.nii.gz"), small)
    for name in ("image", "label", "fraction"):
        found = original.read(entry, name)  # type: ignore[arg-type]
        assert found.dtype == getattr(made, name).dtype
        assert np.array_equal(found, getattr(made, name))
    assert original.record(entry) == json.loads(json.dumps(made.record))
    assert (entry.slices, entry.labelled, entry.classes) == (5, True, 2)
    assert (entry.mean, entry.std, entry.minimum) == tuple(made.record[name] for name in ("mean", "std", "minimum"))


def test_it_reads_into_a_place_that_is_given_and_slice_by_slice(original: Store) -> None:
    entry = original.select("target", "train")[0]
    whole, out = original.read(entry, "image"), np.empty((7, 16, 16), dtype=np.float16)
    assert original.read(entry, "image", out[1:6]).base is out
    assert np.array_equal(out[1:6], whole)
    reader = original.reader(entry, "image")
    reader.slices(np.array([4, 0]), out[:2])
    assert np.array_equal(out[:2], whole[[4, 0]])
    reader.slice(2, out[0])
    assert np.array_equal(out[0], whole[2])


def test_zarr_python_reads_the_same(original: Store) -> None:
    root = zarr.open_group(original.path, mode="r")
    for entry in original.entries:
        for name in entry.arrays:
            assert np.array_equal(original.read(entry, name), root[f"{entry.group}/{name}"][:])  # type: ignore[arg-type, index]


def test_a_volume_without_labels_has_none_to_read(tmp_path: Path, make_cohort, small: Preprocessing) -> None:  # type: ignore[no-untyped-def]
    store = ingest(make_cohort(tmp_path / "raw", sources=1, targets=1), tmp_path / "c.zarr", small)
    entry = store.select("target")[0]
    assert not entry.labelled
    for act in (store.read, store.reader):
        with pytest.raises(KeyError, match="label"):
            act(entry, "label")


def test_labels_of_the_target_domain_are_for_evaluation(original: Store) -> None:
    assert all(entry.labelled and entry.evaluation_only for entry in original.select("target"))
    assert not any(entry.evaluation_only for entry in original.select("source"))


def limited(original: Store, **ranges: tuple[float, float, tuple[float, float]]) -> Store:
    """Volumes with these extremes and tails in training; those of the other splits are far beyond."""
    far = (-99.0, 99.0, (-98.0, 98.0))
    entries = []
    for entry in original.entries:
        low, high, tail = ranges[entry.domain] if entry.split == "train" else far
        entries.append(replace(entry, minimum=low, maximum=high, percentiles={"0.5": tail, "2": (0.0, 1.0)}))
    return replace(original, entries=tuple(entries))


def test_limits_come_from_training_subjects_alone(original: Store) -> None:
    store = limited(original, source=(-2.0, 5.0, (-1.0, 4.5)), target=(-3.0, 4.0, (-1.5, 3.0)))
    assert store.limits("source") == (-2.0, 5.0)
    assert store.limits("target") == (-3.0, 4.0)
    assert store.limits("source", pooled=True) == store.limits("target", pooled=True) == (-3.0, 5.0)
    assert store.limits("source", percentile=0.5) == (-1.0, 4.5)
    assert store.limits("target", percentile=0.5, pooled=True) == (-1.5, 4.5)
    assert store.limits("target", percentile=2.0) == (0.0, 1.0)
    with pytest.raises(InputError, match=r"no percentile 3; .* 0 \(minimum and maximum\), 0\.5, 2\."):
        store.limits("source", percentile=3)


def test_percentile_limits_are_the_widest_of_several_subjects(original: Store) -> None:
    tails = {"s000": (-1.0, 2.0), "s001": (-0.5, 3.0), "s002": (-2.0, 1.0)}
    entries = [replace(e, split="train", percentiles={"1": tails[e.subject]}) for e in original.select("source")]
    assert replace(original, entries=tuple(entries)).limits("source", percentile=1) == (-2.0, 3.0)


def test_the_recorded_tails_are_those_of_the_voxels(original: Store) -> None:
    entry = original.select("source", "train")[0]
    assert set(entry.percentiles) == {f"{level:g}" for level in LEVELS}
    rows, columns = (
        slice(shift, shift + length)
        for shift, length in zip(entry.record["shift_yx"], entry.record["resampled"]["size"][1::-1], strict=True)
    )
    inside = original.read(entry, "image")[:, rows, columns].astype(np.float64)
    for level in LEVELS:
        expected = np.percentile(inside, [level, 100 - level])
        step = np.ptp(np.sort(inside, axis=None)[:2]) + 0.1  # 600 voxels: neighbours in rank differ by that much
        assert np.allclose(entry.percentiles[f"{level:g}"], expected, atol=step)


def test_training_values_fill_the_range_and_others_are_not_clipped(original: Store) -> None:
    image = np.array([-1.0, 1.0, 3.0, 5.0], dtype=np.float16)
    assert normalise(image, (-1.0, 3.0)).tolist() == [-1, 0, 1, 2]
    assert normalise(image, (-1.0, 3.0)).dtype == np.float32
    for domain in ("source", "target"):
        entry = original.select(domain, "train")[0]  # type: ignore[arg-type]
        values = normalise(original.read(entry, "image"), original.limits(domain))  # type: ignore[arg-type]
        assert values.min() == pytest.approx(-1, abs=1e-6)
        assert values.max() == pytest.approx(1, abs=1e-6)


def test_a_prediction_on_stored_slices_finds_its_way_home(original: Store) -> None:
    entry = original.select("target", "test")[0]
    back = restore(original.read(entry, "label"), original.record(entry))
    key = json.loads((original.path.parent / "cohort.zarr.key.json").read_text())
    raw = read(key[entry.subject]["label"])
    assert not back.geometry.differences(raw.geometry)
    assert np.count_nonzero(back.voxels & raw.voxels) > 0.8 * np.count_nonzero(raw.voxels)


def test_a_reader_needs_no_imaging_library() -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['SimpleITK', 'scipy', 'skimage', 'pydicom', 'obstore']))\n"
        "import slicestore.store, slicestore.shards, slicestore.place, slicestore.verify, slicestore.staging\n"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )


# --- the layout, for whoever finds it ---------------------------------------------------------------------------------


def test_a_store_is_plain_zarr(original: Store) -> None:
    group = zarr.open_group(original.path / original.entries[0].group, mode="r")
    image = group["image"]
    assert isinstance(image, zarr.Array)
    assert (image.chunks, image.shards) == ((1, 16, 16), (5, 16, 16))
    assert image.metadata.dimension_names == ("z", "y", "x")  # type: ignore[union-attr]
    assert np.isnan(image.fill_value)
    assert group["label"].fill_value == group["fraction"].fill_value == 255  # type: ignore[union-attr]
    assert group.attrs["subject"] == "s000"
    assert group.attrs["preprocessing"] == original.preprocessing.fingerprint
    assert group.attrs["settings"] == asdict(original.preprocessing)
    assert group.attrs["record"] == original.record(original.entries[0])


def keys(tree: object, path: str = "") -> Iterator[str]:
    """Every key in a tree of attributes, by path; what grids and percentiles have in common is named once."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            inner = f"{path}.{name}".strip(".")
            yield inner
            shared = {"record.percentiles": "record.percentiles.<level>"} | {
                f"record.{g}": "record.<grid>" for g in GRIDS
            }
            if inner == "record.percentiles":
                yield from (shared[inner] for _ in value)
            elif name not in ("ome", "attributes"):  # the first is a standard's
                yield from keys(value, shared.get(inner, inner))
    elif isinstance(tree, list):
        for item in tree:
            yield from keys(item, path)


def test_every_attribute_and_every_field_of_the_manifest_is_explained_in_the_root(original: Store) -> None:
    root = zarr.open_group(original.path, mode="r")
    told = dict(root.attrs["attributes"])  # type: ignore[arg-type]
    found = set(keys(dict(root.attrs)))
    for entry in original.entries:
        found |= set(keys(dict(root[entry.group].attrs)))
        for name in entry.arrays:
            found |= set(keys(dict(root[f"{entry.group}/{name}"].attrs)))
    manifest = json.loads((original.path / "manifest.json").read_text())
    found |= {f"manifest.{name}" for name in manifest}
    same = {"record", "domain", "subject", "key", "maximum", "percentiles", "mean", "std"}  # as in attributes
    found |= {f"manifest.volumes.{name}" for name in manifest["volumes"][0] if name not in same}
    assert sorted(found - set(told)) == []
    optional = {name for name in told if name.startswith(("manifest", "record.label", "record.geometry"))}
    assert sorted(set(told) - found - optional) == []  # nothing is explained that does not occur
    assert all(told.values())
    assert set(asdict(original.preprocessing)) == {
        name.partition(".")[2] for name in told if name.startswith("settings.")
    }


def test_the_readme_names_what_lies_in_a_volume(original: Store) -> None:
    root = zarr.open_group(original.path, mode="r")
    text = " ".join(root.attrs["readme"])  # type: ignore[arg-type]
    for word in ("image", "label", "fraction", "NaN", "255", "millimetres", "LPS", "manifest.json", "record.shift_yx"):
        assert word in text
    for entry in original.entries:
        for name in entry.arrays:
            attributes = root[f"{entry.group}/{name}"].attrs
            assert attributes["axes"] == ["z", "y", "x"]
            assert attributes["units"]
            assert attributes["meaning"]


def test_a_slice_can_be_put_in_the_patient_by_the_attributes_alone(original: Store) -> None:
    group = zarr.open_group(original.path / original.select("target", "test")[0].group, mode="r")
    record = group.attrs["record"]
    grid = record["prepared"]  # type: ignore[index, call-overload]
    key = json.loads((original.path.parent / "cohort.zarr.key.json").read_text())
    raw = read(key[group.attrs["subject"]]["image"])
    # pixels of 1 mm on voxels of .5 mm that share an outer corner: the first centre is .25 mm further in
    first = [grid["origin_mm"][k] + record["shift_yx"][1 - k] * 1.0 for k in (0, 1)]  # type: ignore[index, call-overload]
    assert first == pytest.approx([o + 0.25 for o in raw.geometry.origin_mm[:2]])


@pytest.mark.parametrize(("setting", "value"), [("size", 60), ("brain_class", 1)])
def test_a_store_made_elsewhere_with_settings_that_cannot_be_is_refused_by_name(
    store: Store, setting: str, value: int
) -> None:
    manifest = json.loads((Path(store.path) / "manifest.json").read_text())
    manifest["preprocessing"][setting] = value
    (Path(store.path) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        InputError, match=rf"cohort\.zarr/manifest\.json: found preprocessing\.{setting} {value}; .* new"
    ):
        Store.open(store.path)


def test_viewers_find_ome_zarr_metadata_where_slices_are_contiguous(original: Store) -> None:
    entry = original.entries[0]
    group = zarr.open_group(original.path / entry.group, mode="r")
    ome = group.attrs["ome"]
    assert ome["version"] == "0.5"  # type: ignore[index, call-overload]
    (scales,) = ome["multiscales"]  # type: ignore[index, call-overload]
    assert [(axis["name"], axis["type"], axis["unit"]) for axis in scales["axes"]] == [
        (name, "space", "millimeter") for name in ("z", "y", "x")
    ]
    (data,) = scales["datasets"]
    assert group[data["path"]].metadata.dimension_names == ("z", "y", "x")  # type: ignore[union-attr]
    scale, translation = data["coordinateTransformations"]
    assert scale == {"type": "scale", "scale": [2.0, 1.0, 1.0]}
    # 10 x 12 pixels in 16 x 16: shifted by 3 and 2 or so; the grid's own origin says by how much
    assert translation == {"type": "translation", "translation": entry.record["prepared"]["origin_mm"][::-1]}


def test_the_ome_origin_is_that_of_the_first_slice_and_gaps_have_none() -> None:
    grid = {"size": [8, 8, 9], "spacing_mm": [1.0, 1.0, 2.5], "origin_mm": [-4.0, -3.0, 10.0]}
    record = {"prepared": grid | {"direction": [1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0]}, "slices": [2, 3, 4]}
    made = volume_attributes("target", "t000", "k", Preprocessing(), record)
    (data,) = made["ome"]["multiscales"][0]["datasets"]
    assert data["coordinateTransformations"][1]["translation"] == [15.0, -3.0, -4.0]  # 10 mm and two slices of 2.5
    assert "ome" not in volume_attributes("target", "t000", "k", Preprocessing(), record | {"slices": [2, 4]})


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["image", "label", "fraction"])
def test_a_flipped_bit_is_reported_with_subject_and_slice(store: Store, name: str) -> None:
    entry = store.select("source", "train")[0]
    file = shard(store, entry, name)
    start, length = chunks(file, 5)[3]
    flip(file, int(start + length // 2))
    told = (
        rf"{name} of source subject {entry.subject}: found damaged data \(slice 3 \(position 3 from the feet\) does "
        r"not match its checksum\); .* Remedy: run `equipoise prepare` again"
    )
    with pytest.raises(InputError, match=told):
        store.read(entry, name)  # type: ignore[arg-type]
    out = np.empty((16, 16), dtype=np.float16 if name == "image" else np.uint8)
    reader = store.reader(entry, name)  # type: ignore[arg-type]
    reader.slice(2, out)
    with pytest.raises(InputError, match=told):
        reader.slice(3, out)
    assert store.read(store.select("target", "train")[0], "image").shape == (5, 16, 16)


def test_the_position_in_the_volume_is_told_beside_the_index_in_the_store(store: Store) -> None:
    entry = store.select("source", "train")[0]
    file = shard(store, entry)
    flip(file, int(chunks(file, 5)[1][0]) + 30)
    later = replace(entry, record={**entry.record, "slices": [10, 12, 13, 14, 15]})
    with pytest.raises(InputError, match=r"slice 1 \(position 12 from the feet\)"):
        store.read(later, "image")


def test_a_flipped_bit_in_the_index_is_reported_with_the_subject(store: Store) -> None:
    entry = store.select("source", "train")[0]
    flip(shard(store, entry), -20)
    for act in (store.read, store.reader):
        with pytest.raises(
            InputError, match=rf"subject {entry.subject}: found damaged data \(the shard's index does not"
        ):
            act(entry, "image")


@pytest.mark.parametrize("name", ["image", "label"])
def test_a_chunk_that_was_never_written_is_not_taken_for_data(store: Store, name: str) -> None:
    entry = store.select("source", "train")[0]
    file = shard(store, entry, name)
    index = chunks(file, 5).copy()
    index[2] = 2**64 - 1  # how a shard says that a chunk is missing
    payload = file.read_bytes()[: -16 * 5 - 4]
    file.write_bytes(payload + index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little"))
    with pytest.raises(InputError, match=rf"{name} of source subject {entry.subject}: found .*slice 2 .* is missing"):
        store.read(entry, name)  # type: ignore[arg-type]


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
    for act in (store.read, store.reader):  # of a store that was opened before
        with pytest.raises(InputError, match=rf"{entry.subject}: found no object target/.*/image/c/0/0/0"):
            act(entry, "image")


def test_a_format_that_this_version_does_not_write_is_refused(store: Store) -> None:
    entry = store.select("source", "train")[0]
    odd = replace(entry, arrays={"image": {**entry.arrays["image"], "data_type": "float32"}})
    with pytest.raises(InputError, match=r"image of source subject .*: found an array of float32"):
        store.read(odd, "image")


def test_a_store_that_may_not_be_read_is_told_with_the_remedy(original: Store, as_nobody) -> None:  # type: ignore[no-untyped-def]
    with as_nobody() as folder:
        pass
    shutil.copytree(original.path, folder / "cohort.zarr")
    entry = original.entries[0]
    file = folder / "cohort.zarr" / entry.group / "image" / "c" / "0" / "0" / "0"
    file.chmod(0)
    with as_nobody():
        store = Store.open(folder / "cohort.zarr")
        with pytest.raises(InputError, match=rf"{entry.group}/image/c/0/0/0: found Permission denied; .*chmod"):
            store.read(entry, "image")
    (folder / "cohort.zarr").chmod(0)
    with as_nobody(), pytest.raises(InputError, match="found Permission denied"):
        Store.open(folder / "cohort.zarr")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_no_store_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "of").mkdir(parents=True)
    (tmp_path / "folder" / "of" / "things").write_text("")
    (tmp_path / "empty" / "folders").mkdir(parents=True)
    for name, found in (
        ("gone", "nothing there"),
        ("file", "a file"),
        ("empty", "an empty folder"),
        ("folder", "a folder that is no store"),
    ):
        with pytest.raises(InputError, match=f"{name}: found {found}"):
            Store.open(tmp_path / name)


def test_an_unfinished_store_says_so(store: Store) -> None:
    (store.path / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no manifest\.json.*interrupted"):
        Store.open(store.path)
    (store.path / "manifest.json").write_text('{"schema": 2')
    with pytest.raises(InputError, match="damaged JSON"):
        Store.open(store.path)


def test_a_store_of_another_schema_is_refused_with_both_numbers(store: Store) -> None:
    root = json.loads((store.path / "zarr.json").read_text())
    root["attributes"]["slicestore"] = SCHEMA + 1
    (store.path / "zarr.json").write_text(json.dumps(root))
    (store.path / "manifest.json").unlink()
    with pytest.raises(InputError, match=rf"schema {SCHEMA + 1}.*uses schema {SCHEMA}.*new folder"):
        Store.open(store.path)


def test_an_opened_store_is_equal_on_every_machine_with_the_same_content(store: Store, original: Store) -> None:
    assert store.path != original.path
    assert store.fingerprint == original.fingerprint
    assert store.entries == original.entries
    assert [(domain, split, len(store.select(domain, split))) for domain, split in parts()] == [  # type: ignore[arg-type]
        (domain, split, 1) for domain, split in parts()
    ]
