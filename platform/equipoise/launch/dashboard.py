"""A study in the browser: Optuna's dashboard, with what the records say beside each point.

Knows how the dashboard shows notes, images and figures; knows nothing of training. The study's folder is only read:
what the dashboard writes (our notes and figures, a visitor's edits) lives in memory and ends with it, so that a look at
a study, even a running one, cannot change it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import Trial
from optuna_dashboard import save_note, save_plotly_graph_object, wsgi

from equipoise import curves, figures, search
from equipoise.figures import Run
from equipoise.launch.journal import database, name_in
from equipoise.launch.mirror import Mirror
from equipoise.record import Record
from equipoise.report import best_point
from equipoise.run_page import run_page
from equipoise.study import Study, StudyFolder
from slicestore.errors import InputError

FIGURES_EVERY = 20.0
"""Seconds between two drawings of a running study's figures."""
POINTS = 24_000
"""Values that a figure of curves draws at most: the browser fetches all of them with every look."""
_RUNS = "/runs/"
"""Under which runs have pages of their own."""
_UNSHOWN = ("point", "rank")
"""Attributes of points that are ours: all settings in one line, by which nothing else on the page could be read."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(folder: StudyFolder, *, host: str = "127.0.0.1", port: int = 8080, until_stdin_closes: bool = False) -> None:
    """Serve a study's dashboard until Ctrl-C, or until whoever started it lets go of its standard input.

    Nobody is asked who they are: on another host than loopback everyone who reaches the port sees points and panels.

    Raises:
        InputError: the folder has no journal, or nothing can listen there.
    """
    with make(folder, host=host, port=port) as server:
        if until_stdin_closes:
            threading.Thread(target=_wait_for_stdin, args=(server,), daemon=True).start()
        print(f"dashboard of {folder.study.name}: http://{host}:{server.server_port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def _wait_for_stdin(server: WSGIServer) -> None:
    while os.read(0, 1024):  # unbuffered: an interpreter that ends cannot wait for another thread's lock on stdin
        pass
    server.shutdown()


def make(folder: StudyFolder, *, host: str = "127.0.0.1", port: int = 8080) -> WSGIServer:
    """A server that listens but does not answer before `serve_forever`; port 0 takes a free one.

    Raises:
        InputError: as for `serve`.
    """
    shown_from, follow = _source(folder)
    panels = _Panels()
    notes = _Notes(folder, shown_from, panels)
    shown: Callable[..., Iterable[bytes]] = wsgi(shown_from, artifact_store=panels)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        # A page from elsewhere can point a name of its own at this machine; its requests then carry that name.
        if host in LOOPBACK and urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname not in LOOPBACK:
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"this dashboard answers on loopback only"]
        path = environ["PATH_INFO"]
        if path.startswith(_RUNS):
            return _run(folder, path.removeprefix(_RUNS), start_response)
        if path.startswith("/api/studies"):
            notes.look(follow)
        return shown(environ, start_response)

    try:
        return make_server(host, port, application, server_class=_Server, handler_class=_Quiet)
    except (OSError, OverflowError) as error:
        busy = getattr(error, "errno", None) == errno.EADDRINUSE
        raise InputError(
            f"{host}:{port}",
            found="a port that another program listens on" if busy else f"no place to listen ({error})",
            rule="the dashboard listens there",
            remedy="give another --port, or end that program" if busy else "give another --host or --port",
        ) from error


def _source(folder: StudyFolder) -> tuple[BaseStorage, Callable[[], None]]:
    """A storage that shows the study's points, takes notes and changes nothing, and what keeps it up to date."""
    if url := folder.options.get("storage"):
        try:
            mirror = Mirror(database(url), name_in(folder, url), folder.study.name)
        except KeyError as error:
            raise InputError(
                folder.folder,
                found="no points in the study's database",
                rule="the dashboard shows what a search wrote there",
                remedy="give the folder of a study that has begun",
            ) from error
        return mirror.storage, mirror.follow
    if not folder.journal.is_file() or not folder.journal.stat().st_size:
        raise InputError(
            folder.folder,
            found="no journal.log with points in it",
            rule="the dashboard shows what a search wrote there",
            remedy="give the folder of a study that has begun",
        )
    return JournalStorage(_Overlay(folder.journal)), lambda: None


