"""A study as one file: what was asked, how every run ended, what it cost, how to do it again.

Knows records and what a person wants to read of them; knows nothing of Optuna, Ray or W&B. The file opens from disk, in
ten years, without a network, and says nothing of the machine, the user or folders. Numbers are told as they were
recorded; one that is not finite is named, never replaced.
"""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from equipoise import curves, figures, search, seeds
from equipoise.account import Account, accounts
from equipoise.config_base import Leaf
from equipoise.figures import LOOKS, Run, words
from equipoise.page import NOTHING, drawn, folded, key, number, page, section, table
from equipoise.record import Record
from equipoise.search import Choice, Dimension, Fixed, Space, called, cases
from equipoise.seeds import Ended
from equipoise.selection_page import Tested, selection_section
from equipoise.sessions import sessions
from equipoise.study import TESTED, Study, StudyFolder
from equipoise.writing import write

_VERDICTS = """<p class="note"><b>stable</b>: lived to its last step, and no critic won. <b>blurry</b>: so too, but its
translations have lost the sharpness of real images. <b>d wins</b>: lived, but a critic told all real patches from all
fake ones for long. <b>recovered</b>: diverged, went back and lived with a remedy; it is never feasible.
<b>collapsed</b>: at its end its translations were all alike, or its masks next to empty or full. <b>saturated</b>: its
translations went to the ends of their range. <b>diverged</b>: a loss left its plateau for good, or was not finite. The
onset is the step at which that began. <b>censored</b>: stopped because its Dice × S fell behind, so that its S at full
length is not known. <b>unfinished</b>: without a verdict.</p>"""
_PANELS = (
    "From top to bottom: x_s source, y_s its mask; x_st translated to the target's looks, mask_st predicted on it; "
    "x_sts back again; x_t target, mask_t predicted on it; x_ts translated to the source's looks; x_tst back again. "
    "Pixels that are not finite are magenta."
)
_COST = (
    "Time is the wall time of training steps, times workers and the GPUs that each has, if any. Saved is what stopping "
    "early spared, at each run's own pace: at the alarm of runs that failed, and by the pruner of those whose Dice × S "
    "fell behind. Lost is what no checkpoint held when a process or machine failed, so that it was done again. A "
    "confirmation is counted too."
)


TALL = 40
"""Runs beyond which their table scrolls by itself."""
Importance = Callable[[Sequence[Run], Space, Callable[[Run], float | None]], Mapping[str, float] | None]
"""How much each searched setting has to do with a run's value; None where that cannot be told."""


def write_report(folder: StudyFolder, importance: Importance | None = None, *, images: bool = True) -> Path:
    """Write the report, whole or not at all; returns where it lies.

    Args:
        folder: the study.
        importance: `launch.importance`, which needs Optuna; without it the report leaves that out.
        images: whether it shows the panels of the best point and of its confirmation.

    Raises:
        InputError: a run's settings or the test scores cannot be read, or the disk refuses the report.
    """
    study, records = folder.study, folder.records()
    runs = [Run.read(record) for record in records]
    best = best_point(runs, study)
    whole, costs = accounts(records, sessions(folder.folder))
    parts = (
        _summary(study, runs, best, whole),
        _table(study, runs, best),
        _figures(study, runs, best),
        _importance(study, runs, importance),
        selection_section(runs, study, best, Tested.read(folder.folder / TESTED)),
        _balance(runs, best),
        _cost(whole, costs),
        _pictures(folder, runs, best) if images else "",
        _settings(study),
        _environment(records),
        _again(folder, study),
    )
    colours = {kind: look.colour for kind, look in LOOKS.items()}
    write(folder.report, page(f"{study.name}: a study by Equipoise", "\n".join(parts), colours))
    return folder.report


