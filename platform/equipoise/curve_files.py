"""Curves that other programs wrote: tables, CycleGAN's log, TensorBoard's event files.

Knows how each writes signals down; knows nothing of what they mean (`curve_names`) or who judges them. A value that is
not finite stays what it is, be it a word in a table or a float in an event file: it is a finding.

    table    CSV with a heading; commas, semicolons or tabs
      long     step, signal (or tag, name, metric), value; or low and high, whose mean is taken. Perhaps run.
      wide     step (or iter, ...) and a column a signal. Perhaps run; or "run - signal", as W&B exports charts.
      single   Wall time, Step, Value, as TensorBoard exports one chart; run and signal are in the file's name
    log      (epoch: 1, iters: 100, time: 0.2, data: 0.1) D_A: 0.25 G_A: 0.3 ...      loss_log.txt of pytorch-CycleGAN
    events   TensorBoard's files, all of a folder being one run
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from equipoise.event_files import scalars
from slicestore.errors import InputError

Curve = tuple[np.ndarray, np.ndarray]
"""Steps `(n,)` int64, strictly ascending, and values `(n,)` float64."""
Point = tuple[str, str, int, float]
"""Run, signal, step, value."""

STEP = ("step", "steps", "_step", "global_step", "trainer/global_step", "iter", "iters", "iteration", "iterations")
SIGNAL = ("signal", "tag", "name", "metric")
RUN = ("run", "run_name")
_LOG_LINE = re.compile(r"\(epoch: *(\d+), *iters: *(\d+)[^)]*\)(.*)")
_LOG_VALUE = re.compile(r"([^\s:,]+): *([^\s,]+)")
_TENSORBOARD_CSV = re.compile(r"run-(?P<run>.+)-tag-(?P<tag>.+)")
_WANDB_COLUMN = re.compile(r"(?P<run>.+) - (?P<tag>.+?)(?P<extreme>__MIN|__MAX)?")


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """What was written of one run."""

    run: str
    signals: Mapping[str, Curve]
    """By the names they were written under."""
    notes: tuple[str, ...] = ()
    """What could not be read."""

    def upto(self, step: int) -> Curves:
        """The same as if the run had been stopped after `step`; signals that began later are gone."""
        cut = {tag: (steps[steps <= step], values[steps <= step]) for tag, (steps, values) in self.signals.items()}
        return Curves(self.run, {tag: curve for tag, curve in cut.items() if len(curve[0])}, self.notes)


def read(path: Path) -> list[Curves]:
    """All runs in a file or folder, in the order in which they were written, folders by name.

    Raises:
        InputError: there is nothing of the kind, or something in it that is neither a number nor NaN or infinite.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise InputError(
            path,
            found="nothing",
            rule="curves are read from a file or a folder",
            remedy="check the path and its permissions",
        )
    with path.open("rb") as file:
        start = file.read(4096)
    utf16 = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    if (b"\0" in start and not utf16) or "tfevents" in path.name:
        return [_events(path.parent.absolute().name, [path])]
    if any(map(_LOG_LINE.match, start.decode(errors="replace").splitlines())):
        return [_log(path)]
    return _table(path)


def _folder(path: Path) -> list[Curves]:
    """The runs of a folder: event files at any depth, else logs in it or its folders, else tables in it."""
    name = path.absolute().name
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for file in sorted(found for found in path.rglob("*tfevents*") if found.is_file()):
        by_folder[file.parent].append(file)
    if by_folder:
        return [_events(str(k.relative_to(path)) if k != path else name, v) for k, v in by_folder.items()]
    if logs := sorted(path.glob("loss_log.txt")) + sorted(path.glob("*/loss_log.txt")):
        return [_log(log) for log in logs]
    tables = [run for table in sorted(path.glob("*.csv")) for run in _table(table)]
    if not tables:
        raise InputError(
            path,
            found="no event file, loss_log.txt or CSV file",
            rule="a folder of curves holds one of them",
            remedy="give the file, or a run's folder of Equipoise, with its config.json and signals.jsonl",
        )
    merged: dict[str, Curves] = {}
    for run in tables:
        known = merged.get(run.run, Curves(run.run, {}))
        if twice := sorted(known.signals.keys() & run.signals.keys()):
            raise InputError(
                path,
                found=f"{', '.join(twice)} of {run.run} in two files",
                rule="a signal of a run is in one",
                remedy="give one of the files",
            )
        merged[run.run] = Curves(run.run, {**known.signals, **run.signals}, known.notes + run.notes)
    return list(merged.values())


