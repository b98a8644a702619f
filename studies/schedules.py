"""Does the fused schedule train as the published sequential one does?

    python studies/schedules.py                                              # synthetic heads, two CPU cores
    python studies/schedules.py --store cohort.zarr --steps 20000            # the real size

Of one step, the updates of G and D_t are the same in both (a test says so); those of the others are taken one learning
rate's worth earlier, and dropout is drawn once instead of anew for every update (see `equipoise.fused`). Whether that
matters over a training cannot be proved, so it is measured: the same seeds, batches and settings by either schedule,
every signal as a mean over a tenth of the run at four horizons, and the difference between schedules against the spread
that seeds alone make. A difference well within that spread is one that no single run could show.

Finding (22 November 2026, working tree on f6cf388, two Xeon cores shared with others, `studies/schedules.py`: 64 x 64
heads with brain masks, width 1/8, batch 4, 300 steps, seeds 0 to 2; all six runs stable). Means over the last 30 steps,
difference with its standard deviation over seeds, and in standard deviations between seeds of one schedule:

    signal                    sequential  fused   difference          in seeds' spread
    cycle, source             .0437       .0435   -.0002 +- .0038     -0.1
    cycle, target             .0638       .0653   +.0015 +- .0094     +0.1
    segmentation              .0931       .0892   -.0039 +- .0118     -0.4
    G against D_t             .477        .459    -.018 +- .018       -0.1
    U against D_s             .583        .525    -.057 +- .025       -0.3
    E against D_p1            .278        .266    -.012 +- .014       -1.6
    D_t; D_s; D_p1            .139; .126; .239    .142; .141; .246    +0.1; +0.4; +1.4
    AUC of D_t; D_s; D_p1     .882; .903; .623    .881; .887; .575    -0.0; -0.4; -1.6
    Dice, translated source   .864        .842    -.022 +- .057       -0.6
    Dice, target              .570        .746    +.176 +- .099       +1.4

Curves of cycles and of the images' games lie on each other for about 100 steps, seed by seed, and then among those of
other seeds; 2 of 56 rows (14 signals, 4 horizons) differ by more than 2 standard deviations between seeds, both at step
75, neither later. So the fused schedule trains as the published one does, as far as three seeds can tell, for .19
instead of .41 CPU seconds a step. They cannot tell everything: the fused runs end with a higher target Dice in each of
the three seeds (.82, .80, .62 against .55, .72, .45) and with a D_p1 that tells less. The sequential ones' target Dice
jumps more between evaluations; their running statistics of batch norm take in more passes a step, hence fewer steps.
That this is the reason is a guess. The real size has not been run.
"""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import tyro
from rich.table import Table

from equipoise.batches import Cohort
from equipoise.config import PUBLISHED, RunConfig, Updates
from equipoise.table import wide_console
from equipoise.train import fit
from slicestore.errors import InputError
from slicestore.ingest import ingest
from slicestore.inputs import inputs_from_table
from slicestore.phantom import write_cohort
from slicestore.settings import Preprocessing
from slicestore.store import Store

