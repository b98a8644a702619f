"""Staged slices as tensors: gathered, brought to the device and put on a scale when they are asked for.

Knows where slices lie (the device, this machine's memory, shards) and their neighbours; must not know the order in
which training asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slicestore.selection import Name
from slicestore.staging import Staged
from slicestore.store import Limits

Index = Sequence[int] | np.ndarray | Tensor
UPLOAD = 64
"""Slices that go to the device at a time when all of them do."""


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """Some slices of one domain, on the device."""

    image: Tensor
    """`(N, C, H, W)` float32 in [-1, 1] on the training subjects' scale; the middle channel is the slice itself, the
    others its neighbours."""
    label: Tensor | None
    """`(N, H, W)` uint8 class indices, where they are known and may be used."""
    subject: tuple[str, ...]
    """Pseudonym of each slice's subject."""

    def __len__(self) -> int:
        return len(self.image)

    @property
    def area(self) -> np.ndarray | None:
        """(N,) pixels of structures, where labels are known."""
        return None if self.label is None else (self.label > 0).flatten(1).sum(1).cpu().numpy()

    def take(self, index: Index, then: Index | None = None) -> Slices:
        """Some of these slices, in the order of `index`."""
        index = torch.as_tensor(index, dtype=torch.long)
        label = None if self.label is None else self.label[index.to(self.label.device)]
        return Slices(self.image[index.to(self.image.device)], label, tuple(self.subject[i] for i in index.tolist()))


class Shelf:
    """All slices of one split of one domain; where some volumes are labelled, the slices of the others are left out."""

    def __init__(
        self,
        staged: Staged,
        device: torch.device,
        *,
        channels: int,
        clip: bool,
        frame: int = 0,
        resident: bool,
        pool: Executor,
        ahead: Executor,
    ) -> None:
        """Find every slice's neighbours, and upload all slices if they are to live on the device.

        Args:
            staged: the slices.
            device: where they are wanted.
            channels: slices in an image, an odd number.
            clip: whether values beyond the limits become the limits.
            frame: pixels of 0 round every slice, on each side; background in labels.
            resident: whether all of them are kept on the device.
            pool: threads for streamed slices.
            ahead: threads that fetch what is asked for next.
        """
        rows = np.arange(len(staged))
        if staged.area is not None:
            rows = np.flatnonzero([staged.entries[i].labelled for i in staged.subject])
        self._rows, self._stacks = rows, neighbours(staged.subject, staged.position, channels)[rows]
        self.subject = tuple(staged.entries[i].subject for i in staged.subject[rows])
        self.area = None if staged.area is None else staged.area[rows]
        self._size, self._clip, self._device, self._pool, self._ahead = staged.size, clip, device, pool, ahead
        self._scale, self._offset = _line(staged.limits)
        self._frame = frame
        self._next: tuple[bytes, Future[tuple[Tensor, Tensor | None]]] | None = None
        names: list[Name] = ["image"] if staged.area is None else ["image", "label"]
        self._resident = {name: _upload(staged, name, device) for name in names} if resident else {}
        self._staged = None if resident else staged  # what lives on the device needs no memory here

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def image(self) -> Tensor:
        """Images of all slices; float32 of as much memory as that takes, on the device."""
        return self.take(np.arange(len(self))).image

    @property
    def label(self) -> Tensor | None:
        """Labels of all slices, on the device."""
        return None if self.area is None else framed(self._voxels("label", self._rows), self._frame)

    def take(self, index: Index, then: Index | None = None) -> Slices:
        """Some slices, in the order of `index`; `then` is what will be asked next, fetched meanwhile if that helps.

        Raises:
            InputError: damaged data in a store that is streamed.
        """
        index = np.asarray(index, dtype=np.intp)
        if self._next is not None and self._next[0] == index.tobytes():
            image, label = self._next[1].result()
        else:
            image, label = self._fetch(index)
        self._next = None
        if then is not None and self._waits:
            then = np.asarray(then, dtype=np.intp)
            self._next = then.tobytes(), self._ahead.submit(self._fetch, then)
        label = None if label is None else framed(label, self._frame)
        return Slices(framed(self._normalised(image), self._frame), label, tuple(self.subject[i] for i in index))

    @property
    def _waits(self) -> bool:
        """Whether fetching takes longer than handing over to another thread."""
        return self._staged is not None and (self._staged.where == "stream" or self._device.type == "cuda")

    def _fetch(self, index: np.ndarray) -> tuple[Tensor, Tensor | None]:
        stacks = self._stacks[index]
        image = self._voxels("image", stacks.reshape(-1)).view(*stacks.shape, self._size, self._size)
        return image, None if self.area is None else self._voxels("label", self._rows[index])

    def _voxels(self, name: Name, rows: np.ndarray) -> Tensor:
        """Stored values of some rows, on the device."""
        if self._staged is None:
            return self._resident[name].index_select(0, sent(rows, self._device))
        kind = torch.float16 if name == "image" else torch.uint8
        pinned = self._device.type == "cuda"  # torch reuses a pinned buffer only once its copy is done
        out = torch.empty((len(rows), self._size, self._size), dtype=kind, pin_memory=pinned)
        self._staged.take(name, rows, out.numpy(), self._pool)
        return out.to(self._device, non_blocking=True)

    def _normalised(self, image: Tensor) -> Tensor:
        """As `store.normalise`, bit for bit: two roundings, in this order."""
        wide = image.to(torch.float32).mul_(self._scale).sub_(self._offset)
        return wide.clamp_(-1, 1) if self._clip else wide


def framed(image: Tensor, pixels: int) -> Tensor:
    """Images or labels `(..., H, W)` with so many pixels of 0 on each side."""
    return F.pad(image, (pixels,) * 4) if pixels else image


def unframed(image: Tensor, pixels: int) -> Tensor:
    """The inverse of `framed`."""
    return F.pad(image, (-pixels,) * 4) if pixels else image


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device; from pinned memory, so that the caller need not wait for a card."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def neighbours(subject: np.ndarray, position: np.ndarray, channels: int) -> np.ndarray:
    """For each slice the rows of the slices round it, itself in the middle, from the feet up: `(N, channels)`.

    A neighbour lies in the same volume at the next position. Where that was not kept (the volume ends, slices of air
    were dropped, another split has it) the one before it on the way out from the middle takes its place, in the end
    the slice itself.
    """
    half = channels // 2
    place = subject.astype(np.int64) * (int(position.max(initial=0)) + 2 * half + 1) + position  # ascending
    columns = [np.arange(len(place))]
    for way in (-1, 1):
        found = columns[half if way == 1 else 0]
        for distance in range(1, half + 1):
            at = np.searchsorted(place, place + way * distance).clip(max=max(len(place) - 1, 0))
            found = np.where(place[at] == place + way * distance, at, found)
            columns.insert(0 if way == -1 else len(columns), found)
    return np.stack(columns, axis=1)


def _line(limits: Limits) -> tuple[float, float]:
    """Factor and offset of `store.normalise`; float32 numbers."""
    low, high = limits
    return float(np.float32(2 / (high - low))), float(np.float32(1 + low * 2 / (high - low)))


def _upload(staged: Staged, name: Name, device: torch.device) -> Tensor:
    kind = torch.float16 if name == "image" else torch.uint8
    everything = torch.empty((len(staged), staged.size, staged.size), dtype=kind, device=device)
    for start in range(0, len(staged), UPLOAD):
        rows = np.arange(start, min(start + UPLOAD, len(staged)))
        everything[start : start + UPLOAD] = torch.from_numpy(staged.take(name, rows)).to(device)
    return everything
