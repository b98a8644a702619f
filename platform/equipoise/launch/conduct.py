"""From a declaration to a finished study: the routine behind every script in `studies/`.

Knows the order (cohort, Ray, search, confirmation, report) and what the user sees meanwhile; knows nothing of what a
particular study asks.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
import tyro
from rich.console import Console

from equipoise.batches import Cohort
from equipoise.heads import HEADS, Heads, synthetic_store
from equipoise.keeping import Keeping
from equipoise.launch.audience import Audience
from equipoise.launch.cluster import Share, connect, room
from equipoise.launch.importance import importance
from equipoise.launch.ledger import Ledger
from equipoise.launch.options import Declare, Options, check, declared, fresh_folder, resumed, saved
from equipoise.launch.ray_train import train
from equipoise.launch.ray_tune import Terms, search_points
from equipoise.record import CONFIRM, Record
from equipoise.report import write_report
from equipoise.sessions import Session, sessions
from equipoise.study import Study, StudyFolder
from equipoise.tracking import Watcher
from equipoise.writing import REFUSALS, refusal
from slicestore.errors import InputError
from slicestore.place import Place
from slicestore.store import Domain, Store

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
    began = time.monotonic()
    folder, options = resumed(declare, options)
    study = declared(declare, options)
    if options.points not in (None, study.points):
        raise InputError(
            "points", found=options.points, rule=f"{study.name} has {study.points} points", remedy="leave --points out"
        )
    check(study, options)
    audience = Audience(options)
    store = Place.at(options.store or synthetic_store(options.results, *heads)).url
    study = _bound(study, Store.open(store))
    if folder is not None:
        folder.agree(study)
    with connect(options.address):
        share, slots = _placed(study, options)
        command = shlex.join(["python", *sys.argv])
        folder = folder or StudyFolder.create(fresh_folder(options, study), study, command, saved(options))
        audience.begins(folder, study)
        workers = options.least_workers_per_run or study.run.workers
        with Session.start(folder.folder, slots=slots, workers=workers, gpus=share.gpus) as session:
            terms = _terms(options, folder, share, slots, session.id)
            watched = partial(_watched, folder, session.id)
            with Watcher(watched, audience.trackers(folder, study, share)):
                ledger = search_points(folder, study, store, terms)
                if ledger.unfinished:
                    _leave(audience, folder, ledger, session.id)
                _confirm(folder, ledger, store, terms, _confirming(study, options))
                audience.concludes(folder, ledger)
            _tidy(folder, ledger, session.id)
    write_report(folder, importance)
    if tell is not None:
        tell(folder, audience.console)
    audience.ends(folder, ledger, time.monotonic() - began)
    return folder


def _leave(audience: Audience, folder: StudyFolder, ledger: Ledger, session: str) -> None:
    """Say what happens to points that have not ended, and leave.

    Raises:
        SystemExit: always: 0 where another session is at work on them, else 130, as of what was interrupted.
    """
    if any(other.alive for other in sessions(folder.folder) if other.id != session):
        audience.leaves(f"{ledger.unfinished} points are left to the other session, which will confirm and report")
        raise SystemExit(0)
    audience.leaves(f"stopped with {ledger.unfinished} points unfinished: add --resume to continue")
    raise SystemExit(130)


def _tidy(folder: StudyFolder, ledger: Ledger, session: str) -> None:
    """Remove what Tune kept of the study, which names folders and machines; where a point failed, it says why."""
    if ledger.failed or any(other.alive for other in sessions(folder.folder) if other.id != session):
        return
    for of in (folder.folder, *(record.folder for record in folder.records() if record.verdict)):
        shutil.rmtree(of / "ray", ignore_errors=True)


def _confirming(study: Study, options: Options) -> int:
    """Workers of the run that confirms the best point; 0 for none."""
    return options.confirm_workers if options.confirm_workers is not None else 2 * study.searches


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


def _bound(study: Study, store: Store) -> Study:
    """The study on this very store.

    Raises:
        InputError: the store has no masks, or no target slices, by which the study's objective could be measured, is
            damaged, or holds fewer training slices than a batch.
    """
    domain: Domain = "target" if study.objective == "target_dice" else "source"
    rule = f"a study maximises {study.objective}"
    if not any(entry.labelled for entry in store.select(domain, "val")):
        raise InputError(
            store.path,
            found=f"no labelled {domain} subject to validate on",
            rule=rule,
            remedy=f"prepare a store of at least two labelled {domain} subjects",
        )
    if study.objective == "composite" and not store.select("target", "val"):
        raise InputError(
            store.path,
            found="no target subject to validate on",
            rule=rule,
            remedy="prepare a store of at least two target subjects; they need no masks",
        )
    run = study.run.at("data.cohort", store.fingerprint).at("net.classes", store.classes)
    Cohort(store, run, torch.device("cpu"))  # read once here, so that what is wrong with it is told before any run
    return dataclasses.replace(study, run=run)


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
