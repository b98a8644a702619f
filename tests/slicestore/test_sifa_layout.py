"""Slices in the public SIFA layout: read as the reference reads them, and written so that it could."""

import numpy as np
import pytest

from slicestore import tfrecord
from slicestore.errors import InputError
from slicestore.sifa_layout import decode, encode


def public(value: float, label: float = 0, *, label_depth: int = 3, height: int = 8, width: int = 8) -> bytes:
    """A record as the public data have it: neighbours 1 below and 1 above in value, the label's all 9."""
    data = value + np.zeros((height, width, 1)) + np.arange(-1, 2)
    labels = np.full((height, width, label_depth), 9.0)
    labels[..., label_depth // 2] = label
    sizes = {f"dsize_dim{axis}": [n] for axis, n in enumerate((height, width, 3))}
    sizes |= {f"lsize_dim{axis}": [n] for axis, n in enumerate((height, width, 1))}
    volumes = {"data_vol": [data.astype("<f4").tobytes()], "label_vol": [labels.astype("<f4").tobytes()]}
    return tfrecord.encode({**sizes, **volumes, "augmentation": [b"rotated"]})


def test_the_middle_slice_is_used_and_unknown_features_are_passed_over() -> None:
    image, label = decode(public(2.5, 3))
    assert image.shape == (8, 8)
    assert (image == 2.5).all()
    assert label is not None
    assert (label == 3).all()


def test_a_label_of_one_slice_is_that_slice_whatever_its_size_says() -> None:
    """Files of three label slices say `lsize_dim2` 1 too; their bytes tell."""
    for depth in (1, 3):
        _, label = decode(public(0, 2, label_depth=depth))
        assert label is not None
        assert (label == 2).all()


def test_a_record_is_what_the_reference_parses_with_edges_repeated() -> None:
    """Three slices of values 10, 20, 30: the parser reshapes raw float32 to (y, x, 3) and takes index 1 of the last."""
    volume = np.arange(1, 4, dtype=np.float16)[:, None, None] * np.full((1, 2, 4), 10, np.float16)
    volume[:, 0, 1] += 1
    for number, expected in enumerate(([10, 10, 20], [10, 20, 30], [20, 30, 30])):
        features = tfrecord.decode(encode(volume, (volume // 10).astype(np.uint8), number))
        assert [features[f"dsize_dim{axis}"] for axis in range(3)] == [[2], [4], [3]]
        assert [features[f"lsize_dim{axis}"] for axis in range(3)] == [[2], [4], [3]]
        (raw,), (raw_label,) = features["data_vol"], features["label_vol"]
        assert isinstance(raw, bytes)
        assert isinstance(raw_label, bytes)
        cube = np.frombuffer(raw, np.float32).reshape(2, 4, 3)
        assert cube[1, 3].tolist() == expected
        assert cube[0, 1].tolist() == [value + 1 for value in expected]
        assert np.frombuffer(raw_label, np.float32).reshape(2, 4, 3)[1, 3].tolist() == [v / 10 for v in expected]


def test_an_unlabelled_slice_holds_zeros_and_comes_back_without_a_label() -> None:
    data = encode(np.ones((1, 2, 2), np.float16), None, 0)
    assert tfrecord.decode(data)["label_vol"] == [bytes(2 * 2 * 3 * 4)]
    assert decode(data)[1] is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dsize_dim1": [9]}, "768 bytes of data_vol for 8 x 9 pixels"),
        ({"dsize_dim0": [-8]}, "768 bytes of data_vol for -8 x 8 pixels"),
        ({"data_vol": [b"abc"]}, "3 bytes of data_vol"),
        ({"data_vol": [7]}, "data_vol or its sizes of another type"),
        ({"label_vol": []}, "no feature 'label_vol'"),
        ({"lsize_dim0": [16], "lsize_dim1": [4]}, r"a label of \(16, 4\) and an image of \(8, 8\)"),
    ],
)
def test_features_that_do_not_fit_are_refused(change: dict[str, list[int]], told: str) -> None:
    features = tfrecord.decode(public(0)) | change
    with pytest.raises(InputError, match=rf"a\.tfrecords, record 2: found {told}.*SIFA's layout"):
        decode(tfrecord.encode(features), "a.tfrecords, record 2")
