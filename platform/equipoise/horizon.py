"""How long a monitor looks before it judges, for a run of a given length.

Knows steps and blocks; must not know what is judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from equipoise.config import MonitorConfig


@dataclass(frozen=True, slots=True)
class Horizon:
    """The lengths of the rules for a run of `steps`: in blocks, but for `steps` and `block`.

    They are steps by nature: 500 and 1000 at 20 000 steps, proportionally fewer in shorter runs, and never fewer than
    10 and 20; so a record of coarser blocks is judged by fewer of them, but never by fewer than 4 and 8.
    """

    steps: int
    block: int
    """Steps in a block: `block_steps`, or steps / 400 if that is shorter, at least 1."""
    warm_up: int
    """Blocks before anything but a non-finite value is judged: 1000 steps, or 2.5 % of the run if that is longer."""
    hold: int
    """Blocks for which a rule must hold without a gap: 500 steps, or 1.25 % of the run if that is longer."""

    @classmethod
    def of(cls, config: MonitorConfig, steps: int, block: int | None = None) -> Horizon:
        """The horizon of a run of `steps` steps.

        Args:
            config: the limits.
            steps: of the planned run.
            block: steps in a block, where a record tells no finer.
        """
        block = block or max(1, min(config.block_steps, steps // 400))
        short = _short(steps)
        return cls(steps, block, _blocks(max(2 * short, steps / 40), block, 8), _blocks(max(short, steps / 80), block))

    @property
    def short(self) -> int:
        """Blocks in the short window of medians and means: 500 steps."""
        return _blocks(_short(self.steps), self.block)

    @property
    def long(self) -> int:
        """Blocks in the long window of medians: 1000 steps."""
        return 2 * self.short

    @property
    def memory(self) -> int:
        """Blocks that the rules look back: 8 holds, or a fifth of the run if that is less; but 2 and a long window."""
        return max(2 * self.hold + self.long, min(8 * self.hold, self.steps // (5 * self.block)))

    @property
    def patience(self) -> int:
        """Blocks for which what may pass must hold: 4 holds, or all that the plateau before is remembered for."""
        return min(4 * self.hold, self.memory - self.long)

    def end(self, blocks: int) -> int:
        """The step at which so many blocks end."""
        return min(blocks * self.block, self.steps)


def _short(steps: int) -> float:
    return min(500.0, max(10.0, steps / 40))


def _blocks(steps: float, block: int, least: int = 4) -> int:
    return max(least, math.ceil(steps / block - 1e-9))
