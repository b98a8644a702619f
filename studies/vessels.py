"""What makes SIFA's segmenter draw vessels a few pixels wide?

    python studies/vessels.py                            # screening and finalists: synthetic heads, two CPU cores
    python studies/vessels.py --sifa                     # then SIFA itself, published against `VESSEL`
    python studies/vessels.py --store tof_swi.zarr --store-brain tof_swi_brain.zarr --steps 20000   # the real size

The segmenter is first trained alone: E, C1 and C2 on source slices with their own labels, measured on source slices of
subjects that it did not see (`baselines.source_only` before any domain changes). What it cannot draw there it will not
draw after a translation either, a step costs a sixth of SIFA's, and its spread between seeds is small enough to tell
switches apart. The source and not the target, because these are the labels that SIFA learns from. Two runs of SIFA then
say whether what helps alone helps there.

Synthetic heads are the original study's, cut to the 84.5 mm round their middle and resampled to its SWI's .89 mm: the
vessels are as many pixels wide as there (half of their centrelines 1, a tenth 3 or more; .9 % of the pixels, on 88 % of
the slices), the slices a seventh as large. Measured is the vessel alone, at the last step, on the one validation head.

Finding (22 November 2026, working tree on f6cf388, two Xeon cores shared with others, `studies/vessels.py`: width 1/8,
batch 4, 400 steps of the segmenter alone; mean and standard deviation of seeds 0 to 2, or seed 0):

    switches                          Dice          clDice        precision  recall   CPU ms a step
    published (stride 8)              .39 +- .34    .38 +- .33    .36        .43      52    seeds: .00, .58, .59
    stride 4                          .74           .77           .69        .80      55
    stride 2                          .80 +- .04    .80 +- .07    .90        .73      55
    balanced CE (stride 8)            .39           .62           .25        .94      53
    stride 2, balanced CE             .79 +- .03    .91 +- .03    .68        .93      54
    stride 2, Tversky                 .77           .91           .67        .91      57
    stride 2, focal Tversky           .76           .91           .65        .92      56
    stride 2, balanced CE, Tversky    .62           .90           .45        .98      56
    stride 2, C2's weight 1           .83           .88           .79        .86      55    stride 2, seed 0: .84, .88
    stride 2, foreground .75          .82           .81           .90        .75      56    less than the 88 %
    stride 2, foreground 1            .84           .88           .82        .85      57
    stride 2, brain class             .62           .54           .88        .48      55
    stride 2, clDice .5               .01 +- .01    .02 +- .03    .01        .64      90
    stride 2, balanced CE, clDice .5  .02           .05           .01        .99      89

The head's stride is what matters: 8 gives blocks and, in one seed of three, nothing at all; 2 is worth .2 of Dice for
3 ms (at width 1/4, seed 0, stride 8 has .60 and stride 4 .76). With it, balanced cross-entropy leaves the Dice as it is
and finds .2 more of the vessels, the faint ends of branches first: clDice rises in each of three seeds, by .05, .18 and
.10. That is `VESSEL`. Tversky does the same, both together do too much. C2's weight and foreground sampling change
nothing that one seed could show; sampling hardly can where most slices show vessels. A brain class cost Dice in 400
steps. clDice from a fresh start is a trap: of a vessel that fills the frame there is no soft skeleton, and its loss is
exactly 0; three of four runs ended near there, the fourth without vessels. It may serve a segmenter that draws vessels
already; that is not measured here.

SIFA itself (`--sifa --seeds 1 --steps 300`, the same day and machine): on translated source slices published has Dice
.00, `VESSEL` .48 (clDice .70, recall .92), for 322 CPU ms a step instead of 313. On target slices neither draws a vein
(.00): in 300 steps G leaves arteries bright, and these labels are of arteries, which are no more visible in SWI than
veins are in TOF. So this confirms the head and its loss, one seed, and says nothing about adaptation.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.table import Table

from equipoise import baselines
from equipoise.batches import Cohort
from equipoise.config import PUBLISHED, RunConfig
from equipoise.config_base import Leaf
from equipoise.nets import Sifa
from equipoise.shelf import Shelf, Slices
from equipoise.table import wide_console
from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.ingest import ingest
from slicestore.inputs import Input
from slicestore.phantom import Modality, head
from slicestore.settings import Preprocessing
from slicestore.shape import centreline
from slicestore.store import Domain, Store
from slicestore.volume import Volume, write

Method = Literal["segmenter", "SIFA"]
Changes = Mapping[str, Leaf]

SIDE_MM = 84.5
"""Of the part of a synthetic head that is kept: it holds the arteries' circle and most of what leaves it."""
SUBJECTS = 5
"""Synthetic heads a domain: three train, one validates."""
ORIGINAL: tuple[tuple[Domain, Modality, int], ...] = (("source", "tof", 1), ("target", "swi", 101))

