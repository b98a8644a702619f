"""What networks expect of an image: the way from a raw volume to their input, as their training cohort had it.

Knows preprocessing, the cohort's limits and what its volumes are like; must not know networks, nor any one volume of
the cohort: everything here is a setting, or a range over training subjects.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from equipoise.config import DataConfig, RunConfig
from equipoise.shelf import neighbours
from slicestore.errors import InputError
from slicestore.selection import By, select, shown_box
from slicestore.settings import Prepared, Preprocessing
from slicestore.store import DOMAINS, Domain, Limits, Store, normalise

SLICE_MM = "slice_mm"
"""Among the ranges: the distance between slices, which preprocessing leaves as it is."""
LEAST_SLACK = 0.25
"""Standard deviations, at least, by which a percentile may leave the training subjects' range: that of few subjects is
narrow by chance."""


class Selecting(TypedDict):
    """How slices and their limits are chosen; see `slicestore.staging.stage`."""

    by: By
    pooled: bool
    percentile: float
    fixed: Limits | None


def selecting(data: DataConfig, domain: Domain) -> Selecting:
    """What the settings of a run say to that."""
    fixed = (data.source_low, data.source_high) if domain == "source" else (data.target_low, data.target_high)
    return {
        "by": data.split,
        "pooled": data.limits == "pooled",
        "percentile": data.percentile,
        "fixed": fixed if data.limits == "fixed" else None,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Intake:
    """How a raw volume becomes a network's input."""

    cohort: str
    """Fingerprint of the store that the networks were trained on."""
    preprocessing: Preprocessing
    classes: int
    """Background included."""
    limits: Mapping[Domain, Limits]
    """What becomes -1 and 1, in standard deviations of a volume."""
    clip: bool
    """Whether values beyond become -1 and 1."""
    frame: int
    """Pixels of 0 round every slice, on each side."""
    channels: int
    """Neighbouring slices in an image."""
    usual: Mapping[Domain, Mapping[str, Limits]]
    """Ranges over training subjects: of percentiles of their standardised values, by percentage, and `SLICE_MM`."""

    @classmethod
    def of(cls, store: Store, config: RunConfig) -> Intake:
        """What runs of these settings train on."""
        data = config.data
        limits = {domain: select(store, domain, "train", **selecting(data, domain)).limits for domain in DOMAINS}
        return cls(
            cohort=store.fingerprint,
            preprocessing=store.preprocessing,
            classes=store.classes,
            limits=limits,
            clip=data.percentile > 0,
            frame=data.frame,
            channels=config.net.channels,
            usual={
                d: _ranges(store.record(e) for e in store.select(d, "train" if data.split == "subject" else None))
                for d in DOMAINS
            },
        )

    def images(self, prepared: Prepared, domain: Domain) -> np.ndarray:
        """All slices of a volume, float32 (n, size, size), as training has them, but for `frame` and neighbours."""
        image = prepared.image
        if self.preprocessing.pad == "zero":
            rows, columns = shown_box(prepared.record)
            image = np.full_like(image, sum(self.limits[domain]) / 2)
            image[:, rows, columns] = prepared.image[:, rows, columns]
        scaled = normalise(image, self.limits[domain])
        return scaled.clip(-1, 1) if self.clip else scaled

    def stacks(self, prepared: Prepared) -> np.ndarray:
        """For each slice the numbers of those that make up its image, itself in the middle: (n, channels)."""
        position = np.asarray(prepared.record["slices"])
        return neighbours(np.zeros(len(position), dtype=np.intp), position, self.channels)

    def oddities(self, record: Mapping[str, Any], domain: Domain) -> list[str]:
        """In what a volume is unlike the domain's training subjects, in sentences with numbers; empty if in nothing.

        Networks answer to what they were trained on. A volume of the other modality, or of another protocol, gives a
        mask like any other, and nothing in that tells.
        """
        own, found = _statistics(record), []
        off = {d: {n: _beyond(own[n], self.usual[d][n], n) for n in own} for d in DOMAINS}
        worst = max((n for n in own if n != SLICE_MM), key=lambda n: off[domain][n])
        if off[domain][worst] > 0:
            low, high = self.usual[domain][worst]
            other: Domain = "source" if domain == "target" else "target"
            nearer = sum(v for n, v in off[other].items() if n != SLICE_MM) < sum(
                v for n, v in off[domain].items() if n != SLICE_MM
            )
            found.append(
                f"{worst} % of its values lie below {own[worst]:.2f} standard deviations from its mean; of those of "
                f"{domain} training subjects, below {_span(low, high)}"
                + (f": it looks more like the {other} modality" if nearer else ": another modality or protocol?")
            )
        if off[domain][SLICE_MM] > 0:
            low, high = self.usual[domain][SLICE_MM]
            found.append(f"its slices are {own[SLICE_MM]:.3g} mm apart; in training they were {_span(low, high)} mm")
        lost = [
            f"{(n - self.preprocessing.size) * mm:.0f} mm of {n * mm:.0f} along {axis}"
            for axis, n, mm in zip("xy", record["resampled"]["size"], record["resampled"]["spacing_mm"], strict=False)
            if n > self.preprocessing.size
        ]
        if lost:
            beyond = " and ".join(lost)
            found.append(f"it is larger than what the network sees, so that no structure is looked for in {beyond}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Intake:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, InputError: it is no such data.
        """
        made = {
            "preprocessing": Preprocessing(**data["preprocessing"]),
            "limits": {domain: _pair(data["limits"][domain]) for domain in DOMAINS},
            "usual": {d: {name: _pair(ends) for name, ends in data["usual"][d].items()} for d in DOMAINS},
        }
        return cls(**{**data, **made})

    @classmethod
    def read(cls, path: Path) -> Intake:
        """What lies in a file.

        Raises:
            InputError: it cannot be read.
        """
        try:
            return cls.from_dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                path,
                found=f"no readable account of preprocessing ({type(error).__name__})",
                rule="networks predict on what is prepared as their training cohort was",
                remedy="continue the run for a step or name its store with --store; of a model folder, export it again",
            ) from error


def _ranges(records: Iterable[Mapping[str, Any]]) -> dict[str, Limits]:
    found = [_statistics(record) for record in records]
    return {name: (min(one[name] for one in found), max(one[name] for one in found)) for name in found[0]}


def _statistics(record: Mapping[str, Any]) -> dict[str, float]:
    """What is compared: both tails of the standardised values, and the distance between slices in mm."""
    tails: Mapping[str, Sequence[float]] = record["percentiles"]
    low = {level: ends[0] for level, ends in tails.items()}
    high = {f"{100 - float(level):g}": ends[1] for level, ends in tails.items()}
    return {**low, **high, SLICE_MM: record["oriented"]["spacing_mm"][2]}


def _beyond(value: float, ends: Limits, name: str) -> float:
    """By how much a value leaves a range that is widened by its own width on either side; 0 inside."""
    low, high = ends
    slack = 0.25 * high if name == SLICE_MM else max(high - low, LEAST_SLACK, 0.25 * max(abs(low), abs(high)))
    return max(0.0, low - slack - value, value - high - slack)


def _pair(ends: Sequence[float]) -> Limits:
    low, high = ends
    return float(low), float(high)


def _span(low: float, high: float) -> str:
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
