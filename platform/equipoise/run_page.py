"""One run as a page: how it ended or how it goes, its curves, what pulls at its networks, its panels, its settings.

Knows one run and what a person asks of it; knows nothing of the rest of its study, of Optuna or of servers.
"""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from equipoise import curves
from equipoise.figures import LOOKS, Figure, Run, words
from equipoise.page import drawn, number, page, section, table
from equipoise.record import Record
from equipoise.study import Study


def run_page(record: Record, study: Study) -> str:
    """The page's HTML, of a run that goes on or has ended.

    Raises:
        InputError: the run's settings cannot be read.
    """
    run = Run.read(record)
    parts = (_head(run, study), _curves(run), _pictures(record), _settings(run, study))
    colours = {kind: look.colour for kind, look in LOOKS.items()}
    return page(f"{run.name}: a run of {study.name}", "\n".join(parts), colours)


def _head(run: Run, study: Study) -> str:
    done = f"at step {run.steps:,} of {run.config.steps:,}"
    sentence = run.verdict.sentence() if run.verdict else f"without a verdict, {done}"
    onset = run.verdict.onset if run.verdict else None
    stability = run.last("divergence/stability") if run.stability is None else run.stability
    facts = [
        (study.objective.replace("_", " "), [number(run.last(f"quality/{study.objective}"))]),
        ("S" if run.verdict else "S so far", [number(stability)]),
        ("onset", ["–" if onset is None else f"step {onset:,}"]),
        ("training", [f"{run.device_seconds:,.0f} device-seconds"]),
    ]
    label = study.names().get(run.config)
    return f"""<header>
<p class="kind-of-page">A run of Equipoise study <b>{escape(study.name)}</b></p>
<h1>{escape(run.name)}{f": {escape(label)}" if label else ""}</h1>
<p class="lead"><span class="verdict {run.kind}">{words(run.kind)}</span></p>
<p class="lead">{escape(sentence)}</p>
{table(("", ""), facts)}
</header>"""


def _curves(run: Run) -> str:
    if not len(run.rows):
        return section("Curves", "", "<p>No step has been recorded yet.</p>")
    figures: list[tuple[str, str, Figure | None]] = [
        ("Losses", "Block means. A diamond is where the run began to fail.", curves.losses([run], None)),
        (
            "Critics",
            "How well each critic tells real from fake patches (AUC); 0.5 is a guess.",
            curves.critics([run], None),
        ),
        ("Balance", "Each term's share in moving each network.", curves.pulls(run)),
    ]
    return "\n".join(section(title, note, drawn(figure)) for title, note, figure in figures if figure is not None)


def _pictures(record: Record) -> str:
    """The last panels; those before lie beside them."""
    pictures = record.pictures()
    if not pictures:
        return ""
    return section("Panels", f"Drawn at {len(pictures)} evaluations; here the last.", _picture(pictures[-1]))


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    step = int(path.stem.removeprefix("step-"))
    return f'<figure><img alt="panels" src="data:image/png;base64,{data}"><figcaption>step {step}</figcaption></figure>'


def _settings(run: Run, study: Study) -> str:
    base, own = study.run.flat(), run.config.flat()
    lines = [(path, [escape(str(own[path])), escape(str(base[path]))]) for path in own if own[path] != base[path]]
    return section(
        "Settings",
        "Where the run departs from the study's base run.",
        table(("setting", "this run", "base run"), lines),
    )