BALANCED: Changes = {"loss.cross_entropy": "balanced"}
TVERSKY: Changes = {"loss.overlap": "tversky"}
FINE: Changes = {"net.head_stride": 2}
SCREENED: dict[str, Changes] = {
    "published": {},
    "stride 4": {"net.head_stride": 4},
    "stride 2": FINE,
    "balanced CE": BALANCED,
    "stride 2, balanced CE": {**FINE, **BALANCED},
    "stride 2, Tversky": {**FINE, **TVERSKY},
    "stride 2, focal Tversky": {**FINE, "loss.overlap": "focal_tversky"},
    "stride 2, balanced CE, Tversky": {**FINE, **BALANCED, **TVERSKY},
    "stride 2, clDice .5": {**FINE, "loss.cldice": 0.5},
    "stride 2, balanced CE, clDice .5": {**FINE, **BALANCED, "loss.cldice": 0.5},
    "stride 2, C2's weight 1": {**FINE, "loss.seg_low": 1.0},
    "stride 2, foreground .75": {**FINE, "data.foreground": 0.75},
    "stride 2, foreground 1": {**FINE, "data.foreground": 1.0},
    "stride 2, brain class": {**FINE, "net.classes": 3},
}
"""What is changed of the published settings: the head's stride, then the losses with either, then one at a time."""

FINALISTS = ("published", "stride 2", "stride 2, balanced CE", "stride 2, clDice .5")
"""Switches that are measured with several seeds."""
VESSEL: Changes = {**FINE, **BALANCED}
"""What the measurements support: the settings of the preset of that name."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says. Without any, small networks on small parts of synthetic heads."""

    store: str | None = None
    """A store of vessel masks from `equipoise prepare`. Without one: synthetic heads, made once."""
    store_brain: str | None = None
    """The same volumes with a brain class beside the vessel; without it a given `store` goes without that switch."""
    sifa: bool = False
    """Compare whole SIFA runs, published against `VESSEL`, instead of segmenters alone."""
    steps: int | None = None
    """Updates in every run; 400 on synthetic heads, else 20 000."""
    width: float | None = None
    """Factor on hidden channels; .125 on synthetic heads, else 1."""
    batch: int | None = None
    """Slices in a step; 4 on synthetic heads, else 8."""
    seeds: int = 3
    """Runs of every finalist; the others have one."""
    processes: int | None = None
    """Runs at a time; one a CPU core, one on a GPU."""
    results: Path = Path("results/vessels")
    """Where runs are kept. Those that are there with the same settings are not run again."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    name: str
    method: Method
    run: RunConfig
    store: str
    folder: Path

    @property
    def result(self) -> Path:
        """Written last: what the table reads."""
        return self.folder / "result.json"


def declare(options: Options) -> RunConfig:
    """The run that all switches share. 400 steps are too few for v2's rate of the segmenters: v1's is taken there."""
    small = options.store is None
    run = PUBLISHED.at("evaluations", 1)
    run = run.at("steps", options.steps or (400 if small else PUBLISHED.steps))
    run = run.at("batch", options.batch or (4 if small else PUBLISHED.batch))
    run = run.at("net.width", options.width or (0.125 if small else PUBLISHED.net.width))
    return run.at("optim.lr_segmenter_ratio", 5.0) if small else run


def jobs(options: Options, stores: Mapping[int, str]) -> list[Job]:
    """All runs of the study; `stores` by their number of classes."""
    method: Method = "SIFA" if options.sifa else "segmenter"
    switches = {"published": {}, "VESSEL": VESSEL} if options.sifa else SCREENED
    made = []
    for name, changes in switches.items():
        run = declare(options).having(changes)
        if run.net.classes not in stores:
            continue
        store = stores[run.net.classes]
        run = run.at("data.cohort", Store.open(store).fingerprint)
        seeds = options.seeds if options.sifa or name in FINALISTS else 1
        folder = options.results / method
        made += [Job(name, method, run.at("seed", s), store, folder / f"{name}-{s}") for s in range(seeds)]
    return made


def main(options: Options) -> None:
    """Do every run that is not there yet, then print and write the table."""
    console = wide_console()
    processes = options.processes or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    # A fresh interpreter each: what torch keeps for a process, threads among it, does not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        if options.store:
            stores = {2: options.store} | ({3: options.store_brain} if options.store_brain else {})
        else:
            stores = synthetic_stores(options.results.parent / "phantoms", pool)
        planned = jobs(options, stores)
        ready = {job for job in planned if (found := read(job)) and found["config"] == job.run.to_dict()}
        console.print(f"{len(planned)} runs into {options.results}, {len(ready)} of them there already")
        running = {pool.submit(train, job): job for job in planned if job not in ready}
        for done in as_completed(running):
            done.result()
            console.print(told(running[done]), highlight=False)
    results = [found for job in planned if (found := read(job))]
    write_rows(options.results / f"{planned[0].method}.csv", results)
    console.print(table(results))


def train(job: Job) -> None:
    """Do one run and write what it reached at its last step."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    cohort = Cohort(Store.open(job.store), job.run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    began, cpu = time.perf_counter(), time.process_time()
    for look in (baselines.sifa if job.method == "SIFA" else baselines.source_only)(job.run, cohort):
        last = look
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    last.panels.save(job.folder / "panels.png")
    net = Sifa(job.run.net).to(cohort.device)
    net.load_state_dict({**net.state_dict(), **last.state()})  # a segmenter trained alone has no generator
    passes: tuple[tuple[Domain, bool], ...] = (("source", job.method == "SIFA"), ("target", False))
    quality = {
        domain: measured(segmented(net, cohort.val[domain], translate), cohort.val[domain])
        for domain, translate in passes
        if cohort.val[domain].area is not None
    }
    result = {
        "name": job.name,
        "config": job.run.to_dict(),
        "step": last.step,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "quality": quality,
    }
    partial = job.result.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(job.result)


