"""A pool of earlier fakes, so that a critic does not forget what it once told apart (Shrivastava et al., CVPR 2017).

Knows batches of images as opaque tensors; must not know networks, and draws from its own generator so that a run with
another pool size sees the same slices and dropout.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor


class PoolState(TypedDict):
    """What a checkpoint holds of a pool: tensors and numbers, for `torch.load(weights_only=True)`."""

    size: int
    images: Tensor | None
    """(filled, B, C, H, W), or None before the first batch."""
    generator: Tensor


class ImagePool:
    """Swaps new batches for earlier ones: SIFA's pool, whose entries are whole batches.

    Until `size` batches were seen each is stored and returned. From then on, with probability 1/2, a random stored
    batch is returned and the new one takes its place; else the new one is returned and not stored. Size 0 is off.
    Entries lie in one tensor on the batches' device; draws come from a CPU generator, so nothing waits for the device.
    """

    def __init__(self, size: int, seed: int) -> None:
        """Start empty.

        Args:
            size: number of batches held.
            seed: of the draws; give each pool and each rank its own.

        Raises:
            ValueError: the size is negative.
        """
        if size < 0:
            raise ValueError(f"pool size {size} must not be negative; 0 switches the pool off")
        self.size = size
        self._filled = 0
        self._images: Tensor | None = None  # (size, *batch.shape), allocated for the first batch
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, batch: Tensor) -> Tensor:
        """Give a batch to show the critic in place of `batch`; a stored one is a copy and carries no gradient.

        Raises:
            ValueError: the batch's shape or type is not that of the stored ones.
        """
        if self.size == 0:
            return batch
        images = self._room(batch)
        if self._filled < self.size:
            images[self._filled].copy_(batch.detach())
            self._filled += 1
            return batch
        # One draw settles both questions: the lower half of the range swaps, and says with which entry.
        entry = int(torch.randint(2 * self.size, (), generator=self._generator, device="cpu"))
        if entry >= self.size:
            return batch
        earlier = images[entry].clone()
        images[entry].copy_(batch.detach())
        return earlier

    def _room(self, batch: Tensor) -> Tensor:
        if self._images is None:
            self._images = torch.empty((self.size, *batch.shape), dtype=batch.dtype, device=batch.device)
        stored = self._images
        if stored.shape[1:] != batch.shape or stored.dtype != batch.dtype:
            raise ValueError(
                f"batch of shape {tuple(batch.shape)} and type {batch.dtype} does not fit a pool of batches "
                f"{tuple(stored.shape[1:])}, {stored.dtype}; drop the last, smaller batch of an epoch"
            )
        if stored.device != batch.device:  # after loading a checkpoint that was mapped elsewhere
            self._images = stored = stored.to(batch.device)
        return stored

    def state_dict(self) -> PoolState:
        """Copy all that the next calls depend on; only filled entries are in it."""
        images = None if self._images is None else self._images[: self._filled].clone()
        return {"size": self.size, "images": images, "generator": self._generator.get_state()}

    def load_state_dict(self, state: PoolState) -> None:
        """Continue exactly where the saved pool was.

        Raises:
            ValueError: the saved pool had another size, so it cannot be continued.
        """
        if state["size"] != self.size:
            raise ValueError(f"pool state is of size {state['size']}, the pool of size {self.size}; they must be equal")
        images = state["images"]
        self._images, self._filled = None, 0
        if images is not None:
            self._filled = len(images)
            self._images = torch.empty((self.size, *images.shape[1:]), dtype=images.dtype, device=images.device)
            self._images[: self._filled].copy_(images)
        self._generator.set_state(state["generator"].cpu())
