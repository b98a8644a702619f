"""What each stabiliser adds to a step: 128 x 128, width 1/4, on synthetic tensors, one thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

import torch
from measure import REPEATS, Result, paired, seconds
from step_table import Stepper

from equipoise.config import PUBLISHED
from equipoise.config_base import Leaf

SIZE = 128
BASE = PUBLISHED.having({"net.width": 0.25, "batch": 2, "optim.ema": 0.0, "balance.every": 0})
STABILISERS: dict[str, Mapping[str, Leaf]] = {
    "spectral norm": {"net.critic_norm": "spectral"},
    "r1": {"critic.penalty": "r1"},
    "r1, every 16th": {"critic.penalty": "r1", "critic.penalty_every": 16},
    "r1r2": {"critic.penalty": "r1r2"},
    "r1r2, every 4th": {"critic.penalty": "r1r2", "critic.penalty_every": 4},
    "gp0_mix": {"critic.penalty": "gp0_mix"},
    "relativistic averages": {"loss.adversarial": "ra_lsgan"},
    "shifts and holes": {"critic.translation": 0.125, "critic.cutout": 0.5},
    "LeCam": {"critic.lecam": 0.1},
    "clipping": {"optim.clip": 1.0},
    "identity": {"loss.identity": 1.0},
    "running mean": {"optim.ema": 0.999},
}
STEPS = 16
"""A multiple of every period above, so that each run has its share of dear steps."""


def stabilisers(_: Path) -> Iterator[Result]:
    """The time of a step with each stabiliser, as a multiple of the published step's."""
    steppers = {name: Stepper(BASE.having(changes), SIZE, torch.device("cpu")) for name, changes in STABILISERS.items()}
    base = Stepper(BASE, SIZE, torch.device("cpu"))
    for stepper in (base, *steppers.values()):
        stepper()

    def many(stepper: Stepper) -> None:
        for _ in range(STEPS):
            stepper()

    for name, stepper in steppers.items():
        turns = [(seconds(lambda s=stepper: many(s)), seconds(lambda: many(base))) for _ in range(max(1, REPEATS // 2))]
        ratio = median(ours / theirs for ours, theirs in turns)
        where = f"{SIZE} x {SIZE}, width 1/4, {BASE.batch} slices of each domain"
        yield Result(f"step.{name.replace(' ', '_').replace(',', '')}", ratio, "of a step", "the published step", where)
    ours, theirs = paired(lambda: base.run.weigh(base.batch), base)
    yield Result("step.weighing", ours / theirs, "of a step", "the published step", "every balance.every steps")
