"""How much each term of the objective moves each network, and multipliers by which adversarial terms are evened out.

Knows which terms move which network, with which weights, and two rules for multipliers, all as plain numbers; must not
know networks or how gradients are measured (`gradients`).

The two rules and what they come from: `grad_ratio` is VQGAN's adaptive weight (Esser et al., CVPR 2021), measured over
whole networks instead of the last layer, and averaged over time. `calibrated` measures the same ratios in a run's first
steps and keeps their mean, so that afterwards the objective is a fixed one again. In both a term of set weight 1 pulls
as strongly as its anchor, what the network is there for:

| multiplier  | of the terms     | anchor       | measured over |
|-------------|------------------|--------------|---------------|
| `adv_image` | adv_t, adv_s     | both cycles  | G and U       |
| `adv_p`     | adv_p, adv_p_low | segmentation | E             |
| `aux`       | adv_aux          | segmentation | E             |

That of `adv_p` is measured on adv_p alone: adv_p_low keeps its set ratio to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equipoise.config import RunConfig

Norms = Mapping[str, Mapping[str, float]]
"""A network (generator, decoder, encoder) -> a term, or `cycles`, the sum of both -> the norm of its gradient by the
network's weights; of the unweighted loss unless told."""

MULTIPLIED = {"adv_t": "adv_image", "adv_s": "adv_image", "adv_p": "adv_p", "adv_p_low": "adv_p", "adv_aux": "aux"}
"""A term -> the multiplier of its weight."""
RAMPED = ("adv_p", "adv_p_low")
"""The games of predictions, which may gain their weight only gradually."""
LOWEST, HIGHEST = 0.1, 10.0
"""What `grad_ratio` holds a ratio to before it follows it: a critic that is not trained yet, or that has won, hardly
pulls at all."""
DECAY = 0.99
"""Of the multipliers' mean over time, a step."""


def weights(config: RunConfig) -> dict[str, dict[str, float]]:
    """What moves each network, and with which weight: a network -> a term -> its weight, those of weight 0 left out.

    As in `objective`: the encoder follows a share of what moves the decoder, and all that concerns meaning.
    """
    loss = config.loss
    cycles = {"cycle_s": loss.cycle, "cycle_t": loss.cycle}
    decoder = cycles | {"adv_s": loss.adv_image}
    meaning = {"segmentation": 1.0, "adv_p": loss.adv_p, "adv_aux": loss.aux}
    if config.net.low:
        meaning |= {"seg_low": loss.seg_low, "adv_p_low": loss.adv_p * loss.adv_p_low_ratio}
    table = {
        "generator": cycles | {"adv_t": loss.adv_image, "identity": loss.identity},
        "decoder": decoder,
        "encoder": {name: loss.image_in_encoder * weight for name, weight in decoder.items()}
        | {name: loss.segmentation * weight for name, weight in meaning.items()},
    }
    return {network: {name: weight for name, weight in terms.items() if weight} for network, terms in table.items()}


def shares(weighted: Norms) -> dict[str, float]:
    """Which share each term has in moving a network, and how even the shares are.

    Args:
        weighted: the norms of weighted terms' gradients, by network and term.

    Returns:
        `balance/{network}_{term}`: the norm as a share of the sum of all terms' norms, in [0, 1]; those of a network
        add up to 1. `balance/{network}`: their entropy over log K, K being the number of terms, in [0, 1]: 1 where all
        are as important, 0 where one alone moves the network; left out where there is but one. NaN, all of a network's,
        where a norm of it is not finite. A network that nothing moves has no shares, and is left out.
    """
    signals: dict[str, float] = {}
    for network, terms in weighted.items():
        total = sum(terms.values())
        if total == 0:
            continue
        own = {name: norm / total if math.isfinite(total) else math.nan for name, norm in terms.items()}
        signals |= {f"balance/{network}_{name}": share for name, share in own.items()}
        if len(own) > 1:
            entropy = sum(-share * math.log(share) if share else 0.0 for share in own.values())
            signals[f"balance/{network}"] = entropy / math.log(len(own))
    return signals


