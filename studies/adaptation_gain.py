"""How much of the gap between no adaptation and target masks does SIFA close, and how much of that is tuning?

    python studies/adaptation_gain.py                                # 80 minutes: synthetic heads, two CPU cores
    python studies/adaptation_gain.py --size 256 --mask vessel       # synthetic heads at the real size: a GPU, hours
    python studies/adaptation_gain.py --store cohort.zarr            # your own; repeat the command to go on

Six methods by three seeds, on the same slices, with the same segmenters and as many updates of them (see
`equipoise.baselines`):

    none          trained on source slices as they are
    matched       on source slices with inverted and histogram-matched grey values
    CycleGAN      on translations of a CycleGAN that was trained before
    SIFA          as published, but for what `declare` says
    SIFA, tuned   the best point of a search that comes first and sees no target mask: it maximises `--objective`
    supervised    on target slices with their masks: what could be had with them

Reported is what the last step's networks do on test subjects, whom nothing was trained or chosen by, in the scans' own
grids: Dice, HD95, and the share of the gap, (method - none) / (supervised - none), of mean Dice. Every run is tested
once. The search's runs are not among those in the table.

Finding (2026-11-28, commit 39dcc81, two shared CPU cores; `python studies/adaptation_gain.py`: 64 x 64, width .125,
batch 4, 500 steps, heads 3, brain, three test subjects; the rows but "tuned" are of commit 71c817e). Dice in the scans'
grids, mean +- standard deviation over seeds, seeds 0, 1, 2, and the share of the gap:

    none          .446 +- .234    .444 .214 .682      0 %
    matched       .939 +- .016    .950 .946 .920     96 %
    CycleGAN      .782 +- .204    .549 .929 .867     65 %
    SIFA          .893 +- .026    .863 .906 .910     87 %
    SIFA, tuned   .895 +- .030    .924 .864 .898     88 %
    supervised    .959 +- .003    .962 .960 .956    100 %

* One curve of grey values does better than SIFA in all three seeds. Synthetic heads differ by such a curve and little
  else, which real scanners do not; on real scans it is what SIFA has to beat.
* SIFA beats no adaptation in all seeds, CycleGAN in two of three and by mean, with an eighth of its spread.
* Tuning gained nothing that three seeds could show: the best of 24 points (relativistic critics, rate 8e-5, weak
  auxiliary losses) came to a composite of .945 where SIFA as it is came to .925, and to the same Dice. It bought peace:
  its S is 1 in every seed, while D_s wins against SIFA as it is in every seed of the search. With one seed a point
  (commit 71c817e) the search had found no better point at all.
* Seeds differ by more than good points do: in their runs' composite (`search/report.html`) those of the best point by
  .04, those of 10 of the 23 points with three by more than .1 (the 24th was given up after its first, S .80).
* How scores rank the search's 70 runs by target Dice on validation subjects (Spearman, `search/report.html`): entropy
  .71, nuclear norm .69, information .67, composite .62, predicted volume .59, translated Dice .50. Over the 24 runs of
  one seed it was composite and volume .94, translated Dice .62: of so few runs, that told little.

Before, validation subjects of the same heads at the slices' size, without `matched` and a search (2026-11-22, commit
c94b555): none .549, CycleGAN .709, SIFA .875, supervised .955. Vessels and 256 x 256 have not been run: no GPU.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from equipoise import baselines, weights
from equipoise.baselines import Look
from equipoise.batches import Cohort
from equipoise.config import PUBLISHED, Precision, RunConfig
from equipoise.evaluation import judge
from equipoise.held_out import Masks, labelled, masks, reference
from equipoise.launch.conduct import conduct, mistakes_told
from equipoise.launch.options import Options as SearchOptions
from equipoise.model import run_of
from equipoise.nets import Inference
from equipoise.search import Choice, ObjectiveName, Range, Space
from equipoise.study import Study, StudyFolder
from equipoise.table import wide_console
from slicestore.errors import InputError
from slicestore.ingest import ingest
from slicestore.inputs import inputs_from_table
from slicestore.phantom import write_cohort
from slicestore.settings import Preprocessing
from slicestore.store import Store
from slicestore.volume import Volume

FIELD_MM = 192.0
"""Side of a synthetic head's slices."""
COARSE = 128
"""Up to this many pixels a side, the small phantoms' 1.5 mm are fine enough."""