# --- event files ------------------------------------------------------------------------------------------------------


def _events(run: str, files: Sequence[Path]) -> Curves:
    """What a folder's files hold, which may be no scalar at all: some are written for a graph or for nothing."""
    points: list[Point] = []
    notes: list[str] = []
    for file in files:  # their names begin with the time at which they were begun
        found, damage = scalars(file)
        if early := [step for _, step, _ in found if step < 0]:
            raise InputError(
                file, found=f"step {early[0]}", rule="steps are whole numbers from 0 on", remedy="give another file"
            )
        points += [(run, tag, step, value) for tag, step, value in found]
        notes += [f"read as far as it is whole: {damage}"] if damage else []
    curves = _gathered(points, _as_written).get(run, {})
    return Curves(run, curves, tuple(notes))


# --- CycleGAN's log ---------------------------------------------------------------------------------------------------


def _log(path: Path) -> Curves:
    """Its steps are images, counted through the epochs."""
    run, text = path.absolute().parent.name, _text(path)
    *lines, rest = text.split("\n")
    notes = (f"the last line is not whole: {rest[:40]!r}",) if _LOG_LINE.match(rest) else ()
    found = [(number, match) for number, line in enumerate(lines, 1) if (match := _LOG_LINE.match(line))]
    length = _epoch([(int(match[1]), int(match[2])) for _, match in found])
    points = [
        (run, tag, (int(match[1]) - 1) * length + int(match[2]), _number(value, path, f"line {number}, {tag}"))
        for number, match in found
        for tag, value in _LOG_VALUE.findall(match[3])
    ]
    if not points:
        raise InputError(
            path,
            found="no whole line of losses",
            rule="a line is (epoch: 1, iters: 100, ...) D_A: 0.25 ...",
            remedy="give the loss_log.txt of a run",
        )
    return Curves(run, _gathered(points, _as_written)[run], notes)


def _epoch(counts: Sequence[tuple[int, int]]) -> int:
    """Images in an epoch, of the (epoch, images) at which lines were written, at equal distances through the epochs."""
    pairs = list(pairwise(counts))
    gaps = [b - a for (epoch, a), (next_epoch, b) in pairs if epoch == next_epoch and b > a]
    most = max((images for _, images in counts), default=1)
    if not gaps:
        return most
    gap = statistics.mode(gaps)
    lengths = [a + gap - b for (epoch, a), (next_epoch, b) in pairs if next_epoch == epoch + 1]
    return max(most, statistics.mode(lengths)) if lengths else most


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(path: Path) -> list[Curves]:
    lines = _text(path).splitlines()
    heading = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t", key=heading.count)
    table = csv.reader(lines, delimiter=delimiter)
    rows = [(table.line_num, row) for row in table if any(cell.strip() for cell in row)]
    if len(rows) < 2:
        raise InputError(
            path,
            found=f"{len(rows)} rows",
            rule="a table of curves has a heading and rows",
            remedy="export it again",
        )
    columns = [cell.strip() for cell in rows[0][1]]
    if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise InputError(
            path, found=f"two columns {', '.join(twice)}", rule="a column has its own name", remedy="rename one"
        )
    notes: tuple[str, ...] = ()
    if len(rows[-1][1]) < len(columns) and not _ends_whole(path):
        notes = (f"the last line, {rows[-1][0]}, is not whole",)
        rows.pop()
    for number, row in rows:
        if len(row) != len(columns):
            raise InputError(
                f"{path}, line {number}",
                found=f"{len(row)} cells",
                rule=f"the heading has {len(columns)}",
                remedy="export the table again",
            )
    points = _points(path, columns, rows[1:])
    return [Curves(run, curves, notes) for run, curves in _gathered(points, _by_step).items()]


def _points(path: Path, columns: Sequence[str], rows: Sequence[tuple[int, list[str]]]) -> list[Point]:
    """The values of a table, by its dialect."""
    places = {name.casefold(): place for place, name in reversed(list(enumerate(columns)))}
    step = next((places[name] for name in STEP if name in places), None)
    if step is None:
        raise InputError(
            path,
            found=f"the columns {', '.join(columns)}",
            rule=f"one of them is called {', '.join(STEP[:-1])} or {STEP[-1]}",
            remedy="name the column of steps `step`; epochs serve too, if they are meant to be judged as steps",
        )
    signal = next((places[name] for name in SIGNAL if name in places), None)
    run = next((places[name] for name in RUN if name in places), None)
    parts = [places[name] for name in (("low", "high") if "low" in places else ("value",)) if name in places]
    cells = list(_cells(path, columns, rows, step))
    if signal is not None and parts:
        return [
            (_of(row, run, path.stem), row[signal], at, sum(map(number, parts)) / len(parts))
            for row, at, number in cells
        ]
    if parts and "wall time" in places:
        name, tag = path.absolute().parent.name, path.stem
        if named := _TENSORBOARD_CSV.fullmatch(path.stem):
            name, tag = (name if named["run"] == "." else named["run"]), named["tag"]
        return [(name, tag, at, number(parts[0])) for _, at, number in cells]
    return _wide(path, columns, cells, {step, run})


