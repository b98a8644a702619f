"""TFRecord files and the messages in them, without TensorFlow.

Knows the framing (length, data, a masked crc32c of each) and as much of protobuf as a `tf.train.Example` takes; knows
nothing of what the features mean. Sources: TensorFlow's lib/io/record_writer.h and example/feature.proto; protobuf's
description of its encoding.

    record    uint64 length | uint32 crc of it | data | uint32 crc of it          little-endian, one after another
    Example   1: Features;  Features  1: map<string, Feature>
    Feature   one of  1: BytesList  2: FloatList  3: Int64List;  each list  1: repeated value
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from slicestore.errors import InputError

Features = dict[str, list[int] | list[bytes]]
"""Features of a message by name; empty ones and lists of floats are left out."""

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
BYTES_LIST, INT64_LIST = 1, 3
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
REMEDY = "copy or download the file again"


# --- files ------------------------------------------------------------------------------------------------------------


def records(path: str | Path) -> Iterator[bytes]:
    """Give the records of a file, each verified.

    Raises:
        InputError: no such file; a record cut short or with a checksum that does not match, naming file and record.
    """
    with _opened(Path(path)) as file:
        for where, length in _frames(Path(path), file):
            data = file.read(length)
            if FOOTER.unpack(file.read(FOOTER.size))[0] != _masked(data):
                raise _damaged(where, "data that its checksum does not match", "a record matches its crc32c")
            yield data


def count(path: str | Path) -> int:
    """Count a file's records by their lengths, without reading them.

    Raises:
        InputError: as `records`, but for the data's checksums.
    """
    with _opened(Path(path)) as file:
        return sum(bool(file.seek(length + FOOTER.size, os.SEEK_CUR)) for _, length in _frames(Path(path), file))


def write(path: str | Path, messages: Iterable[bytes]) -> None:
    """Write records into a file that appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        for data in messages:
            length = struct.pack("<Q", len(data))
            file.write(length + FOOTER.pack(_masked(length)) + data + FOOTER.pack(_masked(data)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _opened(path: Path) -> BinaryIO:
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(
            path,
            found=error.strerror or type(error).__name__,
            rule="TFRecords are read from a file",
            remedy="check the path and its permissions",
        ) from None
    if file.read(2) == b"\x1f\x8b":
        file.close()
        raise InputError(path, found="gzip", rule="TFRecords are read uncompressed", remedy="unpack it with `gzip -d`")
    file.seek(0)
    return file


def _frames(path: Path, file: BinaryIO) -> Iterator[tuple[str, int]]:
    """Name and length of each record, with the file at its data; the caller moves on to the record's end."""
    total, number = os.fstat(file.fileno()).st_size, 0
    while header := file.read(HEADER.size):
        where = f"{path}, record {(number := number + 1)}"
        if len(header) < HEADER.size:
            raise _damaged(where, f"{len(header)} bytes", f"a record begins with {HEADER.size}")
        length, crc = HEADER.unpack(header)
        if crc != _masked(header[:8]):
            raise _damaged(where, "a length that its checksum does not match", "a TFRecord's length matches its crc32c")
        if (left := total - file.tell()) < length + FOOTER.size:
            raise _damaged(where, f"{left} bytes", f"its length promises {length + FOOTER.size}")
        yield where, length


def _masked(data: bytes) -> int:
    """Checksum of bytes, turned and shifted: a crc of data that holds its own crc would be weak."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _damaged(where: str, found: str, rule: str) -> InputError:
    return InputError(where, found=found, rule=rule, remedy=REMEDY)


# --- messages ---------------------------------------------------------------------------------------------------------


def encode(features: Mapping[str, Sequence[int] | Sequence[bytes]]) -> bytes:
    """Make a `tf.train.Example` of lists of integers or of bytes."""
    entries = []
    for name, values in features.items():
        if all(isinstance(value, bytes) for value in values):
            kind, body = BYTES_LIST, b"".join(_field(1, value) for value in values if isinstance(value, bytes))
        else:
            kind, body = INT64_LIST, _field(1, b"".join(_varint(int(value)) for value in values))
        entries.append(_field(1, _field(1, name.encode()) + _field(2, _field(kind, body))))
    return _field(1, b"".join(entries))


def decode(data: bytes, where: object = "message") -> Features:
    """Read a `tf.train.Example`.

    Raises:
        InputError: bytes that are no such message.
    """
    try:
        return _features(memoryview(data))
    except (IndexError, ValueError) as error:
        raise InputError(
            where,
            found=f"no tf.train.Example ({error})",
            rule="a record holds one",
            remedy="check that the file was written for SIFA",
        ) from None


def _features(data: memoryview) -> Features:
    found: Features = {}
    for features in _messages(data, 1):
        for entry in _messages(features, 1):
            name = "".join(str(part, "utf-8") for part in _messages(entry, 1))
            for feature in _messages(entry, 2):
                texts = [bytes(value) for part in _messages(feature, BYTES_LIST) for value in _messages(part, 1)]
                numbers = [value for part in _messages(feature, INT64_LIST) for value in _integers(part)]
                if texts or numbers:
                    found[name] = texts or numbers
    return found


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """Bytes of every occurrence of a length-delimited field."""
    for field, value in _fields(data):
        if field == wanted:
            if isinstance(value, int):
                raise ValueError(f"field {field} is a number")
            yield value


def _integers(data: memoryview) -> Iterator[int]:
    """Values of an Int64List, packed into one field or a field each."""
    for field, value in _fields(data):
        if field != 1:
            continue
        if isinstance(value, int):
            yield _signed(value)
            continue
        at = 0
        while at < len(value):
            number, at = _read_varint(value, at)
            yield _signed(number)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message; floating-point values come as their bytes."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == VARINT:
            number, at = _read_varint(data, at)
            yield field, number
            continue
        if wire == LENGTH:
            size, at = _read_varint(data, at)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if len(data) - at < size:
            raise ValueError(f"field {field} of {size} bytes where {len(data) - at} are left")
        yield field, data[at : at + size]
        at += size


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Read seven bits a byte, the lowest first; also where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("cut short")
        byte, at = data[at], at + 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError("a number of more than ten bytes")


def _signed(number: int) -> int:
    """Undo two's complement in 64 bits."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _field(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | LENGTH) + _varint(len(body)) + body
