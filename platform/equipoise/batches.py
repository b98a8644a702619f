"""A store's slices as training batches and evaluation sets.

Knows how slices are ordered, shared between ranks and changed at random; knows nothing of networks' losses or of Ray.

The order is a pure function of seed and step: each domain runs through one permutation after another of its slices, so
that a run continues at any step without a state (its position is the number of its next step); a batch holds no slice
twice, and the ranks' shares are disjoint. Random changes are a pure function of seed, step and place in the batch.
Threads, memory and devices change when a batch is there, and nothing in it.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from equipoise.augment import augment, draw
from equipoise.config import AugmentConfig, NetConfig, RunConfig
from equipoise.intake import Intake, selecting
from equipoise.shelf import Shelf, Slices
from equipoise.step import Batch
from slicestore.errors import InputError
from slicestore.splits import Part
from slicestore.staging import Staged, stage
from slicestore.store import DOMAINS, Domain, Store

DEVICE_SHARE = 0.25
"""Share of a device's free memory that slices may take; the networks' activations need the rest."""
STILL = AugmentConfig()


class Cohort:
    """Everything a run sees of a store, ready for one device."""

    def __init__(
        self,
        store: Store,
        config: RunConfig,
        device: torch.device,
        *,
        threads: int | None = None,
        memory: int | None = None,
        share: bool = True,
        device_share: float = DEVICE_SHARE,
    ) -> None:
        """Stage all slices: on the device if they fit, in this machine's shared memory, or streamed.

        Args:
            store: an opened one.
            config: what is to be trained.
            device: where batches are wanted.
            threads: that read; by default one a core.
            memory: see `staging.stage`.
            share: see `staging.stage`.
            device_share: share of a CUDA device's free memory that slices may take; 0 keeps them in main memory.

        Raises:
            InputError: the store is not the one the run is bound to, has other classes than the network, or fewer
                training slices than a batch.
        """
        check(store, config)
        self.fingerprint, self.classes, self.device = store.fingerprint, store.classes, device
        self.brain_class: int = store.preprocessing.brain_class
        """The class of the brain beside the structures; 0 where there is none."""
        self.intake = Intake.of(store, config)
        threads = threads or os.cpu_count() or 1
        self._pool, self._ahead = ThreadPoolExecutor(threads), ThreadPoolExecutor(len(DOMAINS))
        room = int(torch.cuda.mem_get_info(device)[0] * device_share) if device.type == "cuda" else 0

        def shelf(domain: Domain, part: Part) -> Shelf | Slices:
            nonlocal room
            staged = _staged(store, config, domain, part, threads=threads, memory=memory, share=share)
            weight = len(staged) * staged.size**2 * (2 if staged.area is None else 3)
            resident = device.type == "cuda" and weight <= room
            room -= weight if resident else 0
            return Shelf(
                staged,
                device,
                channels=config.net.channels,
                clip=config.data.percentile > 0,
                frame=config.data.frame,
                resident=resident,
                pool=self._pool,
                ahead=self._ahead,
            )

        self.train = {domain: shelf(domain, "train") for domain in DOMAINS}
        self.val = {domain: shelf(domain, "val") for domain in DOMAINS}
        for domain, slices in self.train.items():
            _check_enough(store, config, domain, slices)

    def batch(self, config: RunConfig, step: int, rank: int = 0) -> Batch:
        """The share of `rank` in the batch of `step`, counted from 1."""
        share = config.batch // config.workers
        mine = slice(rank * share, (rank + 1) * share)
        drawn = []
        for salt, domain in enumerate(DOMAINS):
            shelf = self.train[domain]
            now, after = (_chosen(config, salt, shelf, n)[mine] for n in (step, step + 1))
            slices = shelf.take(now, then=after)
            image, label = slices.image, slices.label
            if config.data.augment != STILL:
                uniform = draw((config.seed, 5 + salt, step), config.batch)[mine]
                image, label = augment(image, label, config.data.augment, uniform)
            drawn.append((image, label))
        (source, label), (target, _) = drawn
        if label is None:
            raise ValueError("training slices of the source domain have no labels")
        return Batch(source, label.long(), target)

    def epoch_steps(self, config: RunConfig) -> int:
        """Steps in an epoch as SIFA's published code counts it: the larger domain's slices, in whole batches."""
        return max(1, max(len(slices) for slices in self.train.values()) // config.batch)

    def probe(self, domain: Domain, count: int) -> Slices:
        """`count` slices that stay the same throughout a run, of validation subjects where there are any."""
        slices = self.val[domain] if len(self.val[domain]) else self.train[domain]
        if slices.area is not None and slices.area.any():  # slices that show what is segmented
            largest = np.argsort(-slices.area, kind="stable")[: max(count, len(slices) // 2)]
            ranked = np.sort(largest)
        else:
            ranked = np.arange(len(slices) // 4, max(len(slices) // 4 + 1, len(slices) - len(slices) // 4))
        spread = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
        return slices.take(ranked[spread])


def needed(config: RunConfig) -> RunConfig:
    """The settings that a cohort depends on, all others at their defaults: runs that agree in these may share one."""
    net = NetConfig(classes=config.net.classes, channels=config.net.channels)
    return RunConfig(data=replace(config.data, augment=STILL), net=net, batch=config.batch)


def _staged(
    store: Store,
    config: RunConfig,
    domain: Domain,
    part: Part,
    *,
    threads: int,
    memory: int | None,
    share: bool,
) -> Staged:
    chosen = selecting(config.data, domain)
    return stage(store, domain, part, **chosen, threads=threads, memory=memory, share=share)


# --- order ------------------------------------------------------------------------------------------------------------


def _chosen(config: RunConfig, salt: int, slices: Shelf | Slices, step: int) -> np.ndarray:
    """Indices of the batch of `step` over all ranks, all different."""
    rich = _rich(config)
    if salt or not rich or slices.area is None:
        return _order(config.seed, salt, len(slices), config.batch, step)
    shows, bare = np.flatnonzero(slices.area > 0), np.flatnonzero(slices.area == 0)
    indices, showing = np.empty(config.batch, dtype=np.intp), np.full(config.batch, False)
    showing[np.arange(rich) * config.batch // rich] = True  # evenly, so that every rank gets its part of them
    showing = np.roll(showing, np.random.default_rng((config.seed, 4, step)).integers(config.batch))
    indices[showing] = shows[_order(config.seed, 2, len(shows), rich, step)]
    indices[~showing] = bare[_order(config.seed, 3, len(bare), config.batch - rich, step)]
    return indices


def _rich(config: RunConfig) -> int:
    """How many of a batch's source slices are to show foreground; 0 leaves it to chance."""
    return max(1, math.floor(config.data.foreground * config.batch + 0.5)) if config.data.foreground else 0


