"""From a declaration to a finished study: the routine behind every script in `studies/`.

Knows the order (cohort, Ray, search, confirmation, report) and what the user sees meanwhile; knows nothing of what a
particular study asks.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
import tyro
from rich.console import Console

from equipoise.account import Account
from equipoise.batches import Cohort
from equipoise.keeping import Keeping
from equipoise.launch import samplers
from equipoise.launch.cluster import Share, connect, room
from equipoise.launch.journal import database
from equipoise.launch.ledger import Ledger
from equipoise.launch.ray_train import check_elastic, train
from equipoise.launch.ray_tune import Terms, search_points
from equipoise.record import CONFIRM, Record
from equipoise.report import write_report
from equipoise.seeds import OverSeeds
from equipoise.sessions import Session, sessions
from equipoise.study import PrunerName, Study, StudyFolder
from equipoise.table import TableTracker, wide_console
from equipoise.tracking import Tracker, WandbMode, WandbTracker, Watcher, wandb_mode
from equipoise.writing import REFUSALS, refusal
from slicestore.errors import InputError
from slicestore.ingest import ingest
from slicestore.inputs import inputs_from_table
from slicestore.phantom import write_cohort
from slicestore.place import Place
from slicestore.settings import Preprocessing
from slicestore.store import Domain, Store

FIELD_MM = 192.0
"""Side of a synthetic head's slices, which the head fills."""


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
    """Steps of a run; 120 on synthetic heads, else 20 000."""
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
    seeds: int | None = None
    """Runs of a point, which differ in their seed; a point's S is that of its worst, its Dice their mean."""
    over_seeds: OverSeeds | None = None
    """worst, or q20: the 20 % quantile of the seeds' S instead of the worst."""
    sampler: str | None = None
    """Optuna's sampler that proposes points, by the name of its class; TPESampler by default."""
    pruner: PrunerName | None = None
    """What stops runs that fall behind in Dice x S: asha (default), median, or none."""
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
    resume: bool = False
    """Continue the latest study of this name (or of --name) instead of starting one."""
    name: str | None = None
    """Folder under --results; by default the study's name, numbered where it is taken."""
    results: Path = Path("results")
    """Where studies are kept."""


class Heads(NamedTuple):
    """What a study without a store trains on."""

    size: int = 64
    """Pixels a side of a slice."""
    mask: str = "brain"
    """What is segmented: brain or vessel."""


HEADS = Heads()
Declare = Callable[[Any], Study]
"""The study that options ask for; they are of the class that `main` is given."""
Tell = Callable[[StudyFolder, Console], None]
"""Prints what a study found: its own table, from the records in its folder."""


def main(
    declare: Declare,
    doc: str | None,
    *,
    options: type[Options] = Options,
    tell: Tell | None = None,
    heads: Heads = HEADS,
) -> None:
    """A study script's command line: parse, conduct, and tell a user's mistake without a traceback.

    Args:
        declare: the study that some options ask for.
        doc: the script's docstring.
        options: the class of its options.
        tell: called when every point has ended, also of a study that was resumed.
        heads: what it trains on without a store.
    """
    given = tyro.cli(options, description=doc)
    with mistakes_told():
        conduct(declare, given, tell=tell, heads=heads)


