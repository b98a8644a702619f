"""A study of seconds, for tests that start, kill and resume the real thing."""

from equipoise.config import PUBLISHED
from equipoise.launch.conduct import main
from equipoise.launch.options import Options
from equipoise.search import Choice, Range, Space
from equipoise.study import Study

SPACE: Space = {
    "optim.lr": Range(1e-4, 1e-2),
    "loss.adversarial": Choice(("lsgan", "ns", "hinge")),
    "critic.penalty": Choice(("none", "r1")),
    "critic.gamma": Range(1e-3, 1e-1, when={"critic.penalty": ("r1",)}),
}


def declare(options: Options) -> Study:
    """Five points of 40 steps on whatever store is given."""
    run = PUBLISHED.at("net.width", 0.0625).at("batch", 2).at("pool", 4).at("steps", options.steps or 40)
    return Study(
        name="tiny",
        question="Does the path hold?",
        run=run.at("evaluations", 4).at("workers", options.workers_per_run),
        space=SPACE,
        first=({"optim.lr": 2e-4}, {"optim.lr": 2e-3, "loss.adversarial": "hinge", "optim.beta2": 0.99}),
        labels=("inside the space", "outside"),
        points=5 if options.points is None else options.points,
    )


if __name__ == "__main__":
    main(declare, __doc__)
