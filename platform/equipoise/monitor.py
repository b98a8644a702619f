"""Divergence as a measured result: what went wrong, when it began, when it was noticed.

Knows blocks of signals and the rules that judge them; knows nothing of networks, so that it reads records as well as
live runs. It never changes a number: a NaN is a finding.

Signals are averaged over blocks of 50 steps; lengths are steps at 20 000 steps, see `Horizon` for others.

* non_finite: the first loss, gradient, weight or probe that is no number, at once and at its very step.
* explosion: a loss left its plateau for good; see `explosion`. Of several at once, the one that rose the furthest.
* saturation: `config.saturation` more of a translation's pixels than of real ones lie at the ends of tanh, for 2000
  steps. Onset: the last block without.
* d_wins: a critic's AUC, averaged over 500 steps, stays at `config.win_auc` or more for 500 steps after the warm-up;
  see `winning`. Onset: the last block below.
* collapse: translations differ from one another by less than `config.diversity` of what real images do, or the
  predicted foreground is `config.foreground_factor` times larger or smaller than the source masks', at
  `config.evaluations` looks in a row after the warm-up. Onset: the last look without; 0 if there was none.
* blur: the same of sharpness below `config.sharpness`.

A segmentation loss and saturation must hold for 2000 steps where others need 500: both were seen to pass again, after
1500 steps on the 2022 study's curves, after 25 to 50 in runs of 500 steps at high rates.

The first three end a run. A collapse counts if it is in force at the end, blur likewise; any win counts.

S in [0, 1] = min(1, onset / T) x (1 - share of steps won by any critic / 2) x exp(-late growth), as it stood after T =
`config.horizon_steps` steps (0: the run's), so that runs of several lengths compare. Onset is that of a divergence,
also of one that the run went back from, or of a collapse in force. Late growth is by how much log L stands above the
limit of its explosion rule, whether it has held or not: up to there a loss may move and the run is as stable as any.
Steps count as won from a win's onset on, and as a share of those after the warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from equipoise.config import MonitorConfig, RunConfig
from equipoise.explosion import Explosion
from equipoise.horizon import Horizon
from equipoise.verdict import Finding, FindingKind, Kind, Verdict
from equipoise.winning import LOSS, Critic

__all__ = ["CRITICS", "Finding", "Horizon", "Monitor", "Verdict", "counted", "watched"]

CRITICS = ("s", "t", "p", "p_low")
"""Critics that can win; the auxiliary game is reported, it does not count."""
_SIGNED = ("hinge", "wgan_gp")
"""Games whose generator loss may be negative: the critics' margins stand in for it."""


def watched(config: RunConfig) -> dict[str, float]:
    """The losses that can explode in a run, each with the growth factor that counts."""
    monitor = config.monitor
    terms = {"loss/cycle_s": monitor.cycle_growth, "loss/cycle_t": monitor.cycle_growth}
    if config.loss.segmentation > 0:
        terms["loss/segmentation"] = monitor.loss_growth
    if config.loss.adversarial in _SIGNED:
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