METHODS: dict[str, Callable[[RunConfig, Cohort, Store], Iterator[Look]]] = {
    "none": lambda run, cohort, _: baselines.source_only(run, cohort),
    "matched": lambda run, cohort, _: baselines.matched(run, cohort),
    "CycleGAN": lambda run, cohort, _: baselines.cyclegan_then_segment(run, cohort),
    "SIFA": lambda run, cohort, _: baselines.sifa(run, cohort),
    "SIFA, tuned": lambda run, cohort, _: baselines.sifa(run, cohort),
    "supervised": baselines.supervised,
}
LONGEST_FIRST = ("CycleGAN", "SIFA", "SIFA, tuned", "matched", "none", "supervised")
SPACE: Space = {
    "optim.lr": Range(5e-5, 1e-3),
    "optim.lr_segmenter_ratio": Range(1.0, 8.0),
    "loss.adversarial": Choice(("lsgan", "ns", "ra_lsgan")),
    "loss.cycle": Range(2.0, 30.0),
    "loss.adv_p": Range(0.01, 1.0),
    "loss.aux": Range(0.01, 1.0),
    "loss.image_in_encoder": Range(0.01, 1.0),
}
"""What "tuned" may change: rates, the game, and the weights that the 2022 study asked to have balanced."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says. Without any, small networks on small synthetic heads."""

    store: str | None = None
    """A store from `equipoise prepare` with masks in both domains. Without one: synthetic heads, made once."""
    mask: Literal["brain", "vessel"] = "brain"
    """What is segmented on synthetic heads."""
    size: int = 64
    """Pixels a side of synthetic heads' slices; above 128 the heads have the study's original resolution."""
    subjects: int = 15
    """Synthetic heads a domain; three fifths of them train, a fifth validates, a fifth is for the test."""
    heads: int = 3
    """Seed of the synthetic heads. The small settings were chosen on those of 0 and 1: see `declare`."""
    steps: int | None = None
    """Updates of the segmenters in every run; 500 at size 64, else 20 000."""
    width: float | None = None
    """Factor on hidden channels; .125 at size 64, else 1."""
    batch: int | None = None
    """Slices of each domain in a step; 4 at size 64, else 8."""
    seeds: int = 3
    """Runs of every method."""
    points: int = 24
    """Points of the search that tunes SIFA; the first is SIFA as it is. Asked for more, a search goes on."""
    search_seeds: int = 3
    """Runs of every point of the search: it goes by their mean."""
    objective: ObjectiveName = "composite"
    """What the search maximises, on validation subjects."""
    tuned: Path | None = None
    """Instead of a search: the folder of a study whose best point, or of a run whose settings, are the tuned ones."""
    precision: Precision = "float32"
    """Of convolutions; see `equipoise train --help`."""
    processes: int | None = None
    """Runs at a time; one a CPU core, one on a GPU."""
    results: Path = Path("results/adaptation_gain")
    """Where runs are kept. Those that are there with the same settings are not run again."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one method."""

    method: str
    run: RunConfig
    store: str
    folder: Path
    alone: bool
    """Whether it may use all cores."""

    @property
    def result(self) -> Path:
        """Written last: what `table` reads."""
        return self.folder / "result.json"


def declare(options: Options, store: Store) -> RunConfig:
    """The run that all methods share, but for its seed.

    The small size departs from the published settings, and by what was seen on heads 0 and 1 with target masks: an
    oracle's choice, but of heads that are not in the table.

    * Segmenters at v1's rate, 1e-3: a few hundred steps are too few for v2's 2e-4.
    * One percent of intensities clipped at either end. Between TOF's minimum and maximum, which is that of a few
      arteries, tissue lies within a tenth of the range: a cycle loss hardly sees it, G could turn it black and did so
      in a CycleGAN, and on heads 0 SIFA came to .75 in 600 steps where it comes to .90 so.
    * Rates that fall to 0 over the second half, v1's option: at a constant rate Dice swings from one evaluation to the
      next, and the last step is a draw.
    * No end by the monitor. Its rules for short runs ended one run at step 491, with a Dice of .91; presumably for the
      source's cycle loss, which creeps from .05 to .1 there.
    """
    small = options.store is None and options.size <= 64
    run = PUBLISHED.at("data.cohort", store.fingerprint).at("net.classes", store.classes)
    run = run.at("steps", options.steps or (500 if small else PUBLISHED.steps))
    run = run.at("batch", options.batch or (4 if small else PUBLISHED.batch))
    run = run.at("net.width", options.width or (0.125 if small else PUBLISHED.net.width))
    run = run.at("speed.precision", options.precision)
    if small:
        run = run.at("optim.lr_segmenter_ratio", 5.0).at("data.percentile", 1.0).at("evaluations", 5)
        run = run.at("optim.schedule", "linear_half")
        for name in ("cycle", "loss", "gap"):
            run = run.at(f"monitor.{name}_growth", 1e6)
    return run


