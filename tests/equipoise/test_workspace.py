"""A study's view at W&B shows what its runs hold, and is saved once, by whoever may."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import wandb
from wandb_server import Manner, serving

from equipoise import balance, wandb_row, wandb_study
from equipoise.config import PUBLISHED, RunConfig
from equipoise.launch.local import launch
from equipoise.record import Record
from equipoise.search import Choice, Range
from equipoise.study import Study, StudyFolder
from equipoise.verdict import Kind
from equipoise.wandb_tracker import WandbTracker
from equipoise.workspace import FEW, RUNS, create, specification, workspace
from slicestore.errors import InputError
from slicestore.store import Store

Command = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # W&B's
]
STUDY = Study(
    name="sweep",
    question="Which rates keep SIFA stable?",
    run=PUBLISHED.at("steps", 400),
    space={
        "optim.lr": Range(1e-5, 1e-2),
        "loss.identity": Range(0.1, 5.0, off=0.0),
        "loss.adversarial": Choice(("lsgan", "hinge")),
        "optim.beta1": Range(0.0, 0.9, log=False),
        "batch": Choice((4, 8)),
    },
    points=6,
    seeds=2,
)
LINES = {
    "Losses": ["loss/cycle_t", "divergence/onset", "loss/cycle_s", "loss/segmentation", "loss/generator"],
    "Critics": ["critic/auc_t", "critic/auc_s", "critic/auc_p", "critic/auc_p_low", "critic/gap_t", "critic/gap_s"],
    "Balance": ["balance/generator", "balance/decoder", "balance/encoder", "balance/generator_cycle_t"],
    "Divergence": ["divergence/stability", "divergence/saturation_st", "divergence/saturation_ts"],
    "Quality": ["quality/translated_dice", "quality/target_dice", "quality/composite", "validator/entropy"],
    "System": ["system/steps_per_second", "system/device_hours"],
}
IMAGES = [f"panels/{name}" for name in ("x_s", "x_st", "x_sts", "x_t", "x_ts", "x_tst")]


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A key that no server but ours would take, and nobody's settings."""
    wandb.teardown()  # its address is one of these: given back afterwards, it would be nobody's
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # discards
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    wandb.teardown()


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", url)
    wandb.teardown()  # it reads the environment once


