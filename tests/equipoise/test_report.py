"""The report is one file that tells every run as it was recorded, and nothing of who ran it or where."""

import base64
import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from replayed_study import replayed

from equipoise.account import Account
from equipoise.batches import Cohort
from equipoise.config import PUBLISHED, RunConfig
from equipoise.curves import balance, critics, losses, pulls
from equipoise.figures import LOOKS, Figure, Run, dice_against_stability, pareto, survival
from equipoise.monitor import Finding, Verdict
from equipoise.panels import Panels
from equipoise.record import Record
from equipoise.report import best_point, write_report
from equipoise.search import Choice, Fixed, Range, Space
from equipoise.sitting import recorded as recorded_run
from equipoise.study import Study, StudyFolder
from equipoise.table import COLOURS
from equipoise.train import Progress
from equipoise.verdict import Kind
from slicestore.errors import InputError

STEPS, BLOCK = 400, 10
STUDY = Study(
    name="sweep",
    question="Which <rates> & games keep SIFA stable?",
    run=PUBLISHED.at("steps", STEPS).at("evaluations", 4).at("data.cohort", "c0ffee"),
    space={"optim.lr": Range(1e-5, 1e-2), "loss.adversarial": Choice(("lsgan", "hinge"))},
    points=7,
)
COMMAND = "python /home/jane.doe/SIFA/sweep.py --store /data/Mueller_Hans_1961/cohort.zarr --results /scratch/jane"
OPTIONS = {
    "seed": 0,
    "workers_per_run": 1,
    "store": "/data/Mueller_Hans_1961/cohort.zarr",
    "points": 7,
    "wandb": None,
    "wandb_images": True,
}
EXPLODED = Finding("explosion", "loss/cycle_t", onset=200, alarm=260, value=1.5, limit=0.4)
NAN = Finding("non_finite", "loss/generator", onset=121, alarm=121, value=math.nan, limit=math.inf)
WON = Finding("d_wins", "auc/t", onset=300, alarm=350, value=0.995, limit=0.99)


def record(folder: StudyFolder, name: str, config: RunConfig, steps: int, dice: float, verdict: Verdict | None) -> None:
    """Leave a run behind, as a worker would; of a divergence by NaN the signals show it."""
    run = Record(folder.runs / name)
    run.open(config, torch.device("cpu"))
    bad = NAN.onset if verdict and NAN in verdict.findings else STEPS + 1
    for step in range(BLOCK, steps + 1, BLOCK):
        loss = math.nan if step >= bad else 0.5 * math.exp(-step / 200)
        signals = {"loss/cycle_t": loss, "loss/segmentation": 2 * loss, "loss/generator": 9 * loss, "auc/t": 0.9}
        looked = step % 100 == 0
        if looked:
            signals["quality/translated_dice"] = dice if step < bad else math.nan
        tile = np.full((2, 8, 8), math.nan if step >= bad else 0.0, dtype=np.float32)
        panels = Panels({"x_s": tile, "x_t": tile}, {}) if looked else None
        run.add(Progress(step, signals, 0.5, looked, panels, 1.0, None, lambda: pytest.fail("nobody needs the state")))
    if verdict:
        run.close(verdict)


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """Every way to end, and a run that has not."""
    made = StudyFolder.create(tmp_path / "Mueller_Hans" / "sweep", STUDY, COMMAND, OPTIONS)
    lsgan, hinge = STUDY.run, STUDY.run.at("loss.adversarial", "hinge")
    record(made, "000-aaaa", lsgan, 400, 0.7, Verdict("stable", 400, 400, 0.98))
    record(made, "001-bbbb", lsgan.at("optim.lr", 8e-3), 260, 0.9, Verdict("diverged", 260, 400, 0.4, (EXPLODED,)))
    record(made, "002-cccc", hinge.at("optim.lr", 5e-3), 130, 0.3, Verdict("diverged", 130, 400, 0.3, (NAN,)))
    record(made, "003-dddd", hinge, 100, 0.1, Verdict("censored", 100, 400, None))
    record(made, "004-eeee", hinge.at("optim.lr", 1e-3), 60, 0.1, None)
    record(made, "005-ffff", lsgan.at("optim.lr", 2e-3), 400, 0.8, Verdict("d_wins", 400, 400, 0.7, (WON,)))
    record(made, "confirm-9999", lsgan.at("seed", 1).at("workers", 2), 400, 0.6, Verdict("stable", 400, 400, 1.0))
    return made


