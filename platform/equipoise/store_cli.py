"""The commands on stores, `equipoise store ...`, and how the making of a store is shown.

Knows what a user types and reads; knows nothing that `slicestore` does not offer to a script too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from slicestore.export import Format, Grid
from slicestore.export import export as export_store
from slicestore.ingest import OBLIQUE_DEGREES
from slicestore.layout import DOMAINS, REMEDY, SCHEMA
from slicestore.manifest import Entry
from slicestore.records import import_records, records_from
from slicestore.settings import Preprocessing
from slicestore.splits import PARTS
from slicestore.spread import Spread, fitting, here
from slicestore.spread import processes as spread_over
from slicestore.store import Store
from slicestore.verify import verify as look_over

BYTES_EACH = 1 << 30
"""Memory reserved for a process that prepares volumes: one of the 2022 study's size, 232 x 576 x 768, takes .64 GB,
.96 with a class of brain."""


Unprefixed = tyro.conf.arg(name="")
"""A group of options without the group's name before each."""
Words = ParamSpec("Words")
Work = Callable[[], None]


def later(command: Callable[Words, None]) -> Callable[Words, Work]:
    """A command that does nothing yet when its words are read, so that an error in them is not taken for one in it."""

    @wraps(command)
    def read(*words: Words.args, **options: Words.kwargs) -> Work:
        return partial(command, *words, **options)

    return read


def verify(store: Positional[str], /, quick: bool = False) -> None:
    """Look for damage in a store, finished or not, and change nothing; exits with 1 where there is any.

    Args:
        store: folder or s3://bucket/prefix.
        quick: look at names and sizes only, instead of every byte.
    """
    console = Console()
    report = look_over(store, deep=not quick)
    for problem in report.problems:
        say(console, f"broken: {problem}", style="red")
    for left in report.leftovers:
        say(console, f"left over: {left}; the next ingest removes it")
    if not report.finished:
        console.print("unfinished: its making was interrupted or goes on; the same `equipoise prepare` continues it")
    held = f"{report.volumes} volumes, {report.slices} slices, {report.objects} objects of {_size(report.bytes)}"
    seen = "names and sizes" if quick else "every byte"
    say(console, f"{report.where}: {held}; {seen} read")
    if not report.intact:
        console.print(f"{len(report.problems)} broken. Remedy: {REMEDY}", style="red", soft_wrap=True)
        sys.exit(1)
    console.print("intact")


def info(store: Positional[str], /) -> None:
    """Say what a store holds: counts, sizes, splits, preprocessing, limits, and what became of each label.

    Args:
        store: folder or s3://bucket/prefix.
    """
    console = Console()
    opened = Store.open(store)
    describe(console, opened)
    memory = sum(e.slices * opened.size**2 * (3 if e.labelled else 2) for e in opened.entries)
    facts = {
        "layout": f"schema {SCHEMA}; Zarr v3, chunk = slice, shard = volume; explained in zarr.json's attributes",
        "size": f"{_size(sum(opened.place.sizes().values()))} at rest, {_size(memory)} in memory",
        "preprocessing": _differences(opened.preprocessing) or "all as recommended",
        **{f"limits, {domain}": _span(opened.limits(domain)) for domain in DOMAINS if opened.select(domain, "train")},
    }
    for name, said in facts.items():
        say(console, f"{name}: {said}")
    console.print(volumes_table(opened))


def export(
    store: Positional[str], folder: Positional[Path], /, format: Format = "nifti", grid: Grid = "prepared"
) -> None:
    """Write a store's volumes as NIfTI, or as TFRecords in SIFA's layout, into a new or empty folder.

    Args:
        store: folder or s3://bucket/prefix.
        folder: where to.
        format: nifti, or tfrecord: three neighbouring slices a record, a record a file, and lists of them.
        grid: with nifti: the slices' grid, or raw: masks alone, in the grid of the scan.
    """
    console, opened = Console(), Store.open(store)
    with shown(console, "exporting") as progress:
        count = export_store(opened, folder, format=format, grid=grid, progress=progress)
    say(console, f"{folder}: {count} files")


def import_tfrecords(
    store: Positional[str],
    /,
    source: Path,
    target: Path,
    subject: str | None = None,
    seed: int = 0,
    processes: int | None = None,
    key_file: Path | None = None,
) -> None:
    r"""Make a store of TFRecords in SIFA's layout, values as they are.

    Args:
        store: folder or s3://bucket/prefix.
        source: a folder of files, a .txt list of them, or one file, of labelled slices.
        target: the same of the other modality.
        subject: a regular expression that finds the subject in a file's name, such as '^(case\d+)_'; without it a file
            is a subject.
        seed: seed of the split by subject.
        processes: how many at a time; as many as there are cores and memory for by default.
        key_file: where the pseudonyms' key goes; beside the store by default.
    """
    console = Console()
    items = [
        *records_from(source, "source", subject=subject),
        *records_from(target, "target", subject=subject),
    ]
    with shown(console) as progress:
        spread = spread_here(processes, len(items))
        made = import_records(items, store, seed=seed, progress=progress, key_file=key_file, spread=spread)
    describe(console, made)


