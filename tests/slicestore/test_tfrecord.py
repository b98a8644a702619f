"""TFRecord framing and Example messages, held against protobuf's own library and against bytes worked out by hand."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from slicestore import tfrecord
from slicestore.errors import InputError

F = descriptor_pb2.FieldDescriptorProto


@pytest.fixture(scope="module")
def example() -> Any:
    """The class of `tf.train.Example`, made by protobuf from the published example.proto and feature.proto."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> Any:
        made = file.message_type.add(name=name)
        for field, number, label, kind, type_name in fields:
            made.field.add(name=field, number=number, label=label, type=kind, type_name=type_name or None)
        return made

    one, many = F.LABEL_OPTIONAL, F.LABEL_REPEATED
    message("BytesList", ("value", 1, many, F.TYPE_BYTES, ""))
    message("FloatList", ("value", 1, many, F.TYPE_FLOAT, ""))
    message("Int64List", ("value", 1, many, F.TYPE_INT64, ""))
    feature = message("Feature", *((f"{k}_list", n, one, F.TYPE_MESSAGE, f".tensorflow.{k.capitalize()}List")
                                   for n, k in enumerate(("bytes", "float", "int64"), start=1)))  # fmt: skip
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message("Features", ("feature", 1, many, F.TYPE_MESSAGE, ".tensorflow.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=one, type=F.TYPE_STRING)
    entry.field.add(name="value", number=2, label=one, type=F.TYPE_MESSAGE, type_name=".tensorflow.Feature")
    message("Example", ("features", 1, one, F.TYPE_MESSAGE, ".tensorflow.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


NUMBERS = [0, 1, 127, 128, 256, 2**31, 2**63 - 1, -1, -(2**63)]
"""About every length of a varint, and both signs."""


def test_protobuf_reads_what_we_write(example: Any) -> None:
    ours = tfrecord.encode({"numbers": NUMBERS, "bytes": [b"", b"\x00\xff" * 300], "größe": [3]})
    theirs = example.FromString(ours).features.feature
    assert set(theirs) == {"numbers", "bytes", "größe"}
    assert list(theirs["numbers"].int64_list.value) == NUMBERS
    assert list(theirs["bytes"].bytes_list.value) == [b"", b"\x00\xff" * 300]
    assert list(theirs["größe"].int64_list.value) == [3]


def test_we_read_what_protobuf_writes_and_leave_out_what_the_layout_lacks(example: Any) -> None:
    message = example()
    message.features.feature["numbers"].int64_list.value.extend(NUMBERS)
    message.features.feature["bytes"].bytes_list.value.extend([b"", b"abc" * 100])
    message.features.feature["weights"].float_list.value.extend([0.5, 1.5])
    message.features.feature["nothing"].SetInParent()
    found = tfrecord.decode(message.SerializeToString())
    assert found == {"numbers": NUMBERS, "bytes": [b"", b"abc" * 100]}


def test_numbers_with_a_field_each_and_fields_of_a_later_version_are_read(example: Any) -> None:
    # Features { feature { key: "n" value { int64_list { value: 5 value: 300 } } } }, then fields 7 (fixed32) and 8
    # (fixed64) that no version has, by hand: tag = number << 3 | wire type.
    int64_list = b"\x08\x05\x08\xac\x02"
    entry = b"\x0a\x01n\x12\x07\x1a\x05" + int64_list
    unknown = b"\x3d\x01\x02\x03\x04\x41\x01\x02\x03\x04\x05\x06\x07\x08"
    message = b"\x0a\x0e\x0a\x0c" + entry + unknown
    assert list(example.FromString(message).features.feature["n"].int64_list.value) == [5, 300]
    assert tfrecord.decode(message) == {"n": [5, 300]}


@pytest.mark.parametrize("keep", range(1, 30))
def test_a_message_cut_anywhere_is_refused(keep: int) -> None:
    whole = tfrecord.encode({"name": [1, 2], "data": [b"0123456789"]})
    assert len(whole) > 30
    with pytest.raises(InputError, match=r"^a\.tfrecord, record 3: found no tf\.train\.Example"):
        tfrecord.decode(whole[:keep], "a.tfrecord, record 3")


@pytest.mark.parametrize(
    "data", [b"\x0b", b"\x08\x01", b"\xff" * 11, b"\x0a\x05\x0a\x03\x0a\x01\xff"], ids=["group", "int", "long", "utf"]
)
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="check that the file was written for SIFA"):
        tfrecord.decode(data, "x")


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_record_is_framed_as_published(tmp_path: Path) -> None:
    """Length 9, its masked crc32c; the data, whose crc32c e3069283 is RFC 3720's check value; masked by hand."""
    tfrecord.write(tmp_path / "a", [b"123456789"])
    # e3069283 turned right by 15 bits is 2507c60d; plus a282ead8 is c78ab0e5.
    crc = 0xE3069283
    assert (crc >> 15 | crc << 17) & 0xFFFFFFFF == 0x2507C60D
    data = (tmp_path / "a").read_bytes()
    assert data[:8] == b"\x09" + bytes(7)
    assert data[12:21] == b"123456789"
    assert data[21:] == bytes.fromhex("e5b08ac7")
    assert len(data) == 25


def test_records_come_back_in_order_and_are_counted(tmp_path: Path) -> None:
    written = [b"", b"a" * 70_000, b"last"]
    tfrecord.write(tmp_path / "a", iter(written))
    assert list(tfrecord.records(tmp_path / "a")) == written
    assert tfrecord.count(tmp_path / "a") == 3
    (tmp_path / "none").touch()
    assert list(tfrecord.records(tmp_path / "none")) == []
    assert tfrecord.count(tmp_path / "none") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "none"]


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("byte", [0, 9, 14, 25, 33, 40, 60])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, byte: int, bit: int) -> None:
    """Two records of 16 + 12 and 16 + 20 bytes: lengths, both checksums and data of each are hit."""
    file = tmp_path / "a.tfrecord"
    tfrecord.write(file, [b"x" * 12, b"y" * 20])
    data = bytearray(file.read_bytes())
    assert len(data) == 64
    data[byte] ^= 1 << bit
    file.write_bytes(data)
    with pytest.raises(InputError, match=rf"a\.tfrecord, record {1 if byte < 28 else 2}: .*copy or download the file"):
        list(tfrecord.records(file))


@pytest.mark.parametrize("keep", [1, 11, 12, 20, 27, 29, 63])
def test_a_file_cut_short_is_refused_with_the_record(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "a.tfrecord"
    tfrecord.write(file, [b"x" * 12, b"y" * 20])
    file.write_bytes(file.read_bytes()[:keep])
    for read in (tfrecord.count, lambda path: list(tfrecord.records(path))):
        with pytest.raises(InputError, match=f"record {1 if keep < 28 else 2}: found .* bytes"):
            read(file)


def test_compressed_and_missing_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gzip.compress(b"x" * 100))
    with pytest.raises(InputError, match="gzip -d"):
        list(tfrecord.records(tmp_path / "a"))
    with pytest.raises(InputError, match="No such file"):
        tfrecord.count(tmp_path / "b")


def test_a_killed_writer_leaves_no_file(tmp_path: Path) -> None:
    def failing() -> Any:
        yield b"one"
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        tfrecord.write(tmp_path / "a", failing())
    assert not (tmp_path / "a").exists()