@pytest.fixture
def page(folder: StudyFolder) -> str:
    return write_report(folder).read_text()


def runs(folder: StudyFolder) -> list[Run]:
    return [Run.read(r) for r in folder.records()]


def body(page: str) -> str:
    """The page without plotly's own source."""
    return page[page.index("<body>") :]


class Addresses(HTMLParser):
    """Whatever a browser would fetch or open."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")]


def test_the_report_fetches_nothing(page: str) -> None:
    parser = Addresses()
    parser.feed(page)
    assert parser.found
    assert all(address.startswith("data:image/png;base64,") for address in parser.found)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    assert "default-src 'none'" in page
    assert len(page) < 20e6


def test_the_report_names_no_path_user_or_patient(page: str) -> None:
    told = body(page).lower()
    for word in ("mueller", "jane", "/home", "/data", "/scratch", "/tmp", str(Path.cwd()).lower()):
        assert word not in told


def test_the_command_is_told_with_store_in_the_place_of_the_path(page: str) -> None:
    assert (
        "<pre>python studies/sweep.py --seed 0 --workers-per-run 1 --store STORE --points 7 --wandb-images</pre>"
        in page
    )
    assert "c0ffee" in page


def test_text_of_the_user_is_escaped(page: str) -> None:
    assert "Which &lt;rates&gt; &amp; games keep SIFA stable?" in page
    assert "<rates>" not in page


def test_every_run_is_told_with_its_verdict_and_sentence(page: str, folder: StudyFolder) -> None:
    for run in runs(folder):
        line = re.search(f'<tbody data-run="{run.name}">(.*?)</tbody>', page)
        assert line
        assert run.kind.replace("_", " ") in line[1]
        assert (run.verdict.sentence() if run.verdict else "no verdict") in line[1]


def test_the_summary_counts_points_and_tells_how_the_best_one_was_confirmed(page: str) -> None:
    lead = re.search('<p class="lead">(.*?)</p>', page)
    assert lead
    assert "5 of 7 points have ended: 1 stable, 1 d wins, 2 diverged, 1 censored, 1 unfinished." in lead[1]
    assert "Best point: <b>000-aaaa</b>, Dice 0.700, S 0.980." in lead[1]
    assert "Repeated with seed 1 over 2 workers, it ended stable: Dice 0.600, S 1.000." in lead[1]


def test_a_dice_that_is_not_finite_is_named(folder: StudyFolder) -> None:
    with open(folder.runs / "002-cccc" / "signals.jsonl", "a") as file:
        row = {"step": 140, "quality/translated_dice": "nan", "divergence/stability": 0.3, "time/block": 0.5}
        file.write(json.dumps(row) + "\n")
    page = write_report(folder).read_text()
    line = re.search('<tbody data-run="002-cccc">(.*?)</tbody>', page)
    assert line
    assert "not finite (nan)" in line[1]
    assert "002-cccc is not drawn: no finite Dice or S." in page


def test_the_stability_of_a_run_that_was_stopped_is_only_told_so_far(page: str) -> None:
    line = re.search('<tbody data-run="003-dddd">(.*?)</tbody>', page)
    assert line
    assert "(1.000)" in line[1]


def test_the_last_panels_of_the_best_point_and_its_confirmation_are_embedded(page: str, folder: StudyFolder) -> None:
    shown = re.findall('src="data:image/png;base64,([^"]+)"', body(page))
    expected = [Record(folder.runs / name).picture(400).read_bytes() for name in ("000-aaaa", "confirm-9999")]
    assert [base64.b64decode(s) for s in shown] == expected
    assert "share this file as you would share its images" in page


def test_a_report_to_hand_on_has_no_panels(folder: StudyFolder) -> None:
    page = body(write_report(folder, images=False).read_text())
    assert "<h2>Images</h2>" not in page
    assert "data:image/png" not in page
    assert "<h2>Cost</h2>" in page


def test_a_report_that_fails_leaves_the_old_one(folder: StudyFolder) -> None:
    old = write_report(folder).read_text()
    (folder.runs / "003-dddd" / "config.json").write_text("{")
    with pytest.raises(InputError):
        write_report(folder)
    assert folder.report.read_text() == old
    assert not list(folder.folder.glob(".*partial"))


def test_a_study_without_runs_has_a_report(tmp_path: Path) -> None:
    page = write_report(StudyFolder.create(tmp_path / "empty", STUDY, "", {})).read_text()
    assert "0 of 7 points have ended." in page
    assert "No run has recorded a step yet." in page


def test_a_run_whose_signals_a_kill_cut_off_is_told_up_to_the_cut(folder: StudyFolder) -> None:
    with open(folder.runs / "004-eeee" / "signals.jsonl", "a") as file:
        file.write('{"step": 70, "loss/cyc')
    assert ">60</td>" in write_report(folder).read_text()


def test_the_best_point_is_the_feasible_one_of_the_highest_dice(folder: StudyFolder) -> None:
    best = best_point(runs(folder), STUDY)
    assert best
    assert best.name == "000-aaaa"  # not 001, which diverged, nor 005, whose S of 0.7 is below 0.9


def test_without_a_feasible_point_the_best_is_that_of_the_highest_dice_times_s(folder: StudyFolder) -> None:
    best = best_point([run for run in runs(folder) if run.name != "000-aaaa"], STUDY)
    assert best
    assert best.name == "005-ffff"


class Curve(NamedTuple):
    x: np.ndarray
    y: np.ndarray


def curve(drawn: Figure, run: str, axis: str) -> Curve:
    """A run's part of the trace that holds it, without the gap behind it."""
    (trace,) = (t for t in drawn.figure.data if run in (t.meta or {}).get("runs", ()) and t.xaxis == axis)
    lengths = trace.meta["runs"]
    start = 0
    for name, length in lengths.items():
        if name == run:
            break
        start += length
    assert set(trace.text[start : start + length]) == {run}
    assert np.isnan(trace.y[start + length - 1])
    return Curve(trace.x[start : start + length - 1], trace.y[start : start + length - 1])