def main(options: Options) -> None:
    """Do every run that is not there yet, then print and write the table."""
    console = wide_console()
    path = options.store or str(synthetic_store(options))
    check(Store.open(path))
    run = declare(options, Store.open(path))
    tuned = tune(options, run, path)
    console.print(f"tuned: {differences(run, tuned)}", highlight=False)
    jobs = planned(options, run, tuned, path)
    ready = {job for job in jobs if (found := read(job)) and found["config"] == job.run.to_dict()}
    console.print(f"{len(jobs)} runs of {run.steps} steps into {options.results}, {len(ready)} of them there already")
    # A fresh interpreter each: what torch keeps for a process, threads among it, does not survive a fork.
    with ProcessPoolExecutor(_processes(options), mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(train, job): job for job in jobs if job not in ready}
        for done in as_completed(running):
            done.result()
            console.print(told(running[done]), highlight=False)
    results = [found for job in jobs if (found := read(job))]
    write(options.results / "table.csv", results)
    tell(console, results, run)


def planned(options: Options, run: RunConfig, tuned: RunConfig, store: str) -> list[Job]:
    """All runs, the longest first."""
    alone = torch.cuda.is_available() or _processes(options) == 1
    return [
        Job(
            method,
            (tuned if method == "SIFA, tuned" else run).at("seed", seed),
            store,
            options.results / f"{method.replace(', ', '-')}-{seed}",
            alone,
        )
        for method in LONGEST_FIRST
        for seed in range(options.seeds)
    ]


def check(store: Store) -> None:
    """Refuse a store on which nothing could be learned or measured, before anything is run.

    Raises:
        InputError: it has no target masks to teach the oracle, or to test by.
    """
    if not any(entry.labelled for entry in store.select("target", "train")):
        raise InputError(
            store.path,
            found="no target masks in train",
            rule="the study trains an oracle on target masks and tests by them",
            remedy="prepare a store with masks of target subjects too",
        )
    labelled(store, "test")


def tune(options: Options, run: RunConfig, store: str) -> RunConfig:
    """The settings that a search without target masks finds best, or those of a folder."""
    if options.tuned is not None:
        return apart_from_data(run_of(options.tuned)[0].config, run)

    def declared(_: SearchOptions) -> Study:
        return Study(
            name="search",
            question="Which rates and weights make SIFA segment target images best, as far as source masks tell?",
            run=run.at("seed", 1000),  # and those after it: none of the table's
            space=SPACE,
            first=({},),
            labels=("as published",),
            objective=options.objective,
            points=options.points,
            seeds=options.search_seeds,
            pruner="none",
        )

    folder = options.results / "search"
    there = (folder / "study.json").is_file()
    if there:  # of these very runs, or an error
        kept = StudyFolder.open(folder)
        kept.agree(dataclasses.replace(declared(SearchOptions()), points=max(options.points, kept.study.points)))
    if not (folder / "report.html").is_file() or StudyFolder.open(folder).study.points < options.points:
        conduct(
            declared,
            SearchOptions(
                store=store, name="search", results=options.results, resume=there, confirm_workers=0, wandb="disabled"
            ),
        )
    return apart_from_data(run_of(folder)[0].config, run)


def apart_from_data(found: RunConfig, run: RunConfig) -> RunConfig:
    """Settings that were found elsewhere, on this cohort and as long as the other runs."""
    kept = ("data.cohort", "net.classes", "steps", "batch", "net.width", "seed", "workers", "evaluations")
    return found.having({path: run.flat()[path] for path in kept})


def differences(run: RunConfig, other: RunConfig) -> str:
    """Which settings differ, and how."""
    old, new = run.flat(), other.flat()
    return ", ".join(f"{k} {_number(new[k])} (was {_number(old[k])})" for k in new if new[k] != old[k]) or "nothing"


def train(job: Job) -> None:
    """Run one method to its end, test its last networks, and write what it reached."""
    if not job.alone:
        torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = Store.open(job.store)
    cohort = Cohort(store, job.run, device)
    began, looks = time.perf_counter(), []
    for look in METHODS[job.method](job.run, cohort, store):
        look.panels.save(job.folder / f"step-{look.step:06d}.png")
        looks.append({"step": look.step, **look.quality})
    seconds = time.perf_counter() - began
    failed, tested = "", []
    try:
        net = Inference(job.run.net)
        weights.fill(net, weights.of(look.state(), {}), job.folder)
        tested = test(masks(net.to(device).eval(), cohort.intake, store, "test"), cohort)
    except InputError as error:  # networks that are no numbers: a finding, of runs that find nothing
        failed, tested = error.found, test(nothing(store), cohort)
    result = {
        "method": job.method,
        "config": job.run.to_dict(),
        "seconds": seconds,
        "looks": looks,
        "failed": str(failed),
        "test": tested,
    }
    partial = job.result.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(job.result)


