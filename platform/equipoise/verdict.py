"""What a monitor says: findings, the verdict on a run, and both in plain words.

Knows kinds, numbers and the names that a researcher uses for signals; must not know by which rules anything is found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

FindingKind = Literal["non_finite", "explosion", "saturation", "collapse", "blur", "d_wins"]
Kind = Literal["stable", "d_wins", "blurry", "recovered", "collapsed", "saturated", "diverged", "censored"]

ENDING = ("non_finite", "explosion", "saturation")
"""Kinds of findings that end a run."""
_CRITICS = {"s": "D_s", "t": "D_t", "p": "D_p", "p_low": "D_p_low", "aux": "the auxiliary critic"}
_IMAGES = {
    "st": "source images made target-like",
    "ts": "target images made source-like",
    "sts": "source images brought back",
    "tst": "target images brought back",
}
NAMES: Mapping[str, str] = {
    "loss/cycle_s": "source cycle loss",
    "loss/cycle_t": "target cycle loss",
    "loss/segmentation": "segmentation loss",
    "loss/generator": "generator loss",
    "probe/foreground": "predicted target foreground",
    **{f"auc/{game}": critic for game, critic in _CRITICS.items()},
    **{f"critic/loss_{game}": critic for game, critic in _CRITICS.items()},
    **{f"critic/gap_{game}": f"margin of {critic}" for game, critic in _CRITICS.items()},
    **{f"saturation/{way}": f"{images} (x_{way})" for way, images in _IMAGES.items()},
    **{f"probe/{ratio}_{way}": f"{_IMAGES[way]} (x_{way})" for ratio in ("diversity", "sharpness") for way in _IMAGES},
}
"""What signals are called in sentences; others go by their own name."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that went wrong. Data, not an exception: the run that shows it has succeeded."""

    kind: FindingKind
    signal: str
    onset: int
    """Step at which it began: the last one before anything was to be seen of it."""
    alarm: int
    """Step at which it was certain; alarm - onset is the delay."""
    value: float
    """Of the signal when it was certain."""
    limit: float
    before: float | None = None
    """Value of an exploded signal on its plateau."""
    until: int | None = None
    """Step at which it had passed again; None while it is in force."""

    @property
    def diverged(self) -> bool:
        """Whether this ends a run: a winning critic, a collapse or blur alone does not."""
        return self.kind in ENDING

    def sentence(self, among: Sequence[Finding] = ()) -> str:
        """The finding in plain words; an explosion's also names the critics of `among` that had won by then."""
        name, value, limit = NAMES.get(self.signal, self.signal), number(self.value), number(self.limit)
        if self.kind == "non_finite":
            return f"{self.signal} became {self.value} at step {count(self.onset)}"
        if self.kind == "explosion":
            plateau = f"at step {count(self.onset)}" + (
                f", from {number(self.before)} to {value}" if self.before is not None else f", up to {value}"
            )
            won = (f"; {NAMES[c.signal]} had won since {count(c.onset)}" for c in among if self.after(c))
            return f"{name} left its plateau {plateau}" + "".join(won)
        span = f"from step {count(self.onset)} " + ("on" if self.until is None else f"to {count(self.until)}")
        if self.kind == "saturation":
            return f"{name} lay at the ends of tanh {span}: {value} of their pixels beyond real ones, limit {limit}"
        if self.kind == "d_wins":
            told = "its least-squares loss" if self.signal.startswith("critic/") else "patches told apart"
            return f"{NAMES[self.signal]} won {span}: {told} {value}, limit {limit}"
        if self.kind == "blur":
            return f"{name} were blurred {span}: {value} of the sharpness of real ones, limit {limit}"
        if self.signal == "probe/foreground":
            return f"{name} was {value} times the source masks' {span}, limit {limit}"
        return f"{name} became alike {span}: {value} of the diversity of real ones, limit {limit}"

    def after(self, critic: Finding) -> bool:
        """Whether a critic had won by the time this was certain, and had not lost again before it began."""
        lost = critic.until is not None and critic.until < self.onset
        return critic.kind == "d_wins" and critic.alarm <= self.alarm and not lost


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run ended."""

    kind: Kind
    step: int
    """Steps done."""
    planned: int
    stability: float | None
    """S in [0, 1] at the planned horizon; None for a censored run, which was stopped before it could show."""
    findings: tuple[Finding, ...] = ()

    @property
    def onset(self) -> int | None:
        """Step at which the run first failed: diverged, also if it recovered, or collapsed without passing again."""
        return min((f.onset for f in self.findings if f.diverged or self._collapsed(f)), default=None)

    def _collapsed(self, finding: Finding) -> bool:
        return self.kind == "collapsed" and finding.kind == "collapse" and finding.until is None

    def sentence(self) -> str:
        """The verdict in plain words, its findings in the order in which they began."""
        told = sorted(self.findings, key=lambda f: (f.onset, f.alarm))
        end = next((f for f in self.findings if f.diverged), None) if self.kind in ("diverged", "saturated") else None
        named = [critic for critic in told if any(f.kind == "explosion" and f.after(critic) for f in told)]
        tail = "; ".join(
            f.sentence(told) + (", taken back" if f.diverged and f is not end else "") for f in told if f not in named
        )
        head = f"{self.kind.replace('_', ' ')} after {count(self.step)} of {count(self.planned)} steps"
        return f"{head}: {tail}" if tail else head

    def to_dict(self) -> dict[str, Any]:
        """Plain data for records; non-finite values become their names, because JSON has none."""
        data = asdict(self)
        for finding in data["findings"]:
            finding.update({k: str(v) for k, v in finding.items() if isinstance(v, float) and not math.isfinite(v)})
        return {**data, "findings": list(data["findings"]), "onset": self.onset, "sentence": self.sentence()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_dict`."""
        findings = [dict(finding) for finding in data["findings"]]
        for finding in findings:
            measured = ("value", "limit", "before")
            finding |= {name: float(finding[name]) for name in measured if finding.get(name) is not None}
        told = tuple(Finding(**finding) for finding in findings)
        return cls(data["kind"], data["step"], data["planned"], data["stability"], told)


def count(steps: int) -> str:
    """A number of steps, its thousands apart where there are more than four digits."""
    return f"{steps:,}".replace(",", " ") if steps >= 10_000 else str(steps)


def number(value: float) -> str:
    """A value to two digits, three just below 1, without the 0 before its point; what is not finite by its name."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    size = abs(value)
    if 0.9 <= size < 0.9995:
        text = f"{value:.3f}".rstrip("0")
    elif 99.5 <= size < 1e6:
        text = f"{value:.0f}"
    elif size < 1e-3 or size >= 1e6:
        text = f"{value:.1e}"
    else:
        text = f"{value:#.2g}".rstrip(".")
    return text.replace("0.", ".", 1) if size < 1 and "e" not in text else text
