"""A run judged after the fact: ours from its record, anybody's from curves.

Knows which rules judge what was recorded, and how that is told in words; knows nothing of terminals or pictures, and
writes nothing.

A run of ours is judged as it was while it trained: by its own settings, block by block, also while it still trains. Of
other runs only curves are known: they are brought to our names (`curve_names`) and replayed by the default rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equipoise.config import MonitorConfig, RunConfig
from equipoise.curve_files import Curve, Curves, read
from equipoise.curve_names import check, named
from equipoise.horizon import Horizon
from equipoise.monitor import Monitor, counted, watched
from equipoise.record import Record, Row
from equipoise.replay import replay
from equipoise.schedules import idle_steps
from equipoise.study import StudyFolder
from equipoise.verdict import Finding, Verdict, count, number
from slicestore.errors import InputError

MOST_TAGS = 40
"""Tags that are named before they are only counted."""


@dataclass(frozen=True, slots=True, eq=False)
class Diagnosis:
    """What is known of one run."""

    run: str
    verdict: Verdict
    horizon: Horizon
    """The lengths of the rules it was judged by."""
    curves: Mapping[str, Curve]
    """By our names."""
    judged: Mapping[str, Sequence[str]]
    """The curves that rules judge, each with the tags it was made of."""
    seen: Mapping[str, Sequence[str]]
    """Curves whose meaning is known, but of which only values that are not finite count."""
    left: Sequence[str] = ()
    """Tags that nothing was made of."""
    notes: Sequence[str] = ()

    def lines(self) -> Iterator[str]:
        """What is told: the verdict, its findings, what it rests on, and what was left aside."""
        yield f"{self.run}: {self.verdict.sentence()}"
        yield from (f"  {_told(finding)}" for finding in self.verdict.findings)
        if self.verdict.stability is not None:
            yield f"  stability S {number(self.verdict.stability)}"
        block, warm_up, hold = (count(n * self.horizon.block) for n in (1, self.horizon.warm_up, self.horizon.hold))
        yield f"  judged in blocks of {block} steps, after a warm-up of {warm_up}; a rule must hold for {hold}"
        yield f"  judged: {_list(self.judged)}"
        if self.seen:
            yield f"  only held to be finite: {_list(self.seen)}"
        if self.left:
            more = f" and {len(self.left) - MOST_TAGS} more" if len(self.left) > MOST_TAGS else ""
            yield f"  not judged: {', '.join(self.left[:MOST_TAGS])}{more}"
        yield from (f"  note: {note}" for note in self.notes)


def _told(finding: Finding) -> str:
    """A finding's place in time, and its numbers."""
    when = f"step {count(finding.onset)}"
    if finding.alarm > finding.onset:
        when = f"onset at step {count(finding.onset)}, certain at step {count(finding.alarm)}"
    passed = "" if finding.until is None else f", passed at step {count(finding.until)}"
    name = finding.kind.replace("_", " ").replace("d wins", "win of a critic").replace("non finite", "not finite")
    return f"{name}, {finding.signal}: {when}{passed}; then {number(finding.value)}, limit {number(finding.limit)}"


def _list(made_of: Mapping[str, Sequence[str]]) -> str:
    """Our names, each with the tags it was made of where they differ."""
    return ", ".join(name if tags == (name,) else f"{name} ({' + '.join(tags)})" for name, tags in made_of.items())


@dataclass(frozen=True, slots=True)
class Diagnoses:
    """What is known of all runs in a file or folder."""

    runs: Sequence[Diagnosis]
    passed_over: Sequence[str]
    """Sentences on runs in which there is nothing to judge."""
    ours: bool
    """Whether they are runs of Equipoise."""