class Monitor:
    """Judges a run block by block; the same blocks give the same verdict, live or from a record."""

    def __init__(
        self,
        config: MonitorConfig,
        steps: int,
        terms: Mapping[str, float],
        critics: Sequence[str] = CRITICS,
        idle: Mapping[str, int] | None = None,
        *,
        block: int | None = None,
        by_loss: Sequence[str] = (),
    ) -> None:
        """Start with nothing seen.

        Args:
            config: the limits.
            steps: of the planned run.
            terms: see `watched`.
            critics: see `counted`.
            idle: steps at the beginning of a run in which nobody plays against a critic, by its name.
            block: steps in a block, where a record tells no finer.
            by_loss: critics that are judged by their least-squares loss; see `winning`.
        """
        self.config, self.horizon = config, Horizon.of(config, steps, block)
        self.findings: list[Finding] = []
        self.past: tuple[Finding, ...] = ()
        """Divergences that the run went back from; set from outside, no part of the state."""
        self._idle = {f"auc/{name}": until for name, until in (idle or {}).items()}
        self._terms = {
            name: Explosion(self.horizon, growth, signed=name.startswith("critic/gap_"))
            for name, growth in terms.items()
        }
        self._critics = {f"auc/{name}": Critic(self.horizon, config.win_auc) for name in critics}
        self._critics |= {f"critic/loss_{name}": Critic(self.horizon, LOSS, falling=True) for name in by_loss}
        self._saturated: dict[str, int] = {}
        """Blocks in a row, by signal."""
        self._looks: dict[str, list[int]] = {}
        """Looks in a row that were bad, and the step of the last that was not, by signal."""
        self._blocks = 0
        self._won = self._won_until = 0
        self._late = 0.0

    @property
    def diverged(self) -> Finding | None:
        """The finding that ends the run, if there is one."""
        return next((f for f in self.findings if f.diverged), None)

    @property
    def limits(self) -> dict[str, float]:
        """What each watched loss must stay below, as of the last block; infinite before it is judged."""
        return {name: term.limit for name, term in self._terms.items()}

    def observe(self, first_step: int, names: Sequence[str], rows: np.ndarray) -> dict[str, float]:
        """Judge one block. Signals that it does not have are not judged in it.

        Args:
            first_step: the step of `rows[0]`, counted from 1.
            names: signal names, one a column.
            rows: signals `(steps in the block, signals)`, one row a step.

        Returns:
            The block's means by name; NaN and infinity stay what they are.
        """
        last_step = first_step + len(rows) - 1
        with np.errstate(over="ignore", invalid="ignore"):
            means = dict(zip(names, rows.mean(axis=0, dtype=np.float64).tolist(), strict=True))
        if self.diverged:
            return means
        self._blocks += 1
        finite = np.isfinite(rows)
        if not finite.all():
            row, column = np.argwhere(~finite)[0].tolist()
            self._not_finite(names[column], first_step + row, float(rows[row, column]))
            return means
        warm = self._blocks > self.horizon.warm_up
        self._wins(last_step, means, warm)
        self._saturations(last_step, means, warm)
        self._explosions(last_step, means)
        return means

    def look(self, step: int, probe: Mapping[str, float]) -> None:
        """Judge what an evaluation at `step` found.

        Args:
            step: steps done.
            probe: by name; only `probe/diversity_*`, `probe/foreground` and `probe/sharpness_*` are judged, but a value
                that is not finite is a finding whatever its name.
        """
        if self.diverged:
            return
        for name, value in probe.items():
            if not math.isfinite(value):
                self._not_finite(name, step, value)
                return
        if step <= self.horizon.warm_up * self.horizon.block:
            return
        for name, value in probe.items():
            judged = self._judged(name, value)
            if judged is not None:
                self._count(step, name, value, *judged)

    def _not_finite(self, signal: str, step: int, value: float) -> None:
        self.findings.append(Finding("non_finite", signal, step, step, value, math.inf))

    def _wins(self, step: int, means: Mapping[str, float], warm: bool) -> None:
        known = {f.signal: i for i, f in enumerate(self.findings) if f.kind == "d_wins"}
        for name, critic in self._critics.items():
            if name not in means or step <= self._idle.get(name, 0):
                continue
            win = critic.add(means[name], warm)
            if win is not None:
                onset = self.horizon.end(max(self._blocks - win.since, self.horizon.warm_up))
                self._count_won(onset, step)
                if name not in known:
                    limit = LOSS if name.startswith("critic/") else self.config.win_auc
                    self.findings.append(Finding("d_wins", name, onset, step, win.value, limit))
                    continue
            if name in known:
                i = known[name]
                until = None if win is not None else self.findings[i].until or step
                self.findings[i] = replace(self.findings[i], until=until)

    def _count_won(self, onset: int, step: int) -> None:
        """Count the steps from a win's onset to now that belong to S, each once however many critics won it."""
        since = max(onset, self._won_until)
        until = min(step, self._reference)
        self._won += max(0, until - since)
        self._won_until = max(self._won_until, until)

    def _saturations(self, step: int, means: Mapping[str, float], warm: bool) -> None:
        for name in means:
            if not name.startswith("saturation/"):
                continue
            held = self._saturated.get(name, 0) + 1 if means[name] > self.config.saturation else 0
            self._saturated[name] = held
            if warm and held >= self.horizon.patience and not self.diverged:
                onset = self.horizon.end(self._blocks - held)
                self.findings.append(Finding("saturation", name, onset, step, means[name], self.config.saturation))

    def _explosions(self, step: int, means: Mapping[str, float]) -> None:
        for name, term in self._terms.items():
            if name in means:
                term.add(means[name])
        if step <= self._reference:
            self._late = max((term.excess for term in self._terms.values()), default=0.0)
        if self.diverged or not any(self._certain(name, term) for name, term in self._terms.items()):
            return
        risen = {name: term.blast() for name, term in self._terms.items() if term.held}
        name, blast = max(risen.items(), key=lambda item: item[1].rise)
        onset = self.horizon.end(self._blocks - blast.onset)
        self.findings.append(Finding("explosion", name, onset, step, blast.value, blast.limit, blast.before))

    def _certain(self, name: str, term: Explosion) -> bool:
        return term.held >= (self.horizon.patience if name == "loss/segmentation" else self.horizon.hold)

    def _judged(self, name: str, value: float) -> tuple[FindingKind, float, bool] | None:
        """As what a probe's value counts, its limit, and whether it is beyond that; None if it is not judged."""
        config = self.config
        if name.startswith("probe/diversity_"):
            return "collapse", config.diversity, value < config.diversity
        if name.startswith("probe/sharpness_"):
            return "blur", config.sharpness, value < config.sharpness
        if name != "probe/foreground":
            return None
        most = config.foreground_factor
        return "collapse", most if value > 1 else 1 / most, not 1 / most <= value <= most

    def _count(self, step: int, name: str, value: float, kind: FindingKind, limit: float, bad: bool) -> None:
        """Count looks in a row; tell when they suffice, and when it passes."""
        streak, well = self._looks.get(name, [0, 0])
        self._looks[name] = [streak + 1, well] if bad else [0, step]
        if bad and streak + 1 == self.config.evaluations:
            self.findings.append(Finding(kind, name, well, step, value, limit))
        if not bad and streak >= self.config.evaluations:
            i = max(i for i, f in enumerate(self.findings) if (f.kind, f.signal) == (kind, name))
            self.findings[i] = replace(self.findings[i], until=step)

    @property
    def _reference(self) -> int:
        """Steps over which S is measured."""
        return self.config.horizon_steps or self.horizon.steps

    def _in_force(self, kind: FindingKind) -> list[Finding]:
        return [f for f in self.findings if f.kind == kind and f.until is None]

    def verdict(self, step: int) -> Verdict:
        """The verdict on a run that did `step` steps: censored if it was stopped early without a divergence."""
        planned, findings = self.horizon.steps, (*self.findings, *self.past)
        if self.diverged is None and step < planned:
            return Verdict("censored", step, planned, None, findings)
        return Verdict(self._kind(), step, planned, self.stability(), findings)

    def _kind(self) -> Kind:
        ended = self.diverged
        if ended is not None:
            return "saturated" if ended.kind == "saturation" else "diverged"
        if self._in_force("collapse"):
            return "collapsed"
        if self.past:
            return "recovered"
        if any(f.kind == "d_wins" for f in self.findings):
            return "d_wins"
        return "blurry" if self._in_force("blur") else "stable"

    def stability(self) -> float:
        """S so far; see above."""
        ended = [f for f in (*self.findings, *self.past) if f.diverged] + self._in_force("collapse")
        lasted = min((f.onset / self._reference for f in ended), default=1.0)
        done = min(self.horizon.end(self._blocks), self._reference)
        judged = max(1, done - self.horizon.warm_up * self.horizon.block)
        return min(1.0, lasted) * (1 - 0.5 * min(1.0, self._won / judged)) * math.exp(-self._late)

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which `load_state_dict` continues exactly."""
        return {
            "findings": [asdict(f) for f in self.findings],
            "terms": {name: term.state_dict() for name, term in self._terms.items()},
            "critics": {name: critic.state_dict() for name, critic in self._critics.items()},
            "saturated": dict(self._saturated),
            "looks": {name: list(look) for name, look in self._looks.items()},
            "blocks": self._blocks,
            "won": [self._won, self._won_until],
            "late": self._late,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.findings = [Finding(**f) for f in state["findings"]]
        for name, term in self._terms.items():
            term.load_state_dict(state["terms"][name])
        for name, critic in self._critics.items():
            critic.load_state_dict(state["critics"][name])
        self._saturated = dict(state["saturated"])
        self._looks = {name: list(look) for name, look in state["looks"].items()}
        self._blocks, self._late = state["blocks"], state["late"]
        self._won, self._won_until = state["won"]