@contextmanager
def mistakes_told() -> Iterator[None]:
    """Tell a user's mistake without a traceback, and exit with 2; with 130 after Ctrl-C, or what a scheduler sends."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except InputError as error:
        _refuse(error)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        _refuse(refusal(Path(error.filename or "."), error))
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped: add --resume to continue", highlight=False)
        sys.exit(130)


def _refuse(error: InputError) -> NoReturn:
    Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM, by which Slurm and Kubernetes take a machine away, stops a study as Ctrl-C does."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in jobs that a script has put into the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def conduct(declare: Declare, options: Options, *, tell: Tell | None = None, heads: Heads = HEADS) -> StudyFolder:
    """Run a study to its report, or continue one. Arguments as for `main`.

    Raises:
        InputError: an option, the store or the cluster cannot serve; nothing has been started then.
    """
    began, console = time.monotonic(), wide_console()
    folder, options = _place(declare, options)
    study = _declared(declare, options)
    if options.points not in (None, study.points):
        raise InputError(
            "points", found=options.points, rule=f"{study.name} has {study.points} points", remedy="leave --points out"
        )
    _checked(study, options)
    store = Place.at(options.store or synthetic_store(options.results, *heads)).url
    study = _bound(study, Store.open(store))
    if folder is not None:
        folder.agree(study)
    with connect(options.address):
        share, slots = _placed(study, options)
        command = shlex.join(["python", *sys.argv])
        folder = folder or StudyFolder.create(_fresh(options, study), study, command, _saved(options))
        console.print(f"{study.name}: {study.question}", highlight=False)
        console.print(f"{study.points} points of {study.run.steps} steps into {folder.folder}", soft_wrap=True)
        workers = options.least_workers_per_run or study.run.workers
        with Session.start(folder.folder, slots=slots, workers=workers, gpus=share.gpus) as session:
            terms = _terms(options, folder, share, slots, session.id)
            watched = partial(_watched, folder, session.id)
            with Watcher(watched, _trackers(console, folder, study, options)):
                ledger = search_points(folder, study, store, terms)
                if ledger.unfinished:
                    _leave(console, folder, ledger, session.id)
                _confirm(folder, ledger, store, terms, _confirming(study, options))
    write_report(folder)
    if tell is not None:
        tell(folder, console)
    _say(console, folder, ledger, time.monotonic() - began)
    return folder


def _leave(console: Console, folder: StudyFolder, ledger: Ledger, session: str) -> None:
    """Say what happens to points that have not ended, and leave.

    Raises:
        SystemExit: always: 0 where another session is at work on them, else 130, as of what was interrupted.
    """
    if any(other.alive for other in sessions(folder.folder) if other.id != session):
        console.print(f"{ledger.unfinished} points are left to the other session, which will confirm and report")
        raise SystemExit(0)
    console.print(f"stopped with {ledger.unfinished} points unfinished: add --resume to continue")
    raise SystemExit(130)


def _confirming(study: Study, options: Options) -> int:
    """Workers of the run that confirms the best point; 0 for none."""
    return options.confirm_workers if options.confirm_workers is not None else 2 * study.searches


def _checked(study: Study, options: Options) -> None:
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
    if options.concurrent is not None and options.concurrent < 1:
        raise InputError("--concurrent", found=options.concurrent, rule="runs are done", remedy="give 1 or more")
    Keeping(every=options.checkpoint_every, kept=options.checkpoints_kept, copies=options.copies or "")


def _placed(study: Study, options: Options) -> tuple[Share, int]:
    """What each worker gets, and how many runs are done at once.

    Raises:
        InputError: the cluster cannot hold a run, and was not said to grow.
    """
    share = Share.here(options.cpus_per_worker, options.gpus_per_worker)
    if options.concurrent is not None:
        return share, options.concurrent
    room(share, _confirming(study, options) or 1)
    return share, room(share, options.least_workers_per_run or study.run.workers)


def _terms(options: Options, folder: StudyFolder, share: Share, slots: int, session: str) -> Terms:
    copies = f"{options.copies.rstrip('/')}/{folder.id}" if options.copies else ""
    keeping = Keeping(every=options.checkpoint_every, kept=options.checkpoints_kept, copies=copies, session=session)
    return Terms(share=share, slots=slots, least=options.least_workers_per_run, keeping=keeping, url=options.storage)


def _watched(folder: StudyFolder, session: str) -> list[Record]:
    """The records that this session follows: all but those at which another one is at work."""
    others = {other.id for other in sessions(folder.folder) if other.id != session and other.alive}
    records = folder.records()
    return [r for r in records if not others or not (r.attempts and r.attempts[-1].session in others)]


def _declared(declare: Declare, options: Options) -> Study:
    """The study that some options ask for.

    Raises:
        InputError: one of its runs cannot be.
    """
    searched = ("seeds", "over_seeds", "sampler", "pruner")
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


def _bound(study: Study, store: Store) -> Study:
    """The study on this very store.

    Raises:
        InputError: the store has no masks by which the study's objective could be measured, is damaged, or holds fewer
            training slices than a batch.
    """
    domain: Domain = "source" if study.objective == "translated_dice" else "target"
    if not any(entry.labelled for entry in store.select(domain, "val")):
        raise InputError(
            store.path,
            found=f"no labelled {domain} subject to validate on",
            rule=f"a study maximises {study.objective}",
            remedy=f"prepare a store of at least two labelled {domain} subjects",
        )
    run = study.run.at("data.cohort", store.fingerprint).at("net.classes", store.classes)
    Cohort(store, run, torch.device("cpu"))  # read once here, so that what is wrong with it is told before any run
    return dataclasses.replace(study, run=run)


def _trackers(console: Console, folder: StudyFolder, study: Study, options: Options) -> list[Tracker]:
    mode, notice = wandb_mode(options.wandb)
    console.print(notice, highlight=False)
    names = study.names()
    trackers: list[Tracker] = [TableTracker(console, study.objective, names)]
    if mode != "disabled":
        images = options.wandb_images or options.store is None
        trackers.append(
            WandbTracker(folder.wandb, group=study.name, prefix=folder.id, mode=mode, images=images, names=names)
        )
    return trackers


def synthetic_store(results: Path, size: int = HEADS.size, mask: str = HEADS.mask) -> Path:
    """Synthetic heads as a store of `size` x `size` slices, made once; one that is there is used as it is.

    Raises:
        InputError: no such mask.
    """
    name = "heads" if (size, mask) == HEADS else f"heads-{mask}-{size}"
    store = results / "phantoms" / f"{name}.zarr"
    if not (store / "manifest.json").is_file():
        raw = store.with_name("raw")
        table = raw / "cohort.csv" if raw.is_dir() else write_cohort(raw, subjects=5)
        ingest(inputs_from_table(table, mask), store, Preprocessing(size=size, spacing_mm=FIELD_MM / size))
    return store


def _place(declare: Declare, options: Options) -> tuple[StudyFolder | None, Options]:
    """The folder to resume and the options it was started with, or none."""
    if not options.resume:
        return None, options
    name = options.name or _declared(declare, options).name
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


def _saved(options: Options) -> dict[str, Any]:
    """What a resume needs to know of how the study was started."""
    data = dataclasses.asdict(options) | {"store": Place.at(options.store).url if options.store else None}
    return {k: v for k, v in data.items() if k not in ("resume", "name", "results", "address")}


def _fresh(options: Options, study: Study) -> Path:
    """The first folder of the study's name that is not taken."""
    name = options.name or study.name
    taken = (options.results / (name if n == 1 else f"{name}-{n}") for n in range(1, 10_000))
    return next(f for f in taken if not f.exists())


