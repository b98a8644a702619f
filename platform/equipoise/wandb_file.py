"""Reading W&B's offline files back: what a run has logged, without an account.

Knows the transaction log (blocks of 32 KiB; records with checksum, length and kind, split over blocks where they do not
fit) and the protobuf records in it. wandb 0.31 ships no public reader.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slicestore.errors import InputError

_FILE_HEADER = struct.Struct("<4sHB")
_CHUNK_HEADER = struct.Struct("<IHB")
_BLOCK = 32 * 1024
_WHOLE, _FIRST, _LAST = 1, 2, 4


def records(path: Path) -> Iterator[Any]:
    """Every record of the file, as W&B's protobuf message; a tail that a kill cut off is left out.

    Raises:
        InputError: the file is no W&B log.
    """
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # generated code, without types
    for payload in _payloads(path):
        record = messages.Record()
        record.ParseFromString(payload)
        yield record


def history(path: Path) -> list[dict[str, Any]]:
    """Logged rows, in order; a row's values are what `json` reads, so NaN stays NaN."""
    return [
        {_key(item): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def summary(path: Path) -> dict[str, Any]:
    """The last value of every summary key."""
    found: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "summary":
            found |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
    return found


def _key(item: Any) -> str:
    return ".".join(item.nested_key) if item.nested_key else str(item.key)


def _payloads(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    if len(data) < _FILE_HEADER.size or _FILE_HEADER.unpack_from(data)[:2] != (b":W&B", 0xBEE1):
        raise InputError(
            path,
            found=f"{len(data)} bytes without W&B's header",
            rule="a W&B log begins with ':W&B'",
            remedy="give a run-*.wandb file of an offline run",
        )
    position, pending = _FILE_HEADER.size, b""
    while position + _CHUNK_HEADER.size <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _CHUNK_HEADER.size:  # too little for a header: padding
            position += left
            continue
        _, length, kind = _CHUNK_HEADER.unpack_from(data, position)
        position += _CHUNK_HEADER.size
        if not kind or position + length > len(data):
            return
        chunk = data[position : position + length]
        position += length
        pending = chunk if kind in (_WHOLE, _FIRST) else pending + chunk
        if kind in (_WHOLE, _LAST):
            yield pending