def by_point(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs of each point, a seed each, by their seeds; confirmations are of none."""
    points: dict[str, list[Run]] = {}
    for run in sorted((run for run in runs if not run.confirms), key=lambda run: run.config.seed):
        points.setdefault(run.name.partition("-")[0], []).append(run)
    return [points[number] for number in sorted(points)]


def judgement(point: Sequence[Run], study: Study) -> Ended | None:
    """The verdict on a point of these runs, and its Dice, joined over seeds; NaN where that could not be measured.

    None of a point that a pruner stopped, and while a run goes on or another seed is wanted.
    """
    ended = [(run.verdict, _last_dice(run, study)) for run in point if run.verdict and run.kind != "censored"]
    if len(ended) < len(point) or seeds.undecided(ended, study.seeds, study.feasible, study.over_seeds):
        return None
    return seeds.joined(ended, study.over_seeds) if study.seeds > 1 else ended[0]


def best_point(runs: Iterable[Run], study: Study) -> Run | None:
    """The point that is confirmed, by the run of its first seed: the feasible one of the highest Dice.

    Without a feasible point it is the one of the highest Dice x S. One that a pruner stopped is none of them.
    """
    scored = [
        (search.rank(*told, study.feasible), point[0])
        for point in by_point(runs)
        if (told := judgement(point, study)) is not None
    ]
    return max(scored, key=lambda one: one[0], default=(None, None))[1]


def ended(point: Sequence[Run], study: Study) -> bool:
    """Whether nothing of a point is left to run: a pruner stopped it, or there is a judgement."""
    stopped = any(run.kind == "censored" for run in point) and all(run.verdict for run in point)
    return stopped or judgement(point, study) is not None


def _last_dice(run: Run, study: Study) -> float:
    return run.rows[-1].get(f"quality/{study.objective}", math.nan) if run.rows else math.nan


def _summary(study: Study, runs: Sequence[Run], best: Run | None, whole: Account) -> str:
    points = by_point(runs)
    counts = Counter(run.kind for point in points for run in point)
    of = f"points of {study.seeds} seeds" if study.seeds > 1 else "points"
    told = [f"{sum(ended(point, study) for point in points)} of {max(study.points, len(points))} {of} have ended"]
    told[0] += f": {', '.join(f'{counts[k]} {words(k)}' for k in LOOKS if counts[k])}." if points else "."
    if best is not None:
        told.append(_best(next(point for point in points if best in point), study))
    for run in runs:
        if run.confirms:
            told.append(
                f"Repeated with seed {run.config.seed} over {run.config.workers} workers, it "
                + (f"ended {words(run.kind)}" if run.verdict else "has not ended")
                + f": {called(study.objective)} {_dice(run, study)}, S {number(run.stability)}."
            )
    unit = whole.unit
    budget = (
        f"Budget: {study.points:,} points of {study.run.steps:,} steps"
        + (f", {study.seeds} seeds each" if study.seeds > 1 else "")
        + f". Trained so far: {unit.said(whole.seconds)} {unit.name}; saved by stopping early: "
        f"{unit.said(whole.seconds_saved)}."
    )
    bar = "".join(
        f'<span class="{k}" style="flex-grow:{counts[k]}">{counts[k]} {words(k)}</span>' for k in LOOKS if counts[k]
    )
    return f"""<header>
<p class="kind-of-page">Equipoise study <b>{escape(study.name)}</b></p>
<h1>{escape(study.question)}</h1>
<div class="bar" role="img" aria-label="points by verdict">{bar}</div>
<p class="lead">{" ".join(told)}</p>
<p class="note">{budget}</p>
</header>"""


def _best(point: Sequence[Run], study: Study) -> str:
    judged = judgement(point, study)
    assert judged is not None
    verdict, dice = judged
    over = f" over {len(point)} seeds" if study.seeds > 1 else ""
    reached = (verdict.stability or 0.0) >= study.feasible
    told = f"{called(study.objective)} {number(dice)}, S {number(verdict.stability)}{over}"
    return f"Best point: <b>{escape(point[0].name)}</b>, {told}" + (
        "." if reached else f"; no point reached S ≥ {study.feasible:g}."
    )


def _table(study: Study, runs: Sequence[Run], best: Run | None) -> str:
    qualities = [f"quality/{study.objective}"]
    qualities += [
        s
        for s in ("quality/translated_dice", "quality/target_dice", "quality/composite")
        if s not in qualities and any(run.last(s) is not None for run in runs)
    ]
    heads = ["run", "verdict", *(s.removeprefix("quality/") for s in qualities), "S", "onset", "steps", "device s"]
    paths, names = _varied(study, runs), study.names()
    head = "".join(f"<th><button>{_head(h)}</button></th>" for h in (*heads, *paths))
    lines = "".join(
        _line(run, qualities, paths, (names.get(run.config), "best point" if run is best else None)) for run in runs
    )
    shape = "wide tall" if len(runs) > TALL else "wide"
    return section(
        "Runs",
        f"{study.run.steps:,} steps are planned. S in brackets is S so far. A heading sorts; a run's name shows that "
        "run alone in the curves below.",
        f'<div class="{shape}"><table class="runs"><thead><tr>{head}</tr></thead>{lines}</table></div>{_VERDICTS}',
    )


def _varied(study: Study, runs: Sequence[Run]) -> list[str]:
    """Settings that are searched, implied or given, as far as runs differ in them."""
    paths = dict.fromkeys([*study.space, *(path for point in study.first for path in point)])
    leaves = [run.config.flat() for run in runs]
    return [path for path in paths if len(runs) < 2 or len({one[path] for one in leaves}) > 1]


def _line(run: Run, qualities: Sequence[str], paths: Sequence[str], roles: Sequence[str | None]) -> str:
    """A run's row, and below it what its verdict found."""
    leaves = run.config.flat()
    stability, shown = run.stability, number(run.stability)
    if stability is None and (stability := run.last("divergence/stability")) is not None:
        shown = f'<span class="soft">({number(stability)})</span>'
    onset = run.verdict.onset if run.verdict else None
    sentence = run.verdict.sentence() if run.verdict else "no verdict: it is running, or was cut off"
    told = escape(", ".join(role for role in (*roles, "confirmation" if run.confirms else None) if role))
    cells: list[tuple[str, object]] = [
        (f'<button class="run">{escape(run.name)}</button><small>{told}</small>', run.name),
        (
            f'<span class="verdict {run.kind}" title="{escape(sentence)}">{words(run.kind)}</span>',
            list(LOOKS).index(run.kind),
        ),
        *((number(run.last(signal)), run.last(signal)) for signal in qualities),
        (shown, stability),
        (NOTHING if onset is None else f"{onset:,}", onset),
        (f"{run.steps:,}", run.steps),
        (f"{run.device_seconds:,.0f}", run.device_seconds),
        *((escape(_leaf(leaves[path])), leaves[path]) for path in paths),
    ]
    row = "".join(f'<td data-v="{escape(key(value))}">{shown}</td>' for shown, value in cells)
    found = ""
    if run.verdict is None or run.verdict.findings:
        found = f'<tr class="sentence"><td></td><td colspan="{len(cells) - 1}">{escape(sentence)}</td></tr>'
    return f'<tbody data-run="{escape(run.name)}"><tr>{row}</tr>{found}</tbody>'


def _figures(study: Study, runs: Sequence[Run], best: Run | None) -> str:
    if not any(run.rows for run in runs):
        return section("Curves", "", "<p>No run has recorded a step yet.</p>")
    survival = figures.survival([run for run in runs if not run.confirms])
    quality = called(study.objective)
    parts = (
        (
            f"{quality.capitalize()} against stability",
            f"Each run's last {quality}, as recorded; hollow where S at full length is not known. The best point is "
            f"the one of the highest {quality} in the feasible region. The dotted line is the Pareto front: no point "
            f"has both a higher {quality} and a higher S than one on it.",
            figures.dice_against_stability(runs, study, best),
        ),
        (
            "Losses",
            "Block means on a logarithmic axis. A diamond is where a run began to fail; a cross at the upper edge is "
            "the first value that is not finite. Where a game's generator loss may be negative, the critic's margin, "
            "E D(real) - E D(fake), stands in for it, on a linear axis.",
            curves.losses(runs, best),
        ),
        (
            "Critics",
            "Share of pairs of patches, one real and one fake, that each critic orders rightly (AUC): 0.5 is a guess; "
            "above the dotted line it wins. A diamond is where a lasting win began.",
            curves.critics(runs, best),
        ),
        (
            "Survival",
            "Share of points that had not begun to fail by a step (Kaplan-Meier), by game: to diverge, saturate or "
            "collapse, whether they recovered or not; a tick is a run that ended without. "
            + (
                "The search chose these points and stopped those whose Dice × S fell behind: the curves describe this "
                "study and do not compare the games at large."
                if study.searches
                else ""
            ),
            survival,
        ),
    )
    return "\n".join(
        section(title, caption, drawn(figure)) if figure else section(title, "", "<p>No point failed.</p>")
        for title, caption, figure in parts
    )


def _importance(study: Study, runs: Sequence[Run], importance: Importance | None) -> str:
    """Bars of what tells good runs from others, by Dice and by S."""
    if importance is None or not study.searches:
        return ""
    points = [run for run in runs if not run.confirms]
    quality = f"quality/{study.objective}"
    found = {
        study.objective.replace("_", " "): importance(points, study.space, lambda run: run.last(quality)),
        "S": importance(points, study.space, lambda run: run.stability),
    }
    told = {name: shares for name, shares in found.items() if shares}
    if not told:
        return section("Importance", "", "<p>Too few runs have ended to tell which settings matter.</p>")
    return section(
        "Importance",
        "How much each searched setting has to do with a run's being among the best tenth (PED-ANOVA; shares add up to "
        "1). The search chose these points: this describes them, and proves no cause.",
        drawn(figures.bars(told)),
    )


def _balance(runs: Sequence[Run], best: Run | None) -> str:
    """How evenly terms pull, over all runs, and in the best one term by term."""
    even = curves.balance(runs, best)
    if even is None:
        return ""
    pulls = curves.pulls(best) if best is not None else None
    return section(
        "Balance",
        "How evenly the terms of the objective pull at each network: the entropy of their gradients' shares, 1 where "
        "all pull alike and 0 where one does it all."
        + (" Below, the shares in the best point, term by term." if pulls else ""),
        drawn(even),
        drawn(pulls) if pulls else "",
    )


def _cost(whole: Account, parts: Mapping[str, Account]) -> str:
    unit, ways = whole.unit, ("saved at the alarm", "saved by the pruner", "lost to failures")
    steps_apart, times_apart = ([f"{what} {way}" for way in ways] for what in ("steps", unit.short))
    heads = ("", "runs", "steps", *steps_apart, unit.name, *times_apart, "restarts")
    lines = []
    for name, of in [*((words(kind), parts[kind]) for kind in LOOKS if kind in parts), ("all", whole)]:
        steps = (of.steps, of.steps_saved_alarm, of.steps_saved_pruner, of.steps_lost)
        times = (of.seconds, of.seconds_saved_alarm, of.seconds_saved_pruner, of.seconds_lost)
        lines.append((name, (f"{of.runs:,}", *(f"{n:,}" for n in steps), *map(unit.said, times), f"{of.restarts:,}")))
    return section(
        "Cost",
        f"{_COST} Stopping at the alarm saved {whole.share_saved_alarm:.1%} of all steps.{_overhead(whole)}",
        f'<div class="wide">{table(heads, lines)}</div>',
    )


def _overhead(whole: Account) -> str:
    if whole.overhead is None or whole.seconds_had is None:
        return ""
    return (
        f" The study's sessions had {whole.unit.said(whole.seconds_had)} {whole.unit.name}; {whole.overhead:.0%} of "
        "them went into no step that counts: starts, loading, evaluations, checkpoints, idle slots, lost work."
    )


def _pictures(folder: StudyFolder, runs: Sequence[Run], best: Run | None) -> str:
    shown = []
    for run in runs:
        if run.picture is not None and (run is best or run.confirms):
            data = base64.b64encode(run.picture.read_bytes()).decode()
            caption = f"{'confirmation' if run.confirms else 'best point'}, step {int(run.picture.stem[5:])}"
            shown.append(
                f'<figure><img alt="panels of {escape(run.name)}" src="data:image/png;base64,{data}">'
                f"<figcaption><b>{escape(run.name)}</b>, {caption}</figcaption></figure>"
            )
    if not shown:
        return ""
    warning = "These are slices of the cohort: share this file as you would share its images, or write it without them"
    own = folder.options.get("store") is not None
    warning = f'<p class="bad"><b>{warning} (equipoise report --no-images).</b></p>' if own else ""
    return section("Images", _PANELS, warning, f'<div class="pictures">{"".join(shown)}</div>')


def _settings(study: Study) -> str:
    lines = [
        (path, (escape(_leaf(leaf)), _searched(study.space[path]) if path in study.space else ""))
        for path, leaf in study.run.flat().items()
    ]
    return section(
        "Settings",
        f"The run that every point departs from, and where the study searched. Objective: {study.objective}; feasible: "
        f"S ≥ {study.feasible:g}; seed of the search: {study.seed}."
        if study.searches
        else "The run that every point departs from. All points were given; nothing was searched.",
        folded(f"All {len(lines)} settings", table(("setting", "base run", "searched"), lines)),
    )


def _searched(dimension: Dimension | Sequence[Dimension]) -> str:
    return "; else ".join(escape(_case(case)) for case in cases(dimension))


def _case(case: Dimension) -> str:
    """Plain text."""
    if isinstance(case, Choice):
        told = ", ".join(_leaf(option) for option in case.options)
    elif isinstance(case, Fixed):
        told = f"always {_leaf(case.value)}"
    else:
        told = f"{case.low:g} to {case.high:g}" + (", logarithmic" if case.log else "")
        told += "" if case.off is None else f", or {case.off:g}"
    held = (f"{path} is {' or '.join(map(_leaf, allowed))}" for path, allowed in case.when.items())
    return told + (f", where {' and '.join(held)}" if case.when else "")


def _environment(records: Sequence[Record]) -> str:
    """What the runs ran on: only the fields that name neither a machine nor a user."""
    found: Counter[str] = Counter()
    for record in records:
        try:
            data: dict[str, Any] = json.loads((record.folder / "environment.json").read_text())
        except (OSError, ValueError):
            found["not recorded"] += 1
            continue
        told = [f"Python {data.get('python')}", *(f"{k} {v}" for k, v in data.get("packages", {}).items())]
        told += [f"device {data.get('device')}", f"{data.get('threads')} threads", f"commit {data.get('commit')}"]
        changes = record.folder / "changes.diff"
        if changes.is_file() and changes.stat().st_size:
            told.append("with changes beyond that commit (changes.diff in the run's folder)")
        found[", ".join(told)] += 1
    items = "".join(f"<li>{n} run{'s' * (n > 1)}: {escape(told)}</li>" for told, n in found.items())
    return section("Environment", "", f"<ul>{items}</ul>") if items else ""


def script(folder: StudyFolder) -> str:
    """Path of the script that declares a study, as it was typed."""
    return next((w for w in shlex.split(folder.command) if w.endswith(".py")), f"studies/{folder.study.name}.py")


def _again(folder: StudyFolder, study: Study) -> str:
    """The command, rebuilt from the options: what was typed may hold paths, these words do not."""
    words = ["python", f"studies/{Path(script(folder)).name}"]
    for name, value in folder.options.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        for word in value if isinstance(value, list) else [value] * (value is not True):
            plain = name != "store" and re.fullmatch(r"[\w.+-]+", str(word))
            words.append(str(word) if plain else name.upper())
    stands_for = "" if folder.options.get("store") is None else ", which is what STORE stands for"
    return section(
        "Do it again",
        "",
        f"<pre>{escape(' '.join(words))}</pre>",
        f'<p class="note">On the store of fingerprint <code>{escape(study.run.data.cohort or "unknown")}</code>'
        f"{stands_for}. Each run's folder holds its config.json, which names every setting.</p>",
    )


def _dice(run: Run, study: Study) -> str:
    return number(run.last(f"quality/{study.objective}"))


def _leaf(value: Leaf) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _head(path: str) -> str:
    group, dot, name = path.rpartition(".")
    words = escape(name).replace("_", "_<wbr>")
    return f"<small>{escape(group)}</small>{words}" if dot else words.replace("_<wbr>", " ")
