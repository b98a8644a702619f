"""The command line: one function a command.

Knows what a user types and how a mistake is told; knows nothing that the modules it calls do not offer to a script too.
Commands that need Ray, W&B or Optuna import them when they run, so that the rest works without.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeVar

import torch
import tyro
from rich.console import Console
from tyro.conf import Positional

from equipoise import batches, progress, speed
from equipoise.config import PRESETS as RUNS
from equipoise.config import PUBLISHED, RunConfig
from equipoise.evaluate_cli import evaluate
from equipoise.json_lines import JsonTracker
from equipoise.keeping import Keeping
from equipoise.predict_cli import export, predict, translate
from equipoise.raw_volumes import RawVolumes
from equipoise.record import Record
from equipoise.sessions import sessions
from equipoise.store_cli import Unprefixed, Work, describe, later, say, shown, spread_here, store, volumes_table
from equipoise.study import StudyFolder, latest_study
from equipoise.study_cli import AsJson, study
from equipoise.table import TableTracker, wide_console
from equipoise.tensorboard import TensorBoardTracker
from equipoise.tracking import Tracker, Watcher
from equipoise.uploading import upload
from equipoise.wandb_run import WandbMode, wandb_mode
from equipoise.wandb_tracker import WandbTracker
from equipoise.workspace import create
from equipoise.workspace_cli import workspace
from slicestore.errors import InputError
from slicestore.ingest import ingest
from slicestore.phantom import write_cohort
from slicestore.place import Place
from slicestore.settings import PRESETS, Preprocessing
from slicestore.spread import Spread
from slicestore.store import Store


def prepare(
    store: Positional[str],
    /,
    raw: Annotated[RawVolumes, Unprefixed],
    preprocessing: Annotated[Preprocessing, Unprefixed] = PRESETS["recommended"],
    preset: Literal["recommended", "seed2022"] = "recommended",
    seed: int = 0,
    processes: int | None = None,
    address: str | None = None,
    key_file: Path | None = None,
) -> None:
    """Make a store of training slices from raw volumes; unchanged volumes of an existing one are kept.

    Args:
        store: folder of the store, such as cohort.zarr, or s3://bucket/prefix.
        raw: where the volumes are.
        preprocessing: what is done to every volume.
        preset: the settings that those given one by one depart from.
        seed: seed of the split by subject.
        processes: how many volumes at a time; as many as there are cores and memory for by default.
        address: instead of processes here, a Ray cluster ("auto" or HOST:PORT), every node of which must see the raw
            volumes and the store under the same paths.
        key_file: where the pseudonyms' key goes; by default beside the store, or here if that is in S3.
    """
    inputs = raw.inputs()
    if address is not None and processes is not None:
        raise InputError(
            "prepare",
            found="--processes and --address",
            rule="processes of this machine or a cluster does the work",
            remedy="leave one of the two out",
        )
    console = Console()
    with _spread(address, processes, len(inputs)) as spread, shown(console) as told:
        made = ingest(inputs, store, preprocessing, seed=seed, progress=told, key_file=key_file, spread=spread)
    describe(console, made)
    console.print(volumes_table(made))


@contextmanager
def _spread(address: str | None, processes: int | None, items: int) -> Iterator[Spread]:
    if address is None:
        yield spread_here(processes, items)
        return
    from equipoise.launch.cluster import connect
    from equipoise.launch.spread import ray_tasks

    with connect(address):
        yield ray_tasks


def phantom(folder: Positional[Path], /, subjects: int = 5, seed: int = 0, original_size: bool = False) -> None:
    """Write synthetic TOF and SWI heads with vessel and brain masks, and the table that `prepare` takes.

    Args:
        folder: a new or empty folder.
        subjects: heads of each modality, at least 3.
        seed: seed of the cohort.
        original_size: the 2022 study's sizes and spacings instead of small ones.
    """
    table = write_cohort(folder, subjects=subjects, seed=seed, original_size=original_size)
    Console().print(f"{table}: now `equipoise prepare STORE --table {table} --mask brain`", soft_wrap=True)


def train(
    store: Positional[str],
    out: Positional[Path],
    /,
    run: Annotated[RunConfig, Unprefixed] = PUBLISHED,
    preset: Literal["published", "v1", "study2022", "vessel"] = "published",
    gpus_per_worker: float | None = None,
    cpus_per_worker: float = 1.0,
    checkpoint_every: int = 0,
    checkpoints_kept: int = 2,
    copies: str = "",
    wandb: WandbMode | None = None,
    wandb_images: bool = False,
    tensorboard: bool = False,
    quiet: bool = False,
    as_json: AsJson = False,
) -> None:
    """Train one run, or continue it where its folder left off.

    Args:
        store: the store to train on, a folder or s3://bucket/prefix.
        out: the run's folder: settings, signals, panels, checkpoints, verdict.
        run: the run's settings; net.classes is the store's unless it is given.
        preset: the settings that those given one by one depart from.
        gpus_per_worker: with --workers above 1; without it, 1 where there are GPUs.
        cpus_per_worker: with --workers above 1.
        checkpoint_every: steps between checkpoints, beside those at evaluations.
        checkpoints_kept: newest checkpoints that stay.
        copies: a folder (another disk, NFS) or s3://bucket/prefix that gets a copy of the run's folder, panels
            included, from which it goes on should its own folder be lost.
        wandb: online, offline or disabled; without it, online where there is a key.
        wandb_images: give W&B the panels too.
        tensorboard: write TensorBoard's event files too, into the run's folder, panels included.
        quiet: print mistakes, and nothing else.
        as_json: print an object a line: every block of steps, and the verdict.
    """
    opened = Store.open(store)
    run = run.at("data.cohort", opened.fingerprint)
    if _typed("--net.classes") is None:
        run = run.at("net.classes", opened.classes)
    keeping = Keeping(every=checkpoint_every, kept=checkpoints_kept, copies=copies)
    _check(run, opened)
    console = wide_console(quiet=quiet or as_json)
    mode, notice = wandb_mode(wandb)
    console.print(notice, highlight=False)
    trackers: list[Tracker] = []
    if mode != "disabled":
        trackers.append(
            WandbTracker(
                out / "wandb",
                group="single",
                prefix=run.fingerprint,
                mode=mode,
                images=wandb_images,
                gpus=_gpus(gpus_per_worker),
            )
        )
    if tensorboard:
        trackers.append(TensorBoardTracker(out / "tensorboard"))
    if as_json:
        trackers.append(JsonTracker(sys.stdout))
    if run.workers > 1:  # they train elsewhere: what they write is all there is to show
        trackers.append(TableTracker(console, "translated_dice"))
    record = Record(out)
    with Watcher(lambda: [record] if (out / "config.json").is_file() else [], trackers):
        if run.workers > 1:
            _train_over_workers(record, run, store, cpus_per_worker, gpus_per_worker, keeping)
        else:
            _train_here(console, record, run, store, keeping)
    verdict = record.verdict
    console.print(verdict.sentence() if verdict else "stopped; the same command continues", highlight=False)
    for picture in record.pictures()[-1:]:
        say(console, f"panels: {picture}")


def _gpus(per_worker: float | None) -> float:
    """GPUs of a worker: as given, else one where there are any."""
    return float(torch.cuda.is_available()) if per_worker is None else per_worker


def _check(run: RunConfig, store: Store) -> None:
    """Refuse what cannot be trained before anything is written, staged or started."""
    from equipoise.launch.local import device_here

    batches.check(store, run)
    speed.check(run, device_here())


def _train_here(console: Console, record: Record, run: RunConfig, store: str, keeping: Keeping) -> None:
    from equipoise.launch.local import launch

    with progress.shown(console, run.steps, record.picture) as told:
        for block in launch(record.folder, run, store, keeping=keeping):
            told(block)


def _train_over_workers(
    record: Record, run: RunConfig, store: str, cpus: float, gpus: float | None, keeping: Keeping
) -> None:
    from equipoise.launch.cluster import Share, connect, room
    from equipoise.launch.ray_train import train

    with connect(None):
        share = Share.here(cpus, gpus)
        room(share, run.workers)
        train(record.folder.absolute(), run, Place.at(store).url, share, keeping=keeping)


def report(
    folder: Annotated[Path | None, Positional[Path | None]] = None,
    /,
    results: Path = Path("results"),
    images: bool = True,
) -> None:
    """Write a study's report.html anew.

    Args:
        folder: the study's folder; the latest one by default.
        results: where studies are kept.
        images: whether it shows panels, which are slices of the cohort. A study's end writes them in again.
    """
    from equipoise.launch.importance import importance
    from equipoise.report import write_report

    found = StudyFolder.open(folder) if folder else latest_study(results)
    write_report(found, importance, images=images)
    Console().print(found.report, soft_wrap=True)


def dashboard(
    folder: Annotated[Path | None, Positional[Path | None]] = None,
    /,
    results: Path = Path("results"),
    host: str = "127.0.0.1",
    port: int = 8080,
    until_stdin_closes: bool = False,
) -> None:
    """Show a study in the browser: points, verdicts, importance.

    Args:
        folder: the study's folder; the latest one by default.
        results: where studies are kept.
        host: address to listen on; by default only this machine sees it.
        port: port to listen on.
        until_stdin_closes: end when whoever started this does.
    """
    from equipoise.launch.dashboard import serve

    found = StudyFolder.open(folder) if folder else latest_study(results)
    serve(found, host=host, port=port, until_stdin_closes=until_stdin_closes)


def diagnose(
    path: Positional[Path],
    /,
    run: str | None = None,
    steps: int | None = None,
    upto: int | None = None,
    picture: Path | None = None,
    term: tuple[str, ...] = (),
) -> None:
    """Judge runs after the fact, whoever trained them: what diverged, when it began, when it was certain.

    Args:
        path: a run's or a study's folder; or somebody's losses: a CSV table, TensorBoard's event files or a folder of
            them, CycleGAN's loss_log.txt.
        run: the one run to judge, where there are several.
        steps: the planned length of runs of which only curves are known; by default they are taken to have ended.
        upto: the step after which everything is cut away before it is judged.
        picture: a PNG file to draw the curves into, with onset and alarm.
        term: what signals mean, where their names do not say it, such as loss/cycle_t=my/tag.
    """
    from equipoise.curve_picture import check, draw
    from equipoise.diagnose import diagnoses

    if picture is not None:
        check(picture)
    for line in term:
        if not all(line.partition("=")):
            raise InputError(
                "--term", found=line, rule="a term is our name = a tag", remedy="write --term loss/cycle_t=my/tag"
            )
    found = diagnoses(path, run=run, steps=steps, upto=upto, terms=dict(line.split("=", 1) for line in term))
    console = Console()
    brief = found.ours and len(found.runs) > 1
    for diagnosis in found.runs:
        for line in list(diagnosis.lines())[: 1 if brief else None]:
            say(console, line)
    for line in found.passed_over:
        say(console, line)
    if picture is not None:
        draw(found.runs, picture)


def doctor() -> None:
    """Say what is installed, what this machine can do, which W&B mode there is, and what mends what is missing."""
    console = Console()
    console.print(f"Python {platform.python_version()}, torch {torch.__version__}")
    for package in ("ray", "optuna", "optuna-dashboard", "wandb", "zarr", "SimpleITK"):
        try:
            console.print(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            console.print(f"{package} is missing: pip install -e . -c constraints.txt", style="yellow")
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    console.print("GPUs: " + (", ".join(cards) or "none; networks train on the CPU, at a reduced size"))
    for setting, value in (("precision", "bfloat16"), ("precision", "tf32"), ("compile", True), ("graphs", True)):
        console.print(
            f"--speed.{setting}{'' if value is True else f' {value}'}: {_can(setting, value)}", soft_wrap=True
        )
    console.print(wandb_mode(None)[1], highlight=False)


def _can(setting: str, value: bool | str) -> str:
    """Whether the device that runs here train on serves a setting of `speed`, and why not."""
    from equipoise.launch.local import device_here

    try:
        speed.check(PUBLISHED.at(f"speed.{setting}", value), device_here())
    except InputError as error:
        return f"no; {error.rule}"
    return "yes"


def sync(folder: Annotated[Path | None, Positional[Path | None]] = None, /, results: Path = Path("results")) -> None:
    """Upload to W&B what it does not have yet of a study's runs, or of one run; it may be asked again at any time.

    A study gets its view there, too, as by `equipoise workspace`, when runs of it are uploaded.

    Args:
        folder: the study's folder, or that of a run of `equipoise train`; the latest study by default.
        results: where studies are kept.
    """
    where = folder or latest_study(results).folder
    if any(session.alive for session in sessions(where)):
        raise InputError(
            where,
            found="a study at work",
            rule="a run is uploaded when nobody writes it",
            remedy="wait for its end; with --wandb online runs are uploaded while they train",
        )
    if (where / "config.json").is_file():  # a run of its own
        with Record(where).locked(0):
            pass
    if not (where / "wandb").is_dir():
        raise InputError(
            where,
            found="no W&B runs",
            rule="runs are written for W&B unless it is disabled",
            remedy="give the folder of a study, or of a run",
        )
    console = wide_console()
    done = upload(
        where / "wandb", lambda name, whole: console.print(f"{name}: {'uploaded' if whole else 'not in full'}")
    )
    console.print(f"{done.now} runs uploaded now, {done.before} had been before, {done.left} are left", highlight=False)
    if done.left:
        sys.exit(1)
    if done.now and (where / "study.json").is_file():
        console.print(f"view: {create(StudyFolder.open(where).study)}", markup=False, highlight=False, soft_wrap=True)


COMMANDS = {
    c.__name__: later(c)
    for c in (
        *(prepare, store, phantom, train, study, report, dashboard, sync, workspace, diagnose),
        *(predict, translate, evaluate, export, doctor),
    )
}
Settings = TypeVar("Settings")


def _preset(presets: Mapping[str, Settings], usual: str) -> Settings:
    """The settings of --preset, which must be known before the other options are read: they depart from it."""
    return presets.get(_typed("--preset") or usual, presets[usual])  # an unknown one is refused with the others


def _typed(flag: str) -> str | None:
    """What the command line says after a flag; None without it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(flag, dest="value", nargs="?")
    value: str | None = first.parse_known_args()[0].value
    return value


def main() -> None:
    """Run a command; a user's mistake is told without a traceback, and exits with 2."""
    try:
        work = _read()
    except ValueError as error:  # settings that break a rule
        _refuse(error)
    try:
        work()
    except InputError as error:
        _refuse(error)
    except KeyboardInterrupt:
        sys.exit(130)


def _read() -> Work:
    """What the command line asks for."""
    commands = COMMANDS | {
        "prepare": partial(COMMANDS["prepare"], preprocessing=_preset(PRESETS, "recommended")),
        "train": partial(COMMANDS["train"], run=_preset(RUNS, "published")),
    }
    name, *words = sys.argv[1:] or [""]
    work: Work
    if name in commands:  # tyro's errors name settings better, and come sooner, where it is told of one command alone
        work = tyro.cli(commands[name], prog=f"equipoise {name}", args=words)
    else:
        about = "Studies of SIFA's stability."
        work = tyro.extras.subcommand_cli_from_dict(commands, prog="equipoise", description=about)
    return work


def _refuse(error: ValueError) -> NoReturn:
    Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
