"""A store's slices as training batches and evaluation sets.

Knows how slices are staged, scaled, ordered and shared between ranks; knows nothing of networks' losses or of Ray.

The order is a pure function of seed and step: each domain runs through one permutation after another of its slices, so
that a run continues at any step without a state; a batch holds no slice twice, and the ranks' shares are disjoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equipoise.config import RunConfig
from equipoise.step import Batch
from slicestore.errors import InputError
from slicestore.splits import Part
from slicestore.store import DOMAINS, UNLABELLED, Domain, Store, normalise


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """Slices of some subjects of one domain."""

    image: Tensor
    """`(N, 1, H, W)` float32 in [-1, 1] on the training subjects' scale."""
    label: Tensor | None
    """`(N, H, W)` uint8 class indices, where they are known and may be used."""
    subject: tuple[str, ...]
    """Pseudonym of each slice's subject."""

    def __len__(self) -> int:
        return len(self.image)

    def take(self, index: Tensor | Sequence[int]) -> Slices:
        """Some of these slices, in the order of `index`."""
        index = torch.as_tensor(index, dtype=torch.long)
        label = None if self.label is None else self.label[index.to(self.label.device)]
        return Slices(self.image[index.to(self.image.device)], label, tuple(self.subject[i] for i in index.tolist()))


class Cohort:
    """Everything a run sees of a store, staged on one device."""

    def __init__(self, store: Store, config: RunConfig, device: torch.device) -> None:
        """Stage all slices.

        Raises:
            InputError: the store is not the one the run is bound to, has other classes than the network, or fewer
                training slices than a batch.
        """
        if config.data.cohort not in ("", store.fingerprint):
            raise InputError(
                store.path,
                found=f"cohort {store.fingerprint}",
                rule=f"this run belongs to cohort {config.data.cohort}",
                remedy="give the store the run was started with, or start a new run",
            )
        if store.classes != config.net.classes:
            raise InputError(
                store.path,
                found=f"{store.classes} classes",
                rule=f"net.classes is {config.net.classes}",
                remedy=f"set net.classes to {store.classes}, or prepare the store from other masks",
            )
        self.fingerprint, self.classes, self.device = store.fingerprint, store.classes, device
        pooled = config.data.limits == "pooled"
        self.train = {domain: _slices(store, domain, "train", pooled, device) for domain in DOMAINS}
        self.val = {domain: _slices(store, domain, "val", pooled, device) for domain in DOMAINS}
        for domain, slices in self.train.items():
            if len(slices) < config.batch:
                raise InputError(
                    store.path,
                    found=f"{len(slices)} {domain} training slices",
                    rule=f"a batch takes {config.batch} different ones",
                    remedy=f"prepare more volumes, or set batch to at most {len(slices)}",
                )

    def batch(self, config: RunConfig, step: int, rank: int = 0) -> Batch:
        """The share of `rank` in the batch of `step`, counted from 1."""
        share = config.batch // config.workers
        mine = slice(rank * share, (rank + 1) * share)
        source, target = (
            slices.take(_order(config.seed, salt, len(slices), config.batch, step)[mine].tolist())
            for salt, slices in enumerate(self.train[domain] for domain in DOMAINS)
        )
        if source.label is None:
            raise ValueError("training slices of the source domain have no labels")
        return Batch(source.image, source.label.long(), target.image)

    def probe(self, domain: Domain, count: int) -> Slices:
        """`count` slices that stay the same throughout a run, of validation subjects where there are any."""
        slices = self.val[domain] if len(self.val[domain]) else self.train[domain]
        if slices.label is not None and bool(slices.label.any()):  # slices that show what is segmented
            area = (slices.label > 0).flatten(1).sum(1)
            ranked = area.argsort(descending=True, stable=True)[: max(count, len(slices) // 2)].sort().values
        else:
            ranked = torch.arange(len(slices) // 4, max(len(slices) // 4 + 1, len(slices) - len(slices) // 4))
        spread = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
        return slices.take(ranked[torch.from_numpy(spread)])


def _slices(store: Store, domain: Domain, split: Part, pooled: bool, device: torch.device) -> Slices:
    """Slices of a split; where some are labelled, those of unlabelled volumes are left out."""
    staged = store.stage(domain, split, pooled=pooled)
    image = torch.from_numpy(normalise(staged.image, staged.limits)).unsqueeze(1).to(device)
    subject = tuple(staged.entries[i].subject for i in staged.subject)
    if staged.label is None:
        return Slices(image, None, subject)
    labelled = np.flatnonzero((staged.label != UNLABELLED).all(axis=(1, 2)))
    return Slices(image, torch.from_numpy(staged.label).to(device), subject).take(labelled.tolist())


def _order(seed: int, salt: int, slices: int, batch: int, step: int) -> np.ndarray:
    """Indices of the batch of `step`, all different: rounds of permutations, each cut into whole batches.

    What a round leaves over, fewer slices than a batch, rests until the next; which ones these are changes by round.
    """
    number, place = divmod(step - 1, slices // batch)
    permutation = np.random.default_rng((seed, salt, number)).permutation(slices)
    return permutation[place * batch : (place + 1) * batch]