def diagnoses(
    path: Path,
    *,
    run: str | None = None,
    steps: int | None = None,
    upto: int | None = None,
    terms: Mapping[str, str] | None = None,
) -> Diagnoses:
    """Judge what is in a run's folder, a study's, or files of curves.

    Args:
        path: see `curve_files` for what may be there.
        run: the one run to judge, by its name.
        steps: the planned length of the runs, which only curves lack; by default they are taken to be whole.
        upto: the step after which everything is cut away.
        terms: tags of the curves by our names, before any guess.

    Raises:
        InputError: nothing there can be read or judged, or an option that cannot take effect.
    """
    check(terms or {})
    for name, value in (("steps", steps), ("upto", upto)):
        if value is not None and value < 1:
            raise InputError(f"--{name}", found=value, rule="a run has steps", remedy="give at least 1")
    records = ours(path)
    if records is not None:
        for option, unused in (("--steps", steps is None), ("--term", not terms)):
            if not unused:
                raise InputError(
                    option,
                    found=f"a run of Equipoise, {path}",
                    rule="its config.json says it",
                    remedy="leave the option out",
                )
        of = {record.name: record for record in records}
        made = {name: of_record(of[name], upto=upto) for name in _chosen(path, of, run)}
    else:
        curves = {found.run: found for found in read(path)}
        made = {
            name: of_curves(curves[name], steps=steps, upto=upto, terms=terms) for name in _chosen(path, curves, run)
        }
    runs = [found for found in made.values() if isinstance(found, Diagnosis)]
    passed_over = [f"{name}: {why}" for name, why in made.items() if isinstance(why, str)]
    if not runs:
        raise InputError(
            path,
            found="; ".join(passed_over),
            rule="a verdict rests on a cycle, segmentation or generator loss, or on a critic's AUC",
            remedy="wait for a first block, or name a signal with --term loss/cycle_t=TAG",
        )
    return Diagnoses(runs, passed_over, records is not None)


def ours(path: Path) -> list[Record] | None:
    """The records in a run's or a study's folder; None if it is neither."""
    if (path / "config.json").is_file() and (path / "signals.jsonl").is_file():
        return [Record(path)]
    if not (path / "study.json").is_file():
        return None
    return [Record(file.parent) for file in sorted(StudyFolder.open(path).runs.glob("*/config.json"))]


def _chosen(path: Path, runs: Mapping[str, object], name: str | None) -> list[str]:
    if name is None:
        return list(runs)
    if name not in runs:
        raise InputError(
            path,
            found=f"no run {name}",
            rule=f"its runs are {', '.join(runs) or 'none'}",
            remedy="give one of them to --run",
        )
    return [name]


# --- runs of ours -----------------------------------------------------------------------------------------------------


def of_record(record: Record, *, upto: int | None = None) -> Diagnosis | str:
    """Judge a run of ours as far as it has come; why not, where nothing is recorded yet."""
    config, live = record.config, record.verdict
    rows = [row for row in record.rows() if upto is None or row["step"] <= upto]
    if not rows:
        return "no block of signals yet"
    idle, notes = _idle(config)
    monitor = Monitor(config.monitor, config.steps, watched(config), counted(config), idle)
    past = [back.divergence for back in record.returns]
    monitor.past = tuple(finding for finding in past if upto is None or finding.alarm <= upto)
    for row in rows:
        _observe(monitor, row)
    verdict = monitor.verdict(int(rows[-1]["step"]))
    if live is None and verdict.kind == "censored":
        notes.append("it has no verdict of its own yet: it still trains, or was stopped")
    if live is not None and upto is None and live.kind != verdict.kind:
        notes.append(f"while it trained it was found to be {live.sentence()}")
    rules = [*watched(config), *(f"auc/{critic}" for critic in counted(config))]
    known = list(dict.fromkeys(name for row in rows for name in row if name not in _NO_SIGNALS))
    judged = [name for name in known if name in rules or name.startswith(_RULED)]
    return Diagnosis(
        run=record.name,
        verdict=verdict,
        horizon=monitor.horizon,
        curves={name: _curve(rows, name) for name in known},
        judged={name: (name,) for name in judged},
        seen={name: (name,) for name in known if name not in judged and not name.startswith(_NEVER)},
        notes=notes,
    )


