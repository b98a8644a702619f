"""The dashboard shows a study with what its records say, and changes nothing of it."""

import base64
import json
import math
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer

import optuna
import pytest
import torch

from equipoise.config import PUBLISHED
from equipoise.launch import dashboard
from equipoise.launch.dashboard import make
from equipoise.launch.ledger import Assignment, Ledger
from equipoise.monitor import Finding, Verdict
from equipoise.record import Record, _line
from equipoise.search import Range
from equipoise.study import Study, StudyFolder
from slicestore.errors import InputError

STUDY = Study(
    name="shown",
    question="What is seen?",
    run=PUBLISHED.at("steps", 400).at("evaluations", 4),
    space={"optim.lr": Range(1e-5, 1e-2)},
    points=3,
)
NAN = Finding("non_finite", "loss/generator", onset=200, alarm=200, value=math.nan, limit=math.inf)
PANELS = b"\x89PNG the panels"


def end(folder: StudyFolder, ledger: Ledger, dice: float, verdict: Verdict) -> None:
    """One more point, from being asked for to its end."""
    point = ledger.ask()
    assert point is not None
    finish(folder, ledger, point, dice, verdict)


def finish(folder: StudyFolder, ledger: Ledger, point: Assignment, dice: float, verdict: Verdict) -> None:
    record = Record(folder.runs / point.name)
    record.open(point.config, torch.device("cpu"))
    loss = math.nan if verdict.onset else 0.1
    row = {"step": verdict.step, "loss/cycle_t": 0.2, "loss/generator": loss, "loss/segmentation": 0.3, "auc/t": 0.8}
    row |= {"quality/translated_dice": dice, "divergence/stability": verdict.stability or 1.0, "time/block": 1.0}
    (record.folder / "signals.jsonl").write_text(_line(row))
    record.picture(verdict.step).parent.mkdir()
    record.picture(verdict.step).write_bytes(PANELS)
    record.close(verdict)
    ledger.close(point)


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder.create(tmp_path / "study", STUDY, "test", {})


@pytest.fixture
def ledger(folder: StudyFolder) -> Ledger:
    """A study of which two points have ended."""
    ledger = Ledger(folder, STUDY)
    end(folder, ledger, 0.7, Verdict("stable", 400, 400, 0.97))
    end(folder, ledger, math.nan, Verdict("diverged", 200, 400, 0.5, (NAN,)))
    return ledger


@pytest.fixture
def server(folder: StudyFolder, ledger: Ledger) -> Iterator[WSGIServer]:
    with make(folder, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: WSGIServer, path: str, host: str | None = None) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}")
    if host:
        request.add_header("Host", host)
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200
        content: bytes = answer.read()
    return content


def study(server: WSGIServer) -> dict[str, Any]:
    detail: dict[str, Any] = json.loads(get(server, "/api/studies/0"))
    return detail


def test_the_page_and_the_study_are_served(server: WSGIServer) -> None:
    assert b"Optuna Dashboard" in get(server, "/dashboard")
    assert [s["study_name"] for s in json.loads(get(server, "/api/studies"))["study_summaries"]] == ["shown"]


def test_each_point_that_ended_has_its_verdict_in_a_note(server: WSGIServer) -> None:
    notes = [trial["note"]["body"] for trial in study(server)["trials"]]
    assert notes[0].startswith("**stable after 400 of 400 steps**\n\ntranslated dice 0.700, S 0.970")
    assert "loss/generator became nan at step 200" in notes[1]
    assert "translated dice nan, S 0.500, onset at step 200 of 400" in notes[1]


def test_the_last_panels_are_shown_from_where_they_lie(server: WSGIServer) -> None:
    trial = study(server)["trials"][0]
    (artifact,) = trial["artifacts"]
    address = f"/artifacts/0/{trial['trial_id']}/{artifact['artifact_id']}"
    assert address in trial["note"]["body"]
    assert get(server, address) == PANELS


def test_each_run_has_a_page_of_its_own_to_which_its_note_leads(server: WSGIServer, folder: StudyFolder) -> None:
    trial = study(server)["trials"][1]
    name = trial["user_attrs"][[a["key"] for a in trial["user_attrs"]].index("run")]["value"].strip('"')
    assert f"](/runs/{name})" in trial["note"]["body"]
    page = get(server, f"/runs/{name}").decode()
    assert f"<h1>{name}</h1>" in page
    assert "loss/generator became nan at step 200" in page
    assert base64.b64encode(PANELS).decode() in page
    with pytest.raises(urllib.error.HTTPError) as missing:
        get(server, "/runs/../study.json")
    missing.value.close()
    assert missing.value.code == 404


def test_a_run_at_work_leads_to_its_curves_so_far(server: WSGIServer, folder: StudyFolder, ledger: Ledger) -> None:
    point = ledger.ask()
    assert point is not None
    record = Record(folder.runs / point.name)
    record.open(point.config, torch.device("cpu"))
    assert "No step has been recorded yet" in get(server, f"/runs/{point.name}").decode()
    (record.folder / "signals.jsonl").write_text(_line({"step": 8, "loss/cycle_t": 0.2, "time/block": 1.0}))
    time.sleep(2.1)  # the dashboard keeps its list of trials for two seconds
    assert study(server)["trials"][2]["note"]["body"] == (f"At work. [Curves and panels so far](/runs/{point.name})")
    page = get(server, f"/runs/{point.name}").decode()
    assert "without a verdict, at step 8 of 400" in page
    assert "Losses" in page


