"""What the command line says of a study, and what is kept of it for a resume.

Knows which options there are and what they make of a declaration; knows nothing of how a study is done.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.keeping import Keeping
from equipoise.launch import samplers
from equipoise.launch.journal import database
from equipoise.launch.ray_train import check_elastic
from equipoise.search import ObjectiveName
from equipoise.seeds import OverSeeds
from equipoise.study import PrunerName, Study, StudyFolder
from equipoise.wandb_run import WandbMode
from slicestore.errors import InputError
from slicestore.place import Place


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says of a study. Without any, a small study on synthetic heads, on this machine.

    A script with flags of its own declares them in a subclass: numbers, words, booleans, or tuples of these, each with
    a default. They are kept with the study, so that a resumed one has them too.
    """

    store: str | None = None
    """A store from `equipoise prepare`: a folder or s3://bucket/prefix. Without one: synthetic heads, made once, and
    small networks."""
    points: int | None = None
    """Points to judge; 8 on synthetic heads, else 32."""
    steps: int | None = None
    """Steps of a run; 96 on synthetic heads, else 20 000."""
    seed: int = 0
    """Seed of the search and of its runs."""
    workers_per_run: int = 1
    """Data-parallel processes of a run."""
    confirm_workers: int | None = None
    """Data-parallel processes of the run that confirms the best point with a new seed; 0 leaves it out. By default 2,
    and none in a study whose points are all given: such a study brings its own seeds."""
    cpus_per_worker: float = 1.0
    """CPU cores of a worker."""
    gpus_per_worker: float | None = None
    """GPUs of a worker; .25 packs four runs on a card. Without it: 1 where the cluster has GPUs, else 0."""
    least_workers_per_run: int | None = None
    """Processes with which a run goes on when machines are lost; without it, it waits until it has all of them."""
    concurrent: int | None = None
    """Runs at once; by default as many as the cluster holds when the study starts. Needed where machines are started on
    demand, together with --gpus-per-worker."""
    address: str | None = None
    """Ray cluster to use ("auto" on a machine of it). Without one, Ray starts here, on loopback."""
    objective: ObjectiveName | None = None
    """What is maximised: translated_dice, of masks predicted on translated source slices; target_dice, which needs
    masks of target subjects to validate on; or composite: translated_dice and how near predicted target masks come to
    the volume of source masks, without target masks. By default what the study declares."""
    seeds: int | None = None
    """Runs of a point, which differ in their seed; a point's S is that of its worst, its Dice their mean."""
    over_seeds: OverSeeds | None = None
    """worst, or q20: the 20 % quantile of the seeds' S instead of the worst."""
    sampler: str | None = None
    """Optuna's sampler that proposes points, by the name of its class; TPESampler by default."""
    pruner: PrunerName | None = None
    """What stops runs that fall behind in Dice x S: asha (default), at half of their steps; median; or none, which
    found the best sooner where it was measured, on short runs (`studies/search_quality.py`)."""
    pareto: bool = False
    """Search for points that nothing beats in both Dice and S, instead of the best Dice with an S of .9; runs are then
    stopped by the monitor alone."""
    storage: str | None = None
    """Database of the points, such as postgresql+psycopg://user@host/name, for drivers on several machines; by default
    a journal in the study's folder. Its password belongs into PGPASSWORD or ~/.pgpass."""
    checkpoint_every: int = 0
    """Steps between checkpoints, beside those at evaluations."""
    checkpoints_kept: int = 2
    """Newest checkpoints that stay."""
    copies: str | None = None
    """A folder (another disk, NFS) or s3://bucket/prefix that gets a copy of every run, checkpoints included, from
    which a run goes on should its own folder be lost. Panels, which show patients' slices, are part of it."""
    wandb: WandbMode | None = None
    """online, offline or disabled. Without it: online where there is a key, else offline."""
    wandb_images: bool = False
    """Give W&B the panels too. Synthetic heads' panels go without asking; a patient's only with this flag."""
    wandb_model: bool = True
    """Give W&B the best point's checkpoint at a study's end: weights that were trained on patients' images."""
    tensorboard: bool = False
    """Write TensorBoard's event files too, into the study's folder; panels are among them, which stay there."""
    dashboard: bool = False
    """Serve the dashboard on this machine's loopback while the study runs."""
    dashboard_port: int = 8080
    """Where it listens."""
    quiet: bool = False
    """Print mistakes, and the report's path at the end, and nothing else."""
    json: bool = False
    """Print an object a line instead of tables: what is planned, every block of steps, every verdict, the end."""
    resume: bool = False
    """Continue the latest study of this name (or of --name) instead of starting one."""
    name: str | None = None
    """Folder under --results; by default the study's name, numbered where it is taken."""
    results: Path = Path("results")
    """Where studies are kept."""


