"""A store's volumes as NIfTI and as TFRecords, and back."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from slicestore import tfrecord
from slicestore.errors import InputError
from slicestore.export import export
from slicestore.ingest import ingest
from slicestore.inputs import Input, inputs_from_folder
from slicestore.layout import DOMAINS
from slicestore.records import import_records, records_from
from slicestore.settings import Preprocessing
from slicestore.store import Store
from slicestore.volume import read

MakeCohort = Callable[..., list[Input]]
OURS = r"^([st]\d+)_"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, make_cohort: MakeCohort) -> Store:
    """Four sources with masks and three targets, of which none has one; those slices alone that show the mask."""
    folder = tmp_path_factory.mktemp("export")
    config = Preprocessing(size=16, spacing_mm=1.0, centre="grid", slices="foreground")
    return ingest(make_cohort(folder, sources=4, targets=3), folder / "cohort.zarr", config)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_volumes_become_nifti_files_that_lie_where_the_slices_do(store: Store, tmp_path: Path) -> None:
    """5 x 24 x 20 voxels of 2, .5, .5 mm from (1, 2, 3) become 1 mm from (1.25, 2.25, 3); the frame adds 3 and 2 pixels
    before them along x and y. NIfTI counts x and y the other way.
    """
    assert export(store, tmp_path / "out") == 4 + 3 + 4
    sources = [f"source/s00{number}{end}.nii.gz" for number in range(4) for end in ("", "_label")]
    assert files(tmp_path / "out") == sorted(sources + [f"target/t00{number}.nii.gz" for number in range(3)])
    for number, entry in enumerate(store.select("source")):
        image = nibabel.load(tmp_path / "out" / "source" / f"{entry.subject}.nii.gz")
        expected = np.diag([-1.0, -1.0, 2.0, 1.0])
        expected[:3, 3] = 1.75, -0.25, 3 + number
        np.testing.assert_allclose(image.affine, expected, atol=1e-6)
        voxels = np.asarray(image.dataobj).transpose(2, 1, 0)
        assert voxels.shape == (5, 16, 16)
        assert voxels.dtype == np.float32
        np.testing.assert_array_equal(voxels[1:4], store.read(entry, "image"))
        assert (voxels[[0, 4]] == np.float32(store.record(entry)["background"])).all()
        label = read(tmp_path / "out" / "source" / f"{entry.subject}_label.nii.gz")
        np.testing.assert_array_equal(label.voxels[1:4], store.read(entry, "label"))
        assert not label.voxels[[0, 4]].any()


def test_what_was_exported_can_be_prepared_again(store: Store, tmp_path: Path) -> None:
    export(store, tmp_path)
    inputs = [item for domain in DOMAINS for item in inputs_from_folder(tmp_path / domain, domain)]
    again = ingest(inputs, tmp_path / "again.zarr", Preprocessing(size=16, spacing_mm=1.0))
    assert [entry.labelled for entry in again.entries] == [True] * 4 + [False] * 3


def test_masks_go_back_to_the_scan_s_grid(store: Store, tmp_path: Path) -> None:
    """The first subject's mask fills whole pixels of 1 mm, so that it comes back voxel by voxel."""
    assert export(store, tmp_path / "out", grid="raw") == 4
    assert files(tmp_path / "out") == [f"source/s00{number}_label.nii.gz" for number in range(4)]
    scans = Path(store.path).parent
    back = read(tmp_path / "out" / "source" / "s000_label.nii.gz")
    raw = read(scans / "patient-source-0_label.nii.gz")
    np.testing.assert_array_equal(back.voxels, raw.voxels)
    for number in range(4):
        back = read(tmp_path / "out" / "source" / f"s00{number}_label.nii.gz")
        assert not read(scans / f"patient-source-{number}.nii.gz").geometry.differences(back.geometry)


