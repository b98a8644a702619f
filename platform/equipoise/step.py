"""What a step works on: a batch, the images one forward pass makes of it, the pools the critics are shown.

Knows which network reads which image; knows nothing of losses, of the order of updates (`fused`, `sequential`), of
devices or records.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from equipoise.nets import Features, Sifa
from equipoise.pool import ImagePool

Signals = dict[str, Tensor]
"""What a step says of itself: scalars on the device, by name."""


class Batch(NamedTuple):
    """Slices of both domains, unpaired."""

    source: Tensor
    """`(B, C, H, W)` in [-1, 1]; C slices, of which the middle one is labelled."""
    label: Tensor
    """Class indices of `source`, `(B, H, W)` int64."""
    target: Tensor
    """`(B, C, H, W)` in [-1, 1]."""


class Images(NamedTuple):
    """What one forward makes of a batch, named as in the paper."""

    st: Tensor
    ts: Tensor
    sts: Tensor
    tst: Tensor
    logits_st: Tensor
    logits_t: Tensor
    low_st: Tensor | None
    """C2's logits; None where there is no C2."""
    low_t: Tensor | None

    def detached(self) -> Images:
        """The same numbers, without the graph that made them."""
        made: dict[str, Any] = {name: x if x is None else x.detach() for name, x in self._asdict().items()}
        return Images(**made)


class Pools(NamedTuple):
    """Earlier translations that D_t and D_s are shown."""

    st: ImagePool
    ts: ImagePool

    def turn(self, batch: Batch) -> None:
        """Draw what both show for the next batch."""
        for pool in self:
            pool.turn(len(batch.source), batch.source.device)

    def slots(self) -> list[Tensor]:
        """Where both keep their entries, as far as there is any such place yet."""
        return [pool.slots for pool in self if pool.slots is not None]


def forward(net: Sifa, source: Tensor, target: Tensor) -> Images:
    """Translate both ways, there and back, and segment both target-style images."""
    st = net.generator(source)
    return images_of(net, st, net.encoder(st, "translated"), target, net.encoder(target, "target"))


def images_of(net: Sifa, st: Tensor, seen_st: Features, target: Tensor, seen_t: Features) -> Images:
    """What follows from both target-style images and what the encoder sees in them."""
    size = (target.shape[-2], target.shape[-1])
    ts, low = net.decoder(seen_t.high, target), net.segmenter_low
    return Images(
        st=st,
        ts=ts,
        sts=net.decoder(seen_st.high, st),
        tst=net.generator(ts),
        logits_st=net.segmenter(seen_st, size),
        logits_t=net.segmenter(seen_t, size),
        low_st=low(seen_st, size) if low is not None else None,
        low_t=low(seen_t, size) if low is not None else None,
    )


def saturated(image: Tensor) -> Tensor:
    """Share of pixels at the ends of tanh, where its gradient is dead."""
    return (image.detach().abs() > 0.99).float().mean()


def extents(batch: Batch, made: Mapping[str, Tensor | None]) -> Signals:
    """How much more of the translations and round trips is saturated than of the real images of their domain."""
    real = {"t": saturated(batch.target), "s": saturated(batch.source)}
    return {
        f"saturation/{name}": saturated(image) - real[name[-1]]
        for name in ("st", "ts", "sts", "tst")
        if (image := made.get(name)) is not None
    }