Command = (
    Annotated[Work, tyro.conf.subcommand("verify", constructor=later(verify))]
    | Annotated[Work, tyro.conf.subcommand("info", constructor=later(info))]
    | Annotated[Work, tyro.conf.subcommand("export", constructor=later(export))]
    | Annotated[Work, tyro.conf.subcommand("import", constructor=later(import_tfrecords))]
)


def store(command: Annotated[Command, tyro.conf.arg(name="")]) -> None:
    """Look after a store: verify, info, export, import."""
    command()


# --- what is shown ----------------------------------------------------------------------------------------------------


class _Rate(ProgressColumn):
    """Volumes a minute, of those that were made."""

    def render(self, task: Task) -> Text:
        """See `rich.progress.ProgressColumn`."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed * 60:.1f} volumes/min" if speed else "")


def say(console: Console, said: str, style: str | None = None) -> None:
    """Print a line as it is: names of files are no markup, and a path is not broken."""
    console.print(said, style=style, markup=False, highlight=False, soft_wrap=True)


def warn(console: Console, said: str) -> None:
    """Print what a user should know before trusting a result."""
    say(console, f"warning: {said}", style="yellow")


@contextmanager
def shown(console: Console, first: str = "checking every file") -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar of volumes made, their rate and the time left; it is told of volumes by what this gives."""
    columns = (BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(), TextColumn("{task.description}"))
    kept = 0
    with Progress(*columns, console=console, speed_estimate_period=3600) as bar:
        task = bar.add_task(first, total=None)

        def told(done: int, total: int, what: str) -> None:
            nonlocal kept
            kept += " kept" in what  # they cost nothing, and would make the rest look quick
            bar.update(task, completed=done - kept, total=total - kept, description=what)

        yield told


def spread_here(count: int | None, items: int) -> Spread:
    """As many processes as asked for, or as cores and memory allow; one of them is this one."""
    count = fitting(items, BYTES_EACH) if count is None else count
    return here if count == 1 else spread_over(count)


def describe(console: Console, store: Store) -> None:
    """Print what each domain has, and which store it is."""
    for domain in DOMAINS:
        entries = store.select(domain)
        parts = {part: sum(entry.split == part for entry in entries) for part in PARTS}
        console.print(
            f"{domain}: {len(entries)} volumes, {sum(e.slices for e in entries)} slices of {store.size} x "
            f"{store.size}; subjects: " + ", ".join(f"{n} {p}" for p, n in parts.items()),
            highlight=False,
        )
        if not parts["val"]:
            console.print(f"no {domain} subject is left to validate on: Dice cannot be measured there")
    console.print(f"{store.path}: {store.classes} classes, fingerprint {store.fingerprint[:12]}", soft_wrap=True)


def volumes_table(store: Store) -> Table:
    """A row per volume and class: what preprocessing kept of the label, and what is odd about the volume."""
    table = Table("subject", "split", "slices", "class", "volume kept", "pieces", "centreline kept", "note")
    for entry in store.entries:
        record = store.record(entry)
        head = [entry.subject, entry.split, str(entry.slices)]
        for row in _label_rows(record["label"], store.preprocessing.brain_class) or [["", "", "", ""]]:
            table.add_row(*head, *row, _note(entry, record))
            head = ["", "", ""]
    return table


def _label_rows(label: dict[str, Any] | None, brain_class: int) -> list[list[str]]:
    if label is None:
        return []
    rows = []
    for index in range(label["classes"] - 1):
        before, after = (label["volume_mm3"][when][index] for when in ("before", "after"))
        pieces = " → ".join(str(label["pieces"][when][index]) for when in ("before", "after"))
        line = label["centreline"][index]
        kept = f"{after / before:.1%}" if before else "empty"
        name = f"{index + 1} (brain)" if index + 1 == brain_class else str(index + 1)
        rows.append([name, kept, pieces, "" if line is None else f"{line:.1%}"])
    return rows


def _note(entry: Entry, record: dict[str, Any]) -> str:
    notes = []
    if record["oblique_degrees"] > OBLIQUE_DEGREES:
        notes.append(f"{record['oblique_degrees']:.0f}° oblique: its slices are not axial")
    if record.get("geometry") == "unknown":
        notes.append("geometry unknown")
    if entry.evaluation_only:
        notes.append("label for evaluation only")
    return "; ".join(notes)


def _differences(config: Preprocessing) -> str:
    usual = asdict(Preprocessing())
    return ", ".join(f"{name} {value}" for name, value in asdict(config).items() if value != usual[name])


def _span(limits: tuple[float, float]) -> str:
    return f"{limits[0]:.2f} to {limits[1]:.2f} standard deviations among training subjects"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
