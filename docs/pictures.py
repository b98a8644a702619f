"""The pictures of README.md, taken from a study as a person sees it.

    python docs/pictures.py [STUDY]          # the latest study under results/ by default; needs a Chromium

Knows the pages of a study and how a browser is driven. Of a study on patients' images the pictures would show these:
take synthetic heads.
"""

from __future__ import annotations

import io
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI

from equipoise.launch.dashboard import make
from equipoise.study import StudyFolder, latest_study
from equipoise.table import TableTracker

DOCS = Path(__file__).parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-sync",
    "--no-first-run",
    "--no-sandbox",
)


def chromium() -> str | None:
    """Where a Chromium lies, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium; it may not reach anything but what a page asks for."""
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def served(folder: StudyFolder) -> Iterator[str]:
    """The address of a study's dashboard."""
    with make(folder, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def drawn(page: Page, figures: int) -> None:
    """Wait until so many figures are on the page, with their curves in them."""
    page.wait_for_function(
        "n => [...document.querySelectorAll('.js-plotly-plot')].filter(p => p.querySelector('.main-svg')).length >= n",
        arg=figures,
    )
    page.wait_for_timeout(500)  # what is drawn is also painted


def table(folder: StudyFolder) -> str:
    """The terminal's table of a study that has ended, as a page."""
    console = Console(record=True, width=132, file=io.StringIO(), force_terminal=True)
    shown = TableTracker(Console(quiet=True), folder.study.objective, folder.study.names())
    for record in folder.records():
        shown.rows(record, record.rows())
        if (verdict := record.verdict) is not None:
            shown.ended(record, verdict)
    console.print(shown.table())
    return console.export_html(theme=MONOKAI)


def take(folder: StudyFolder, out: Path, opened: Browser) -> list[Path]:
    """Take all pictures of a study that has been confirmed; returns where they are."""
    made = {name: out / f"{name}.png" for name in ("table", "report", "dashboard", "run")}
    confirmed = next(record for record in folder.records() if record.confirms)
    with served(folder) as address:
        page = opened.new_page(viewport={"width": 1320, "height": 300})
        page.set_content(table(folder))
        page.locator("pre").screenshot(path=made["table"])
        page.set_viewport_size({"width": 1360, "height": 1000})
        page.goto(folder.report.as_uri())
        drawn(page, 3)
        _shoot(page, made["report"], 2050)
        page.goto(f"{address}/dashboard/studies/0")
        drawn(page, 5)
        _shoot(page, made["dashboard"], 2120)
        page.goto(f"{address}/runs/{confirmed.name}")
        drawn(page, 2)
        _shoot(page, made["run"], 1500)
    return list(made.values())


def _shoot(page: Page, path: Path, height: int) -> None:
    """The page down to a height, at three quarters of its size."""
    data = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": 1360, "height": height})
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB").resize((1020, round(height * 0.75)), Image.Resampling.LANCZOS)
        small.save(path, optimize=True)


if __name__ == "__main__":
    study = StudyFolder.open(Path(sys.argv[1])) if sys.argv[1:] else latest_study(Path("results"))
    with browser() as chrome:
        for picture in take(study, DOCS, chrome):
            print(picture)