def _run(folder: StudyFolder, name: str, start_response: Callable[..., Any]) -> Iterable[bytes]:
    """A run's own page."""
    record = next((record for record in folder.records() if record.name == name), None)
    if record is None:
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"there is no such run"]
    start_response("200 OK", [("Content-Type", "text/html; charset=utf-8")])
    return [run_page(record, folder.study).encode()]


class _Overlay(BaseJournalBackend):
    """A study's journal as it grows, and on top of it, in memory only, whatever is written to it here.

    Both kinds of entries stand in the order in which this process met them. That order is as good as any: what the
    dashboard writes are attributes of studies and trials, and none of the study's own entries refers to those.
    """

    def __init__(self, path: Path) -> None:
        self._file = JournalFileBackend(str(path))
        self._lock = threading.Lock()
        self._entries: list[dict[str, Any]] = []
        self._read = 0

    def read_logs(self, log_number_from: int) -> Sequence[dict[str, Any]]:
        """Entries from a number on."""
        with self._lock:
            self._follow()
            return self._entries[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Remember entries; they are made plain data, as the file would make them."""
        with self._lock:
            self._follow()
            self._entries += json.loads(json.dumps(logs))

    def _follow(self) -> None:
        fresh = list(self._file.read_logs(self._read))
        self._read += len(fresh)
        self._entries += [entry for entry in map(_shown, fresh) if entry is not None]


def _shown(entry: dict[str, Any]) -> dict[str, Any] | None:
    """An entry without what a page has no room for; None of one that says nothing else."""
    for attributes in ("user_attr", "user_attrs"):
        if isinstance(told := entry.get(attributes), dict):
            entry = {**entry, attributes: {k: v for k, v in told.items() if k not in _UNSHOWN}}
            if told and attributes == "user_attr" and not entry[attributes]:
                return None
    return entry


class _Panels:
    """The runs' last panels as Optuna's artifacts, read where they lie.

    Their names are drawn anew by every server, because the dashboard answers for artifacts to pages from anywhere.
    """

    def __init__(self) -> None:
        self._files: dict[str, Path] = {}

    def add(self, file: Path) -> str:
        """Show a file; returns its name here."""
        name = str(uuid.uuid4())
        self._files[name] = file
        return name

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """A file that was added."""
        return open(self._files[artifact_id], "rb")

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Refused: the study's folder is only read."""
        raise PermissionError("this dashboard only shows")

    def remove(self, artifact_id: str) -> None:
        """Refused, as `write`."""
        raise PermissionError("this dashboard only shows")


class _Notes:
    """Tells of every point that has ended, and draws the figures, as the study goes on."""

    def __init__(self, folder: StudyFolder, storage: BaseStorage, panels: _Panels) -> None:
        self._folder, self._declared, self._storage, self._panels = folder, folder.study, storage, panels
        # The sampler is never asked for anything: Optuna wants one to lay hands on a trial.
        self._study = optuna.load_study(
            study_name=self._declared.name, storage=storage, sampler=optuna.samplers.RandomSampler()
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._study.set_metric_names([self._declared.objective.replace("_", " ")])
        self._lock = threading.Lock()
        self._begun: set[str] = set()
        self._ended: dict[str, Run] = {}
        self._drawn = -math.inf
        self._stale = True

    def look(self, follow: Callable[[], None]) -> None:
        """Tell what has happened since the last look, after the points have been fetched."""
        with self._lock:
            follow()
            for trial in self._study.get_trials(deepcopy=False):
                name = trial.user_attrs.get("run")
                if name is None or name in self._ended:
                    continue
                record = Record(self._folder.runs / name)
                if record.verdict is not None:
                    self._ended[name] = run = Run.read(record)
                    self._tell(trial._trial_id, run)
                    self._stale = True
                elif name not in self._begun and (record.folder / "config.json").is_file():
                    told = f"At work. {_link(name, 'Curves and panels so far')}"
                    save_note(Trial(self._study, trial._trial_id), told)
                    self._begun.add(name)
            if self._stale and time.monotonic() - self._drawn > FIGURES_EVERY:
                self._draw()
                self._drawn, self._stale = time.monotonic(), False

    def _tell(self, trial_id: int, run: Run) -> None:
        assert run.verdict is not None
        told = [f"**{run.verdict.sentence()}**", _facts(run, self._declared)]
        told.append(_link(run.name, "Curves, balance, panels and settings of this run"))
        if run.picture is not None:
            artifact = self._panels.add(run.picture)
            about = {"artifact_id": artifact, "filename": run.picture.name, "mimetype": "image/png", "encoding": None}
            # Under the study, where the dashboard looks too: a trial that has ended takes no more attributes.
            key = f"dashboard:artifacts:{trial_id}:{artifact}"
            self._storage.set_study_system_attr(self._study._study_id, key, json.dumps(about))
            told.append(f"![panels](/artifacts/{self._study._study_id}/{trial_id}/{artifact})")
        save_note(Trial(self._study, trial_id), "\n\n".join(told))

    def _draw(self) -> None:
        records = self._folder.records()
        runs = [self._ended.get(record.name) or Run.read(record) for record in records]
        best = best_point(runs, self._declared)
        told = [f"**{self._declared.question}**"]
        if best is not None:
            told.append(f"Best point {best.name}: {_facts(best, self._declared)}")
        for run in runs:
            if run.confirms:
                ended = run.verdict.sentence() if run.verdict else "unfinished"
                told.append(f"Confirmation {run.name}: {ended}; {_facts(run, self._declared)}")
        save_note(self._study, "\n\n".join(told))
        drawn = {
            "losses": curves.losses(runs, best, POINTS),
            "critics": curves.critics(runs, best, POINTS),
        }
        if (balance := curves.balance(runs, best)) is not None:
            drawn["balance"] = balance
        drawn["dice-against-stability"] = figures.dice_against_stability(runs, self._declared, best)
        survival = figures.survival([run for run in runs if not run.confirms])
        if survival is not None:
            drawn["survival"] = survival
        for name, figure in drawn.items():
            figure.figure.update_layout(title={"text": name.replace("-", " "), "x": 0.02, "y": 0.97}, margin={"t": 110})
            save_plotly_graph_object(self._study, figure.figure, graph_object_id=name)


def _facts(run: Run, study: Study) -> str:
    """What a verdict's sentence leaves out."""
    dice = run.last(f"quality/{study.objective}")
    told = f"{study.objective.replace('_', ' ')} {'was never measured' if dice is None else f'{dice:.3f}'}, "
    told += "S is not known" if run.stability is None else f"S {run.stability:.3f}"
    onset = run.verdict.onset if run.verdict else None
    told += f", onset at step {onset} of {run.config.steps}" if onset is not None else ""
    if run.verdict is None or run.stability is None or study.pareto:
        return told
    missed = search.violation(run.verdict, study.feasible)
    return f"{told}; constraint: S ≥ {study.feasible:g} is {'met' if missed <= 0 else f'missed by {missed:.3f}'}"


def _link(name: str, words: str) -> str:
    """Markdown."""
    return f"[{words}]({_RUNS}{name})"


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a request: browsers hold connections open, and one must not keep the others waiting."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """Serves without a line per request."""

    def log_message(self, *_: object) -> None:
        """Nothing."""
