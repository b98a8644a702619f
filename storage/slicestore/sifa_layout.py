"""One slice as the public SIFA data hold it: three neighbours a record.

Knows the layout's features; knows nothing of files, of Zarr or of whose slice it is.

    dsize_dim0..2        int64   height, width and 3
    lsize_dim0..2        int64   height, width and 3 (1 in some data made for it)
    data_vol, label_vol  bytes   float32, little-endian, (y, x, neighbour): the slice below, the slice, the slice above

The middle slice is what counts. Images are standardised per volume; readers of the layout map them to [-1, 1] by fixed
numbers of their own. Which subject a slice is of, and where it lies in the patient, the records do not say. We add a
feature that other readers pass over: `labelled`, int64, 0 where the label is zeros because nobody made one.
"""

from __future__ import annotations

import numpy as np

from slicestore import tfrecord
from slicestore.errors import InputError

NEIGHBOURS = 3


def decode(data: bytes, where: object = "record") -> tuple[np.ndarray, np.ndarray | None]:
    """Read the middle slice of a record: image and label, both float32 (y, x); no label where it says so.

    Raises:
        InputError: a missing feature, or one whose values do not fit the sizes.
    """
    features = tfrecord.decode(data, where)
    label = _middle(features, "label_vol", "lsize", where)
    image = _middle(features, "data_vol", "dsize", where)
    if label.shape != image.shape:
        raise _odd(where, f"a label of {label.shape} and an image of {image.shape}", "they are of one size")
    return image, None if features.get("labelled") == [0] else label


def encode(image: np.ndarray, label: np.ndarray | None, number: int) -> bytes:
    """Make the record of one slice of a volume (z, y, x); the first and last are their own missing neighbours."""
    picked = np.clip([number - 1, number, number + 1], 0, len(image) - 1)
    known = np.zeros((NEIGHBOURS, *image.shape[1:])) if label is None else label[picked]
    size = [*image.shape[1:], NEIGHBOURS]
    return tfrecord.encode(
        {
            **{f"{kind}size_dim{axis}": [n] for kind in "dl" for axis, n in enumerate(size)},
            **{
                name: [np.ascontiguousarray(planes.transpose(1, 2, 0), dtype="<f4").tobytes()]
                for name, planes in (("data_vol", image[picked]), ("label_vol", known))
            },
            "labelled": [int(label is not None)],
        }
    )


def _middle(features: tfrecord.Features, name: str, size: str, where: object) -> np.ndarray:
    sizes = [features.get(f"{size}_dim{axis}", []) for axis in range(3)]
    values = features.get(name, [])
    missing = [f"{size}_dim{axis}" for axis, found in enumerate(sizes) if not found]
    if missing or not values:
        raise _odd(where, f"no feature {missing[0] if missing else name!r}", "a record has sizes, data_vol, label_vol")
    (height, *_), (width, *_), _ = sizes
    if not (isinstance(values[0], bytes) and isinstance(height, int) and isinstance(width, int)):
        raise _odd(where, f"{name} or its sizes of another type", "sizes are int64, volumes are bytes")
    depth = len(values[0]) / (4 * height * width) if height > 0 and width > 0 else 0
    if depth not in (1, NEIGHBOURS):  # what `dim2` says is not to be relied on: labels of three slices say 1
        raise _odd(where, f"{len(values[0])} bytes of {name} for {height} x {width} pixels", "it is 1 or 3 float32")
    return np.frombuffer(values[0], dtype="<f4").reshape(height, width, int(depth))[..., int(depth) // 2]


def _odd(where: object, found: str, rule: str) -> InputError:
    return InputError(where, found=found, rule=rule, remedy="check that the file is in SIFA's layout")