def _confirm(folder: StudyFolder, ledger: Ledger, store: str, terms: Terms, workers: int) -> None:
    """Run the best point once more, with a new seed and over several workers: does it hold?"""
    best = ledger.best()
    if best is None or not workers:
        return
    config = Record(folder.runs / best).config
    config = config.at("seed", config.seed + ledger.study.seeds).at("workers", workers)
    run = folder.runs / f"{CONFIRM}-{config.fingerprint[:8]}"
    if Record(run).verdict is None:
        train(run, config, store, terms.share, keeping=terms.keeping)


def _say(console: Console, folder: StudyFolder, ledger: Ledger, seconds: float) -> None:
    account = Account.of(folder.records())
    console.print(", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in sorted(account.verdicts.items())))
    console.print(
        f"training {account.seconds:.0f} device-seconds; {account.seconds_saved_alarm:.0f} saved at the alarm, "
        f"{account.seconds_saved_pruner:.0f} by stopping runs whose Dice fell behind; {seconds:.0f} s in all"
    )
    console.print(f"{account.share_saved_alarm:.1%} of all steps were saved by stopping at the alarm")
    if ledger.failed:
        console.print(f"{ledger.failed} points failed on every try, whatever their settings:", style="red")
        for reason in ledger.reasons:
            console.print(f"  {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
        console.print(f"  see error.txt under {folder.folder / 'ray'}", style="red", soft_wrap=True)
    console.print(f"best point: {ledger.best() or 'none'}")
    console.print(f"report: {folder.report}", soft_wrap=True)
    command = Path(sys.executable).with_name("equipoise")  # on the PATH or not
    console.print(f"dashboard: {command} dashboard {shlex.quote(str(folder.folder))}", soft_wrap=True)
