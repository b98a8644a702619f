"""A study whose points depend on its seed alone, of runs long enough to be killed in; for `test_chaos.py`."""

from equipoise.config import PUBLISHED
from equipoise.launch.conduct import main
from equipoise.launch.options import Options
from equipoise.search import Choice, Range
from equipoise.study import Study


def declare(options: Options) -> Study:
    """Points drawn by number, none stopped for its Dice: who ends first must not matter."""
    run = PUBLISHED.having({"net.width": 0.0625, "batch": 2, "pool": 4, "steps": options.steps or 600})
    return Study(
        name="chaos",
        question="Is anything lost?",
        run=run.at("evaluations", 6),
        space={"optim.lr": Range(1e-4, 1e-2), "loss.adversarial": Choice(("lsgan", "ns", "hinge"))},
        first=({"optim.lr": 2e-4},),
        points=options.points or 12,
        sampler="RandomSampler",
        pruner="none",
    )


if __name__ == "__main__":
    main(declare, __doc__)