Cells = tuple[list[str], int, Callable[[int], float]]
"""A row's texts, its step, and the number in one of its columns."""


def _cells(path: Path, columns: Sequence[str], rows: Iterable[tuple[int, list[str]]], step: int) -> Iterator[Cells]:
    for number, row in rows:

        def value(place: int, number: int = number, row: Sequence[str] = row) -> float:
            return _number(row[place], path, f"line {number}, {columns[place] or 'the first column'}")

        at = value(step)
        if not (at >= 0 and at == math.floor(at) and math.isfinite(at)):
            raise InputError(
                f"{path}, line {number}",
                found=f"step {row[step]}",
                rule="steps are whole numbers from 0 on",
                remedy="correct the line",
            )
        yield row, int(at), value


def _wide(path: Path, columns: Sequence[str], cells: Sequence[Cells], taken: set[int | None]) -> list[Point]:
    """A column a signal; cells may be empty, and columns of words without a single finite number are no signals."""
    run = next((place for place in taken if place is not None and columns[place].casefold() in RUN), None)
    points: list[Point] = []
    for place, column in enumerate(columns):
        read = [_read(row[place]) for row, _, _ in cells if row[place].strip()]
        words = None in read and not any(value is not None and math.isfinite(value) for value in read)
        if place in taken or not column or words:
            continue
        wandb = _WANDB_COLUMN.fullmatch(column)
        if wandb and wandb["extreme"]:
            continue
        name, tag = (wandb["run"], wandb["tag"]) if wandb else (path.stem, column)
        points += [(_of(row, run, name), tag, at, number(place)) for row, at, number in cells if row[place].strip()]
    if not points:
        raise InputError(
            path,
            found="no column of numbers beside the steps",
            rule="a wide table has a column a signal",
            remedy="export the losses too, with a point for decimals",
        )
    return points


def _of(row: Sequence[str], run: int | None, otherwise: str) -> str:
    """The run that a row is of."""
    return otherwise if run is None else row[run]


def _number(text: str, path: Path, where: str) -> float:
    value = _read(text)
    if value is None:
        raise InputError(
            f"{path}, {where}",
            found=repr(text),
            rule="a value is a number, nan, inf or -inf",
            remedy="correct it, with a point for decimals",
        )
    return value


def _read(text: str) -> float | None:
    """A number, NaN or infinity, as Python, JavaScript or C print them; None for anything else."""
    try:
        return float(text)
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(
            path,
            found="bytes that are no UTF-8",
            rule="tables and logs are text, event files have `tfevents` in their name",
            remedy="save it as UTF-8",
        ) from None


def _ends_whole(path: Path) -> bool:
    return path.read_bytes().endswith((b"\n", b"\r"))


# --- points to curves -------------------------------------------------------------------------------------------------


def _gathered(points: Iterable[Point], curve: Callable[[np.ndarray, np.ndarray], Curve]) -> dict[str, dict[str, Curve]]:
    """Curves by run and signal, both in the order of their first point."""
    held: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for run, tag, step, value in points:
        held[run][tag].append((step, value))
    return {run: {tag: curve(*_arrays(some)) for tag, some in signals.items()} for run, signals in held.items()}


def _arrays(points: Sequence[tuple[int, float]]) -> Curve:
    steps, values = zip(*points, strict=True)
    return np.array(steps, np.int64), np.array(values, np.float64)


def _by_step(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Sorted; of several values at one step the last in the table."""
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.r_[steps[1:] != steps[:-1], True]
    return steps[last], values[last]


def _as_written(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Written while a run trained: where steps go back, it was resumed, and what it had said of later steps is void."""
    soonest = np.minimum.accumulate(steps[::-1])[::-1]  # the lowest step from here on
    kept = np.r_[steps[:-1] < soonest[1:], True]
    return steps[kept], values[kept]
