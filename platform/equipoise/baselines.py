"""What SIFA is compared with: its own encoder and segmenters, trained without its game.

Knows which images and labels each method learns from; must not know how SIFA is trained beyond `fit`, nor studies,
tables or records.

| method                  | E and C1 learn from                | what it tells                                    |
|-------------------------|------------------------------------|--------------------------------------------------|
| `source_only`           | x_s, y_s                           | how far apart the domains are                    |
| `matched`               | x_s inverted and matched, y_s      | how far intensities alone carry                  |
| `cyclegan_then_segment` | x_st, y_s, by a CycleGAN's G       | what translation carries over, by itself         |
| `sifa`                  | x_st, y_s and x_t, together with G | what learning all at once adds                   |
| `supervised`            | x_t, y_t                           | what the same networks reach with target labels  |

All share networks, initial weights, losses, Adam and rates of the segmenters, order of slices, evaluation, and the
number of segmenters' updates. CycleGAN-then-segment trains twice as long as SIFA, since its generator comes first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from skimage.filters import threshold_otsu
from torch import Tensor, nn

from equipoise.batches import Cohort
from equipoise.config import RunConfig
from equipoise.nets import Sifa
from equipoise.objective import segmentation_terms
from equipoise.panels import Panels
from equipoise.ranks import Ranks
from equipoise.schedules import rates
from equipoise.shelf import Slices, framed
from equipoise.speed import autocast
from equipoise.train import Progress, Run, fit, look
from slicestore.errors import InputError
from slicestore.store import DOMAINS, Store

QUANTILES = 257
"""Points of a curve of grey values, in air and in tissue."""
Make = Callable[[int], tuple[Tensor, Tensor]]
"""A step's number, counted from 1 -> images `(B, C, H, W)` and their labels `(B, H, W)` int64."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a method has reached at an evaluation."""

    step: int
    """Updates of the segmenters so far."""
    quality: dict[str, float]
    """See `metrics.evaluate`; validation subjects, which no method trains on. Where a method does not translate, G is
    the identity, so that `quality/translated_dice` is of source slices as they are."""
    panels: Panels
    """Probe slices, without the images that no trained network of the method makes."""
    state: Callable[[], dict[str, Tensor]]
    """A copy of all weights, made when called."""


def sifa(config: RunConfig, cohort: Cohort) -> Iterator[Look]:
    """The method itself; ends early where the run diverges."""
    for progress in fit(config, cohort):
        if progress.panels is not None:
            quality = {k: v for k, v in progress.signals.items() if k.startswith("quality/")}
            yield Look(progress.step, quality, progress.panels, partial(_weights, progress))


def source_only(config: RunConfig, cohort: Cohort) -> Iterator[Look]:
    """No adaptation: trained on source slices, shown target slices."""

    def make(number: int) -> tuple[Tensor, Tensor]:
        batch = cohort.batch(config, number)
        return batch.source, batch.label

    return segment(config, cohort, make, nn.Identity())


def matched(config: RunConfig, cohort: Cohort) -> Iterator[Look]:
    """No network translates: one curve of grey values for all images, see `Curve`."""
    return segment_translated(config, cohort, Curve.between(*(cohort.train[domain].image for domain in DOMAINS)))