def nothing(store: Store) -> Iterator[Masks]:
    """What a network predicts of test subjects that predicts nothing."""
    for entry in labelled(store, "test"):
        known = reference(store, entry)
        yield Masks(entry.subject, Volume(np.zeros_like(known.voxels), known.geometry), known)


def test(predicted: Iterable[Masks], cohort: Cohort) -> list[dict[str, Any]]:
    """Dice and HD95 of each test subject, in the scan's grid; over structures the mean, the brain class left out."""
    structures = [k for k in range(1, cohort.classes) if k != cohort.brain_class]
    found = []
    for subject, own, known in predicted:
        rows = judge(subject, own, known, structures, subject)
        found.append(
            {
                "subject": subject,
                "dice": statistics.mean(row.agreement.dice for row in rows),
                "hd95_mm": statistics.mean(row.agreement.hd95_mm for row in rows),
            }
        )
    return found


def read(job: Job) -> dict[str, Any] | None:
    """What a run reached, if it has ended."""
    return json.loads(job.result.read_text()) if job.result.is_file() else None


def told(job: Job) -> str:
    """One line about a run that has ended."""
    result = read(job) or {}
    return (
        f"{job.method:>12}, seed {job.run.seed}: Dice {_mean(result, 'dice'):.3f} on test subjects "
        f"at step {result['looks'][-1]['step']}, {result['seconds']:.0f} s"
    )


def tell(console: Console, results: Sequence[dict[str, Any]], run: RunConfig) -> None:
    """Print the table: a row a method."""
    out = Table(title=f"Target test subjects, in the scans' grids; {run.steps} steps, width {run.net.width:g}")
    for name in (
        "method",
        "Dice",
        "of each seed",
        "share of the gap",
        "HD95 mm",
        "Dice on validation",
        "minutes a run",
    ):
        out.add_column(name, justify="left" if name == "method" else "right")
    of = {method: [r for r in results if r["method"] == method] for method in METHODS}
    dice = {method: [_mean(r, "dice") for r in mine] for method, mine in of.items()}
    for method, mine in of.items():
        early = [r["looks"][-1]["step"] for r in mine if r["looks"][-1]["step"] < run.steps]
        out.add_row(
            method
            + (f" (ended at {', '.join(map(str, early))})" if early else "")
            + (f" ({failed} without finite networks)" if (failed := sum(bool(r.get("failed")) for r in mine)) else ""),
            spread(dice[method]),
            " ".join(f"{x:.3f}" for x in dice[method]),
            share(dice, method),
            spread([_mean(r, "hd95_mm") for r in mine], digits=1),
            spread([r["looks"][-1].get("quality/target_dice", math.nan) for r in mine]),
            f"{statistics.mean(r['seconds'] for r in mine) / 60:.1f}",
        )
    out.caption = f"{len(results[0]['test'])} test subjects. +-: one standard deviation over seeds"
    console.print(out)


def share(dice: dict[str, list[float]], method: str) -> str:
    """Share of the gap between no adaptation and supervision that a method closes, by mean Dice over seeds."""
    none, full, own = (statistics.mean(dice[name]) for name in ("none", "supervised", method))
    return f"{(own - none) / (full - none):.0%}" if full > none else "no gap"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and, of several, their standard deviation."""
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def write(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Every test subject of every run, a row each."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["method", "seed", "seconds_of_run", "step", "subject", "dice", "hd95_mm"])
        for result in results:
            head = [result["method"], result["config"]["seed"], f"{result['seconds']:.0f}", result["looks"][-1]["step"]]
            for one in result["test"]:
                rows.writerow([*head, one["subject"], f"{one['dice']:.4f}", f"{one['hd95_mm']:.2f}"])


def synthetic_store(options: Options) -> Path:
    """Synthetic heads with masks in both domains; made once."""
    name = f"{options.mask}-{options.size}-{options.subjects}-{options.heads}"
    store = options.results.parent / "phantoms" / f"{name}.zarr"
    if not (store / "manifest.json").is_file():
        fine = options.size > COARSE
        raw = store.with_name(f"raw-{options.subjects}-{options.heads}{'-fine' if fine else ''}")
        made = raw / "cohort.csv"
        if not made.is_file():
            made = write_cohort(raw, subjects=options.subjects, seed=options.heads, original_size=fine)
        spacing_mm = FIELD_MM / options.size
        ingest(inputs_from_table(made, options.mask), store, Preprocessing(size=options.size, spacing_mm=spacing_mm))
    return store


def _processes(options: Options) -> int:
    return options.processes or (1 if torch.cuda.is_available() else os.cpu_count() or 1)


def _mean(result: dict[str, Any], measure: str) -> float:
    """Over test subjects."""
    return statistics.mean(float(one[measure]) for one in result["test"])


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    given = tyro.cli(Options, description=__doc__)
    with mistakes_told():
        main(given)
