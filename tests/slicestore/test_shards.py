"""The thin reader of shards: the same voxels as zarr-python's, and no damage that passes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec
from zarr.storage import MemoryStore

from slicestore.shards import MISSING, Damaged, Format, SliceReader, read, tell

SHAPE = (7, 16, 24)
IMAGE = Format(SHAPE, np.dtype(np.float16))


def voxels(dtype: str = "float16") -> np.ndarray:
    return np.random.default_rng(3).integers(0, 200, SHAPE).astype(dtype)


def written(array: np.ndarray, **how: Any) -> tuple[dict[str, Any], memoryview]:
    """Metadata and shard as zarr-python writes them."""
    objects: dict[str, Any] = {}
    options = {
        "chunks": (1, *SHAPE[1:]),
        "shards": SHAPE,
        "compressors": [BloscCodec(cname="lz4", shuffle="noshuffle"), Crc32cCodec()],
        "config": {"write_empty_chunks": True},
    }
    made = zarr.create_array(MemoryStore(objects), shape=SHAPE, dtype=array.dtype, **(options | how))
    made[:] = array
    shard = objects.get("c/0/0/0")
    return made.metadata.to_dict(), memoryview(shard.to_bytes() if shard else b"")


def chunk(values: np.ndarray) -> bytes:
    packed: bytes = numcodecs.blosc.compress(values, b"zstd", 3, 1)
    return packed + google_crc32c.value(packed).to_bytes(4, "little")


def shard_of(chunks: dict[int, bytes], order: list[int], gap: bytes = b"") -> bytearray:
    """A shard made by hand: chunks in any order, with bytes between them that nobody points at."""
    index, payload = np.full((SHAPE[0], 2), MISSING, dtype="<u8"), b""
    for number in order:
        index[number] = len(payload), len(chunks[number])
        payload += chunks[number] + gap
    return bytearray(payload + index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little"))


def decode(shard: memoryview | bytearray, form: Format = IMAGE, out: np.ndarray | None = None) -> np.ndarray:
    out = np.empty(form.shape, dtype=form.dtype) if out is None else out
    view = memoryview(shard)
    read(lambda start, length: view[start : start + length], len(shard), form, 1000, out)
    return out


def reader(
    shard: memoryview | bytearray, form: Format = IMAGE, block: int = 1 << 20
) -> tuple[SliceReader, list[tuple[int, int]]]:
    """A reader of single slices, and the list of what it fetches."""
    fetched: list[tuple[int, int]] = []

    def fetch(start: int, length: int) -> memoryview:
        fetched.append((start, length))
        return memoryview(bytes(shard))[start : start + length]

    return SliceReader(fetch, len(shard), form, block), fetched


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_it_reads_what_zarr_python_wrote(dtype: str) -> None:
    array = voxels(dtype)
    metadata, shard = written(array)
    form = Format.of(metadata)
    assert (form.shape, form.dtype, form.slices) == (SHAPE, np.dtype(dtype), 7)
    assert np.array_equal(decode(shard, form), array)
    slices, _ = reader(shard, form)
    out = np.empty(SHAPE[1:], dtype=dtype)
    for number in (6, 0, 3):
        slices.slice(number, out)
        assert np.array_equal(out, array[number])


def test_slices_of_one_value_are_there_like_any_other() -> None:
    array = np.zeros(SHAPE, dtype=np.uint8)
    metadata, shard = written(array, fill_value=0)
    assert np.array_equal(decode(shard, Format.of(metadata)), array)


def test_chunks_may_lie_in_any_order(tmp_path: Path) -> None:
    array, order = voxels(), [4, 0, 6, 2, 1, 5, 3]
    shard = shard_of({n: chunk(array[n]) for n in order}, order, gap=b"nobody's")
    assert np.array_equal(decode(shard), array)
    zarr.create_array(
        tmp_path,
        shape=SHAPE,
        dtype="float16",
        chunks=(1, 16, 24),
        shards=SHAPE,
        compressors=[BloscCodec(cname="lz4", shuffle="noshuffle"), Crc32cCodec()],
    )
    (tmp_path / "c" / "0" / "0").mkdir(parents=True)
    (tmp_path / "c" / "0" / "0" / "0").write_bytes(shard)
    assert np.array_equal(zarr.open_array(tmp_path, mode="r")[:], array)  # it was made right


def test_neighbours_are_fetched_together_and_others_apart() -> None:
    array, order = voxels(), list(range(7))
    shard = shard_of({n: chunk(array[n]) for n in order}, order, gap=bytes(9000))
    slices, fetched = reader(shard)
    assert fetched == [(len(shard) - 116, 116)]  # the index: 7 times 16 and a checksum of 4
    fetched.clear()
    wanted = [6, 2, 0, 1, 6]
    out = np.empty((5, *SHAPE[1:]), dtype=np.float16)
    slices.slices(wanted, out)
    assert np.array_equal(out, array[wanted])
    size = len(chunk(array[0])) + 9000
    assert [start // size for start, _ in fetched] == [0, 6]  # 0, 1 and 2 in one go: gaps of less than 16 kB
    assert sum(length for _, length in fetched) < len(shard) - 3 * 9000


def test_a_fetch_takes_no_more_chunks_in_than_its_size_allows() -> None:
    array, order = voxels(), list(range(7))
    shard = shard_of({n: chunk(array[n]) for n in order}, order)
    longest = max(len(chunk(one)) for one in array)
    slices, fetched = reader(shard, block=2 * longest)
    out = np.empty(SHAPE, dtype=np.float16)
    slices.slices(order, out)
    assert np.array_equal(out, array)
    assert len(fetched) == 1 + 4  # the index, then two, two, two and one
    assert max(length for _, length in fetched) <= 2 * longest


def test_every_flipped_bit_of_a_shard_is_noticed() -> None:
    array = voxels()
    _, whole = written(array)
    for at in np.random.default_rng(0).integers(0, 8 * len(whole), 200):
        shard = bytearray(whole)
        shard[at // 8] ^= 1 << (at % 8)
        with pytest.raises(Damaged):
            decode(shard)


def test_all_damaged_slices_are_told_and_the_others_can_be_read() -> None:
    array = voxels()
    chunks = {n: chunk(array[n]) for n in range(7)}
    chunks[2] = chunks[2][:-1] + bytes([chunks[2][-1] ^ 1])
    chunks[5] = chunk(array[5][:-1])  # a chunk with a row too few, and a checksum that is right
    shard = shard_of(chunks, [0, 1, 2, 3, 5, 6])
    wrong = {2: "does not match its checksum", 4: "is missing", 5: "holds another number of pixels"}
    with pytest.raises(Damaged) as told:
        decode(shard)
    assert told.value.slices == wrong
    slices, _ = reader(shard)
    out = np.empty((3, *SHAPE[1:]), dtype=np.float16)
    slices.slices([1, 0, 6], out)
    assert np.array_equal(out, array[[1, 0, 6]])
    for number, why in wrong.items():
        with pytest.raises(Damaged) as told:
            slices.slice(number, out[0])
        assert told.value.slices == {number: why}


def test_a_shard_cut_short_or_with_a_damaged_index_is_damaged_as_a_whole() -> None:
    _, whole = written(voxels())
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    for shard, why in ((whole[:50], "fewer than its index"), (whole[:-9], "checksum"), (flipped, "checksum")):
        for act in (decode, reader):
            with pytest.raises(Damaged, match=why) as told:
                act(shard)
            assert told.value.slices == {}


def test_an_index_that_points_beyond_the_shard_is_refused() -> None:
    index = np.full((7, 2), MISSING, dtype="<u8")
    index[3] = 90, 20
    data = index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    with pytest.raises(Damaged, match="points beyond the shard"):
        decode(bytearray(100) + data)


def test_damage_is_told_by_index_and_position() -> None:
    assert tell({1: "is missing"}, [7, 9]) == "slice 1 (position 9 from the feet) is missing"
    many = tell(dict.fromkeys(range(8), "is missing"), list(range(8)))
    assert many.count("is missing") == 5
    assert many.endswith("; and 3 more")


def test_the_place_to_decode_into_must_fit() -> None:
    _, shard = written(voxels())
    for wrong in (np.empty(SHAPE, np.float32), np.empty((6, 16, 24), np.float16), np.empty((7, 24, 16), np.float16)):
        with pytest.raises(TypeError, match="must be C-contiguous float16"):
            decode(shard, out=wrong)
    with pytest.raises(TypeError, match="must be C-contiguous"):
        decode(shard, out=np.empty((7, 16, 48), np.float16)[:, :, ::2])


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (
            {"compressors": [GzipCodec(), Crc32cCodec()]},
            "inner codecs bytes, gzip, crc32c; this version reads bytes, blosc",
        ),
        ({"compressors": [BloscCodec(cname="lz4", shuffle="noshuffle")]}, "inner codecs bytes, blosc; this"),
        ({"chunks": (7, 16, 24), "shards": None}, "codecs bytes, blosc, crc32c; this version reads sharding_indexed"),
        ({"chunks": (1, 8, 24)}, r"chunk_shape \[1, 8, 24\]; this version reads \[1, 16, 24\]"),
        ({"shards": (1, 16, 24)}, r"chunk_grid .*\[1, 16, 24\].* this version reads .*\[7, 16, 24\]"),
        ({"chunk_key_encoding": {"name": "default", "separator": "."}}, "chunk_key_encoding"),
    ],
)
def test_another_format_is_refused_with_what_differs(how: dict[str, Any], told: str) -> None:
    metadata, _ = written(voxels(), **how)
    with pytest.raises(ValueError, match=told):
        Format.of(metadata)


def test_another_type_order_of_bytes_or_place_of_the_index_is_refused() -> None:
    inner = [BytesCodec(endian="little"), BloscCodec(cname="lz4", shuffle="noshuffle", typesize=2), Crc32cCodec()]
    for codec, told in (
        (ShardingCodec(chunk_shape=(1, 16, 24), codecs=inner, index_location="start"), "index_location start"),
        (
            ShardingCodec(chunk_shape=(1, 16, 24), codecs=[BytesCodec(endian="big"), *inner[1:]]),
            r"inner codecs bytes \(big-endian\), blosc",
        ),
    ):
        array = zarr.create(store=MemoryStore(), shape=SHAPE, dtype="float16", chunks=SHAPE, codecs=[codec])
        with pytest.raises(ValueError, match=told):
            Format.of(array.metadata.to_dict())
    metadata, _ = written(voxels())
    for name, value in (("data_type", "float32"), ("shape", [7, 16])):
        with pytest.raises(ValueError, match="slices are 3D, float16 or uint8"):
            Format.of(copy.deepcopy(metadata) | {name: value})