def marks(drawn: Figure, run: str, axis: str, symbol: str) -> list[Any]:
    """Traces of marks of a run alone, as the runs in these tests' groups are few."""
    return [
        t for t in drawn.figure.data
        if run in (t.meta or {}).get("points", ()) and t.xaxis == axis and t.marker.symbol == symbol
    ]  # fmt: skip


def test_a_value_that_is_not_finite_is_a_gap_with_a_cross_and_a_sentence(folder: StudyFolder) -> None:
    drawn = losses(runs(folder), None)
    assert "002-cccc: loss/segmentation is not finite in 1 of 13 blocks, from step 130." in drawn.notes
    line = curve(drawn, "002-cccc", "x2")
    assert np.isnan(line.y[-1])
    assert np.isfinite(line.y[:-1]).all()
    (cross,) = marks(drawn, "002-cccc", "x2", "x-thin")
    assert cross.x == (130,)
    assert drawn.figure.layout[f"yaxis{cross.yaxis[1:]}"].overlaying == "y2"


def test_an_onset_is_marked_on_the_curve(folder: StudyFolder) -> None:
    drawn = losses(runs(folder), None)
    found = [mark for axis in ("x", "x2", "x3") for mark in marks(drawn, "001-bbbb", axis, "diamond")]
    assert [mark.x for mark in found] == [(200,)] * 3
    assert found[0].y[0] == pytest.approx(0.5 * math.exp(-1))


def test_a_winning_critic_is_marked_in_its_own_panel(folder: StudyFolder) -> None:
    drawn = critics(runs(folder), None)
    (mark,) = (mark for axis in ("x", "x2", "x3", "x4") for mark in marks(drawn, "005-ffff", axis, "diamond"))
    assert (mark.x, mark.xaxis) == ((300,), "x")