def test_whether_the_constraint_is_met_is_shown(server: WSGIServer) -> None:
    trials = study(server)["trials"]
    assert "constraint: S ≥ 0.9 is met" in trials[0]["note"]["body"]
    assert "constraint: S ≥ 0.9 is missed by 0.400" in trials[1]["note"]["body"]
    shown = [{a["key"]: a["value"] for a in trial["user_attrs"]} for trial in trials]
    assert [float(about["constraint"]) for about in shown] == [pytest.approx(-0.07), pytest.approx(0.4)]
    assert not any({"point", "rank"} & about.keys() for about in shown)  # lines that no page has room for


def test_the_curves_are_drawn(server: WSGIServer) -> None:
    drawn = {g["id"]: json.loads(g["graph_object"]) for g in study(server)["plotly_graph_objects"]}
    assert set(drawn) == {"losses", "critics", "dice-against-stability", "survival"}
    assert all(figure["data"] for figure in drawn.values())


def test_the_study_is_told_with_its_best_point(server: WSGIServer) -> None:
    assert study(server)["note"]["body"].startswith("**What is seen?**\n\nBest point 0000-")


def test_a_point_that_ends_while_the_dashboard_is_open_is_told(
    server: WSGIServer, folder: StudyFolder, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(study(server)["trials"]) == 2
    monkeypatch.setattr(dashboard, "FIGURES_EVERY", 0.0)
    end(folder, ledger, 0.8, Verdict("d_wins", 400, 400, 0.91))
    time.sleep(2.1)  # the dashboard keeps its list of trials for two seconds
    shown = study(server)
    assert shown["trials"][2]["note"]["body"].startswith("**d wins after 400 of 400 steps**")
    assert "Best point 0002-" in shown["note"]["body"]


def test_the_objective_has_its_name(server: WSGIServer) -> None:
    assert study(server)["objective_names"] == ["translated dice"]


def test_a_look_and_an_edit_leave_the_study_as_it_was_byte_for_byte(server: WSGIServer, folder: StudyFolder) -> None:
    before = {p: p.read_bytes() for p in folder.folder.rglob("*") if p.is_file()}
    study(server)
    edit = json.dumps({"body": "a visitor's words", "version": study(server)["note"]["version"] + 1}).encode()
    address = f"http://127.0.0.1:{server.server_port}/api/studies/0/note"
    request = urllib.request.Request(address, edit, {"Content-Type": "application/json"}, method="PUT")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 204
    assert study(server)["note"]["body"] == "a visitor's words"
    assert {p: p.read_bytes() for p in folder.folder.rglob("*") if p.is_file()} == before


def test_looking_twice_tells_nothing_twice(server: WSGIServer) -> None:
    assert study(server)["trials"][0]["note"] == study(server)["trials"][0]["note"]
    assert study(server)["trials"][0]["note"]["version"] == 1


def test_a_page_under_another_name_gets_no_answer(server: WSGIServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(server, "/api/studies", host="rebound.example:8080")
    refused.value.close()
    assert refused.value.code == 403
    for name in ("localhost", "localhost:9000", "127.0.0.1:8080", "[::1]:8080"):
        get(server, "/api/studies", host=name)


def test_it_listens_on_loopback(server: WSGIServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_a_busy_port_is_told(folder: StudyFolder, ledger: Ledger) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"127\.0\.0\.1:{port}: found a port that another program listens on"):
            make(folder, port=port)


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("127.0.0.1", 70_000)])
def test_a_place_where_nothing_can_listen_is_told(folder: StudyFolder, ledger: Ledger, host: str, port: int) -> None:
    with pytest.raises(InputError, match="no place to listen"):
        make(folder, host=host, port=port)


def test_a_folder_without_a_journal_is_told_and_gets_none(folder: StudyFolder) -> None:
    with pytest.raises(InputError, match=r"no journal\.log"):
        make(folder)
    assert not folder.journal.exists()
    folder.journal.touch()
    with pytest.raises(InputError, match=r"no journal\.log"):
        make(folder)


def test_a_study_in_a_database_is_shown_as_it_goes_on_and_not_written_to(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/points.db"
    folder = StudyFolder.create(tmp_path / "study", STUDY, "test", {"storage": url})
    with pytest.raises(InputError, match="no points in the study's database"):
        make(folder, port=0)
    ledger = Ledger(folder, STUDY, url=url)
    end(folder, ledger, 0.7, Verdict("stable", 400, 400, 0.97))
    point = ledger.ask()
    assert point is not None
    with make(folder, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            first, second = study(server)["trials"]
            assert first["note"]["body"].startswith("**stable after 400 of 400 steps**")
            assert (second["state"], second["note"]["body"]) == ("Running", "")
            finish(folder, ledger, point, math.nan, Verdict("diverged", 200, 400, 0.5, (NAN,)))
            time.sleep(2.1)  # the dashboard keeps its list of trials for two seconds
            first, second = study(server)["trials"]
            assert second["state"] == "Complete"
            assert "became nan at step 200" in second["note"]["body"]
        finally:
            server.shutdown()
            thread.join()
    kept = optuna.load_study(study_name=f"shown-{folder.id}", storage=url)
    assert not any("dashboard" in key for key in kept._storage.get_study_system_attrs(kept._study_id))
