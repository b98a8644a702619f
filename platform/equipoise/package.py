"""A model as one folder that can be handed on: numbers, settings and a card, nothing that is unpickled.

Knows the folder's files and how they are held to be whole; must not know runs or studies.

    model.json            schema, sha256 of the other files, what is known of the training
    model.safetensors     weights of E and C1
    preprocessing.json    from a raw volume to the networks' input
    config.json           the settings of the run that trained them
    program.pt2           the same networks as a program of torch.export, which needs torch alone
    README.md             the model card

The sums tell damage and mix-ups. They are no signature: whoever changes a file can change its sum.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equipoise import model_card, weights
from equipoise.config import RunConfig
from equipoise.intake import Intake
from equipoise.nets import Inference
from equipoise.writing import told, write_bytes
from slicestore.errors import InputError

SCHEMA = 1
"""Version of what the files hold."""
FACTS = "model.json"
WEIGHTS, INTAKE, CONFIG, PROGRAM, CARD = (
    "model.safetensors",
    "preprocessing.json",
    "config.json",
    "program.pt2",
    "README.md",
)
MOST_SLICES, MOST_SIDE = 4096, 4096
"""Of an image that the program takes."""


class Package(NamedTuple):
    """What a folder holds."""

    config: RunConfig
    intake: Intake
    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]


def write(
    folder: Path, net: Inference, config: RunConfig, intake: Intake, about: Mapping[str, Any], licence: str
) -> None:
    """Write a model's folder, whole or not at all.

    Args:
        folder: a new or empty one.
        net: E and C1.
        config: of the run.
        intake: of its cohort.
        about: see `model.facts`.
        licence: under what terms it is handed on, in the user's words; "" where nothing was said.

    Raises:
        InputError: the folder has something in it.
        StorageError: the disk refused.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            folder,
            found="something there",
            rule="a model goes into a new or empty folder",
            remedy="name another, or empty it",
        )
    tensors = weights.of(net.state_dict(), {})
    files = {
        WEIGHTS: weights.packed(tensors),
        INTAKE: _json(intake.to_dict()),
        CONFIG: _json(config.to_dict()),
        PROGRAM: program(net, intake),
        CARD: model_card.text(config, intake, about, licence).encode(),
    }
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    told_of = {"format": "equipoise model", "schema": SCHEMA, "about": dict(about), "licence": licence, "sha256": sums}
    partial = folder.with_name(f".{folder.name}.partial")
    with told(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    for name, data in {**files, FACTS: _json(told_of)}.items():
        write_bytes(partial / name, data)
    with told(folder):
        if folder.is_dir():
            folder.rmdir()
        os.replace(partial, folder)


def read(folder: Path) -> Package:
    """Read a model's folder; nothing in it is unpickled, and the program and card are not read.

    Raises:
        InputError: another schema, a file that is missing, or not the one that was written.
    """
    facts = _facts(folder)
    data = {name: _whole(folder / name, facts["sha256"]) for name in (WEIGHTS, INTAKE, CONFIG)}
    name = CONFIG
    try:
        config = RunConfig.from_dict(json.loads(data[name]))
        name = INTAKE
        intake = Intake.from_dict(json.loads(data[name]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            folder / name,
            found=f"settings that this version does not know ({error})",
            rule="a model is read by a version that knows its settings",
            remedy="use the version that exported it, or export the run again with this one",
        ) from error
    return Package(config, intake, weights.parsed(data[WEIGHTS], folder / WEIGHTS), facts["about"])


def program(net: Inference, intake: Intake) -> bytes:
    """The networks as a `torch.export` program, `(B, channels, H, W)` float32 in [-1, 1] -> logits.

    B is free, and so are H and W among multiples of 8. The file has no pickle in it: torch would store an example of
    the input as one, which is left out.
    """
    batch = torch.export.Dim("batch", min=1, max=MOST_SLICES)
    height, width = (torch.export.Dim(name, min=1, max=MOST_SIDE // 8) for name in ("height_8", "width_8"))
    example = torch.zeros(2, intake.channels, 64, 72)
    device = next(net.parameters()).device
    net = net.cpu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own doing
        made = torch.export.export(net, (example,), dynamic_shapes=({0: batch, 2: 8 * height, 3: 8 * width},))
        made.example_inputs = None
        file = io.BytesIO()
        torch.export.save(made, file)
    net.to(device)
    return file.getvalue()


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        schema = found["schema"]
        _ = found["sha256"].items(), found["about"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            path,
            found=f"no readable account of a model ({type(error).__name__})",
            rule="a model's folder holds its model.json",
            remedy="export the model again with `equipoise export`",
        ) from None
    if schema != SCHEMA:
        raise InputError(
            path,
            found=f"a model of schema {schema}",
            rule=f"this version reads schema {SCHEMA}",
            remedy="use the version that exported it, or export the run again with this one",
        )
    return found


def _whole(path: Path, sums: Mapping[str, str]) -> bytes:
    """A file's bytes, once they are those that were written."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            path,
            found=f"no readable file ({type(error).__name__})",
            rule="a model's files stay together",
            remedy="copy the whole folder again",
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != sums.get(path.name):
        raise InputError(
            path,
            found=f"sha256 {found[:16]}...",
            rule=f"model.json promises {sums.get(path.name, 'none')[:16]}...",
            remedy="the file was damaged, replaced or tampered with: copy the model again from whoever exported it",
        )
    return data


def _json(data: Mapping[str, Any]) -> bytes:
    """Strict JSON, which has no NaN: non-finite values are written by their names, as in records."""
    return json.dumps(_strict(data), indent=2, allow_nan=False).encode() + b"\n"


def _strict(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {name: _strict(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_strict(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data