def test_a_negative_loss_has_no_place_on_a_logarithmic_axis_and_is_said_to_be_missing(folder: StudyFolder) -> None:
    with open(folder.runs / "000-aaaa" / "signals.jsonl", "a") as file:
        file.write(json.dumps({"step": 410, "loss/generator": -1.0, "time/block": 1, "divergence/stability": 1}) + "\n")
    drawn = losses(runs(folder), None)
    assert drawn.notes[0] == "000-aaaa: loss/generator is zero or negative in 1 of 41 blocks: no logarithm."


def test_of_a_hinge_game_the_margin_is_drawn_and_not_the_generator(folder: StudyFolder) -> None:
    with open(folder.runs / "003-dddd" / "signals.jsonl", "a") as file:
        file.write(json.dumps({"step": 110, "critic/gap_t": 0.4, "time/block": 1, "divergence/stability": 1}) + "\n")
    figure = losses(runs(folder), None).figure
    titles = [a.text for a in figure.layout.annotations]
    lines = [t for t in figure.data if "003-dddd" in (t.meta or {}).get("runs", ())]
    assert [titles[int(t.xaxis[1:] or 1) - 1] for t in lines] == [
        "cycle, target",
        "segmentation",
        "margin of D_t",
    ]


def test_a_margin_may_be_negative_and_is_drawn_all_the_same(folder: StudyFolder) -> None:
    with open(folder.runs / "003-dddd" / "signals.jsonl", "a") as file:
        file.write(json.dumps({"step": 110, "critic/gap_t": -0.4, "time/block": 1, "divergence/stability": 1}) + "\n")
    drawn = losses(runs(folder), None)
    line = curve(drawn, "003-dddd", "x4")
    assert line.y[-1] == pytest.approx(-0.4)
    assert drawn.figure.layout.yaxis4.type is None
    assert drawn.figure.layout.yaxis.type == "log"
    assert not any("003-dddd: critic/gap_t" in note for note in drawn.notes)


def test_with_very_many_blocks_only_every_kth_is_drawn(folder: StudyFolder) -> None:
    drawn = losses(runs(folder), None, points=300)
    line = curve(drawn, "000-aaaa", "x")
    assert drawn.notes[0] == "One block in 3 is drawn; onsets and crosses are exact."
    assert list(line.x[:3]) == [10, 40, 70]


def test_a_run_without_a_dice_is_not_drawn_against_stability(folder: StudyFolder) -> None:
    drawn = dice_against_stability(runs(folder), STUDY, None)
    assert drawn.notes == ["004-eeee is not drawn: no Dice."]


def test_survival_is_drawn_by_game_and_only_where_a_point_failed(folder: StudyFolder) -> None:
    points = [run for run in runs(folder) if not run.confirms]
    drawn = survival(points)
    assert drawn
    names = [t.name for t in drawn.figure.data if t.mode == "lines"]
    assert names == ["hinge (1 of 3 failed)", "lsgan (1 of 3 failed)"]
    assert survival([run for run in points if run.kind != "diverged"]) is None


@pytest.mark.parametrize("kind", [k for k in get_args(Kind) if k not in ("d_wins", "stable", "diverged", "censored")])
def test_every_kind_of_verdict_is_told_in_its_own_look(folder: StudyFolder, kind: Any) -> None:
    record(folder, "006-abcd", STUDY.run, 400, 0.5, Verdict(kind, 400, 400, 0.95))
    page = write_report(folder).read_text()
    assert f'class="verdict {kind}"' in page
    assert f".{kind} {{ --kind: {LOOKS[kind].colour}; }}" in page
    assert f"1 {kind}" in page
    assert COLOURS[kind]
    assert len({look.symbol for look in LOOKS.values()}) == len({look.colour for look in LOOKS.values()}) == len(LOOKS)


