"""The commands on studies, `equipoise study ...`: what one is doing, and what it cost.

Knows what a user types and reads; knows nothing that `status` and `account` do not offer to a script too. Both commands
only read, and may be asked of a study that runs, one that was killed, and one that has ended.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.conf import Positional

from equipoise.account import Account, accounts
from equipoise.figures import LOOKS, Run, words
from equipoise.outcomes import NOTHING, Told
from equipoise.page import duration
from equipoise.report import script
from equipoise.search import called
from equipoise.sessions import SessionInfo, sessions
from equipoise.status import Going, Reader, Status
from equipoise.store_cli import Work, later
from equipoise.study import StudyFolder, latest_study
from equipoise.table import wide_console
from slicestore.errors import InputError

Folder = Annotated[Path | None, Positional[Path | None]]
AsJson = Annotated[bool, tyro.conf.arg(name="json")]


def status(
    folder: Folder = None,
    /,
    results: Path = Path("results"),
    as_json: AsJson = False,
    watch: float | None = None,
) -> None:
    """Say what a study is doing: who works on it, its points and runs, the best point so far, what to do next.

    Args:
        folder: the study's folder; the latest one by default.
        results: where studies are kept.
        as_json: for a program: one object, with --watch one a line.
        watch: seconds between one look and the next, until no session is at work any more.
    """
    if watch is not None and not (math.isfinite(watch) and watch > 0):
        raise InputError("--watch", found=watch, rule="seconds between two looks", remedy="give a number above 0")
    study, console = _opened(folder, results), wide_console()
    reader = Reader(study)
    while True:
        now = reader.read()
        if as_json:
            print(json.dumps(status_data(now, study), allow_nan=False, indent=None if watch else 2), flush=True)
        else:
            if watch and console.is_terminal:
                console.clear()
            _tell_status(console, now, study)
        if watch is None or not now.at_work:
            return
        time.sleep(watch)


def cost(folder: Folder = None, /, results: Path = Path("results"), as_json: AsJson = False) -> None:
    """Say what a study cost so far: by verdict, what stopping early saved, what failures lost, the overhead.

    Args:
        folder: the study's folder; the latest one by default.
        results: where studies are kept.
        as_json: for a program: one object, all times in seconds of a device and in hours.
    """
    study = _opened(folder, results)
    whole, parts = accounts(study.records(), sessions(study.folder))
    ordered = {kind: parts[kind] for kind in LOOKS if kind in parts}
    if as_json:
        print(json.dumps(cost_data(study.study.name, whole, ordered), allow_nan=False, indent=2))
    else:
        _tell_cost(wide_console(), study, whole, ordered)


Command = (
    Annotated[Work, tyro.conf.subcommand("status", constructor=later(status))]
    | Annotated[Work, tyro.conf.subcommand("cost", constructor=later(cost))]
)


def study(command: Annotated[Command, tyro.conf.arg(name="")]) -> None:
    """Look at a study, while it runs or afterwards: status, cost."""
    command()


def _opened(folder: Path | None, results: Path) -> StudyFolder:
    return StudyFolder.open(folder) if folder else latest_study(results)


# --- what a study is doing --------------------------------------------------------------------------------------------


def _tell_status(console: Console, now: Status, folder: StudyFolder) -> None:
    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    say(f"{now.study.name}: {now.study.question}", "bold")
    say(str(folder.folder))
    for line in _session_lines(now):
        say(line)
    of = f" of {now.study.seeds} seeds" if now.study.seeds > 1 else ""
    say(f"{now.done} of {now.planned} points{of} done, {now.begun - now.done} more begun")
    if now.verdicts:
        say("runs: " + ", ".join(f"{count} {words(kind)}" for kind, count in now.verdicts.items()))
    if now.going:
        _going_table(now).print(console)
    say(_best_line(now))
    what, command = advice(now, folder)
    say(f"next: {what}" + (f": {command}" if command else ""), "yellow" if command else None)


def _session_lines(now: Status) -> Iterator[str]:
    for session in now.at_work:
        runs, workers = _count(session.slots, "run"), _count(session.workers, "worker")
        gpus = f"{session.gpus:g} GPU" if session.gpus else "CPU"
        yield (
            f"session {session.id} has been at work for {duration(session.seconds)}: {runs} at once, {workers} a run, "
            f"{gpus} a worker"
        )
    if not now.at_work:
        yield f"no session is at work; {_last_session(now.sessions[-1])}" if now.sessions else "no session is known"


def _last_session(session: SessionInfo) -> str:
    ago = f"{duration(max(0.0, time.time() - session.seen))} ago"
    if session.ended is None:
        return f"the last, {session.id}, was killed or lost its machine {ago}"
    how = {"finished": "finished", "interrupted": "was interrupted"}.get(session.ended, session.ended)
    return f"the last, {session.id}, {how} {ago}"


def _going_table(now: Status) -> Told:
    heads = ("run", "step", "steps/s", "training left", called(now.study.objective), "S", "restarts", "session")
    names, alive = now.study.names(), {session.id for session in now.at_work}
    rows = tuple(
        (
            _called(one.run, names),
            f"{one.run.steps}/{one.run.config.steps}",
            NOTHING if one.steps_per_second is None else f"{one.steps_per_second:.3g}",
            NOTHING if one.seconds_left is None else duration(one.seconds_left),
            _number(one.run.last(f"quality/{now.study.objective}")),
            _number(one.run.last("divergence/stability")),
            str(one.restarts),
            one.session if one.session in alive else "cut off" if one.session or not alive else NOTHING,
        )
        for one in now.going
    )
    return Told("unfinished runs", heads, rows)


def _best_line(now: Status) -> str:
    if now.best is None:
        return "best point so far: none"
    run, dice, stability = now.best
    quality = called(now.study.objective)
    told = f"best point so far: {_called(run, now.study.names())}, {quality} {_number(dice)}, S {_number(stability)}"
    told += "" if stability >= now.study.feasible else f" (no point reached S of {now.study.feasible:g})"
    settings = ", ".join(f"{path} {_leaf(value)}" for path, value in _settings(run, now).items())
    return f"{told}; {settings}" if settings else told


def advice(now: Status, folder: StudyFolder) -> tuple[str, str | None]:
    """What a user may do next, and the command for it, if it takes one."""
    if now.at_work:
        return "nothing; a session is at work", None
    over = now.sessions[-1].ended == "finished" if now.sessions else not now.going
    if over and folder.report.is_file() and now.begun == now.planned:
        lost = f"; {_count(len(now.going), 'run')} failed on every try: see error.txt under {folder.folder / 'ray'}"
        return f"read {folder.report}{lost if now.going else ''}", None
    return "continue with", shlex.join(_resumption(folder))


def _resumption(folder: StudyFolder) -> list[str]:
    """The command that continues a study: what it was started with is kept with it, but for where Ray is."""
    line = ["python", script(folder), "--resume", "--name", folder.folder.name]
    if folder.folder.parent != Path("results").absolute():
        line += ["--results", str(folder.folder.parent)]
    typed = [part for word in shlex.split(folder.command) for part in word.split("=", 1)]
    for flag, value in itertools.pairwise(typed):
        line += [flag, value] if flag == "--address" else []
    return line


def status_data(now: Status, folder: StudyFolder) -> dict[str, Any]:
    """The status as plain data; a value that is not finite is named."""
    what, command = advice(now, folder)
    names = now.study.names()
    alive = {session.id for session in now.at_work}
    best = now.best and {
        "run": now.best.run.name,
        "label": names.get(now.best.run.config),
        "dice": _plain(now.best.dice),
        "stability": _plain(now.best.stability),
        "settings": _settings(now.best.run, now),
    }
    return {
        "study": now.study.name,
        "question": now.study.question,
        "sessions": [_session_data(session) | {"alive": session.id in alive} for session in now.sessions],
        "points": {"planned": now.planned, "begun": now.begun, "done": now.done, "seeds": now.study.seeds},
        "runs": dict(now.verdicts),
        "going": [_going_data(one, now, names.get(one.run.config)) for one in now.going],
        "best": best,
        "next": {"what": what, "command": command},
    }


def _session_data(session: SessionInfo) -> dict[str, Any]:
    names = ("id", "began", "seen", "slots", "workers", "gpus", "ended")
    return {name: getattr(session, name) for name in names}


def _going_data(one: Going, now: Status, label: str | None) -> dict[str, Any]:
    return {
        "run": one.run.name,
        "label": label,
        "session": one.session or None,
        "step": one.run.steps,
        "steps": one.run.config.steps,
        "steps_per_second": one.steps_per_second,
        "seconds_left": one.seconds_left,
        "dice": _plain(one.run.last(f"quality/{now.study.objective}")),
        "stability": _plain(one.run.last("divergence/stability")),
        "restarts": one.restarts,
    }


def _settings(run: Run, now: Status) -> dict[str, Any]:
    """In what a run differs from the one that the study departs from."""
    base = now.study.run.flat()
    return {path: value for path, value in run.config.flat().items() if value != base[path]}


def _called(run: Run, names: Mapping[Any, str]) -> str:
    label = names.get(run.config)
    return f"{run.name} {label}" if label else run.name


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _leaf(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


# --- what a study cost ------------------------------------------------------------------------------------------------


def _tell_cost(console: Console, folder: StudyFolder, whole: Account, parts: Mapping[str, Account]) -> None:
    unit, ways = whole.unit, ("saved at\nthe alarm", "saved by\nscheduler", "lost to\nfailures")
    rows = tuple(
        (
            name,
            f"{of.runs:,}",
            *(f"{n:,}" for n in (of.steps, of.steps_saved_alarm, of.steps_saved_pruner, of.steps_lost)),
            *map(unit.said, (of.seconds, of.seconds_saved_alarm, of.seconds_saved_pruner, of.seconds_lost)),
            f"{of.restarts:,}",
        )
        for name, of in [*((words(kind), part) for kind, part in parts.items()), ("all", whole)]
    )
    steps, times = ([f"{what}\n{way}" for way in ways] for what in ("steps", unit.short))
    heads = ("", "runs", "steps", *steps, unit.name.replace(" ", "\n"), *times, "restarts")
    Told(f"{folder.study.name}: {_count(whole.points, 'point')}", heads, rows).print(console)
    for line in _cost_lines(whole):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cost_lines(whole: Account) -> Iterator[str]:
    unit = whole.unit
    yield f"{whole.share_saved_alarm:.1%} of all steps were saved by stopping at the alarm"
    if whole.seconds_had is None:
        yield "no session is known, so neither is the overhead"
    elif whole.overhead is not None:
        yield (
            f"sessions had {unit.said(whole.seconds_had)} {unit.name}; {whole.overhead:.0%} of them are overhead: "
            "starts, loading, evaluations, checkpoints, idle slots, lost work"
        )


def cost_data(name: str, whole: Account, parts: Mapping[str, Account]) -> dict[str, Any]:
    """A study's costs as plain data."""
    return {
        "study": name,
        "unit_of_hours": whole.hours.name,
        "gpus_per_worker": whole.gpus,
        "overhead_share": whole.overhead,
        "share_of_steps_saved_at_alarm": whole.share_saved_alarm,
        "seconds_had": whole.seconds_had,
        "hours_had": None if whole.seconds_had is None else whole.hours.of(whole.seconds_had),
        "all": _account_data(whole),
        "by_verdict": {kind: _account_data(part) for kind, part in parts.items()},
    }


def _account_data(of: Account) -> dict[str, Any]:
    steps = ("steps", "steps_saved_alarm", "steps_saved_pruner", "steps_lost")
    times = ("seconds", "seconds_saved_alarm", "seconds_saved_pruner", "seconds_lost")
    return {
        "runs": of.runs,
        "points": of.points,
        "restarts": of.restarts,
        **{name: getattr(of, name) for name in (*steps, *times)},
        **{name.replace("seconds", "hours"): of.hours.of(getattr(of, name)) for name in times},
    }
