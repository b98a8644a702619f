"""Volumes in TFRecord files of SIFA's layout: found, checked and taken as they are."""

from pathlib import Path

import numpy as np
import pytest

from slicestore import tfrecord
from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.preprocess import restore
from slicestore.records import Records, digest, prepare, records_from, settings_for
from slicestore.settings import Preprocessing
from slicestore.sifa_layout import encode

CONFIG = Preprocessing(size=8, spacing_mm=1.0, centre="grid")


def public(value: float, label: float = 0, *, label_depth: int = 3, height: int = 8, width: int = 8) -> bytes:
    """A record as the public data have it: neighbours 1 below and 1 above in value, the label's all 9."""
    data = value + np.zeros((height, width, 1)) + np.arange(-1, 2)
    labels = np.full((height, width, label_depth), 9.0)
    labels[..., label_depth // 2] = label
    sizes = {f"dsize_dim{axis}": [n] for axis, n in enumerate((height, width, 3))}
    sizes |= {f"lsize_dim{axis}": [n] for axis, n in enumerate((height, width, 1))}
    volumes = {"data_vol": [data.astype("<f4").tobytes()], "label_vol": [labels.astype("<f4").tobytes()]}
    return tfrecord.encode({**sizes, **volumes, "augmentation": [b"rotated"]})


def slices(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        tfrecord.write(folder / name, [public(0)])


def test_files_of_a_slice_each_are_grouped_by_the_pattern_in_natural_order(tmp_path: Path) -> None:
    slices(tmp_path, "mr_1_slice10.tfrecords", "mr_1_slice9.tfrecords", "mr_2_slice1.tfrecords")
    (tmp_path / "notes.md").touch()
    found = records_from(tmp_path, "source", subject=r"^(mr_\d+)_")
    assert [(item.subject, [f.name for f in item.files]) for item in found] == [
        ("mr_1", ["mr_1_slice9.tfrecords", "mr_1_slice10.tfrecords"]),
        ("mr_2", ["mr_2_slice1.tfrecords"]),
    ]
    assert {item.domain for item in found} == {"source"}


def test_a_list_of_paths_relative_to_itself_is_read(tmp_path: Path) -> None:
    slices(tmp_path / "data", "a1.tfrecords", "a2.tfrecords", "b1.tfrecords")
    (tmp_path / "train.txt").write_text("data/a2.tfrecords\ndata/a1.tfrecords\n\n")
    (item,) = records_from(tmp_path / "train.txt", "target", subject="^.")
    assert [file.name for file in item.files] == ["a1.tfrecords", "a2.tfrecords"]
    (tmp_path / "train.txt").write_text("data/a3.tfrecords\n")
    with pytest.raises(InputError, match=r"data/a3\.tfrecords: found no such file"):
        records_from(tmp_path / "train.txt", "target", subject="^.")


def test_a_file_of_many_records_is_a_subject(tmp_path: Path) -> None:
    tfrecord.write(tmp_path / "case7.tfrecord", [public(n) for n in range(3)])
    (item,) = records_from(tmp_path / "case7.tfrecord", "source")
    assert (item.subject, prepare(item, CONFIG).image[:, 0, 0].tolist()) == ("case7", [0, 1, 2])


def test_files_of_a_slice_each_without_a_pattern_are_refused(tmp_path: Path) -> None:
    slices(tmp_path, "slice1.tfrecords")
    with pytest.raises(InputError, match=r"slice1\.tfrecords: found a single record.*regular expression"):
        records_from(tmp_path, "source")


@pytest.mark.parametrize(("pattern", "told"), [("^ct", "no subject in the name"), ("(", "regular expression")])
def test_a_pattern_that_finds_nothing_is_refused(tmp_path: Path, pattern: str, told: str) -> None:
    slices(tmp_path, "mr1.tfrecords")
    with pytest.raises(InputError, match=told):
        records_from(tmp_path, "source", subject=pattern)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no TFRecord file"):
        records_from(tmp_path, "source")


# --- volumes ----------------------------------------------------------------------------------------------------------


def volume(path: Path, *records: bytes) -> Records:
    tfrecord.write(path, records)
    return Records("source", "x", (path,))


def test_values_are_kept_and_labels_become_classes(tmp_path: Path) -> None:
    item = volume(tmp_path / "x.tfrecords", public(-1.5, 0), public(2.25, 4))
    made = prepare(item, settings_for([item]))
    assert settings_for([item]) == CONFIG
    assert made.image.dtype == np.float16
    assert made.image[:, 3, 3].tolist() == [-1.5, 2.25]
    assert made.label is not None
    assert made.fraction is not None
    assert made.label[:, 3, 3].tolist() == [0, 4]
    assert made.fraction[:, 3, 3].tolist() == [0, 255]
    assert (made.record["minimum"], made.record["maximum"], made.record["geometry"]) == (-1.5, 2.25, "unknown")
    assert made.record["label"]["classes"] == 5
    assert made.record["label"]["volume_mm3"] == {"before": [0, 0, 0, 64], "after": [0, 0, 0, 64]}
    assert made.record["label"]["pieces"] == {"before": [0, 0, 0, 1], "after": [0, 0, 0, 1]}


def test_slices_go_back_to_a_grid_of_one_millimetre(tmp_path: Path) -> None:
    item = volume(tmp_path / "x.tfrecords", public(0, 0), public(0, 1), public(0, 2))
    made = prepare(item, CONFIG)
    assert made.label is not None
    back = restore(made.label, made.record)
    assert back.geometry == Geometry((8, 8, 3), (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(back.voxels, made.label)


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (public(np.nan), "values that are not finite in float16"),
        (public(1e6), "values that are not finite in float16"),
        (public(0, 1.5), "the label value 1.5"),
        (public(0, -1), "the label value -1"),
        (public(0, 255), "the label value 255"),
        (public(0, np.nan), "the label value nan"),
        (public(0, height=16), "a slice of 16 x 8 pixels"),
        (encode(np.zeros((1, 8, 8), np.float16), None, 0), "a slice without a label"),
    ],
)
def test_slices_that_break_a_rule_are_named(tmp_path: Path, second: bytes, told: str) -> None:
    item = volume(tmp_path / "x.tfrecords", public(0), second)
    with pytest.raises(InputError, match=rf"x\.tfrecords, record 2: found {told}"):
        prepare(item, CONFIG)


def test_the_digest_follows_bytes_and_order_and_not_names(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    tfrecord.write(a, [public(0)])
    tfrecord.write(b, [public(1)])
    (tmp_path / "c").write_bytes(a.read_bytes())
    digests = [
        digest(Records("source", "x", tuple(tmp_path / name for name in names))) for names in ("ab", "cb", "ba", "a")
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