def ratios(norms: Norms, cycle: float) -> dict[str, float]:
    """By what each adversarial term would have to be multiplied, at weight 1, to pull as strongly as its anchor.

    Args:
        norms: of unweighted terms.
        cycle: weight of the cycles. That of the segmentation losses is a factor of their games too, and drops out.

    Returns:
        A multiplier's name -> the ratio, in [0, inf], for those of which term and anchor are among `norms`. NaN where a
        norm is not finite, or both are 0.
    """
    image = [norms[network] for network in ("generator", "decoder") if network in norms]
    meaning = norms.get("encoder", {})
    found = {}
    adversarial = [terms[name] for terms in image for name in ("adv_t", "adv_s") if name in terms]
    if adversarial and all("cycles" in terms for terms in image):
        anchor = cycle * math.hypot(*(terms["cycles"] for terms in image))
        found["adv_image"] = _over(anchor, math.hypot(*adversarial))
    for multiplier, term in (("adv_p", "adv_p"), ("aux", "adv_aux")):
        if term in meaning and "segmentation" in meaning:
            found[multiplier] = _over(meaning["segmentation"], meaning[term])
    return found


class Balance:
    """The multipliers as they stand, and when to measure anew.

    All are 1 where the mode is `static`, and in every mode until something was measured. A ratio that is NaN is not
    followed: the multiplier stays what it was, so that one broken measurement does not spoil it for ever; the shares of
    that measurement are NaN and say so. `grad_ratio` holds any other to [.1, 10]; `calibrated` takes those into its
    geometric mean that are neither 0 nor infinite, and leaves 1 if there were none.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """Start at 1."""
        self._config, self._cycle = config.balance, config.loss.cycle
        self._table = weights(config)
        self.adv_image, self.adv_p, self.aux = (torch.ones((), device=device) for _ in range(3))
        """Multipliers of `loss.adv_image`, `loss.adv_p` and `loss.aux`: scalars on the device, where a recorded step
        reads them."""
        self._values = dict.fromkeys(self._tensors(), 1.0)
        self._logs: dict[str, list[float]] = {name: [] for name in self._values}

    def due(self, number: int) -> bool:
        """Whether to measure after step `number`, counted from 1."""
        return self._config.every > 0 and number % self._config.every == 0

    def take(self, norms: Norms, number: int) -> None:
        """Follow what was measured after step `number`, as the mode says.

        `calibrated` sets its multipliers once, at the last measurement within the calibration steps, and no more.
        """
        mode, every, last = self._config.mode, self._config.every, self._config.calibration_steps
        found = {name: ratio for name, ratio in ratios(norms, self._cycle).items() if not math.isnan(ratio)}
        if mode == "grad_ratio":
            stays = DECAY**every
            for name, ratio in found.items():
                held = min(max(ratio, LOWEST), HIGHEST)
                self._set(name, stays * self._values[name] + (1 - stays) * held)
        elif mode == "calibrated" and number <= last:
            for name, ratio in found.items():
                self._logs[name] += [math.log(ratio)] if 0 < ratio < math.inf else []
            if number + every > last:
                for name, logs in self._logs.items():
                    if logs:
                        self._set(name, math.exp(sum(logs) / len(logs)))

    def signals(self, norms: Norms, ramp: float = 1.0) -> dict[str, float]:
        """What a measurement tells: shares at the weights as they now stand, and what they are multiplied by.

        Args:
            norms: of unweighted terms.
            ramp: how much of their weight the games of predictions have reached.

        Returns:
            See `shares`; where the mode is not `static` also `balance/weight_{multiplier}`, of those that act.
        """
        now = {
            network: {
                name: norms[network][name] * weight * self._factor(name) * (ramp if name in RAMPED else 1.0)
                for name, weight in terms.items()
            }
            for network, terms in self._table.items()
        }
        acting = {MULTIPLIED[name] for terms in self._table.values() for name in terms if name in MULTIPLIED}
        told = {} if self._config.mode == "static" else {n: v for n, v in self._values.items() if n in acting}
        return shares(now) | {f"balance/weight_{name}": value for name, value in told.items()}

    def state_dict(self) -> dict[str, Any]:
        """A copy of the multipliers, and of what `calibrated` has measured so far."""
        return {"values": dict(self._values), "logs": {name: list(logs) for name, logs in self._logs.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where the saved one was, in place."""
        for name, value in state["values"].items():
            self._set(name, value)
        self._logs = {name: list(logs) for name, logs in state["logs"].items()}

    def _tensors(self) -> dict[str, Tensor]:
        return {"adv_image": self.adv_image, "adv_p": self.adv_p, "aux": self.aux}

    def _factor(self, term: str) -> float:
        return self._values[MULTIPLIED[term]] if term in MULTIPLIED else 1.0

    def _set(self, name: str, value: float) -> None:
        self._values[name] = value
        self._tensors()[name].fill_(value)


def _over(anchor: float, adversarial: float) -> float:
    if not (math.isfinite(anchor) and math.isfinite(adversarial)) or anchor == adversarial == 0:
        return math.nan
    return anchor / adversarial if adversarial else math.inf
