"""A thin reader of the shards that this version writes: bytes in, checked voxels out.

Knows the `sharding_indexed` layout, blosc and crc32c; knows nothing of stores, subjects or where the bytes come from
but the one call that fetches a range. zarr-python reads the same shards: more kinds, and many times slower by slice.

A shard holds one volume: one chunk per slice, each blosc-compressed and followed by its crc32c, in any order; at the
end an index of offset and length (8 bytes each, little-endian, both 2**64 - 1 where a chunk is missing) and its crc32c.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np

numcodecs.blosc.use_threads = False  # as zarr-python sets it: chunks are small, and its threads do not survive a fork
MISSING = 2**64 - 1
GAP = 1 << 14
"""Slices whose chunks lie this near to each other in bytes are fetched together."""
Fetch = Callable[[int, int], memoryview]
"""Reads some bytes of the shard: start and length."""
Numbers = Sequence[int] | np.ndarray
DTYPES: Mapping[str, np.dtype[Any]] = {"float16": np.dtype(np.float16), "uint8": np.dtype(np.uint8)}


class Damaged(ValueError):
    """A shard that cannot be trusted."""

    def __init__(self, reason: str, slices: Mapping[int, str] | None = None) -> None:
        super().__init__(reason)
        self.slices = dict(slices or {})
        """Which slices, and what is wrong with each; empty where it is the whole shard."""


@dataclass(frozen=True, slots=True)
class Format:
    """What a `zarr.json` promises of an array."""

    shape: tuple[int, int, int]
    """Slices, rows, columns."""
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Format:
        """Read an array's metadata; all of it that decides how bytes become voxels.

        Raises:
            ValueError: it is not what this version writes, naming the first difference.
        """
        kind = str(metadata.get("data_type"))
        shape = metadata.get("shape")
        if kind not in DTYPES or not isinstance(shape, Sequence) or len(shape) != 3:
            raise ValueError(f"an array of {kind} with shape {shape}; slices are 3D, {' or '.join(DTYPES)}")
        slices, height, width = shape
        found = _decisive(metadata)
        for name, expected in _decisive(_metadata(slices, height, width)).items():
            if found[name] != expected:
                raise ValueError(f"{name} {found[name]}; this version reads {expected}")
        return cls((slices, height, width), DTYPES[kind])

    @property
    def slices(self) -> int:
        """Number of chunks of the shard."""
        return self.shape[0]

    @property
    def index_bytes(self) -> int:
        """Length of the index with its checksum."""
        return 16 * self.slices + 4


def read(fetch: Fetch, size: int, form: Format, block: int, out: np.ndarray) -> None:
    """Decode a whole shard into `out`, checking every checksum; the other arguments are those of `SliceReader`.

    `out` has the shape and type of the format and is C-contiguous. After an error its content is undefined.

    Raises:
        Damaged: with every slice that is damaged or missing.
    """
    if out.shape != form.shape or out.dtype != form.dtype or not out.flags.c_contiguous:
        raise TypeError(f"out is {out.dtype}{out.shape}; it must be C-contiguous {form.dtype}{form.shape}")
    SliceReader(fetch, size, form, block).slices(range(form.slices), out)


def read_index(tail: memoryview, form: Format, size: int) -> list[tuple[int, int]]:
    """Offset and length of each slice's chunk, from the last bytes of a shard of `size` bytes.

    Raises:
        Damaged: the index is cut short, does not match its checksum, or points beyond the shard.
    """
    if len(tail) != form.index_bytes:
        raise Damaged(f"the shard has {size} bytes, fewer than its index needs")
    if not _matches(np.frombuffer(tail, dtype=np.uint8)):
        raise Damaged("the shard's index does not match its checksum")
    index = np.frombuffer(tail[:-4], dtype="<u8").reshape(form.slices, 2)
    there = index[(index != MISSING).all(axis=1)]
    if there.size and int((there[:, 0] + there[:, 1]).max()) > size - form.index_bytes:
        raise Damaged("the shard's index points beyond the shard")
    return [(start, length) for start, length in index.tolist()]


class SliceReader:
    """Single slices of one shard, in any order; the index is read once.

    It holds no file open, and many threads may use one.
    """

    def __init__(self, fetch: Fetch, size: int, form: Format, block: int) -> None:
        """Read the index of a shard of `size` bytes. No fetch takes in more chunks once it has `block` bytes.

        Raises:
            Damaged: the index cannot be trusted.
        """
        self.form = form
        self._fetch, self._block = fetch, block
        self._index = read_index(fetch(max(0, size - form.index_bytes), form.index_bytes), form, size)

    def slice(self, number: int, out: np.ndarray) -> None:
        """Decode one slice into `out` (rows, columns).

        Raises:
            Damaged: it does not match its checksum, or is missing.
        """
        self.slices((number,), out[None])

    def slices(self, numbers: Numbers, out: np.ndarray) -> None:
        """Decode some slices into `out` (len(numbers), rows, columns), in the order given; neighbours in one fetch.

        Raises:
            Damaged: with every slice that is damaged or missing.
        """
        broken: dict[int, str] = {}
        for run in self._runs(numbers):
            begin = self._index[numbers[run[0]]][0]
            end = max(sum(self._index[numbers[row]]) for row in run)
            block = np.frombuffer(self._fetch(begin, end - begin), dtype=np.uint8)
            for row in run:
                start, length = self._index[numbers[row]]
                try:
                    _unpack(block, start - begin, length, out[row])
                except ValueError as error:
                    broken[int(numbers[row])] = str(error)
        missing = [int(number) for number in numbers if self._index[number][0] == MISSING]
        if broken or missing:
            raise Damaged("damaged chunks", broken | dict.fromkeys(missing, "is missing"))

    def _runs(self, numbers: Numbers) -> list[list[int]]:
        """Rows of `numbers` whose chunks lie together, by offset; those of missing chunks are left out."""
        rows = [row for row, number in enumerate(numbers) if self._index[number][0] != MISSING]
        runs: list[list[int]] = []
        begin = end = 0
        for row in sorted(rows, key=lambda row: self._index[numbers[row]][0]):
            start, length = self._index[numbers[row]]
            if runs and start - end <= GAP and start + length - begin <= self._block:
                runs[-1].append(row)
            else:
                runs.append([row])
                begin = start
            end = max(end, start + length)
        return runs


# --- the bytes --------------------------------------------------------------------------------------------------------


def _unpack(data: np.ndarray, start: int, length: int, out: np.ndarray) -> None:
    """Check one chunk and decompress it into `out`."""
    if start == MISSING:
        raise ValueError("is missing")
    chunk = data[start : start + length]
    if not 20 <= length == len(chunk) or not _matches(chunk):
        raise ValueError("does not match its checksum")
    if int.from_bytes(chunk[4:8], "little") != out.nbytes:  # the size that blosc's header promises
        raise ValueError("holds another number of pixels")
    try:
        numcodecs.blosc.decompress(chunk[:-4], out)
    except RuntimeError as error:
        raise ValueError(f"cannot be decompressed ({error})") from None


def _matches(data: np.ndarray) -> bool:
    """Whether bytes match the crc32c that ends them."""
    return bool(google_crc32c.value(data[:-4]) == int.from_bytes(data[-4:], "little"))


def _metadata(slices: int, height: int, width: int) -> dict[str, Any]:
    """What this version writes, as far as it decides how bytes become voxels."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    crc32c = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [1, height, width],
        "codecs": [little, {"name": "blosc"}, crc32c],
        "index_codecs": [little, crc32c],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [slices, height, width]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _decisive(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Name and plain form of each thing that must be as expected.

    A blosc chunk says itself how it was compressed, and bytes of one byte have no order.
    """
    sharding = next(iter(metadata.get("codecs") or [{}]))
    inner = sharding.get("configuration", {})
    return {
        "zarr_format": str(metadata.get("zarr_format")),
        "node_type": str(metadata.get("node_type")),
        "chunk_grid": json.dumps(metadata.get("chunk_grid"), sort_keys=True),
        "chunk_key_encoding": json.dumps(metadata.get("chunk_key_encoding"), sort_keys=True),
        "codecs": ", ".join(_told(codec) for codec in metadata.get("codecs", ())),
        "chunk_shape": str(list(inner.get("chunk_shape", ()))),
        "inner codecs": ", ".join(_told(codec) for codec in inner.get("codecs", ())),
        "index codecs": ", ".join(_told(codec) for codec in inner.get("index_codecs", ())),
        "index_location": str(inner.get("index_location")),
    }


def _told(codec: Mapping[str, Any]) -> str:
    endian = codec.get("configuration", {}).get("endian", "little")
    return str(codec.get("name")) + ("" if endian == "little" else f" ({endian}-endian)")


def tell(broken: Mapping[int, str], positions: Sequence[int]) -> str:
    """Name damaged slices by index in the array and position in the volume, and what is wrong; some of many."""
    some = [f"slice {n} (position {positions[n]} from the feet) {why}" for n, why in sorted(broken.items())[:5]]
    return "; ".join(some) + (f"; and {len(broken) - 5} more" if len(broken) > 5 else "")