@torch.no_grad()
def segmented(net: Sifa, slices: Shelf | Slices, translate: bool, batch: int = 8) -> np.ndarray:
    """Where C1 sees vessels: bool `(N, H, W)`. `translate`: in G(x) instead of x."""
    net.eval()
    found = []
    for start in range(0, len(slices), batch):
        image = slices.take(range(start, min(start + batch, len(slices)))).image
        features = net.encoder(net.generator(image), "translated") if translate else net.encoder(image, "target")
        found.append((net.segmenter(features, (image.shape[-2], image.shape[-1])).argmax(1) == 1).cpu().numpy())
    return np.concatenate(found)


def measured(prediction: np.ndarray, slices: Shelf | Slices) -> dict[str, float]:
    """`agreement` with the vessel labels, mean over subjects."""
    label, subjects = slices.label, np.array(slices.subject)
    if label is None:
        raise ValueError("slices without labels: nothing to measure by")
    vessel = (label == 1).cpu().numpy()
    each = [agreement(prediction[subjects == s], vessel[subjects == s]) for s in sorted(set(slices.subject))]
    return {name: statistics.mean(one[name] for one in each) for name in each[0]}


def agreement(prediction: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Dice, clDice, precision and recall of one subject's vessels, bool `(z, y, x)`; 0 where there is no such share.

    clDice (Shit et al., CVPR 2021) is the harmonic mean of two shares: of the prediction's centreline that lies in the
    label, and of the label's that lies in the prediction. Centrelines are of the volume, not of its slices.
    """
    both = int((prediction & label).sum())
    precision = _share(both, int(prediction.sum()))
    recall = _share(both, int(label.sum()))
    along_p, along_g = centreline(prediction), centreline(label)
    right = _share(int(label[tuple(along_p.T)].sum()), len(along_p))
    found = _share(int(prediction[tuple(along_g.T)].sum()), len(along_g))
    return {
        "dice": _share(2 * precision * recall, precision + recall),
        "cldice": _share(2 * right * found, right + found),
        "precision": precision,
        "recall": recall,
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def read(job: Job) -> dict[str, Any] | None:
    """What a run reached, if it has ended."""
    return json.loads(job.result.read_text()) if job.result.is_file() else None


def told(job: Job) -> str:
    """One line about a run that has ended."""
    result = read(job) or {}
    scores = ", ".join(f"{d} Dice {q['dice']:.3f} clDice {q['cldice']:.3f}" for d, q in result["quality"].items())
    return f"{job.name:>32}, seed {job.run.seed}: {scores}, {result['seconds']:.0f} s"


def table(results: list[dict[str, Any]]) -> Table:
    """A row a switch; mean and standard deviation over seeds."""
    whole = any("VESSEL" in r["name"] for r in results)
    domains = ("target", "source") if whole else ("source",)
    out = Table(title=f"Vessels at the last step, on subjects that nobody trained on; {results[0]['step']} steps")
    out.add_column("switches")
    measures = ("dice", "cldice") if whole else ("dice", "cldice", "precision", "recall")
    columns = [(d, m) for d in domains for m in measures]
    for domain, name in columns:
        out.add_column(f"{domain} {name}" if whole else name, justify="right")
    out.add_column("seeds", justify="right")
    out.add_column("CPU ms a step", justify="right")
    for name in dict.fromkeys(r["name"] for r in results):
        mine = [r for r in results if r["name"] == name]
        scores = [spread([r["quality"][domain][measure] for r in mine]) for domain, measure in columns]
        cost = statistics.median(r["cpu_seconds"] / r["step"] for r in mine)
        out.add_row(name, *scores, str(len(mine)), f"{1000 * cost:.0f}")
    return out


def spread(values: list[float]) -> str:
    """Mean and, of several, their standard deviation."""
    deviation = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def write_rows(path: Path, results: list[dict[str, Any]]) -> None:
    """Every run, a row for each domain it was measured on."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["switches", "seed", "step", "domain", "dice", "cldice", "precision", "recall", "cpu_seconds"])
        for result in results:
            head_ = [result["name"], result["config"]["seed"], result["step"]]
            for domain, q in result["quality"].items():
                scores = [f"{q[name]:.4f}" for name in ("dice", "cldice", "precision", "recall")]
                rows.writerow([*head_, domain, *scores, f"{result['cpu_seconds']:.1f}"])


def synthetic_stores(folder: Path, pool: ProcessPoolExecutor) -> dict[int, str]:
    """Parts of synthetic heads, with vessels as the only structure and with the brain beside them; made once."""
    raw = folder / "raw-parts"
    raw.mkdir(parents=True, exist_ok=True)
    wanted = [(domain, modality, first + i) for domain, modality, first in ORIGINAL for i in range(SUBJECTS)]
    inputs = list(pool.map(_part, [raw] * len(wanted), *zip(*wanted, strict=True)))
    stores = {}
    for classes, brain_class in ((2, 0), (3, 2)):
        path = folder / f"parts-{SUBJECTS}-{classes}.zarr"
        if not (path / "manifest.json").is_file():
            ingest(inputs, path, Preprocessing(size=96, brain_class=brain_class))
        stores[classes] = str(path)
    return stores


def _part(folder: Path, domain: Domain, modality: Modality, subject: int) -> Input:
    """Write the middle of one head, unless it is there."""
    name = f"{modality}-{subject:03d}"
    image, vessel, brain = (folder / f"{name}{end}.nii.gz" for end in ("", "_vessel", "_brain"))
    if not image.is_file():
        made = head(modality, subject=subject, original_size=True)
        for path, volume in ((vessel, made.vessel), (brain, made.brain), (image, made.image)):
            write(middle(volume, SIDE_MM), path)  # the image last: it says that all are there
    return Input(domain, name, image, vessel, brain)


def middle(volume: Volume, side_mm: float) -> Volume:
    """The part of every slice within `side_mm` / 2 of its middle; all slices."""
    grid = volume.geometry
    counts = [min(n, round(side_mm / step)) for n, step in zip(grid.size[:2], grid.spacing_mm[:2], strict=True)]
    x, y = ((n - count) // 2 for n, count in zip(grid.size[:2], counts, strict=True))
    voxels = np.ascontiguousarray(volume.voxels[:, y : y + counts[1], x : x + counts[0]])
    size = (counts[0], counts[1], grid.size[2])
    return Volume(voxels, Geometry(size, grid.spacing_mm, grid.point_mm((x, y, 0)), grid.direction))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