class Curve(nn.Module):
    """Source images with the target's grey values: inverted in tissue, and matched in histogram.

    Blood is bright in TOF and dark in SWI, while air is dark in both. So air and tissue, parted by Otsu's threshold in
    each domain, get curves of their own: air's rises and tissue's falls, each taking the source's quantiles to the
    target's. What is beyond the training images' range becomes its end.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        """Through points, x ascending."""
        super().__init__()
        self.register_buffer("x", x)
        self.register_buffer("y", y)

    @classmethod
    def between(cls, source: Tensor, target: Tensor) -> Curve:
        """Of training images `(N, C, H, W)` of both domains, on their scales."""
        levels = np.linspace(0, 1, QUANTILES)
        (air_s, tissue_s), (air_t, tissue_t) = (_parted(images) for images in (source, target))
        x = np.concatenate([np.quantile(air_s, levels), np.quantile(tissue_s, levels)])
        y = np.concatenate([np.quantile(air_t, levels), np.quantile(tissue_t, 1 - levels)])
        x, first = np.unique(x, return_index=True)
        return cls(*(torch.from_numpy(part.astype(np.float32)).to(source.device) for part in (x, y[first])))

    def forward(self, image: Tensor) -> Tensor:
        """Images of any shape; the same shape."""
        x, y = self.get_buffer("x"), self.get_buffer("y")
        right = torch.searchsorted(x, image.contiguous()).clamp(1, len(x) - 1)
        share = ((image - x[right - 1]) / (x[right] - x[right - 1])).clamp(0, 1)
        return y[right - 1].lerp(y[right], share)


def _parted(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Values of air and of tissue in the images' middle channels."""
    values = images[:, images.shape[1] // 2].cpu().numpy().ravel()
    bright = values > threshold_otsu(values)
    return values[~bright], values[bright]


def cyclegan_then_segment(config: RunConfig, cohort: Cohort) -> Iterator[Look]:
    """Translate first, segment later: two trainings, of which the second cannot change the first."""
    return segment_translated(config, cohort, cyclegan(config, cohort))


def cyclegan(config: RunConfig, cohort: Cohort) -> nn.Module:
    """G of a run without any segmentation loss, as its last step left it: frozen, in evaluation mode."""
    for progress in fit(config.at("loss.segmentation", 0.0).at("evaluations", 1), cohort):
        last = progress
    net = Sifa(config.net)
    net.load_state_dict(last.state().shared["net"])
    return net.generator.to(cohort.device).eval().requires_grad_(False)


def segment_translated(config: RunConfig, cohort: Cohort, generator: nn.Module) -> Iterator[Look]:
    """Train on G(x_s) with the source's labels; G, frozen, stays as it is."""

    def make(number: int) -> tuple[Tensor, Tensor]:
        batch = cohort.batch(config, number)
        with torch.no_grad(), autocast(config.speed, cohort.device):
            return generator(batch.source).float(), batch.label

    return segment(config, cohort, make, generator)


def supervised(config: RunConfig, cohort: Cohort, store: Store) -> Iterator[Look]:
    """The oracle: trained on target slices with **their labels**, which nothing else in this project learns from."""
    taught = taught_by_target(config, cohort, store)

    def make(number: int) -> tuple[Tensor, Tensor]:
        batch = taught.batch(config, number)
        return batch.source, batch.label

    return segment(config, cohort, make, nn.Identity())


def taught_by_target(config: RunConfig, cohort: Cohort, store: Store) -> Cohort:
    """A cohort in which labelled target slices of training subjects stand where source slices do.

    No cohort hands out these labels, so they are read from the store here, and all such slices are kept on the device.

    Raises:
        ValueError: slices, not subjects, are split: whose labels validate is then not the store's to say.
        InputError: fewer labelled target training slices than a batch.
    """
    if config.data.split != "subject":
        raise ValueError(f"data.split = {config.data.split!r}: must be 'subject' for an oracle on target labels")
    shelf, entries = cohort.train["target"], store.select("target", "train")
    rows = np.flatnonzero(np.repeat([e.labelled for e in entries], [e.slices for e in entries]))
    if len(rows) < config.batch:
        raise InputError(
            store.path,
            found=f"{len(rows)} labelled target training slices",
            rule=f"the oracle learns from batches of {config.batch} different ones",
            remedy="prepare a store with target masks, or leave the oracle out",
        )
    label = np.concatenate([store.read(e, "label") for e in entries if e.labelled])
    found = shelf.take(rows)
    taught = copy.copy(cohort)
    drawn = framed(torch.from_numpy(label).to(cohort.device), config.data.frame)
    slices = Slices(found.image, drawn, found.subject)
    taught.train = {"source": slices, "target": shelf}
    return taught


def segment(config: RunConfig, cohort: Cohort, make: Make, generator: nn.Module) -> Iterator[Look]:
    """Train E, C1 and C2 alone, `config.steps` times, on what `make` gives.

    Args:
        config: the run that the method is compared with.
        cohort: whose validation subjects are looked at.
        make: a step's images and labels.
        generator: what stands before E when source slices are validated.

    Raises:
        ValueError: the run has several workers.
    """
    if config.workers != 1:
        raise ValueError(f"workers = {config.workers}: must be 1 for a method of `baselines`")
    torch.set_flush_denormal(True)  # as `fit` does
    if config.net.encoder_norm == "batch_per_domain":
        config = config.at("net.encoder_norm", "batch")  # of one domain there is one set of statistics
    run = Run.start(config, cohort.device, Ranks(alone=True), epoch_steps=cohort.epoch_steps(config))
    run.net.add_module("generator", generator)
    due = {round(config.steps * k / config.evaluations) for k in range(1, config.evaluations + 1)}
    for number in range(1, config.steps + 1):
        _update(run, *make(number), number)
        if number in due:
            yield _look(run.net, cohort, number)


def _update(run: Run, image: Tensor, label: Tensor, number: int) -> None:
    """One step of E, C1 and C2 along the segmentation losses that SIFA has on x_st."""
    net, players, config = run.net, run.players, run.config
    now = rates(config, number, run.epoch_steps)
    players.set_rates(now.images, now.segmenter)
    size = (image.shape[-2], image.shape[-1])
    with autocast(config.speed, image.device):
        features = net.encoder(image)
        logits = net.segmenter(features, size)
        low = net.segmenter_low(features, size) if net.segmenter_low is not None else None
    terms = segmentation_terms(logits, low, label, config.loss, run.ranks.total)
    loss = terms["loss/segmentation"]
    if low is not None:
        loss = loss + config.loss.seg_low * terms["loss/seg_low"]
    players.move({"segmenter": torch.autograd.grad(loss, players["segmenter"])}, run.ranks)


def _weights(progress: Progress) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = progress.state().shared["net"]
    return weights


def _look(net: Sifa, cohort: Cohort, number: int) -> Look:
    quality, panels = look(net, cohort)
    made = Panels({name: panels.images[name] for name in ("x_s", "x_st", "x_t")}, panels.masks)
    return Look(number, quality, made, lambda: copy.deepcopy(net.state_dict()))
