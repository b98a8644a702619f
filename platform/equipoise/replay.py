"""A record's curves, whoever wrote them, judged as a live run is.

Knows the grid of blocks that curves of unequal steps are brought to, and which rules their names allow; knows nothing
of files, nor of what other people call their signals. The rules themselves are the monitor's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from equipoise.config import MonitorConfig
from equipoise.horizon import Horizon
from equipoise.monitor import CRITICS, Monitor
from equipoise.verdict import Verdict

_USUAL = MonitorConfig()
Curve = tuple[np.ndarray, np.ndarray]
"""Steps `(n,)`, counted from 0 or 1 and not decreasing, and values `(n,)`."""


class _Block(NamedTuple):
    """What a record says of a block of steps."""

    first: int
    names: list[str]
    rows: np.ndarray
    """`(steps, signals)`: the block's mean at every step, but for samples that are not finite."""
    looks: Mapping[int, Mapping[str, float]]
    """Its probes, by step."""


@dataclass(frozen=True, slots=True, eq=False)
class Replayed:
    """A record, judged."""

    verdict: Verdict
    horizon: Horizon
    """The lengths of the rules; its block is the record's resolution, where that is coarser than a live run's."""
    watched: tuple[str, ...]
    """Losses that could have exploded."""
    critics: tuple[str, ...]
    """Signals by which critics could have won."""
    steps: np.ndarray
    """Where blocks end, `(blocks,)`."""
    limits: Mapping[str, np.ndarray]
    """What each watched loss had to stay below, `(blocks,)`; infinite where it was not judged yet."""

    @property
    def judged(self) -> bool:
        """Whether the record was long enough for any loss to be judged."""
        return any(np.isfinite(limits).any() for limits in self.limits.values())


def replay(curves: Mapping[str, Curve], planned: int | None = None, config: MonitorConfig = _USUAL) -> Replayed:
    """Judge the curves of a run.

    Samples are averaged within blocks; between a curve's first and last sample, blocks without one get what a straight
    line says. A sample that is not finite is found at its very step. Judged are, by our names: `loss/cycle_s`,
    `loss/cycle_t`, `loss/segmentation`, `loss/generator` or, where that is negative or missing, `critic/gap_*`; `auc/*`
    or, where a critic has none, `critic/loss_*` if it is never negative; `saturation/*`; `probe/*` at their own steps.
    Others are only looked at for values that are not finite.

    Args:
        curves: by name.
        planned: steps that the run was to do; those that it did, if it is not known or less.
        config: the limits.

    Raises:
        ValueError: there is no curve, or one is empty, uneven, or runs backwards.
    """
    _check(curves)
    last = max(math.ceil(steps[-1]) for steps, _ in curves.values())
    planned = max(last, planned or 0)
    terms = _terms(curves, config)
    block = max(Horizon.of(config, planned).block, resolution(curves, terms))
    judged = [name for name in CRITICS if f"auc/{name}" in curves]
    by_loss = [name for name in CRITICS if name not in judged and _never_negative(curves, f"critic/loss_{name}")]
    monitor = Monitor(config, planned, terms, judged, block=block, by_loss=by_loss)
    ends, limits = [], []
    for part in _blocks(curves, block, last):
        monitor.observe(part.first, part.names, part.rows)
        for step, probe in part.looks.items():
            monitor.look(step, probe)
        ends.append(part.first + len(part.rows) - 1)
        limits.append(monitor.limits)
        if monitor.diverged:
            break
    return Replayed(
        verdict=monitor.verdict(last),
        horizon=monitor.horizon,
        watched=tuple(terms),
        critics=(*(f"auc/{name}" for name in judged), *(f"critic/loss_{name}" for name in by_loss)),
        steps=np.array(ends),
        limits={name: np.array([row[name] for row in limits]) for name in terms},
    )


def resolution(curves: Mapping[str, Curve], terms: Mapping[str, float]) -> int:
    """Steps from one sample to the next, at least 1: of the coarsest judged loss, of any curve if there is none.

    Nine tenths of its samples lie no further apart, so that a gap in a record does not count.
    """
    chosen = [steps for name, (steps, _) in curves.items() if not terms or name in terms]
    return max((math.ceil(np.quantile(np.diff(steps), 0.9)) for steps in chosen if len(steps) > 1), default=1) or 1