FIELD_MM = 192.0
"""Side of a synthetic head's slices."""
SIGNALS = {
    "loss/cycle_s": "cycle, source",
    "loss/cycle_t": "cycle, target",
    "loss/segmentation": "segmentation",
    "loss/adv_t": "G against D_t",
    "loss/adv_s": "U against D_s",
    "loss/adv_p": "E against D_p1",
    "critic/loss_t": "D_t",
    "critic/loss_s": "D_s",
    "critic/loss_p": "D_p1",
    "auc/t": "AUC of D_t",
    "auc/s": "AUC of D_s",
    "auc/p": "AUC of D_p1",
    "quality/translated_dice": "Dice, translated source",
    "quality/target_dice": "Dice, target",
}
"""What is compared, with the words for it; the first six are losses of the side that the critics play against."""
HORIZONS = (0.1, 0.25, 0.5, 1.0)
"""Shares of the run at which means are taken, each over the tenth of the run that ends there."""
COLOURS: dict[Updates, str] = {"sequential": "#b0543c", "fused": "#1f4e8c"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says. Without any, small networks on small synthetic heads."""

    store: str | None = None
    """A store from `equipoise prepare`. Without one: synthetic heads with brain masks, made once."""
    size: int = 64
    """Pixels a side of synthetic heads' slices."""
    subjects: int = 10
    """Synthetic heads a domain; six tenths of them train, a fifth validates."""
    steps: int | None = None
    """Steps of every run; 300 on synthetic heads, else 20 000."""
    width: float | None = None
    """Factor on hidden channels; .125 on synthetic heads, else 1."""
    batch: int | None = None
    """Slices of each domain in a step; 4 on synthetic heads, else 8."""
    seeds: int = 3
    """Runs by each schedule, at least 2: their spread is the measure."""
    processes: int | None = None
    """Runs at a time; one a CPU core, one on a GPU."""
    results: Path = Path("results/schedules")
    """Where runs are kept. Those that are there with the same settings are not run again."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run by one schedule."""

    run: RunConfig
    store: str
    folder: Path

    @property
    def result(self) -> Path:
        """Written last: what `table` reads."""
        return self.folder / f"{self.run.updates}-{self.run.seed}.json"


class Compared(NamedTuple):
    """A signal at a horizon."""

    sequential: float
    """Mean over seeds."""
    fused: float
    """The same."""
    difference: float
    """Mean over seeds of fused - sequential, seed by seed."""
    of_difference: float
    """Standard deviation of that over seeds."""
    of_seeds: float
    """Standard deviation over seeds within a schedule, of both together."""


def declare(options: Options, store: Store) -> RunConfig:
    """The run that both schedules share, but for its seed; the small one has v1's rate of the segmenters, 1e-3, since
    its steps are too few for v2's. That is the harder case: the points at which gradients are taken lie farther apart.
    """
    small = options.store is None
    run = PUBLISHED.at("data.cohort", store.fingerprint).at("net.classes", store.classes)
    run = run.at("steps", options.steps or (300 if small else PUBLISHED.steps))
    run = run.at("batch", options.batch or (4 if small else PUBLISHED.batch))
    run = run.at("net.width", options.width or (0.125 if small else PUBLISHED.net.width))
    return run.at("optim.lr_segmenter_ratio", 5.0).at("evaluations", 10) if small else run


def main(options: Options) -> None:
    """Do every run that is not there yet, then print the table and write it with the picture.

    Raises:
        InputError: fewer than two seeds.
    """
    if options.seeds < 2:
        raise InputError("seeds", found=options.seeds, rule="their spread is the measure", remedy="take 2 or more")
    console = wide_console()
    path = options.store or str(synthetic_store(options))
    run = declare(options, Store.open(path))
    cuda = torch.cuda.is_available()
    processes = options.processes or (1 if cuda else os.cpu_count() or 1)
    jobs = [
        Job(run.at("seed", seed).at("updates", updates), path, options.results)
        for updates in ("sequential", "fused")  # the longer first
        for seed in range(options.seeds)
    ]
    ready = {job for job in jobs if (found := read(job)) and found["config"] == job.run.to_dict()}
    console.print(f"{len(jobs)} runs of {run.steps} steps into {options.results}, {len(ready)} of them there already")
    # A fresh interpreter each: what torch keeps for a process, threads among it, does not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(train, job, alone=cuda or processes == 1): job for job in jobs if job not in ready}
        for done in as_completed(running):
            job = running[done]
            console.print(f"{job.run.updates:>10}, seed {job.run.seed}: {done.result():.0f} s", highlight=False)
    results = [found for job in jobs if (found := read(job))]
    rows = compare(results)
    write(options.results / "table.csv", rows)
    draw(results, options.results / "curves.html")
    console.print(table(rows, results))
    console.print(f"curves: {options.results / 'curves.html'}")


def train(job: Job, *, alone: bool) -> float:
    """Do one run, write its signals block by block, and return its seconds of training."""
    if not alone:
        torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, seconds, cpu = [], 0.0, time.process_time()
    for progress in fit(job.run, Cohort(Store.open(job.store), job.run, device)):
        known = {name: value for name, value in progress.signals.items() if name in SIGNALS}
        rows.append({"step": progress.step, **known})
        seconds += progress.seconds
        verdict = progress.verdict
    result = {
        "config": job.run.to_dict(),
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "verdict": verdict.sentence() if verdict else None,
        "rows": rows,
    }
    job.folder.mkdir(parents=True, exist_ok=True)
    partial = job.result.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.replace(job.result)
    return seconds


def read(job: Job) -> dict[str, Any] | None:
    """What a run reached, if it has ended."""
    return json.loads(job.result.read_text()) if job.result.is_file() else None


def compare(results: Sequence[dict[str, Any]]) -> dict[tuple[str, float], Compared]:
    """Every signal at every horizon that all runs reached it at."""
    by = {
        updates: [r for r in sorted(results, key=lambda r: r["config"]["seed"]) if r["config"]["updates"] == updates]
        for updates in get_args(Updates)
    }
    out = {}
    for signal in SIGNALS:
        for horizon in HORIZONS:
            one, other = ([level(r, signal, horizon) for r in by[name]] for name in ("sequential", "fused"))
            values = [v for v in (*one, *other) if v is not None]
            if len(values) == len(one) + len(other):
                out[signal, horizon] = compared(values[: len(one)], values[len(one) :])
    return out


def level(result: dict[str, Any], signal: str, horizon: float) -> float | None:
    """Mean of a signal over the tenth of the planned run that ends at `horizon`; None where it has no value there.

    A value that is not finite makes the mean so: it is not left out.
    """
    steps = result["config"]["steps"]
    first, last = (horizon - 0.1) * steps, horizon * steps
    held = [row[signal] for row in result["rows"] if signal in row and first < row["step"] <= last + 1e-9]
    return statistics.fmean(held) if held else None


def compared(sequential: Sequence[float], fused: Sequence[float]) -> Compared:
    """Two schedules' values, seed by seed."""
    gaps = [b - a for a, b in zip(sequential, fused, strict=True)]
    within = math.sqrt((statistics.variance(sequential) + statistics.variance(fused)) / 2)
    return Compared(
        statistics.fmean(sequential), statistics.fmean(fused), statistics.fmean(gaps), statistics.stdev(gaps), within
    )


def table(rows: dict[tuple[str, float], Compared], results: Sequence[dict[str, Any]]) -> Table:
    """A row a signal and horizon."""
    steps, seeds = results[0]["config"]["steps"], len(results) // 2
    out = Table(title=f"Means over a tenth of {steps} steps, {seeds} seeds by each schedule")
    for name in ("signal", "up to step", "sequential", "fused", "difference", "/ spread of seeds"):
        out.add_column(name, justify="left" if name == "signal" else "right")
    for (signal, horizon), row in rows.items():
        out.add_row(
            SIGNALS[signal] if horizon == HORIZONS[0] or (signal, HORIZONS[0]) not in rows else "",
            f"{horizon * steps:.0f}",
            f"{row.sequential:.4f}",
            f"{row.fused:.4f}",
            f"{row.difference:+.4f} +- {row.of_difference:.4f}",
            f"{row.difference / row.of_seeds:+.1f}" if row.of_seeds else "",
            end_section=horizon == HORIZONS[-1],
        )
    beyond = sum(abs(r.difference) > 2 * r.of_seeds for r in rows.values())
    cost = {u: [r["cpu_seconds"] / steps for r in results if r["config"]["updates"] == u] for u in COLOURS}
    out.caption = (
        "difference: fused - sequential, mean and standard deviation over seeds; then the mean in standard deviations "
        f"between seeds of one schedule: beyond 2 in {beyond} of {len(rows)} rows. CPU seconds a step, evaluations "
        + "included: "
        + ", ".join(f"{name} {statistics.median(found):.2f}" for name, found in cost.items())
    )
    return out


def write(path: Path, rows: dict[tuple[str, float], Compared]) -> None:
    """The table's numbers."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["signal", "horizon", *Compared._fields])
        for (signal, horizon), row in rows.items():
            out.writerow([signal, horizon, *(f"{value:.6g}" for value in row)])


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel a signal: every run thin, smoothed over a fiftieth of the run; colours are schedules."""
    from plotly.subplots import make_subplots

    from equipoise.figures import styled

    columns = 3
    figure = make_subplots(
        rows=-(-len(SIGNALS) // columns), cols=columns, subplot_titles=list(SIGNALS.values()), vertical_spacing=0.05
    )
    for number, signal in enumerate(SIGNALS):
        for result in results:
            updates, seed = result["config"]["updates"], result["config"]["seed"]
            held = [(row["step"], row[signal]) for row in result["rows"] if signal in row]
            steps, values = np.array(held, dtype=np.float64).reshape(-1, 2).T
            window = max(1, len(steps) // 50)
            figure.add_scatter(
                x=steps[window - 1 :],
                y=np.convolve(values, np.full(window, 1 / window), mode="valid") if len(values) else values,
                mode="lines",
                name=updates,
                legendgroup=updates,
                showlegend=number == 0 and seed == 0,
                line={"color": COLOURS[updates], "width": 1.2, "dash": ("solid", "dash", "dot")[seed % 3]},
                hovertemplate=f"{updates}, seed {seed}, step %{{x}}: %{{y:.4g}}<extra></extra>",
                row=number // columns + 1,
                col=number % columns + 1,
            )
    styled(figure, 260 * -(-len(SIGNALS) // columns)).write_html(path, include_plotlyjs=True)


def synthetic_store(options: Options) -> Path:
    """Synthetic heads with brain masks in both domains; made once."""
    store = options.results.parent / "phantoms" / f"brain-{options.subjects}x{options.size}.zarr"
    if not (store / "manifest.json").is_file():
        raw = store.with_name(f"raw-{options.subjects}")
        made = raw / "cohort.csv"
        if not made.is_file():
            made = write_cohort(raw, subjects=options.subjects)
        spacing_mm = FIELD_MM / options.size
        ingest(inputs_from_table(made, "brain"), store, Preprocessing(size=options.size, spacing_mm=spacing_mm))
    return store


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