def test_the_cost_tells_what_the_alarm_saved_apart_from_what_the_pruner_did(page: str) -> None:
    cost = page[page.index("<h2>Cost</h2>") : page.index("<h2>Images</h2>")]
    # Of 1750 steps done and 410 + 300 saved; the run that has not ended saves none.
    assert "Stopping at the alarm saved 16.7% of all steps." in cost
    line = re.search("<tr class=all>(.*?)</tr>", cost)
    assert line
    assert re.findall("<td>([^<]*)</td>", line[1])[:4] == ["7", "1,750", "410", "300"]


def test_the_cost_tells_what_failures_lost_and_what_of_the_sessions_was_overhead(folder: StudyFolder) -> None:
    lost = Record(folder.runs / "004-eeee")
    lost.take_up(60, "c0ffee00", workers=1)
    lost.add(Progress(70, {}, 4.0, False, None, 1.0, None, lambda: pytest.fail("nobody needs the state")))
    lost.take_up(60, "c0ffee00", workers=1)
    (folder.folder / "sessions").mkdir()
    about = {"id": "c0ffee00", "began": 1e9, "seen": 1e9 + 100, "slots": 2, "workers": 1, "gpus": 1, "ended": None}
    (folder.folder / "sessions" / "c0ffee00.json").write_text(json.dumps(about))
    page = write_report(folder).read_text()
    cost = page[page.index("<h2>Cost</h2>") : page.index("<h2>Images</h2>")]
    # Half a second for ten steps: 1350 of one worker, 400 of two.
    assert "sessions had 200 GPU-seconds; 46% of them went into no step that counts" in cost
    line = re.search("<tr class=all>(.*?)</tr>", cost)
    assert line
    cells = re.findall("<td>([^<]*)</td>", line[1])
    assert (cells[4], cells[5], cells[8:]) == ("10", "108", ["4.0", "1"])


def grid(tmp_path: Path, **changed: Any) -> StudyFolder:
    """Two given points, of which one is called by a name that must be escaped."""
    first = ({}, {"optim.lr": 2e-3, "net.image_norm": "none"})
    given = dataclasses.replace(
        STUDY, space={}, first=first, labels=("as published", "no norm & lr <0.002>"), points=2, **changed
    )
    made = StudyFolder.create(tmp_path / "grid", given, COMMAND, {"seeds": [0, 1], "sifa": True})
    for number, point in enumerate(first):
        record(made, f"{number:04d}-aaaa", given.run.having(point), 400, 0.7, Verdict("stable", 400, 400, 0.98))
    return made


def test_a_given_point_is_told_by_its_name_and_by_what_it_sets(tmp_path: Path) -> None:
    page = write_report(grid(tmp_path)).read_text()
    line = re.search('<tbody data-run="0001-aaaa">(.*?)</tbody>', page)
    assert line
    assert "no norm &amp; lr &lt;0.002&gt;" in line[1]
    assert "<td" in line[1]
    assert ">0.002</td>" in line[1]
    assert ">none</td>" in line[1]
    heads = re.search("<thead>(.*?)</thead>", page)
    assert heads
    assert re.findall("<small>([^<]+)</small>", heads[1]) == ["optim", "net"]
    assert "All points were given; nothing was searched." in page
    assert "python studies/sweep.py --seeds 0 1 --sifa" in page


def test_settings_that_no_run_differs_in_have_no_column(tmp_path: Path) -> None:
    made = grid(tmp_path)
    record(made, "0002-aaaa", STUDY.run, 400, 0.7, Verdict("stable", 400, 400, 0.98))
    (made.runs / "0001-aaaa" / "config.json").unlink()
    heads = re.search("<thead>(.*?)</thead>", write_report(made).read_text())
    assert heads
    assert "<small>" not in heads[1]


def test_where_a_study_searches_is_told_with_its_conditions(tmp_path: Path) -> None:
    space = {
        "loss.adversarial": Choice(("lsgan", "rp")),
        "critic.penalty": (Fixed("r1r2", when={"loss.adversarial": ("rp",)}), Choice(("none", "r1"))),
        "critic.gamma": Range(0.01, 100.0, when={"critic.penalty": ("r1", "r1r2"), "loss.adversarial": ("rp",)}),
        "loss.identity": Range(0.1, 5.0, log=False, off=0.0),
        "net.skip": Choice((True, False)),
    }
    made = StudyFolder.create(tmp_path / "a", dataclasses.replace(STUDY, space=space), COMMAND, {})
    page = write_report(made).read_text()
    for told in (
        "always r1r2, where loss.adversarial is rp; else none, r1",
        "0.01 to 100, logarithmic, where critic.penalty is r1 or r1r2 and loss.adversarial is rp",
        "0.1 to 5, or 0",
        "True, False",
    ):
        assert f"<td>{told}</td>" in page