_NO_SIGNALS = ("step", "divergence/stability", "time/block", "time/workers")
_RULED = ("saturation/", "probe/")
_NEVER = ("quality/", "validator/", "balance/")


def _observe(monitor: Monitor, row: Row) -> None:
    """Show a block as the run did; its means stand for its steps."""
    step = int(row["step"])
    never = (*_NEVER, "probe/")
    signals = {name: value for name, value in row.items() if name not in _NO_SIGNALS and not name.startswith(never)}
    monitor.observe(step, list(signals), np.array([[*signals.values()]]))
    probe = {name: value for name, value in row.items() if name.startswith("probe/")}
    if probe:
        monitor.look(step, probe)


def _curve(rows: Sequence[Row], name: str) -> Curve:
    held = [row for row in rows if name in row]
    return np.array([row["step"] for row in held], np.int64), np.array([row[name] for row in held])


def _idle(config: RunConfig) -> tuple[dict[str, int], list[str]]:
    """Steps in which nobody plays against the critics of predictions."""
    epoch, notes = config.optim.epoch_steps, []
    if config.loss.adv_p_from_epoch and not epoch:
        notes.append("auc/p and auc/p_low are not judged: how many steps an epoch had is not recorded")
        return dict.fromkeys(("p", "p_low"), config.steps), notes
    return dict.fromkeys(("p", "p_low"), idle_steps(config, epoch)), notes


# --- anybody's curves -------------------------------------------------------------------------------------------------


def of_curves(
    run: Curves, *, steps: int | None = None, upto: int | None = None, terms: Mapping[str, str] | None = None
) -> Diagnosis | str:
    """Judge curves by the default rules; why not, where none of them is a term of a verdict.

    Raises:
        InputError: as `curve_names.named`; curves that go on beyond `steps`.
    """
    cut = run if upto is None else run.upto(upto)
    found = named(cut, terms or {})
    nothing = "nothing to judge" + (f" up to step {upto}" if upto is not None else "")
    nothing += f" in {', '.join(cut.signals)}" if cut.signals else "".join(f"; {note}" for note in run.notes)
    if not found.curves:
        return nothing
    last = max(int(at[-1]) for at, _ in found.curves.values())
    if steps is not None and steps < last:
        raise InputError(
            f"--steps {steps}",
            found=f"curves of {run.run} up to step {last}",
            rule="a run is planned to do what it did, or more",
            remedy=f"give at least {last}, or cut it with --upto",
        )
    replayed = replay(found.curves, steps, MonitorConfig())
    saturated = [name for name in found.curves if name.startswith("saturation/")]
    judged = {name: found.made_of[name] for name in (*replayed.watched, *replayed.critics, *saturated)}
    if not judged and not replayed.verdict.findings:
        return nothing
    return Diagnosis(
        run=run.run,
        verdict=replayed.verdict,
        horizon=replayed.horizon,
        curves=found.curves,
        judged=judged,
        seen={name: tags for name, tags in found.made_of.items() if name not in judged},
        left=found.left,
        notes=[*run.notes, *_ended(found.curves, judged, replayed.horizon), *_not_finite(cut, found.left)],
    )


def _ended(curves: Mapping[str, Curve], judged: Mapping[str, Sequence[str]], horizon: Horizon) -> Iterator[str]:
    """Which losses stop before others do: programs that leave cells empty for NaN hide it in that way."""
    last = max(int(steps[-1]) for steps, _ in curves.values())
    for name in judged:
        end = int(curves[name][0][-1])
        if end < last - horizon.hold * horizon.block:
            yield f"{name} has no value after step {count(end)}, where others go on to {count(last)}"


def _not_finite(run: Curves, tags: Sequence[str]) -> Iterator[str]:
    """What is wrong in signals that no rule knows."""
    for tag in tags:
        steps, values = run.signals[tag]
        bad = ~np.isfinite(values)
        if bad.any():
            yield f"{tag}, which is not judged, is {values[bad][0]} at step {steps[bad][0]}"