def _check(curves: Mapping[str, Curve]) -> None:
    if not curves:
        raise ValueError("curves: none; a record has at least one")
    for name, (steps, values) in curves.items():
        if len(steps) == 0 or np.shape(steps) != np.shape(values) or np.ndim(steps) != 1:
            raise ValueError(f"{name}: {np.shape(steps)} steps, {np.shape(values)} values; give as many, at least one")
        if not np.isfinite(steps).all() or steps[0] < 0 or (np.diff(steps) < 0).any():
            raise ValueError(f"{name}: its steps must not decrease, from 0 or more")


def _terms(curves: Mapping[str, Curve], config: MonitorConfig) -> dict[str, float]:
    """The losses to watch, as `monitor.watched` has them."""
    growth = {
        "loss/cycle_s": config.cycle_growth,
        "loss/cycle_t": config.cycle_growth,
        "loss/segmentation": config.loss_growth,
        "loss/generator": config.loss_growth,
    }
    terms = {name: factor for name, factor in growth.items() if _never_negative(curves, name)}
    if "loss/generator" in terms:
        return terms
    return terms | {name: config.gap_growth for name in ("critic/gap_t", "critic/gap_s") if name in curves}


def _never_negative(curves: Mapping[str, Curve], name: str) -> bool:
    return name in curves and not (curves[name][1] < 0).any()


def _blocks(curves: Mapping[str, Curve], block: int, last: int) -> Iterator[_Block]:
    count = max(1, math.ceil(last / block))
    probes = {name: curve for name, curve in curves.items() if name.startswith("probe/")}
    others = {name: curve for name, curve in curves.items() if name not in probes}
    means = {name: _means(curve, block, count) for name, curve in others.items()}
    looks, faults = _samples(probes, block), _samples(others, block, finite=False)
    for k in range(count):
        first, end = k * block + 1, min((k + 1) * block, max(last, 1))
        known = {name: mean[k] for name, mean in means.items() if not np.isnan(mean[k])}
        broken = faults.get(k, {})
        names = [*known, *sorted({name for values in broken.values() for name in values} - set(known))]
        rows = np.tile([known.get(name, 0.0) for name in names], (end - first + 1, 1))
        for step, values in broken.items():
            for name, value in values.items():
                rows[step - first, names.index(name)] = value
        yield _Block(first, names, rows, looks.get(k, {}))


def _samples(curves: Mapping[str, Curve], block: int, *, finite: bool = True) -> dict[int, dict[int, dict[str, float]]]:
    """Samples by block, step and name, one between two steps at the later; all, or those that are not finite."""
    found: dict[int, dict[int, dict[str, float]]] = {}
    for name, (steps, values) in curves.items():
        chosen = slice(None) if finite else ~np.isfinite(values)
        for step, value in zip(np.maximum(1, np.ceil(steps[chosen])), values[chosen], strict=True):
            found.setdefault(int(step - 1) // block, {}).setdefault(int(step), {})[name] = float(value)
    return {k: dict(sorted(by_step.items())) for k, by_step in found.items()}


def _means(curve: Curve, block: int, count: int) -> np.ndarray:
    """Mean of the finite samples of each block `(count,)`; NaN before the first and after the last of them."""
    good = np.isfinite(curve[1])
    steps, values = curve[0][good].astype(np.float64), curve[1][good].astype(np.float64)
    if not len(steps):
        return np.full(count, np.nan)
    index = np.maximum(np.ceil(steps / block).astype(int) - 1, 0)
    samples = np.bincount(index, minlength=count)
    with np.errstate(invalid="ignore"):
        means = np.bincount(index, values, minlength=count) / samples
    empty = samples == 0
    inside = empty & (np.arange(count) > index[0]) & (np.arange(count) < index[-1])
    means[inside] = np.interp((np.flatnonzero(inside) + 0.5) * block, steps, values)
    return means