def judged(name: str, s: float | None, dice: float) -> Run:
    verdict = Verdict("censored" if s is None else "stable", 400, 400, s)
    return Run(name, PUBLISHED, verdict, [{"step": 400, "quality/translated_dice": dice}], None)


def test_the_pareto_front_is_of_points_that_none_beats_in_both() -> None:
    points = [
        judged("0", 1.0, 0.5), judged("1", 0.9, 0.4), judged("2", 0.5, 0.8), judged("3", 0.5, 0.7),
        judged("4", 0.2, 0.8), judged("5", 0.1, 0.9), judged("6", None, 0.99), judged("7", 0.9, math.nan),
        judged("confirm-8", 1.0, 1.0),
    ]  # fmt: skip
    assert pareto(points, "quality/translated_dice") == [(0.1, 0.9), (0.5, 0.8), (1.0, 0.5)]


def with_balance(folder: StudyFolder) -> list[Run]:
    shares = {"balance/generator_adv_t": 0.25, "balance/generator_cycle_t": 0.75, "balance/generator": 0.81}
    with open(folder.runs / "000-aaaa" / "signals.jsonl", "a") as file:
        file.write(json.dumps({"step": 410, "time/block": 1, "divergence/stability": 1, **shares}) + "\n")
    return runs(folder)


def test_how_evenly_terms_pull_is_drawn_where_it_was_measured(folder: StudyFolder) -> None:
    assert balance(runs(folder), None) is None
    drawn = balance(with_balance(folder), None)
    assert drawn is not None
    assert list(curve(drawn, "000-aaaa", "x").y) == [pytest.approx(0.81)]
    assert "Balance" in write_report(folder).read_text()


def test_each_term_s_share_of_a_run_is_stacked(folder: StudyFolder) -> None:
    run = next(run for run in with_balance(folder) if run.name == "000-aaaa")
    drawn = pulls(run)
    assert drawn is not None
    assert {trace.name: list(trace.y) for trace in drawn.figure.data} == {"adv_t": [0.25], "cycle_t": [0.75]}
    assert pulls(next(run for run in runs(folder) if run.name == "001-bbbb")) is None


def test_importance_is_shown_by_dice_and_by_s_as_it_is_told(folder: StudyFolder) -> None:
    asked: list[list[float | None]] = []

    def told(points: Sequence[Run], space: Space, value: Callable[[Run], float | None]) -> dict[str, float]:
        assert not any(run.confirms for run in points)
        asked.append([value(run) for run in points])
        return {"optim.lr": 0.75, "loss.adversarial": 0.25}

    page = write_report(folder, told).read_text()
    points = [run for run in runs(folder) if not run.confirms]
    same(asked[0], [run.last("quality/translated_dice") for run in points])
    same(asked[1], [run.stability for run in points])
    assert "PED-ANOVA" in page
    assert "Too few runs have ended to tell" in write_report(folder, lambda *_: None).read_text()
    assert "Importance" not in write_report(folder).read_text()


def same(one: list[float | None], other: list[float | None]) -> None:
    assert [math.nan if v is None else v for v in one] == pytest.approx(
        [math.nan if v is None else v for v in other], nan_ok=True
    )


def test_the_budget_is_told_with_what_was_spent_and_saved(folder: StudyFolder) -> None:
    whole = Account.of(folder.records())
    spent, saved = (whole.unit.said(seconds) for seconds in (whole.seconds, whole.seconds_saved))
    told = f"Budget: 7 points of 400 steps. Trained so far: {spent} {whole.unit.name}; saved by stopping early: {saved}"
    assert whole.seconds_saved > 0
    assert told in page_of(folder)