def test_store_to_tfrecords_to_store_keeps_every_value(store: Store, tmp_path: Path) -> None:
    assert export(store, tmp_path / "out", format="tfrecord") == sum(entry.slices for entry in store.entries)
    items = []
    for domain in DOMAINS:
        merged = tmp_path / "out" / f"{domain}.txt"
        merged.write_text("".join(part.read_text() for part in (tmp_path / "out").glob(f"{domain}_*.txt")))
        items += records_from(merged, domain, subject=OURS)
    again = import_records(items, tmp_path / "again.zarr")
    assert again.verify().intact
    assert [entry.subject for entry in again.entries] == [entry.subject for entry in store.entries]
    for old, new in zip(store.entries, again.entries, strict=True):
        assert new.labelled == old.labelled
        assert new.minimum == again.read(new, "image").min()  # a frame, if there was one, is not told from the rest
        np.testing.assert_array_equal(again.read(new, "image"), store.read(old, "image"))
        if old.labelled:
            np.testing.assert_array_equal(again.read(new, "label"), store.read(old, "label"))
    assert again.classes == store.classes


def test_lists_name_every_slice_of_a_split_and_readers_are_told_the_limits(store: Store, tmp_path: Path) -> None:
    export(store, tmp_path, format="tfrecord")
    for entry in store.entries:
        listed = (tmp_path / f"{entry.domain}_{entry.split}.txt").read_text().split()
        own = [name for name in listed if name.split("/")[1].startswith(entry.subject)]
        assert own == [f"{entry.domain}_{entry.split}/{entry.subject}_{n:04d}.tfrecords" for n in range(entry.slices)]
        assert all(tfrecord.count(tmp_path / name) == 1 for name in own)
    facts = json.loads((tmp_path / "export.json").read_text())
    assert facts["limits"] == {domain: list(store.limits(domain)) for domain in DOMAINS}
    assert facts["fingerprint"] == store.fingerprint


@pytest.mark.parametrize("kind", ["nifti", "tfrecord"])
def test_no_name_of_a_subject_or_file_is_exported(store: Store, tmp_path: Path, kind: str) -> None:
    export(store, tmp_path, format=kind)  # type: ignore[arg-type]
    for file in tmp_path.rglob("*"):
        assert "patient" not in file.name
        if file.is_file():
            data = file.read_bytes()
            assert b"patient" not in (gzip.decompress(data) if file.suffix == ".gz" else data)


def test_a_folder_with_something_in_it_is_left_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="new or empty folder"):
        export(store, tmp_path)
    with pytest.raises(InputError, match="found something there"):
        export(store, tmp_path / "mine")
    assert files(tmp_path) == ["mine"]


def test_slices_have_no_raw_grid(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="TFRecords in the raw grid"):
        export(store, tmp_path / "out", format="tfrecord", grid="raw")
    assert not (tmp_path / "out").exists()


def test_a_damaged_store_is_told_and_no_torn_file_is_left(store: Store, tmp_path: Path) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store.path, copy)
    entry = store.select("source")[1]
    shard = copy / entry.group / "image" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="s001"):
        export(Store.open(copy), tmp_path / "out")
    assert files(tmp_path / "out") == ["source/s000.nii.gz", "source/s000_label.nii.gz"]


def test_one_subject_twice_and_a_missing_domain_are_refused_at_import(store: Store, tmp_path: Path) -> None:
    export(store, tmp_path / "out", format="tfrecord")
    (part,) = {f"source_{entry.split}" for entry in store.select("source") if entry.subject == "s000"}
    found = records_from(tmp_path / "out" / part, "source", subject=OURS)
    with pytest.raises(InputError, match="no target records"):
        import_records(found, tmp_path / "again.zarr")
    with pytest.raises(InputError, match="a second source volume of subject 's000'"):
        import_records([*found, *found], tmp_path / "again.zarr")
    assert not (tmp_path / "again.zarr").exists()


def test_a_source_without_labels_is_refused_at_import(store: Store, tmp_path: Path) -> None:
    export(store, tmp_path / "out", format="tfrecord")
    swapped = [
        item
        for kind, domain in (("target", "source"), ("source", "target"))
        for item in records_from(tmp_path / "out" / f"{kind}_train", domain, subject=OURS)  # type: ignore[arg-type]
    ]
    with pytest.raises(InputError, match=r"t00\d_0000\.tfrecords and 3 more: found no label"):
        import_records(swapped, tmp_path / "again.zarr")