def sections(study: Study = STUDY) -> dict[str, list[dict[str, Any]]]:
    """A view's panels by section."""
    found = specification(study)["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in found}


def of_kind(kind: str, study: Study = STUDY) -> list[dict[str, Any]]:
    """The settings of all panels of a kind."""
    return [panel["config"] for several in sections(study).values() for panel in several if panel["viewType"] == kind]


def run_set(study: Study = STUDY) -> dict[str, Any]:
    (found,) = specification(study)["section"]["runSets"]
    return dict(found)


# --- what it shows ----------------------------------------------------------------------------------------------------


def test_sections_are_read_from_the_whole_to_the_parts() -> None:
    losses, *others = LINES
    *signals, system = others
    assert list(sections()) == [
        "Overview", "Dice against S", "What matters", losses, *signals, "Panels", system
    ]  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_a_section_shows_its_signals_over_steps(name: str) -> None:
    plots = sections()[name]
    assert {plot["viewType"] for plot in plots} == {"Run History Line Plot"}
    assert {plot["config"]["xAxis"] for plot in plots} == {"step"}
    shown = [signal for plot in plots for signal in plot["config"]["metrics"]]
    assert set(LINES[name]) <= set(shown)
    assert len(shown) == len(set(shown))


def test_losses_have_a_logarithmic_axis_and_the_onset_is_a_dot_on_the_curve_that_tells_it() -> None:
    losses = [plot["config"] for plot in sections()["Losses"]]
    assert all(plot["yLogScale"] for plot in losses)
    assert ["loss/cycle_t", "divergence/onset"] in [plot["metrics"] for plot in losses]
    others = [plot["config"] for name in LINES if name != "Losses" for plot in sections()[name]]
    assert not any("yLogScale" in plot for plot in others)


def test_shares_and_areas_have_axes_from_0_to_1() -> None:
    ends = {
        signal: (plot.get("yAxisMin"), plot.get("yAxisMax"))
        for plot in of_kind("Run History Line Plot")
        for signal in plot["metrics"]
    }
    bounded = ("critic/auc_", "balance/", "quality/", "divergence/stability")
    assert {ends[signal] for signal in ends if signal.startswith(bounded)} == {(0, 1)}
    assert ends["critic/gap_t"] == (None, None)


def test_every_term_that_can_move_a_network_has_its_share_shown() -> None:
    terms = balance.weights(PUBLISHED.at("loss.identity", 1.0))
    shares = set(balance.shares({network: dict.fromkeys(several, 1.0) for network, several in terms.items()}))
    plots = [plot["config"] for plot in sections()["Balance"]]
    assert {signal for plot in plots for signal in plot["metrics"]} == shares
    assert {plot.get("limit") for plot in plots if len(plot["metrics"]) > 1} == {FEW}


def test_all_that_is_shown_is_what_a_real_run_gives_to_w_and_b(store: Store, tiny: RunConfig, tmp_path: Path) -> None:
    run = tiny.having({"steps": 2, "evaluations": 1, "balance.every": 1, "loss.identity": 1.0})
    record = Record(tmp_path / "run")
    list(launch(record.folder, run.at("data.cohort", store.fingerprint), store.place.url))
    given = {signal for row in record.rows() for signal in wandb_row.row(row, 0, 1.0)} | {wandb_row.ONSET}
    pictures = {name for step in (1, 2) if record.picture(step).is_file() for name in images(record, step)}
    told = wandb_study.judged(record, "translated_dice") | wandb_study.cost(record, 0.0)
    assert {signal for plot in of_kind("Run History Line Plot") for signal in plot["metrics"]} <= given
    assert {key for browser in of_kind("Media Browser") for key in browser["mediaKeys"]} == set(IMAGES) <= pictures
    (scatter,) = of_kind("Scatter Plot")
    summed = {scatter[axis].removeprefix("summary:") for axis in ("xAxis", "yAxis", "zAxis")}
    pinned = {name.removeprefix("summary:") for name in run_set()["runFeed"]["columnPinned"] if "summary:" in name}
    assert summed | pinned <= set(told)


def images(record: Record, step: int) -> list[str]:
    return list(wandb_row.panels(record.picture(step), step))


def test_points_lie_by_s_and_dice() -> None:
    (scatter,) = of_kind("Scatter Plot")
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:stability", "summary:dice")
    assert "${summary:verdict}" in scatter["legendTemplate"]
    assert "S ≥ 0.9" in scatter["chartTitle"]


def test_searched_settings_are_addressed_as_our_runs_hold_them() -> None:
    (plot,) = of_kind("Parallel Coordinates Plot")
    parts = [path.partition(".") for path in STUDY.space]  # {"optim": {"value": {"lr": ...}}, "seed": {"value": ...}}
    held = [f"config:{group}.value{dot}{name}" for group, dot, name in parts]
    assert [column["accessor"] for column in plot["columns"]] == [*held, "summary:stability", "summary:dice"]
    assert [column["displayName"] for column in plot["columns"]] == [*STUDY.space, "stability", "dice"]


def test_an_axis_is_logarithmic_where_ratios_are_searched_and_0_is_not_among_them() -> None:
    (plot,) = of_kind("Parallel Coordinates Plot")
    assert [column["displayName"] for column in plot["columns"] if column.get("log")] == ["optim.lr"]


def test_where_nothing_is_searched_the_settings_are_those_in_which_controls_differ() -> None:
    first: Any = ({}, {"optim.lr": 1e-3}, {"optim.lr": 1e-4, "loss.cycle": 5.0})
    study = Study(name="grid", question="Which?", run=PUBLISHED, space={}, first=first, points=3)
    (plot,) = of_kind("Parallel Coordinates Plot", study)
    assert [column["displayName"] for column in plot["columns"]] == ["optim.lr", "loss.cycle", "stability", "dice"]


def test_importance_is_told_for_dice_and_for_s() -> None:
    assert [plot["targetKey"] for plot in of_kind("Parameter Importance")] == ["dice", "stability"]


def test_verdicts_are_counted_as_a_study_s_own_run_counts_them() -> None:
    (bars,) = of_kind("Bar Chart")
    assert bars["metrics"] == [f"runs/{kind}" for kind in (*get_args(Kind), "unfinished")]


def test_the_study_is_told_in_words() -> None:
    (panel,) = of_kind("Markdown Panel")
    for word in (STUDY.question, "translated source", "6 points × 400 steps × 2 seeds", "Feasible: S ≥ 0.9", "share"):
        assert word in panel["value"]


@pytest.mark.parametrize("name", ["sweep", "it's", "lr=1e-3", 'a "b" < c'])
def test_runs_are_those_of_the_study_the_most_stable_first(name: str) -> None:
    study = Study(name=name, question="Which?", run=PUBLISHED, space=STUDY.space, points=6)
    (only,) = run_set(study)["filters"]["filters"]
    assert (only["key"], only["op"], only["value"]) == ({"section": "run", "name": "group"}, "=", name)
    order = [(key["key"]["name"], key["ascending"]) for key in run_set(study)["sort"]["keys"]]
    assert order == [("stability", False), ("dice", False)]
    assert specification(study)["section"]["settings"]["maxRuns"] == RUNS


def test_a_view_is_the_same_each_time_it_is_made() -> None:
    assert specification(STUDY) == specification(STUDY)
    places = [panel["__id__"] for several in sections().values() for panel in several]
    assert len(places) == len(set(places))


# --- saving it --------------------------------------------------------------------------------------------------------


def test_a_view_that_is_saved_twice_is_one_view(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        point_at(server.url, monkeypatch)
        address = create(STUDY)
        ((key, saved),) = server.views.saved.items()
        assert (saved["entityName"], saved["projectName"], saved["displayName"]) == ("lab", "equipoise", "sweep")
        assert json.loads(saved["spec"]) == specification(STUDY)
        assert address == f"{server.url}/lab/equipoise?nw={saved['name'].removeprefix('nw-').removesuffix('-v')}"
        assert create(STUDY) == address
        assert list(server.views.saved) == [key]
        other = Study(name="other", question="Which?", run=PUBLISHED, space=STUDY.space, points=6)
        assert create(other) != address
        assert len(server.views.saved) == 2


def test_w_and_b_s_own_way_of_saving_gives_it_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        point_at(server.url, monkeypatch)
        workspace(STUDY, "lab", "equipoise").save()
        (saved,) = server.views.saved.values()
        assert json.loads(saved["spec"]) == specification(STUDY)
        create(STUDY)
        assert len(server.views.saved) == 1


def test_a_team_that_is_named_gets_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        server.views.entity = "team"
        monkeypatch.setenv("WANDB_ENTITY", "team")
        point_at(server.url, monkeypatch)
        assert "/team/equipoise?nw=" in create(STUDY)


@pytest.mark.parametrize(
    ("manner", "found"),
    [
        ("refuses", "found no answer"),
        ("500", r"found no answer \(HTTP 500\)"),
        ("401", r"found a refused key \(HTTP 401\).*wandb login"),
        ("503", "found a failure of W&B's .*HTTP 503"),
    ],
)
def test_w_and_b_that_refuses_or_fails_is_told_in_words(
    manner: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Manner = "well" if manner == "refuses" else manner  # type: ignore[assignment]
    with serving(kind) as server:
        point_at(server.url if manner != "refuses" else f"http://127.0.0.1:{unused()}", monkeypatch)
        before = wandb.setup().settings.x_graphql_retry_max
        with pytest.raises(InputError, match=found):
            create(STUDY)
        assert wandb.setup().settings.x_graphql_retry_max == before
        assert not server.views.saved


@pytest.mark.parametrize(("key", "found"), [(None, "no API key"), ("abc", "an API key that can be none .*40")])
def test_without_a_key_nothing_is_tried(key: str | None, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        monkeypatch.delenv("WANDB_API_KEY")
        if key:
            monkeypatch.setenv("WANDB_API_KEY", key)
        point_at(server.url, monkeypatch)
        with pytest.raises(InputError, match=found):
            create(STUDY)
        assert not server.sent


def test_a_project_without_runs_and_an_account_without_a_name_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        point_at(server.url, monkeypatch)
        server.views.projects = []
        with pytest.raises(InputError, match="lab/equipoise: found no such project"):
            create(STUDY)
        server.views.entity = None
        with pytest.raises(InputError, match=r"without a default entity.*WANDB_ENTITY"):
            create(STUDY)
        assert not server.views.saved


def test_neither_host_nor_paths_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "planted-host")
    folder = StudyFolder.create(tmp_path / "results" / "sweep", STUDY, f"python {tmp_path}/study.py", {})
    with serving() as server:
        point_at(server.url, monkeypatch)
        create(folder.study)
        wandb.teardown()
        sent = b"\n".join(server.sent)
    assert b"UpsertView2" in sent
    for word in ("planted-host", str(tmp_path), str(Path(sys.prefix)), str(Path(__file__).parent)):
        assert word.encode() not in sent


# --- the commands ----------------------------------------------------------------------------------------------------


def test_the_command_says_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    StudyFolder.create(tmp_path / "results" / "sweep", STUDY, "typed", {})
    with serving() as server:
        point_at(server.url, monkeypatch)
        assert command("workspace", "--results", tmp_path / "results").stdout == create(STUDY) + "\n"


def test_the_command_prints_the_view_where_there_is_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    folder = StudyFolder.create(tmp_path / "sweep", STUDY, "typed", {})
    monkeypatch.delenv("WANDB_API_KEY")
    with monkeypatch.context() as offline:
        offline.setattr(socket, "socket", None)
        said = command("workspace", folder.folder, "--json").stdout
    assert json.loads(said) == specification(STUDY)


def unused() -> int:
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_syncing_a_study_s_runs_saves_its_view_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    folder = StudyFolder.create(tmp_path / STUDY.name, STUDY, "typed", {})
    tracker = WandbTracker(folder.wandb, group=STUDY.name, prefix="id", mode="offline", images=False)
    tracker.conclude(folder, None)
    tracker.close()
    with serving() as server:
        point_at(server.url, monkeypatch)
        done = command("sync", folder.folder)
        assert done.returncode == 0, done.stderr
        assert len(server.views.saved) == 1
        assert f"view: {server.url}/lab/equipoise" in done.stdout
        again = command("sync", folder.folder)
        assert "0 runs uploaded now, 1 had been before" in again.stdout
        assert "view" not in again.stdout
