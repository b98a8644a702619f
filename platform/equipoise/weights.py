"""E and C1 as files that hold numbers alone: what a run keeps of its evaluations, and what predicts elsewhere.

Knows tensors, their names and safetensors' format, in which nothing can be run; must not know which are worth keeping.

A run keeps `weights/step-000100.safetensors` of its newest evaluation and of those that a protocol of `selection` would
choose, where checkpoints, some five times as large, are let go of. Where weights are averaged, too (`optim.ema`), their
means lie in the same file, by names that begin with `ema.`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from equipoise.nets import Inference
from equipoise.writing import refusal, told, write_bytes
from slicestore.errors import InputError

EMA = "ema."


def of(net: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a run's tensors those of E and C1, in main memory; with them their means, if any.

    What has no mean (counters) is taken from the weights.
    """
    own = {name: x for name, x in net.items() if name.partition(".")[0] in Inference.PARTS}
    if average:
        own |= {EMA + name: average.get(name, x) for name, x in own.items()}
    return {name: x.detach().cpu().contiguous() for name, x in own.items()}


def choose(tensors: Mapping[str, Tensor], *, ema: bool, where: Path) -> dict[str, Tensor]:
    """The weights as training left them, or their running means.

    Raises:
        InputError: means are asked for where there are none.
    """
    if not ema:
        return {name: x for name, x in tensors.items() if not name.startswith(EMA)}
    means = {name.removeprefix(EMA): x for name, x in tensors.items() if name.startswith(EMA)}
    if not means:
        raise InputError(
            where,
            found="no running means of weights",
            rule="a run keeps them with --optim.ema",
            remedy="leave --ema out",
        )
    return means


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write or replace a file, whole or not at all.

    Raises:
        StorageError: the disk refused.
    """
    write_bytes(path, packed(tensors))


def packed(tensors: Mapping[str, Tensor]) -> bytes:
    """A file's bytes."""
    from safetensors.torch import save  # here, so that networks train where there is little beside torch

    data: bytes = save(dict(tensors))
    return data


def read(path: Path) -> dict[str, Tensor]:
    """What `write` wrote.

    Raises:
        InputError: no such file, or no safetensors file; nothing in it is unpickled.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            path,
            found="no such file any more",
            rule="a run that trains lets go of weights that no protocol would choose now",
            remedy="ask again, or wait for its end",
        ) from None
    except OSError as error:
        raise refusal(path, error) from error
    return parsed(data, path)


def parsed(data: bytes, where: Path) -> dict[str, Tensor]:
    """The tensors in a file's bytes.

    Raises:
        InputError: they are none; nothing is unpickled.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found: dict[str, Tensor] = load(data)
    except SafetensorError as error:
        pickled = data[:1] == b"\x80" or data[:2] == b"PK"
        raise InputError(
            where,
            found="a pickle or an archive of pickles" if pickled else f"no safetensors file ({error})",
            rule="weights are read from safetensors files, which hold numbers alone: a pickle may run anything",
            remedy="export the model again with `equipoise export`",
        ) from None
    return found


def fill(net: Inference, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Give networks their weights.

    Raises:
        InputError: the tensors are of other networks, or not finite.
    """
    wanted = net.state_dict()
    odd = sorted(set(wanted) ^ set(tensors)) or [n for n, x in wanted.items() if x.shape != tensors[n].shape]
    if odd:
        raise InputError(
            where,
            found=f"weights of another network ({len(odd)} of {len(wanted)} differ in name or shape: {odd[0]})",
            rule="weights go with the settings beside them",
            remedy="export the model again, and keep its files together",
        )
    broken = [name for name, x in tensors.items() if x.is_floating_point() and not torch.isfinite(x).all()]
    if broken:
        raise InputError(
            where,
            found=f"NaN or infinite weights in {len(broken)} of {len(tensors)} tensors, such as {broken[0]}",
            rule="networks predict with finite weights; these are of a run that diverged",
            remedy="choose an earlier evaluation with --choose, or another run",
        )
    net.load_state_dict(dict(tensors))


class Kept:
    """The weights that a run's folder keeps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "weights"

    def path(self, step: int) -> Path:
        """Where the weights after `step` lie, if they were kept."""
        return self.folder / f"step-{step:06d}.safetensors"

    def steps(self) -> list[int]:
        """Of which steps there are weights, in their order."""
        return sorted(int(file.stem.removeprefix("step-")) for file in self.folder.glob("step-*.safetensors"))

    def drop_after(self, step: int) -> None:
        """Let go of what was kept after `step`: the run goes on from there, and may come to other numbers."""
        with told(self.folder):
            for late in (found for found in self.steps() if found > step):
                self.path(late).unlink()

    def keep(self, step: int, tensors: Mapping[str, Tensor], held: Collection[int]) -> None:
        """Write the weights after `step`; of all others those of the steps that are `held` stay.

        Raises:
            StorageError: the disk refused; what was there is there.
        """
        with told(self.folder):
            self.folder.mkdir(exist_ok=True)
        write(self.path(step), tensors)
        with told(self.folder):
            for old in set(self.steps()) - {step, *held}:
                self.path(old).unlink()