Declare = Callable[[Any], Study]
"""The study that options ask for; they are of the class that `main` is given."""


def declared(declare: Declare, options: Options) -> Study:
    """The study that some options ask for.

    Raises:
        InputError: one of its runs cannot be.
    """
    searched = ("objective", "seeds", "over_seeds", "sampler", "pruner")
    given = {name: value for name in searched if (value := getattr(options, name)) is not None}
    try:
        study = declare(options)
        return dataclasses.replace(study, **given, pareto=options.pareto or study.pareto)
    except InputError:
        raise
    except (ValueError, KeyError) as error:
        raise InputError(
            "study",
            found=f"a run that cannot be ({error.args[0]})",
            rule="every run of a study is checked when it is declared",
            remedy="give other options, or mend the declaration",
        ) from error


def check(study: Study, options: Options) -> None:
    """Refuse what can be found wrong without a store or a cluster, before anything is written.

    Raises:
        InputError: the sampler cannot serve the study, a number of workers or runs cannot be, the database does not
            answer, or there is no such place for copies.
    """
    samplers.check(study)
    if options.storage is not None:
        database(options.storage)
    if options.least_workers_per_run is not None:
        check_elastic(study.run, options.least_workers_per_run)
    if options.quiet and options.json:
        raise InputError(
            "--quiet", found="--json beside it", rule="nothing is told, or all of it", remedy="leave one of them out"
        )
    if options.concurrent is not None and options.concurrent < 1:
        raise InputError("--concurrent", found=options.concurrent, rule="runs are done", remedy="give 1 or more")
    Keeping(every=options.checkpoint_every, kept=options.checkpoints_kept, copies=options.copies or "")


def resumed(declare: Declare, options: Options) -> tuple[StudyFolder | None, Options]:
    """The folder to resume and the options it was started with, or none."""
    if not options.resume:
        return None, options
    name = options.name or declared(declare, options).name
    numbered = re.compile(rf"{re.escape(name)}(-\d+)?")
    found = [f.parent for f in options.results.glob("*/study.json") if numbered.fullmatch(f.parent.name)]
    if not found:
        raise InputError(
            options.results / name,
            found="no study",
            rule="--resume continues one",
            remedy="start it without --resume, or name it with --name",
        )
    latest = max(found, key=lambda f: (f / "study.json").stat().st_mtime)
    folder = StudyFolder.open(options.results / name if options.name and options.results / name in found else latest)
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in folder.options.items()}
    given = {f.name: v for f in dataclasses.fields(options) if (v := getattr(options, f.name)) != f.default}
    return folder, type(options)(**{**kept, **given})


_OF_A_SESSION = ("resume", "name", "results", "address", "dashboard", "dashboard_port", "quiet", "json")
"""Options that a resume does not take over."""


def saved(options: Options) -> dict[str, Any]:
    """What a resume needs to know of how the study was started."""
    data = dataclasses.asdict(options) | {"store": Place.at(options.store).url if options.store else None}
    return {k: v for k, v in data.items() if k not in _OF_A_SESSION}


def fresh_folder(options: Options, study: Study) -> Path:
    """The first folder of the study's name that is not taken."""
    name = options.name or study.name
    taken = (options.results / (name if n == 1 else f"{name}-{n}") for n in range(1, 10_000))
    return next(f for f in taken if not f.exists())