def page_of(folder: StudyFolder) -> str:
    return re.sub(r"\s+", " ", write_report(folder).read_text())


def test_a_study_of_500_runs_has_a_report_of_less_than_20_megabytes_in_which_all_of_them_are(
    tmp_path: Path, cohort: Cohort, tiny: RunConfig
) -> None:
    recorded = []
    for seed in range(2):
        record = Record(tmp_path / f"recorded-{seed}")
        list(recorded_run(record.folder, tiny.at("seed", seed), cohort))
        recorded.append(record)
    folder = replayed(tmp_path / "replayed", recorded, 500)
    page = write_report(folder)
    assert page.stat().st_size < 20e6
    text = page.read_text()
    assert all(f'data-run="{record.name}"' in text for record in folder.records())
    assert 'class="wide tall"' in text


# --- selection --------------------------------------------------------------------------------------------------------


def scored(folder: StudyFolder, name: str, lr: float, **scores: Sequence[float]) -> None:
    """A stable run with these scores at its evaluations."""
    run = Record(folder.runs / name)
    run.open(STUDY.run.at("optim.lr", lr), torch.device("cpu"))
    for number in range(4):
        signals = {name.replace("__", "/"): several[number] for name, several in scores.items()}
        step = 100 * (number + 1)
        run.add(Progress(step, signals, 0.5, True, None, 1.0, None, lambda: pytest.fail("nobody needs the state")))
    run.close(Verdict("stable", 400, 400, 1.0))


def two_scored(tmp_path: Path, study: Study = STUDY) -> StudyFolder:
    """The first run is best by its last translated Dice, the second on target images."""
    made = StudyFolder.create(tmp_path / "scored", study, COMMAND, {})
    one = {"quality__translated_dice": (0.5, 0.6, 0.7, 0.8), "quality__target_dice": (0.2, 0.3, 0.4, 0.35)}
    other = {"quality__translated_dice": (0.1, 0.2, 0.3, 0.4), "quality__target_dice": (0.5, 0.7, 0.6, 0.5)}
    scored(made, "000-aaaa", 1e-4, **one, validator__entropy=(-0.4, -0.3, -0.2, -0.3))
    scored(made, "001-bbbb", 2e-4, **other, validator__entropy=(-0.3, -0.1, -0.2, -0.3))
    return made


def selection_of(page: str) -> str:
    """The section, from its heading to the next."""
    return page[page.index("<h2>Selection</h2>") :].split("<section>")[0]


def table_rows(part: str, number: int) -> dict[str, list[str]]:
    """Cells of a table by the names of its lines, as plain text."""
    table = part.split("<table")[number + 1]
    lines = re.findall('<tr><th scope="row">(.*?)</th>(.*?)</tr>', table)
    return {
        name: [re.sub("<[^>]+>", "", cell) for cell in re.findall("<td>(.*?)</td>", cells)] for name, cells in lines
    }


def test_protocols_of_selection_are_told_side_by_side_with_their_regret(tmp_path: Path) -> None:
    part = selection_of(write_report(two_scored(tmp_path)).read_text())
    assert table_rows(part, 0) == {
        "last step of the best point": ["000-aaaa", "400", "0.350", "0.350", "0.425 ± 0.106 (2 runs)"],
        "source validation: translated Dice": ["000-aaaa", "400", "0.350", "0.350", "0.425 ± 0.106 (2 runs)"],
        "label-free: entropy": ["001-bbbb", "200", "0.700", "0.000", "0.550 ± 0.212 (2 runs)"],
        "oracle: target Dice, not available without target masks": [
            "001-bbbb", "200", "0.700", "0.000", "0.550 ± 0.212 (2 runs)",
        ],
    }  # fmt: skip
    assert "test Dice" not in part
    assert "The oracle uses target masks, which a user may not have" in part


