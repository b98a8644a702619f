"""Whether the images that a run makes still differ from one another, are sharp, and show something to segment.

Knows a fixed probe of slices and three ratios to real images; must not know at which value a run counts as collapsed
or blurry (`monitor`), nor anything of training.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.batches import Cohort
from equipoise.nets import Sifa
from equipoise.validators import structures
from slicestore.store import DOMAINS

COUNT = 16
"""Slices a domain, at most."""
BATCH = 8
"""Of which so many are translated at a time: in evaluation mode no image depends on the others."""


class _Made(NamedTuple):
    """What the networks make of the probe: middle slices `(N, H, W)`, in [-1, 1]."""

    st: Tensor
    ts: Tensor
    foreground: Tensor
    """Of the target slices: 1 where a structure is predicted, 0 elsewhere, NaN where the network says nothing."""


@torch.no_grad()
def probe(net: Sifa, cohort: Cohort) -> dict[str, float]:
    """Compare translations with real images, in evaluation mode.

    The networks draw random numbers where the decoder's dropout is always on.

    Returns:
        What follows; a ratio whose real side is 0 says nothing of the fakes, and is left out. NaN where an image, or
        what is predicted on it, is not finite.

        * `probe/diversity_st`: mean distance between two translations x_st over that between two target slices;
          `probe/diversity_ts`: of x_ts, over that between source slices. 1 is as diverse as real images, and 0 all the
          same. See `distance`.
        * `probe/sharpness_st`, `probe/sharpness_ts`: the same of the energy of their gradients. See `energy`.
        * `probe/foreground`: share of the target slices' pixels in which C1(E(x_t)) sees a structure, over the share
          that structures have of the source domain's training slices. The brain, where that is a class, is none.
    """
    source, target = (cohort.probe(domain, COUNT).image for domain in DOMAINS)
    training = net.training
    net.eval()
    made = _made(net, source, target, cohort.brain_class)
    net.train(training)
    source, target = _middle(source), _middle(target)
    area = cohort.train["source"].area
    labelled = 0.0 if area is None else float(area.mean()) / source[0].numel()
    ratios = {
        "probe/diversity_st": (distance(made.st), distance(target)),
        "probe/diversity_ts": (distance(made.ts), distance(source)),
        "probe/sharpness_st": (energy(made.st), energy(target)),
        "probe/sharpness_ts": (energy(made.ts), energy(source)),
        "probe/foreground": (float(made.foreground.mean()), labelled),
    }
    return {name: fake / real for name, (fake, real) in ratios.items() if real > 0}


def distance(images: Tensor) -> float:
    """Mean absolute difference of two images, over their pixels and over all pairs.

    Args:
        images: `(N, H, W)`.

    Returns:
        A number in [0, inf), 0 of fewer than two images; NaN if a pixel is.
    """
    if len(images) < 2:
        return 0.0
    return float(F.pdist(images.double().flatten(1), p=1).mean()) / images[0].numel()


def energy(images: Tensor) -> float:
    """Mean over images and pixels of the squared difference from a pixel to the next, down plus across.

    Args:
        images: `(N, H, W)`.

    Returns:
        A number in [0, inf); NaN if a pixel is.
    """
    wide = images.double()
    down, across = wide.diff(dim=1).square().mean(), wide.diff(dim=2).square().mean()
    return float(down + across)


def _made(net: Sifa, source: Tensor, target: Tensor, brain_class: int) -> _Made:
    size = (target.shape[-2], target.shape[-1])
    st = [_middle(net.generator(x)) for x in source.split(BATCH)]
    ts, foreground = [], []
    for x in target.split(BATCH):
        seen = net.encoder(x, "target")
        ts.append(_middle(net.decoder(seen.high, x)))
        foreground.append(structures(net.segmenter(seen, size), brain_class))
    return _Made(torch.cat(st), torch.cat(ts), torch.cat(foreground))


def _middle(image: Tensor) -> Tensor:
    """Of stacks of neighbours `(N, C, H, W)` the slices themselves, `(N, H, W)`."""
    return image[:, image.shape[1] // 2]
