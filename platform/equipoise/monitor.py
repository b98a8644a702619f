"""Divergence as a measured result: what went wrong, when it began, when it was noticed.

Knows blocks of signals and the rules that judge them; knows nothing of networks, so that it reads records as well as
live runs. It never changes a number: a NaN is a finding.

Rules at 20 000 steps or more (shorter runs use shorter blocks, see `Horizon`): signals are averaged over blocks of 50
steps. With `short` and `long` the medians of log L over 500 and 1000 steps and sigma the noise of log L around `short`,

* a loss explodes when `short` exceeds the best `long` so far by log(growth) + 2 sigma for 500 steps without a gap;
* its onset is the last block whose `short` lay within 10 % + sigma / 2 of its best;
* a critic wins while its patch AUC, averaged over 500 steps, stays at `win_auc` or more for 500 steps after the
  warm-up;
* the first non-finite loss or gradient is a divergence at once, at its very step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from equipoise.config import MonitorConfig, RunConfig

Kind = Literal["stable", "d_wins", "diverged", "censored"]
SHORT, LONG = 10, 20
"""Blocks in the two windows of medians."""
CRITICS = ("s", "t", "p", "p_low")
"""Critics that can win; the auxiliary game is reported, it does not count."""


@dataclass(frozen=True, slots=True)
class Horizon:
    """The lengths of the rules, in steps and blocks, for a run of `steps`."""

    steps: int
    block: int
    """Steps in a block: `block_steps`, or steps / 400 if that is shorter, at least 1."""
    warm_up: int
    """Blocks before anything but a non-finite value is judged: 20, or 2.5 % of the run if that is longer."""
    hold: int
    """Blocks for which a rule must hold without a gap: 10, or 1.25 % of the run if that is longer."""

    @classmethod
    def of(cls, config: MonitorConfig, steps: int) -> Horizon:
        """The horizon of a run of `steps` steps."""
        block = max(1, min(config.block_steps, steps // 400))
        return cls(
            steps, block, max(LONG, math.ceil(0.025 * steps / block)), max(SHORT, math.ceil(0.0125 * steps / block))
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that went wrong. Data, not an exception: the run that shows it has succeeded."""

    kind: Literal["non_finite", "explosion", "d_wins"]
    signal: str
    onset: int
    """Step at which it began."""
    alarm: int
    """Step at which it was certain; alarm - onset is the delay."""
    value: float
    limit: float

    @property
    def diverged(self) -> bool:
        """Whether this ends a run: a winning critic alone does not."""
        return self.kind != "d_wins"

    def sentence(self) -> str:
        """The finding in plain words."""
        if self.kind == "non_finite":
            return f"{self.signal} became {self.value} at step {self.onset}"
        if self.kind == "d_wins":
            return f"{self.signal} stood at {self.value:.3f} from step {self.onset} on: that critic wins"
        return (
            f"{self.signal} left its plateau at step {self.onset}; at step {self.alarm} it stood at "
            f"{self.value:.3g}, above the limit {self.limit:.3g}"
        )


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
        """Step at which the divergence began, if there was one."""
        return next((f.onset for f in self.findings if f.diverged), None)

    def sentence(self) -> str:
        """The verdict in plain words."""
        tail = "; ".join(f.sentence() for f in self.findings)
        return f"{self.kind.replace('_', ' ')} after {self.step} of {self.planned} steps" + (
            f": {tail}" if tail else ""
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for records; non-finite values become their names, because JSON has none."""
        data = asdict(self)
        for finding in data["findings"]:
            finding.update({k: str(v) for k, v in finding.items() if isinstance(v, float) and not math.isfinite(v)})
        return {**data, "findings": list(data["findings"]), "onset": self.onset, "sentence": self.sentence()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_dict`."""
        findings = tuple(
            Finding(**{**f, "value": float(f["value"]), "limit": float(f["limit"])}) for f in data["findings"]
        )
        return cls(data["kind"], data["step"], data["planned"], data["stability"], findings)


def watched(config: RunConfig) -> dict[str, float]:
    """The losses that can explode in a run, each with the growth factor that counts."""
    monitor = config.monitor
    terms = {"loss/cycle_s": monitor.cycle_growth, "loss/cycle_t": monitor.cycle_growth}
    if config.loss.segmentation > 0:
        terms["loss/segmentation"] = monitor.loss_growth
    if config.loss.adversarial == "hinge":  # its generator side may be negative: the critics' margin stands in for it
        return terms | {"critic/gap_t": monitor.gap_growth, "critic/gap_s": monitor.gap_growth}
    return terms | {"loss/generator": monitor.loss_growth}


def counted(config: RunConfig) -> tuple[str, ...]:
    """The critics that can win a run's game: those that somebody plays against."""
    loss, plays = config.loss, config.loss.segmentation > 0
    weight = {
        "s": loss.adv_image,
        "t": loss.adv_image,
        "p": plays * loss.adv_p,
        "p_low": plays * config.net.low * loss.adv_p * loss.adv_p_low_ratio,
    }
    return tuple(critic for critic in CRITICS if weight[critic] > 0)


@dataclass(slots=True)
class _Track:
    """One watched loss: log block means, their medians, and how long the rule has held."""

    growth: float
    logs: list[float] = field(default_factory=list)
    shorts: list[float] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    best_short: float = math.inf
    best_long: float = math.inf
    held: int = 0

    def add(self, value: float) -> None:
        self.logs.append(math.log(max(value, 1e-12)))
        self.shorts.append(float(np.median(self.logs[-SHORT:])))
        self.residuals.append(abs(self.logs[-1] - self.shorts[-1]))

    @property
    def sigma(self) -> float:
        """Robust standard deviation of a block around the rolling median."""
        return 1.4826 * float(np.median(self.residuals))

    @property
    def limit(self) -> float:
        return self.best_long + math.log(self.growth) + 2 * self.sigma

    @property
    def plateau(self) -> float:
        return self.best_short + math.log(1.1) + self.sigma / 2

    def judge(self, warm: bool) -> None:
        """Compare with the best so far, then let this block count towards it."""
        self.held = self.held + 1 if warm and self.shorts[-1] > self.limit else 0
        if len(self.logs) >= LONG:
            self.best_long = min(self.best_long, float(np.median(self.logs[-LONG:])))
        if len(self.logs) >= SHORT:
            self.best_short = min(self.best_short, self.shorts[-1])

    def onset(self) -> int:
        """Index of the last block on the plateau."""
        return next((i for i in range(len(self.shorts) - 1, -1, -1) if self.shorts[i] <= self.plateau), 0)

    def late_growth(self) -> float:
        return max(0.0, self.shorts[-1] - self.plateau) if len(self.logs) >= LONG else 0.0


class Monitor:
    """Judges a run block by block; the same blocks give the same verdict, live or from a record."""

    def __init__(
        self,
        config: MonitorConfig,
        steps: int,
        terms: Mapping[str, float],
        critics: Sequence[str] = CRITICS,
        idle: Mapping[str, int] | None = None,
    ) -> None:
        """Start with nothing seen.

        Args:
            config: the limits.
            steps: of the planned run.
            terms: see `watched`.
            critics: see `counted`.
            idle: steps at the beginning of a run in which nobody plays against a critic, by its name.
        """
        self._idle = {f"auc/{name}": until for name, until in (idle or {}).items()}
        self.config, self.horizon = config, Horizon.of(config, steps)
        self.findings: list[Finding] = []
        self._tracks = {name: _Track(growth) for name, growth in terms.items()}
        self._aucs: dict[str, list[float]] = {f"auc/{k}": [] for k in critics}
        self._winning = dict.fromkeys(self._aucs, 0)
        self._won_blocks = 0
        self._blocks = 0

    @property
    def diverged(self) -> Finding | None:
        """The finding that ends the run, if there is one."""
        return next((f for f in self.findings if f.diverged), None)

    def observe(self, first_step: int, names: Sequence[str], rows: np.ndarray) -> dict[str, float]:
        """Judge one block.

        Args:
            first_step: the step of `rows[0]`, counted from 1.
            names: signal names, one a column.
            rows: signals `(steps in the block, signals)`, one row a step.

        Returns:
            The block's means by name; NaN and infinity stay what they are.
        """
        last_step = first_step + len(rows) - 1
        with np.errstate(over="ignore", invalid="ignore"):
            means = dict(zip(names, rows.astype(np.float64).mean(axis=0).tolist(), strict=True))
        self._blocks += 1
        if self.diverged:
            return means
        bad = np.argwhere(~np.isfinite(rows))
        if len(bad):
            row, column = min(map(tuple, bad.tolist()))
            step = first_step + row
            self.findings.append(Finding("non_finite", names[column], step, step, float(rows[row, column]), math.inf))
            return means
        warm = self._blocks > self.horizon.warm_up
        self._explosions(last_step, means, warm)
        self._wins(last_step, means, warm)
        return means

    def _explosions(self, step: int, means: Mapping[str, float], warm: bool) -> None:
        for name, track in self._tracks.items():
            track.add(means[name])
            track.judge(warm)
            if track.held >= self.horizon.hold and not self.diverged:
                onset = (track.onset() + 1) * self.horizon.block
                self.findings.append(
                    Finding("explosion", name, onset, step, math.exp(track.shorts[-1]), math.exp(track.limit))
                )

    def _wins(self, step: int, means: Mapping[str, float], warm: bool) -> None:
        won = False
        for name, values in self._aucs.items():
            if name not in means or step <= self._idle.get(name, 0):
                continue
            values.append(means[name])
            mean = float(np.mean(values[-SHORT:]))
            self._winning[name] = self._winning[name] + 1 if warm and mean >= self.config.win_auc else 0
            won = won or self._winning[name] >= self.horizon.hold
            first = not any(f.signal == name for f in self.findings)
            if self._winning[name] >= self.horizon.hold and first:
                onset = step - (self.horizon.hold - 1) * self.horizon.block
                self.findings.append(Finding("d_wins", name, onset, step, mean, self.config.win_auc))
        self._won_blocks += won

    def verdict(self, step: int) -> Verdict:
        """The verdict on a run that did `step` steps: censored if it was stopped early without a divergence."""
        planned = self.horizon.steps
        ended = self.diverged
        if ended is None and step < planned:
            return Verdict("censored", step, planned, None, tuple(self.findings))
        kind: Kind = "diverged" if ended else "d_wins" if self.findings else "stable"
        return Verdict(kind, step, planned, self.stability(), tuple(self.findings))

    def stability(self) -> float:
        """S so far: min(1, onset / planned) x (1 - share of blocks won by a critic / 2) x exp(-late growth)."""
        ended = self.diverged
        lasted = min(1.0, ended.onset / self.horizon.steps) if ended else 1.0
        judged = max(1, self._blocks - self.horizon.warm_up)
        growth = max((track.late_growth() for track in self._tracks.values()), default=0.0)
        return lasted * (1 - 0.5 * min(1.0, self._won_blocks / judged)) * math.exp(-growth)

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which `load_state_dict` continues exactly."""
        return {
            "findings": [asdict(f) for f in self.findings],
            "tracks": {k: asdict(t) for k, t in self._tracks.items()},
            "aucs": {k: list(v) for k, v in self._aucs.items()},
            "winning": dict(self._winning),
            "won_blocks": self._won_blocks,
            "blocks": self._blocks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.findings = [Finding(**f) for f in state["findings"]]
        self._tracks = {k: _Track(**t) for k, t in state["tracks"].items()}
        self._aucs, self._winning = {k: list(v) for k, v in state["aucs"].items()}, dict(state["winning"])
        self._won_blocks, self._blocks = state["won_blocks"], state["blocks"]
