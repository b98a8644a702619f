"""Who watches a study: the terminal, W&B, TensorBoard, the dashboard; as its options ask.

Knows what is told to each of them at a study's beginning and end, and which trackers follow it meanwhile; knows nothing
of how a study is done.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from equipoise.account import Account
from equipoise.figures import words
from equipoise.json_lines import JsonTracker
from equipoise.launch.cluster import Share
from equipoise.launch.ledger import Ledger
from equipoise.launch.options import Options
from equipoise.monitor import Verdict
from equipoise.record import Record, Row
from equipoise.study import Study, StudyFolder
from equipoise.table import TableTracker, wide_console
from equipoise.tensorboard import TensorBoardTracker
from equipoise.tracking import Tracker, tell
from equipoise.wandb_run import wandb_mode
from equipoise.wandb_tracker import WandbTracker
from slicestore.errors import InputError

HOST = "127.0.0.1"
"""Where a dashboard listens that a study starts."""


class Audience:
    """All that a study is shown to."""

    def __init__(self, options: Options) -> None:
        """Find out who that is; nothing is started yet.

        Raises:
            InputError: the dashboard's port is taken.
        """
        self._options = options
        self.console = wide_console(quiet=options.quiet or options.json)
        """For people; it swallows everything under --quiet and --json."""
        self._json = JsonTracker(sys.stdout) if options.json else None
        self._mode, self._notice = wandb_mode(options.wandb)
        self._wandb: WandbTracker | None = None
        if options.dashboard:
            check_port(options.dashboard_port)

    def begins(self, folder: StudyFolder, study: Study) -> None:
        """Say what is about to be done."""
        self.console.print(f"{study.name}: {study.question}", highlight=False)
        self.console.print(f"{study.points} points of {study.run.steps} steps into {folder.folder}", soft_wrap=True)
        self.console.print(self._notice, highlight=False)
        if self._options.dashboard:
            self.console.print(f"dashboard: http://{HOST}:{self._options.dashboard_port}, once a run has begun")
        if self._json:
            about = {"question": study.question, "points": study.points, "steps": study.run.steps}
            self._json.say("study", study=study.name, folder=str(folder.folder), **about)

    def trackers(self, folder: StudyFolder, study: Study, share: Share) -> Sequence[Tracker]:
        """Those who follow the runs."""
        options, names = self._options, study.names()
        made: list[Tracker] = [self._json or TableTracker(self.console, study.objective, names)]
        if self._mode != "disabled":
            self._wandb = WandbTracker(
                folder.wandb,
                group=study.name,
                prefix=folder.id,
                mode=self._mode,
                images=options.wandb_images or options.store is None,
                objective=study.objective,
                gpus=share.gpus,
                names=names,
                model=options.wandb_model,
            )
            made.append(self._wandb)
        if options.tensorboard:
            made.append(TensorBoardTracker(folder.folder / "tensorboard"))
        if options.dashboard:
            made.append(_DashboardTracker(folder, options.dashboard_port))
        return made

    def concludes(self, folder: StudyFolder, ledger: Ledger) -> None:
        """Tell W&B of the study as a whole, while its trackers are still at work."""
        if self._wandb is not None:
            tell(self._wandb.conclude, folder, ledger.best())

    def leaves(self, line: str) -> None:
        """Say why the study ends here without being finished."""
        self.console.print(line)
        if self._json:
            self._json.say("left", why=line)

    def ends(self, folder: StudyFolder, ledger: Ledger, seconds: float) -> None:
        """Say what it came to."""
        account = Account.of(folder.records())
        if self._json:
            self._json.say(
                "finished",
                verdicts=dict(account.verdicts),
                best=ledger.best(),
                points_failed=ledger.failed,
                steps=account.steps,
                steps_saved=account.steps_saved,
                device_seconds=account.seconds,
                device_seconds_saved=account.seconds_saved,
                seconds=seconds,
                report=str(folder.report),
            )
        elif self._options.quiet:
            print(folder.report)
        _say(self.console, folder, ledger, account, seconds)


def _say(console: Console, folder: StudyFolder, ledger: Ledger, account: Account, seconds: float) -> None:
    console.print(", ".join(f"{count} {words(kind)}" for kind, count in sorted(account.verdicts.items())))
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


def check_port(port: int) -> None:
    """Refuse a port at which nothing can be served.

    Raises:
        InputError: another program has it, or there is no such port.
    """
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((HOST, port))
            tried.listen()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--dashboard-port {port}",
            found=f"a port that cannot be had ({error})",
            rule="the dashboard listens there",
            remedy="give another one, or end the program that has it",
        ) from error


class _DashboardTracker:
    """Serves the dashboard, in a process of its own, from the first block to the study's end."""

    def __init__(self, folder: StudyFolder, port: int) -> None:
        self._line = [sys.executable, "-m", "equipoise.cli", "dashboard", str(folder.folder), "--port", str(port)]
        self._line.append("--until-stdin-closes")
        self._process: subprocess.Popen[bytes] | None = None

    def rows(self, record: Record, rows: Sequence[Row]) -> None:
        """Start it: now there is something to see."""
        if self._process is None:
            null = subprocess.DEVNULL
            self._process = subprocess.Popen(
                self._line, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True
            )

    def ended(self, record: Record, verdict: Verdict) -> None:
        """The dashboard looks for itself."""

    def close(self) -> None:
        """End it; it would end with this process too."""
        if self._process is not None:
            self._process.terminate()
            with self._process:
                self._process.wait(10)
            self._process = None
