"""A pool of earlier fakes, so that a critic does not forget what it once told apart (Shrivastava et al., CVPR 2017).

Knows batches of images as opaque tensors; must not know networks, and draws from its own generator so that a run with
another pool size sees the same slices and dropout.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from equipoise.config import PoolBy


class PoolState(TypedDict):
    """What a checkpoint holds of a pool: tensors and numbers, for `torch.load(weights_only=True)`."""

    size: int
    images: Tensor | None
    """(filled, ...) entries, or None before the first batch."""
    generator: Tensor


class _Turn(NamedTuple):
    """What happens to the next batch, as indices of slots on its device: what is shown, and where the new one goes."""

    show: Tensor
    store: Tensor


class ImagePool:
    """Swaps new fakes for earlier ones. An entry is a whole batch, as in SIFA, or a single image, as in CycleGAN.

    Until `size` entries were seen each is stored and returned. From then on, with probability 1/2, a random stored
    entry is returned and the new one takes its place; else the new one is returned and not stored. Size 0 is off.

    What a swap does is drawn before the batch is there (`turn`), from a CPU generator, and handed to the device as
    indices: acting on them (`__call__`) is the same few operations every time, so nothing waits for the device and a
    CUDA graph can hold them.

    SIFA's public code means to do this with whole batches, but hands back a view of the entry after it was overwritten:
    its pool always shows the newest batch, as size 0 does here.
    """

    def __init__(self, size: int, seed: int, by: PoolBy = "batch") -> None:
        """Start empty.

        Args:
            size: number of entries held.
            seed: of the draws; give each pool and each rank its own.
            by: what an entry is.

        Raises:
            ValueError: the size is negative.
        """
        if size < 0:
            raise ValueError(f"pool size {size} must not be negative; 0 switches the pool off")
        self.size, self.by = size, by
        self._filled = 0
        self.slots: Tensor | None = None
        """(size + new entries, ...), allocated for the first batch; the last ones are where new entries come in."""
        self._turn: _Turn | None = None
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def turn(self, batch: int, device: torch.device) -> None:
        """Draw what becomes of the next batch, of `batch` images on `device`; to be called once before each."""
        if self.size == 0:
            return
        news = 1 if self.by == "batch" else batch
        show, store, latest = list[int](), list[int](), dict[int, int]()
        for number in range(news):
            own = self.size + number  # the slot that the new entry comes in
            entry, swaps = self._draw()
            show.append(latest.get(entry, entry) if swaps else own)
            if entry < self.size:
                if entry in latest:  # an entry taken twice within a batch: the last one stays
                    store[latest[entry] - self.size] = latest[entry]
                latest[entry] = own
            store.append(entry if entry < self.size else own)
        drawn = torch.tensor([show, store])
        if self._turn is None or self._turn.show.device != device or len(self._turn.show) != news:
            self._turn = _Turn(*drawn.to(device).unbind())
        else:  # in place, where a recorded step reads them
            for old, new in zip(self._turn, drawn, strict=True):
                old.copy_(new, non_blocking=True)

    def _draw(self) -> tuple[int, bool]:
        """Which entry the next new one replaces (`size` or more: none), and whether that is shown instead."""
        if self._filled < self.size:
            self._filled += 1
            return self._filled - 1, False
        # One draw settles both questions: the lower half of the range swaps, and says with which entry.
        entry = int(torch.randint(2 * self.size, (), generator=self._generator, device="cpu"))
        return entry, entry < self.size

    def __call__(self, batch: Tensor) -> Tensor:
        """Give a batch to show the critic in place of `batch`; a copy, without gradient.

        Raises:
            ValueError: the batch's shape or type is not that of the stored ones.
        """
        if self.size == 0:
            return batch
        assert self._turn is not None, "turn() comes first"
        new = batch.detach().unsqueeze(0) if self.by == "batch" else batch.detach()
        slots = self._room(new)
        slots[self.size :].copy_(new)
        shown = slots.index_select(0, self._turn.show)
        slots.index_copy_(0, self._turn.store, new.to(slots.dtype))
        return shown.view_as(batch)

    def _room(self, new: Tensor) -> Tensor:
        if self.slots is None:
            self.slots = torch.zeros((self.size + len(new), *new.shape[1:]), dtype=new.dtype, device=new.device)
        slots = self.slots
        if slots.shape[1:] != new.shape[1:] or len(slots) != self.size + len(new) or slots.dtype != new.dtype:
            raise ValueError(
                f"batch of shape {tuple(new.shape)} and type {new.dtype} does not fit a pool of "
                f"{(len(slots) - self.size, *slots.shape[1:])}, {slots.dtype}; drop the last, smaller batch of an epoch"
            )
        return slots

    def state_dict(self) -> PoolState:
        """Copy all that the next calls depend on; only filled entries are in it."""
        images = None if self.slots is None else self.slots[: self._filled].clone()
        return {"size": self.size, "images": images, "generator": self._generator.get_state()}

    def load_state_dict(self, state: PoolState, batch: int, device: torch.device) -> None:
        """Continue exactly where the saved pool was, with batches of `batch` images on `device`.

        Raises:
            ValueError: the saved pool had another size, so it cannot be continued.
        """
        if state["size"] != self.size:
            raise ValueError(f"pool state is of size {state['size']}, the pool of size {self.size}; they must be equal")
        images = state["images"]
        self._filled = 0 if images is None else len(images)
        if images is not None:
            news = 1 if self.by == "batch" else batch
            shape = (self.size + news, *images.shape[1:])
            if self.slots is None or self.slots.shape != shape or self.slots.device != device:
                self.slots = torch.zeros(shape, dtype=images.dtype, device=device)
            self.slots[: self._filled].copy_(images)  # in place where there is room: a recorded step reads there
        self._generator.set_state(state["generator"].cpu())
