"""A person with a browser sees a study: its report from the disk, its dashboard while it is served, each run's page.

Whatever is opened tells the console no error and asks nobody else for anything. With EQUIPOISE_SCREENSHOTS the pictures
of what was seen are left in that folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from replayed_study import GAMES, replayed

from equipoise.batches import Cohort
from equipoise.config import RunConfig
from equipoise.figures import Run
from equipoise.launch.importance import importance
from equipoise.launch.journal import journal
from equipoise.record import Record
from equipoise.report import write_report
from equipoise.sitting import recorded
from equipoise.study import StudyFolder

sys.path.append(str(Path(__file__).parents[2] / "docs"))
import pictures

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(pictures.chromium() is None, reason="there is no Chromium"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]
RUNS = 500


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cohort: Cohort, tiny: RunConfig) -> list[Record]:
    """A run that ended well, and one whose losses are not finite."""
    folder, made = tmp_path_factory.mktemp("trained"), []
    for rate in (1e-3, 1e9):
        made.append(Record(folder / f"{rate:g}"))
        list(recorded(made[-1].folder, tiny.having({"optim.lr": rate, "balance.every": 2}), cohort))
    assert [record.verdict.kind for record in made if record.verdict][1] == "diverged"
    return made


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, trained: list[Record]) -> StudyFolder:
    return shown(tmp_path_factory.mktemp("many") / "replayed", trained, RUNS)


def shown(folder: Path, trained: list[Record], runs: int) -> StudyFolder:
    """A study of replayed runs, with its journal and report."""
    made = replayed(folder, trained, runs)
    kept = optuna.create_study(storage=journal(made.journal), study_name="replayed", direction="maximize")
    kept.add_trials([_trial(Run.read(record)) for record in made.records()])
    write_report(made, importance)
    return made


def _trial(run: Run) -> optuna.trial.FrozenTrial:
    config, verdict = run.config, run.verdict
    assert verdict is not None
    about = {"run": run.name, "verdict": verdict.kind, "onset": verdict.onset, "stability": verdict.stability}
    return optuna.trial.create_trial(
        params={"optim.lr": config.optim.lr, "loss.adversarial": config.loss.adversarial},
        distributions={
            "optim.lr": FloatDistribution(2e-5, 2e-3, log=True),
            "loss.adversarial": CategoricalDistribution(GAMES),
        },
        value=0.9 - abs(math.log10(config.optim.lr) + 3.7),  # no two alike, so that there is something to compare
        user_attrs=about,
    )


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    with pictures.browser() as browser:
        yield browser


@dataclasses.dataclass
class Seen:
    """A page, and all that a person would not want of it."""

    page: Page
    bad: list[str]

    def shot(self, name: str) -> None:
        if folder := os.environ.get("EQUIPOISE_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.fixture
def seen(opened: Browser) -> Iterator[Seen]:
    page = opened.new_page(viewport={"width": 1360, "height": 1000})
    bad: list[str] = []
    page.on("console", lambda said: bad.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: bad.append(str(error)))
    page.on("request", lambda asked: None if _ours(asked.url) else bad.append(f"asked for {asked.url}"))
    yield Seen(page, bad)
    page.close()
    assert not bad


def _ours(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob", "file") or parts.hostname == "127.0.0.1"


def test_the_report_opens_from_disk_and_shows_a_run_alone_when_its_name_is_clicked(
    study: StudyFolder, seen: Seen
) -> None:
    page = seen.page
    page.goto(study.report.as_uri())
    pictures.drawn(page, 6)
    assert page.locator("tbody[data-run]").count() == RUNS
    for title in ("Dice against stability", "Losses", "Critics", "Survival", "Importance", "Balance", "Cost", "Images"):
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
    assert page.locator("figure img").evaluate("image => image.naturalWidth") > 100
    name = study.records()[3].name
    page.get_by_role("button", name=name).click()
    curves = page.locator(".js-plotly-plot").nth(1)
    alone = "plot => [...new Set(plot.data.filter(trace => trace.meta && trace.meta.alone).map(trace => trace.name))]"
    assert curves.evaluate(alone) == [name]
    seen.shot("report")
    page.get_by_role("button", name=name).click()
    assert curves.evaluate(alone) == []


def test_the_report_s_table_is_sorted_by_a_heading(study: StudyFolder, seen: Seen) -> None:
    page = seen.page
    page.goto(study.report.as_uri())
    first = page.locator("tbody[data-run]").first
    page.get_by_role("button", name="onset").click()
    assert "diverged" in first.inner_text()  # all others have none, and come last
    page.get_by_role("button", name="verdict").click()
    assert "diverged" not in first.inner_text()


def test_the_dashboard_shows_curves_importance_and_each_run_s_verdict_and_panels(
    study: StudyFolder, seen: Seen
) -> None:
    page, diverged = seen.page, study.records()[1]
    with pictures.served(study) as address:
        page.goto(f"{address}/dashboard/studies/0")
        pictures.drawn(page, 6)
        expect(page.get_by_role("heading", name="Hyperparameter Importance")).to_be_visible()
        for title in ("losses", "critics", "survival", "dice against stability"):
            expect(page.locator(".gtitle", has_text=title).first).to_be_visible()
        seen.shot("dashboard")
        page.goto(f"{address}/dashboard/studies/0/trials?numbers=1")
        expect(page.get_by_text("became nan").or_(page.get_by_text("became inf")).first).to_be_visible()
        expect(page.get_by_text("constraint: S ≥ 0.9 is missed by").first).to_be_visible()
        page.get_by_text("Trial 0", exact=True).first.click()
        expect(page.get_by_role("img", name="panels")).to_be_visible()
        assert page.get_by_role("img", name="panels").evaluate("image => image.naturalWidth") > 100
        seen.shot("trial")
        page.goto(f"{address}/dashboard/studies/0/trials?numbers=1")
        page.get_by_role("link", name="Curves, balance, panels and settings of this run").click()
        expect(page.get_by_role("heading", name=diverged.name)).to_be_visible()
        pictures.drawn(page, 2)
        expect(page.locator(".verdict")).to_have_text("diverged")
        seen.shot("run")


def test_a_look_at_a_large_study_is_small_enough_to_be_had_every_few_seconds(study: StudyFolder, seen: Seen) -> None:
    with pictures.served(study) as address:
        answer = seen.page.request.get(f"{address}/api/studies/0?after=0")
        assert len(json.loads(answer.body())["trials"]) == RUNS
        again = seen.page.request.get(f"{address}/api/studies/0?after={RUNS}")
        assert len(again.body()) < 4e6


def test_the_pictures_of_the_readme_are_taken_of_a_study_that_was_confirmed(
    trained: list[Record], tmp_path: Path, opened: Browser
) -> None:
    folder = shown(tmp_path / "replayed", trained, 6)
    first = folder.records()[0]
    first.folder.rename(first.folder.with_name("confirm-12345678"))
    taken = pictures.take(folder, tmp_path, opened)
    assert [path.name for path in taken] == ["table.png", "report.png", "dashboard.png", "run.png"]
    for path in taken:
        with Image.open(path) as image:
            assert min(image.size) > 100
            assert len(image.convert("L").getcolors() or []) > 10  # something is on it