def _order(seed: int, salt: int, slices: int, batch: int, step: int) -> np.ndarray:
    """Indices of the batch of `step`, all different: rounds of permutations, each cut into whole batches.

    What a round leaves over, fewer slices than a batch, rests until the next; which ones these are changes by round.
    """
    if not batch:
        return np.empty(0, dtype=np.intp)
    number, place = divmod(step - 1, slices // batch)
    permutation = np.random.default_rng((seed, salt, number)).permutation(slices)
    return permutation[place * batch : (place + 1) * batch]


# --- checks -----------------------------------------------------------------------------------------------------------


def check(store: Store, config: RunConfig) -> None:
    """Refuse a store that a run cannot train on.

    Raises:
        InputError: it is not the one the run is bound to, or has other classes than the network.
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


def _check_enough(store: Store, config: RunConfig, domain: Domain, slices: Shelf | Slices) -> None:
    if len(slices) < config.batch:
        raise InputError(
            store.path,
            found=f"{len(slices)} {domain} training slices",
            rule=f"a batch takes {config.batch} different ones",
            remedy=f"prepare more volumes, or set batch to at most {len(slices)}",
        )
    rich = _rich(config)
    if domain == "target" or not rich or slices.area is None:
        return
    for kind, there, needed in (
        ("with foreground", int(np.count_nonzero(slices.area)), rich),
        ("without foreground", int(np.count_nonzero(slices.area == 0)), config.batch - rich),
    ):
        if there < needed:
            raise InputError(
                store.path,
                found=f"{there} source training slices {kind}",
                rule=f"a batch takes {needed} different ones (data.foreground is {config.data.foreground:g})",
                remedy="set data.foreground to 0, which draws slices as they come, or to another share",
            )
