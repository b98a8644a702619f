"""The pictures of README.md, taken from a study as a person sees it.

    python docs/pictures.py [STUDY]          # the latest study under results/ by default; needs a Chromium

Knows the pages of a study and how a browser is driven. Of a study on patients' images the pictures would show these:
take synthetic heads.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from equipoise.launch.dashboard import make
from equipoise.study import StudyFolder, latest_study

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


def take(folder: StudyFolder, out: Path) -> list[Path]:
    """Take all pictures of a study; returns where they are."""
    made = [out / f"{name}.png" for name in ("report", "dashboard", "run")]
    best: Any = None
    with browser() as opened, served(folder) as address:
        page = opened.new_page(viewport={"width": 1360, "height": 1000})
        page.goto(folder.report.as_uri())
        drawn(page, 3)
        page.screenshot(path=made[0], full_page=True, clip={"x": 0, "y": 0, "width": 1360, "height": 2450})
        page.goto(f"{address}/dashboard/studies/0")
        drawn(page, 5)
        page.screenshot(path=made[1], full_page=True, clip={"x": 0, "y": 0, "width": 1360, "height": 2150})
        best = next(record for record in folder.records() if record.confirms)
        page.goto(f"{address}/runs/{best.name}")
        drawn(page, 2)
        page.screenshot(path=made[2], full_page=True, clip={"x": 0, "y": 0, "width": 1360, "height": 1500})
    return made


if __name__ == "__main__":
    study = StudyFolder.open(Path(sys.argv[1])) if sys.argv[1:] else latest_study(Path("results"))
    for picture in take(study, DOCS):
        print(picture)