def test_how_scores_rank_target_dice_is_told_with_the_number_of_pairs_or_why_not(tmp_path: Path) -> None:
    ranks = table_rows(selection_of(write_report(two_scored(tmp_path)).read_text()), 1)
    # ranks of the Dice 1 2 4 3 5.5 8 7 5.5, of the entropy 1 3.5 6.5 3.5 3.5 8 6.5 3.5: 30.5 / sqrt(41.5 * 36.5)
    assert ranks["label-free: entropy"] == ["not told: fewer than 3", "2", "0.784", "8"]
    assert ranks["label-free: nuclear norm"] == ["not told: fewer than 3", "0", "not told: fewer than 3", "0"]
    assert len(ranks) == 6


def test_without_target_masks_the_choices_are_told_alone(page: str) -> None:
    part = selection_of(page)
    assert table_rows(part, 0) == {
        "last step of the best point": ["000-aaaa", "400"],
        "source validation: translated Dice": ["000-aaaa", "400"],
    }
    assert part.count("<table") == 1
    assert "No target masks are known to validate on." in part


def test_a_study_that_maximises_target_dice_says_that_its_best_point_was_chosen_by_masks(tmp_path: Path) -> None:
    part = selection_of(
        write_report(two_scored(tmp_path, dataclasses.replace(STUDY, objective="target_dice"))).read_text()
    )
    assert table_rows(part, 0)["last step of the best point"][:2] == ["001-bbbb", "400"]
    assert "The best point of this study was chosen by target Dice too." in part


def test_test_scores_stand_beside_what_they_were_measured_of_and_the_test_s_use_is_counted(tmp_path: Path) -> None:
    made = two_scored(tmp_path)
    about = {"protocols": ["last", "source"], "run": "000-aaaa", "step": 400, "dice": 0.3141, "subjects": 3}
    bare = {"protocols": ["oracle"], "run": "001-bbbb", "step": 400, "dice": 0.9, "interval": None, "subjects": 1}
    other = bare | {"step": 200, "dice": 0.6}
    tested = {"touches": 2, "rows": [about | {"interval": [0.25, 0.375]}, bare, other]}
    (made.folder / "test.json").write_text(json.dumps(tested))
    part = selection_of(write_report(made).read_text())
    last = {name: cells[-1] for name, cells in table_rows(part, 0).items()}
    assert last == {
        "last step of the best point": "0.314 [0.250, 0.375] (3 subjects)",
        "source validation: translated Dice": "0.314 [0.250, 0.375] (3 subjects)",
        "label-free: entropy": "0.600 (1 subject)",
        "oracle: target Dice, not available without target masks": "0.600 (1 subject)",
    }
    assert "0.900" not in part, "nothing was chosen at that step"
    assert "The test subjects were used 2 times." in part


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"touches": 1, "rows": [{"run": "a"}]}'])
def test_test_scores_that_cannot_be_read_are_refused(tmp_path: Path, text: str) -> None:
    made = two_scored(tmp_path)
    (made.folder / "test.json").write_text(text)
    with pytest.raises(InputError, match="no readable test scores"):
        write_report(made)


def test_a_study_without_evaluations_has_no_selection(tmp_path: Path) -> None:
    made = StudyFolder.create(tmp_path / "empty", STUDY, "", {})
    record(made, "000-aaaa", STUDY.run, 60, 0.1, None)
    assert "<h2>Selection</h2>" not in write_report(made).read_text()


def test_of_a_study_of_the_composite_that_is_told_and_not_called_dice(tmp_path: Path) -> None:
    made = StudyFolder.create(tmp_path / "scored", dataclasses.replace(STUDY, objective="composite"), COMMAND, {})
    dice = {"quality__translated_dice": (0.9,) * 4}
    scored(made, "000-aaaa", 1e-4, **dice, quality__composite=(0.1, 0.2, 0.3, 0.4))
    scored(made, "001-bbbb", 2e-4, **dice, quality__composite=(0.1, 0.2, 0.3, 0.5))
    page = page_of(made)
    assert "Best point: <b>001-bbbb</b>, composite 0.500, S 1.000." in page
    assert "<h2>Composite against stability</h2>" in page
    assert "<h2>Dice against stability</h2>" not in page
    heads = re.search("<thead>(.*?)</thead>", page)
    assert heads
    assert re.findall("<button>([^<]+)</button>", heads[1])[2:4] == ["composite", "translated dice"]
