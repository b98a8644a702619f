"""TensorBoard's event files: the scalars in them.

Knows the few fields of an `Event` that hold a scalar; knows nothing of what scalars mean. TensorFlow is not needed: the
files are TFRecords, and the messages in them are described by tensorboardX. Source: TensorFlow's core/util/event.proto,
core/framework/summary.proto and core/framework/tensor.proto.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from slicestore.errors import InputError
from slicestore.tfrecord import records

Scalar = tuple[str, int, float]
"""Tag, step, value."""

_TYPES = {1: "<f4", 2: "<f8", 19: "<f2"}
"""Of a tensor's bytes, by its DataType: float, double, half."""


def scalars(path: Path) -> tuple[list[Scalar], str | None]:
    """Scalars in the order in which they were written, and where the file is damaged, if it is.

    A file that is still being written, or whose writer was killed, ends within a record: that is damage like any other,
    and what comes before it counts.

    Raises:
        InputError: tensorboardX is missing.
    """
    event = _event()
    found: list[Scalar] = []
    try:
        for data in records(path):
            message = _parsed(event, data, path)
            for value in message.summary.value:
                number = _number(value)
                if number is not None:
                    found.append((value.tag, message.step, number))
    except InputError as damage:
        return found, f"{damage.where}: {damage.found}; {damage.rule}"
    return found, None


def _number(value: Any) -> float | None:
    """The scalar in a Summary.Value; None where there is none, such as an image or a text."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if not value.HasField("tensor") or value.tensor.dtype not in _TYPES:
        return None
    tensor = value.tensor
    numbers = (
        np.frombuffer(tensor.tensor_content, _TYPES[tensor.dtype])
        if tensor.tensor_content
        else np.array([*tensor.float_val, *tensor.double_val])
    )
    return float(numbers[0]) if len(numbers) == 1 else None


def _event() -> Any:
    try:
        return import_module("tensorboardX.proto.event_pb2").Event
    except ImportError:
        raise InputError(
            "TensorBoard event files",
            found="no tensorboardX",
            rule="it describes the messages in them",
            remedy="pip install tensorboardX, which comes with ray[tune]; or export the charts as CSV",
        ) from None


def _parsed(event: Any, data: bytes, path: Path) -> Any:
    errors = import_module("google.protobuf.message")
    try:
        return event.FromString(data)
    except errors.DecodeError:
        raise InputError(
            path, found="a record that is no Event", rule="TensorBoard reads Events", remedy="give an event file"
        ) from None
